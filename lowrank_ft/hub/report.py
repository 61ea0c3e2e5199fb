"""One HTML page about a compact checkpoint: size, ranks, spectra, errors, training, evaluation, command.

The page needs nothing but itself: its style is inside, its pictures are data, and it has no scripts. Every part but
the size is optional, and where one is missing the page says how to get it. Whatever comes out of a checkpoint's files
passes through :func:`html.escape`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lowrank_ft.calibration.record import relative_errors, thinned_spectrum
from lowrank_ft.console import human_bytes, human_count
from lowrank_ft.cost import Comparison, compare
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, LowRankError
from lowrank_ft.hub import pictures
from lowrank_ft.hub.source import Source, is_compact, is_hub_id, load_model, safetensors_files, skeleton
from lowrank_ft.hub.summary import FLOPS_NOTE, Evaluation, Row, change, evaluation_rows, size_rows
from lowrank_ft.nn import LowRankLinear, lowrank_layers
from lowrank_ft.nn.replace import dense_weight, swap
from lowrank_ft.plan import LinearPlan
from lowrank_ft.ranks import break_even_rank, resolve_rank
from lowrank_ft.records import METRICS_FILE, ConversionRecord, LinearRecord, read_conversion, read_metrics, run_figure
from lowrank_ft.targets import is_linear

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Checkpoint:
    """What a report is about.

    Attributes:
        source: the local folder.
        comparison: counted from its config, on the meta device.
        base_model, revision: where the dense weights came from, as far as that is known.
        conversion: its ``conversion.json``, or None.
    """

    source: Source
    comparison: Comparison
    base_model: str | None
    revision: str | None
    conversion: ConversionRecord | None

    @property
    def folder(self) -> Path:
        assert self.source.folder is not None
        return self.source.folder

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        """The factored linears and those that stay dense; the plan of the conversion knows more of the latter."""
        known = {p.name for p in self.comparison.linears}
        plan = self.conversion.plan if self.conversion else None
        dense = [p for p in plan.linears if p.rank is None and p.name not in known] if plan else []
        return (*self.comparison.linears, *dense)


def open_checkpoint(source: Source) -> Checkpoint:
    """Read config, headers and records of a folder that ``convert`` or ``finetune`` wrote; no weights.

    Raises:
        CheckpointNotFoundError: it is no folder, or has no config.
        CheckpointError: it is no compact checkpoint, or damaged.
    """
    if source.folder is None:
        raise CheckpointNotFoundError(f"{source.name} is not a folder; report on what convert or finetune wrote")
    config = source.load_config()
    if not is_compact(config):
        raise CheckpointError(f"{source.name} is not a compact checkpoint; report on what convert or finetune wrote")
    safetensors_files(source.folder)
    entry = config.quantization_config
    entry = entry if isinstance(entry, Mapping) else entry.to_dict()
    model = skeleton(config, source.name, source.trust_remote_code)
    _factorize_skeleton(model, entry.get("ranks"), f"{source.name}/config.json")
    base_model, revision = entry.get("base_model"), entry.get("base_revision")
    conversion = read_conversion(source.folder)
    if not base_model and conversion is not None:
        base_model = conversion.base_model
    return Checkpoint(source, compare(model), base_model, revision, conversion)


def _factorize_skeleton(model: Any, ranks: Any, where: str) -> None:
    modules = dict(model.named_modules())
    if not isinstance(ranks, Mapping):
        raise CheckpointError(f"{where} lists no ranks; convert the model again")
    for name, rank in ranks.items():
        found = _module_name(name, model, modules)
        if found is None:
            raise CheckpointError(f"{where} gives a rank to {name}, which {type(model).__name__} does not have")
        layer = LowRankLinear.like(modules[found], 1, device="meta")
        if not isinstance(rank, int):
            raise CheckpointError(f"{where} gives {name} rank {rank!r}, which is no whole number")
        resolve_rank(rank, (layer.out_features, layer.in_features), name)
        swap(model, found, LowRankLinear.like(modules[found], rank, device="meta"))


def _module_name(name: str, model: Any, modules: Mapping[str, Any]) -> str | None:
    """A bare model and one with a head differ by a prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((c for c in candidates if c in modules and is_linear(modules[c])), None)


def dense_folder(checkpoint: Checkpoint, baseline: str | None) -> str | None:
    """The dense model to compare with: the named one, or the origin if that is a folder here."""
    if baseline is not None:
        return baseline
    base = checkpoint.base_model
    return base if base and (Path(base).expanduser() / "config.json").is_file() else None


