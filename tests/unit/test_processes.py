"""What several processes share, as far as one process can show it; tests/distributed/test_convert.py runs two."""

import pytest
import torch

from lowrank_ft.conversion.batches import to_batches
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.processes import ONE, Processes, joined
from lowrank_ft.errors import ConfigError
from tests.conftest import DEMO_MODEL


def batch(rows):
    return {"input_ids": torch.arange(4 * rows).view(rows, 4), "attention_mask": torch.ones(rows, 4)}


def test_rows_of_all_processes_are_the_batch():
    parts = [Processes(rank, 3).rows(batch(8)) for rank in range(3)]
    assert [len(p["input_ids"]) for p in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), batch(8)["input_ids"])


def test_a_calibration_shows_a_process_its_rows():
    batches = [batch(2), batch(4)]
    calibration = Calibration(batches, held_out=[batch(2)], fit_tokens=8, processes=Processes(1, 2))
    assert calibration.tokens == 24  # of all
    assert [len(b["input_ids"]) for b in calibration.fitted] == [1]
    assert [len(b["input_ids"]) for b in calibration.distilled] == [1, 2]
    assert [len(b["input_ids"]) for b in calibration.judging] == [1]
    assert torch.equal(calibration.fitted[0]["input_ids"], batches[0]["input_ids"][1:])


def test_a_batch_with_too_few_rows_is_refused():
    with pytest.raises(ConfigError, match="a batch of 2 rows cannot be dealt to 3 processes; start at most 2"):
        Calibration([batch(4), batch(2)], processes=Processes(0, 3))


def test_images_of_texts_are_refused():
    mixed = {"input_ids": torch.zeros(2, 4), "pixel_values": torch.zeros(3, 3, 8, 8)}
    with pytest.raises(ConfigError, match=r"input_ids, pixel_values with \[2, 3\] rows cannot be dealt to 2 processes"):
        Processes(0, 2).rows(mixed)


@pytest.mark.parametrize("blocks", [3, 8, 9, 17])
def test_packed_batches_have_a_row_for_each_process(blocks):
    batches = to_batches(torch.arange(blocks)[:, None].expand(blocks, 512), least=8)
    assert torch.cat([b["input_ids"] for b in batches])[:, 0].tolist() == list(range(blocks))
    assert all(len(b["input_ids"]) >= min(blocks, 8) for b in batches)


def test_alone_there_is_nothing_to_send():
    with joined("cpu") as processes:
        assert processes is ONE
    value = torch.ones(2)
    processes.add_up(value)
    assert value.tolist() == [1, 1]
    assert processes.total(3.5) == 3.5
    assert processes.collect("a") == ["a"]
    assert list(processes.deal(["a", "b"], lambda n: (torch.full((1,), ord(n)),)))[1] == ("b", (torch.tensor([98]),))


def end(seconds):
    raise KeyboardInterrupt  # what the launcher's signal becomes in a command


@pytest.mark.parametrize(
    ("rank", "waits", "said"),
    [("0", end, "error: "), ("1", end, ""), ("1", lambda seconds: None, "error: process 1: ")],
)
def test_what_is_wrong_with_the_command_is_said_by_the_main_process(
    command, monkeypatch, tmp_path, rank, waits, said
):  # fmt: skip
    """Another one says it where nobody ends it, for then it is wrong there alone."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lowrank_ft.console.time.sleep", waits)
    flags = ["--rank", "8", "--param-ratio", "0.5", "--output-dir", tmp_path / "out"]
    done = command("convert", DEMO_MODEL, *flags)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == bool(said)
    assert said in done.stderr
