"""Compact models in torch.export and ONNX: the code of docs/how-to/onnx.md, its outputs beside those of the model."""

import re

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft.nn import lowrank_layers
from tests.conftest import ROOT, tiny_llama

CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "onnx.md").read_text(encoding="utf-8"), re.DOTALL)
ENCODER, ENCODER_RUN, DECODER, EXPORTED = CODE
ANY_SIZE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


@pytest.fixture
def compact(tmp_path, monkeypatch):
    """A function that makes a model the folder ``compact`` of the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(model, companions_from=None, **sizes):
        lowrank_ft.convert(model, **(sizes or {"param_ratio": 0.7}))
        lowrank_ft.save_compact(model, "compact", companions_from=companions_from)
        return tmp_path / "compact"

    return make


def stored(folder, onnx):
    """The bytes of the file, those of its tensors, and its model."""
    path = folder / "onnx" / "model.onnx"
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    return path.read_bytes(), sum(len(t.raw_data) for t in model.graph.initializer), model


def test_torch_export_of_the_real_encoder(minilm, compact, tmp_path):
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32)
    folder = compact(model, minilm, param_ratio=0.8)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert {layer.pivot for _, layer in lowrank_layers(model)} == {"input", "output"}
    example = dict(tokenizer(["One.", "Another sentence."], padding=True, return_tensors="pt"))
    program = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, ANY_SIZE))
    other = dict(
        tokenizer(["Three.", "More, and", "longer sentences than those two."], padding=True, return_tensors="pt")
    )
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        found, wanted = torch.export.load(tmp_path / "model.pt2").module()(**other), model(**other)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=0)


def test_torch_export_of_a_decoder(compact, ids):
    model = AutoModelForCausalLM.from_pretrained(compact(tiny_llama()), dtype=torch.float32)
    scope: dict = {"model": model, "torch": torch, "ids": ids}
    exec(EXPORTED, scope)
    other = torch.randint(3, 97, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = scope["program"].module()(input_ids=other, use_cache=False).logits, model(other).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_onnx_of_the_real_encoder(minilm, compact, onnx):
    pytest.importorskip("onnxruntime")
    # One of its six blocks, for the exporter takes its time; the embeddings are all there.
    model = AutoModel.from_pretrained(minilm, num_hidden_layers=1, dtype=torch.float32)
    folder = compact(model, minilm, param_ratio=0.8)
    scope: dict = {}
    exec(ENCODER, scope)
    exec(ENCODER_RUN, scope)
    with torch.no_grad():
        inputs = {n: torch.from_numpy(scope["batch"][n]) for n in scope["inputs"]}
        wanted = scope["model"](**inputs).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(scope["hidden"]), wanted, atol=1e-5, rtol=0)
    # Each number is stored once, factors as factors, and nothing of the disk that it was made on.
    whole, tensors, graph = stored(folder, onnx)
    parameters = 4 * sum(p.numel() for p in scope["model"].parameters())
    assert parameters <= tensors <= 1.01 * parameters
    assert len(whole) <= tensors + 100_000
    assert str(ROOT).encode() not in whole
    assert b"site-packages" not in whole
    assert [o.name for o in graph.graph.output] == ["last_hidden_state"]


def test_onnx_of_a_decoder(compact, onnx):
    onnxruntime = pytest.importorskip("onnxruntime")
    compact(tiny_llama(num_hidden_layers=1))
    scope: dict = {}
    exec(DECODER, scope)
    other = torch.randint(3, 97, (3, 21), generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession("compact/onnx/model.onnx")
    inputs = {"input_ids": other.numpy(), "attention_mask": torch.ones_like(other).numpy()}
    (found,) = session.run(None, inputs)
    with torch.no_grad():
        wanted = scope["model"](other).logits
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=0)
    assert torch.equal(torch.from_numpy(found).argmax(-1), wanted.argmax(-1))
