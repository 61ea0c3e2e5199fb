"""What is printed: names from outside as they are, tables that can be searched, units that roll over."""

import subprocess
import sys

import pytest

from lowrank_ft.console import human_bytes, human_count, one_line, one_line_errors, print_table, progress_bar
from lowrank_ft.errors import ConfigError
from lowrank_ft.report.model_card import _fenced
from lowrank_ft.report.report import _command_of_card
from lowrank_ft.report.summary import cell
from lowrank_ft.training.metrics import read_metrics


@pytest.mark.parametrize("name", ["out/model[v2]", "[/bold]", "[red]x", "a[link=http://x]b", ":smile:", "\\[x]"])
def test_names_with_brackets_are_printed_as_they_are(capsys, name):
    print_table(["model", name], [[name, "1"]], title=name)
    title, header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert title.strip() == name
    assert header.split()[-1] == name
    assert row.split()[0] == name


def test_no_name_moves_the_cursor(capsys):
    print_table(["model"], [["a\x1b[2Jb\r\nc\udcff"]], title="\x1b]0;x\x07")
    out = capsys.readouterr().out
    assert r"a\x1b[2Jb\r\nc\udcff" in out
    assert "\x1b" not in out
    assert one_line(ConfigError("no \x1b[31m here\nnor there")) == r"no \x1b[31m here nor there"


def test_a_table_in_a_file_is_not_wrapped(capsys):
    path = "/".join(["a long folder"] * 30)
    print_table(["model", "x"], [[path, "1"]], title=path)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == path
    assert lines[-1].split("  ")[0] == path
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("number", "size", "count"),
    [
        (0, "0 B", "0"),
        (999.4, "999 B", "999"),
        (999.6, "1 kB", "1 k"),
        (999_400, "999 kB", "999 k"),
        (999_600, "1 MB", "1 M"),
        (999_600_000, "1 GB", "1 B"),
        (1_235_814_400, "1.24 GB", "1.24 B"),
        (5.66e6, "5.66 MB", "5.66 M"),
        (5e12, "5 TB", "5 T"),
        (1.5e18, "1,500 PB", "1,500,000 T"),
    ],
)
def test_units_roll_over(number, size, count):
    assert (human_bytes(number), human_count(number)) == (size, count)


def test_an_error_of_others_is_one_line_and_the_traceback_on_demand(capsys, monkeypatch):
    @one_line_errors
    def main():
        raise KeyError("x")

    for rank, begins in (("0", "error: KeyError: 'x' (LOWRANK_FT_DEBUG=1 "), ("1", "error: process 1: KeyError: 'x'")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        assert capsys.readouterr().err.startswith(begins)
    monkeypatch.setenv("LOWRANK_FT_DEBUG", "1")
    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize(
    ("rank", "local", "waits", "said"),
    [
        ("0", "0", 0, "error: no such rank\n"),
        ("1", "1", 5, "error: process 1: no such rank\n"),
        ("8", "0", 0, "error: process 8: no such rank\n"),  # the first one of the next machine, whose launcher it ends
    ],
)
def test_an_error_of_one_process_alone_is_seen(capsys, monkeypatch, rank, local, waits, said):
    @one_line_errors
    def main():
        raise ConfigError("no such rank")

    waited = []
    monkeypatch.setattr("lowrank_ft.console.time.sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, sum(waited), capsys.readouterr().err) == (1, waits, said)


def test_a_reader_that_leaves_is_no_error():
    code = """
from lowrank_ft.console import one_line_errors
@one_line_errors
def main():
    for i in range(100_000):
        print(i)
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert "Pipe" not in errors
    assert "error" not in errors.lower().replace("modulenotfounderror", "")


def test_a_card_says_a_name_and_nothing_more(tmp_path):
    assert cell("a|b<c>[x](y)`*&\nz") == r"a\|b&lt;c>\[x\](y)\`\*&amp; z"
    command = "lowrank-ft convert 'x\n```\n<b>'"
    (tmp_path / "README.md").write_text(f"## How it was made\n\n{_fenced(command)}\n\nmore\n")
    assert _command_of_card(tmp_path) == command
    assert _fenced("plain") == "```\nplain\n```"


@pytest.mark.parametrize("line", ["[1]", '{"step": "x"}', '{"loss": 1}', "{", "[" * 100_000, "\udcff"])
def test_metrics_end_where_they_are_damaged(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 2.5, "eval_loss": "high"}\n'
    path.write_bytes((whole + line + "\n" + whole).encode(errors="surrogateescape"))
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_a_bar_in_a_log_file_is_lines(capsys, monkeypatch):
    for i in progress_bar(range(3), desc="work"):
        assert i < 3
    assert capsys.readouterr().err == ""  # it took no minute
    monkeypatch.setattr("lowrank_ft.console._SECONDS_BETWEEN_LINES", 0)
    list(progress_bar(range(3), desc="work", progress=False))
    assert capsys.readouterr().err == ""
    list(progress_bar(range(3), desc="work"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("work: 100%")
    assert "3/3" in lines[-1]
    assert "\r" not in "".join(lines)
