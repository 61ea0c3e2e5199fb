"""Calibration data: from a dataset or a local file to batches that a model's forward takes.

    causal language models    packed blocks of tokens, each after what the tokenizer begins a text with; chats are
                              put into the tokenizer's template, and packed in the same way
    encoders                  one text a row, with the tokenizer's special tokens, padded and masked
    encoder-decoders          the first half of each block for the encoder, the second for the decoder
    image models              images, as the checkpoint's processor prepares them

Only causal language models can write text themselves (``self``). One whose tokenizer has a chat template writes plain
text in one half of the blocks and chats in the other, so that neither is forgotten.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from lowrank_ft.conversion.calibration import Calibration, positions
from lowrank_ft.conversion.chains import Batch
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.sampling import generates, own_turns, sample_blocks
from lowrank_ft.data.drawn import CHAT_COLUMNS, draw_chats, draw_texts, holds_chats
from lowrank_ft.data.encoding import check_vocabulary, text_ends, token_ids, with_begin, without_begin
from lowrank_ft.data.examples import Example, TokenizedData, collate
from lowrank_ft.data.sources import require_column
from lowrank_ft.errors import ConfigError, DataError

CALIBRATION_TOKENS = 262_144
BLOCK_SIZE = 512
LEAST_TOKENS = 1_024
_BATCH_TOKENS = 1_024
_ROWS_TOKENS = 256
"""Of a batch for encoders: distillation takes a step with each, and theirs gain more from more steps than from larger ones."""
_SHORTEST_ROW = 16
_CHARACTERS_PER_TOKEN = 10  # more than tokenizers of any language reach on the average
_BATCH_IMAGES = 8


def own_batches(
    model: Any,
    tokens: int,
    block_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    preprocessor: Any = None,
    processes: Processes = ONE,
) -> list[Batch]:
    """Batches of text that ``model`` writes itself.

    Args:
        preprocessor: the model's tokenizer. Where it has a chat template, half of the blocks are plain text, from the
            begin token on, and half are chats in that template. A note says so where the template does not allow it.
        processes: who shares the writing.

    Raises:
        DataError: the model is no causal language model, ``tokens`` are too few, or the tokenizer is not the model's.
    """
    length = calibration_length(model, block_size)
    if tokens < max(LEAST_TOKENS, length):
        raise DataError(f"{tokens} calibration tokens are too few; the least is {max(LEAST_TOKENS, length)}")
    blocks = tokens // length
    turns = own_turns(model, preprocessor, length) if blocks > 1 else None
    if turns is None:
        return to_batches(sample_blocks(model, blocks, length, seed=seed, progress=progress, processes=processes))
    texts = sample_blocks(model, blocks - blocks // 2, length, seed=seed, progress=progress, processes=processes)
    chats = sample_blocks(
        model, blocks // 2, length, seed=seed + 1, progress=progress, turns=turns, processes=processes
    )
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    return to_batches(torch.cat([texts, chats])[order])


def read_batches(
    model: Any,
    rows: Dataset,
    name: str,
    preprocessor: Any,
    tokens: int = CALIBRATION_TOKENS,
    block_size: int | None = None,
    column: str | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Batches from the rows of a dataset, shuffled.

    Args:
        rows: with a column of text or chats, or of images for an image model.
        name: what error messages call the data.
        preprocessor: the checkpoint's tokenizer, or its image processor.
        tokens: how many to take at most; an image counts as its patches of 16 x 16 pixels.
        column: that of the text or the chats; None for ``messages``, ``conversations`` or ``text``, whichever is there.

    Raises:
        DataError: the column is missing, the data are too short, no chat can be used, the tokenizer has no chat
            template for them, or is not the model's.
    """
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise DataError(
            f"a {type(model).__name__} reads {model.main_input_name}, and calibration data are read from text or images "
            "here; give batches of your own from Python (lowrank_ft.convert(..., calibration=...)), or --method svd"
        )
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        require_column(name, ["image"], rows.column_names, "an image model needs images")
        return _images(rows, preprocessor, tokens, name, generator)
    writes = generates(model)
    column = _column(rows, name, column, chats=writes)
    length = calibration_length(model, block_size)
    least = max(LEAST_TOKENS, length)
    if tokens < least:
        raise DataError(f"{tokens} calibration tokens are too few; the least is {least}")
    ids: np.ndarray | None = None
    if holds_chats(rows, column):
        if not writes:
            raise DataError(
                f"column {column!r} of {name} holds chats, and a {type(model).__name__} reads plain text; name a column "
                "of text with --calibration-column"
            )
        ids = draw_chats(rows, column, name, preprocessor, tokens + length, generator)
    else:
        texts = draw_texts(rows, column, name, _CHARACTERS_PER_TOKEN * tokens, generator)
        ids = token_ids(texts, preprocessor) if writes else None
    if ids is not None:
        begin, _ = text_ends(preprocessor)
        blocks = _blocks(ids, tokens, length, name, generator, begin)
        check_vocabulary(model, blocks, name)
        return _for_encoder_decoder(model, blocks) if model.config.is_encoder_decoder else to_batches(blocks)
    batches = _rows_of_text(texts, preprocessor, tokens, length, name, generator)
    for batch in batches:
        check_vocabulary(model, batch["input_ids"], name)
    return batches


