"""PEFT and transformers know our method as soon as they are imported, and our package imports neither."""

import importlib
import sys

import pytest

from lowrank_ft.when_imported import when_imported

KNOWS = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; print('LOWRANK' in known)"


@pytest.mark.parametrize(
    "code",
    [
        "import peft, lowrank_ft; " + KNOWS,
        "import lowrank_ft; lowrank_ft.LowRankConfig(r=4); " + KNOWS,
        "import importlib.util, sys, lowrank_ft; assert 'peft' not in sys.modules; "
        "importlib.util.find_spec('peft'); import peft, importlib; importlib.reload(peft); " + KNOWS,
    ],
)
def test_peft_knows_the_method(python, code):
    assert python("-c", code).stdout == "True\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, lowrank_ft; assert not {'torch', 'transformers'} & set(sys.modules)",
        "from transformers import LlamaForCausalLM; import lowrank_ft",
        "import lowrank_ft.checkpoints.loader",
    ],
)
def test_transformers_knows_the_method(python, code):
    """From the moment on at which it could load a model."""
    knows = "from transformers import PreTrainedModel; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known"
    assert python("-c", f"{code}; {knows}; print('lowrank' in known)").stdout == "True\n"


def test_the_public_names():
    """Each is where the package says; what is not there is an AttributeError."""
    import lowrank_ft

    assert sorted(lowrank_ft._HOME) == lowrank_ft.__all__
    assert all(getattr(lowrank_ft, name) is not None for name in lowrank_ft.__all__)
    assert set(lowrank_ft.__all__) <= set(dir(lowrank_ft))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        lowrank_ft.no_such_name  # noqa: B018


def test_any_package(tmp_path, monkeypatch):
    """A package is found by the usual finders, its own loader stays on it, and the action comes after its body."""
    (tmp_path / "watched_package.py").write_text("done = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    when_imported("watched_package", lambda: sys.modules["watched_package"].done.append(1))
    import watched_package

    assert watched_package.done == [1]
    assert type(watched_package.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(watched_package)
    assert watched_package.done == []  # its body ran again, the action did not
    when_imported("watched_package", lambda: watched_package.done.append(2))
    assert watched_package.done == [2]


def test_an_import_that_failed_may_be_tried_again(tmp_path, monkeypatch):
    (tmp_path / "failing_package.py").write_text(
        "import os\nif 'LOWRANK_FT_FAILS' in os.environ: raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = []
    when_imported("failing_package", lambda: done.append(1))
    monkeypatch.setenv("LOWRANK_FT_FAILS", "1")
    with pytest.raises(KeyboardInterrupt):
        import failing_package
    monkeypatch.delenv("LOWRANK_FT_FAILS")
    assert done == []
    import failing_package  # noqa: F401

    assert done == [1]


def test_a_package_that_is_not_there():
    when_imported("no_such_package_at_all", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ModuleNotFoundError):
        import no_such_package_at_all  # noqa: F401
