"""Wrong usage as one line. Nothing heavy is imported here, for ``--help`` answers at once."""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong, and of a misspelt option what it may have meant."""

    commands: Mapping[str, argparse.ArgumentParser] = {}
    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = [self._spelled(a) for a in (sys.argv[1:] if args is None else args)]
        options, rest = super().parse_known_args(self._given, namespace)
        for name, value in vars(options).items():  # --output-dir=~/x reaches us as it is written
            setattr(options, name, [_at_home(v) for v in value] if isinstance(value, list) else _at_home(value))
        return options, rest

    def _spelled(self, argument: str) -> str:
        """Flags have hyphens; ``--output_dir`` is understood, as the recipes spell it."""
        flag, equals, value = argument.partition("=")
        hyphens = flag.replace("_", "-")
        known = flag.startswith("--") and flag not in self._option_string_actions
        return f"{hyphens}{equals}{value}" if known and hyphens in self._option_string_actions else argument

    def error(self, message: str) -> NoReturn:
        # A misspelt option may also be why a required one is missing.
        if message.startswith(("unrecognized arguments", "the following arguments are required")):
            message = next(self._misspelt(), message)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def _misspelt(self) -> Any:
        known = list(self._option_string_actions)
        for name in (a.partition("=")[0] for a in self._given if a.startswith("--") and len(a) > 2):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                yield f"there is no option {name}" + (f" (did you mean {near[0]}?)" if near else "")


def _at_home(value: Any) -> Any:
    """A path below the home folder in full; or there would be a folder called ``~``."""
    return os.path.expanduser(value) if isinstance(value, str) and (value == "~" or value.startswith("~/")) else value


class Version(argparse.Action):
    """A flag that prints the version of the package, which takes no import of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(version("lowrank-ft"))
        parser.exit()
