"""Checkpoints of other tools come in: factors under other names, and GGUF files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lowrank_ft
from lowrank_ft.nn import lowrank_layers
from tests.conftest import DEMO_MODEL
from tests.integration.test_cli import assert_one_line_error

STYLES = {
    "svd-llm": ("svd-llm", "{0}_u_proj", "{0}_v_proj"),
    "ab": ("ab", "{0}_proj.B", "{0}_proj.A"),
    "own": ("*.up,*.down,*", "{0}_proj.up", "{0}_proj.down"),
}


def qwen():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # of q, k and v
                parameter.normal_()
    return model


def write(folder, up, down, change=None):
    """A factored model as another tool would write it, and its logits."""
    model = qwen()
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(folder)
    lowrank_ft.convert(model, rank=6)
    factored = {name for name, _ in lowrank_layers(model)}
    state = {}
    for key, tensor in model.state_dict().items():
        owner, _, what = key.rpartition(".")
        linear = owner.removesuffix(".U").removesuffix(".V")
        if key == "lm_head.weight" or (owner in factored and what == "weight"):
            continue  # tied; and the tripwire
        if linear in factored:
            stem = linear.removesuffix("_proj")
            new = (down if owner.endswith(".V") else up).format(stem)  # the bias belongs to U
            state[f"{new}.{what}"] = tensor.clone()
        else:
            state[key] = tensor.clone()
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("style", STYLES)
def test_factors_under_other_names(command, tmp_path, style):
    names, up, down = STYLES[style]
    wanted = write(tmp_path, up, down)
    done = command("export", tmp_path, "--factor-names", names, "--output-dir", tmp_path / "compact")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    assert len(list(lowrank_layers(model))) == 14
    assert all(layer.pivot for _, layer in lowrank_layers(model))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(20)[None]).logits, wanted, atol=1e-5, rtol=1e-4)


def without(key):
    return lambda state: state.pop(key)


def transposed(state):
    key = "model.layers.0.mlp.up_v_proj.weight"
    state[key] = state[key].T.contiguous()


FIRST = "model.layers.0.mlp.up_v_proj.weight"


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ("svd-llm", without(FIRST), "model.layers.0.mlp.up_u_proj.weight is a factor U, and its partner is missing"),
        ("svd-llm", transposed, "U must be (out, r) and V (r, in)"),
        ("svd-llm", without("model.norm.weight"), "lacks model.norm.weight"),
        ("ab", None, "no tensor of"),
        ("*_u_proj,*_v_proj,*_linear", None, "check --factor-names"),
        ("u,v", None, "is neither one of svd-llm, ab nor three patterns"),
        ("*.B,*.B,*", None, "is neither one of svd-llm, ab nor three patterns"),
    ],
)
def test_names_that_do_not_fit(command, tmp_path, names, change, message):
    write(tmp_path, *STYLES["svd-llm"][1:], change)
    done = command("export", tmp_path, "--factor-names", names, "--output-dir", tmp_path / "compact")
    assert_one_line_error(done, message)
    assert not (tmp_path / "compact").exists()


def test_a_config_that_names_no_architecture(command, tmp_path):
    write(tmp_path, *STYLES["ab"][1:])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    done = command("export", tmp_path, "--factor-names", "ab", "--output-dir", tmp_path / "compact")
    assert_one_line_error(done, 'add it as "architectures"')


def test_a_compact_checkpoint_has_its_own_names(command, tmp_path):
    model = qwen()
    lowrank_ft.convert(model, rank=6)
    lowrank_ft.save_compact(model, tmp_path / "c")
    done = command("export", tmp_path / "c", "--factor-names", "ab", "--output-dir", tmp_path / "d")
    assert_one_line_error(done, "is a compact checkpoint already; leave --factor-names out")


def for_llama_cpp(weight, heads):
    """Rows of q and k in llama.cpp's order: the two halves of each head's rotary pairs side by side."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The demo model as GGUF in float32, as llama.cpp's converter would write it."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(DEMO_MODEL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {t["content"] for t in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    for kind in ("bos", "eos"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    named = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = named.get(key, "output.weight")
        if key.startswith("model.layers."):
            _, _, number, rest = key.split(".", 3)
            part = rest.removesuffix(".weight")
            new = f"blk.{number}.{PARTS[part]}.weight"
            tensor = for_llama_cpp(tensor, heads[part[-6:]]) if part[-6:] in heads else tensor
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_dense_checkpoint(command, gguf_file, tmp_path, ids):
    done = command("merge", gguf_file, "--output-dir", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    dense, found = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (DEMO_MODEL, tmp_path / "dense")
    )
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)
    assert "quantization_config" not in AutoConfig.from_pretrained(tmp_path / "dense").to_dict()
    text = "def main(argv):\n    return 0"
    expected, got = (AutoTokenizer.from_pretrained(f)(text)["input_ids"] for f in (DEMO_MODEL, tmp_path / "dense"))
    assert got[-6:] == expected[-6:]
    flags = ["--param-ratio", "0.8", "--method", "svd", "--output-dir", tmp_path / "compact"]
    assert command("convert", tmp_path / "dense", *flags).returncode == 0


def test_gguf_files_that_cannot_be_read(command, gguf_file, tmp_path):
    done = command("convert", gguf_file, "--rank", "8", "--output-dir", tmp_path / "out")
    remedy = f"is a file; make a dense checkpoint of it first: lowrank-ft merge {gguf_file} --output-dir"
    assert_one_line_error(done, remedy)
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:1000])
    assert_one_line_error(command("merge", tmp_path / "cut.gguf", "--output-dir", tmp_path / "out"), "cannot be read")
    done = command("merge", tmp_path / "none.gguf", "--output-dir", tmp_path / "out")
    assert_one_line_error(done, "there is no file")
    assert not (tmp_path / "out").exists()
