"""The report's parts against hand-made checkpoints and independent counts."""

import json
import shutil
import sys

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion.record import read_conversion
from lowrank_ft.costs.flops import compare
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, DataError, MissingPackageError
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import LinearPlan
from lowrank_ft.report import plots
from lowrank_ft.report.inspection import measure_linears, open_checkpoint
from lowrank_ft.report.model_card import dense_card, model_card
from lowrank_ft.report.report import build_report
from lowrank_ft.report.summary import evaluation_rows, read_evaluation
from lowrank_ft.training.metrics import read_metrics, run_figure
from tests.conftest import tiny_gpt2, tiny_llama
from tests.html_page import Page, assert_self_contained

pytest.importorskip("matplotlib")


def record(**entries):
    return {"format_version": 1, "command": "lowrank-ft convert dense --rank 8", **entries}


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    lowrank_ft.convert(model, rank=8, exclude_modules=["k_proj"])
    save_compact(model, tmp_path / "compact", base_model="me/tiny")
    return tmp_path / "compact"


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(entries)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_costs_are_those_of_the_two_models(make):
    dense = make()
    head_and_linears = sum(
        m.weight.numel() for m in dense.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    )
    model = make()
    lowrank_ft.convert(model, rank=4)
    counted = compare(model)
    assert counted.dense.parameters == sum(p.numel() for p in dense.parameters())
    assert counted.dense.multiply_adds == head_and_linears
    assert counted.compact.parameters == sum(p.numel() for p in model.parameters())
    # In the converted model, every linear left is a factor or was dense before.
    assert counted.compact.multiply_adds == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    )
    assert counted.compact.flops == 2 * counted.compact.multiply_adds


def test_guides_cost_nothing():
    plain, guided = tiny_llama(), tiny_llama()
    lowrank_ft.convert(plain, rank=8)
    lowrank_ft.convert(guided, rank=8, guide="residual")
    assert compare(guided) == compare(plain)


def test_linears_that_stay_dense_are_shown_where_others_are_factored():
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8, target_modules=r".*layers\.1\.mlp\.up_proj|.*layers\..*down_proj")
    found = {p.name: p.rank for p in compare(model).linears}
    assert found == {
        "model.layers.0.mlp.up_proj": None, "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.mlp.up_proj": 8, "model.layers.1.mlp.down_proj": 8,
    }  # fmt: skip


def test_a_bare_checkpoint_says_what_is_missing(folder):
    page = assert_self_contained(build_report(open_checkpoint(Source(str(folder)))))
    counts = [sum(p.numel() for p in m.parameters())
              for m in (tiny_llama(), AutoModelForCausalLM.from_pretrained(folder))]  # fmt: skip
    assert page.row("parameters")[:2] == [f"{n:,}" for n in counts]
    assert "No evaluation was given: add --data TEXT" in page.words
    assert "The spectra of the dense weights are not known: name the dense model with --baseline" in page.words
    assert "no metrics.jsonl here" in page.words
    assert [a["href"] for a in page.all("a")] == ["https://huggingface.co/me/tiny"]
    assert len(page.all("img")) == 1


def compare_folder(folder):
    return open_checkpoint(Source(str(folder))).comparison


def test_names_from_files_are_harmless(folder):
    evil = '<script>alert("x")</script>"><img src=https://evil.example/x onerror=alert(1)>'
    edit_config(folder, base_model=evil, base_revision="<b>main")
    entries = record(command=evil, method=evil, calibration={"source": evil, "tokens": 5}, base_model=evil)
    entries["linears"] = {evil: {"weight_error": 0.5}}
    entries["blocks"] = [{"name": f"{evil}.$\\frac$.0", "error_before": 0.2, "error_after": 0.1}]
    entries["plan"] = {"plan_version": 1, "model_parameters": 1,
                       "linears": [{"name": f"{evil}$\\frac$", "shape": [8, 8], "rank": None}]}  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps(entries))
    evaluation = {"model": {"loss": 1.0, evil: 2.0}, "baseline": {"name": evil, "loss": 2.0}}
    page = assert_self_contained(build_report(open_checkpoint(Source(str(folder))), evaluation=evaluation))
    assert page.words.count(evil) >= 5
    assert "evil.example" not in {a.get("src", "")[:30] for a in page.all("img")}


def test_a_checkpoint_may_be_called_a_script(folder):
    """The folder, the text it was measured on and the baseline; and a result in the card, which is Markdown."""
    evil = "<script>alert(1)<!-- &amp;"
    named = folder.rename(folder.with_name(evil))
    evaluation = {"model": {"loss": 1.0}, "baseline": {"name": f"{evil}b", "loss": 2.0}}
    text = build_report(open_checkpoint(Source(str(named))), evaluation=evaluation, evaluated_on=f"{evil}c")
    page = assert_self_contained(text)
    for shown in (f"{evil}: low-rank report", f"Measured on {evil}c.", f"Baseline: {evil}b."):
        assert shown in page.words
    model = tiny_llama()
    for card in (model_card(model, results={evil: evil}), dense_card(model, {evil: evil}, "command")):
        assert "<script" not in card
        assert "&lt;script>alert(1)" in card


