"""Push to and pull from a Hub on loopback, with the real client."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import save_file
from transformers import NomicBertConfig, NomicBertModel

import lowrank_ft
from lowrank_ft.checkpoints.push import push
from lowrank_ft.errors import CheckpointError, ConfigError
from lowrank_ft.export import save_compact
from lowrank_ft.nn.forms import stored_as
from tests.conftest import DEMO_MODEL, tiny_llama
from tests.fake_hub import FakeHub

BERT = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def online(hub, tmp_path):
    """Run Python in a fresh process that knows no Hub but this one."""

    def run(*arguments, check=True, token="hf_test"):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "hf", token=token)}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def test_a_push_that_was_killed_goes_on(tmp_path):
    """The Hub keeps whole files that have arrived; the repository shows nothing before all have."""
    model = tiny_llama(num_hidden_layers=8)
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact", max_shard_size="10KB")
    shards = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "compact").glob("*.safetensors")}
    assert len(shards) > 12  # the client sends five at a time
    with FakeHub(lfs=True) as hub:
        command = [
            sys.executable,
            "-m",
            "lowrank_ft_cli.main",
            "push",
            str(tmp_path / "compact"),
            "--repo-id",
            "me/tiny",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "hf")}
        started: list[subprocess.Popen] = []

        def kill_at_the_second_file() -> None:
            if any(r.method == "PUT" for r in hub.requests):
                started[0].kill()

        hub.on_upload(kill_at_the_second_file)
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        assert started[0].wait() == -signal.SIGKILL
        hub.on_upload(lambda: None)
        assert "config.json" not in hub.files("me/tiny")

        subprocess.run(command, env=env, check=True, capture_output=True)
        # A file that was cut off in the middle was refused, and does not count.
        log = [r for r in hub.requests if r.status == 200]
        paths = [r.path for r in log if r.method == "PUT" or r.path.endswith("/objects/batch")]
        second = max(i for i, path in enumerate(paths) if path.endswith("/objects/batch"))
        before, after = ({p.rpartition("/")[2] for p in part} for part in (paths[1:second], paths[second + 1 :]))
        assert len(before) >= 2
        assert after == set(shards.values()) - before
        files = hub.files("me/tiny")
        assert {n: hashlib.sha256(files[n]).hexdigest() for n in shards} == shards


@pytest.fixture
def command(online):
    return lambda *arguments, **kwargs: online("-m", "lowrank_ft_cli.main", *arguments, **kwargs)


def test_push_and_pull(hub, online, command, tmp_path, ids):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    with torch.no_grad(), stored_as(model, "pivoted"):
        logits = model(ids).logits
    save_compact(model, tmp_path / "compact", base_model=str(DEMO_MODEL), companions_from=DEMO_MODEL)
    (tmp_path / "compact" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "compact" / "checkpoints" / "step-00000001" / "optimizer.safetensors").write_bytes(b"x")
    (tmp_path / "compact" / "old.bin").write_bytes(b"pickle")

    done = command("push", tmp_path / "compact", "--repo-id", "me/tiny-lowrank", "--private")
    assert done.stdout.strip().startswith(hub.endpoint)
    assert hub.is_private("me/tiny-lowrank")
    files = hub.files("me/tiny-lowrank")
    assert {"config.json", "model.safetensors", "lowrank_plugin.py", "README.md", "tokenizer.json"} <= set(files)
    assert not any(name.endswith(".bin") or name.startswith("checkpoints") for name in files)
    assert str(DEMO_MODEL) not in files["config.json"].decode()  # a path of this machine is nobody's business
    assert str(DEMO_MODEL) in (tmp_path / "compact" / "config.json").read_text()
    assert 'from_pretrained("me/tiny-lowrank")' in files["README.md"].decode()
    assert files["model.safetensors"] == (tmp_path / "compact" / "model.safetensors").read_bytes()

    torch.save(ids, tmp_path / "ids.pt")
    pull = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/tiny-lowrank"{extra})
with torch.no_grad():
    torch.save(model(torch.load("ids.pt")).logits, "{out}")
"""
    online("-c", pull.format(before="import lowrank_ft", extra="", out="a.pt"))
    online("-c", pull.format(before="", extra=", trust_remote_code=True", out="b.pt"))
    assert torch.equal(torch.load(tmp_path / "a.pt"), logits)
    assert torch.equal(torch.load(tmp_path / "b.pt"), logits)


