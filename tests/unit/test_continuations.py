"""Continuations of a context that is read once, against the model run on each whole text."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lowrank_ft.evaluation.continuations import continuation_scores, shares_contexts
from tests.conftest import tiny_gpt2, tiny_llama

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip


def built(config_class: str, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SMALL, **overrides)).eval()


MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": lambda: built("Qwen3Config"),
    "mistral, window of 4": lambda: built("MistralConfig", sliding_window=4),
    "gemma2, windows of 4": lambda: built("Gemma2Config", sliding_window=4),
    "opt": lambda: built("OPTConfig", ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: built("BloomConfig", n_layer=2, n_head=4),
}


@torch.no_grad()
def one_by_one(model, context, continuation):
    """Of one text, no cache: the sum of the log-probabilities, and whether each token comes first."""
    text = context + continuation
    logs = model(input_ids=torch.tensor([text[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
    likelihood, first = 0.0, True
    for i in range(len(context), len(text)):
        likelihood += logs[i - 1, text[i]].item()
        first = first and logs[i - 1].argmax().item() == text[i]
    return likelihood, first


@pytest.mark.parametrize("name", MODELS)
def test_as_if_each_text_was_read_alone(name):
    """Two contexts of 9 tokens; continuations of 1 to 5 tokens, unequally many, one of them the most likely."""
    model = MODELS[name]()
    assert shares_contexts(model)
    contexts = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        best = [int(model(input_ids=contexts[:1]).logits[0, -1].argmax())]
        best.append(int(model(input_ids=torch.cat([contexts[:1], torch.tensor([best])], 1)).logits[0, -1].argmax()))
    continuations = [[[5], [7, 8, 9, 10, 11], best], [[20, 21], [best[0], 3]]]
    found = continuation_scores(model, contexts, continuations)
    for context, each, scores in zip(contexts.tolist(), continuations, found, strict=True):
        for continuation, (likelihood, first) in zip(each, scores, strict=True):
            expected, expected_first = one_by_one(model, context, continuation)
            assert likelihood == pytest.approx(expected, abs=1e-4)
            assert first == expected_first
    assert found[0][2][1]  # the most likely tokens, so both answers occur
    assert not found[0][1][1]


def test_single_tokens_need_the_context_alone():
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(1))
    found = continuation_scores(model, torch.tensor([[5, 6, 7]]), [[[8], [9]]])
    assert len(calls) == 1
    assert found[0][1][0] == pytest.approx(one_by_one(model, [5, 6, 7], [9])[0], abs=1e-5)


def test_a_recurrent_state_is_not_shared():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not shares_contexts(transformers.MambaForCausalLM(config).eval())


def test_a_model_that_counts_positions_wrongly_with_a_cache_is_not_shared():
    """Such as one with code of its own: the few tokens of the trial tell."""
    model = tiny_gpt2()
    assert shares_contexts(model)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # a trained model relies on positions
    assert shares_contexts(model)
    plain = model.forward

    def from_zero(*args, past_key_values=None, **kwargs):
        ids = kwargs["input_ids"]
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return plain(*args, past_key_values=past_key_values, position_ids=places, **kwargs)

    model.forward = from_zero
    assert not shares_contexts(model)


def test_a_model_that_fails_with_a_cache_is_not_shared():
    model = tiny_llama()
    plain = model.forward

    def no_cache(*args, use_cache=False, **kwargs):
        if use_cache:
            raise NotImplementedError("no cache")
        return plain(*args, **kwargs)

    model.forward = no_cache
    assert not shares_contexts(model)
