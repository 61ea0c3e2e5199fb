"""A run is resumed from the factors and guides in its checkpoint; its dense model is not converted again."""

import shutil
from functools import partial

import pytest

import lowrank_ft
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from recipes import finetune
from tests.conftest import DEMO_MODEL


@pytest.fixture
def run(tmp_path, short_finetune):
    text = tmp_path / "plays.txt"
    text.write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 120)
    return partial(short_finetune, text)


@pytest.mark.parametrize("start", ["dense", "compact"])
def test_nothing_is_computed_again_and_every_bit_is_the_same(run, start, tmp_path, monkeypatch, capsys):
    straight = tmp_path / "straight"
    options = {"model": DEMO_MODEL, "param_ratio": 0.6}
    if start == "compact":
        options = {"model": tmp_path / "compact", "guide_bits": 4}
        model = load_model(Source(str(DEMO_MODEL)))
        lowrank_ft.convert(model, param_ratio=0.6)
        lowrank_ft.save_compact(model, tmp_path / "compact", base_model=str(DEMO_MODEL), companions_from=DEMO_MODEL)
    run(straight, **options)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(lowrank_ft, "convert", refuse)
    monkeypatch.setattr(lowrank_ft, "attach_guides", refuse)
    monkeypatch.setattr(finetune, "calibration_of", refuse)
    for step in (1, 3):  # with its guides, and without
        resumed = tmp_path / f"from-{step}"
        name = f"step-{step:08d}"
        shutil.copytree(straight / "checkpoints" / name, resumed / "checkpoints" / name)
        run(resumed, resume_from_checkpoint="auto", **options)
        for file in ("model.safetensors", "config.json"):
            assert (resumed / file).read_bytes() == (straight / file).read_bytes()

    with pytest.raises(SystemExit):
        run(resumed, resume_from_checkpoint="auto", **{**options, "param_ratio": 0.7})
    assert {"dense": "param_ratio 0.6 -> 0.7", "compact": "is compact already"}[start] in capsys.readouterr().err
