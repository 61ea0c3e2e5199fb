"""``lowrank-ft eval --tasks``: what guessing scores, limits, files of one's own, and runs that were killed."""

import importlib.util
import json
import shutil
import signal
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import DEMO_MODEL, ROOT
from tests.integration.test_eval import CLOZE, FOLDER, assert_one_line_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install "lowrank-ft[eval]"'
)
ARC = ROOT / "tests" / "benchmarks" / "tasks" / "arc_easy.yaml"

# Runs the command, and is killed by the system while it writes its sixth batch: before, in the middle or after.
KILLED = """
import os, signal, sys
from lowrank_ft.evaluation.answers import Answers

add, calls = Answers.add, []

def killed(self, answers):
    calls.append(1)
    if len(calls) < 6:
        return add(self, answers)
    if "{when}" == "in the middle":
        line = len(self.path.read_bytes())
        add(self, answers)
        os.truncate(self.path, line + 40)
    if "{when}" == "after":
        add(self, answers)
    os.kill(os.getpid(), signal.SIGKILL)

Answers.add = killed
from lowrank_ft_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def evaluate(command):
    return partial(command, "eval")


def scores_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["model"]["tasks"]


@pytest.mark.parametrize("when", ["before", "in the middle", "after"])
def test_a_killed_run_goes_on(evaluate, python, tmp_path, when):
    """The same scores, and the same likelihoods to the last bit, as of a run that was not killed."""
    flags = [DEMO_MODEL, "--tasks", FOLDER, "--batch-size", "4", "--json"]
    whole = evaluate(*flags, "--cache-dir", tmp_path / "whole")
    (expected,) = (tmp_path / "whole").glob("*.jsonl")

    command = [*map(str, flags), "--cache-dir", str(tmp_path / "killed")]
    done = python("-c", KILLED.replace("{when}", when), "eval", *command, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""
    (file,) = (tmp_path / "killed").glob("*.jsonl")
    assert file.name == expected.name
    lines = expected.read_bytes().splitlines()
    kept = 7 if when == "after" else 6  # the first line says what the answers depend on
    assert file.read_bytes().splitlines()[:kept] == lines[:kept]
    assert len(lines) > 2 * kept

    again = evaluate(*command)
    assert scores_of(again) == scores_of(whole)
    assert file.read_bytes() == expected.read_bytes()
    known = sum(len(json.loads(line)) for line in lines[1:kept])
    assert f"note: {known} answers of this model are in {tmp_path / 'killed'} already" in again.stderr


def test_known_answers_are_not_computed_again(evaluate, tmp_path, monkeypatch):
    flags = [DEMO_MODEL, "--tasks", FOLDER, "--json", "--cache-dir", tmp_path]
    first = evaluate(*flags)
    from lowrank_ft.evaluation import task_model

    def forbidden(*args, **kwargs):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(task_model.TaskModel, "_scores", forbidden)
    assert scores_of(evaluate(*flags)) == scores_of(first)
    with pytest.raises(AssertionError, match="the model was asked"):
        from lowrank_ft.checkpoints.source import Source
        from lowrank_ft.evaluation.compare import EvaluationSettings, compare

        compare(Source(str(DEMO_MODEL)), None, EvaluationSettings(tasks=[str(FOLDER)]))


def test_without_a_folder_nothing_is_written(evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores_of(evaluate(DEMO_MODEL, "--tasks", CLOZE, "--limit", "4", "--json"))
    assert list(tmp_path.iterdir()) == []


def test_no_model_gets_the_answers_of_another(evaluate, tmp_path):
    """One folder for a model, the same with other weights of equal shapes, and the baseline of a comparison."""
    other = shutil.copytree(DEMO_MODEL, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(other)
    flags = ["--tasks", FOLDER, "--json", "--dtype", "float32"]
    alone = [scores_of(evaluate(name, *flags)) for name in (DEMO_MODEL, other)]
    assert alone[0] != alone[1]
    cached = ["--cache-dir", tmp_path / "answers"]
    assert [scores_of(evaluate(name, *flags, *cached)) for name in (DEMO_MODEL, other)] == alone
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 2

    copied = shutil.copytree(DEMO_MODEL, tmp_path / "copied")
    both = evaluate(other, "--baseline", copied, *flags, *cached)
    found = json.loads(both.stdout)
    assert [found["baseline"]["tasks"], found["model"]["tasks"]] == alone
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 2  # a copy is the same model
    assert both.stderr.count("answers of this model are in") == 2


def test_the_harness_alone_scores_the_same(evaluate):
    """Its own HFLM, choice by choice, on the tasks as loaded here."""
    from lm_eval.evaluator import evaluate as harness_evaluate
    from lm_eval.models.huggingface import HFLM

    from lowrank_ft.evaluation.lm_eval import load_tasks

    found = scores_of(evaluate(DEMO_MODEL, "--tasks", FOLDER, "--dtype", "float32", "--json"))
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(DEMO_MODEL), batch_size=1)
    results = harness_evaluate(lm=lm, task_dict=load_tasks([str(FOLDER)]), log_samples=False)["results"]
    for task, scores in found.items():
        for metric, score in scores.items():
            assert score["value"] == results[task][f"{metric},none"]
            assert score["stderr"] == pytest.approx(results[task][f"{metric}_stderr,none"])


def write_task(folder, **changes):
    config = {
        "task": "mine",
        "custom_dataset": "FUNCTION",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    function = "!function lowrank_ft.evaluation.task_data.load"
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config).replace("FUNCTION", function), encoding="utf-8")
    return path


def write_items(folder, answers):
    items = [{"question": f"The {i} of", "choices": ["a", "the", "it"], "answer": a} for i, a in enumerate(answers)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def test_what_guessing_scores_and_the_limit(evaluate, tmp_path):
    answers = [0, 1, 1, 2, 1, 0, 0, 0, 2, 2, 2, 2]
    write_items(tmp_path, answers)
    task = write_task(tmp_path)
    for limit, items in ((None, 12), (5, 5), (99, 12)):
        more = [] if limit is None else ["--limit", limit]
        score = scores_of(evaluate(DEMO_MODEL, "--tasks", task, *more, "--json"))["mine"]["acc"]
        assert (score["items"], score["items_in_all"]) == (items, 12)
        some = answers[:items]
        assert score["majority"] == max(some.count(k) for k in range(3)) / items
        assert score["chance"] == pytest.approx(1 / 3)
        lines = evaluate(DEMO_MODEL, "--tasks", task, *more).stdout.splitlines()
        (row,) = [line for line in lines if line.strip().startswith("mine")]
        assert ("first 5 of 12" in row) == (items == 5)
        assert row.split()[-2:] == [f"{score['majority']:.4f}", "0.3333"]


def test_other_kinds_of_tasks(evaluate, tmp_path):
    """What a model writes and the likelihood of whole texts: kept, too, and guessing has no score."""
    (tmp_path / "items.jsonl").write_text('{"question": "import ", "answer": "os"}\n' * 3, encoding="utf-8")
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    kinds = {
        "generate_until": {"metric_list": [exact], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}},
        "loglikelihood_rolling": {
            "metric_list": [{"metric": "byte_perplexity"}], "doc_to_target": "{{question}}", "doc_to_text": "",
        },
    }  # fmt: skip
    for kind, changes in kinds.items():
        task = write_task(tmp_path, output_type=kind, doc_to_choice=None, **{"doc_to_target": "{{answer}}", **changes})
        flags = [DEMO_MODEL, "--tasks", task, "--cache-dir", tmp_path / kind, "--json"]
        first, second = scores_of(evaluate(*flags)), evaluate(*flags)
        assert scores_of(second) == first
        assert "note: 1 answers" in second.stderr or "note: 3 answers" in second.stderr
        (score,) = first["mine"].values()
        assert (score["majority"], score["chance"]) == (None, None)
        assert score["items"] == 3


def test_files_that_cannot_be_used(evaluate, tmp_path, monkeypatch):
    run = partial(evaluate, DEMO_MODEL, "--tasks")
    task = write_task(tmp_path)
    assert_one_line_error(run(task), f"there is no file {tmp_path / 'items.jsonl'}; check the path")
    write_items(tmp_path, [0, 1, None])
    assert_one_line_error(run(task), "task mine: item 3 has no choices or no answer that can be read")
    assert run(task, "--limit", "2").returncode == 0
    write_items(tmp_path, [1, 2, 3])  # counted from 1
    done = run(task)
    assert done.returncode == 0
    assert "note: task mine: the answer of 1 of 3 items is none of their choices" in done.stderr
    (tmp_path / "items.jsonl").write_text('{"question": "x"}\n', encoding="utf-8")
    assert_one_line_error(run(task), "cannot be read: ")
    assert_one_line_error(run(tmp_path), "correct the task's YAML file, or its data")

    write_task(tmp_path, dataset_kwargs={"data_files": {"test": "$NO_SUCH_FOLDER/items.jsonl"}})
    assert_one_line_error(run(task), "needs the environment variable NO_SUCH_FOLDER, which is not set")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_items(elsewhere, [0, 1])
    monkeypatch.setenv("NO_SUCH_FOLDER", str(elsewhere))
    assert scores_of(run(task, "--json"))["mine"]["acc"]["items"] == 2

    (tmp_path / "broken.yaml").write_text("task: [mine\noutput_type", encoding="utf-8")
    for name in (tmp_path, tmp_path / "broken.yaml"):
        assert_one_line_error(run(name), f"{tmp_path / 'broken.yaml'}, line 2 is no YAML")
    task.unlink()
    assert_one_line_error(run(tmp_path), "line 2 is no YAML")  # not: there is no task in this folder
    (tmp_path / "broken.yaml").write_text("only a text", encoding="utf-8")
    assert_one_line_error(run(tmp_path), "broken.yaml is no task; a task is a mapping")


def test_a_model_whose_answers_are_no_numbers(evaluate, tmp_path):
    """The harness would take the first choice of every item, and score what that scores."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # a number in float32, the type of evaluation; its products are not
    shutil.copytree(DEMO_MODEL, tmp_path / "large")
    model.save_pretrained(tmp_path / "large")
    done = evaluate(tmp_path / "large", "--tasks", FOLDER, "--limit", "4", "--cache-dir", tmp_path / "answers")
    assert_one_line_error(done, "a log-likelihood of the tasks is nan, though every weight is a number")


def test_arc_easy(evaluate, shared, monkeypatch):
    """As the harness asks it; the dense model of the repository is too small to know much."""
    monkeypatch.setenv("LOWRANK_FT_SHARED", str(shared))
    if not (shared / "data" / "arc-easy-test.jsonl").is_file():
        pytest.skip("no ARC-easy among the shared data")
    scores = scores_of(evaluate(DEMO_MODEL, "--tasks", ARC, "--limit", "24", "--json"))["arc_easy_local"]
    assert set(scores) == {"acc", "acc_norm"}
    assert scores["acc"]["items_in_all"] == 2376
    lines = (shared / "data" / "arc-easy-test.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    items = [json.loads(line) for line in lines]
    places = [item["choices"]["label"].index(item["answerKey"]) for item in items]
    assert scores["acc"]["majority"] == max(places.count(k) for k in range(5)) / 24

    from lowrank_ft.evaluation.lm_eval import load_tasks

    task = load_tasks([str(ARC)])["tasks"]["arc_easy_local"]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == f"Question: {items[0]['question']}\nAnswer:"
    assert task.doc_to_choice(doc) == items[0]["choices"]["text"]
    assert task.doc_to_target(doc) == places[0]
