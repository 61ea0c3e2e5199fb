"""What guessing scores, against a count by hand; tasks as the harness has them."""

import json
import random
from types import SimpleNamespace

import pytest

from lowrank_ft.errors import DataError
from lowrank_ft.evaluation.guessing import Guessing, guessing, of_group
from tests.conftest import ROOT


def task(docs, inputs=0, **config):
    """As a ``ConfigurableTask``: each document is choices and an answer."""
    config = {"output_type": "multiple_choice", "process_results": None, **config}
    return SimpleNamespace(
        eval_docs=docs,
        multiple_input=inputs,
        get_config=config.get,
        doc_to_choice=lambda doc: doc["choices"],
        doc_to_target=lambda doc: doc["answer"],
        doc_to_text=lambda doc: doc["text"],
    )


def test_against_a_naive_count():
    rng = random.Random(0)
    docs = []
    for _ in range(200):
        choices = [f"c{i}" for i in range(rng.choice([3, 4, 5]))]
        answer = rng.choices(range(len(choices)), weights=[1, 4, 2, 2, 2][: len(choices)])[0]
        docs.append({"choices": choices, "answer": rng.choice([answer, choices[answer]])})  # index or text

    def right(doc, k):
        return k < len(doc["choices"]) and doc["answer"] in (k, doc["choices"][k])

    for limit in (None, 7, 500):
        some = docs[:limit]
        found = guessing("t", task(docs), limit)
        assert found.items == len(some)
        assert found.majority == max(sum(right(doc, k) for doc in some) for k in range(5)) / len(some)
        assert found.chance == pytest.approx(sum(1 / len(doc["choices"]) for doc in some) / len(some))


def test_several_right_answers_and_several_contexts():
    docs = [{"choices": list("abcd"), "answer": a} for a in ([0, 1], [1, 3], ["b", "b"])]
    assert guessing("t", task(docs)) == Guessing(1.0, pytest.approx((0.5 + 0.5 + 0.25) / 3), 3)
    docs = [{"choices": ["x", "y"], "answer": " the end", "text": i} for i in (0, 1, 1)]  # as winogrande
    assert guessing("t", task(docs, inputs=2)) == Guessing(pytest.approx(2 / 3), 0.5, 3)


def test_where_it_cannot_be_told():
    docs = [{"choices": ["a", "b"], "answer": 0}]
    assert guessing("t", task(docs, output_type="generate_until")) is None
    assert guessing("t", task(docs, process_results=lambda doc, results: {})) is None
    assert guessing("t", task([])) is None


def test_answers_that_are_no_choice_are_named(capsys):
    docs = [{"choices": ["a", "b"], "answer": a} for a in (0, 2, -1, "c")]
    assert guessing("t", task(docs)) == Guessing(0.25, 0.125, 4)
    assert "note: task t: the answer of 3 of 4 items is none of their choices" in capsys.readouterr().err


def test_an_item_that_cannot_be_read():
    docs = [{"choices": ["a", "b"], "answer": 0}, {"choices": ["a", "b"]}]
    with pytest.raises(DataError, match="task t: item 2 has no choices or no answer that can be read"):
        guessing("t", task(docs))
    assert guessing("t", task(docs), limit=1).items == 1
    with pytest.raises(DataError, match="item 1 has no choices"):
        guessing("t", task([{"choices": [], "answer": 0}]))


def test_groups():
    large, small = Guessing(0.5, 0.25, 30), Guessing(0.8, 0.5, 10)
    assert of_group([large, small], by_size=True) == Guessing(pytest.approx(0.575), pytest.approx(0.3125), 40)
    assert of_group([large, small], by_size=False) == Guessing(pytest.approx(0.65), pytest.approx(0.375), 40)
    assert of_group([large, None], by_size=True) is None
    assert of_group([], by_size=True) is None


def test_of_the_tasks_in_the_repository():
    """The docs say what guessing gives there."""
    for file, expected in (("agreement", 0.5), ("cloze", 0.25)):
        lines = (ROOT / "tests" / "tasks" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        docs = [{**doc, "answer": doc["label"]} for doc in map(json.loads, lines)]
        assert guessing(file, task(docs)) == Guessing(expected, pytest.approx(expected), 60)
