"""What a run writes to be looked at: ``metrics.jsonl``, one JSON object a line. It is read by ``lowrank_ft.report``."""

import json
import os
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
_NUMBERS = ("loss", "eval_loss", "alpha", "learning_rate")


__all__ = ["METRICS_FILE", "MetricsLog", "Window", "plot_run", "read_metrics"]


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resumed run first drops the lines past the step that it goes on from."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = [e for e in read_metrics(self.path) if e["step"] <= first_step] if first_step else []
        draft = folder / f".{METRICS_FILE}.partial"
        draft.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        os.replace(draft, self.path)

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Window:
    """Mean losses since the last record, and tokens and seconds of training: evaluations and checkpoints do not count."""

    def __init__(self) -> None:
        self._losses: list[dict[str, float]] = []
        self.tokens = 0
        self.seconds = 0.0

    def add(self, losses: dict[str, float], tokens: int, seconds: float) -> None:
        self._losses.append(losses)
        self.tokens += tokens
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        return {name: sum(x[name] for x in self._losses) / len(self._losses) for name in self._losses[-1]}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records so far; a last line that was cut off by a kill is left out, and so is what is no number but should be."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append({k: v for k, v in entry.items() if k not in _NUMBERS or isinstance(v, int | float)})
    return entries


def plot_run(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw loss, evaluation loss and alpha over steps.

    Returns:
        False where matplotlib is not installed (``pip install "lowrank-ft[plot]"``).
    """
    try:
        figure = run_figure(read_metrics(metrics), title)
    except ImportError:
        return False
    figure.savefig(picture, dpi=150)
    return True


def run_figure(entries: list[dict[str, Any]], title: str = "") -> Any:
    """Loss, evaluation loss and alpha over steps, as a matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    train = [e for e in entries if "loss" in e]
    guided = [e for e in train if "alpha" in e]
    evals = [e for e in entries if "eval_loss" in e]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([e["step"] for e in train], [e["loss"] for e in train], color="#2b6cb0", lw=1.4, label="training loss")
    if evals:
        axis.plot(
            [e["step"] for e in evals], [e["eval_loss"] for e in evals], "o-", color="#c05621", lw=1.6, ms=4,
            label="held-out loss of the compact model",
        )  # fmt: skip
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axis.grid(alpha=0.25)
    share = axis.twinx()
    share.fill_between([e["step"] for e in guided], [e["alpha"] for e in guided], color="#718096", alpha=0.18, lw=0)
    share.plot([e["step"] for e in guided], [e["alpha"] for e in guided], color="#718096", lw=1.2, label="alpha")
    share.set(ylabel="alpha, the share of the dense guide", ylim=(0, 1.05))
    dropped = next((e["step"] for e in entries if e.get("event") == "end_guidance"), None)
    if dropped is not None:
        axis.axvline(dropped, color="#718096", ls=":", lw=1.2, label="guide dropped")
    lines = [*axis.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", framealpha=0.9)
    return figure
