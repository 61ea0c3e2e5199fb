"""Answers on disk: what they depend on, and what a killed process leaves."""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer

from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.evaluation.answers import Answers, check_cache_dir, facts_of, key_of
from tests.conftest import DEMO_MODEL, tiny_llama

FACTS = {"weights": "a"}


def test_what_is_added_is_there_again(tmp_path):
    with Answers(tmp_path / "new" / "folder", FACTS) as answers:
        assert len(answers) == 0
        assert "x" not in answers
        answers.add({"x": [-0.1, True], "y": [float("-inf"), False]})
        answers.add({"z": "a text"})
        assert answers.get("z") == "a text"
    with Answers(tmp_path / "new" / "folder", FACTS) as again:
        assert len(again) == 3
        assert again.get("x") == [-0.1, True]
        assert again.get("y") == [float("-inf"), False]
    assert json.loads(again.path.read_text().splitlines()[0])["weights"] == "a"


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_half_a_line_is_left_out_and_the_next_one_is_whole(tmp_path, cut, capsys):
    with Answers(tmp_path, FACTS) as answers:
        answers.add({"x": [1.0, True]})
        answers.add({"y": [2.0, True]})
    answers.path.write_bytes(answers.path.read_bytes()[:-cut])
    with Answers(tmp_path, FACTS) as answers:
        assert ("x" in answers, "y" in answers) == (True, False)
        answers.add({"z": [3.0, True]})
    with Answers(tmp_path, FACTS) as answers:
        assert ("x" in answers, "y" in answers, "z" in answers) == (True, False, True)
    assert capsys.readouterr().err == ""


def test_broken_lines_are_left_out_aloud(tmp_path, capsys):
    with Answers(tmp_path, FACTS) as answers:
        answers.add({"x": [1.0, True]})
    for broken in (b"\xff\xfe\n", b"not json\n", b"[1]\n", b"null\n"):
        with answers.path.open("ab") as file:
            file.write(broken)
    with Answers(tmp_path, FACTS) as answers:
        assert "x" in answers
        assert len(answers) == 1
    assert f"note: 4 lines of {answers.path} are broken; their questions are asked again" in capsys.readouterr().err


def test_a_killed_header_is_written_again(tmp_path):
    with Answers(tmp_path, FACTS) as answers:
        pass
    answers.path.write_bytes(answers.path.read_bytes()[:9])
    with Answers(tmp_path, FACTS) as answers:
        answers.add({"x": [1.0, True]})
    with Answers(tmp_path, FACTS) as answers:
        assert "x" in answers


def test_one_process_at_a_time(tmp_path):
    with Answers(tmp_path, FACTS), pytest.raises(ConfigError, match="is in use for this model by another run"):
        Answers(tmp_path, FACTS).__enter__()
    with Answers(tmp_path, FACTS), Answers(tmp_path, {"weights": "b"}):
        pass  # another model has another file


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        check_cache_dir(tmp_path / "file")
    with pytest.raises(OutputError, match="is no folder"):
        check_cache_dir(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="cannot be used"):
        Answers(tmp_path / "file" / "below", FACTS).__enter__()
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="no permission"):
            check_cache_dir(tmp_path / "closed" / "below")


def test_questions_differ_where_a_token_moves():
    assert key_of([[1, 2], [3]]) == key_of([[1, 2], [3]])
    assert len({key_of(q) for q in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], ["generate", [1, 2], {}])}) == 4


def test_facts_are_by_content():
    """A copy has the same; one bit, a buffer, the config, the dtype or the vocabulary make others."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    first = facts_of(tiny_llama(), tokenizer)
    same = tiny_llama()
    same.config._name_or_path = "somewhere/else"
    assert facts_of(same, tokenizer) == first

    bit = tiny_llama()
    with torch.no_grad():
        weight = bit.model.layers[1].mlp.down_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    buffer = tiny_llama()
    buffer.model.rotary_emb.inv_freq.mul_(1.5)  # no part of a checkpoint
    other = [
        facts_of(bit, tokenizer),
        facts_of(buffer, tokenizer),
        facts_of(tiny_llama(rms_norm_eps=1e-5), tokenizer),
        facts_of(tiny_llama().bfloat16(), tokenizer),
        facts_of(tiny_llama(seed=1), tokenizer),
    ]
    tokenizer.add_tokens(["<new>"])
    other.append(facts_of(tiny_llama(), tokenizer))
    assert len({json.dumps(facts, sort_keys=True) for facts in (first, *other)}) == 7


def test_facts_of_a_compact_model(tmp_path, command):
    """The factors count; scalar buffers and ranks do not stop it."""
    out = tmp_path / "compact"
    assert command("convert", DEMO_MODEL, "--rank", "8", "--method", "svd", "--output-dir", out).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    models = [load_model(Source(str(folder)), "float32", "cpu") for folder in (out, out, DEMO_MODEL)]
    facts = [facts_of(model, tokenizer) for model in models]
    assert facts[0] == facts[1]
    assert facts[0]["weights"] != facts[2]["weights"]
