"""Replies of chat models, against plain references; a tiny chat model with a template made here."""

import json

import pytest
import torch
from datasets import Dataset
from torch import nn

from lowrank_ft.data.turns import find_turns
from lowrank_ft.errors import ConfigError, DataError
from lowrank_ft.evaluation.prompts import PROMPTS, read_prompts
from lowrank_ft.evaluation.talk import Reply, repetition, talk, write_replies
from tests import chats
from tests.conftest import tiny_llama

QUESTIONS = ["Why?", "How many words are in this longer question of mine?", "Who is there", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return chats.chat_tokenizer(chats.WITH_SYSTEM)


def model(seed=0, **kwargs):
    """Its logits are far apart, so that rounding in a padded batch changes no reply."""
    made = tiny_llama(seed, **{"vocab_size": chats.VOCABULARY, "max_position_embeddings": 512, **kwargs})
    with torch.no_grad():
        made.lm_head.weight.mul_(50)
    return made


def counted_naively(words):
    """Share of the 4-grams that stood before, by looking at every earlier place."""
    places = range(len(words) - 3)
    again = [any(words[j : j + 4] == words[i : i + 4] for j in range(i)) for i in places]
    return sum(again) / len(again) if again else 0.0


@pytest.mark.parametrize(
    "words",
    [[], [1, 2, 3], [1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 2, 3, 4, 1, 2, 3, 4, 5], list(range(20)),
     torch.randint(3, (60,), generator=torch.Generator().manual_seed(0)).tolist()],
)  # fmt: skip
def test_repetition(words):
    assert repetition(words) == pytest.approx(counted_naively(words))
    assert repetition([1, 2] * 50) > 0.95
    # The token that ends a reply is not one of its words.
    assert Reply((), (*words, 9), "", True).repetition == repetition(words)
    assert Reply((), tuple(words), "", False).repetition == repetition(words)


@torch.no_grad()
def reply_naively(made, prompt, most, ends):
    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(made(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_replies_are_greedy_and_their_own_whatever_shares_the_batch(tokenizer):
    made = model()
    made.train()
    made.generation_config.update(do_sample=True, repetition_penalty=9.0, max_length=3)
    stock = made.generation_config
    replies = write_replies(made, tokenizer, QUESTIONS, max_new_tokens=12, batch_size=3)
    assert made.generation_config is stock
    assert made.training
    made.eval()
    for question, reply in zip(QUESTIONS, replies, strict=True):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert reply.prompt == tuple(prompt)
        assert reply.ids == reply_naively(made, prompt, 12, {tokenizer.eos_token_id, 2})
        assert reply.text == tokenizer.decode(reply.ids, skip_special_tokens=True).strip()
        assert reply.ended == (reply.ids[-1] in (tokenizer.eos_token_id, 2))
    assert len({r.ids for r in replies}) > 1


def test_who_ends_and_who_does_not(tokenizer):
    """One model says the same word for ever, the other ends at once: after the last prompt token it says the end."""
    made = model()
    made.lm_head = nn.Linear(32, chats.VOCABULARY)
    with torch.no_grad():
        made.lm_head.weight.zero_()
        made.lm_head.bias.zero_()
        made.lm_head.bias[7] = 5.0
    found = talk(made, tokenizer, QUESTIONS, max_new_tokens=20)
    assert found["model"] == {"repetition": 16 / 17, "stopped": 0.0, "reply_tokens": 20.0}
    assert set(found) == {"model", "replies"}
    assert [r["prompt"] for r in found["replies"]] == QUESTIONS
    assert found["replies"][0]["model"]["text"] == tokenizer.decode([7] * 20).strip()
    with torch.no_grad():
        made.lm_head.bias[tokenizer.eos_token_id] = 6.0
    found = talk(made, tokenizer, QUESTIONS, max_new_tokens=20)
    assert found["model"] == {"repetition": 0.0, "stopped": 1.0, "reply_tokens": 1.0}
    assert found["replies"][0]["model"] == {"text": "", "tokens": 1, "ended": True, "repetition": 0.0}


@torch.no_grad()
def agreement_naively(made, dense, replies):
    kl, same, tokens = 0.0, 0, 0
    for reply in replies:
        ids = torch.tensor([[*reply.prompt, *reply.ids]])
        q, p = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (made, dense))
        for place in range(len(reply.prompt), ids.shape[1]):
            a, b = p[place - 1], q[place - 1]
            kl += sum(float(x) * (float(x.log()) - float(y.log())) for x, y in zip(a, b, strict=True) if x > 0)
            same += int(a.argmax() == b.argmax())
            tokens += 1
    return kl / tokens, same / tokens, tokens


def test_agreement_on_the_baselines_replies(tokenizer):
    dense, made = model(), model()
    with torch.no_grad():
        for weight in made.model.layers[1].parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found = talk(made, tokenizer, QUESTIONS, dense, max_new_tokens=9, batch_size=3)
    replies = write_replies(dense, tokenizer, QUESTIONS, max_new_tokens=9)
    kl, top1, tokens = agreement_naively(made, dense, replies)
    assert kl > 0.05
    assert 0 < top1 < 1
    assert found["agreement"] == {"kl": pytest.approx(kl, rel=1e-3), "top1": pytest.approx(top1), "tokens": tokens}
    assert found["baseline"]["reply_tokens"] == tokens / len(QUESTIONS)
    assert [r["baseline"]["text"] for r in found["replies"]] == [r.text for r in replies]
    assert any(r["baseline"]["text"] != r["model"]["text"] for r in found["replies"])
    json.dumps(found)
    same = talk(dense, tokenizer, QUESTIONS, dense, max_new_tokens=9)
    assert same["agreement"] == {"kl": pytest.approx(0, abs=1e-6), "top1": 1.0, "tokens": tokens}
    assert same["model"] == same["baseline"]


def test_no_agreement_where_the_prompts_are_other_tokens(tokenizer, capsys):
    found = talk(model(), tokenizer, ["Why?"], model(), chats.chat_tokenizer(), max_new_tokens=3)
    assert found["agreement"] is None
    said = "note: no agreement on replies is shown, because"
    assert capsys.readouterr().err == f"{said} the tokenizers or chat templates differ\n"
    wider = model(vocab_size=chats.VOCABULARY + 8)
    assert talk(model(), tokenizer, ["Why?"], wider, max_new_tokens=3)["agreement"] is None
    assert capsys.readouterr().err == f"{said} the vocabularies have 2056 and 2064 tokens\n"


def test_prompts_may_be_chats(tokenizer):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hu?"},
    ]
    reply = write_replies(model(), tokenizer, [chat], max_new_tokens=2)[0]
    turns = find_turns(tokenizer)
    assert reply.prompt[: len(turns.begin)] == turns.begin
    assert tokenizer.decode(reply.prompt).endswith("user\nHu?<|im_end|>\n<|im_start|>assistant\n")
    assert talk(model(), tokenizer, [chat], max_new_tokens=2)["replies"][0]["prompt"] == "Hu?"


def test_what_cannot_be_replied_to(tokenizer):
    with pytest.raises(DataError, match="there is no prompt to reply to"):
        talk(model(), tokenizer, [])
    with pytest.raises(DataError, match=r"the tokenizer has no chat template, which replies need; .* with --data"):
        talk(model(), chats.chat_tokenizer(None), ["Why?"])
    strict = chats.chat_tokenizer(chats.STRICT)
    with pytest.raises(DataError, match=r"refuses prompt 2 \(roles must alternate.*\); take it out"):
        talk(model(), strict, ["Why?", [{"role": "assistant", "content": "Oh"}]])
    longest = len(write_replies(model(), tokenizer, [QUESTIONS[1]], 1)[0].prompt)
    short = model(max_position_embeddings=longest + 20)
    assert len(write_replies(short, tokenizer, QUESTIONS, 20)) == 4
    with pytest.raises(
        ConfigError, match=f"has {longest} tokens, and with 21 of a reply exceeds the {longest + 20} pos"
    ):
        write_replies(short, tokenizer, QUESTIONS, 21)
    with pytest.raises(DataError, match=r"gives the prompts token ids up to 2050, and the model has 97 embeddings"):
        talk(tiny_llama(max_position_embeddings=512), tokenizer, ["Why?"])


# --- where prompts come from


def notes(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_prompts_of_files(tmp_path, capsys):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "p.txt").write_text("One?\n\n  Two?  \nThree?\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "One?"}\n{"prompt": null}\n{"prompt": " "}\n{"prompt": "Two?"}\n')
    Dataset.from_dict({"messages": [chat, None, chat[1:], [*chat, chat[0]]]}).to_parquet(str(tmp_path / "p.parquet"))
    assert read_prompts(str(tmp_path / "p.txt")) == ["One?", "Two?", "Three?"]
    assert read_prompts(str(tmp_path / "p.txt"), limit=2) == ["One?", "Two?"]
    assert notes(capsys) == []
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["One?", "Two?"]
    said = f"note: 2 of 4 prompts of {tmp_path}/p.jsonl are left out: 1 x it is null, 1 x it is empty"
    assert notes(capsys) == [said]
    assert read_prompts(str(tmp_path / "p.parquet")) == [chat[:1], [*chat, chat[0]]]
    assert "2 of 4 prompts" in notes(capsys)[0]
    assert read_prompts(str(tmp_path / "p.parquet"), limit=1) == [chat[:1]]


def test_files_without_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"p.txt holds no prompt; give one a line, or chats"):
        read_prompts(str(tmp_path / "p.txt"))
    (tmp_path / "p.jsonl").write_text('{"messages": []}\n{"messages": []}\n')
    with pytest.raises(DataError, match=r"p.jsonl holds no prompt: 2 x it has no messages; give"):
        read_prompts(str(tmp_path / "p.jsonl"))
    (tmp_path / "q.jsonl").write_text('{"question": "One?"}\n')
    with pytest.raises(DataError, match="has no column 'prompt' and no column 'messages'; it has question; rename"):
        read_prompts(str(tmp_path / "q.jsonl"))


def test_the_prompts_of_our_own_are_different_and_short():
    assert len(set(PROMPTS)) == len(PROMPTS) == 16
    assert all(isinstance(p, str) and 20 < len(p) < 250 for p in PROMPTS)
