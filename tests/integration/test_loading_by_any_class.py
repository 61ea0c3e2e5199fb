"""No Auto class fills a compact checkpoint with random weights: it loads what was saved, or raises."""

import pytest
import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import lowrank_ft
from lowrank_ft.checkpoints.loader import LowRankQuantizer
from lowrank_ft.export import save_compact
from lowrank_ft.nn.forms import stored_as
from tests.conftest import tiny_gpt2, tiny_llama

TEXT = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
VISION = dict(depth=2, hidden_size=32, num_heads=4, patch_size=4)
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def qwen2_vl():
    vision = {**VISION, "embed_dim": 32, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision))


def qwen2_5_vl():
    vision = {**VISION, "intermediate_size": 48, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision))


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision))


def assert_all_there(loaded, saved, prefix):
    expected = saved.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[prefix + name]), name


@pytest.mark.parametrize("excluded", [None, ".*(visual|vision_tower).*"])
@pytest.mark.parametrize("plain", [False, True], ids=["save_compact", "save_pretrained"])
@pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl, llava])
def test_vision_and_text_keep_their_weights(build, plain, excluded, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    lowrank_ft.convert(model, rank=6, exclude_modules=excluded)
    if plain:
        model.save_pretrained(tmp_path / "m")
    else:
        save_compact(model, tmp_path / "m")
    with stored_as(model, "factors" if plain else "pivoted"):
        assert_all_there(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m"), model, "")
        assert_all_there(transformers.AutoModel.from_pretrained(tmp_path / "m"), model, "model.")


def test_factors_without_weights_are_refused(tmp_path, monkeypatch):
    model = qwen2_vl()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    # As where a conversion of names is needed and yet leads nowhere.
    monkeypatch.setattr(LowRankQuantizer, "update_weight_conversions", lambda self, conversions, model: conversions)
    with pytest.raises(ValueError, match=r"has no weights for visual\.blocks\.0.* that Qwen2VLModel reads"):
        transformers.AutoModel.from_pretrained(tmp_path / "m")


def base_of(model):
    return getattr(model, model.base_model_prefix, model)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", ""])
def test_every_class_computes_what_the_base_of_the_causal_model_does(build, head, ids, tmp_path):
    """Also where it calls its base by another name, as LlamaForQuestionAnswering does."""
    model = build().eval()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    cls = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    loaded, info = cls.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"score", "classifier", "qa_outputs"}
    assert {type(m).__name__ for n, m in loaded.named_modules() if n.endswith(("q_proj", "c_attn"))} == {
        "LowRankLinear"
    }
    with torch.no_grad(), stored_as(model, "pivoted"):
        expected, found = (base_of(m)(ids).last_hidden_state for m in (model, loaded))
    assert torch.equal(expected, found)


def test_a_question_answering_model_comes_back_by_its_own_class_and_others(ids, tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    answering = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "m").eval()
    save_compact(answering, tmp_path / "compact")
    answering.save_pretrained(tmp_path / "plain")
    for folder in ("compact", "plain"):
        again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / folder)
        assert_all_there(again, answering, "")
    assert_all_there(transformers.AutoModel.from_pretrained(tmp_path / "compact"), answering, "transformer.")


def test_another_architecture_is_refused(tmp_path):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "m")
    with pytest.raises(ValueError, match="has none of the factored linears"):
        transformers.GPT2Model.from_pretrained(
            tmp_path / "m", config=transformers.GPT2Config(
                n_embd=32, n_layer=1, n_head=2, vocab_size=97, quantization_config=model.config.quantization_config
            )
        )  # fmt: skip
