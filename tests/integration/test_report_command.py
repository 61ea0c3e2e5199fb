"""``lowrank-ft report`` and the pictures of plans and cards, on the embedded model."""

import json
import shutil
import sys

import pytest
from huggingface_hub import metadata_load
from lowrank_ft_cli.main import main
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_ft.checkpoints.companions import copy_companions
from lowrank_ft.checkpoints.push import _stage
from lowrank_ft.report.model_card import model_card
from tests.conftest import DEMO_MODEL
from tests.html_page import assert_self_contained

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "compact"
    arguments = ["convert", str(DEMO_MODEL), "--param-ratio", "0.6", "--method", "svd", "--output-dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lowrank-ft", *arguments])  # the card shows the command
        assert main(arguments) == 0
    return folder


@pytest.fixture
def compact(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "compact")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n\n" * 200)
    return path


def assert_refused(done, words):
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]
    assert done.stdout == ""


def test_size_and_cost_are_those_of_the_models(command, compact):
    done = command("report", compact)
    assert done.stdout == f"{compact / 'report.html'}\n"
    page = assert_self_contained((compact / "report.html").read_text(encoding="utf-8"))
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (DEMO_MODEL, compact)]
    before, after = (sum(p.numel() for p in m.parameters()) for m in models)
    assert page.row("parameters") == [f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"]
    flops = [2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) for model in models]
    assert page.row("FLOPs per token") == [f"{f / 1e6:.3g} M" for f in flops] + [f"{flops[1] / flops[0] - 1:+.1%}"]
    ranks = json.loads((compact / "config.json").read_text())["quantization_config"]["ranks"]
    assert page.row(UP)[1] == str(ranks[UP])
    layers = dict(models[1].named_modules())
    factored = (
        sum(layers[n].out_features * layers[n].in_features for n in ranks),
        sum(layers[n].U.weight.numel() + layers[n].V.weight.numel() for n in ranks),
    )
    assert page.row("multiply-adds per token, factored linears")[:2] == [f"{n:,}" for n in factored]
    # The origin is a folder here, so the spectra come from its weights.
    assert len(page.all("img")) == 3
    assert "lowrank-ft convert model --param-ratio 0.6 --method svd --output-dir compact" in page.words
    assert str(DEMO_MODEL) not in page.words
    assert command("report", compact).returncode == 0  # its own report is replaced unasked


def test_evaluation_from_a_file_and_from_a_text(command, compact, text, tmp_path):
    flags = ["--data", text, "--block-size", "64"]
    printed = command("eval", compact, "--baseline", DEMO_MODEL, *flags, "--json").stdout
    (tmp_path / "eval.json").write_text(printed)
    numbers = json.loads(printed)
    out = tmp_path / "read.html"
    assert command("report", compact, "--eval", tmp_path / "eval.json", "--output", out).stdout == f"{out}\n"
    page = assert_self_contained(out.read_text(encoding="utf-8"))
    expected = [f"{numbers[m]['perplexity']:.3f}" for m in ("baseline", "model")]
    assert page.row("perplexity")[:2] == expected

    readme = (compact / "README.md").read_text()
    assert "| perplexity |" not in readme
    done = command("report", compact, *flags, "--output", tmp_path / "measured.html", "--update-card")
    assert done.stdout == f"{tmp_path / 'measured.html'}\n"
    page = assert_self_contained((tmp_path / "measured.html").read_text(encoding="utf-8"))
    assert page.row("perplexity")[:2] == expected
    assert "Measured on text.txt." in page.words
    card = (compact / "README.md").read_text()
    assert f"| perplexity | {expected[0]} | {expected[1]} |" in card
    assert card.partition("end: main table")[2] == readme.partition("end: main table")[2]
    headers = [text.split("---\n", 2) for text in (card, readme)]
    assert headers[0][2].partition("| parameters |")[0] == headers[1][2].partition("| parameters |")[0]
    found = metadata_load(compact / "README.md")
    metrics = {m["name"]: m["value"] for m in found.pop("model-index")[0]["results"][0]["metrics"]}
    assert metrics == {
        "perplexity": pytest.approx(numbers["model"]["perplexity"], abs=1e-4),
        "perplexity, dense model": pytest.approx(numbers["baseline"]["perplexity"], abs=1e-4),
    }
    (tmp_path / "before.md").write_text(readme)
    assert found == metadata_load(tmp_path / "before.md")