def test_a_loaded_model_pushes_itself_whole(hub, online, tmp_path, ids):
    """By transformers' own push_to_hub; also where the stock class renames and merges weights as it saves."""
    torch.manual_seed(0)
    nomic = NomicBertModel(NomicBertConfig(**BERT))
    for name, model in (("llama", tiny_llama()), ("nomic", nomic.eval())):
        lowrank_ft.convert(model, rank=8)
        save_compact(model, tmp_path / name)
        with torch.no_grad(), stored_as(model, "pivoted"):
            torch.save(model(ids)[0], tmp_path / f"{name}.pt")
    torch.save(ids, tmp_path / "ids.pt")
    online(
        "-c",
        """
import lowrank_ft, torch
from transformers import AutoModel, AutoModelForCausalLM
for name, auto in (("llama", AutoModelForCausalLM), ("nomic", AutoModel)):
    auto.from_pretrained(name).push_to_hub(f"me/{name}")
    pulled, info = auto.from_pretrained(f"me/{name}", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(pulled(torch.load("ids.pt"))[0], torch.load(f"{name}.pt")), name
""",
    )
    for name in ("llama", "nomic"):
        local = (tmp_path / name / "model.safetensors").read_bytes()
        assert json.loads(hub.files(f"me/{name}")["config.json"])["quantization_config"]["quant_method"] == "lowrank"
        assert len(hub.files(f"me/{name}")["model.safetensors"]) == len(local)


