"""What is written and pushed holds nothing that belongs to the machine or its user alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
)

import lowrank_ft
from lowrank_ft import LowRankConfig
from lowrank_ft.checkpoints.companions import companions, copy_companions
from lowrank_ft.console import shown_command
from tests.conftest import DEMO_MODEL
from tests.fake_hub import FakeHub

TOKEN = "hf_test"
SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=100, pad_token_id=0
)
STRAY = ("passwords.txt", "letter.docx", "train.jsonl", "notes.json", "vocab_extra.txt")


@pytest.fixture
def source(tmp_path):
    """A model folder at somebody's home, with files beside the weights that are none of a model's."""
    folder = tmp_path / "home" / "model"
    shutil.copytree(DEMO_MODEL, folder)
    for name in STRAY:
        (folder / name).write_text('{"private": true}')
    (folder / "USE_POLICY.md").write_text("be kind")
    (folder / "LICENSE").write_text("Apache 2.0")
    return folder


def run(*arguments, home: Path, cwd: Path, **env):
    """The command in a fresh process whose home is ``home``."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), **env}
    command = [sys.executable, "-m", "lowrank_ft_cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_clean(files: dict[str, bytes], home: Path):
    for name, data in files.items():
        assert TOKEN.encode() not in data, name
        assert str(home).encode() not in data, name
    assert not set(files) & set(STRAY)


def test_a_pushed_conversion_tells_neither_token_nor_home_nor_strays(source, tmp_path):
    home = tmp_path / "home"
    out = home / "out"
    with FakeHub() as hub:
        env = hub.environment(tmp_path / "hf", token=TOKEN)
        run(
            "convert", source, f"--output-dir={out}", "--rank", "8", "--method", "svd", "--token", TOKEN,
            "--push-to-hub", "--hub-model-id", "me/compact", home=home, cwd=tmp_path, **env,
        )  # fmt: skip
        files = hub.files("me/compact")
    assert_clean(files, home)
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "USE_POLICY.md"} <= set(files)
    assert b"--rank 8" in files["README.md"]
    local = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "config.json"}
    assert_clean(local, home)  # config.json names the folder, for later guided training, and a push takes it out
    assert TOKEN.encode() not in (out / "config.json").read_bytes()
    run(
        "convert", source, "--output-dir", out, "--rank", "8", "--method", "svd", "--overwrite", home=home, cwd=tmp_path
    )


def test_push_says_what_it_uploads_and_leaves_strangers_here(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    lowrank_ft.convert(model, rank=8)
    lowrank_ft.save_compact(model, tmp_path / "compact", companions_from=source)
    (tmp_path / "compact" / "passwords.txt").write_text("private")
    with FakeHub() as hub:
        env = hub.environment(tmp_path / "hf", token=TOKEN)
        done = run("push", tmp_path / "compact", "--repo-id", "me/x", home=tmp_path, cwd=tmp_path, **env)
        assert "passwords.txt" not in hub.files("me/x")
    assert "uploading to me/x" in done.stderr
    assert "  model.safetensors  " in done.stderr
    assert "not uploaded: passwords.txt" in done.stderr


def test_a_pushed_record_names_no_folder_and_no_private_text(source, tmp_path):
    """In the record stands what the folder is called, which looks like a Hub id, and text as it was named."""
    model = AutoModelForCausalLM.from_pretrained(source)
    lowrank_ft.convert(model, rank=8)
    calibration = {"source": "private/chats.jsonl, me/chats, private/b.txt", "tokens": 64}
    for name, base in (("local", str(source)), ("public", "me/dense")):
        record = {"format_version": 1, "base_model": base.removeprefix(f"{source.parent}/"), "calibration": calibration}
        lowrank_ft.save_compact(model, tmp_path / name, base_model=base, companions_from=source)
        (tmp_path / name / "conversion.json").write_text(json.dumps(record))
    (tmp_path / "public" / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data", "notes.txt"):
        (tmp_path / "public" / "onnx" / name).write_text("graph")
    with FakeHub() as hub:
        env = hub.environment(tmp_path / "hf", token=TOKEN)
        for name in ("local", "public"):
            run("push", name, "--repo-id", f"me/{name}", home=tmp_path, cwd=tmp_path, **env)
        local, public = (json.loads(hub.files(f"me/{name}")["conversion.json"]) for name in ("local", "public"))
        files = hub.files("me/public")
    assert "base_model" not in local
    assert public["base_model"] == "me/dense"
    assert [r["calibration"]["source"] for r in (local, public)] == ["chats.jsonl, me/chats, b.txt"] * 2
    assert {name for name in files if name.startswith("onnx/")} == {"onnx/model.onnx", "onnx/model.onnx.data"}


def test_a_pushed_adapter_does_not_name_the_local_base(source, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), LowRankConfig(r=8))
    model.save_pretrained(tmp_path / "adapter")
    assert str(source) in (tmp_path / "adapter" / "adapter_config.json").read_text()
    with FakeHub() as hub:
        env = hub.environment(tmp_path / "hf", token=TOKEN)
        run("push", tmp_path / "adapter", "--repo-id", "me/adapter", home=tmp_path / "home", cwd=tmp_path, **env)
        files = hub.files("me/adapter")
    assert_clean(files, tmp_path / "home")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None


def test_the_card_of_a_pushed_adapter_keeps_the_words_that_are_no_paths(source, tmp_path):
    (tmp_path / "model").symlink_to(source)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), LowRankConfig(r=8))
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "model"}))
    header = "---\nbase_model: model\nlicense: mit\ntags:\n- base_model:adapter:model\n- lora\n---\n"
    (tmp_path / "adapter" / "README.md").write_text(f"{header}\n# Help\n\nThis model answers questions.\n")
    with FakeHub() as hub:
        env = hub.environment(tmp_path / "hf", token=TOKEN)
        run("push", "adapter", "--repo-id", "me/adapter", home=tmp_path / "home", cwd=tmp_path, **env)
        card = ModelCard(hub.files("me/adapter")["README.md"].decode())
    assert card.data.to_dict() == {"license": "mit", "tags": ["lora"]}
    assert card.text.strip() == "# Help\n\nThis model answers questions."


