"""Fine-tuning that is killed, or whose disk is full: what is left is no result, and the next sentence works."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys

import pytest
from lowrank_ft_recipes import finetune
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.training.metrics import MetricsLog, read_metrics
from tests.reliability.materials import SHORT, make_dense

OLD = "weights of the earlier run"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("inputs") / "given")


@pytest.fixture
def recipe(inputs, tmp_path, monkeypatch, capfd, fresh_accelerate):
    """The recipe in a forked process, into ``run``; returns its exit code and the last line of stderr."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    fixed = {**SHORT, "model": inputs / "dense", "dataset": inputs / "text.jsonl", "rank": 4, "output_dir": "run"}

    def run(*flags, at_record=None, do=None, **options):
        def start():
            os.chdir(tmp_path)
            write = MetricsLog.write

            def hooked(self, **entry):
                write(self, **entry)
                if entry["step"] == at_record:
                    do()

            MetricsLog.write = hooked
            sys.argv = [
                "finetune.py",
                *(f"--{k}={v}" for k, v in {**fixed, **options}.items() if v is not None),
                *flags,
            ]
            finetune.main()

        capfd.readouterr()
        process = multiprocessing.get_context("fork").Process(target=start)
        process.start()
        process.join()
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return process.exitcode, errors[-1] if errors else ""

    return run


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """From now on no file can grow beyond what a record needs."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_a_killed_run_over_an_earlier_one_leaves_nothing_that_looks_whole(recipe, tmp_path):
    out = tmp_path / "run"
    assert recipe()[0] == 0
    (out / "chat_template.jinja").write_text(OLD)
    (out / "mine.txt").write_text("x")
    assert recipe("--overwrite-output-dir", at_record=0, do=kill)[0] == -signal.SIGKILL
    assert not (out / "config.json").exists()
    assert not list(out.glob("model*"))
    assert not (out / "chat_template.jinja").exists()  # the model of this run has none
    assert (out / "mine.txt").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_run_that_was_killed_before_its_first_checkpoint_says_what_works(recipe):
    assert recipe(at_record=1, do=kill)[0] == -signal.SIGKILL
    code, error = recipe()
    assert (code, "holds an earlier run without a checkpoint; add --overwrite-output-dir to start anew" in error) == (
        1,
        True,
    )
    assert "resume" not in error
    assert recipe("--resume-from-checkpoint=auto")[0] == 0  # a job that is queued again has one command line
    # With checkpoints, it is the other advice.
    assert "add --resume-from-checkpoint auto to resume it" in recipe()[1]


def test_a_second_run_does_not_touch_the_folder_of_one_that_is_running(recipe, tmp_path):
    """Whatever it was asked to do with the folder; and a run that was killed is in nobody's way."""
    assert recipe(at_record=1, do=kill)[0] == -signal.SIGKILL
    assert (tmp_path / ".run.lock-run").exists()
    codes, out = multiprocessing.get_context("fork").Queue(), tmp_path / "run"

    def start_others():
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        for flags in ([], ["--overwrite-output-dir"], ["--resume-from-checkpoint=auto"]):
            sys.argv += flags
            other = multiprocessing.get_context("fork").Process(target=finetune.main)
            other.start()
            other.join()
            codes.put(other.exitcode)
        codes.put({p: p.stat().st_mtime_ns for p in out.rglob("*")} == before)

    code, error = recipe("--resume-from-checkpoint=auto", at_record=3, do=start_others)
    assert code == 0
    assert error == ("error: another run is training into run; wait for it or end it, or name another --output-dir")
    assert [codes.get(timeout=9) for _ in range(4)] == [1, 1, 1, True]
    assert [e["step"] for e in read_metrics(out / "metrics.jsonl") if "loss" in e] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_says_which_checkpoint_is_whole_and_going_on_works(recipe, tmp_path):
    code, error = recipe(at_record=3, do=fill_disk)
    assert code == 1
    assert (
        "checkpoints/step-00000002 is whole: free some space, then resume with --resume-from-checkpoint auto" in error
    )
    assert "File too large" in error
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best", "step-00000002"]
    assert recipe("--resume-from-checkpoint=auto")[0] == 0

    code, error = recipe(at_record=1, do=fill_disk, output_dir="other")
    assert (code, "start anew with --overwrite-output-dir" in error) == (1, True)


def test_a_run_does_not_start_from_what_it_would_remove(recipe, tmp_path):
    assert recipe()[0] == 0
    code, error = recipe("--overwrite-output-dir", model=str(tmp_path / "run"))
    assert (code, "which is in --output-dir run and would be replaced" in error) == (1, True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_does_not_remove_the_model_that_guides_it(recipe, inputs, tmp_path):
    """Neither where the user names it nor where the compact checkpoint does, nor where it is nobody's run."""
    dense = tmp_path / "mine"
    shutil.copytree(inputs / "dense", dense)
    (dense / "metrics.jsonl").write_text("")  # as a training from scratch leaves it
    code, error = recipe("--overwrite-output-dir", guide_model=str(dense), output_dir="mine")
    assert (code, f"the run reads {dense}, which is in --output-dir mine and would be replaced" in error) == (1, True)

    compact = tmp_path / "compact"
    model = AutoModelForCausalLM.from_pretrained(dense)
    lowrank_ft.convert(model, rank=4)
    lowrank_ft.save_compact(model, compact, companions_from=dense, base_model="mine")
    code, error = recipe("--overwrite-output-dir", model=str(compact), rank=None, output_dir="mine")
    assert (code, "the run reads mine, which is in --output-dir mine and would be replaced" in error) == (1, True)

    (dense / "metrics.jsonl").unlink()
    code, error = recipe("--overwrite-output-dir", output_dir="mine")
    assert (code, "replaces nothing but runs and compact checkpoints; name another" in error) == (1, True)
    assert (dense / "config.json").exists()
    assert (dense / "model.safetensors").exists()
