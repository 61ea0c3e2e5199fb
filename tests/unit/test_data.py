import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from lowrank_ft.data.encoding import encode_chat, token_ids
from lowrank_ft.data.examples import IGNORED, StepBatches, collate, pack
from lowrank_ft.data.sources import read_rows
from lowrank_ft.data.tokenize_rows import tokenize_chats, tokenize_texts
from lowrank_ft.data.tokens import check_embeddings
from lowrank_ft.errors import DataError
from lowrank_ft.schedule import data_step_at
from lowrank_ft.training.data import load_data, load_distill_data
from lowrank_ft.training.options import DataArguments
from tests.conftest import DEMO_MODEL

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
REWRITING = "{% for m in messages %}{{ loop.index0 - messages | length }} {{ m.content }}\n{% endfor %}"
CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(DEMO_MODEL))


def batches_of(step, world, batch, accumulation, examples=53, seed=3):
    """All examples that all ranks see in one step."""
    seen = []
    for rank in range(world):
        sampler = iter(StepBatches(examples, batch, accumulation, seed, rank, world, step))
        seen += [i for _ in range(accumulation) for i in next(sampler)]
    return sorted(seen)


@pytest.mark.parametrize("step", [0, 1, 5, 40])
def test_a_step_sees_the_same_examples_however_it_is_spread(step):
    expected = batches_of(step, 1, 8, 1)
    for world, batch, accumulation in [(1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 1, 2)]:
        assert batches_of(step, world, batch, accumulation) == expected


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    sampler = iter(StepBatches(12, 4, 1, seed=0, rank=0, world_size=1, first_step=0))
    first, second = ([i for _ in range(3) for i in next(sampler)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_resuming_continues_the_same_stream():
    whole = iter(StepBatches(17, 3, 2, seed=1, rank=1, world_size=2, first_step=0))
    stream = [next(whole) for _ in range(20)]
    resumed = iter(StepBatches(17, 3, 2, seed=1, rank=1, world_size=2, first_step=6))
    assert [next(resumed) for _ in range(8)] == stream[12:]


def test_repeated_steps_see_the_same_examples_again_however_they_are_spread():
    def stream(rank, world, first_step, steps):
        sampler = StepBatches(17, 4 // world, 2, 1, rank, world, first_step, data_step=lambda s: data_step_at(s, 5, 3))
        passes = iter(sampler)
        return [[i for _ in range(2) for i in next(passes)] for _ in range(steps)]

    whole = stream(0, 1, 0, 9)
    assert whole[5:8] == whole[0:3]
    assert whole[8] == whole[0]
    plain = iter(StepBatches(17, 4, 2, 1, 0, 1, 0))
    assert whole[:5] == [[i for _ in range(2) for i in next(plain)] for _ in range(5)]
    assert stream(0, 1, 6, 3) == whole[6:]
    for step in range(9):
        both = [i for rank in range(2) for i in stream(rank, 2, step, 1)[0]]
        assert sorted(both) == sorted(whole[step])


def test_packing_drops_only_the_tail():
    data = pack(np.arange(23, dtype=np.int32), 5)
    assert len(data) == 4
    assert torch.equal(data[3]["input_ids"], torch.arange(15, 20))
    assert torch.equal(data[3]["labels"], data[3]["input_ids"])
    train, held_out = data.split(1)
    assert (len(train), len(held_out)) == (3, 1)
    assert torch.equal(held_out[0]["input_ids"], data[3]["input_ids"])
    with pytest.raises(DataError, match="3 tokens, less than one sequence of 5"):
        pack(np.arange(3, dtype=np.int32), 5)


def test_collate_masks_padding_and_only_then():
    one, two = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}, {
        "input_ids": torch.tensor([8]), "labels": torch.tensor([8]),
    }  # fmt: skip
    batch = collate([one, two])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
    assert "attention_mask" not in collate([one, one])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_chat_loss_is_on_the_replies_only(tokenizer, template):
    tokenizer.chat_template = template
    tokens, counted = encode_chat(CHAT, tokenizer)
    assert tokenizer.decode(tokens).replace(" ", "") == "".join(f"<{m['role']}>{m['content']}\n" for m in CHAT).replace(
        " ", ""
    )
    learned = tokenizer.decode([t for t, c in zip(tokens, counted, strict=True) if c])
    assert learned.split() == ["Four.", "Seven."]


def test_chat_templates_that_cannot_work(tokenizer):
    tokenizer.chat_template = REWRITING
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode_chat(CHAT, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_chat(CHAT, tokenizer)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_every_kind_of_file_is_read(tokenizer, tmp_path):
    from datasets import Dataset

    text = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "a.txt").write_text(text)
    jsonl = write(tmp_path / "a.jsonl", [{"text": text}])
    Dataset.from_list([{"text": text}]).to_parquet(str(tmp_path / "a.parquet"))
    sizes = []
    for name in (str(tmp_path / "a.txt"), jsonl, str(tmp_path / "a.parquet")):
        train, held_out = load_data(DataArguments(dataset=name, block_size=32, eval_ratio=0.25), tokenizer)
        sizes.append((len(train), len(held_out)))
        assert torch.equal(train[0]["input_ids"], torch.tensor(tokenizer(text)["input_ids"][:32]))
    assert len(set(sizes)) == 1


def test_text_for_distillation(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "b.txt").write_text("it was a bright cold day in april. " * 40)
    args = DataArguments(dataset=str(tmp_path / "a.txt"), block_size=32, distill_dataset=str(tmp_path / "b.txt"))
    data = load_distill_data(args, tokenizer)
    assert tokenizer.decode(data[0]["input_ids"]).startswith("it was a bright")
    assert len(data[0]["input_ids"]) == 32
    assert load_distill_data(DataArguments(dataset=str(tmp_path / "a.txt")), tokenizer) is None
    with pytest.raises(DataError, match="there is no file"):
        load_distill_data(DataArguments(distill_dataset=str(tmp_path / "c.txt")), tokenizer)


def test_chats_from_a_file(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    silent = {"messages": CHAT[:1]}
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 4 + [silent])
    train, held_out = load_data(DataArguments(dataset=path, block_size=128, eval_ratio=0.25), tokenizer)
    assert (len(train), len(held_out)) == (3, 1)
    assert (train[0]["labels"] != IGNORED).sum() > 0
    assert (train[0]["labels"] == IGNORED).sum() > 0
    with pytest.raises(DataError, match="none of the 1 chats"):
        load_data(DataArguments(dataset=write(tmp_path / "s.jsonl", [silent]), block_size=128), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no file"),
        ("a.csv", "x", "the file extension '.csv'; supported are .txt"),
        ("empty.txt", "", "is empty"),
        ("a.jsonl", '{"body": "x"}\n', "no column 'text' and no column 'messages'; it has body"),
        ("a.jsonl", "{broken", "cannot be read"),
        ("a.txt", "too short", "less than one sequence"),
    ],
)
def test_bad_data(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(DataArguments(dataset=str(tmp_path / name)), tokenizer)


def test_a_dataset_without_rows(tokenizer):
    for tokenize in (tokenize_texts, partial(tokenize_chats, most_tokens=16)):
        with pytest.raises(DataError, match="some/set has no rows; give data with at least one"):
            tokenize(Dataset.from_dict({"text": []}), "text", "some/set", tokenizer)


def test_a_file_of_text_in_a_folder_is_one_document_too(tokenizer, tmp_path):
    texts = ["one line\nand another\n" * 100, "of the second file\n" * 50]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    train, _ = load_data(DataArguments(dataset=str(tmp_path), block_size=32, eval_ratio=0), tokenizer)
    expected = pack(token_ids(texts, tokenizer), 32)
    assert train.ids.tolist() == expected.ids.tolist()
    assert read_rows(str(tmp_path)).column_names == ["text"]


def test_rows_in_a_folder(tmp_path):
    write(tmp_path / "rows.jsonl", [{"text": "to be", "n": 1}, {"text": "or not", "n": 2}])
    assert read_rows(str(tmp_path))["n"][:] == [1, 2]


def test_ids_in_memory_that_a_model_does_not_have(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    train, held_out = load_data(DataArguments(dataset=str(tmp_path / "a.txt"), block_size=32), tokenizer)
    largest = max(int(train.ids.max()), int(held_out.ids.max()))
    check_embeddings(largest + 1, train, held_out)
    with pytest.raises(DataError, match=f"ids up to {largest}, and the model has {largest} embeddings"):
        check_embeddings(largest, train, held_out)


ODD = [
    ({"messages": CHAT}, None),
    ({"messages": None}, "it has no messages"),
    ({"messages": []}, "it has no messages"),
    ({"messages": [{"role": "user", "content": None}, CHAT[1]]}, "the content of a message is null"),
    ({"messages": json.dumps(CHAT)}, None),
    ({"messages": "no JSON"}, "it is a string, and no JSON"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]}, None),
    ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, None),
    ({"messages": [{"content": "who?"}]}, "a message has no role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
        "a content has parts that are no text",
    ),
    ({"messages": [CHAT[1]]}, "it has no assistant's reply"),  # there is nothing that it replies to
    ({"messages": [{"role": "user", "content": "RAISE"}, CHAT[1]]}, "the chat template refuses it"),
    ({"messages": [{"role": "user", "content": "long " * 200}, CHAT[1]]}, "its reply begins after 64 tokens"),
]


