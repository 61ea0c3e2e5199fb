"""What ``lowrank-ft report`` does: measure if asked to, and write the page."""

import argparse
from pathlib import Path

from lowrank_ft_cli.options import device_of, evaluation_settings

from lowrank_ft.checkpoints.atomic import write_text
from lowrank_ft.checkpoints.folders import check_name
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.evaluation.compare import compare
from lowrank_ft.report.inspection import dense_folder, open_checkpoint
from lowrank_ft.report.model_card import card_with_table
from lowrank_ft.report.plots import require_plotting
from lowrank_ft.report.report import REPORT_FILE, build_report
from lowrank_ft.report.summary import read_evaluation


def write_report(options: argparse.Namespace) -> None:
    require_plotting()
    if options.data and options.eval:
        raise ConfigError(
            "--data runs an evaluation and --eval reads the results of an earlier one; give only one of them"
        )
    if options.update_card and not (options.data or options.eval):
        raise ConfigError("--update-card needs numbers to put into the card; add --data TEXT or --eval FILE.json")
    device = device_of(options)
    source = Source(options.checkpoint, trust_remote_code=options.trust_remote_code)
    checkpoint = open_checkpoint(source)
    output = _output(options, checkpoint.folder)
    if options.baseline:  # a wrong name is an error also where nothing has to be read from there
        Source(options.baseline, None, options.trust_remote_code).load_config()
    evaluation = read_evaluation(options.eval) if options.eval else None
    if options.update_card:
        card_with_table(checkpoint.folder, checkpoint.comparison, {"model": {}})  # finds out whether that will work
    if options.data:
        # Code of an origin that only the checkpoint names is not to be run.
        origin = None if options.trust_remote_code else dense_folder(checkpoint, None)
        dense = options.baseline or origin
        baseline = None if dense is None else Source(dense, None, options.trust_remote_code)
        evaluation = compare(source, baseline, evaluation_settings(options), device=device, progress=True)
    page = build_report(
        checkpoint, baseline=options.baseline, evaluation=evaluation, evaluated_on=options.data, device=device
    )
    write_text(output, page)
    if options.update_card and evaluation is not None:
        write_text(
            checkpoint.folder / "README.md", card_with_table(checkpoint.folder, checkpoint.comparison, evaluation)
        )
    print(output)


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
