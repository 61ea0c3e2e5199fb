"""``lowrank-ft convert`` with calibration, from flags to a checkpoint that loads elsewhere."""

import json
import re
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import lowrank_ft
from lowrank_ft.conversion.sampling import sample_blocks
from lowrank_ft.demo.text import prose
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.plan import Plan
from tests.conftest import DEMO_MODEL
from tests.integration.test_cli import assert_one_line_error

SHORT = ["--calibration-tokens", "4096", "--method", "anchored", "--refine-epochs", "1", "--distill-epochs", "1"]
NONE = ["--refine-epochs", "0", "--distill-epochs", "0"]

PERPLEXITY = """
import json, math, sys, torch
import lowrank_ft
from transformers import AutoModelForCausalLM, AutoTokenizer
from lowrank_ft.nn import lowrank_layers
folder, text = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(folder)(open(text).read(), return_tensors="pt")["input_ids"][:, : 16 * 256].view(-1, 256)
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss.item()
print(json.dumps({"perplexity": math.exp(loss), "ranks": {n: l.rank for n, l in lowrank_layers(model)}}))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file to calibrate on and one to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    read, held_out = prose()
    (folder / "read.txt").write_text("\n\n".join(read))
    (folder / "held-out.txt").write_text("\n\n".join(held_out))
    return folder


def test_python_converts_as_the_command_does(cli, texts, tmp_path):
    data = ["--calibration-data", texts / "read.txt", "--calibration-tokens", "4096", "--dtype", "float32"]
    cli("convert", DEMO_MODEL, "--param-ratio", "0.6", *data, "--output-dir", tmp_path / "command")
    model = tf.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    calibration = lowrank_ft.load_calibration(model, str(texts / "read.txt"), calibration_tokens=4096)
    lowrank_ft.convert(model, param_ratio=0.6, calibration=calibration)
    lowrank_ft.save_compact(model, tmp_path / "python")
    command, python = (load_file(tmp_path / name / "model.safetensors") for name in ("command", "python"))
    assert command.keys() == python.keys()
    for name in command:
        torch.testing.assert_close(python[name], command[name], rtol=1e-3, atol=1e-4)


def test_the_allocation_is_not_a_matter_of_the_data(texts):
    model = tf.AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with pytest.raises(ConfigError, match="give it to convert, not to load_calibration"):
        lowrank_ft.load_calibration(model, str(texts / "read.txt"), allocation="uniform")


def test_a_calibrated_checkpoint(cli, python, texts, tmp_path):
    stores = tmp_path / "stores"
    stores.mkdir()
    flags = ["--calibration-data", texts / "read.txt", *SHORT, "--allocation", "loss", "--param-ratio", "0.6"]
    done = cli("convert", DEMO_MODEL, *flags, "--activations-dir", stores, "--output-dir", tmp_path / "calibrated")
    assert done.stdout == f"{tmp_path / 'calibrated'}\n"
    assert "\nestimate for this device: " in f"\n{done.stderr}"
    assert "calibration: 4,096 tokens of read.txt, 1,024 of them written by the model\n" in done.stderr
    assert re.search(r"loss on held-out text 0\.\d+ before, 0\.\d+ after", done.stderr)
    assert "Warning" not in done.stderr
    assert list(stores.iterdir()) == []
    cli("convert", DEMO_MODEL, "--method", "svd", "--param-ratio", "0.6", "--output-dir", tmp_path / "plain")

    results = {
        name: json.loads(python("-c", PERPLEXITY, str(folder), str(texts / "held-out.txt")).stdout.splitlines()[-1])
        for name, folder in [("calibrated", tmp_path / "calibrated"), ("plain", tmp_path / "plain")]
    }
    # Two batches train little, and pivoted factors leave little to gain at this size.
    assert results["calibrated"]["perplexity"] < 0.95 * results["plain"]["perplexity"]

    data = json.loads((tmp_path / "calibrated" / "conversion.json").read_text())
    assert data["format_version"] == 1
    assert data["command"].startswith("lowrank-ft convert model --calibration-data read.txt --calibration-tokens 4096")
    assert str(tmp_path) not in json.dumps(data)
    expected = {"method": "anchored", "allocation": "loss", "refine_epochs": 1, "distill_epochs": 1.0}
    assert {k: data[k] for k in expected} == expected
    assert data["calibration"] == {"source": "read.txt", "tokens": 4096}
    assert data["seconds"] > 0
    plan = Plan.from_dict(data["plan"])
    assert plan.ranks == results["calibrated"]["ranks"]
    assert 0.59 < plan.param_ratio <= 0.6
    assert len(set(plan.ranks.values())) > 2
    assert [b["name"] for b in data["blocks"]] == [f"model.layers.{i}" for i in range(5)]
    assert all(0 < b["error_after"] <= b["error_before"] for b in data["blocks"])
    assert set(data["linears"]) == set(plan.ranks)
    assert all(0 < e["output_error"] < e["weight_error"] < 1 for e in data["linears"].values())
    svd = json.loads((tmp_path / "plain" / "conversion.json").read_text())
    assert (svd["method"], svd["calibration"], svd["blocks"]) == ("svd", None, [])


def test_by_default_a_language_model_writes_its_own_text(command, tmp_path):
    flags = ["--rank", "16", "--calibration-block-size", "64", "--seed", "3"]
    done = command(
        "convert", DEMO_MODEL, *flags, *NONE, "--calibration-tokens", "1100", "--output-dir", tmp_path / "plain"
    )
    assert "calibration: 960 tokens of self; 128 more are held out" in done.stderr
    assert json.loads((tmp_path / "plain" / "conversion.json").read_text())["method"] == "activation"


def test_ranks_by_loss_are_planned_edited_and_carried_out(command, texts, tmp_path):
    size = ["--param-ratio", "0.5", "--calibration-data", texts / "read.txt", "--calibration-tokens", "2048"]
    done = command("plan", DEMO_MODEL, "--allocation", "loss", "--json", *size)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert 0.49 < data["totals"]["param_ratio"] <= 0.5
    ranks = [p["rank"] for p in data["linears"]]
    assert len(set(ranks)) > 2
    data["linears"][0]["rank"], data["linears"][1]["rank"] = 5, None
    (tmp_path / "plan.json").write_text(json.dumps(data))
    flags = ["--plan", tmp_path / "plan.json", *size[2:], *NONE]
    done = command("convert", DEMO_MODEL, *flags, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    plan = Plan.from_dict(json.loads((tmp_path / "out" / "conversion.json").read_text())["plan"])
    assert [p.rank for p in plan.linears] == [5, None, *ranks[2:]]
    energy = command("plan", DEMO_MODEL, "--allocation", "energy", "--json", *size)
    assert [p["rank"] for p in json.loads(energy.stdout)["linears"]] != ranks
    done = command("convert", DEMO_MODEL, *flags, "--allocation", "loss", "--output-dir", tmp_path / "x")
    assert_one_line_error(done, "--plan sets all ranks; leave --allocation out")


def test_a_picture_and_a_table_of_allocated_ranks(command, texts):
    flags = ["--calibration-data", texts / "read.txt", "--calibration-tokens", "1024"]
    done = command("plan", DEMO_MODEL, "--allocation", "energy", "--param-ratio", "0.6", *flags)
    assert "calibration: 1,024 tokens of read.txt" in done.stderr
    assert "param ratio 0.6" in done.stdout


def save_encoder(folder):
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(DEMO_MODEL / "tokenizer_config.json", folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(folder)


def test_a_model_that_cannot_write_text(command, texts, tmp_path):
    save_encoder(tmp_path / "bert")
    for number, flags in enumerate([[], ["--distill-epochs", "0"]]):
        done = command("convert", tmp_path / "bert", "--rank", "16", *flags, "--output-dir", tmp_path / f"svd{number}")
        assert done.returncode == 0, done.stderr
        note = "note: a BertModel cannot write its own calibration text, so this is plain SVD; --calibration-data"
        assert done.stderr.count(note) == 1
    assert json.loads((tmp_path / "svd0" / "conversion.json").read_text())["method"] == "svd"
    done = command("convert", tmp_path / "bert", "--rank", "16", "--method", "svd", "--output-dir", tmp_path / "quiet")
    assert "note:" not in done.stderr.replace("note      ", "")
    flags = ["--calibration-data", texts / "held-out.txt", *SHORT, "--allocation", "loss", "--param-ratio", "0.6"]
    done = command("convert", tmp_path / "bert", *flags, "--output-dir", tmp_path / "calibrated")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "calibrated" / "conversion.json").read_text())
    assert data["method"] == "anchored"
    assert [b["name"] for b in data["blocks"]] == ["encoder.layer.0", "encoder.layer.1"]
    for flags in (["--method", "anchored"], ["--allocation", "loss"], ["--refine-epochs", "1"]):
        done = command("convert", tmp_path / "bert", "--rank", "16", *flags, "--output-dir", tmp_path / "x")
        assert_one_line_error(done, "a BertModel cannot write its own calibration text; give --calibration-data FILE")
    assert not (tmp_path / "x").exists()


def test_zero_epochs_ask_for_no_calibration(command, tmp_path):
    done = command("convert", DEMO_MODEL, "--rank", "16", "--method", "svd", *NONE, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "calibration:" not in done.stderr


def test_a_model_that_reads_a_weight_as_a_matrix_is_named_also_under_calibration(command, tmp_path):
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=20)
    tf.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    flags = ["--rank", "6", "--calibration-tokens", "1024", "--calibration-block-size", "32", *NONE]
    named = ["--target-modules", "in_proj", "dt_proj"]  # by default it is left out
    done = command("convert", tmp_path / "mamba", *flags, *named, "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "ran before the conversion and fails after it")
    assert not (tmp_path / "out").exists()
    done = command("convert", tmp_path / "mamba", *flags, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr


BAD = [
    (["--method", "magic"], "--method 'magic' is unknown; choose one of svd, activation, anchored"),
    (["--allocation", "magic"], "--allocation 'magic' is unknown; choose one of uniform, energy, loss"),
    (["--refine-epochs", "-1"], "--refine-epochs is -1; it must be 0 or more"),
    (["--distill-epochs", "-0.5"], "--distill-epochs is -0.5; it must be 0 or more"),
    (["--distill-epochs", "nan"], "--distill-epochs is nan; it must be 0 or more"),
    (["--activations-dir", "nowhere"], "--activations-dir nowhere is no folder; create it first"),
    (["--calibration-data", "nowhere.txt"], "there is no file nowhere.txt; check the path"),
    (["--calibration-data", "text.doc"], "has the file extension '.doc'; supported are .txt"),
    (["--calibration-data", "empty.txt"], "empty.txt is empty"),
    (["--calibration-data", "long.txt", "--calibration-data", "empty.txt"], "empty.txt is empty"),
    (
        ["--calibration-data", "self", "--calibration-data", "long.txt"],
        "--calibration-data self stands beside long.txt;",
    ),
    (
        ["--calibration-data", "short.txt"],
        "short.txt has 401 tokens; calibration needs at least 1024, and some ten thousand do",
    ),
    (["--calibration-data", "other.jsonl"], "other.jsonl has no column 'text' and no column 'messages'; it has body"),
    (
        ["--calibration-data", "chats.jsonl"],
        "the tokenizer has no chat template, which the chats in column 'messages' of",
    ),
    (
        ["--calibration-data", "chats.jsonl", "--calibration-column", "talk"],
        "chats.jsonl has no column 'talk'; it has mess",
    ),
    (
        ["--calibration-data", "long.txt", "--calibration-block-size", "512", "--calibration-tokens", "400"],
        "400 calibra",
    ),
    (
        ["--calibration-data", "long.txt", "--calibration-tokens", "100"],
        "100 calibration tokens are too few; the least",
    ),
    (["--calibration-tokens", "100"], "100 calibration tokens are too few; the least is 1024"),
    (["--calibration-block-size", "5000"], "calibration block size 5000 is out of range; this model takes 2 to 512"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(f) for f, _ in BAD])
def test_bad_input_is_one_line(command, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.doc").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("return\n" * 200)
    (tmp_path / "long.txt").write_text("return\n" * 2000)
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    before = sorted(p.name for p in tmp_path.iterdir())
    done = command("convert", DEMO_MODEL, "--rank", "16", *flags, "--output-dir", "out")
    assert_one_line_error(done, message)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.fixture
def chat_model(tmp_path):
    """The demo model with a chat template whose turns end with a token of their own."""
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "chat")
    template = "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}{% endfor %}<|endoftext|>"
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant\n{% endif %}")
    return folder


def test_chats_are_calibration_data(command, chat_model, texts, tmp_path):
    """From a file, of which one chat is left out; and written by the model itself, as one half of its text."""
    words = (texts / "read.txt").read_text().split()
    rows = [
        {"messages": [{"role": "user", "content": " ".join(words[i : i + 30])},
                      {"role": "assistant", "content": " ".join(words[i + 30 : i + 90])}]}
        for i in range(0, 1080, 90)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in [{"messages": rows[0]["messages"][:1]}, *rows]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    flags = [
        "--rank",
        "16",
        "--calibration-tokens",
        "2048",
        "--calibration-block-size",
        "128",
        *NONE,
        "--calibration-data",
    ]
    done = command("convert", chat_model, *flags, tmp_path / "chats.jsonl", "--output-dir", tmp_path / "read")
    assert done.returncode == 0, done.stderr
    assert re.search(r"calibration: [\d,]+ tokens of chats.jsonl", done.stderr)
    assert "chats.jsonl are left out: 1 x it has no assistant's reply\n" in done.stderr or "left out" not in done.stderr
    assert json.loads((tmp_path / "read" / "conversion.json").read_text())["calibration"]["source"] == "chats.jsonl"
    both = [
        *flags,
        tmp_path / "chats.jsonl",
        "--calibration-data",
        texts / "read.txt",
        "--output-dir",
        tmp_path / "both",
    ]
    done = command("convert", chat_model, *both)
    assert "calibration: 2,048 tokens of chats.jsonl, read.txt\n" in done.stderr

    own = ["convert", chat_model, *flags, "self", "--calibration-tokens", "2048", "--output-dir"]
    assert command(*own, tmp_path / "own").returncode == 0
    (chat_model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    done = command(*own, tmp_path / "plain")
    assert done.returncode == 0
    assert "note: the model writes plain text and no chats: the chat template has no generation prompt\n" in done.stderr
    (chat_model / "tokenizer.json").unlink()  # text needs none
    (chat_model / "tokenizer_config.json").unlink()
    assert command(*own, tmp_path / "without").returncode == 0
    weights = [
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()["model.layers.0.mlp.up_proj.U.weight"]
        for name in ("own", "plain", "without")
    ]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_text_is_written_before_anything_is_changed():
    """What the demo model writes is text of the kind that it was trained on."""
    model = tf.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    written = sample_blocks(model, 16, 128)
    with torch.no_grad():
        loss = model(input_ids=written, labels=written).loss.item()
        noise = torch.randint(2048, written.shape)
        assert loss < 0.6 * model(input_ids=noise, labels=noise).loss.item()
