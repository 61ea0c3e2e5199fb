"""``lowrank-ft eval``: strides, agreement with a baseline, tasks; the wrong inputs first."""

import importlib.util
import json
import math
import shutil
import sys
from functools import partial

import pytest
import torch
import yaml
from lowrank_ft_cli.main import main
from transformers import AutoModelForCausalLM

from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.evaluation.lm_eval import Score
from tests.conftest import DEMO_MODEL, ROOT

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install "lowrank-ft[eval]"'
)
FOLDER = ROOT / "tests" / "tasks"
TASKS = {"lowrank_ft_agreement": 2, "lowrank_ft_cloze": 4}
CLOZE = FOLDER / "lowrank_ft_cloze.yaml"


@pytest.fixture
def evaluate(command):
    return partial(command, "eval")


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "compact"
    assert (
        main(["convert", str(DEMO_MODEL), "--param-ratio", "0.6", "--method", "svd", "--output-dir", str(folder)]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(120)))
    return path


def assert_one_line_error(done, message):
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


WRONG = [
    ([], "there is nothing to measure; give --data, --tasks or --talk"),
    (["--data", "DATA", "--stride", "0"], "--stride is 0; it must be 1 or more"),
    (["--data", "DATA", "--stride", "65", "--block-size", "64"], "--stride 65 exceeds the block size 64"),
    (["--data", "DATA", "--stride", "513"], "--stride 513 exceeds the block size 512"),
    (["--data", "DATA", "--max-tokens", "1"], "--max-tokens is 1; it must be 2 or more"),
    (["--data", "DATA", "--batch-size", "0"], "--batch-size is 0; it must be 1 or more"),
    (["--data", "DATA", "--block-size", "513"], "block size 513 exceeds the 512 positions"),
    (["--data", "DATA", "--limit", "5"], "--limit applies to --tasks or --talk, which is not given"),
    (["--tasks", "tests/tasks", "--limit", "0"], "--limit is 0; it must be 1 or more"),
    (["--data", "DATA", "--cache-dir", "x"], "--cache-dir applies to --tasks, which is not given"),
    (["--tasks", "tests/tasks", "--cache-dir", "README.md"], "--cache-dir README.md is a file; name a folder"),
    (["--tasks", "tests/tasks", "--stride", "8"], "--stride applies to --data, which is not given"),
    (["--data", "DATA", "--max-new-tokens", "8"], "--max-new-tokens applies to --talk, which is not given; add --talk"),
    (["--talk", "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be 1 or more"),
    (["--talk", "--stride", "8"], "--stride applies to --data, which is not given"),
    (["--talk"], "the tokenizer has no chat template, which replies need"),
    (["--prompts", "none.txt"], "there is no file none.txt"),
    (["--tasks", "tests/tasks", "--max-tokens", "8"], "--max-tokens applies to --data, which is not given"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[" ".join(f) or "none" for f, _ in WRONG])
def test_wrong_arguments(evaluate, data, flags, message):
    assert_one_line_error(evaluate(DEMO_MODEL, *(data if f == "DATA" else f for f in flags)), message)


def test_tasks_without_the_harness(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [n for n in sys.modules if n.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    done = evaluate(DEMO_MODEL, "--tasks", FOLDER)
    assert_one_line_error(done, "--tasks needs lm-evaluation-harness")
    assert 'pip install "lowrank-ft[eval]"' in done.stderr


@harness
def test_unknown_tasks_and_those_that_need_a_network(evaluate, monkeypatch, tmp_path):
    done = evaluate(DEMO_MODEL, "--tasks", "lambada_opena")
    assert_one_line_error(done, "--tasks 'lambada_opena' is no task; did you mean lambada_openai")
    assert "a task of your own is named by its YAML file or folder" in done.stderr
    done = evaluate(DEMO_MODEL, "--tasks", tmp_path)
    assert_one_line_error(done, "holds no task; name a folder with YAML files of tasks")
    from lm_eval.tasks import TaskManager

    def unreachable(self, names):
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    done = evaluate(DEMO_MODEL, "--tasks", "arc_easy")
    assert_one_line_error(done, "--tasks arc_easy cannot be read: no route; tasks of the harness download their data")


def test_stride_and_max_tokens(evaluate, data):
    flags = ["--data", data, "--block-size", "64", "--json"]
    plain = json.loads(evaluate(DEMO_MODEL, *flags).stdout)["model"]
    strided = json.loads(evaluate(DEMO_MODEL, *flags, "--stride", "16").stdout)["model"]
    first = json.loads(evaluate(DEMO_MODEL, *flags, "--stride", "16", "--max-tokens", "300").stdout)["model"]
    assert plain["stride"] is None
    assert (strided["stride"], strided["block_size"]) == (16, 64)
    assert first["tokens"] == 299
    assert plain["tokens"] % 63 == 0
    assert strided["tokens"] > plain["tokens"]
    assert strided["perplexity"] < plain["perplexity"]  # more context


def test_a_second_copy_of_the_weights_does_not_count(evaluate, tmp_path, data):
    """Downloads of Mistral and Llama hold all weights twice, in ``consolidated.safetensors``, too."""
    shutil.copytree(DEMO_MODEL, tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "consolidated.safetensors")
    flags = ["--data", data, "--block-size", "64", "--max-tokens", "64", "--json"]
    found = json.loads(evaluate(tmp_path / "dense", *flags).stdout)["model"]
    assert found["bytes"] == (DEMO_MODEL / "model.safetensors").stat().st_size


def test_agreement_with_the_baseline(evaluate, compact, data):
    flags = ["--baseline", DEMO_MODEL, "--data", data, "--block-size", "64", "--dtype", "float32"]
    found = json.loads(evaluate(compact, *flags, "--json").stdout)
    mine, base, difference = found["model"], found["baseline"], found["difference"]
    assert difference["loss"] == pytest.approx(mine["loss"] - base["loss"])
    assert difference["parameters"] == mine["parameters"] - base["parameters"] < 0
    assert found["agreement"]["tokens"] == mine["tokens"]
    assert found["agreement"]["kl"] > 0.01
    assert 0.1 < found["agreement"]["top1"] < 1

    same = json.loads(evaluate(DEMO_MODEL, *flags, "--json").stdout)
    assert same["agreement"]["kl"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"]["top1"] == 1

    table = evaluate(compact, *flags).stdout
    assert "KL/token" in table
    assert f"{found['agreement']['kl']:.4f}" in table
    assert f"{found['agreement']['top1']:.1%}" in table
    assert found["draft"]["acceptance"] == found["agreement"]["top1"]
    assert found["draft"]["cost"] == found["model"]["bytes"] / found["baseline"]["bytes"]
    (line,) = [line for line in table.splitlines() if line.startswith("draft ")]
    assert line.startswith("draft     speculative decoding of the baseline with this model as its draft ")
    assert f"({found['agreement']['top1']:.1%} of its tokens accepted, " in line


@pytest.fixture
def chat_models(tmp_path, compact):
    """The demo model and its compact form, with a template in the folder; they are no good at chats."""
    folders = tmp_path / "chat", tmp_path / "compact"
    for folder, source in zip(folders, (DEMO_MODEL, compact), strict=True):
        shutil.copytree(source, folder)
        template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
        (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}# assistant:{% endif %}")
    return folders


def test_replies(evaluate, chat_models, tmp_path, data):
    dense, mine = chat_models
    (tmp_path / "prompts.txt").write_text("How do I sort a list?\nWhat is a class?\nWhy?\n")
    flags = ["--baseline", dense, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "12", "--dtype", "float32"]
    done = evaluate(mine, *flags, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "loss" not in found["model"]
    assert set(found["talk"]) == {"max_new_tokens", "agreement", "replies"}
    assert [r["prompt"] for r in found["talk"]["replies"]] == ["How do I sort a list?", "What is a class?", "Why?"]
    assert 0 < found["talk"]["agreement"]["top1"] < 1
    assert found["talk"]["agreement"]["tokens"] == 3 * found["baseline"]["talk"]["reply_tokens"]
    table = evaluate(mine, *flags).stdout
    assert "replies to 3 prompts, at most 12 tokens each" in table
    for cell in (
        f"{found['model']['talk']['repetition']:.1%}",
        f"{found['baseline']['talk']['stopped']:.1%}",
        f"{found['talk']['agreement']['kl']:.4f}",
    ):
        assert cell in table
    flags = ["--talk", "--limit", "2", "--max-new-tokens", "4", "--data", data, "--max-tokens", "400"]
    alone = json.loads(evaluate(mine, *flags, "--json").stdout)
    assert len(alone["talk"]["replies"]) == 2
    assert set(alone["talk"]["replies"][0]) == {"prompt", "model"}
    assert alone["model"]["perplexity"] > 1
    assert "baseline" not in alone
    assert "at most 4 tokens each" in evaluate(mine, *flags).stdout


def test_both_models_get_the_same_blocks(evaluate, tmp_path, data):
    """The baseline has fewer positions: its block size holds for both."""
    short = shutil.copytree(DEMO_MODEL, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    found = json.loads(evaluate(DEMO_MODEL, "--baseline", short, "--data", data, "--json").stdout)
    assert found["model"]["block_size"] == found["baseline"]["block_size"] == 128
    assert found["agreement"]["top1"] == 1


def test_a_tokenizer_of_another_model(evaluate, tmp_path, data):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / "small")
    done = evaluate(tmp_path / "small", "--data", data, "--max-tokens", "400")
    assert_one_line_error(done, f"the tokenizer of {tmp_path / 'small'} gives {data} token ids up to ")
    assert "and the model has 40 embeddings" in done.stderr
    if importlib.util.find_spec("lm_eval"):
        done = evaluate(tmp_path / "small", "--tasks", FOLDER, "--limit", "2")
        assert_one_line_error(done, f"the tokenizer of {tmp_path / 'small'} gives the tasks token ids up to ")


def test_no_agreement_between_other_tokenizers(evaluate, tmp_path, data):
    other = shutil.copytree(DEMO_MODEL, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = evaluate(DEMO_MODEL, "--baseline", other, "--data", data, "--json")
    assert json.loads(done.stdout)["agreement"] is None
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: no agreement with the baseline is shown, because the tokenizers cut the text into different tokens"
    ]
    assert "KL/token" not in evaluate(DEMO_MODEL, "--baseline", other, "--data", data).stdout

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.resize_token_embeddings(2056)
    model.save_pretrained(tmp_path / "wider")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / "wider")
    done = evaluate(DEMO_MODEL, "--baseline", tmp_path / "wider", "--data", data, "--json")
    assert json.loads(done.stdout)["agreement"] is None
    assert "the vocabularies have 2048 and 2056 tokens" in done.stderr


@pytest.mark.parametrize("name", TASKS)
def test_items_give_nothing_away(name):
    """Unique, and the right answer is equally often in every place."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").replace("!function ", ""))
    lines = (FOLDER / config["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert config["task"] == name
    assert len({item["context"] for item in items}) == len(items) == 60
    assert all(len(set(item["choices"])) == TASKS[name] for item in items)
    places = [item["label"] for item in items]
    assert [places.count(i) for i in range(TASKS[name])] == [60 // TASKS[name]] * TASKS[name]


@torch.no_grad()
def naive_accuracy(model, tokenizer, items) -> float:
    right = 0
    for item in items:
        scores = []
        for choice in item["choices"]:
            start = tokenizer(item["context"])["input_ids"]
            ids = tokenizer(f"{item['context']} {choice}")["input_ids"]
            assert ids[: len(start)] == start
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        right += scores.index(max(scores)) == item["label"]
    return right / len(items)


@harness
def test_tasks(evaluate, compact):
    """No ``--data``; a folder for both tasks; the compact model, the dense one, and the difference."""
    done = evaluate(compact, "--baseline", DEMO_MODEL, "--tasks", "tests/tasks", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"model", "baseline", "difference"}
    assert "loss" not in found["model"]
    assert set(found["model"]["tasks"]) == set(TASKS)
    for name, folder in (("model", compact), ("baseline", DEMO_MODEL)):
        source = Source(str(folder))
        model, tokenizer = load_model(source, "float32", "cpu"), source.load_tokenizer()
        for task, file in (("lowrank_ft_agreement", "agreement"), ("lowrank_ft_cloze", "cloze")):
            items = [json.loads(line) for line in (FOLDER / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
            score = found[name]["tasks"][task]["acc"]
            assert score["value"] == pytest.approx(naive_accuracy(model, tokenizer, items))
            assert score["items"] == 60
            assert score["higher_is_better"]
    for task in TASKS:
        values = [found[name]["tasks"][task]["acc"]["value"] for name in ("model", "baseline")]
        assert found["difference"]["tasks"][task]["acc"] == pytest.approx(values[0] - values[1])


@harness
def test_tasks_beside_a_text_with_a_limit(evaluate, compact, data):
    flags = ["--tasks", CLOZE, "--limit", "8", "--data", data, "--max-tokens", "400"]
    assert (
        json.loads(evaluate(compact, *flags, "--json").stdout)["model"]["tasks"]["lowrank_ft_cloze"]["acc"]["items"]
        == 8
    )
    table = evaluate(compact, "--baseline", DEMO_MODEL, *flags).stdout
    for words in ("perplexity", "KL/token", "lowrank_ft_cloze", "acc_norm", "difference", "standard error"):
        assert words in table


@harness
def test_a_task_file_of_ones_own(evaluate, tmp_path):
    """By the path of its YAML file, as the harness allows; a file that does not load is one line."""
    shutil.copy(FOLDER / "cloze.jsonl", tmp_path)
    text = CLOZE.read_text(encoding="utf-8").replace("lowrank_ft_cloze", "mine")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    done = evaluate(DEMO_MODEL, "--tasks", tmp_path / "mine.yaml", "--limit", "4", "--json")
    assert json.loads(done.stdout)["model"]["tasks"]["mine"]["acc"]["items"] == 4
    (tmp_path / "cloze.jsonl").unlink()
    done = evaluate(DEMO_MODEL, "--tasks", tmp_path / "mine.yaml")
    assert_one_line_error(done, f"there is no file {tmp_path / 'cloze.jsonl'}; check the path")


def test_a_metric_that_is_undefined_is_null_in_json(evaluate, monkeypatch):
    """The harness gives NaN, such as for an F1 without a positive item; strict readers of JSON refuse it."""
    scores = {"mine": {"f1": Score(math.nan, None, True, 4), "ppl": Score(math.inf, 0.5, False, 4)}}
    monkeypatch.setattr("lowrank_ft.evaluation.compare.load_tasks", lambda names: {"tasks": {}})
    monkeypatch.setattr("lowrank_ft.evaluation.compare.run_tasks", lambda *_: scores)
    done = evaluate(DEMO_MODEL, "--baseline", DEMO_MODEL, "--tasks", "mine", "--json")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["difference"]["tasks"]["mine"] == {"f1": None, "ppl": None}
    assert [found["model"]["tasks"]["mine"][m]["value"] for m in ("f1", "ppl")] == [None, None]
    assert found["model"]["tasks"]["mine"]["ppl"]["stderr"] == 0.5


@harness
def test_nothing_else_is_printed(cli, compact):
    """No progress bars and no warnings of the harness where stderr is no terminal."""
    done = cli("eval", compact, "--tasks", FOLDER / "lowrank_ft_agreement.yaml", "--limit", "4", "--json")
    json.loads(done.stdout)
    assert done.stderr == ""


def test_the_library_alone_needs_no_harness(python):
    code = "import lowrank_ft.evaluation.lm_eval, lowrank_ft.evaluation.perplexity, sys; assert 'lm_eval' not in sys.modules"
    python("-c", code)


def test_a_cpu_computes_in_float32_unless_asked(evaluate, data):
    """The demo model is stored in bfloat16."""
    flags = ["--data", data, "--block-size", "64", "--max-tokens", "512", "--device", "cpu", "--json"]
    found = {
        dtype: json.loads(evaluate(DEMO_MODEL, *flags, *(["--dtype", dtype] if dtype else [])).stdout)["model"]["loss"]
        for dtype in ("", "float32", "bfloat16")
    }
    assert found[""] == found["float32"] != found["bfloat16"]
