"""What the name of a model may mean, and what is said where it means nothing."""

import pytest

from lowrank_ft.checkpoints.companions import COMPANIONS, matches
from lowrank_ft.checkpoints.names import check_model_name, local_folder
from lowrank_ft.checkpoints.source import _DATA_FILES, Source
from lowrank_ft.errors import CheckpointNotFoundError


def test_a_hub_id_may_begin_like_a_folder_here(tmp_path, monkeypatch):
    """transformers takes `google/gemma-2b` from the Hub where there is a folder `google`."""
    (tmp_path / "google" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert check_model_name("google/gemma-2b") is None
    with pytest.raises(CheckpointNotFoundError, match=r"google/other has no config\.json"):
        check_model_name("google/other")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("out/compct", r" \(the folder out has no compct; did you mean out/compact\?\)"), ("out/x", r" \(the folder out has no x\)"),
     ("in/compact", "")],
)  # fmt: skip
def test_a_misspelt_folder_is_told_apart_from_a_model_that_the_hub_lacks(tmp_path, monkeypatch, name, hint):
    (tmp_path / "out" / "compact").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointNotFoundError, match=f"^{name} is no folder here, and the Hub cannot be reached{hint};"
    ):
        Source(name).load_config()


def test_a_misspelt_path_is_told_what_it_may_have_meant(tmp_path):
    (tmp_path / "compact").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=f"did you mean {tmp_path}/compact\\?\\); check the path"):
        check_model_name(f"{tmp_path}/compac")


def test_the_home_of_nobody():
    assert local_folder("~nosuchuser/model") is None
    with pytest.raises(CheckpointNotFoundError, match="there is no folder ~nosuchuser/model; check the path"):
        check_model_name("~nosuchuser/model")


def test_a_misspelt_path_is_refused_before_an_adapter_is_looked_for():
    with pytest.raises(CheckpointNotFoundError, match="there is no folder out/run/compact; check the path"):
        Source("out/run/compact").check_adapter()


def test_all_that_is_copied_beside_weights_is_downloaded():
    assert [p for p in COMPANIONS if not matches(p.replace("*", "x"), _DATA_FILES)] == []
