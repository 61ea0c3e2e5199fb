"""What a run leaves to look at: ``metrics.jsonl``, one JSON object a line, and a picture of it."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resumed run first drops the lines past the step that it goes on from."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = [e for e in read_metrics(self.path) if e["step"] <= first_step] if first_step else []
        self.path.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records so far; a last line that was cut off by a kill is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def plot_run(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw loss, evaluation loss and alpha over steps.

    Returns:
        False where matplotlib is not installed (``pip install "lowrank-ft[plot]"``).
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = read_metrics(metrics)
    train = [e for e in entries if "loss" in e]
    evals = [e for e in entries if "eval_loss" in e]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axis.plot([e["step"] for e in train], [e["loss"] for e in train], color="#2b6cb0", lw=1.4, label="training loss")
    if evals:
        axis.plot(
            [e["step"] for e in evals], [e["eval_loss"] for e in evals], "o-", color="#c05621", lw=1.6, ms=4,
            label="held-out loss of the compact model",
        )  # fmt: skip
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axis.grid(alpha=0.25)
    share = axis.twinx()
    share.fill_between([e["step"] for e in train], [e["alpha"] for e in train], color="#718096", alpha=0.18, lw=0)
    share.plot([e["step"] for e in train], [e["alpha"] for e in train], color="#718096", lw=1.2, label="alpha")
    share.set(ylabel="alpha, the share of the dense guide", ylim=(0, 1.05))
    dropped = next((e["step"] for e in entries if e.get("event") == "end_guidance"), None)
    if dropped is not None:
        axis.axvline(dropped, color="#718096", ls=":", lw=1.2, label="guide dropped")
    lines = [*axis.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", framealpha=0.9)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    return True
