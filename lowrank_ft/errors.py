"""Every error that this package raises on purpose.

One root, :class:`LowRankError`, for callers that want to catch them all. Each leaf also inherits the builtin that a
caller would expect, so ``except ValueError`` keeps working. A message names the thing, what was found, what is
allowed, and the fix; the command line prints it as one line.
"""


class LowRankError(Exception):
    """Root of all errors that are raised on purpose."""


class RankError(LowRankError, ValueError):
    """A rank, fraction, ratio or energy outside its range."""


class TargetError(LowRankError, ValueError):
    """Target or exclude patterns that match nothing, or something that cannot be factorized."""


class PlanError(LowRankError, ValueError):
    """A plan that contradicts itself or the model."""


class NonFiniteError(LowRankError, ValueError):
    """A weight that holds NaN or infinity."""


class CheckpointError(LowRankError, ValueError):
    """A checkpoint that is incomplete, corrupt, unsafe or of an unknown kind."""


class CheckpointNotFoundError(LowRankError, FileNotFoundError):
    """A folder, file or Hub repository that does not exist or cannot be reached."""


class OutputError(LowRankError, OSError):
    """An output folder that may not be written, or a write that failed halfway."""


class DataError(LowRankError, ValueError):
    """A dataset that is missing, empty, or lacks the named column."""


class ConfigError(LowRankError, ValueError):
    """An option that is unknown, out of range, or contradicts another."""


class MissingPackageError(LowRankError, ImportError):
    """An optional package that is needed for what was asked, and not installed."""


class TrainingStateError(LowRankError, RuntimeError):
    """A training checkpoint that does not fit the run that wants to resume from it."""


class DivergedError(LowRankError, ArithmeticError):
    """A training whose loss is no longer a number."""


def first_line(error: BaseException) -> str:
    """The first line with words in an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require_choice(what: str, found: str, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that lists what is allowed unless ``found`` is one of it."""
    if found not in allowed:
        raise ConfigError(f"{what} {found!r} is unknown; choose one of {', '.join(allowed)}")