def _column(rows: Dataset, name: str, wanted: str | None, chats: bool) -> str:
    """The column to read, which is that of ``chats`` where they may be read and nothing else is wanted."""
    columns = [wanted] if wanted else [*CHAT_COLUMNS, "text"] if chats else ["text"]
    found = next((c for c in columns if c in rows.column_names), None)
    if found is None:
        shown = [c for c in reversed(columns) if c != CHAT_COLUMNS[1]]
        require_column(name, shown, rows.column_names, "choose with --calibration-column")
    return str(found)


def training_batches(data: TokenizedData, tokens: int, seed: int = 0) -> list[Batch]:
    """Batches of the text or chats that a model is about to be trained on, drawn at random.

    Raises:
        DataError: fewer than 1,024 tokens are there or asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    found, examples = 0, []
    for i in torch.randperm(len(data), generator=generator).tolist():
        examples.append(data[i])
        found += len(examples[-1]["input_ids"])
        if sum(len(e["input_ids"]) for e in examples) >= _BATCH_TOKENS:
            batches.append(_inputs(examples))
            examples = []
        if found >= tokens:
            break
    if found < LEAST_TOKENS:
        raise DataError(f"{found} tokens to calibrate on are too few; calibration needs at least {LEAST_TOKENS}")
    return [*batches, _inputs(examples)] if examples else batches


def training_calibration(data: TokenizedData, tokens: int, seed: int = 0) -> Calibration:
    """Regression and allocation on the text of a run; training factors on it is what the run itself does.

    Raises:
        DataError: as :func:`training_batches`.
    """
    batches = training_batches(data, tokens, seed)
    return Calibration(batches, "training data", fit_tokens=tokens, refine_epochs=0, distill_epochs=0)


def _inputs(examples: list[Example]) -> Batch:
    return {k: v for k, v in collate(examples).items() if k != "labels"}


def calibration_length(model: Any, block_size: int | None) -> int:
    """Tokens of a calibration text: what was asked for, or 512, or all positions of the model if those are fewer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or BLOCK_SIZE
    if block_size is None:
        return min(BLOCK_SIZE, positions)
    if not 2 <= block_size <= positions:
        raise ConfigError(f"calibration block size {block_size} is out of range; this model takes 2 to {positions}")
    return block_size


