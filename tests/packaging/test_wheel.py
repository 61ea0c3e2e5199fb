"""The wheel holds what it should and nothing more, and works where the checkout is not."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        metadata = archive.read(next(n for n in sizes if n.endswith(".dist-info/METADATA"))).decode()
        entry_points = archive.read(next(n for n in sizes if n.endswith("entry_points.txt"))).decode()
    tops = {name.partition("/")[0] for name in sizes}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lowrank_ft", "lowrank_ft_cli", "lowrank_ft_recipes"}
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in {"lowrank_ft": "lowrank_ft", "lowrank_ft_cli": "cli"}.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    sources |= {f"lowrank_ft_recipes/{name}.py" for name in ("__init__", "finetune", "pretrain")}
    packed = {n for n in sizes if n.endswith(".py")}
    assert packed == sources
    others = {n for n in sizes if not n.endswith(".py") and ".dist-info/" not in n}
    assert others == {
        "lowrank_ft/py.typed",
        *(f"lowrank_ft/demo/model/{p.name}" for p in (ROOT / "lowrank_ft/demo/model").iterdir()),
        *(f"lowrank_ft/report/templates/{p.name}" for p in (ROOT / "lowrank_ft/report/templates").iterdir()),
        *(f"lowrank_ft_recipes/configs/{p.name}" for p in (ROOT / "recipes/configs").glob("*.yaml")),
    }
    assert sum(s for n, s in sizes.items() if n.startswith("lowrank_ft/demo/model/")) <= 6_000_000
    assert "lowrank-ft = lowrank_ft_cli.main:main" in entry_points
    assert "lowrank = lowrank_ft.integrations.vllm:register" in entry_points
    assert "Requires-Python: >=3.10" in metadata
    for requirement in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub"):
        assert f"Requires-Dist: {requirement}>=" in metadata
    for extra in ("eval", "plot", "quantized", "trl", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_it_works_from_the_wheel_alone(wheel, tmp_path):
    """Unpacked into a folder of its own, with the checkout out of reach."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from lowrank_ft_cli.main import main\n"
        "import lowrank_ft; assert lowrank_ft.__file__.startswith(sys.path[0]), lowrank_ft.__file__\n"
        f"model = {str(tmp_path / 'site' / 'lowrank_ft' / 'demo' / 'model')!r}\n"
        f"assert main(['convert', model, '--rank', '16', '--method', 'svd', '--output-dir', {str(tmp_path / 'out')!r}]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_version_is_said_once():
    import importlib.metadata

    import lowrank_ft

    assert importlib.metadata.version("lowrank-ft") == lowrank_ft.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {lowrank_ft.__version__}" in changelog or "## Unreleased" in changelog
