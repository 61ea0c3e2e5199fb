"""Classes of the same architectures with another head, with tied weights, or without a head."""

import pytest

from tests.architectures.check import check
from tests.architectures.row import GROUPED, SMALL, Row

VARIANTS = [
    Row("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    Row("LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, "num_labels": 3}),
    Row("BertModel", "BertConfig", SMALL),
    Row("RobertaForSequenceClassification", "RobertaConfig", SMALL),
]


@pytest.mark.parametrize("row", VARIANTS, ids=["tied", "classifier", "bare", "encoder, classifier"])
def test_it_is_converted_saved_loaded_merged_and_trained(row, tmp_path, plain_output):
    check(row, tmp_path)