def test_local_folders_are_not_told(folder):
    edit_config(folder, base_model="/home/somebody/models/dense")
    text = build_report(open_checkpoint(Source(str(folder))))
    assert "somebody" not in text
    assert "A low-rank version of dense" in text


def test_everything_that_is_on_record(folder):
    linears = compare_folder(folder).linears
    names = [p.name for p in linears if p.rank is not None]
    spectrum = {"spectrum": [4.0, 2.0, 1.0, 0.5], "spectrum_index": [1, 10, 20, 32]}
    errors = {n: {**spectrum, "weight_error": 0.25, "output_error": 0.125} for n in names}
    blocks = [{"name": f"model.layers.{i}", "error_before": 0.2, "error_after": 0.1} for i in range(2)]
    entries = record(method="anchored", seconds=12.5, refine_epochs=10, linears=errors, blocks=blocks,
                     calibration={"source": "/data/calibration.txt", "tokens": 65536})  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps(entries))
    steps = [{"step": 0, "event": "start"}]
    steps += [{"step": s, "loss": 5.0 - s / 10, "alpha": max(0, 1 - s / 5)} for s in range(1, 11)]
    steps += [{"step": 5, "event": "end_guidance"}, {"step": 10, "eval_loss": 4.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    evaluation = {
        "model": {"name": "compact", "loss": 2.5, "perplexity": 12.2, "tokens": 4000, "block_size": 64,
                  "tasks": {"cloze": {"acc": {"value": 0.5, "stderr": 0.1}}}},
        "baseline": {"name": "dense", "loss": 2.25, "perplexity": 9.5, "tokens": 4000,
                     "tasks": {"cloze": {"acc": {"value": 0.625, "stderr": 0.1}}}},
        "difference": {"loss": 0.25}, "agreement": {"kl": 0.0321, "top1": 0.875, "tokens": 4000},
    }  # fmt: skip
    page = assert_self_contained(build_report(open_checkpoint(Source(str(folder))), evaluation=evaluation))
    assert len(page.all("img")) == 4
    assert page.row("perplexity") == ["9.500", "12.200", "+28.4%"]
    assert page.row("loss, nats per token") == ["2.2500", "2.5000", "+0.2500"]
    assert page.row("cloze, acc") == ["0.625", "0.5", "-0.1250"]
    assert page.row("same most likely token as the baseline")[1] == "87.5%"
    assert page.row("calibration") == ["calibration.txt, 65,536 tokens"]
    assert page.row("method") == ["anchored"]
    assert page.row("seconds") == ["12.5"]
    assert "lowrank-ft convert dense --rank 8" in page.words
    up = page.row("model.layers.1.mlp.up_proj")
    kept = [4 - 2 * i / 9 for i in range(8)]
    everything = [4 - 2 * i / 9 for i in range(9)] + [2 - i / 10 for i in range(10)] + [1 - i / 24 for i in range(13)]
    energy = sum(s * s for s in kept) / sum(s * s for s in everything)
    assert up == ["48 x 32", "8", "1,536", "576", f"{energy:.1%}", "0.2500", "0.1250"]
    assert "from 4.900 to 4.000; held-out loss 4.250 to 4.250" in next(
        a["alt"] for a in page.all("img") if a["alt"].startswith("Training loss")
    )


def test_spectra_and_errors_are_read_from_the_dense_model(folder, tmp_path):
    checkpoint = open_checkpoint(Source(str(folder)))
    records = measure_linears(checkpoint, Source(str(tmp_path / "dense")))
    weight = tiny_llama().model.layers[1].mlp.up_proj.weight.detach().double()
    values = weight.svd().S
    found = records["model.layers.1.mlp.up_proj"]
    assert found.spectrum == pytest.approx(values.tolist(), rel=1e-5)
    expected = (values[8:].square().sum() / values.square().sum()).sqrt().item()
    assert found.weight_error == pytest.approx(expected, rel=1e-4)
    page = assert_self_contained(build_report(checkpoint, baseline=str(tmp_path / "dense")))
    assert len(page.all("img")) == 3
    assert (
        page.row("weights on disk")[0] == f"{(tmp_path / 'dense' / 'model.safetensors').stat().st_size / 1000:.3g} kB"
    )


def test_a_second_copy_of_the_dense_weights_does_not_count(folder, tmp_path):
    """Downloads of Mistral and Llama hold all weights twice, in ``consolidated.safetensors``, too."""
    checkpoint = open_checkpoint(Source(str(folder)))
    dense = tmp_path / "dense"
    row = Page(build_report(checkpoint, baseline=str(dense))).row("weights on disk")
    shutil.copy(dense / "model.safetensors", dense / "consolidated.safetensors")
    assert Page(build_report(checkpoint, baseline=str(dense))).row("weights on disk") == row


def test_a_baseline_that_does_not_fit(folder, tmp_path, capsys):
    tiny_llama(hidden_size=16, intermediate_size=24).save_pretrained(tmp_path / "other")
    checkpoint = open_checkpoint(Source(str(folder)))
    with pytest.raises(CheckpointError, match="other has shape .* name the dense model that it came from"):
        build_report(checkpoint, baseline=str(tmp_path / "other"))
    edit_config(folder, base_model=str(tmp_path / "other"))  # not named by the user: said, and left out
    text = build_report(open_checkpoint(Source(str(folder))))
    assert "The spectra of the dense weights are not known" in Page(text).words
    assert "other does not load or does not fit; name the dense model with --baseline MODEL" in Page(text).words
    assert str(tmp_path) not in text  # the page may be published
    assert f"{tmp_path / 'other'} has shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, ranks={"model.nothing": 4}), "gives a rank to model.nothing, which LlamaForCausalLM"),
        (lambda f: edit_config(f, ranks={"model.layers.0.mlp.up_proj": "8"}), "is a text; it must be a whole number"),
        (lambda f: edit_config(f, ranks={"model.layers.0.mlp.up_proj": 800}), "exceeds min"),
        (lambda f: edit_config(f, quant_method="awq"), "is not a compact checkpoint"),
        (lambda f: (f / "conversion.json").write_text("{"), "is no record of a conversion"),
        (lambda f: (f / "conversion.json").write_text('{"format_version": 7}'), "format_version 7, and this release"),
        (lambda f: (f / "conversion.json").write_text(json.dumps(record(linears=[1]))), "is incomplete or damaged"),
        (
            lambda f: (f / "conversion.json").write_text(json.dumps(record(plan={"linears": []}))),
            "is incomplete or damaged",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    ],
)
def test_damaged_checkpoints(folder, damage, message):
    damage(folder)
    with pytest.raises(lowrank_ft.LowRankError, match=message):
        open_checkpoint(Source(str(folder)))


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="is not a folder"):
        open_checkpoint(Source("me/some-model"))


