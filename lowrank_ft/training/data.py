"""The data of a run, from its options: plain text packed into blocks, or chats with loss on the replies only.

A text too large for memory is tokenized once by ``lowrank-ft tokenize``; the folder that it wrote is a source, too.
"""

from pathlib import Path
from typing import Any

from lowrank_ft.data.examples import DEFAULT_BLOCK_SIZE, TokenizedData, pack
from lowrank_ft.data.sources import read_rows, require_column
from lowrank_ft.data.token_format import is_token_folder, read_index
from lowrank_ft.data.tokenize_rows import SHAREGPT_COLUMN, tokenize_chats, tokenize_texts
from lowrank_ft.data.tokens import TokenFiles
from lowrank_ft.errors import DataError
from lowrank_ft.training.options import DataArguments


def load_data(args: DataArguments, tokenizer: Any) -> tuple[TokenizedData, TokenizedData | None]:
    """The training examples, and the held-out ones if there are any.

    Raises:
        DataError: the file or dataset does not exist, lacks the column, or has too little text; or token files are
            damaged or of another tokenizer.
    """
    train = _tokenized(args, args.dataset, args.dataset_config, args.dataset_split, tokenizer)
    if args.eval_dataset:
        config = args.eval_config or (args.dataset_config if args.eval_dataset == args.dataset else None)
        return train, _tokenized(args, args.eval_dataset, config, args.eval_split, tokenizer, "held_out")
    if args.eval_ratio > 0 and _has_held_out(args.dataset):
        return train, _tokenized(args, args.dataset, None, "", tokenizer, "held_out")
    held_out = round(len(train) * args.eval_ratio)
    if args.eval_ratio > 0 and not 0 < held_out < len(train):
        raise DataError(
            f"{args.dataset} gives {len(train)} examples of {_block_size(args)} tokens, too few to hold out "
            f"{args.eval_ratio:.0%}; lower --block-size, give an --eval-dataset, or set --eval-ratio 0"
        )
    return train.split(held_out) if held_out else (train, None)


def load_distill_data(args: DataArguments, tokenizer: Any) -> TokenizedData | None:
    """The text on which the model is held to the dense one; None where that is the training data.

    Raises:
        DataError: as :func:`load_data`.
    """
    if not args.distill_dataset:
        return None
    return _tokenized(args, args.distill_dataset, args.distill_config, args.distill_split, tokenizer)


def _block_size(args: DataArguments) -> int:
    return args.block_size or DEFAULT_BLOCK_SIZE


def _has_held_out(name: str) -> bool:

    return is_token_folder(name) and read_index(Path(name).expanduser())["tokens"]["held_out"] > 0


def _tokenized(
    args: DataArguments, name: str, config: str | None, split: str, tokenizer: Any, part: str = "train"
) -> TokenizedData:

    if is_token_folder(name):
        part = part if _has_held_out(name) else "train"
        read_before = part == "held_out" and name == args.dataset
        data = TokenFiles(name, _block_size(args), part, verify=not read_before)
        data.check_tokenizer(tokenizer)
        return data
    rows = read_rows(name, split, config)
    if SHAREGPT_COLUMN not in rows.column_names:
        wanted = (args.text_column, args.messages_column)
        fix = "choose with --text-column or --messages-column (a chat is a list of messages with role and content)"
        require_column(name, wanted, rows.column_names, fix)
    for column in (args.messages_column, SHAREGPT_COLUMN):
        if column in rows.column_names:
            return tokenize_chats(
                rows, column, name, tokenizer, _block_size(args), args.strict_data, args.dataset_num_proc
            )
    ids = tokenize_texts(rows, args.text_column, name, tokenizer, args.strict_data, args.dataset_num_proc)
    return pack(ids, _block_size(args), name)