def measure_linears(checkpoint: Checkpoint, dense: Source, device: str = "cpu") -> dict[str, LinearRecord]:
    """Spectra of the dense weights, and how far the factors are from them, by reading both models.

    Raises:
        CheckpointNotFoundError, CheckpointError: the dense model does not load, or has other linears.
    """
    compact = load_model(checkpoint.source)
    original = load_model(dense)
    modules = dict(original.named_modules())
    records = {}
    bar = tqdm(list(lowrank_layers(compact)), desc="spectra", unit="linear", disable=None)
    for name, layer in bar:
        found = _module_name(name, original, modules)
        weight = dense_weight(modules[found]) if found is not None else None
        if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
            shape = "no such linear" if weight is None else f"shape {tuple(weight.shape)}"
            raise CheckpointError(
                f"{dense.name} has {shape} at {name}, which is {(layer.out_features, layer.in_features)} in "
                f"{checkpoint.source.name}; name the dense model that it came from with --baseline"
            )
        weight = weight.to(device)
        values, places = thinned_spectrum(weight, f"{name}.weight")
        error, _ = relative_errors(weight, layer.to(device), None)
        records[name] = LinearRecord(tuple(values), tuple(places), error)
    return records


def build_report(
    checkpoint: Checkpoint,
    *,
    baseline: str | None = None,
    evaluation: Evaluation | None = None,
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
    pictures.require_plotting()
    records, at, missing = _linear_records(checkpoint, baseline, device)
    conversion = checkpoint.conversion or ConversionRecord()
    rows = [*size_rows(checkpoint.comparison), _disk_row(checkpoint, baseline)]
    parts = [
        _section("Size and cost", _comparison_table("Size and cost, dense and low-rank", rows), _note(FLOPS_NOTE)),
        _section("Evaluation", _evaluation(evaluation, evaluated_on)),
        _section("Ranks", _ranks(checkpoint.linears)),
        _section("Spectra", _spectra(checkpoint, records, missing)),
        _section("Error of every linear", _errors(checkpoint, records, conversion, at, missing)),
        _section("Training", _training(checkpoint.folder)),
        _section("How it was made", _made(checkpoint, conversion)),
        _section("Every linear", _every_linear(checkpoint.linears, records)),
    ]
    title = _file_name(checkpoint.folder.resolve().name)
    head = _header(checkpoint, title, rows, evaluation)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}: low-rank report</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{head}\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _linear_records(
    checkpoint: Checkpoint, baseline: str | None, device: str
) -> tuple[dict[str, LinearRecord], str, str]:
    """Records of the linears; when the weights' error was measured; why spectra are missing, if they are."""
    conversion = checkpoint.conversion
    recorded = dict(conversion.linears) if conversion else {}
    known = {p.name for p in checkpoint.linears}
    recorded = {name: r for name, r in recorded.items() if name in known}
    dense = dense_folder(checkpoint, baseline)
    if any(r.spectrum for r in recorded.values()) or dense is None:
        return recorded, "when the model was converted", "name the dense model with --baseline MODEL"
    # A checkpoint may name any folder as its origin; code there runs only if the user named it.
    trusted = checkpoint.source.trust_remote_code and baseline is not None
    try:
        measured = measure_linears(checkpoint, Source(dense, trust_remote_code=trusted), device)
    except LowRankError as error:
        if baseline is not None:
            raise
        return recorded, "", f"{error}; name the dense model with --baseline MODEL"
    measured = {
        n: replace(r, output_error=recorded[n].output_error) if n in recorded else r for n, r in measured.items()
    }
    return measured, "of this checkpoint's factors", ""


def _disk_row(checkpoint: Checkpoint, baseline: str | None) -> Row:
    after = sum(p.stat().st_size for p in safetensors_files(checkpoint.folder))
    dense = dense_folder(checkpoint, baseline)
    folder = Path(dense).expanduser() if dense else None
    files = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    if files:
        before = float(sum(p.stat().st_size for p in files))
        return Row("weights on disk", human_bytes(before), human_bytes(after), change(before, after))
    counts = checkpoint.comparison
    before = after * counts.dense.parameters / max(1, counts.compact.parameters)
    return Row("weights on disk", f"about {human_bytes(before)}", human_bytes(after), change(before, after))


# Parts of the page. Each returns HTML; strings that come from files are escaped on their way in.


def _header(checkpoint: Checkpoint, title: str, rows: Sequence[Row], evaluation: Evaluation | None) -> str:
    base = checkpoint.base_model
    origin = "a dense model"
    if base and is_hub_id(base):
        origin = f'<a href="https://huggingface.co/{escape(base, quote=True)}">{escape(base)}</a>'
    elif base:
        origin = escape(_file_name(base))
    if checkpoint.revision:
        origin += f", revision <code>{escape(str(checkpoint.revision)[:12])}</code>"
    ranks = [p.rank for p in checkpoint.comparison.linears if p.rank is not None]
    perplexity = next((r for r in evaluation_rows(evaluation) if r.name == "perplexity"), None)
    by_name = {r.name: r for r in rows}
    counts = checkpoint.comparison
    parameters = by_name["parameters"]._replace(
        dense=human_count(counts.dense.parameters), compact=human_count(counts.compact.parameters)
    )
    tiles = [parameters, by_name["FLOPs per token"], by_name["weights on disk"], *([perplexity] if perplexity else [])]
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n<p>A low-rank version of {origin}: {len(ranks)} linears are replaced by "
        f"factors <i>U V</i>.</p>\n<ul class=tiles>{''.join(map(_tile, tiles))}</ul>\n</header>"
    )


