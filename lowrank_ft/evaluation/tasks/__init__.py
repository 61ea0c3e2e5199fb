"""Small tasks of this project's own for lm-evaluation-harness; they need no network.

They are too few and too easy to rank models. They show whether a smaller model still does what the larger one did.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the YAML files are: an ``include_path`` of the harness."""
