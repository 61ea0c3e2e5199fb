import errno
import os
import subprocess
import sys

import pytest
from accelerate import Accelerator

from lowrank_ft.checkpoints import atomic
from lowrank_ft.checkpoints.atomic import check_output_dir, take_place, whole_file, whole_folder, write_text
from lowrank_ft.checkpoints.unfinished import open_unfinished
from lowrank_ft.errors import OutputError
from lowrank_ft.training.preparation import folder_alone
from tests.conftest import ROOT


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


SINGLE = ["model.safetensors"]
SHARDS = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(("old", "new"), [(SHARDS, SINGLE), (SINGLE, SHARDS)], ids=["shards", "single"])
def test_an_export_into_a_run_leaves_no_stale_weights(tmp_path, old, new):
    fill(tmp_path, "old")
    for name in old:
        (tmp_path / name).write_text("old")
    with whole_folder(tmp_path, keep_existing=True) as draft:
        fill(draft)
        for name in new:
            (draft / name).write_text("new")
    assert listing(tmp_path) == ["config.json", *new]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_the_folder_behind_it_is_written(tmp_path, keep, exists):
    """The draft lies beside that folder, which may be on another disk."""
    behind, link = tmp_path / "disk" / "model", tmp_path / "here" / "out"
    link.parent.mkdir()
    behind.parent.mkdir()
    if exists:
        behind.mkdir()
    link.symlink_to(behind)
    with whole_folder(link, keep_existing=keep) as draft:
        assert draft.parent == behind.parent
        fill(draft)
    assert link.is_symlink()
    assert (listing(link.parent), listing(behind.parent), listing(behind)) == (["out"], ["model"], ["config.json"])


def test_a_link_to_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(OutputError, match="out is a mount point"):
        check_output_dir(tmp_path / "out")