def _tile(row: Row) -> str:
    before = f"{escape(row.dense)} &rarr; " if row.dense else ""
    change = f"<span class=change>{escape(row.change)}</span>" if row.change else ""
    return f"<li><span>{escape(row.name)}</span><b>{before}{escape(row.compact)}</b>{change}</li>"


def _evaluation(evaluation: Evaluation | None, evaluated_on: str | None) -> str:
    if not evaluation:
        return _missing("No evaluation was given", "add --data TEXT and --baseline MODEL, or --eval FILE.json")
    rows = evaluation_rows(evaluation)
    table = _comparison_table("Evaluation of the low-rank model and its baseline", rows)
    mine, base = evaluation["model"], evaluation.get("baseline") or {}
    facts = [f"{label} {mine[k]:,}" for k, label in (("tokens", "predicted tokens"), ("block_size", "context of"),
                                                    ("stride", "stride")) if isinstance(mine.get(k), int)]  # fmt: skip
    on = [f"Measured on {_file_name(evaluated_on)}."] if evaluated_on else []
    against = [f"Baseline: {_file_name(str(base['name']))}."] if base.get("name") else ["No baseline was measured."]
    return table + _note(" ".join([*on, *against, *([f"{'; '.join(facts)}.".capitalize()] if facts else [])]))


def _ranks(linears: Sequence[LinearPlan]) -> str:
    ranked = [p for p in linears if p.rank is not None]
    if not ranked:
        return _missing("No linear is factored", "")
    low, high = (f([p.rank for p in ranked if p.rank is not None]) for f in (min, max))
    dense = len(linears) - len(ranked)
    alt = (
        f"Heat map of ranks by block and module: {len(ranked)} factored linears, ranks {low} to {high}, {dense} dense."
    )
    caption = (
        "Colour is the share of the break-even rank, out * in / (out + in), at which nothing is saved; it is also the "
        f"linear's param ratio. {len(ranked)} linears are factored"
        + (f", {dense} stay dense (grey)." if dense else ".")
    )
    return _picture(pictures.rank_map(linears), alt, caption)


def _spectra(checkpoint: Checkpoint, records: Mapping[str, LinearRecord], missing: str) -> str:
    drawn = [p for p in checkpoint.linears if p.name in records and len(records[p.name].spectrum) > 1]
    if not drawn:
        return _missing("The spectra of the dense weights are not known", missing)
    figure, left_out = pictures.spectra(drawn, records)
    alt = f"Singular values of {len(drawn)} dense weights, one panel per module, with a dot where the rank cuts."
    more = f" {left_out} more modules are not drawn." if left_out else ""
    return _picture(figure, alt, "Singular values of the dense weights, relative to the largest. What lies right of "
                                 f"the dot is dropped by the factorization.{more}")  # fmt: skip


def _errors(
    checkpoint: Checkpoint, records: Mapping[str, LinearRecord], conversion: ConversionRecord, at: str, missing: str
) -> str:
    measured = [r for r in records.values() if r.weight_error is not None or r.output_error is not None]
    if not measured and not conversion.blocks:
        return _missing("The errors of the linears are not known", missing)
    known = {n: r for n, r in records.items() if r.weight_error is not None or r.output_error is not None}
    figure = pictures.errors(checkpoint.linears, known, conversion.blocks)
    worst = max(((r.weight_error or 0.0, n) for n, r in known.items()), default=(0.0, ""))
    alt = f"Relative error of {len(known)} linears by block."
    if worst[1]:
        alt += f" The largest weight error is {worst[0]:.3f}, at {worst[1]}."
    caption = f"Error of the weight {at}." if at else "Error of the weight."
    if any(r.output_error is not None for r in known.values()):
        caption += " Error of the output on calibration tokens, when the model was converted."
    return _picture(figure, alt, caption)


def _training(folder: Path) -> str:
    entries = [e for e in read_metrics(folder / METRICS_FILE) if isinstance(e, dict) and "step" in e]
    train = [e for e in entries if "loss" in e]
    if not train:
        return _missing(
            f"There is no {METRICS_FILE} here", "it is written by lowrank-ft finetune; report on the folder of the run"
        )
    held_out = [e["eval_loss"] for e in entries if "eval_loss" in e]
    alt = f"Training loss over {train[-1]['step']} steps, from {train[0]['loss']:.3f} to {train[-1]['loss']:.3f}"
    alt += f"; held-out loss {held_out[0]:.3f} to {held_out[-1]:.3f}." if held_out else "."
    return _picture(run_figure(entries), alt, "Loss, and alpha, the share of the dense guide.")