def to_batches(blocks: Tensor, least: int = 1) -> list[Batch]:
    """``(blocks, length)`` to batches of about 1,024 tokens, and no fewer than ``least`` rows where there are so many."""
    parts = list(blocks.split(max(least, _BATCH_TOKENS // blocks.shape[1])))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    return [{"input_ids": b} for b in parts]


def _require_tokens(found: int, least: int, name: str) -> None:
    if found < least:
        if least > LEAST_TOKENS:
            raise DataError(
                f"{name} has {found} tokens, less than one block of {least}; give more text, or lower "
                "--calibration-block-size"
            )
        raise DataError(f"{name} has {found} tokens; calibration needs at least {least}, and some ten thousand do well")


def _blocks(
    ids: np.ndarray, tokens: int, length: int, name: str, generator: torch.Generator, begin: Sequence[int]
) -> Tensor:
    """Each after the tokens ``begin``, which models whose tokenizer adds them have seen before every text."""
    _require_tokens(len(ids), max(LEAST_TOKENS, length), name)
    text, room = without_begin(torch.from_numpy(ids).long(), begin), length - len(begin)
    blocks = text[: len(text) // room * room].view(-1, room)
    chosen = torch.randperm(len(blocks), generator=generator)[: max(1, tokens // length)]
    return with_begin(blocks[chosen], begin)


def _for_encoder_decoder(model: Any, blocks: Tensor) -> list[Batch]:
    start = model.config.decoder_start_token_id
    source, target = blocks.chunk(2, dim=1)
    first = torch.full((len(blocks), 1), start if start is not None else 0)
    decoder = torch.cat([first, target[:, :-1]], dim=1)
    size = max(1, _BATCH_TOKENS // blocks.shape[1])
    pairs = zip(source.split(size), decoder.split(size), strict=True)
    return [{"input_ids": s, "decoder_input_ids": d} for s, d in pairs]


def _rows_of_text(
    texts: Sequence[str], tokenizer: Any, tokens: int, length: int, name: str, generator: torch.Generator
) -> list[Batch]:
    """Texts are cut at paragraphs, and these into rows of any length up to ``length``; each batch is padded to its longest.

    Encoders read single sentences as well as pages. What is special about a short row, the share of the tokens that
    begin and end it, is lost among long ones. So each paragraph draws its own length, evenly on a logarithmic scale.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("the checkpoint's tokenizer has no padding token, which batches of texts need; set pad_token in "
                        "its tokenizer_config.json")  # fmt: skip
    paragraphs = [p.strip() for t in texts for p in t.split("\n\n") if p.strip()]
    rows, found = [], 0
    shortest = min(_SHORTEST_ROW, length)
    for i in torch.randperm(len(paragraphs), generator=generator).tolist():
        # Tokenizers written in Python give what is past the first piece without its special tokens: it is dropped.
        whole = tokenizer.is_fast
        share = torch.rand((), generator=generator).item() if whole else 1.0
        most = round(shortest * (length / shortest) ** share)
        ids = tokenizer(paragraphs[i], truncation=True, max_length=most, return_overflowing_tokens=whole)["input_ids"]
        for piece in ids if whole else [ids]:
            if found < tokens:
                rows.append(piece)
                found += len(piece)
        if found >= tokens:
            break
    _require_tokens(found, LEAST_TOKENS, name)
    rows.sort(key=len)  # rows of like length share a batch, so that little of it is padding
    batches: list[Batch] = []
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= _ROWS_TOKENS:
            end += 1
        batches.append(dict(tokenizer.pad({"input_ids": rows[start:end]}, padding=True, return_tensors="pt")))
        start = end
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in order]


def _images(rows: Dataset, processor: Any, tokens: int, name: str, generator: torch.Generator) -> list[Batch]:
    if len(rows) == 0:
        raise DataError(f"{name} holds no image; calibration needs at least one, and some hundreds do well")
    if not hasattr(rows[0]["image"], "convert"):
        raise DataError(
            f"the column 'image' of {name} holds {type(rows[0]['image']).__name__} and not images; "
            "cast it to the Image feature of datasets"
        )
    chosen = torch.randperm(len(rows), generator=generator).tolist()
    batches: list[Batch] = []
    found = 0
    for start in range(0, len(chosen), _BATCH_IMAGES):
        images = [i.convert("RGB") for i in rows[chosen[start : start + _BATCH_IMAGES]]["image"]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        each = positions({"pixel_values": pixels[:1]})
        batches.append({"pixel_values": pixels[: max(1, (tokens - found) // each)]})
        found += positions(batches[-1])
        if found + each > tokens:
            break
    return batches
