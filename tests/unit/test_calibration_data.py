"""From text files and pictures to batches of calibration data."""

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lowrank_ft.conversion.batches import calibration_length, own_batches, read_batches
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.errors import ConfigError, DataError
from tests.conftest import DEMO_MODEL, tiny_gpt2, tiny_llama
from tests.unit.test_calibration import SIZES, SMALL, T5, WHISPER

WORDS = [f"w{i}" for i in range(60)]


def words(count, seed=0):
    ids = torch.randint(60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    """One id for each word; ``[CLS] ... [SEP]`` around a text, as BERT has them; no end of text."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def data(*texts, column="text"):
    return Dataset.from_dict({column: list(texts)})


def bert(**kwargs):
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**{**SMALL, **kwargs})).eval()


def rows_of(batches):
    return torch.cat([b["input_ids"] for b in batches])


# --- causal models


def test_text_is_packed_into_shuffled_blocks(tokenizer):
    texts = [words(900), "", words(700, seed=1)]
    whole = torch.from_numpy(token_ids([texts[0], texts[2]], tokenizer)).long()
    blocks = whole[: len(whole) // 64 * 64].view(-1, 64)
    batches = read_batches(tiny_llama(), data(*texts), "d", tokenizer, seed=1)
    assert [set(b) for b in batches] == [{"input_ids"}] * len(batches)
    assert all(b["input_ids"].dtype == torch.long and b["input_ids"].numel() <= 2048 for b in batches)
    found = rows_of(batches)
    assert not torch.equal(found, blocks)
    assert sorted(found.tolist()) == sorted(blocks.tolist())
    assert torch.equal(rows_of(read_batches(tiny_llama(), data(*texts), "d", tokenizer, seed=1)), found)
    assert not torch.equal(rows_of(read_batches(tiny_llama(), data(*texts), "d", tokenizer, seed=2)), found)


def test_every_block_begins_as_the_tokenizer_begins_a_text(tokenizer):
    """Where it adds a begin-of-text token, the model has never read a sequence without."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    adds = tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="[CLS]", unk_token="[UNK]")
    whole = torch.from_numpy(token_ids([words(1700)], adds)).long()
    found = rows_of(read_batches(tiny_llama(), data(words(1700)), "d", adds))
    assert found.shape == (26, 64)
    assert (found[:, 0] == 1).all()
    assert sorted(found[:, 1:].tolist()) == sorted(whole[1 : 1 + 26 * 63].view(26, 63).tolist())


def test_limits_and_block_size(tokenizer):
    model, rows = tiny_llama(), data(words(4000))
    assert rows_of(read_batches(model, rows, "d", tokenizer, tokens=1100)).shape == (17, 64)
    assert rows_of(read_batches(model, rows, "d", tokenizer, tokens=1024, block_size=10)).shape == (102, 10)
    column = data(words(4000), column="body")
    assert rows_of(read_batches(model, column, "d", tokenizer, column="body")).shape == (62, 64)
    assert calibration_length(model, None) == 64
    assert calibration_length(tiny_gpt2(), None) == 64
    assert calibration_length(tf.T5ForConditionalGeneration(T5), None) == 512
    for size in (1, 65, -3):
        with pytest.raises(
            ConfigError, match=f"calibration block size {size} is out of range; this model takes 2 to 64"
        ):
            read_batches(model, rows, "d", tokenizer, block_size=size)


def test_own_text():
    model = tiny_llama()
    batches = own_batches(model, 2100, seed=3)
    assert rows_of(batches).shape == (32, 64)
    assert torch.equal(rows_of(own_batches(model, 2100, seed=3)), rows_of(batches))
    with pytest.raises(DataError, match="1000 calibration tokens are too few; the least is 1024"):
        own_batches(model, 1000)
    with pytest.raises(DataError, match="a BertModel cannot write its own calibration text"):
        own_batches(bert(), 2100)


# --- encoders and encoder-decoders


def test_encoders_read_padded_rows(tokenizer):
    paragraphs = [words(n, seed=n) for n in range(3, 60)]
    batches = read_batches(bert(), data("\n\n".join(paragraphs[:30]), "\n\n\n".join(paragraphs[30:])), "d", tokenizer)
    found = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.numel() <= 256
        assert (ids[:, 0] == 1).all()
        assert torch.equal(mask, (ids != 0).long())
        assert mask[:, -1].any()  # as long as its longest row, and no longer
        found += [tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)]
    # Rows are pieces of paragraphs, and all pieces are there.
    assert all(any(row in p for p in paragraphs) for row in found)
    assert sorted(" ".join(found).split()) == sorted(" ".join(paragraphs).split())
    padding = 1 - sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)
    assert padding < 0.4  # of shuffled rows it would be about a half
    with torch.no_grad():
        assert torch.isfinite(bert()(**batches[0])[0]).all()