def test_odd_chats_are_read_or_left_out_counted_and_named(tokenizer, tmp_path, capsys):
    tokenizer.chat_template = PLAIN.replace(
        "<{{ m.role", "{% if m.content == 'RAISE' %}{{ raise_exception('no') }}{% endif %}<{{ m.role"
    )
    path = write(tmp_path / "odd.jsonl", [row for row, _ in ODD])
    args = DataArguments(dataset=path, block_size=64, eval_ratio=0)
    with pytest.warns(
        UserWarning, match=r"69% of the chats of .*odd.jsonl are left out or cut; raise --block-size above 64"
    ):
        train, _ = load_data(args, tokenizer)
    assert len(train) == sum(reason is None for _, reason in ODD)
    said = capsys.readouterr().err
    assert f"9 of {len(ODD)} chats of {path} are left out" in said
    for number, (_, reason) in enumerate(ODD, start=1):
        assert reason is None or any(reason in line and str(number) in line for line in said.splitlines()), reason
    learned = tokenizer.decode([t for t in train[3]["labels"].tolist() if t != IGNORED])
    assert learned.split() == ["Ho"]
    with pytest.raises(
        DataError, match=r"odd.jsonl, row 2: it has no messages; correct it, or leave --strict-data out"
    ):
        load_data(DataArguments(dataset=path, block_size=64, eval_ratio=0, strict_data=True), tokenizer)