def test_replies_of_an_evaluation_stand_side_by_side(command, compact, tmp_path):
    evil = "<script>alert(1)</script> & <b>"
    replies = [
        {"prompt": f"Question {i}? {evil}",
         "model": {"text": f"compact says {i} {evil}", "tokens": 7, "ended": True, "repetition": 0.0},
         "baseline": {"text": f"dense says {i}\nand more", "tokens": 48, "ended": False, "repetition": 0.0}}
        for i in range(8)
    ]  # fmt: skip
    numbers = {
        "model": {"name": "c", "talk": {"repetition": 0.25, "stopped": 0.5, "reply_tokens": 7.0}},
        "baseline": {"name": "d", "talk": {"repetition": 0.125, "stopped": 0.75, "reply_tokens": 48.0}},
        "talk": {"max_new_tokens": 48, "agreement": {"kl": 0.5, "top1": 0.75, "tokens": 384}, "replies": replies},
    }
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(numbers))
    assert command("report", compact, "--eval", path, "--update-card").returncode == 0
    page = assert_self_contained((compact / "report.html").read_text(encoding="utf-8"))
    assert page.row("repeated 4-grams in replies") == ["12.5%", "25.0%", "+0.1250"]
    assert page.row("replies that end by themselves") == ["75.0%", "50.0%", "-0.2500"]
    assert page.row("same most likely token as the baseline on its replies")[1] == "75.0%"
    assert not any("max" in r[0] for r in page.rows if r)
    for i in range(5):
        places = [page.words.index(w) for w in (f"Question {i}? {evil}", f"dense says {i}", f"compact says {i} {evil}")]
        assert places == sorted(places)
    assert "48 tokens, cut off" in page.words
    assert "Question 5?" not in page.words
    assert "| repeated 4-grams in replies | 12.5% | 25.0% |" in (compact / "README.md").read_text()

    # Without a baseline, and what somebody else wrote under that name.
    alone = {
        "model": numbers["model"],
        "talk": {"replies": [{"prompt": "P?", "model": replies[0]["model"]}, "x", None]},
    }
    path.write_text(json.dumps(alone))
    assert command("report", compact, "--eval", path).returncode == 0
    page = assert_self_contained((compact / "report.html").read_text(encoding="utf-8"))
    assert "P?" in page.words
    assert [a for t, a in page.tags if t == "h3"] == [{}]
    for odd in ("words", {"replies": "words"}, {"replies": [{"prompt": 3, "model": {"text": None}}]}, None):
        path.write_text(json.dumps({"model": {"loss": 1.0}, "talk": odd}))
        assert command("report", compact, "--eval", path).returncode == 0


def test_the_card_carries_table_and_picture(converted):
    card = (converted / "README.md").read_text()
    assert "| parameters | 1,328,512 |" in card
    assert "| FLOPs per token |" in card
    assert "](rank_map.png)" in card
    assert (converted / "rank_map.png").read_bytes().startswith(PNG)


def test_what_describes_a_checkpoint_is_pushed_and_not_copied_to_others(compact, tmp_path):
    (compact / "report.html").write_text("page")
    record = {"format_version": 1, "base_model": "/home/somebody/dense", "method": "svd",
              "calibration": {"source": "/home/somebody/text.txt", "tokens": 3}}  # fmt: skip
    (compact / "conversion.json").write_text(json.dumps(record))
    (tmp_path / "staged").mkdir()
    _stage(compact, tmp_path / "staged", "me/model")
    staged = {p.name for p in (tmp_path / "staged").iterdir()}
    assert {"rank_map.png", "report.html", "conversion.json"} <= staged
    public = json.loads((tmp_path / "staged" / "conversion.json").read_text())
    assert public == {"format_version": 1, "method": "svd", "calibration": {"source": "text.txt", "tokens": 3}}
    (tmp_path / "next").mkdir()
    copy_companions(compact, tmp_path / "next")
    copied = {p.name for p in (tmp_path / "next").iterdir()}
    assert "tokenizer.json" in copied
    assert not copied & {"rank_map.png", "report.html", "conversion.json", "README.md"}