def _made(checkpoint: Checkpoint, conversion: ConversionRecord) -> str:
    command = conversion.command or _command_of_card(checkpoint.folder)
    shown = (
        f"<pre><code>{escape(command)}</code></pre>"
        if command
        else _missing("The command is not on record", "conversion.json and README.md have it where convert wrote them")
    )
    facts: dict[str, str] = {k.replace("_", " "): f"{v:g}" if isinstance(v, float) else str(v)
                             for k, v in conversion.facts.items()}  # fmt: skip
    if conversion.calibration:
        tokens = conversion.calibration.get("tokens")
        source = _file_name(str(conversion.calibration.get("source") or "text"))
        facts["calibration"] = f"{source}, {tokens:,} tokens" if isinstance(tokens, int) else source
    if not facts:
        return shown
    body = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"{shown}<table><caption>Settings of the conversion</caption><tbody>{body}</tbody></table>"


def _command_of_card(folder: Path) -> str | None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^## How it was made\n+```\n(.+?)\n```", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def _every_linear(linears: Sequence[LinearPlan], records: Mapping[str, LinearRecord]) -> str:
    columns = ("linear", "out x in", "rank", "break-even", "parameters", "after", "energy kept", "weight error",
               "output error")  # fmt: skip
    rows = []
    for p in linears:
        record = records.get(p.name, LinearRecord())
        energy = _energy_kept(record, p)
        cells = (
            f"{p.shape[0]} x {p.shape[1]}", "dense" if p.rank is None else str(p.rank),
            f"{break_even_rank(p.shape):.4g}", f"{p.dense_parameters:,}", f"{p.parameters:,}",
            "" if energy is None else f"{energy:.1%}", _error_text(record.weight_error), _error_text(record.output_error),
        )  # fmt: skip
        rows.append(f"<tr><th scope=row>{escape(p.name)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "".join(f"<th scope=col>{c}</th>" for c in columns)
    table = f"<table><caption>Linears</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<details><summary>{len(linears)} linears</summary><div class=wide>{table}</div></details>"


def _energy_kept(record: LinearRecord, p: LinearPlan) -> float | None:
    """Share of the squared singular values that the rank keeps; a thinned spectrum is filled in between its values."""
    if len(record.spectrum) < 2 or p.rank is None:
        return None
    import numpy as np

    squares = np.interp(range(1, min(p.shape) + 1), record.spectrum_index, record.spectrum) ** 2
    return float(squares[: p.rank].sum() / squares.sum()) if squares.sum() > 0 else None


def _error_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _comparison_table(caption: str, rows: Sequence[Row]) -> str:
    body = "".join(
        f"<tr><th scope=row>{escape(r.name)}</th>{''.join(f'<td>{escape(c)}</td>' for c in r[1:])}</tr>" for r in rows
    )
    head = "<th scope=col>measure</th><th scope=col>dense</th><th scope=col>low-rank</th><th scope=col>change</th>"
    return (
        f"<div class=wide><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, *body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(body)}\n</section>\n"


def _picture(figure: Any, alt: str, caption: str) -> str:
    return (
        f'<figure><img src="{pictures.data_uri(figure)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def _missing(what: str, how: str) -> str:
    return f"<p class=missing>{escape(what)}{f': {escape(how)}' if how else ''}.</p>"


def _file_name(text: str) -> str:
    """A name as it may be shown to others: of a local path, the last part."""
    return Path(text).name if Path(text).is_absolute() or text.startswith("~") else text


_STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6472; --line: #d9dee6; --page: #f7f8fa; --card: #ffffff;
  --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba; --line: #343b46; --page: #14171c;
  --card: #1c2128; --accent: #7fb2e5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; }
header p { color: var(--soft); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1.2rem 1.3rem;
  margin: 0 0 1.2rem; }
.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem;
  margin: 0 0 1.2rem; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tiles li > * { display: block; }
.tiles span { color: var(--soft); font-size: .85rem; }
.tiles b { font-size: 1.05rem; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles .change { color: var(--accent); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .38rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
.wide { overflow-x: auto; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: 6px;
  padding: .4rem; }
figcaption, .note { color: var(--soft); font-size: .87rem; margin: .8rem 0 0; }
.missing { color: var(--soft); margin: 0; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; margin: 0 0 .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
summary { cursor: pointer; color: var(--accent); }
details table { margin-top: .8rem; }
@media print { body { background: #ffffff; } section { break-inside: avoid; } }
"""
