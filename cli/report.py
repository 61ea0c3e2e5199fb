"""``lowrank-ft report``: one HTML page about a compact checkpoint."""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from lowrank_ft_cli.options import device_of

from lowrank_ft.checkpoints.atomic import open_permissions
from lowrank_ft.checkpoints.folders import check_name
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.report.inspection import dense_folder, open_checkpoint
from lowrank_ft.report.model_card import card_with_table
from lowrank_ft.report.plots import require_plotting
from lowrank_ft.report.report import REPORT_FILE, build_report
from lowrank_ft.report.summary import Evaluation, read_evaluation


def run(options: argparse.Namespace) -> None:
    require_plotting()
    if options.data and options.eval:
        raise ConfigError("--data measures anew and --eval reads what was measured; give one of them")
    if options.update_card and not (options.data or options.eval):
        raise ConfigError("--update-card needs numbers to put into the card; add --data TEXT or --eval FILE.json")
    device = device_of(options)
    checkpoint = open_checkpoint(Source(options.checkpoint, trust_remote_code=options.trust_remote_code))
    output = _output(options, checkpoint.folder)
    if options.baseline:  # a wrong name is an error also where nothing has to be read from there
        Source(options.baseline, None, options.trust_remote_code).load_config()
    evaluation = read_evaluation(options.eval) if options.eval else None
    if options.update_card:
        card_with_table(checkpoint.folder, checkpoint.comparison, {"model": {}})  # finds out whether that will work
    if options.data:
        # Code of an origin that only the checkpoint names is not to be run.
        origin = None if options.trust_remote_code else dense_folder(checkpoint, None)
        evaluation = _evaluate(options, options.baseline or origin)
    page = build_report(
        checkpoint, baseline=options.baseline, evaluation=evaluation, evaluated_on=options.data, device=device
    )
    _write(output, page)
    if options.update_card and evaluation is not None:
        _write(checkpoint.folder / "README.md", card_with_table(checkpoint.folder, checkpoint.comparison, evaluation))
    print(output)


def _evaluate(options: argparse.Namespace, baseline: str | None) -> Evaluation:
    """What ``lowrank-ft eval --json`` prints; its command line is what is promised to stay."""
    from lowrank_ft_cli import evaluate
    from lowrank_ft_cli.main import build_parser

    given = {
        "--data": options.data, "--data-split": options.data_split, "--data-config": options.data_config,
        "--text-column": options.text_column, "--block-size": options.block_size, "--batch-size": options.batch_size,
        "--baseline": baseline, "--device": options.device,
    }  # fmt: skip
    arguments = ["eval", options.checkpoint, "--json"]
    arguments += [f"{flag}={value}" for flag, value in given.items() if value is not None]
    arguments += ["--trust-remote-code"] if options.trust_remote_code else []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate.run(build_parser().parse_args(arguments))
    result: Evaluation = json.loads(printed.getvalue())
    return result


def _output(options: argparse.Namespace, folder: Path) -> Path:
    """Where the page goes; only the report of the checkpoint itself is replaced unasked."""
    if options.output is None:
        return folder / REPORT_FILE
    path = Path(options.output)
    check_name(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"--output {path} cannot be written; name a file in a folder that exists")
    if path.exists() and not options.overwrite:
        raise OutputError(f"--output {path} exists; name another file, or add --overwrite to replace it")
    return path


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            draft = Path(file.name)
            file.write(text)
        open_permissions(draft)
        os.replace(draft, path)
    except OSError as error:
        raise OutputError(f"writing {path} failed ({error.strerror}); choose another place with --output") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
