"""Examples from token files: what ``lowrank-ft tokenize`` wrote, with the interface of data in memory."""

from pathlib import Path
from typing import Any

from lowrank_ft.data.encoding import shown_tokenizer, tokenizer_facts
from lowrank_ft.data.examples import DEFAULT_BLOCK_SIZE, TokenizedData
from lowrank_ft.data.token_format import MappedTokens
from lowrank_ft.errors import DataError


class TokenFiles(TokenizedData):
    """Blocks of a folder of token files, with the interface of :class:`TokenizedData`; nothing is loaded ahead.

    Memory does not grow with the text, but for the order of an epoch: :class:`StepBatches` draws a permutation, 8 bytes
    per block, which is 8 MB per billion tokens in blocks of 1024.

    Args:
        folder: what ``lowrank-ft tokenize`` wrote.
        block_size: tokens per block; what is left at the end of the text is dropped.
        part: ``train``, or ``held_out`` for the documents that were held out.
        verify: read all files once and compare their checksums, about a second per GB; otherwise sizes and headers only.

    Raises:
        DataError: the folder is no whole folder of token files; a file is missing, truncated, or altered; or the part
            has fewer tokens than one block.
    """

    ids: MappedTokens

    def __init__(
        self, folder: str | Path, block_size: int = DEFAULT_BLOCK_SIZE, part: str = "train", verify: bool = True
    ) -> None:
        ids = MappedTokens(folder, part, verify)
        if block_size < 1:
            raise DataError(f"the block size is {block_size}; it must be 1 or more")
        if len(ids) < block_size:
            raise DataError(
                f"the part {part} of {folder} has {len(ids)} tokens, less than one sequence of {block_size}; "
                "lower --block-size, or tokenize more text"
            )
        super().__init__(ids, range(0, len(ids) + 1, block_size))

    def check_tokenizer(self, tokenizer: Any, name: str | None = None) -> None:
        """Raise a DataError unless ``tokenizer`` is that of these files.

        Args:
            name: what the message calls it; default: where it was loaded from.
        """
        name = name or str(getattr(tokenizer, "name_or_path", "") or "this run")
        mine, other = self.ids.index["tokenizer"], tokenizer_facts(tokenizer, name)
        if mine["sha256"] != other["sha256"]:
            raise DataError(
                f"{self.ids.folder} was tokenized with {shown_tokenizer(mine)}, and the tokenizer of this run is "
                f"{shown_tokenizer(other)}; tokenize the text again with --tokenizer {name}, or train the other model"
            )


def check_embeddings(rows: int, *parts: TokenizedData | None) -> None:
    """Raise a DataError where the data of a run hold an id for which a model of ``rows`` embeddings has none."""
    for part in parts:
        if part is None:
            continue
        if not isinstance(part.ids, MappedTokens):
            if (largest := int(part.ids.max(initial=0))) >= rows:
                raise DataError(
                    f"the tokenizer gives this text ids up to {largest}, and the model has {rows} embeddings; give it a "
                    "vocab_size of all that the tokenizer has, or take the model's own tokenizer"
                )
            continue
        largest, facts = part.ids.index["largest_id"], part.ids.index["tokenizer"]
        if largest >= rows:
            raise DataError(
                f"{part.ids.folder} holds token ids up to {largest} (its tokenizer {facts['name']} has "
                f"{facts['vocab_size']} tokens), and the model has {rows} embeddings; give it a vocab_size of "
                f"{facts['vocab_size']}, or tokenize with the model's own tokenizer"
            )
