"""A few of the damaged inputs, in this process; ``make reliability`` runs all of them, and the kills and full disks."""

import json

from tests.reliability import materials, mutants
from tests.reliability.run import MARK, PAGE, figures, read_lines

FEW = ("0/dense/config.json/0", "0/dense/model.safetensors/5", "0/plan.json/1")


def test_a_few_mutants_end_in_a_result_or_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = {"seed": 0, "inputs": str(materials.make_dense(tmp_path / "inputs")), "root": str(tmp_path)}
    chosen = [c for c in mutants.cases(0) if c["id"].rpartition("/")[0] in FEW and c["command"] != "finetune"]
    results = [mutants.run_case({**case, **facts}) for case in chosen]
    assert len(results) > len(FEW)
    assert {r["verdict"] for r in results} == {"ok", "error"}, results


def test_the_judge_tells_sentences_from_accidents():
    for message in ("KeyError: 0 (--debug shows the traceback)", "'list' object has no attribute 'items'"):
        assert mutants.is_internal(f"error: {message}")
    sentence = "m/config.json: rope is [1], which transformers refuses (TypeError: x); correct it"
    assert not mutants.is_internal(f"error: {sentence}")


def test_the_page_shows_the_results():
    assert PAGE.read_text(encoding="utf-8").split(MARK)[1].strip() == figures()


def test_the_newest_result_counts(tmp_path):
    lines = [json.dumps({"id": "a", "verdict": verdict}) for verdict in ("hang", "ok")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert read_lines(tmp_path / "x.jsonl")["a"]["verdict"] == "ok"
    assert read_lines(tmp_path / "none.jsonl") == {}
