"""Texts of others, their code, and a death by signal: the message names the file, the row, the flag."""

import json
import shutil
import subprocess
import sys

import pytest
from lowrank_ft_cli.launch import exit_code
from lowrank_ft_recipes.finetune import load_dense

from lowrank_ft.data.documents import Corpus
from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import CheckpointNotFoundError, ConfigError, DataError
from lowrank_ft.evaluation.compare import EvaluationSettings, read_texts
from lowrank_ft.training import ModelArguments
from tests.conftest import tiny_llama


def evaluated(path):
    return read_texts(EvaluationSettings(str(path)))


@pytest.mark.parametrize("value", [None, 3, [1], {"a": 1}])
def test_a_row_that_is_no_text_is_named(tmp_path, value):
    path = tmp_path / "text.jsonl"
    rows = [{"text": "a"}, {"text": "b"}, {"text": value}] if value is None else [{"text": value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        evaluated(path)
    assert f"{path}: row {len(rows)} has" in str(caught.value)
    assert "column 'text'" in str(caught.value)


@pytest.mark.parametrize("name", ["text[1].txt", "[v2].jsonl", "a*?.jsonl"])
def test_a_name_with_brackets_is_no_pattern(tmp_path, name):
    path = tmp_path / "[x]" / name
    path.parent.mkdir()
    path.write_text('{"text": "a"}\n')
    assert len(evaluated(path)) == 1
    assert [piece.text.strip() for piece in Corpus([str(path)]).pieces()] == [evaluated(path)[0].strip()]


def test_a_row_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b\\ud83d"}\n')
    with pytest.raises(DataError) as caught:
        evaluated(path)
    assert f"{path}" in str(caught.value)
    assert "surrogate" in str(caught.value)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert f"{path} is not UTF-8 text (line 2); save it as UTF-8" in str(caught.value)


def test_code_of_a_guide_that_nobody_named_is_not_run_and_the_flag_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.Mine"},
    }
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "mine.py").write_text("raise SystemExit('code that nobody trusted has run')")
    with pytest.raises(ConfigError, match=f"--guide-model {tmp_path / 'own'}"):
        load_dense(ModelArguments(model="compact", trust_remote_code=True), str(tmp_path / "own"), None, True)


@pytest.mark.parametrize("teaches", [False, True])
def test_a_dense_model_that_is_not_here_is_told_with_the_ways_out(tmp_path, teaches):
    """The checkpoint was converted on another machine, and the user never typed that path."""
    there = f"{tmp_path}/elsewhere/dense"
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_dense(ModelArguments(model="compact"), there, None, teaches)
    needs, without = ("distillation", " --distill-weight 0") if teaches else ("the guide", "")
    assert str(caught.value) == (
        f"{needs} needs the dense model that compact was made from, which was {there} and is not here; "
        f"name it with --guide-model MODEL, or train without it: --guide none{without}"
    )
    with pytest.raises(CheckpointNotFoundError, match=f"there is no folder {there}; check the path"):
        load_dense(ModelArguments(model="compact", guide_model=there), there, None, teaches)


def test_a_run_that_the_kernel_kills_has_failed_and_says_why(capsys):
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    launcher = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"  # as accelerate launch ends
    for command in (
        killed,
        [sys.executable, "-c", launcher, *killed],
        [shutil.which("sh"), "-c", "kill -9 $$; exit 1"],
    ):
        assert exit_code(subprocess.call(command)) == 1
        assert "the training was killed, probably because memory ran out" in capsys.readouterr().err
    assert exit_code(137) == 1
    assert "probably because memory" in capsys.readouterr().err
    assert exit_code(-11) == 1
    assert "ended by SIGSEGV" in capsys.readouterr().err
    assert [exit_code(code) for code in (0, 1, 2, 3, 100)] == [0, 1, 2, 1, 1]
    assert capsys.readouterr().err == ""
