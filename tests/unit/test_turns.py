"""Chats that a model writes itself: where the turns of a template begin and end, and what is drawn between them."""

import re

import pytest
import torch
from torch import nn

from lowrank_ft.conversion.batches import own_batches
from lowrank_ft.conversion.sampling import sample_blocks
from lowrank_ft.data.turns import NoTurnsError, find_turns
from lowrank_ft.errors import DataError
from tests import chats
from tests.conftest import tiny_llama

TEMPLATES = {name: getattr(chats, name) for name in ("CHATML", "WITH_SYSTEM", "HEADERS", "STRICT")}
QUESTION, ANSWER, FOLLOWING = "How far is the moon?", "Rather far, as moons go.", "(and the sun?)"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_turns_and_words_make_up_what_the_template_renders(template):
    tokenizer = chats.chat_tokenizer(template)
    turns = find_turns(tokenizer)
    chat = [("user", QUESTION), ("assistant", ANSWER), ("user", FOLLOWING), ("assistant", ANSWER)]
    messages = [{"role": role, "content": content} for role, content in chat]
    rendered = tokenizer.apply_chat_template(messages, return_dict=False)
    ids = [tokenizer(words, add_special_tokens=False)["input_ids"] for _, words in chat]
    between = [turns.begin, turns.to_assistant, turns.to_user, turns.to_assistant]
    built = [i for pair in zip(between, ids, strict=True) for part in pair for i in part]
    assert rendered[: len(built)] == built
    assert rendered[len(built)] == tokenizer.eos_token_id
    assert turns.to_assistant[0] == turns.to_user[0] == tokenizer.eos_token_id


def test_the_beginning_of_words_may_join_the_templates_last_characters():
    """Where a space belongs to the first word, the model has to draw both as one token."""
    tokenizer = chats.chat_tokenizer("{% for m in messages %}{{ '<|head|>' + m.role + ' ' + m.content + '<|im_end|>' }}"
                                     "{% endfor %}{% if add_generation_prompt %}<|head|>assistant {% endif %}")  # fmt: skip
    turns = find_turns(tokenizer)
    assert tokenizer.decode(turns.begin) == "<|head|>user"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "the end"}], return_dict=False)
    assert rendered[: len(turns.begin)] == list(turns.begin)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template"),
        (chats.NO_PROMPT, "the chat template has no generation prompt"),
        (chats.OPEN_ENDED, "in the chat template a user's turn does not end with a token of its own"),
        (chats.SHOUTING, "the chat template changes a user's words"),
        ("{{ raise_exception('no') }}", r"the chat template refuses a chat \(no\)"),
        (chats.CHATML.replace("'<|im_start|>'", "('A' if messages | length > 1 else 'B')"), "where a user's turn begins"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}<|head|>{% endif %}", "puts nothing before a user's words"),
    ],
)  # fmt: skip
def test_templates_without_turns_say_why(template, reason):
    with pytest.raises(NoTurnsError, match=reason):
        find_turns(chats.chat_tokenizer(template))


def model_of(probabilities):
    """Every position: these tokens with these probabilities."""
    model = tiny_llama(vocab_size=chats.VOCABULARY, max_position_embeddings=512)
    model.lm_head = nn.Linear(32, chats.VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e9)
        for token, probability in probabilities.items():
            model.lm_head.bias[token] = torch.tensor(probability).log()
    return model


def parts(block, turns):
    """The words between the template's tokens, ``(is the user's, ids)``, by a search in a string of ids."""
    shown = "".join(f"{i} " for i in block)
    begin, *switches = ("".join(f"{i} " for i in ids) for ids in (turns.begin, turns.to_assistant, turns.to_user))
    assert shown.startswith(begin)
    shown, found, user = shown[len(begin) :], [], True
    while shown:
        words, switch, shown = re.match(rf"(.*?)(?:{switches[0 if user else 1]}|($))(.*)", shown).groups()
        found.append((user, [int(i) for i in words.split()]))
        user = not user
        assert switch is None or not shown
    return found


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_keeps_to_its_template_and_draws_the_rest(template):
    """Half of what the model says is the word 7, a quarter the end of a turn, a quarter another end of a text."""
    tokenizer = chats.chat_tokenizer(template)
    turns = find_turns(tokenizer)
    other_end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = model_of({7: 0.5, tokenizer.eos_token_id: 0.25, other_end: 0.25})
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other_end]
    stock = model.generation_config
    written = sample_blocks(model, 24, 120, batch_size=16, seed=1, turns=turns)
    assert model.generation_config is stock
    assert written.shape == (24, 120)
    assert not (written == other_end).any()
    words = []
    for block in written.tolist():
        found = parts(block, turns)
        assert len(found) > 3
        words += found[:-1]  # the last is cut off by the end of the block
    assert all(ids and set(ids) == {7} for _, ids in words)
    for user in (True, False):  # after the first word, each further one has probability 1/2
        counts = torch.tensor([len(ids) for u, ids in words if u is user], dtype=torch.double)
        assert counts.mean().item() == pytest.approx(2, abs=0.5)
    assert len(written.unique(dim=0)) == 24


def test_a_user_who_never_ends_is_ended_and_a_reply_is_not():
    turns = find_turns(chats.chat_tokenizer())
    written = sample_blocks(model_of({7: 1.0}), 3, 100, turns=turns)
    user, reply = parts(written[0].tolist(), turns)
    assert len(user[1]) == 25
    assert len(reply[1]) == 100 - 25 - len(turns.begin) - len(turns.to_assistant)


def test_one_half_is_plain_text_and_one_half_chats(capsys):
    tokenizer = chats.chat_tokenizer()
    turns = find_turns(tokenizer)
    model = tiny_llama(vocab_size=chats.VOCABULARY, max_position_embeddings=512)
    rows = torch.cat([b["input_ids"] for b in own_batches(model, 2100, 100, seed=3, preprocessor=tokenizer)])
    assert rows.shape == (21, 100)
    chat = (rows[:, : len(turns.begin)] == torch.tensor(turns.begin)).all(1)
    assert chat.sum() == 10
    assert (rows[~chat][:, 0] == model.config.bos_token_id).all()
    assert chat[:10].any()
    assert chat[10:].any()
    assert chat.tolist() != sorted(chat.tolist())  # mixed, for some steps take the first batches only
    again = torch.cat([b["input_ids"] for b in own_batches(model, 2100, 100, seed=3, preprocessor=tokenizer)])
    assert torch.equal(again, rows)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("template", "length", "note"),
    [
        (None, 100, ""),
        (chats.NO_PROMPT, 100, "the chat template has no generation prompt"),
        (chats.WITH_SYSTEM, 40, "the chat template takes 25 tokens of a block of 40"),
    ],
)
def test_without_turns_all_is_plain_text(capsys, template, length, note):
    tokenizer, model = (
        chats.chat_tokenizer(template),
        tiny_llama(vocab_size=chats.VOCABULARY, max_position_embeddings=512),
    )
    rows = torch.cat([b["input_ids"] for b in own_batches(model, 2100, length, preprocessor=tokenizer)])
    plain = torch.cat([b["input_ids"] for b in own_batches(model, 2100, length)])
    assert torch.equal(rows, plain)
    said = capsys.readouterr().err
    assert said == (f"note: the model writes plain text and no chats: {note}\n" if note else "")


def test_a_tokenizer_of_another_model():
    with pytest.raises(
        DataError, match="gives its chat template token ids up to 2050, and the model has 97 embeddings"
    ):
        own_batches(tiny_llama(), 2100, preprocessor=chats.chat_tokenizer())
