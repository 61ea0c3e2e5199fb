"""One HTML page about a compact checkpoint: size, ranks, spectra, errors, training, evaluation, command.

Every part but the size is optional, and where one is missing the page says how to get it. Here is what stands on it;
``templates/report.html`` is how, and escapes whatever comes out of a checkpoint's files.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowrank_ft.checkpoints.files import weight_bytes
from lowrank_ft.checkpoints.names import is_hub_id, local_folder
from lowrank_ft.console import human_bytes, human_count
from lowrank_ft.conversion.record import ConversionRecord, LinearRecord
from lowrank_ft.errors import CheckpointError
from lowrank_ft.factorization.plan import LinearPlan, shape_text
from lowrank_ft.report import plots
from lowrank_ft.report.inspection import Checkpoint, dense_folder, linear_records
from lowrank_ft.report.page import Missing, Picture, render
from lowrank_ft.report.summary import FLOPS_NOTE, Results, Row, change, evaluation_rows, side_by_side, size_rows
from lowrank_ft.training.metrics import METRICS_FILE, read_metrics, run_figure

REPORT_FILE = "report.html"
_COLUMNS = (
    "linear", "out x in", "rank", "parameters", "after", "energy kept", "weight error", "output error",
)  # fmt: skip


def build_report(
    checkpoint: Checkpoint,
    *,
    baseline: str | None = None,
    evaluation: Results | None = None,
    evaluated_on: str | None = None,
    device: str = "cpu",
) -> str:
    """The page.

    Args:
        baseline: folder or name of the dense model; its weights are read for spectra where no record has them.
        evaluation: what ``lowrank-ft eval --json`` prints.
        evaluated_on: what the numbers were measured on, for the caption.
        device: where singular values are computed.

    Raises:
        MissingPackageError: matplotlib is not installed.
        LowRankError: ``baseline`` was named and does not fit.
    """
    plots.require_plotting()
    records, at, missing = linear_records(checkpoint, baseline, device)
    conversion = checkpoint.conversion or ConversionRecord()
    rows = [*size_rows(checkpoint.comparison), _disk_row(checkpoint, baseline)]
    return render(
        "report.html",
        title=_file_name(checkpoint.folder.resolve().name),
        origin=_origin(checkpoint),
        factored=sum(p.rank is not None for p in checkpoint.comparison.linears),
        tiles=_tiles(checkpoint, rows, evaluation),
        sizes=rows,
        flops_note=FLOPS_NOTE,
        evaluation=evaluation_rows(evaluation),
        evaluated=_evaluated(evaluation, evaluated_on) if evaluation else "",
        replies=side_by_side(evaluation),
        pictures=[
            ("Ranks", _ranks(checkpoint.linears)),
            ("Spectra", _spectra(checkpoint, records, missing)),
            ("Error of every linear", _errors(checkpoint, records, conversion, at, missing)),
            ("Training", _training(checkpoint.folder)),
        ],
        command=conversion.command or _command_of_card(checkpoint.folder),
        settings=_settings(conversion),
        columns=_COLUMNS,
        linears=[_cells(checkpoint, p, records.get(p.name, LinearRecord())) for p in checkpoint.linears],
    )


def _disk_row(checkpoint: Checkpoint, baseline: str | None) -> Row:
    after = weight_bytes(checkpoint.folder)
    dense = dense_folder(checkpoint, baseline)
    folder = local_folder(dense) if dense else None
    before = 0.0
    if folder is not None:
        with suppress(CheckpointError):  # an origin may lie there without its weights
            before = float(weight_bytes(folder))
    if before:
        return Row("weights on disk", human_bytes(before), human_bytes(after), change(before, after))
    counts = checkpoint.comparison
    before = after * counts.dense.parameters / max(1, counts.compact.parameters)
    return Row("weights on disk", f"about {human_bytes(before)}", human_bytes(after), change(before, after))


# Parts of the page, as plain data.


def _origin(checkpoint: Checkpoint) -> dict[str, str]:
    base = checkpoint.base_model or ""
    on_hub = is_hub_id(base)
    return {
        "name": base if on_hub else _file_name(base),
        "url": f"https://huggingface.co/{base}" if on_hub else "",
        "revision": str(checkpoint.revision or "")[:12],
    }


def _tiles(checkpoint: Checkpoint, rows: Sequence[Row], evaluation: Results | None) -> list[Row]:
    perplexity = next((r for r in evaluation_rows(evaluation) if r.name == "perplexity"), None)
    by_name = {r.name: r for r in rows}
    counts = checkpoint.comparison
    parameters = by_name["parameters"]._replace(
        dense=human_count(counts.dense.parameters), compact=human_count(counts.compact.parameters)
    )
    return [parameters, by_name["FLOPs per token"], by_name["weights on disk"], *([perplexity] if perplexity else [])]


def _evaluated(evaluation: Results, evaluated_on: str | None) -> str:
    """On what, and against what."""
    mine, base = evaluation["model"], evaluation.get("baseline") or {}
    facts = [f"{label} {mine[k]:,}" for k, label in (("tokens", "predicted tokens"), ("block_size", "context of"),
                                                    ("stride", "stride")) if isinstance(mine.get(k), int)]  # fmt: skip
    on = [f"Measured on {_file_name(evaluated_on)}."] if evaluated_on else []
    against = [f"Baseline: {_file_name(str(base['name']))}."] if base.get("name") else ["No baseline was measured."]
    return " ".join([*on, *against, *([f"{'; '.join(facts)}.".capitalize()] if facts else [])])


def _ranks(linears: Sequence[LinearPlan]) -> Picture | Missing:
    ranked = [p for p in linears if p.rank is not None]
    if not ranked:
        return Missing("No linear is factored")
    low, high = (f([p.rank for p in ranked if p.rank is not None]) for f in (min, max))
    dense = len(linears) - len(ranked)
    alt = (
        f"Heat map of ranks by block and module: {len(ranked)} factored linears, ranks {low} to {high}, {dense} dense."
    )
    caption = (
        "Colour is the share of the dense parameters that a linear keeps at its rank. "
        f"{len(ranked)} linears are factored" + (f", {dense} stay dense (grey)." if dense else ".")
    )
    return _picture(plots.rank_map(linears), alt, caption)


def _spectra(checkpoint: Checkpoint, records: Mapping[str, LinearRecord], missing: str) -> Picture | Missing:
    drawn = [p for p in checkpoint.linears if p.name in records and len(records[p.name].spectrum) > 1]
    if not drawn:
        return Missing("The spectra of the dense weights are not known", missing)
    figure, left_out = plots.spectra(drawn, records)
    alt = f"Singular values of {len(drawn)} dense weights, one panel per module, with a dot where the rank cuts."
    more = f" {left_out} more modules are not drawn." if left_out else ""
    return _picture(figure, alt, "Singular values of the dense weights, relative to the largest. What lies right of "
                                 f"the dot is dropped by the factorization.{more}")  # fmt: skip


def _errors(
    checkpoint: Checkpoint, records: Mapping[str, LinearRecord], conversion: ConversionRecord, at: str, missing: str
) -> Picture | Missing:
    measured = [r for r in records.values() if r.weight_error is not None or r.output_error is not None]
    if not measured and not conversion.blocks:
        return Missing("The errors of the linears are not known", missing)
    known = {n: r for n, r in records.items() if r.weight_error is not None or r.output_error is not None}
    figure = plots.errors(checkpoint.linears, known, conversion.blocks)
    worst = max(((r.weight_error or 0.0, n) for n, r in known.items()), default=(0.0, ""))
    alt = f"Relative error of {len(known)} linears by block."
    if worst[1]:
        alt += f" The largest weight error is {worst[0]:.3f}, at {worst[1]}."
    caption = f"Error of the weight {at}." if at else "Error of the weight."
    if any(r.output_error is not None for r in known.values()):
        caption += " Error of the output on calibration tokens, when the model was converted."
    return _picture(figure, alt, caption)


def _training(folder: Path) -> Picture | Missing:
    entries = [e for e in read_metrics(folder / METRICS_FILE) if isinstance(e, dict) and "step" in e]
    train = [e for e in entries if "loss" in e]
    if not train:
        return Missing(
            f"There is no {METRICS_FILE} here", "it is written by lowrank-ft finetune; report on the folder of the run"
        )
    held_out = [e["eval_loss"] for e in entries if "eval_loss" in e]
    alt = f"Training loss over {train[-1]['step']} steps, from {train[0]['loss']:.3f} to {train[-1]['loss']:.3f}"
    alt += f"; held-out loss {held_out[0]:.3f} to {held_out[-1]:.3f}." if held_out else "."
    return _picture(run_figure(entries), alt, "Loss, and alpha, the share of the dense guide.")


def _picture(figure: Any, alt: str, caption: str) -> Picture:
    return Picture(plots.data_uri(figure), alt, caption)


def _settings(conversion: ConversionRecord) -> dict[str, str]:
    facts: dict[str, str] = {k.replace("_", " "): f"{v:g}" if isinstance(v, float) else str(v)
                             for k, v in conversion.facts.items()}  # fmt: skip
    if conversion.calibration:
        tokens = conversion.calibration.get("tokens")
        source = _file_name(str(conversion.calibration.get("source") or "text"))
        facts["calibration"] = f"{source}, {tokens:,} tokens" if isinstance(tokens, int) else source
    return facts


def _command_of_card(folder: Path) -> str | None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^## How it was made\n+(`{3,})\n(.+?)\n\1$", text, re.MULTILINE | re.DOTALL)
    return found[2] if found else None


def _cells(checkpoint: Checkpoint, p: LinearPlan, record: LinearRecord) -> tuple[str, ...]:
    """One row, see ``_COLUMNS``."""
    energy = _energy_kept(record, p)
    return (
        p.name, shape_text(p), "dense" if p.rank is None else str(p.rank),
        f"{p.dense_parameters:,}", f"{checkpoint.comparison.numbers.get(p.name, p.dense_parameters):,}",
        "" if energy is None else f"{energy:.1%}", _error_text(record.weight_error), _error_text(record.output_error),
    )  # fmt: skip


def _energy_kept(record: LinearRecord, p: LinearPlan) -> float | None:
    """Share of the squared singular values that the rank keeps; a thinned spectrum is filled in between its values."""
    if len(record.spectrum) < 2 or p.rank is None:
        return None
    import numpy as np

    squares = np.interp(range(1, min(p.shape) + 1), record.spectrum_index, record.spectrum) ** 2
    return float(squares[: p.rank].sum() / squares.sum()) if squares.sum() > 0 else None


def _error_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _file_name(text: str) -> str:
    """A name as it may be shown to others: of a local path, the last part."""
    return Path(text).name if Path(text).is_absolute() or text.startswith("~") else text
