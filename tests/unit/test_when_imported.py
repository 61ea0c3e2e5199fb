"""PEFT knows our method as soon as it is imported, and our package does not import it."""

import sys

import pytest

from lowrank_ft.integrations.when_imported import when_imported

KNOWS = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; print('LOWRANK' in known)"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, lowrank_ft; assert 'peft' not in sys.modules; import peft; " + KNOWS,
        "import peft, lowrank_ft; " + KNOWS,
        "import lowrank_ft; from peft import LoraConfig; " + KNOWS,
        "import lowrank_ft; lowrank_ft.LowRankConfig(r=4); " + KNOWS,
        "import importlib.util, lowrank_ft; importlib.util.find_spec('peft'); import peft, importlib; importlib.reload(peft); "
        + KNOWS,
    ],
)
def test_peft_knows_the_method(python, code):
    assert python("-c", code).stdout == "True\n"


def test_any_package(tmp_path, monkeypatch):
    """A package is found by the usual finders, its own loader stays on it, and the action comes after its body."""
    (tmp_path / "watched_package.py").write_text("done = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    when_imported("watched_package", lambda: sys.modules["watched_package"].done.append(1))
    finders = len(sys.meta_path)
    import watched_package

    assert watched_package.done == [1]
    assert type(watched_package.__loader__).__name__ == "SourceFileLoader"
    assert len(sys.meta_path) == finders - 1
    when_imported("watched_package", lambda: watched_package.done.append(2))
    assert watched_package.done == [1, 2]


def test_a_package_that_is_not_there():
    when_imported("no_such_package_at_all", lambda: pytest.fail("it was not imported"))
    try:
        with pytest.raises(ModuleNotFoundError):
            import no_such_package_at_all  # noqa: F401
    finally:
        sys.meta_path.pop(0)