@pytest.mark.parametrize("name", ["chats.json", "lora.safetensors", "1_notes"])
def test_what_no_checkpoint_has_is_not_overwritten(tmp_path, name):
    fill(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    check_output_dir(tmp_path, overwrite=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds {name}, and --overwrite replaces nothing but checkpoints"):
        check_output_dir(tmp_path, overwrite=True)


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


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """A process is killed while it writes; the hidden folder is all that is left, and the next run takes it away."""
    code = (
        "import os, signal, sys\n"
        "from lowrank_ft.checkpoints.atomic import whole_folder\n"
        "with whole_folder(sys.argv[1]) as draft:\n"
        "    (draft / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, cwd=ROOT)
    assert any(name.endswith(".partial") for name in listing(tmp_path))
    with whole_folder(tmp_path / "out") as draft:
        fill(draft)
    assert listing(tmp_path) == ["out"]


def test_two_commands_on_one_folder(tmp_path):
    with whole_folder(tmp_path / "out") as draft:
        fill(draft)
        with pytest.raises(OutputError, match="another command is writing"), whole_folder(tmp_path / "out"):
            pass
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("swaps", [True, False])
def test_one_of_the_two_folders_is_there_at_every_moment(tmp_path, monkeypatch, swaps):
    """Whatever the process is doing when it is killed: the old folder, the new one, or a way back to the old one."""
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    seen = []
    stock = os.replace

    def replace(*arguments):
        stock(*arguments)
        seen.append(out.exists())
        raise KeyboardInterrupt  # as early as can be after a rename

    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up after a kill
    try:
        with whole_folder(out, overwrite=True) as draft:
            fill(draft)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert seen == ([] if swaps else [False])
    check_output_dir(out, overwrite=True)
    assert (out / "config.json").read_text() in ("old", "new")


def test_a_folder_that_was_put_aside_comes_back(tmp_path, capsys):
    aside = tmp_path / ".out.abcd_123.replaced"
    (aside / "old").mkdir(parents=True)
    fill(aside / "old", "old")
    check_output_dir(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert "was restored; a command that was killed had moved it" in capsys.readouterr().err
    assert listing(tmp_path) == ["out"]


def test_hidden_folders_of_a_longer_name_are_left_alone(tmp_path):
    """`out.v2` is being written by another process, and another that wrote it was killed while it replaced the old one."""
    with whole_folder(tmp_path / "out.v2") as other:
        fill(other)
        with whole_folder(tmp_path / "out") as draft:
            fill(draft, "mine")
        assert (other / "config.json").is_file()
    assert listing(tmp_path) == ["out", "out.v2"]
    aside = tmp_path / ".new.v2.abcd_123.replaced"
    (aside / "old").mkdir(parents=True)
    check_output_dir(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert (aside / "old").is_dir()


def test_everything_is_on_the_disk_before_it_is_announced(tmp_path, monkeypatch):
    events = []
    stock_sync, stock_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), stock_sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), stock_replace(*a))[1])
    with whole_folder(tmp_path / "out") as draft:
        fill(draft)
    assert events == ["sync", "sync", "rename", "sync", "sync"]


def test_a_file_alone_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    stock_sync, stock_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), stock_sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), stock_replace(*a))[1])
    (tmp_path / "page.html").write_text("old")
    write_text(tmp_path / "page.html", "né")
    assert events == ["sync", "rename", "sync"]
    assert (tmp_path / "page.html").read_bytes() == "né".encode()
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert listing(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_file_alone_is_whole_or_as_it_was(tmp_path, error):
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(type(error)), whole_file(tmp_path / "page.html") as draft:
        draft.write_text("half")
        raise error
    assert (tmp_path / "page.html").read_text() == "old"
    assert listing(tmp_path) == ["page.html"]


def test_a_file_that_the_disk_does_not_hold(tmp_path):
    """No file may grow beyond a kilobyte."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from lowrank_ft.checkpoints.atomic import write_text; from lowrank_ft.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(sys.argv[1], 'x' * 100_000)\n"
        "except OutputError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    expected = f"writing {tmp_path / 'page.html'} failed (File too large); free some space, or choose another place\n"
    assert done.stdout == expected, done.stderr
    assert listing(tmp_path) == []


@pytest.mark.parametrize("swaps", [True, False])
def test_a_finished_folder_takes_the_place_of_another(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for name in ("draft", "out"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    take_place(tmp_path / "draft", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "draft"
    assert set(listing(tmp_path)) <= {"out", "draft"}


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lost+found").mkdir()
    with pytest.raises(
        OutputError, match=f"out is a mount point, .*; name a folder inside it, such as {tmp_path}/out/model"
    ):
        check_output_dir(tmp_path / "out")
    check_output_dir(tmp_path / "out" / "model")


def test_a_folder_in_one_that_may_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(OutputError, match=f"out cannot be replaced: no permission in {tmp_path}, where"):
        check_output_dir(tmp_path / "out")
    check_output_dir(tmp_path / "out" / "model")


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_the_system_does_not_move_is_named(tmp_path, monkeypatch, code, keep):
    """Found out at the end, such as where a folder became a mount point meanwhile."""
    out, stock = tmp_path / "out", os.replace
    out.mkdir()

    def replace(source, target):
        if out in (source, target) or target.parent == out:
            raise OSError(code, os.strerror(code))
        stock(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", replace)
    with (
        pytest.raises(OutputError, match="out cannot get its new content .*it is a mount point"),
        whole_folder(out, keep_existing=keep) as draft,
    ):
        fill(draft)
    assert listing(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made: .*file is no folder"):
        check_output_dir(tmp_path / "file" / "out")


def test_what_stands_beside_a_folder_is_the_same_for_all_of_its_names(tmp_path):
    """Of a link and what it points to: one lock of a run, and one folder of an unfinished conversion, on the same disk."""
    behind, link = tmp_path / "disk" / "model", tmp_path / "out"
    behind.mkdir(parents=True)
    link.symlink_to(behind)
    with open_unfinished(link) as unfinished:
        assert unfinished.folder.parent == behind.parent
        with pytest.raises(OutputError, match="another command is converting"), open_unfinished(behind):
            pass
    alone = Accelerator(cpu=True)
    busy = pytest.raises(OutputError, match="another run is training into")
    with folder_alone(link, alone), busy, folder_alone(behind, alone):
        pass
    assert listing(tmp_path) == ["disk", "out"]
