"""Run a command in a process of its own, and measure its time and its peak memory."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def measured(command: list[str], note: Path, env: dict[str, str] | None = None) -> dict[str, float]:
    """Run ``command`` unless ``note`` says that it was run; seconds, CPU seconds and peak bytes, kept in ``note``.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    if note.is_file():
        return dict(json.loads(note.read_text(encoding="utf-8")))
    # One more process in between, whose children are this command alone.
    code = "import sys; from tests.benchmarks.measured import child; child(sys.argv[1], sys.argv[2:])"
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_suffix(".partial")
    subprocess.run([sys.executable, "-c", code, str(draft), *command], check=True, env={**os.environ, **(env or {})})
    draft.replace(note)
    return dict(json.loads(note.read_text(encoding="utf-8")))


def child(note: str, command: list[str]) -> None:
    """The process in between."""
    start = time.monotonic()
    code = subprocess.run(command).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code == 0:
        found = {
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_bytes": used.ru_maxrss * 1024,
        }
        Path(note).write_text(json.dumps(found), encoding="utf-8")
    sys.exit(code)
