"""Figures of a factored model: rank map, spectra, errors. matplotlib is imported when one is drawn.

A linear ``model.layers.3.self_attn.q_proj`` is placed by the first number in its name: block ``(model.layers, 3)``,
module ``self_attn.q_proj``. Linears outside of any block share one row.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_ft.conversion.record import BlockRecord, LinearRecord
from lowrank_ft.errors import ConfigError, MissingPackageError, OutputError
from lowrank_ft.factorization.plan import LinearPlan

_FORMATS = (".png", ".svg", ".pdf")
_MOST_COLUMNS = 24  # more modules per block (experts) are drawn as one column per kind
_MOST_PANELS = 12
_SMALLEST_SHOWN = 1e-3  # of the largest singular value; the tails below would squeeze everything else
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#718096"

Block = tuple[str, int]


def require_plotting() -> None:
    """Raise a MissingPackageError unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            'plots need matplotlib, which is not installed; pip install "lowrank-ft[plot]"'
        ) from None


def check_picture_path(path: Path) -> None:
    """Raise a ConfigError or OutputError, before any work, where a picture cannot be written to ``path``."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--picture {path} has no supported file extension; use one of {', '.join(_FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"--picture {path} cannot be written; name a file in a folder that exists")


def save_rank_map(linears: Sequence[LinearPlan], path: Path) -> bool:
    """Write the rank map of a plan or model.

    Returns:
        False where there is nothing to draw, or matplotlib is not installed.
    """
    try:
        require_plotting()
    except MissingPackageError:
        return False
    if not linears:
        return False
    # Neither date nor version of the drawing software: the same ranks give the same file.
    kind = path.suffix.lower()
    metadata: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}}.get(kind, {"CreationDate": None})
    rank_map(linears).savefig(path, dpi=150, metadata=metadata)
    return True


def data_uri(figure: Any) -> str:
    """A figure as an SVG image that can stand in ``src``: letters are outlines, so no font is needed."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lowrank-ft"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def rank_map(linears: Sequence[LinearPlan]) -> Any:
    """Blocks down, modules across; a cell shows the rank, its colour the share of parameters that is kept."""
    import numpy as np
    from matplotlib.patches import Rectangle

    cells = _cells(linears)
    rows, columns = _ordered(cells)
    shares = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for (block, module), members in cells.items():
        at = rows.index(block), columns.index(module)
        ranked = [p for p in members if p.rank is not None]
        if ranked:
            shares[at] = sum(p.parameters / p.dense_parameters for p in ranked) / len(ranked)
        texts[at] = _rank_text([p.rank for p in members])

    labels = _module_labels(columns)
    wide = max(len(t) for t in texts.values())
    longest = max(len(line) for label in labels for line in label.split("\n"))
    slanted = len(columns) > 12
    cell_width = max(0.5, 0.085 * wide + 0.15, 0.0 if slanted else 0.078 * longest + 0.1)
    cell_height = max(0.14, min(0.29, 26 / len(rows)))
    size = (max(4.2, 1.1 + cell_width * len(columns)), 1.5 + cell_height * len(rows) + (0.6 if slanted else 0))
    figure = _figure(size)
    axis = figure.subplots()
    colours = _blues().with_extremes(bad="#edf0f4")
    top = max(1.0, float(np.nanmax(shares)) if np.isfinite(shares).any() else 1.0)
    edges = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    image = axis.pcolormesh(
        *edges, np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=top, edgecolors="white", lw=1
    )
    axis.invert_yaxis()
    font = max(4.5, min(8.0, 27 * cell_height))
    for (row, column), text in texts.items():
        share = shares[row, column]
        colour = "#5a6472" if np.isnan(share) else "white" if share / top > 0.68 else "#1a202c"
        axis.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)
    for row in range(len(rows)):
        for column in range(len(columns)):
            if (row, column) not in texts:  # no such linear in this block
                axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color="white", lw=0))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.xaxis.tick_top()
    turn = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axis.set_xticks(range(len(columns)), labels, fontsize=8, parse_math=False, **turn)
    axis.set_yticks(range(len(rows)), _block_labels(rows), fontsize=min(8.0, font + 0.5), parse_math=False)
    axis.set_ylabel("block", fontsize=9)
    bar = figure.colorbar(
        image, ax=axis, orientation="horizontal", aspect=45, shrink=min(1.0, 5 / size[0]), pad=0.03, fraction=0.05
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("share of the dense parameters that is kept; the number is the rank", fontsize=8)
    return figure


def spectra(linears: Sequence[LinearPlan], records: Mapping[str, LinearRecord]) -> tuple[Any, int]:
    """Singular values of the dense weights, one panel a module, one line a block, a dot where the rank cuts.

    Returns:
        The figure, and how many modules were left out because there are too many to draw.
    """
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    drawn = [p for p in linears if len(records.get(p.name, LinearRecord()).spectrum) > 1]
    cells = _cells(drawn)
    rows, modules = _ordered(cells)
    left_out, modules = len(modules[_MOST_PANELS:]), modules[:_MOST_PANELS]
    across = min(4, len(modules)) if len(modules) != 6 else 3
    down = -(-len(modules) // across)
    figure = _figure((max(4.4, 2.35 * across), 2.05 * down + 0.5))
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    tint = _blues()
    for panel in panels.flat[len(modules) :]:
        panel.set_visible(False)
    lowest, lowest_cut = 1.0, 1.0
    for panel, module in zip(panels.flat[: len(modules)], modules, strict=True):
        for i, block in enumerate(rows):
            for p in cells.get((block, module), []):
                record = records[p.name]
                values = np.asarray(record.spectrum)
                values = np.maximum(values / max(values[0], 1e-30), 1e-9)  # zeros have no logarithm
                index = np.asarray(record.spectrum_index)
                colour = tint(0.3 + 0.7 * i / max(1, len(rows) - 1))
                panel.plot(index, values, color=colour, lw=1.0)
                lowest = min(lowest, float(values.min()))
                if p.rank is not None:
                    height = float(np.exp(np.interp(p.rank, index, np.log(values))))
                    lowest_cut = min(lowest_cut, height)
                    panel.plot([p.rank], [height], "o", color=_ORANGE, ms=3.2, mec="white", mew=0.5, zorder=5)
        panel.set_yscale("log")
        panel.set_title(_shortened(module), fontsize=8, parse_math=False)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
    panels[0, 0].set_ylim(max(lowest, min(lowest_cut, _SMALLEST_SHOWN)) * 0.7, 1.5)
    figure.supxlabel("place of the singular value", fontsize=8)
    figure.supylabel("singular value / largest", fontsize=8)
    names = _block_labels(rows)
    keys = [
        Line2D([], [], color=tint(0.3), label=f"block {names[0]}"),
        Line2D([], [], color=tint(1.0), label=f"block {names[-1]}"),
        Line2D([], [], color=_ORANGE, marker="o", ls="", ms=4, label="cut at the rank"),
    ]
    figure.legend(
        handles=keys if len(rows) > 1 else keys[1:], loc="outside upper right", ncols=3, fontsize=8, frameon=False
    )
    return figure, left_out


def errors(
    linears: Sequence[LinearPlan], records: Mapping[str, LinearRecord], blocks: Sequence[BlockRecord] = ()
) -> Any:
    """Relative error of every linear, by block, and the output error of the blocks before and after refinement."""
    kinds = (("weight_error", "error of the weight, |W - UV| / |W|"),
             ("output_error", "error of the output, |Y - Y'| / |Y|"))  # fmt: skip
    shown = [(k, t) for k, t in kinds if any(getattr(r, k) is not None for r in records.values())]
    measured = [b for b in blocks if b.error_before is not None or b.error_after is not None]
    cells = _cells([p for p in linears if p.name in records])
    rows, modules = _ordered(cells)
    count = len(shown) + bool(measured)
    down = 2 if count == 3 else 1
    figure = _figure((8.4 if count > 1 else 4.8, 3.1 * down + (0.6 if down == 1 else 0)))
    panels = list(figure.subplots(down, 2 if count > 1 else 1, squeeze=False).flat)
    for panel, (key, title) in zip(panels[: len(shown)], shown, strict=True):
        for i, module in enumerate(modules):
            points = [
                (rows.index(b), value)
                for (b, m), members in cells.items()
                for p in members
                if m == module and (value := getattr(records[p.name], key)) is not None
            ]
            style = {"marker": "osD^v"[(i // 10) % 5], "ms": 3.5, "lw": 1.1, "color": f"C{i % 10}"}
            panel.plot([x for x, _ in points], [y for _, y in points], label=_shortened(module), **style)
        _by_block(panel, _block_labels(rows), title)
    if shown:
        handles, names = panels[0].get_legend_handles_labels()
        if count == 3:  # the fourth place is free
            panels[3].legend(handles, names, loc="center", fontsize=8, frameon=False, ncols=1 + (len(names) > 12))
            panels[3].axis("off")
        else:
            columns = min(len(names), 4 if count > 1 else 3)
            figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=7.5, frameon=False)
    if measured:
        panel = panels[count - 1]
        for x, b in enumerate(measured):
            if b.error_before is not None and b.error_after is not None:
                panel.plot([x, x], [b.error_before, b.error_after], color="#cbd5e0", lw=2, zorder=1)
        for key, colour, label in (("error_before", _GREY, "before"), ("error_after", _BLUE, "after")):
            points = [(x, getattr(b, key)) for x, b in enumerate(measured) if getattr(b, key) is not None]
            panel.plot(
                [x for x, _ in points], [y for _, y in points], "o", color=colour, ms=5, label=f"{label} refinement"
            )
        _by_block(panel, _block_labels([_place(f"{b.name}.x")[0] for b in measured]), "error of the block's output")
        panel.legend(fontsize=7.5, frameon=False)
    return figure


def _by_block(panel: Any, labels: Sequence[str], title: str) -> None:
    step = -(-len(labels) // 12)
    panel.set_xticks(range(0, len(labels), step), labels[::step], fontsize=7, parse_math=False)
    panel.set_xlim(-0.5, len(labels) - 0.5)
    panel.set_ylim(bottom=0)
    panel.margins(y=0.12)
    panel.tick_params(labelsize=7)
    panel.set_xlabel("block", fontsize=8)
    panel.set_title(title, fontsize=9, parse_math=False)
    panel.grid(alpha=0.25)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", facecolor="white")


def _blues() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ranks", ["#eef5fb", "#9fc5e8", "#3d85c6", "#17406d"])


def _place(name: str) -> tuple[Block, str]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return ("", -1), name
    return (".".join(parts[:at]), int(parts[at])), ".".join(parts[at + 1 :]) or parts[at - 1]


def _cells(linears: Sequence[LinearPlan]) -> dict[tuple[Block, str], list[LinearPlan]]:
    """The linears of every block and module, in their order; several in one cell where experts share a column."""
    places = [_place(p.name) for p in linears]
    if len({module for _, module in places}) > _MOST_COLUMNS:
        places = [(block, re.sub(r"(?<![^.])\d+(?![^.])", "*", module)) for block, module in places]
    cells: dict[tuple[Block, str], list[LinearPlan]] = {}
    for place, p in zip(places, linears, strict=True):
        cells.setdefault(place, []).append(p)
    return cells


def _ordered(cells: Mapping[tuple[Block, str], object]) -> tuple[list[Block], list[str]]:
    """Blocks and modules, each in the order of their first appearance."""
    return list(dict.fromkeys(b for b, _ in cells)), list(dict.fromkeys(m for _, m in cells))


def _rank_text(ranks: Sequence[int | None]) -> str:
    known = [r for r in ranks if r is not None]
    if not known:
        return "dense"
    text = str(known[0]) if min(known) == max(known) else f"{min(known)}-{max(known)}"
    return text if len(known) == len(ranks) else f"{text}, dense"


def _module_labels(modules: Sequence[str]) -> list[str]:
    """The module above its own name: ``self_attn`` and ``q_proj`` in two lines."""
    short = ["\n".join([p for p in m.split(".") if p != "*" and not p.isdecimal()][-2:]) for m in modules]
    labels = short if len(set(short)) == len(short) else modules
    return ["\n".join(_shortened(line) for line in label.split("\n")) for label in labels]


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"...{text[-37:]}"


def _block_labels(blocks: Sequence[Block]) -> list[str]:
    """Numbers, with the stack's name where there are several (``encoder 0``)."""
    stacks = {prefix for prefix, number in blocks if number >= 0}
    if len(stacks) < 2:
        return [str(number) if number >= 0 else "-" for _, number in blocks]
    split = {prefix: prefix.split(".") for prefix in stacks}
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in split.values()}) == 1:
        shared += 1
    return [f"{split[p][shared] if shared < len(split[p]) else p} {n}" if n >= 0 else "-" for p, n in blocks]