def test_rows_of_encoders_have_all_lengths(tokenizer):
    """Sentences and pages alike, up to the limit: about half of the tokens are in rows shorter than the geometric mean."""
    found = read_batches(bert(), data(*[words(300, seed=i) for i in range(200)]), "d", tokenizer)
    rows = torch.cat([b["attention_mask"].sum(1) for b in found])
    assert rows.max() == 64
    share = rows[rows < 32].sum() / rows.sum()
    assert 0.35 < share < 0.65
    few = read_batches(bert(), data(*[words(300, seed=i) for i in range(20)]), "d", tokenizer, block_size=8)
    assert max(b["input_ids"].shape[1] for b in few) == 8  # shorter than the shortest


def test_a_long_text_without_paragraphs_is_cut_and_not_dropped(tokenizer):
    text = words(3000)
    found = rows = read_batches(bert(), data(text), "d", tokenizer)
    rows = [tokenizer.decode(r, skip_special_tokens=True).split() for b in found for r in b["input_ids"]]
    assert all(b["input_ids"].shape[1] <= 64 for b in found)
    assert sorted(w for r in rows for w in r) == sorted(text.split())
    some = read_batches(bert(), data(text), "d", tokenizer, tokens=1100)
    assert 1100 <= sum(int(b["attention_mask"].sum()) for b in some) < 1100 + 64


def test_encoder_rows_are_shuffled_and_limited(tokenizer):
    rows = data(*[words(20, seed=i) for i in range(200)])
    first, again, other = (read_batches(bert(), rows, "d", tokenizer, tokens=1200, seed=s) for s in (0, 0, 1))
    assert 1200 <= sum(int(b["attention_mask"].sum()) for b in first) < 1200 + 22
    first, again, other = ([b["input_ids"].tolist() for b in found] for found in (first, again, other))
    assert first == again
    assert first != other


