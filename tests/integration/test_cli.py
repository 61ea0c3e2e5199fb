"""The command line as users meet it, the wrong inputs first.

Starting torch and transformers takes seconds, so what does not need a process of its own calls ``main`` in this one.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from lowrank_ft_cli.commands import COMMANDS, PASS_ON
from lowrank_ft_cli.main import build_parser, main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowrank_ft
from tests.conftest import DEMO_MODEL


@pytest.fixture
def dense(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return shutil.copytree(DEMO_MODEL, tmp_path / "dense")


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def corrupt_header(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:40] = b"x" * 32
    (folder / "model.safetensors").write_bytes(data)


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_nan(folder):
    def change(tensors):
        tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")

    edit_weights(folder, change)


def with_infinite_norm(folder):
    def change(tensors):
        tensors["model.norm.weight"][0] = float("inf")

    edit_weights(folder, change)


def without_a_tensor(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))


def with_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


DAMAGE = [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "is no valid JSON"),
    (lambda f: (f / "config.json").write_text('{"model_type": "zebra"}'), "model type `zebra`"),
    (truncate, "model.safetensors is truncated or corrupt"),
    (corrupt_header, "model.safetensors is truncated or corrupt"),
    (
        pickle_only,
        "pickle only (pytorch_model.bin), which can run code when it is opened; it is refused. To convert it",
    ),
    (with_nan, "model.layers.3.mlp.up_proj.weight (384, 128) holds 1 NaN or infinite values"),
    (with_infinite_norm, "model.norm.weight (128,) holds 1 NaN or infinite values"),
    (without_a_tensor, "lacks 1 weights of LlamaForCausalLM, the first being model.layers.1.self_attn.k_proj.weight"),
    (with_missing_shard, "lacks model-00001-of-00002.safetensors, which its index names"),
]


def assert_one_line_error(done, message, code=1):
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "lowrank-ft"))]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m[:30] for _, m in DAMAGE])
def test_damaged_checkpoints(dense, tmp_path, command, damage, message):
    damage(dense)
    done = command("convert", dense, "--rank", "16", "--method", "svd", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


ARGUMENTS = [
    (["--rank", "0"], "rank 0 for model.layers.0.self_attn.q_proj is not positive"),
    (["--rank", "-4"], "rank -4 for"),
    (["--rank", "500"], "rank 500 exceeds min(out_features, in_features)=128 for model.layers.0.self_attn.q_proj"),
    (["--rank", "128"], "every one of the 35 targeted linears stays dense; lower the rank"),
    (["--param-ratio", "1.5"], "param ratio 1.5 is out of range"),
    (["--param-ratio", "80"], "it must be above 0 and at most 1 (did you mean 0.8?)"),
    (["--param-ratio", "150%"], "param ratio 1.5 is out of range"),
    (["--rank", "8", "--target-modules", "q_proj,v_proj"], "put spaces between them: q_proj v_proj"),
    (["--energy", "0"], "energy 0.0 is out of range"),
    ([], "give exactly one size: rank, param_ratio or energy (--rank, --param-ratio, --energy); found none"),
    (["--rank", "8", "--param-ratio", "0.5"], "found rank and param_ratio"),
    (["--rank", "8", "--target-modules", "q_prj"], "'q_prj' matches no linear of the model; did you mean q_proj"),
    (["--rank", "8", "--exclude-modules", "zzz"], "the linears are q_proj, k_proj"),
    (["--rank", "8", "--rank-pattern", "q_proj"], "'q_proj' is not of the form PATTERN=N"),
    (["--rank", "8", "--rank-pattern", "zzz=4"], "'zzz' matches none of the 35 targeted linears"),
    (["--rank", "8", "--target-modules", "lm_head"], "lm_head shares its weight"),
    (["--rank", "8", "--method", "magic"], "--method 'magic' is unknown; choose one of svd"),
    (["--rank", "8", "--device", "abacus"], "--device abacus cannot be used"),
    (["--rank", "8", "--push-to-hub"], "--push-to-hub needs --hub-model-id"),
]


@pytest.mark.parametrize(("flags", "message"), ARGUMENTS, ids=[" ".join(a) or "none" for a, _ in ARGUMENTS])
def test_wrong_arguments(tmp_path, flags, message, command):
    method = [] if "--method" in flags else ["--method", "svd"]
    done = command("convert", DEMO_MODEL, *flags, *method, "--output-dir", tmp_path / "out")
    assert_one_line_error(done, message)
    assert list(tmp_path.iterdir()) == []


def test_one_line_and_exit_code_reach_the_shell(tmp_path, cli):
    done = cli("convert", DEMO_MODEL, "--rank", "0", "--output-dir", tmp_path / "out", check=False)
    assert_one_line_error(done, "is not positive")
    done = cli("convert", DEMO_MODEL, "--rank", "0", "--output-dir", tmp_path / "out", "--debug", check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("flags", [["--ranks", "4"], ["--rank", "four"], ["--rank"]])
def test_wrong_usage_is_exit_code_two(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(["convert", str(DEMO_MODEL), *flags, "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith("; see lowrank-ft convert --help\n")
    assert error.count("\n") == 1


def test_a_misspelt_option_is_told_what_it_may_have_meant(capsys):
    for arguments in (["plan", "model", "--param-ration", "0.6"], ["tokenize", "text", "--tokenzier", "x"]):
        with pytest.raises(SystemExit):
            main(arguments)
    plan, tokenize = capsys.readouterr().err.splitlines()
    assert plan == "error: there is no option --param-ration (did you mean --param-ratio?); see lowrank-ft plan --help"
    assert "there is no option --tokenzier (did you mean --tokenizer?)" in tokenize


def test_models_that_do_not_exist(command, tmp_path):
    for name in ("./nothing", f"{tmp_path}/nothing", "a/b/c"):
        done = command("plan", name, "--rank", "8")
        assert_one_line_error(done, "there is no folder")


def test_an_output_folder_that_is_taken(command, dense, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    done = command("convert", dense, "--rank", "16", "--output-dir", out)
    assert_one_line_error(done, "is not empty; name another folder, or add --overwrite")
    done = command("convert", dense, "--rank", "16", "--output-dir", out, "--overwrite")
    assert_one_line_error(done, "holds thesis.txt, and --overwrite replaces nothing but checkpoints")
    done = command("convert", dense, "--rank", "16", "--output-dir", dense, "--overwrite")
    assert_one_line_error(done, "holds the source")
    assert (out / "thesis.txt").exists()


def test_a_full_disk_leaves_nothing(dense, tmp_path):
    """No file may grow beyond half a megabyte: the weights do not fit."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "from lowrank_ft_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["convert", str(dense), "--rank", "16", "--method", "svd", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert_one_line_error(done, "GiB are free there. Nothing was left behind")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(dense, tmp_path, number):
    """Interrupted while the weights are being written."""
    code = (
        # A shell starts background jobs with SIGINT ignored, and tests may be one.
        "import signal, sys, time, transformers; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # nohup, too
        "from lowrank_ft_cli.main import main;"
        "save = transformers.PreTrainedModel.save_pretrained;"
        "transformers.PreTrainedModel.save_pretrained = "
        "lambda self, folder, **k: (save(self, folder, **k), print('halfway', flush=True), time.sleep(60));"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["convert", str(dense), "--rank", "16", "--method", "svd", "--output-dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "halfway\n"
    assert len(list(tmp_path.glob(".out.*.partial/model.safetensors"))) == 1
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: interrupted; nothing was left behind" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_nohup_is_respected():
    code = (
        "import signal; from lowrank_ft_cli.main import main;"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); main(['help']);"
        "main(['plan', 'nowhere', '--rank', '8']); assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_whole_way(dense, tmp_path, command):
    compact, merged = tmp_path / "compact", tmp_path / "merged"
    plan = json.loads(command("plan", dense, "--param-ratio", "0.6", "--json").stdout)
    assert plan["totals"]["param_ratio"] <= 0.6
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    flags = ["--plan", tmp_path / "plan.json", "--method", "svd"]
    done = command("convert", dense, *flags, "--output-dir", compact)
    assert done.stdout == f"{compact}\n"
    assert "param ratio 0.599" in done.stderr or "param ratio 0.600" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(compact)
    assert model.dtype == torch.bfloat16
    assert {n: layer.rank for n, layer in lowrank_ft.nn.lowrank_layers(model)} == {
        p["name"]: p["rank"] for p in plan["linears"]
    }
    command("merge", compact, "--output-dir", merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())

    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 300)
    flags = ["--data", text, "--block-size", "64", "--json"]
    results = json.loads(command("eval", compact, "--baseline", merged, *flags).stdout)
    assert results["model"]["loss"] == pytest.approx(results["baseline"]["loss"], rel=0.02)
    assert results["model"]["bytes"] < 0.72 * results["baseline"]["bytes"]
    table = command("eval", compact, "--baseline", dense, "--data", text, "--block-size", "64").stdout
    assert "difference" in table
    assert "tokens/s" in table

    again = command("convert", compact, "--rank", "8", "--output-dir", tmp_path / "x")
    assert_one_line_error(again, "is compact already")
    again = command("merge", dense, "--output-dir", tmp_path / "x")
    assert_one_line_error(again, "is dense already")


def test_plan_reads_headers_and_not_weights(dense, command):
    """The weights are all NaN, and a plan does not notice; by energy it has to."""

    def spoil(tensors):
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    edit_weights(dense, spoil)
    out = command("plan", dense, "--rank", "32").stdout
    assert "model.layers.*.mlp.up_proj" in out
    assert "param ratio" in out
    done = command("plan", dense, "--energy", "0.9")
    assert_one_line_error(done, "NaN")


def test_a_model_that_reads_a_weight_as_a_matrix(command, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=20)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    svd = ["--rank", "6", "--method", "svd"]
    flags = [*svd, "--output-dir", tmp_path / "out"]
    done = command("convert", tmp_path / "mamba", *flags, "--target-modules", "in_proj", "dt_proj")
    assert_one_line_error(done, "ran before the conversion and fails after it")
    assert not (tmp_path / "out").exists()
    done = command("convert", tmp_path / "mamba", *flags)  # by default it is left out, and that is said
    assert done.returncode == 0
    assert "mixer.dt_proj stays dense: 11% of the parameters (MambaMixer reads their weights itself)" in done.stderr


def test_what_is_only_used_at_the_end_is_checked_at_the_start(command, tmp_path):
    convert = ["convert", DEMO_MODEL, "--rank", "16", "--output-dir", tmp_path / "out"]
    done = command(*convert, "--max-shard-size", "huge")
    assert_one_line_error(done, "--max-shard-size 'huge' is no size; write it as 5GB or 500MB")
    done = command(*convert, "--push-to-hub", "--hub-model-id", "not a name!")
    assert_one_line_error(done, "--hub-model-id 'not a name!'")


def test_eval_refuses_what_it_cannot_measure(command, minilm, tmp_path):
    done = command("eval", minilm, "--data", tmp_path / "x.txt")
    assert_one_line_error(done, "is a BertModel, and this trains causal language models")
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n')
    done = command("eval", DEMO_MODEL, "--data", tmp_path / "x.jsonl")
    assert_one_line_error(done, "has no column 'text'; it has body")


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "numpy"}


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from lowrank_ft_cli.main import main\n"
        "for name in ([], ['plan'], ['convert'], ['eval'], ['report'], ['tokenize'], ['export']):\n"
        "    try: main([*name, '--help'])\n"
        "    except SystemExit as e: assert e.code == 0\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time() - start, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in build_parser().commands:
        assert f"    {command} " in done.stdout
    assert "--calibration-data DATA" in done.stdout


def test_what_is_misspelt_is_refused_before_torch_is_loaded(python, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    none, full, model = tmp_path / "none" / "at" / "all", tmp_path / "full", str(DEMO_MODEL)
    lines = [
        ["plan", f"{none}", "--rank", "8"],
        ["convert", f"{none}", "--rank", "8"],
        ["convert", model, "--rank", "8", "--output-dir", f"{full}"],
        ["merge", f"{none}"],
        ["merge", model, "--output-dir", f"{full}"],
        ["export", model, "--output-dir", f"{full}"],
        ["eval", model, "--data", "x", "--baseline", f"{none}"],
    ]
    code = (
        "import sys\nfrom lowrank_ft_cli.main import main\n"
        f"print([main(line) for line in {lines!r}], {HEAVY} & set(sys.modules))"
    )
    done = python("-c", code)
    assert done.stdout == f"{[1] * len(lines)} set()\n"
    told = done.stderr.splitlines()
    assert [line.startswith(f"error: there is no folder {none}") for line in told] == [
        True,
        True,
        False,
        True,
        False,
        False,
        True,
    ]
    assert sum(line.startswith(f"error: --output-dir {full} is not empty") for line in told) == 3


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(PASS_ON)))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "flag"), [("finetune", "--guide"), ("pretrain", "--preset")])
def test_the_recipes_explain_themselves(cli, name, flag):
    """Their parser is that of transformers, which formats help texts with %."""
    done = cli(name, "--help")
    assert done.returncode == 0, done.stderr
    assert flag in done.stdout