def test_a_folder_with_a_report_can_be_overwritten(command, compact):
    (compact / "report.html").write_text("page")
    done = command("convert", DEMO_MODEL, "--rank", "16", "--method", "svd", "--output-dir", compact, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert not (compact / "report.html").exists()


def test_bad_inputs(command, compact, tmp_path):
    assert_refused(
        command("report", tmp_path / "nothing"), "nothing is not a folder; report on what convert or finetune"
    )
    assert_refused(command("report", DEMO_MODEL), "is not a compact checkpoint")
    (tmp_path / "bad.json").write_text("{")
    assert_refused(command("report", compact, "--eval", tmp_path / "bad.json"), "bad.json is no readable JSON")
    assert_refused(command("report", compact, "--update-card"), "--update-card needs numbers")
    assert_refused(command("report", compact, "--eval", "a", "--data", "b"), "give only one of them")
    out = tmp_path / "out.html"
    out.write_text("mine")
    assert_refused(command("report", compact, "--output", out), "exists; name another file, or add --overwrite")
    assert out.read_text() == "mine"
    assert command("report", compact, "--output", out, "--overwrite").returncode == 0
    assert out.read_text().startswith("<!doctype html>")
    assert_refused(command("report", compact, "--output", tmp_path / "no" / "x.html"), "in a folder that exists")
    assert_refused(command("report", compact, "--baseline", tmp_path / "no-model"), "no-model")
    (tmp_path / "eval.json").write_text('{"model": {"loss": 1.0}}')
    (compact / "README.md").write_text("# A card of one's own\n")
    done = command("report", compact, "--eval", tmp_path / "eval.json", "--update-card")
    assert_refused(done, "README.md lacks the lines <!-- begin: main table -->")
    assert not list(compact.glob(".report*"))


def test_a_picture_of_a_plan(command, tmp_path):
    plan = ["plan", DEMO_MODEL, "--param-ratio", "0.6"]
    done = command(*plan, "--picture", tmp_path / "ranks.png")
    assert f"picture   {tmp_path / 'ranks.png'}" in done.stdout
    assert (tmp_path / "ranks.png").read_bytes().startswith(PNG)
    done = command(*plan, "--picture", tmp_path / "ranks.svg", "--json")
    assert json.loads(done.stdout)["linears"]
    assert "</svg>" in (tmp_path / "ranks.svg").read_text()
    assert_refused(
        command(*plan, "--picture", tmp_path / "ranks.jpg"),
        "has no supported file extension; use one of .png, .svg, .pdf",
    )
    assert_refused(command(*plan, "--picture", tmp_path / "no" / "ranks.png"), "in a folder that exists")


def test_without_matplotlib(command, compact, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(command("report", compact), 'pip install "lowrank-ft[plot]"')
    assert_refused(command("plan", DEMO_MODEL, "--rank", "8", "--picture", "x.png"), 'pip install "lowrank-ft[plot]"')


def test_scores_of_tasks_are_in_the_header_of_the_card(command, compact, tmp_path):
    score = {"value": 0.5, "stderr": 0.1, "items": 10, "items_in_all": 10, "majority": None, "chance": None}
    numbers = {
        "model": {"name": "c", "tasks": {"arc_easy": {"acc": score, "acc_norm": {**score, "value": 0.4}}}},
        "baseline": {"name": "d", "tasks": {"arc_easy": {"acc": {**score, "value": 0.6}}}},
    }
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(numbers))
    assert command("report", compact, "--eval", path, "--update-card").returncode == 0
    assert command("report", compact, "--eval", path, "--update-card", "--overwrite").returncode == 0  # and not twice
    [result] = metadata_load(compact / "README.md")["model-index"][0]["results"]
    assert result["dataset"]["name"] == "arc_easy"
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"acc": 0.5, "acc_norm": 0.4, "acc, dense model": 0.6}


def test_a_card_with_a_damaged_header(command, compact):
    card = compact / "README.md"
    card.write_text(card.read_text().replace("library_name:", "library_name: [", 1))
    (compact / "eval.json").write_text(json.dumps({"model": {"perplexity": 3.0}}))
    assert_refused(command("report", compact, "--eval", compact / "eval.json", "--update-card"), "the header of")


def test_datasets_on_the_hub_are_named(compact):
    model = AutoModelForCausalLM.from_pretrained(compact)
    card = model_card(model, datasets=["me/chats", "text.txt", "also/here", "/a/path/of/mine"])
    (compact / "card.md").write_text(card)
    assert metadata_load(compact / "card.md")["datasets"] == ["me/chats", "also/here"]
    assert "vllm serve" in card
