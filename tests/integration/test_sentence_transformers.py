"""Compact encoders in sentence-transformers: by their folder's name, with this package and without, modules and all."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import lowrank_ft

sentence_transformers = pytest.importorskip("sentence_transformers")

SENTENCES = ["The cat sat on the mat.", "Interest rates rose by half a percent last quarter, to the surprise of many."]
ALONE = """
import sys, torch
from sentence_transformers import SentenceTransformer
try:
    SentenceTransformer({folder!r})
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error)
else:
    raise SystemExit("the folder loaded without its loader")
model = SentenceTransformer({folder!r}, trust_remote_code=True)
assert "lowrank_ft" not in sys.modules
torch.save(model.encode({sentences!r}, convert_to_tensor=True), {out!r})
"""


def pooled(folder, sentences=SENTENCES) -> torch.Tensor:
    """The mean of the last hidden states over the tokens of each sentence, ``(sentences, hidden)``."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.fixture
def encoder(minilm, tmp_path):
    """A folder with a tiny random BERT under the tokenizer of all-MiniLM, and nothing of sentence-transformers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def modules_of(folder, *after_pooling):
    """A SentenceTransformer of an encoder, mean pooling and further modules."""
    from sentence_transformers import models

    transformer = models.Transformer(str(folder), max_seq_length=48)
    pooling = models.Pooling(transformer.get_embedding_dimension(), "mean")
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, pooling, *after_pooling], prompts={"query": "query: "}, default_prompt_name=None
    )


def test_all_of_its_modules_come_along(encoder, command, tmp_path):
    from sentence_transformers import models

    torch.manual_seed(1)
    dense = modules_of(encoder, models.Dense(32, 8), models.Normalize())
    dense.save_pretrained(str(tmp_path / "dense"))
    done = command("convert", tmp_path / "dense", "--rank", 24, "--output-dir", tmp_path / "compact")
    assert done.returncode == 0, done.stderr
    compact = sentence_transformers.SentenceTransformer(str(tmp_path / "compact"))
    assert [type(m).__name__ for m in compact] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert (compact.max_seq_length, compact.prompts["query"]) == (48, "query: ")
    layer = compact[2].linear
    assert torch.equal(layer.weight, dense[2].linear.weight)
    with torch.no_grad():
        wanted = F.normalize(torch.tanh(layer(pooled(tmp_path / "compact"))), dim=-1)
    torch.testing.assert_close(compact.encode(SENTENCES, convert_to_tensor=True), wanted, atol=1e-6, rtol=0)
    # It is the compact encoder that runs, and not the dense one.
    assert (compact.encode(SENTENCES, convert_to_tensor=True) - dense.encode(SENTENCES, convert_to_tensor=True)).any()
    compact.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"))
    assert torch.equal(
        again.encode(SENTENCES, convert_to_tensor=True), compact.encode(SENTENCES, convert_to_tensor=True)
    )


def test_without_the_package(encoder, command, python, tmp_path):
    modules_of(encoder).save_pretrained(str(tmp_path / "dense"))
    assert command("convert", tmp_path / "dense", "--rank", 8, "--output-dir", tmp_path / "compact").returncode == 0
    folder, out = str(tmp_path / "compact"), str(tmp_path / "found.pt")
    python("-c", ALONE.format(folder=folder, sentences=SENTENCES, out=out), HF_MODULES_CACHE=str(tmp_path / "code"))
    torch.testing.assert_close(torch.load(out), pooled(folder), atol=1e-6, rtol=0)


def test_a_plain_encoder_gets_mean_pooling(encoder, command, tmp_path):
    assert command("convert", encoder, "--rank", 8, "--output-dir", tmp_path / "compact").returncode == 0
    found = sentence_transformers.SentenceTransformer(str(tmp_path / "compact"))
    torch.testing.assert_close(
        found.encode(SENTENCES, convert_to_tensor=True), pooled(tmp_path / "compact"), atol=1e-6, rtol=0
    )


def test_modules_stored_as_pickles_are_named(encoder, tmp_path):
    from sentence_transformers import models

    modules_of(encoder, models.Dense(32, 8)).save_pretrained(str(tmp_path / "dense"), safe_serialization=False)
    (tmp_path / "dense" / "model.safetensors").unlink(missing_ok=True)
    model = AutoModel.from_pretrained(encoder)
    lowrank_ft.convert(model, rank=8)
    with pytest.warns(UserWarning, match=r"2_Dense holds its weights as pickle only \(pytorch_model.bin\)"):
        lowrank_ft.save_compact(model, tmp_path / "compact", companions_from=tmp_path / "dense")
    assert not list((tmp_path / "compact").rglob("*.bin"))
