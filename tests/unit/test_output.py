import errno
import os

import pytest

from lowrank_ft.checkpoints.atomic import check_output_dir, whole_folder
from lowrank_ft.errors import OutputError


def fill(folder, text="new"):
    (folder / "config.json").write_text(text)


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def listing(path):
    return sorted(p.name for p in path.iterdir())


def test_it_appears_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as draft:
        fill(draft)
        assert not (tmp_path / "a" / "out").exists()
    assert listing(tmp_path / "a" / "out") == ["config.json"]
    assert (tmp_path / "a" / "out" / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert listing(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_or_not_at_all(tmp_path, error):
    fill(tmp_path, "old")
    with pytest.raises((RuntimeError, KeyboardInterrupt, OutputError)), whole_folder(tmp_path / "out") as draft:
        fill(draft)
        raise error
    assert listing(tmp_path) == ["config.json"]


def test_a_full_disk_says_what_to_do(tmp_path):
    with pytest.raises(OutputError, match="GiB are free there. Nothing was left behind"), whole_folder(tmp_path / "o"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_overwriting_replaces_all_or_keeps_all(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    (out / "model.safetensors").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(out, overwrite=True):
        raise RuntimeError
    assert listing(out) == ["config.json", "model.safetensors"]
    with whole_folder(out, overwrite=True) as draft:
        fill(draft)
    assert listing(out) == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert listing(tmp_path) == ["out"]


def test_keeping_existing_files_of_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x")
    fill(tmp_path, "old")
    with whole_folder(tmp_path, keep_existing=True) as draft:
        fill(draft)
        (draft / "model.safetensors").write_text("w")
    assert listing(tmp_path) == ["config.json", "metrics.jsonl", "model.safetensors"]
    assert (tmp_path / "config.json").read_text() == "new"


def test_an_export_into_a_run_leaves_no_stale_weights(tmp_path):
    fill(tmp_path, "old")
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("old")
    with whole_folder(tmp_path, keep_existing=True) as draft:
        fill(draft)
        (draft / "model.safetensors").write_text("new")
    assert listing(tmp_path) == ["config.json", "model.safetensors"]


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output_dir(tmp_path / "file")
    with pytest.raises(OutputError, match="is not empty; name another folder, or add --overwrite"):
        check_output_dir(tmp_path)
    fill(tmp_path)
    with pytest.raises(OutputError, match="holds file, and --overwrite replaces nothing but checkpoints"):
        check_output_dir(tmp_path, overwrite=True)
    (tmp_path / "file").unlink()
    check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="holds the source"):
        check_output_dir(tmp_path, overwrite=True, keep=tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"has no config\.json"):
        check_output_dir(tmp_path, overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the folder that you are in"):
        check_output_dir(".")