def test_a_checkpoint_on_the_hub_changes_its_form(hub, command, tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact")
    command("push", tmp_path / "compact", "--repo-id", "me/x")
    command("export", "me/x", "--form", "factors", "--output-dir", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["format_version"] == 1
    failed = command("export", "me/nothing", "--output-dir", tmp_path / "none", check=False)
    assert "me/nothing is neither a folder here nor a model on the Hub" in failed.stderr


@pytest.mark.parametrize("extra", ["", ", trust_remote_code=True"], ids=["package", "plugin"])
def test_a_compact_model_in_the_cache_needs_no_hub(hub, online, command, tmp_path, extra):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact")
    command("push", tmp_path / "compact", "--repo-id", "me/x")
    load = f"""
{"" if extra else "import lowrank_ft"}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/x"{extra})
print(sum(type(m).__name__ == "LowRankLinear" for m in model.modules()))
"""
    assert online("-c", load).stdout.split() == ["14"]
    seen = len(hub.requests)
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
    assert online("-c", offline + load).stdout.split() == ["14"]
    assert len(hub.requests) == seen


def test_branches_and_pull_requests(hub, command, tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact")
    pull_request = ["push", tmp_path / "compact", "--repo-id", "me/x", "--create-pr"]
    done = command(*pull_request, check=False)
    assert done.returncode == 1
    assert "error: there is no me/x on the Hub that your token may see, to open a pull request for" in done.stderr
    command("push", tmp_path / "compact", "--repo-id", "me/x", "--revision", "v1", "--commit-message", "First")
    assert "model.safetensors" in hub.files("me/x", "v1")
    assert "model.safetensors" not in hub.files("me/x")
    assert hub.commits("me/x")[-1].message == "First"
    done = command(*pull_request)
    assert done.stdout.strip() == f"{hub.endpoint}/me/x/discussions/1"
    assert "model.safetensors" not in hub.files("me/x")
    assert "model.safetensors" in hub.files("me/x", "refs/pr/1")


def test_a_push_leaves_no_weights_of_an_earlier_one(hub, online, command, tmp_path):
    """transformers prefers a single file to shards, and an adapter to a model; what others put there stays."""
    own = {"notes.md", "model-Q4_K_M.gguf", "picture.png", "model.fp16.safetensors", "model/old.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "seed" / "model").mkdir(parents=True)
    for name in own | adapter:
        (tmp_path / "seed" / name).write_text("{}")
    hub.add_folder("me/x", tmp_path / "seed")
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "single")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_compact(model, tmp_path / "shards", max_shard_size="20KB")
    pushed = {}
    for name in ("single", "shards", "single"):
        done = command("push", tmp_path / name, "--repo-id", "me/x")
        weights = {p.name for p in (tmp_path / name).glob("model*")}
        found = hub.files("me/x")
        assert {n for n in found if n.startswith(("model", "adapter"))} - own == weights
        assert own <= set(found)
        gone = ", ".join(sorted(pushed.get("weights", adapter)))
        assert f"deleting there, because they are of an earlier push: {gone}\n" in done.stderr
        pushed["weights"] = weights
        load = """
import sys, lowrank_ft, torch
from transformers import AutoModelForCausalLM
there, here = (AutoModelForCausalLM.from_pretrained(name).lm_head.weight for name in ("me/x", sys.argv[1]))
assert torch.equal(there, here)
"""
        online("-c", load, tmp_path / name)
    assert "deleting" not in command("push", tmp_path / "single", "--repo-id", "me/x").stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has an adapter_config.json and no adapter_model.safetensors; save the adapter again"),
        (["adapter_model.bin"], "holds its weights as pickle only (adapter_model.bin)"),
        (["adapter_model.safetensors"], "adapter_model.safetensors is truncated or corrupt"),
    ],
)
def test_an_adapter_without_readable_weights_is_not_pushed(files, message, tmp_path):
    for name in ("adapter_config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        push(tmp_path, "me/x")


@pytest.mark.parametrize("more", [{"revision": "v1"}, {"private": True}])
def test_a_pull_request_needs_a_repository_and_its_default_branch(more, tmp_path):
    message = rf"default branch of a repository that exists; leave --{next(iter(more))} or --create-pr out"
    with pytest.raises(ConfigError, match=message):
        push(tmp_path, "me/x", create_pr=True, **more)


def test_the_licence_of_the_base_model_is_inherited(hub, command, tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: other\nlicense_name: kind\ntags: [x]\n---\nHello\n")
    hub.add_folder("me/dense", tmp_path / "dense")
    svd = ["--rank", "8", "--method", "svd", "--output-dir"]
    command("convert", "me/dense", *svd, "compact")
    fields = metadata_load(tmp_path / "compact" / "README.md")
    assert (fields["license"], fields["license_name"]) == ("other", "kind")
    assert (fields["base_model"], fields["base_model_relation"]) == ("me/dense", "quantized")
    assert "x" not in fields["tags"]
    card = (tmp_path / "compact" / "README.md").read_text()
    revision = json.loads((tmp_path / "compact" / "config.json").read_text())["quantization_config"]["base_revision"]
    assert f"| revision of the base model | {revision} |" in card
    command("export", "compact", "--form", "factors", "--output-dir", "again")
    assert metadata_load(tmp_path / "again" / "README.md")["license"] == "other"
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: [\n---\n")  # a damaged card is no reason to stop
    command("convert", tmp_path / "dense", *svd, "of-damaged")
    assert "license" not in metadata_load(tmp_path / "of-damaged" / "README.md")


def test_plan_and_convert_a_model_on_the_hub(hub, command, tmp_path):
    hub.add_folder("me/dense", DEMO_MODEL)
    out = command("plan", "me/dense", "--param-ratio", "0.6").stdout
    assert "param ratio 0.59" in out or "param ratio 0.60" in out
    served = [r for r in hub.requests if r.path.endswith("model.safetensors") and r.method == "GET"]
    size = (DEMO_MODEL / "model.safetensors").stat().st_size
    assert served
    assert sum(r.body_bytes for r in served) < size / 10  # headers only

    command(
        "convert", "me/dense", "--param-ratio", "0.6", "--method", "svd", "--output-dir", "compact", "--push-to-hub",
        "--hub-model-id", "me/compact",
    )  # fmt: skip
    entry = json.loads(hub.files("me/compact")["config.json"])["quantization_config"]
    assert entry["base_model"] == "me/dense"
    assert entry["base_revision"] == hub.commits("me/dense")[-1].sha
    assert b"base_model: me/dense" in hub.files("me/compact")["README.md"]


def test_what_the_hub_does_not_have(hub, command, tmp_path):
    cases = [
        (["plan", "me/none", "--rank", "8"], "me/none is neither a folder here nor a model on the Hub"),
        (["plan", "me/dense", "--rank", "8", "--revision", "v9"], "me/dense has no revision 'v9' on the Hub"),
        (["convert", "me/pickles", "--rank", "8", "--output-dir", "o"], "me/pickles holds its weights as pickle only"),
        (["plan", "me/data", "--rank", "8"], "me/data has no config.json; it is not a transformers model"),
    ]
    hub.add_folder("me/dense", DEMO_MODEL)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_bytes((DEMO_MODEL / "config.json").read_bytes())
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    hub.add_folder("me/pickles", tmp_path / "pickles")
    (tmp_path / "data").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "data" / "model.safetensors")
    hub.add_folder("me/data", tmp_path / "data")
    for arguments, message in cases:
        done = command(*arguments, check=False)
        assert done.returncode == 1
        assert next(line for line in done.stderr.splitlines() if line.startswith("error: ")).startswith(
            f"error: {message}"
        )
        assert not (tmp_path / "o").exists()
    assert not any(r.path.endswith(".bin") and r.method == "GET" for r in hub.requests)


def test_nothing_private_goes_to_a_public_repository(hub, command, tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact")
    (tmp_path / "first").mkdir()
    for name, private in (("public", False), ("private", True)):
        hub.add_folder(f"me/{name}", tmp_path / "first", private=private)
    done = command("push", tmp_path / "compact", "--repo-id", "me/public", "--private", check=False)
    assert done.returncode == 1
    assert "error: me/public is public already, and --private is for a new repository; make it private" in done.stderr
    assert hub.files("me/public") == {}
    command("push", tmp_path / "compact", "--repo-id", "me/private", "--private")
    assert "model.safetensors" in hub.files("me/private")


def test_pushing_needs_a_whole_checkpoint_and_a_token(hub, command, tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    save_compact(model, tmp_path / "compact")
    done = command("push", tmp_path / "compact", "--repo-id", "me/x", token="", check=False)
    assert done.returncode == 1
    assert "error: pushing to me/x failed" in done.stderr
    assert "run hf auth login" in done.stderr
    data = (tmp_path / "compact" / "model.safetensors").read_bytes()
    (tmp_path / "compact" / "model.safetensors").write_bytes(data[:1000])
    done = command("push", tmp_path / "compact", "--repo-id", "me/x", check=False)
    assert "truncated or corrupt" in done.stderr
    assert not [r for r in hub.requests if "/commit/" in r.path]