def test_links_out_of_a_checkpoint_are_not_followed(source, tmp_path):
    (tmp_path / "id_rsa").write_text("private key")
    (source / "merges.txt").symlink_to(tmp_path / "id_rsa")
    (source / "NOTICE").symlink_to(source / "LICENSE")
    (tmp_path / "target").mkdir()
    with pytest.warns(UserWarning, match=r"merges\.txt is a link that leads out of its folder"):
        copy_companions(source, tmp_path / "target")
    copied = {p.name for p in (tmp_path / "target").iterdir()}
    assert "merges.txt" not in copied
    assert {"NOTICE", "LICENSE", "tokenizer.json"} <= copied
    assert not copied & set(STRAY)


def test_the_hubs_cache_links_to_its_own_blobs(tmp_path):
    blobs, snapshot = tmp_path / "models--me--x" / "blobs", tmp_path / "models--me--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert companions(snapshot) == ["tokenizer.json"]


def test_a_training_checkpoint_that_was_moved_takes_nothing_from_around_it(tmp_path):
    """Two levels above a moved checkpoint lies anything; a run's folder has run.json."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    lowrank_ft.convert(model, rank=8)
    checkpoint = tmp_path / "desk" / "moved" / "step-00000001"
    checkpoint.mkdir(parents=True)
    model.config.save_pretrained(checkpoint)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"},
        checkpoint / "model.safetensors",
    )
    (checkpoint / "trainer_state.json").write_text('{"must_match": {}}')
    for name in (*STRAY, "LICENSE"):
        (tmp_path / "desk" / name).write_text("private")
    run("export", checkpoint, "--output-dir", tmp_path / "out", home=tmp_path, cwd=tmp_path)
    assert not {p.name for p in (tmp_path / "out").iterdir()} & {*STRAY, "LICENSE"}


def test_a_checkpoint_of_transformers_trainer_exports(tmp_path):
    """Both trainers write a trainer_state.json."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    lowrank_ft.convert(model, rank=8)
    model.save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    run("export", tmp_path / "checkpoint-1", "--output-dir", tmp_path / "out", home=tmp_path, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["convert", "m", "--token", "x", "--rank", "8"], "p convert m --rank 8"),
        (["convert", "m", "--token=x", "--rank=8"], "p convert m --rank=8"),
        (["--output-dir=/home/me/out"], "p --output-dir=out"),
        (["--output-dir", "~/out", "../m", "--calibration-tokens", "9"], "p --output-dir out m --calibration-tokens 9"),
        (["--model", "hf_abc", "--hub_token", "x", "y"], "p --model y"),
    ],
)
def test_a_recorded_command_holds_no_secret_and_no_folder(arguments, shown):
    assert shown_command("p", arguments) == shown


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_for_classification_is_exported_with_its_head_and_its_tokenizer(kind, tmp_path):
    base = tmp_path / "base"
    make = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
        "bert": lambda: BertForPreTraining(BertConfig(**SMALL)),
    }[kind]
    make().save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(base)
    dense = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    dense.config.pad_token_id = 0
    adapted = get_peft_model(dense, LowRankConfig(r=8, task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(1, 90, (2, 7))
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", "--output-dir", tmp_path / "out", home=tmp_path, cwd=tmp_path)
    compact = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    compact.config.pad_token_id = 0
    with torch.no_grad():
        torch.testing.assert_close(compact.eval()(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "mine"
