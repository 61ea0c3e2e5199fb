"""``lowrank-ft tokenize``: killed with SIGKILL anywhere and started again, it writes the same bytes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lowrank_ft.checkpoints import atomic
from lowrank_ft.data import token_writer
from lowrank_ft.data.documents import PIECE
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.token_format import MappedTokens
from tests.conftest import DEMO_MODEL

WORDS = ["def", "return", "self", "the", "quick", "brown", "fox", "import", "lambda x: x", "東京", "\n", "    ", "3.14"]
SHARD = "20kB"


def some_text(characters: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    text = " ".join(random.choice(WORDS, size=characters // 4))
    assert len(text) >= characters
    return text[:characters]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tree of code, rows of three kinds, and one document that is longer than a shard and cut in pieces."""
    root = tmp_path_factory.mktemp("source")
    (root / "code" / "deeper").mkdir(parents=True)
    for i in range(40):
        folder = root / "code" / ("deeper" if i % 3 else "")
        (folder / f"m{i:02d}.py").write_text(some_text(500 + 97 * i, i), encoding="utf-8")
    rows = [{"text": some_text(300 + 11 * i, 100 + i), "n": i} for i in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    Dataset.from_list([{"text": some_text(700, 300 + i)} for i in range(40)]).to_parquet(str(root / "rows.parquet"))
    (root / "long.txt").write_text(some_text(2 * PIECE + 1000, 400), encoding="utf-8")
    return root


@pytest.fixture
def arguments(source):
    """The command line but for the output folder, with the long document between the others."""
    names = [source / "code", source / "rows.jsonl", source / "long.txt", source / "rows.parquet"]
    flags = [
        "--glob",
        "*.py",
        "--tokenizer",
        DEMO_MODEL,
        "--held-out",
        "0.1",
        "--max-shard-size",
        SHARD,
        "--output-dir",
    ]
    return ["tokenize", *map(str, names), *map(str, flags)]


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("straight") / "tokens"


@pytest.fixture
def whole(straight, arguments, command) -> Path:
    """What a run that nobody killed writes."""
    if not straight.exists():
        done = command(*arguments, straight)
        assert done.returncode == 0, done.stderr
    return straight


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def die_at(where: str, number: int) -> None:
    """Make this process kill itself in the midst of something."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "shard":  # half of the file is written, under its temporary name

        def half_of_it(path):
            if path.name.startswith(f".tokens-{number:05d}.safetensors."):
                path.write_bytes(path.read_bytes()[:1000])
                die()

        atomic._sync_file = half_of_it
    elif where in ("batch", "document"):
        encode, calls = token_writer._encode, []

        def encode_until(batch, *args):
            calls.append(0)
            within = where == "document" and batch[0].ends and not batch[0].begins  # the end of the long document
            return die() if within or (where == "batch" and len(calls) > number) else encode(batch, *args)

        token_writer._encode = encode_until
    else:
        setattr(token_writer, {"index": "_write_index", "rename": "_take_place"}[where], die)


def killed(arguments: list[object], where: str, number: int) -> None:
    """Run the command in a process of its own, which ends by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            from lowrank_ft_cli.main import main

            die_at(where, number)
            main([str(a) for a in arguments])
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_tokens_are_those_of_the_tokenizer(whole, source):
    """All documents that fit one piece, in order; and the long one as the pieces that it is cut into."""
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    ids = {part: MappedTokens(whole, part) for part in ("train", "held_out")}
    index = ids["train"].index
    assert len(index["shards"]) > 8
    assert index["documents"]["train"] + index["documents"]["held_out"] == 40 + 60 + 1 + 40
    assert 3 <= index["documents"]["held_out"] <= 30
    code = [*sorted((source / "code").glob("*.py")), *sorted((source / "code" / "deeper").glob("*.py"))]
    rows = [json.loads(line)["text"] for line in (source / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = [token_ids([text], tokenizer).tolist() for text in [p.read_text(encoding="utf-8") for p in code] + rows]
    position = {"train": 0, "held_out": 0}
    for document in documents:  # each is the next of one part or of the other
        part = next(p for p in ids if ids[p][position[p] : position[p] + len(document)].tolist() == document)
        position[part] += len(document)
    part = "train" if len(ids["train"]) - position["train"] > 2 * len(ids["held_out"]) else "held_out"
    text = (source / "long.txt").read_text(encoding="utf-8")
    found = ids[part][position[part] : len(ids[part])]
    found = found[: np.flatnonzero(found == tokenizer.eos_token_id)[0]]
    assert tokenizer.decode(found) == text


@pytest.mark.parametrize(
    ("where", "number"), [("shard", 0), ("shard", 4), ("batch", 9), ("document", 0), ("index", 0), ("rename", 0)]
)
def test_killed_and_started_again_is_the_same_folder(whole, arguments, command, tmp_path, monkeypatch, where, number):
    output = tmp_path / "tokens"
    killed([*arguments, output], where, number)
    assert not output.exists()
    finished = contents(tmp_path / ".tokens.partial" / "tokens")
    done_before = sum(name.startswith("tokens-") for name in finished)
    if where == "shard":
        assert done_before == number

    encoded = []
    encode = token_writer._encode
    monkeypatch.setattr(token_writer, "_encode", lambda batch, *args: encoded.extend(batch) or encode(batch, *args))
    done = command(*arguments, output)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]
    index = json.loads((output / "index.json").read_text())
    before = sum(sum(s["documents"].values()) for s in index["shards"][:done_before])
    assert sum(piece.ends for piece in encoded) == 141 - before  # nothing of a finished shard was tokenized again


def test_in_processes_of_their_own(whole, arguments, cli, tmp_path):
    """The command as users run it: summary on stdout, and with other options an unfinished run is not touched."""
    output = tmp_path / "tokens"
    killed([*arguments, output], "shard", 3)
    before = contents(tmp_path / ".tokens.partial" / "tokens")
    done = cli(*arguments, output, "--json")
    summary = json.loads(done.stdout)
    assert len(before) == 4  # three whole, and a draft
    assert contents(output) == contents(whole)
    index = json.loads((output / "index.json").read_text())
    assert summary["tokens"] == index["tokens"]
    assert summary["documents"] == index["documents"]
    assert summary["shards"] == len(index["shards"])
    assert summary["bytes"] == sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert summary["tokenizer"]["vocab_size"] == 2048
    assert "warning" not in done.stderr


def test_an_interrupt_says_how_to_go_on(whole, arguments, command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_writer, "_write_index", interrupted)
        done = command(*arguments, tmp_path / "tokens")
    assert done.returncode == 1
    assert done.stderr == "error: interrupted; the same command resumes after the last complete file\n"
    assert command(*arguments, tmp_path / "tokens").returncode == 0
    assert contents(tmp_path / "tokens") == contents(whole)


def test_a_changed_run_is_refused(source, arguments, command, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_bytes((source / "rows.jsonl").read_bytes())
    mine = [str(own) if a == str(source / "rows.jsonl") else a for a in arguments]
    output = tmp_path / "tokens"
    killed([*mine, output], "shard", 3)
    before = contents(tmp_path / ".tokens.partial" / "tokens")

    def refused(*args):
        done = command(*args)
        assert done.returncode == 1
        assert contents(tmp_path / ".tokens.partial" / "tokens") == before
        return done.stderr

    options = ["0.2" if a == "0.1" else "30kB" if a == SHARD else a for a in mine]
    message = refused(*options, output)
    assert "differs: held_out 0.1 -> 0.2; max_shard_bytes 20000 -> 30000; use its settings" in message
    other = refused(*mine, output, "--text-column", "body")
    assert "differs: text column text -> body; use its settings" in other
    assert f"{source / 'long.txt'} [" in refused(*[a for a in mine if not a.endswith("long.txt")], output)
    with own.open("a") as file:
        file.write('{"text": "one more"}\n')
    message = refused(*mine, output)
    assert f"differs: {own} [" in message
    assert "held_out" not in message
    done = command(*mine, output, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "documents  142 (" in done.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_errors_are_one_line(arguments, command, source, tmp_path):
    def message(*args):
        done = command(*args)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "t").exists()
        return done.stderr

    out = ["--output-dir", tmp_path / "t"]
    assert "has no tokenizer that loads" in message("tokenize", source / "long.txt", "--tokenizer", source, *out)
    assert "there is no file or folder" in message("tokenize", "gone.txt", "--tokenizer", DEMO_MODEL, *out)
    assert "--max-shard-size 'large' is no size" in message(
        "tokenize", source / "long.txt", "--tokenizer", DEMO_MODEL, *out, "--max-shard-size", "large"
    )
    assert "cannot be read" in message("tokenize", "nobody/nothing", "--tokenizer", DEMO_MODEL, *out)
