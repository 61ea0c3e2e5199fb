"""What a run writes to be looked at: ``metrics.jsonl``, one JSON object a line. It is read by ``lowrank_ft.records``."""

import json
from pathlib import Path
from typing import Any

from lowrank_ft.records import METRICS_FILE, plot_run, read_metrics

__all__ = ["METRICS_FILE", "MetricsLog", "Window", "plot_run", "read_metrics"]


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


class Window:
    """Mean losses and token count since the last record."""

    def __init__(self) -> None:
        self._losses: list[dict[str, float]] = []
        self.tokens = 0

    def add(self, losses: dict[str, float], tokens: int) -> None:
        self._losses.append(losses)
        self.tokens += tokens

    def means(self) -> dict[str, float]:
        return {name: sum(x[name] for x in self._losses) / len(self._losses) for name in self._losses[-1]}
