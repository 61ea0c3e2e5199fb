"""Models that see or hear, and models that see and read."""

from functools import partial

import torch

from tests.architectures.row import SEES, TEXT, WHISPER, Row, image, image_and_tokens, tokens, waveform

_SPEECH = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0, mask_time_prob=0.0, layerdrop=0.0,
)  # fmt: skip
_CLIP = {
    "text_config": {**TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, "vision_config": SEES,
    "projection_dim": 32,
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_WHOLE = {"drop_path_rate": 0.0}  # or a step would leave a layer out, at random
_QWEN = dict(depth=2, hidden_size=32, num_heads=4, patch_size=4)
_HEAD = {**TEXT, "head_dim": 8}
_ID = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94}


def spectrogram():
    features = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32)
    return {"input_features": features, "decoder_input_ids": torch.arange(5)[None]}


def audio_patches():
    return {"input_values": torch.linspace(-1, 1, 64 * 32).view(1, 64, 32)}


def marked_image(count: int, **more: torch.Tensor):
    """An image, and text in which ``count`` tokens stand for it."""
    ids = torch.tensor([[3, 4, *[96] * count, 5, 6]])
    return {"input_ids": ids, "token_type_ids": (ids == 96).long(), **image(), **more}


def one_of_several_images():
    given = marked_image(4)
    return {"input_ids": given["input_ids"], "pixel_values": given["pixel_values"][None]}


def patches_and_tokens():
    ids = torch.tensor([[3, 94, 96, 96, 96, 96, 5, 6]])
    pixels = torch.linspace(-1, 1, 16 * 96).view(16, 96)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == 96).int()}  # fmt: skip


ROWS = [
    Row("ViTForImageClassification", "ViTConfig", SEES, image),
    Row("DeiTForImageClassification", "DeiTConfig", SEES, image),
    Row("BeitForImageClassification", "BeitConfig", {**SEES, **_WHOLE}, image),
    Row("Dinov2ForImageClassification", "Dinov2Config", SEES, image),
    Row("SwinForImageClassification", "SwinConfig", {
        "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
        **_WHOLE,
    }, image),
    Row("ConvNextForImageClassification", "ConvNextConfig", {
        "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16,
    }, image),
    Row("SegformerForImageClassification", "SegformerConfig", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 32, **_WHOLE,
    }, image),
    Row("SiglipVisionModel", "SiglipVisionConfig", SEES, image),
    Row("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, spectrogram),
    Row("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, waveform),
    Row("HubertForCTC", "HubertConfig", _SPEECH, waveform),
    Row("WavLMForCTC", "WavLMConfig", _SPEECH, waveform),
    Row("ASTForAudioClassification", "ASTConfig", {
        **{k: v for k, v in SEES.items() if k != "image_size"}, "max_length": 64, "num_mel_bins": 32,
        "frequency_stride": 4, "time_stride": 4,
    }, audio_patches),
    Row("CLIPModel", "CLIPConfig", _CLIP, image_and_tokens),
    Row("SiglipModel", "SiglipConfig", {k: v for k, v in _CLIP.items() if k != "projection_dim"}, image_and_tokens),
    Row("BlipForConditionalGeneration", "BlipConfig", _CLIP, image_and_tokens),
    Row("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {
        "text_config": {**TEXT, **_ROPE}, "vision_config": {**_QWEN, "embed_dim": 32, "mlp_ratio": 2}, **_ID,
    }, patches_and_tokens),
    Row("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": {**TEXT, **_ROPE}, **_ID,
        "vision_config": {**_QWEN, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16},
    }, patches_and_tokens),
    Row("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {
        "text_config": {**_HEAD, **_ROPE}, **_ID,
        "vision_config": {**_QWEN, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    }, patches_and_tokens),
    Row("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **SEES},
        "image_token_index": 96, "vision_feature_layer": -1,
    }, partial(marked_image, 16)),
    Row("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", {
        "text_config": {"model_type": "gemma", **_HEAD}, "vision_config": {"model_type": "siglip_vision_model", **SEES},
        "image_token_index": 96, "projection_dim": 32,
    }, partial(marked_image, 16)),
    Row("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": _HEAD, "vision_config": SEES, "mm_tokens_per_image": 4, "image_token_index": 96,
    }, partial(marked_image, 4)),
    Row("Gemma4ForConditionalGeneration", "Gemma4Config", {
        "text_config": {**_HEAD, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16},
        "vision_config": {**SEES, "head_dim": 8}, "audio_config": None,
    }, tokens, unreached=("model.vision_tower",)),
    Row("Mistral3ForConditionalGeneration", "Mistral3Config", {
        "text_config": {"model_type": "mistral", **_HEAD},
        "vision_config": {"model_type": "pixtral", **SEES, "head_dim": 8}, "image_token_index": 96,
    }, partial(marked_image, 4, image_sizes=torch.tensor([[16, 16]]))),
    Row("Idefics3ForConditionalGeneration", "Idefics3Config", {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": SEES, "image_token_id": 96,
    }, one_of_several_images),
    Row("InternVLForConditionalGeneration", "InternVLConfig", {
        "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": 96,
        "vision_config": {**SEES, "image_size": [16, 16], "patch_size": [4, 4]},
    }, partial(marked_image, 4)),
]  # fmt: skip
