"""What a run writes to be looked at: ``metrics.jsonl``, one JSON object a line. It is read by ``lowrank_ft.records``."""

import json
from pathlib import Path
from typing import Any

from lowrank_ft.records import METRICS_FILE, plot_run, read_metrics

__all__ = ["METRICS_FILE", "MetricsLog", "plot_run", "read_metrics"]


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
