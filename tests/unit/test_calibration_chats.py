"""Chats as calibration data: their columns, the template, and those that cannot be used."""

import json

import pytest
import torch
from datasets import Dataset

from lowrank_ft.conversion.batches import read_batches
from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import DataError
from tests import chats
from tests.conftest import tiny_llama
from tests.unit.test_calibration_data import bert, words


def chat(i, reply=True):
    question = {"role": "user", "content": f"Q{i}: {words(12, seed=i)}"}
    return [question, {"role": "assistant", "content": f"A{i}: {words(30, seed=-i)}"}] if reply else [question]


def model():
    return tiny_llama(vocab_size=chats.VOCABULARY)


def read(rows, tokenizer, **kwargs):
    return torch.cat([b["input_ids"] for b in read_batches(model(), rows, "d", tokenizer, **kwargs)])


@pytest.mark.parametrize("template", [chats.CHATML, chats.WITH_SYSTEM, chats.HEADERS])
def test_chats_are_packed_as_their_template_renders_them(template):
    tokenizer = chats.chat_tokenizer(template)
    rendered = {
        i: tokenizer(tokenizer.apply_chat_template(chat(i), tokenize=False), add_special_tokens=False)["input_ids"]
        for i in range(30)
    }
    found = read(Dataset.from_dict({"messages": [chat(i) for i in range(30)]}), tokenizer, seed=5)
    total = sum(map(len, rendered.values()))
    assert found.shape == (total // 64, 64)
    # Whole chats follow each other without anything between: put the blocks back in order by what they hold.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()
    stream = [t for i in order for t in rendered[i]]
    blocks = [stream[k : k + 64] for k in range(0, total // 64 * 64, 64)]
    assert sorted(found.tolist()) == sorted(blocks)
    assert found.tolist() != blocks


def test_a_begin_token_that_the_tokenizer_adds_comes_before_each_block_and_once():
    tokenizer = chats.chat_tokenizer(chats.HEADERS)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    found = read(Dataset.from_dict({"messages": [chat(i) for i in range(30)]}), tokenizer)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    assert not (found[:, 1:2] == tokenizer.bos_token_id).all()
    assert (found == tokenizer.bos_token_id).sum() <= len(found) + 30


def test_chats_in_files_and_columns_of_other_names(tmp_path):
    tokenizer = chats.chat_tokenizer()
    plain = [chat(i) for i in range(30)]
    expected = read(Dataset.from_dict({"messages": plain}), tokenizer)
    sharegpt = [[{"from": m["role"].replace("user", "human"), "value": m["content"]} for m in c] for c in plain]
    kinds = {
        "jsonl": [{"messages": c} for c in plain],
        "text": [{"messages": c, "text": "not this"} for c in plain],
        "sharegpt": [{"conversations": c} for c in sharegpt],
    }
    for name, rows in kinds.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert torch.equal(read(read_rows(str(path)), tokenizer), expected)
    Dataset.from_dict({"messages": plain}).to_parquet(str(tmp_path / "c.parquet"))
    assert torch.equal(read(read_rows(str(tmp_path / "c.parquet")), tokenizer), expected)
    named = Dataset.from_dict({"talk": [None, *plain], "text": ["x"] * 31})
    as_json = Dataset.from_dict({"talk": [json.dumps(c) for c in plain]})
    assert torch.equal(read(as_json, tokenizer, column="talk"), expected)
    assert len(read(named, tokenizer, column="talk")) == len(expected)
    text = Dataset.from_dict({"messages": plain, "text": [words(60, seed=i) for i in range(30)]})
    assert "Q1" not in tokenizer.decode(read(text, tokenizer, column="text").flatten())


def test_as_many_chats_are_read_as_are_needed():
    tokenizer = chats.chat_tokenizer()

    class Counted:
        column_names = ("messages",)
        read = 0

        def __len__(self):
            return 100_000

        def __getitem__(self, index):
            self.read += 1
            return {"messages": chat(index)}

    rows = Counted()
    assert read(rows, tokenizer, tokens=4096).shape == (64, 64)
    assert rows.read < 100


def test_bad_chats_are_left_out_and_counted(capsys):
    tokenizer = chats.chat_tokenizer(chats.STRICT)
    good = [chat(i) for i in range(30)]
    bad = [None, None, [], chat(50, reply=False), chat(51)[::-1]]
    bad += [[{"role": "user", "content": None}, *chat(52)[1:]]]
    found = read(Dataset.from_dict({"messages": bad[:3] + good + bad[3:]}), tokenizer)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("note: 6 of 36 chats of d are left out: 3 x it has no messages, ")
    for reason in ("1 x it has no assistant's reply", "1 x the content of a message is null",
                   "1 x the chat template refuses it (roles must alternate, beginning with user)"):  # fmt: skip
        assert reason in said[0]
    shown = tokenizer.decode(found.flatten())
    assert not any(f"Q{i}:" in shown or f"A{i}:" in shown for i in (50, 51, 52))
    assert len(found) == len(read(Dataset.from_dict({"messages": good}), tokenizer))
    assert capsys.readouterr().err == ""


def test_no_chat_that_can_be_used():
    rows = Dataset.from_dict({"messages": [chat(0, reply=False), chat(1, reply=False), None]})
    with pytest.raises(
        DataError,
        match=r"none of the 3 chats of d can be used: 2 x it has no assistant's reply, 1 x it has no messages; "
        "give chats with a question and a reply each",
    ):
        read(rows, chats.chat_tokenizer())
    with pytest.raises(DataError, match="none of the 0 chats of d can be used; give chats"):
        read(Dataset.from_dict({"messages": []}), chats.chat_tokenizer())
    with pytest.raises(DataError, match=r"d has \d+ tokens; calibration needs at least 1024"):
        read(Dataset.from_dict({"messages": [chat(0)]}), chats.chat_tokenizer())


def test_who_cannot_read_chats_says_what_to_do():
    rows = Dataset.from_dict({"messages": [chat(i) for i in range(30)], "text": ["x"] * 30})
    with pytest.raises(
        DataError,
        match="the tokenizer has no chat template, which the chats in column 'messages' of d need; copy "
        "chat_template.jinja of the model's instruct version into its folder, or name a column of text",
    ):
        read(rows, chats.chat_tokenizer(None))
    with pytest.raises(DataError, match="column 'messages' of d holds chats, and a BertModel reads plain text"):
        read_batches(bert(), rows, "d", chats.chat_tokenizer(), column="messages")
    with pytest.raises(
        DataError, match="d has no column 'talk'; it has messages, text; choose with --calibration-column"
    ):
        read(rows, chats.chat_tokenizer(), column="talk")


def test_rows_with_null_and_texts_that_are_too_short(capsys):
    tokenizer = chats.chat_tokenizer()
    texts = [words(400, seed=i) for i in range(4)]
    found = read(Dataset.from_dict({"text": [None, texts[0], "", *texts[1:], None]}), tokenizer)
    assert torch.equal(found, read(Dataset.from_dict({"text": [None, texts[0], "", *texts[1:], None]}), tokenizer))
    assert capsys.readouterr().err == "note: 3 of 7 rows of d are left out: 3 x it holds no text\n" * 2
    with pytest.raises(DataError, match="d: row 1 has a whole number in column 'text'; each row must hold a text"):
        read(Dataset.from_dict({"text": [7]}), tokenizer)
    wide = tiny_llama(vocab_size=chats.VOCABULARY, max_position_embeddings=4096)
    with pytest.raises(
        DataError,
        match=r"d has \d+ tokens, less than one block of 4096; give more text, or lower --calibration-block-size",
    ):
        read_batches(wide, Dataset.from_dict({"text": [words(1000)]}), "d", tokenizer, block_size=4096)
