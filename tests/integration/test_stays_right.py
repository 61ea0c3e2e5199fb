"""What is right and has to stay so, from a dense model to a checkpoint and back."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import lowrank_ft
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.export import save_compact, save_dense
from lowrank_ft.nn.forms import stored_as
from tests.conftest import tiny_gpt2, tiny_llama


def compact(model):
    lowrank_ft.convert(model, rank=6)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_tied_embeddings_that_an_adapter_saves(tmp_path, ids):
    model = tiny_llama(tie_word_embeddings=True)
    config = lowrank_ft.LowRankConfig(r=6, modules_to_save=["embed_tokens"])
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        embedding = peft_model.get_input_embeddings()
        getattr(embedding, "modules_to_save", {"default": embedding})["default"].weight.add_(0.1)
    expected = logits(peft_model, ids)
    bare = peft_model.base_model.compact_and_unload()
    torch.testing.assert_close(logits(bare, ids), expected)
    save_compact(bare, tmp_path / "m")
    torch.testing.assert_close(logits(load_model(Source(str(tmp_path / "m"))), ids), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_was_resized(tied, tmp_path, ids):
    model = compact(tiny_llama(tie_word_embeddings=tied))
    model.resize_token_embeddings(105, mean_resizing=False)
    save_compact(model, tmp_path / "m")
    loaded = load_model(Source(str(tmp_path / "m")))
    assert loaded.config.vocab_size == 105
    with stored_as(model, "pivoted"):
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_merge_keeps_config_names_and_dtypes(tmp_path):
    dense = tiny_gpt2().to(torch.bfloat16)
    before = {n: (t.shape, t.dtype) for n, t in dense.state_dict().items()}
    config = dense.config.to_dict()
    merged = lowrank_ft.merge(compact(dense))
    assert {n: (t.shape, t.dtype) for n, t in merged.state_dict().items()} == before
    assert merged.config.to_dict() == config
    save_dense(merged, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in merged.state_dict().items())


def gradients(model, batches, scale=1.0):
    model.train()
    for batch in batches:
        (scale * model(input_ids=batch, labels=batch).loss).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(ids):
    model = compact(tiny_llama())
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    expected = gradients(model, [ids])
    found = gradients(other, [ids])
    assert expected["model.layers.0.mlp.up_proj.U.weight"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_accumulated_gradients_are_those_of_the_batch(ids):
    model = compact(tiny_llama())
    expected = gradients(copy.deepcopy(model), [ids])
    for name, gradient in gradients(model, ids.split(1), 0.5).items():
        torch.testing.assert_close(gradient, expected[name])


def test_t5_in_half_precision(tmp_path, ids):
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    save_compact(compact(T5ForConditionalGeneration(config).eval()), tmp_path / "m")
    whole, half = (load_model(Source(str(tmp_path / "m")), dtype) for dtype in (torch.float32, torch.float16))
    with torch.no_grad():
        expected, found = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (whole, half))
    # transformers keeps one linear of T5 in float32, or it overflows; T5 asks its weight for the dtype of its input.
    ffn = half.encoder.block[0].layer[1].DenseReluDense
    assert ffn.wi.U.weight.dtype == torch.float16
    assert {ffn.wo.U.weight.dtype, ffn.wo.V.weight.dtype, ffn.wo.weight.dtype} == {torch.float32}
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_lora_on_a_compact_model(tmp_path, ids):
    save_compact(compact(tiny_llama()), tmp_path / "m")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["U", "V"], init_lora_weights=False)
    model = get_peft_model(load_model(Source(str(tmp_path / "m"))), config)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "m")  # beside the factors
    merged = load_model(Source(str(tmp_path / "m"), adapter=True))
    torch.testing.assert_close(logits(merged, ids), expected)
    save_compact(merged, tmp_path / "again")
    assert torch.equal(logits(load_model(Source(str(tmp_path / "again"))), ids), logits(merged, ids))


def test_a_generation_config_that_transformers_calls_invalid(tmp_path, ids):
    model = compact(tiny_llama())
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        save_compact(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