def test_a_broken_line_and_null_texts_are_counted(tokenizer, tmp_path, capsys):
    good = {"text": "the quick brown fox jumps over the lazy dog. " * 40}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n{broken\n" + json.dumps({"text": None}) + "\n")
    with pytest.warns(UserWarning, match="67% of the texts"):
        train, _ = load_data(DataArguments(dataset=str(tmp_path / "a.jsonl"), block_size=32, eval_ratio=0), tokenizer)
    assert train.ids.tolist() == pack(token_ids([good["text"]], tokenizer), 32).ids.tolist()
    assert "2 x it is null (row 2, 3)" in capsys.readouterr().err
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="latin.jsonl is not UTF-8 text"):
        load_data(DataArguments(dataset=str(tmp_path / "latin.jsonl")), tokenizer)


def test_rows_beside_a_broken_line_are_what_they_were(tmp_path):
    rows = [{"text": "one\u2028two\u0085three"}, {"text": "four", "messages": CHAT}, {"text": "five"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(["\ufeff" + lines[0], *lines[1:], '{"text": "cut']), encoding="utf-8")
    found = read_rows(str(tmp_path / "a.jsonl"))
    assert found["text"] == ["one\u2028two\u0085three", "four", "five", None]
    assert found["messages"] == [None, CHAT, None, None]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n{"text": "cut')
    assert read_rows(str(tmp_path / "b.jsonl"))["text"] == ["a", '["b"]', None]


def test_sharegpt_columns_and_tools(tokenizer, tmp_path):
    tokenizer.chat_template = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + PLAIN
    tools = [{"name": "clock", "parameters": {"zone": "text"}}]
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "tools": tools}] * 3
    train, _ = load_data(
        DataArguments(dataset=write(tmp_path / "c.jsonl", rows), block_size=64, eval_ratio=0), tokenizer
    )
    assert tokenizer.decode(train[0]["input_ids"]).startswith("[clock]<user>Hi")
    rows = [{**rows[0], "tools": json.dumps(tools)}]
    train, _ = load_data(
        DataArguments(dataset=write(tmp_path / "d.jsonl", rows), block_size=64, eval_ratio=0), tokenizer
    )
    assert tokenizer.decode(train[0]["input_ids"]).startswith("[clock]<user>Hi")


def test_a_reply_that_later_turns_rewrite_does_not_count_and_the_last_does(tokenizer):
    """Qwen3 takes the reasoning out of earlier replies."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in CHAT]
    tokens, counted = encode_chat(chat, tokenizer)
    learned = tokenizer.decode([t for t, c in zip(tokens, counted, strict=True) if c])
    assert learned.strip() == "<think>hm</think>Seven."


def test_tokenized_on_several_processes_it_is_the_same(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    rows = [{"messages": [{"role": "user", "content": f"What is {i}?"}, CHAT[1]]} for i in range(40)]
    path = write(tmp_path / "chat.jsonl", rows)
    one, two = (
        load_data(DataArguments(dataset=path, block_size=64, eval_ratio=0, dataset_num_proc=n), tokenizer)[0]
        for n in (1, 2)
    )
    assert one.fingerprint() == two.fingerprint()
    expected = [encode_chat(row["messages"], tokenizer) for row in rows]
    assert one.ids.tolist() == [t for ids, _ in expected for t in ids]
    assert one.counted.tolist() == [c for _, counted in expected for c in counted]