def test_encoder_decoders_read_the_first_half_and_write_the_second(tokenizer):
    model = tf.T5ForConditionalGeneration(T5).eval()
    ids = torch.from_numpy(token_ids([words(2000)], tokenizer)).long()
    batches = read_batches(model, data(words(2000)), "d", tokenizer, block_size=51)
    wanted = ids[: 2000 // 51 * 51].view(-1, 51)
    found = []
    for batch in batches:
        source, target = batch["input_ids"], batch["decoder_input_ids"]
        assert source.shape[1] == 26
        assert target.shape[1] == 25
        assert (target[:, 0] == 0).all()
        found += torch.cat([source, target[:, 1:]], 1).tolist()
    assert sorted(found) == sorted(wanted[:, :-1].tolist())
    with torch.no_grad():
        assert torch.isfinite(model(**batches[0]).logits).all()


# --- pictures


def test_images_are_what_the_processor_makes_of_them():
    image = pytest.importorskip("PIL.Image")
    processor_class = getattr(tf, "ViTImageProcessorPil", None) or tf.ViTImageProcessor
    processor = processor_class(size={"height": 32, "width": 32})
    pictures = [
        image.new(mode, (40, 30), color) for mode, color in zip(["RGB", "L", "RGBA"] * 7, range(21), strict=True)
    ]
    model = tf.ViTForImageClassification(tf.ViTConfig(**SIZES))
    batches = read_batches(model, Dataset.from_dict({"image": pictures}), "d", processor, tokens=4 * 19 + 3)
    assert [b["pixel_values"].shape for b in batches] == [(8, 3, 32, 32), (8, 3, 32, 32), (3, 3, 32, 32)]
    stacked = torch.cat([b["pixel_values"] for b in batches])
    every = torch.cat([processor(p.convert("RGB"), return_tensors="pt")["pixel_values"] for p in pictures])
    assert all(any(torch.equal(a, b) for b in every) for a in stacked)
    assert len(stacked.unique(dim=0)) > 8
    rows = Dataset.from_dict({"image": pictures})
    assert sum(len(b["pixel_values"]) for b in read_batches(model, rows, "d", processor)) == 21
    assert [len(b["pixel_values"]) for b in read_batches(model, rows, "d", processor, tokens=32)] == [8]
    assert [len(b["pixel_values"]) for b in read_batches(model, rows, "d", processor, tokens=1)] == [1]
    with pytest.raises(DataError, match="d has no column 'image'; it has text"):
        read_batches(model, data("x"), "d", processor)
    with pytest.raises(DataError, match="d holds no image"):
        read_batches(model, Dataset.from_dict({"image": []}), "d", processor)


def test_a_column_image_that_holds_none():
    pytest.importorskip("PIL.Image")
    model = tf.ViTForImageClassification(tf.ViTConfig(**SIZES))
    with pytest.raises(DataError, match="column 'image' of d holds str and not images"):
        read_batches(model, data("cat.png", column="image"), "d", None)


# --- what is wrong with the data


MODELS = {
    "llama": tiny_llama, "bert": bert, "t5": lambda: tf.T5ForConditionalGeneration(T5)
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_bad_data(make, tokenizer):
    model = make()
    lacking = "no column 'text'" + ("" if make is bert else " and no column 'messages'")
    with pytest.raises(DataError, match=f"d has {lacking}; it has body, title; choose with --calibration-column"):
        read_batches(model, Dataset.from_dict({"body": ["x"], "title": ["y"]}), "d", tokenizer)
    for texts in ([], [""], ["", None]):
        with pytest.raises(
            DataError, match=r"d has 0 tokens; calibration needs at least 1024, and some ten thousand do well"
        ):
            read_batches(model, data(*texts), "d", tokenizer)
    with pytest.raises(DataError, match=r"d has 1\d\d tokens; calibration needs at least 1024"):
        read_batches(model, data(words(100) if make is not bert else words(60) + "\n\n" + words(38)), "d", tokenizer)
    with pytest.raises(DataError, match="500 calibration tokens are too few; the least is 1024"):
        read_batches(model, data(words(4000)), "d", tokenizer, tokens=500)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_tokenizer_of_another_model(make, tokenizer):
    model = make()
    model.resize_token_embeddings(40)
    with pytest.raises(DataError, match=r"token ids up to 63, and the model has 40 embeddings; .* is not this model's"):
        read_batches(model, data(words(4000)), "d", tokenizer)


def test_a_tokenizer_that_cannot_pad(tokenizer):
    bare = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="tokenizer has no padding token"):
        read_batches(bert(), data(words(4000)), "d", bare)


def test_speech_is_not_read_from_text(tokenizer):
    with pytest.raises(DataError, match="a WhisperForConditionalGeneration reads input_features, and calibration data"):
        read_batches(tf.WhisperForConditionalGeneration(WHISPER), data(words(4000)), "d", tokenizer)


def test_of_a_large_dataset_a_part_is_read():
    class Counted:
        column_names = ("text",)

        def __init__(self):
            self.read = set()

        def __len__(self):
            return 100_000

        def __getitem__(self, index):
            self.read.add(index)
            return {"text": f"{index} " + "To be, or not to be, that is the question. " * 20}

    rows, model = Counted(), tiny_llama(max_position_embeddings=64, vocab_size=2048)
    tokenizer = tf.AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    batches = read_batches(model, rows, "many", tokenizer, tokens=4096)
    assert sum(b["input_ids"].numel() for b in batches) == 4096
    assert 5 <= len(rows.read) < 100
    assert max(rows.read) > 10_000  # drawn from all over