def test_help_without_a_flag(capsys):
    assert (main(["help"]), main([])) == (0, 2)
    assert capsys.readouterr().out.count("make a compact checkpoint") == 2


def test_env_says_what_is_installed_and_not_where(command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(importlib.metadata, "version", lambda name, known=importlib.metadata.version: known(
        "no-such-package" if name == "bitsandbytes" else name))  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in command("env").stdout.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["bitsandbytes"] == "not installed"
    assert lines["devices"].startswith("cpu (")
    assert lines["python"].endswith(platform.python_version())
    shown = " ".join(lines.values())
    assert not [secret for secret in ("hf_secret", "/", "\\", platform.node()) if secret in shown]


def test_env_of_an_accelerator(command, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "cuda:0 (GPU 0, CUDA 12.8), cuda:1 (GPU 1, CUDA 12.8)" in command("env").stdout


def test_the_output_has_a_name_where_none_is_given(command, tmp_path, monkeypatch):
    """The sentence on the project's card: convert MODEL --rank N. Hyphens and underscores mean the same."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, tmp_path / "models" / "tiny")
    assert command("convert", "models/tiny", "--rank", "8", "--method", "svd").stdout.strip() == "tiny-lowrank"
    assert command("merge", "tiny-lowrank").stdout.strip() == "tiny-lowrank-merged"
    again = command("convert", "models/tiny", "--rank", "8", "--method", "svd")
    assert "--output-dir tiny-lowrank is not empty" in again.stderr
    assert (
        command("convert", "models/tiny", "--param_ratio=0.5", "--method", "svd", "--output_dir", "b").returncode == 0
    )
    assert (tmp_path / "b" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("typed", "wanted"), [("lowrank-ft con", "convert"), ("lowrank-ft merge m --max", "--max-shard-size")]
)
def test_the_shell_completes_commands_and_flags(typed, wanted, tmp_path):
    """As argcomplete's shell function asks: the line in the environment, the answer on file descriptor 8."""
    answer = tmp_path / "answer"
    script = f"exec 8>{answer}; exec {sys.executable} -c 'from lowrank_ft_cli.main import main; main()' 9>&1"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=60)
    assert answer.read_text().strip() == wanted
