"""Encoders of text, and models with an encoder and a decoder."""

from tests.architectures.row import T5, WITH_IDS, Row, both_sides

_TWO_SIDES = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, forced_eos_token_id=2,
)  # fmt: skip

ROWS = [
    Row("BertForMaskedLM", "BertConfig", WITH_IDS),
    Row("RobertaForMaskedLM", "RobertaConfig", WITH_IDS),
    Row("XLMRobertaForSequenceClassification", "XLMRobertaConfig", WITH_IDS),
    Row("DistilBertForMaskedLM", "DistilBertConfig", {
        "vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    }),
    Row("ElectraForMaskedLM", "ElectraConfig", {**WITH_IDS, "embedding_size": 32}),
    Row("AlbertForMaskedLM", "AlbertConfig", {**WITH_IDS, "embedding_size": 16}),
    Row("MPNetForMaskedLM", "MPNetConfig", WITH_IDS),
    Row("DebertaV2ForMaskedLM", "DebertaV2Config", {
        **WITH_IDS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    }),
    Row("ModernBertForMaskedLM", "ModernBertConfig", {
        **WITH_IDS, "cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "eager",
    }),
    Row("NomicBertModel", "NomicBertConfig", WITH_IDS),
    Row("T5ForConditionalGeneration", "T5Config", T5, both_sides),
    Row("BartForConditionalGeneration", "BartConfig", _TWO_SIDES, both_sides),
    Row("MBartForConditionalGeneration", "MBartConfig", _TWO_SIDES, both_sides),
    Row("PegasusForConditionalGeneration", "PegasusConfig", _TWO_SIDES, both_sides),
    Row("MarianMTModel", "MarianConfig", {**_TWO_SIDES, "decoder_vocab_size": 97}, both_sides),
    Row("M2M100ForConditionalGeneration", "M2M100Config", _TWO_SIDES, both_sides),
]  # fmt: skip
