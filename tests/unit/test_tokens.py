"""Token files: what is read is what the tokenizer gives, across shards; damage and mismatches are refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lowrank_ft.checkpoints.locks import exclusive
from lowrank_ft.data.documents import PIECE, Corpus, Position, cut
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import StepBatches, TokenizedData, collate, pack
from lowrank_ft.data.token_format import MappedTokens
from lowrank_ft.data.token_writer import write_token_files
from lowrank_ft.data.tokens import TokenFiles, check_embeddings
from lowrank_ft.errors import ConfigError, DataError, OutputError
from lowrank_ft.training.data import load_data
from lowrank_ft.training.options import DataArguments
from tests.conftest import DEMO_MODEL

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "a dog",
    "def",
    "return",
    "import",
    "東京",
    "naïve",
    "3.14",
    "\n",
    "\n\n",
]
HELD_OUT = 0.3


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(DEMO_MODEL))


def make_texts(count: int = 60, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 60))) for _ in range(count)]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def made(tokenizer, texts, tmp_path_factory):
    """A folder of many small shards; never changed by a test."""
    root = tmp_path_factory.mktemp("made")
    corpus = Corpus([str(write_rows(root / "rows.jsonl", texts))])
    write_token_files(corpus, tokenizer, "demo", root / "tokens", held_out=HELD_OUT, max_shard_bytes=1000)
    return root / "tokens"


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "tokens"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture(scope="module")
def expected(tokenizer, texts, made):
    """Ids of both parts, from the tokenizer alone and from what says which document was held out."""
    rows = Corpus([str(made.parent / "rows.jsonl")])
    held_out = [piece.draw < HELD_OUT for piece in rows.pieces()]
    assert 5 < sum(held_out) < 40
    parts = {"train": False, "held_out": True}
    return {
        part: token_ids([t for t, h in zip(texts, held_out, strict=True) if h == wanted], tokenizer)
        for part, wanted in parts.items()
    }


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_any_slice_equals_the_tokens_end_to_end(made, expected, part):
    ids = MappedTokens(made, part)
    assert len(ids.index["shards"]) > 5
    assert ids.index["dtype"] == "uint16"
    assert len(ids) == len(expected[part])
    assert np.array_equal(ids[0 : len(ids)], expected[part])
    random = np.random.default_rng(1)
    for start, stop in random.integers(0, len(ids) + 1, (300, 2)):
        assert np.array_equal(ids[start:stop], expected[part][start:stop])
    for border in ids._ends[:-1]:
        assert np.array_equal(ids[border - 1 : border + 1], expected[part][border - 1 : border + 1])


def test_blocks_are_those_of_data_in_memory(made, expected):
    mapped, memory = TokenFiles(made, block_size=7), pack(expected["train"], 7)
    assert len(mapped) == len(memory) > 100
    for i in (0, len(memory) - 1, *np.random.default_rng(2).integers(0, len(memory), 50)):
        for key in ("input_ids", "labels"):
            assert torch.equal(mapped[i][key], memory[i][key])
            assert mapped[i][key].dtype == torch.long
    with pytest.raises(IndexError):
        mapped[len(mapped)]
    assert isinstance(mapped, TokenizedData)
    first, second = mapped.split(10)
    assert (len(first), len(second)) == (len(mapped) - 10, 10)
    assert torch.equal(second[0]["input_ids"], memory[len(memory) - 10]["input_ids"])


def test_fingerprints_tell_parts_blocks_and_contents_apart(made, folder, tokenizer, texts, tmp_path):
    data = TokenFiles(made, 16)
    halves = data.split(20)
    other = tmp_path / "other"
    changed = [*texts[:-1], texts[-1][:-1] + "!"]
    write_token_files(
        Corpus([str(write_rows(tmp_path / "b.jsonl", changed))]), tokenizer, "demo", other, held_out=HELD_OUT,
        max_shard_bytes=1000,
    )  # fmt: skip
    different = [data, *halves, halves[0].split(len(halves[0]) - 20)[0], TokenFiles(made, 8), TokenFiles(other, 16)]
    different.append(TokenFiles(made, 16, "held_out"))
    assert len({d.fingerprint() for d in different}) == len(different)
    assert TokenFiles(folder, 16).fingerprint() == data.fingerprint()


def test_loaders_and_steps(made):
    """Processes that load data map the files themselves; a step sees the same blocks in any of them."""
    data = TokenFiles(made, 8)
    data[3]  # files are open when it is pickled
    assert torch.equal(pickle.loads(pickle.dumps(data))[5]["input_ids"], data[5]["input_ids"])

    def some_batches(workers):
        sampler = StepBatches(len(data), 4, 1, seed=0, rank=0, world_size=1, first_step=2)
        loader = iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers))
        return [next(loader)["input_ids"] for _ in range(3)]

    for one, two in zip(some_batches(0), some_batches(1), strict=True):
        assert torch.equal(one, two)


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    tokenizer.add_tokens([f"<x{i}>" for i in range(64_000)])
    text = "<x63999> and <x5> a fox"
    (tmp_path / "a.txt").write_text(text)
    index = write_token_files(Corpus([str(tmp_path / "a.txt")]), tokenizer, "large", tmp_path / "tokens", held_out=0)
    assert index["dtype"] == "uint32"
    assert index["largest_id"] == tokenizer.convert_tokens_to_ids("<x63999>") == 66_047
    ids = MappedTokens(tmp_path / "tokens")
    assert ids[0 : len(ids)].tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-6])


def garble_index(path):
    index = json.loads((path.parent / "index.json").read_text())
    index["shards"][2]["file"] = "../elsewhere.safetensors"
    (path.parent / "index.json").write_text(json.dumps(index))


def change_index(**changes):
    def change(path):
        index = json.loads((path.parent / "index.json").read_text()) | changes
        (path.parent / "index.json").write_text(json.dumps(index))

    return change


def other_version(path):
    text = (path.parent / "index.json").read_text()
    (path.parent / "index.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, r"tokens-00002.safetensors has \d+ bytes, and index.json says \d+; it is damaged"),
        (flip_a_byte, r"tokens-00002.safetensors has the right size \(\d+ bytes\) but other content: sha256 \w+"),
        (lambda path: path.unlink(), "tokens-00002.safetensors is missing"),
        (lambda path: (path.parent / "index.json").unlink(), "has no index.json"),
        (garble_index, "index.json is incomplete or damaged"),
        (change_index(tokens={"train": 8}), "index.json is incomplete or damaged"),
        (change_index(tokens={"train": 8, "held_out": 0}), r"8 train tokens, and \d+ in the shards"),
        (change_index(tokenizer={"sha256": "", "vocab_size": 1}), "the tokenizer or the largest id"),
        (change_index(largest_id=5), r"holds token ids up to \d+, and index.json says 5"),
        (other_version, "version 2; this release reads lowrank_ft.tokens 1"),
    ],
)
def test_damage_is_found(folder, damage, message):
    TokenFiles(folder, 8)
    damage(folder / "tokens-00002.safetensors")
    with pytest.raises(DataError, match=message):
        TokenFiles(folder, 8)


def test_sizes_are_compared_even_without_checksums(folder):
    shorten(folder / "tokens-00001.safetensors")
    with pytest.raises(DataError, match="it is damaged"):
        TokenFiles(folder, 8, verify=False)


def test_a_mix_of_two_folders_is_refused(folder, tokenizer, tmp_path):
    """A shard of another tokenizer with an index that was made to fit it."""
    other = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    other.add_tokens(["<more>"])
    write_token_files(
        Corpus([str(write_rows(tmp_path / "a.jsonl", make_texts(seed=3)))]), other, "demo", tmp_path / "b", held_out=0.3,
        max_shard_bytes=1000,
    )  # fmt: skip
    index, theirs = (json.loads((f / "index.json").read_text()) for f in (folder, tmp_path / "b"))
    index["shards"][0] = theirs["shards"][0]
    index["tokens"] = {part: sum(s["tokens"][part] for s in index["shards"]) for part in ("train", "held_out")}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "tokens-00000.safetensors").write_bytes((tmp_path / "b" / "tokens-00000.safetensors").read_bytes())
    with pytest.raises(DataError, match="tokens-00000.safetensors has tokenizer"):
        TokenFiles(folder, 8)


def test_parts_that_are_too_small(made):
    with pytest.raises(DataError, match="less than one sequence of 100000"):
        TokenFiles(made, 100_000)
    with pytest.raises(DataError, match="no part 'test'"):
        TokenFiles(made, 8, "test")
    with pytest.raises(DataError, match="does not exist"):
        TokenFiles(made / "nothing", 8)


def test_another_tokenizer_or_a_smaller_model_is_refused(made, tokenizer):
    data = TokenFiles(made, 8)
    data.check_tokenizer(tokenizer)
    other = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    other.add_tokens(["<more>"])
    with pytest.raises(
        DataError, match=r"with demo \(2048 tokens, sha256 \w+...\).* is mine \(2049 tokens, sha256 \w+"
    ):
        data.check_tokenizer(other, "mine")
    largest = int(data.ids[0 : len(data.ids)].max())
    held_out = TokenFiles(made, 8, "held_out")
    largest = max(largest, int(held_out.ids[0 : len(held_out.ids)].max()))
    check_embeddings(largest + 1, data, None)
    with pytest.raises(DataError, match=rf"ids up to {largest} .*2048 tokens.* the model has {largest} embeddings"):
        check_embeddings(largest, None, data.split(1)[1])


def test_recipes_read_token_files(made, expected, tokenizer):
    train, held_out = load_data(DataArguments(dataset=str(made), block_size=16), tokenizer)
    assert (len(train), len(held_out)) == (len(expected["train"]) // 16, len(expected["held_out"]) // 16)
    assert torch.equal(held_out[1]["labels"], torch.from_numpy(expected["held_out"][16:32]).long())
    assert load_data(DataArguments(dataset=str(made), block_size=16, eval_ratio=0), tokenizer)[1] is None
    other = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    other.add_tokens(["<more>"])
    with pytest.raises(DataError, match="was tokenized with demo"):
        load_data(DataArguments(dataset=str(made), block_size=16), other)


# Documents


def test_long_documents_are_cut_where_lines_end():
    text = "".join(f"line {i}\n" for i in range(100)) + "x" * 70
    for step in (1, 13, 1000):
        pieces = list(cut((text[i : i + step] for i in range(0, len(text), step)), size=32))
        assert "".join(p for p, _ in pieces) == text
        assert all(len(p) <= 32 for p, _ in pieces)
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
        assert sum(p.endswith("\n") for p, _ in pieces[:-1]) >= len(pieces) - 4
    assert list(cut([], size=4)) == [("", True)]


def test_a_stream_is_taken_up_at_any_piece(tmp_path):
    """Files, rows, long documents in pieces, and empty ones; positions survive JSON."""
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("a line of text\n" * (PIECE // 10))
    (tmp_path / "empty.txt").write_text("")
    long = "another line\n" * (PIECE // 12) + "end"
    write_rows(tmp_path / "b.jsonl", ["one", "", long, "three"])
    Dataset.from_list([{"text": t, "n": 1} for t in ("four", None, "five")]).to_parquet(str(tmp_path / "c.parquet"))

    def corpus():
        return Corpus([str(tmp_path)])

    pieces = list(corpus().pieces())
    documents = "".join(p.text + ("|" if p.ends else "") for p in pieces)
    assert documents == "a line of text\n" * (PIECE // 10) + f"|one|{long}|three|four|five|"
    assert sum(p.begins for p in pieces) == 6
    assert len(pieces) == 8
    assert len({p.draw for p in pieces}) == 6
    for i, piece in enumerate(pieces):
        position = Position(*json.loads(json.dumps(piece.after)))
        assert [(p.text, p.begins, p.draw) for p in corpus().pieces(position)] == [
            (p.text, p.begins, p.draw) for p in pieces[i + 1 :]
        ]


def test_folders_and_patterns(tmp_path):
    for name in ("b.py", "a/x.py", "a/site-packages/y.py", ".hidden/z.py", "c.txt", "a/d.md", "e.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(*names, **options):
        return [p.text for p in Corpus([str(tmp_path / n) for n in names], **options).pieces()]

    assert found("") == ["c.txt", "a/d.md"]
    assert found("", globs=["*.py"]) == ["b.py", "a/x.py", "a/site-packages/y.py"]
    assert found("", globs=["*.py", "*.md"], exclude=["site-packages"]) == ["b.py", "a/d.md", "a/x.py"]
    assert found("*.txt", "a") == ["c.txt", "a/d.md"]
    assert found("b.py", globs=["*.py"]) == ["b.py"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nothing.txt"], {}, "there is no file or folder"),
        (["*.rst"], {}, "no file matches"),
        (["a.bin"], {}, r"the file extension '.bin'; supported are .*--glob '\*.bin'"),
        (["a.txt", "a.txt"], {}, "named twice"),
        (["folder"], {}, "holds no file that matches"),
        (["a.jsonl"], {}, "no column 'text'; it has body; choose with --text-column"),
        (["a.jsonl"], {"column": "body"}, "holds int and not text"),
        (["broken.jsonl"], {}, "cannot be read"),
    ],
)
def test_bad_sources(tmp_path, names, options, message):
    (tmp_path / "folder").mkdir()
    for name, content in {"a.txt": "x", "a.bin": "x", "a.jsonl": '{"body": 3}\n', "broken.jsonl": "{broken"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(Corpus([str(tmp_path / n) for n in names], **options).pieces())


# Writing


def test_every_shard_is_within_its_bound(made):
    index = json.loads((made / "index.json").read_text())
    assert all(2 * sum(s["tokens"].values()) <= 1000 for s in index["shards"])
    assert sorted(p.name for p in made.iterdir()) == ["index.json", *(s["file"] for s in index["shards"])]
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".")] == []
    assert {p.stat().st_mode & 0o777 for p in made.iterdir()} == {(made / "index.json").stat().st_mode & 0o777}


def test_numbers_out_of_range_and_output_in_the_way(tokenizer, folder, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", make_texts(4))

    def write(output, corpus=None, **options):
        write_token_files(corpus or Corpus([str(rows)]), tokenizer, "demo", output, **options)

    with pytest.raises(ConfigError, match="--held-out is 1.0"):
        write(tmp_path / "new", held_out=1.0)
    with pytest.raises(ConfigError, match="--max-shard-size is 10 bytes"):
        write(tmp_path / "new", max_shard_bytes=10)
    with pytest.raises(OutputError, match="is not empty"):
        write(folder)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: path == tmp_path / "new")
        with pytest.raises(OutputError, match="new is a mount point"):
            write(tmp_path / "new")
    with pytest.raises(OutputError, match="inside a folder that is read"):
        write(tmp_path / "new", Corpus([str(tmp_path)]))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.doc").write_text("x")
    with pytest.raises(OutputError, match=r"holds a.doc, and --overwrite replaces nothing but token files"):
        write(tmp_path / "notes", overwrite=True)
    with pytest.raises(DataError, match="none to train on"):
        write(tmp_path / "new", held_out=0.999999)
    write(folder, overwrite=True, held_out=0)
    assert TokenFiles(folder, 4).ids.index["documents"]["train"] == 4


def test_two_processes_do_not_write_one_folder(tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_texts(4))
    with (
        exclusive(tmp_path / ".new.partial.lock", "busy"),
        pytest.raises(OutputError, match="another process is tokenizing"),
    ):
        write_token_files(Corpus([str(rows)]), tokenizer, "demo", tmp_path / "new")


def test_what_cannot_be_decoded_or_held_out_is_said(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    with pytest.warns(UserWarning, match="1 text files hold bytes that are not UTF-8") as warned:
        write_token_files(Corpus([str(tmp_path / "latin.txt")]), tokenizer, "demo", tmp_path / "t", held_out=1e-9)
    assert any("of 1 documents none was held out" in str(w.message) for w in warned)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    tokenizer.eos_token = None
    rows = write_rows(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(DataError, match="no end-of-text token"):
        write_token_files(Corpus([str(rows)]), tokenizer, "demo", tmp_path / "t")