def test_a_record_with_gaps(tmp_path):
    assert read_conversion(tmp_path) is None
    entry = {"weight_error": float("nan"), "output_error": None}
    (tmp_path / "conversion.json").write_text(json.dumps(record(linears={"a": entry}, calibration=None, blocks=None)))
    found = read_conversion(tmp_path)
    assert found is not None
    assert found.linears["a"].weight_error is None
    assert found.blocks == []
    assert found.calibration is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"model": {"loss": 1}, "baseline": []}'])
def test_evaluations_that_are_none(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError, match="lowrank-ft eval --json"):
        read_evaluation(tmp_path / "eval.json")
    with pytest.raises(DataError, match="no readable JSON"):
        read_evaluation(tmp_path / "none.json")


def test_unknown_numbers_are_shown_under_their_names():
    rows = evaluation_rows({"model": {"loss": 1.0, "new_score": {"a": 0.5}, "flag": True, "nan": float("nan")}})
    assert [tuple(r) for r in rows] == [("loss, nats per token", "", "1.0000", ""), ("new score: a", "", "0.5", "")]


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def test_rank_map_shows_ranks_and_dense_linears():
    linears = [LinearPlan(f"model.layers.{i}.{m}", (64, 64), 8 * (i + 1)) for i in range(3) for m in ("a.q", "b.up")]
    linears[3] = LinearPlan("model.layers.1.b.up", (64, 64), None)
    figure = plots.rank_map(linears)
    assert texts(figure) == ["8", "8", "16", "dense", "24", "24"]
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a\nq", "b\nup"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["0", "1", "2"]
    shares = axis.collections[0].get_array()
    assert shares[2].tolist() == [0.609375, 0.609375]  # 24 * (128 - 24) / (64 * 64)
    assert shares.mask.tolist() == [[False, False], [False, True], [False, False]]


def test_experts_share_a_column():
    linears = [LinearPlan(f"layers.{i}.experts.{e}.w1", (64, 64), 8 + e) for i in range(2) for e in range(32)]
    figure = plots.rank_map(linears)
    assert texts(figure) == ["8-39", "8-39"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["experts\nw1"]


def test_stacks_are_told_apart():
    linears = [LinearPlan(f"{s}.block.{i}.wi", (64, 64), 8) for s in ("encoder", "decoder") for i in range(2)]
    labels = [t.get_text() for t in plots.rank_map(linears).axes[0].get_yticklabels()]
    assert labels == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]


def test_the_same_ranks_give_the_same_file(tmp_path):
    linears = [LinearPlan("layers.0.q", (64, 64), 8)]
    assert plots.save_rank_map(linears, tmp_path / "a.png")
    assert plots.save_rank_map(linears, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert plots.data_uri(plots.rank_map(linears)) == plots.data_uri(plots.rank_map(linears))


def test_a_run_without_guide_or_evaluation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert run_figure(read_metrics(tmp_path / "metrics.jsonl")).axes


def test_without_matplotlib(monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r'pip install "lowrank-ft\[plot\]"'):
        build_report(open_checkpoint(Source(str(folder))))
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "rank_map.png").exists()
    assert "rank_map.png" not in (tmp_path / "plain" / "README.md").read_text()
