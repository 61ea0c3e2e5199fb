"""``lowrank-ft``: parse the command line, then import what the chosen command needs.

Nothing heavy is imported before a command is known, so ``--help`` answers at once. Exit codes: 0 done, 1 failed,
2 wrong usage.
"""

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from typing import Any, NoReturn

from lowrank_ft_cli.usage import OneLineParser

_DESCRIPTION = """\
Fine-tune a Hugging Face model into a smaller one.

  lowrank-ft plan    MODEL --param-ratio 0.6                        what would change, what it saves
  lowrank-ft plan    --preset wei2024-s-r63                         what a training from scratch costs
  lowrank-ft convert MODEL --param-ratio 0.6 --output-dir compact   factorize every linear of the blocks
  lowrank-ft finetune --model compact --dataset text.jsonl --output_dir tuned
  lowrank-ft eval    tuned --data held-out.txt --baseline MODEL     perplexity, size, speed
  lowrank-ft report  tuned --baseline MODEL                         one page of HTML about it
  lowrank-ft push    tuned --repo-id me/model
  lowrank-ft tokenize texts/ --tokenizer MODEL --output-dir tokens  a large text, once, for many runs
  lowrank-ft pretrain --preset wei2024-s-r32 --dataset tokens       from scratch, with low rank
"""


_RECIPES = ("finetune", "pretrain")  # commands whose options are those of a script


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``lowrank-ft`` command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options, passed_on = parser.parse_known_args(arguments)
    if passed_on and options.command not in _RECIPES:
        parser.commands[options.command].error(f"unrecognized arguments: {' '.join(passed_on)}")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # an unreachable Hub is reported once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if options.command == "tokenize" else "false")
    formatwarning = warnings.formatwarning
    if not options.debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        logging.getLogger("bitsandbytes").setLevel(
            logging.ERROR
        )  # where it is installed, a kernel that nobody asked for
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    signal.signal(signal.SIGTERM, _interrupt)  # so that half-written output is cleaned up
    try:
        command = importlib.import_module(f"lowrank_ft_cli.{options.module}")
        if options.command in _RECIPES:
            return int(command.run(options, arguments[arguments.index(options.command) + 1 :]))
        code = int(command.run(options) or 0)
        sys.stdout.flush()  # a reader that is gone is found out here, and not at exit
        return code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left behind", file=sys.stderr)
        return 1
    except Exception as error:
        from lowrank_ft.console import printable, reader_is_gone  # it is imported by now, or quick to

        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return 1
        if options.debug:
            raise
        print(f"error: {printable(_one_line(error))}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = formatwarning


def build_parser() -> OneLineParser:
    """All commands and their flags; the parser of each is in ``commands``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="lowrank-ft", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action=_Version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    def add(name: str, help: str, module: str | None = None, **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            parents=[common],
            allow_abbrev=False,
            **kwargs,
        )
        command.set_defaults(module=module or name)
        return command

    plan = add("plan", "show what would change and what it saves; reads headers, not weights")
    _model(plan, or_preset=True)
    _size(plan)
    _calibration(plan)
    _device(plan)
    _training_cost(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON; convert --plan reads it back")
    plan.add_argument(
        "--picture", metavar="FILE", help="draw the ranks into a .png, .svg or .pdf (needs the extra plot)"
    )

    memory = plan.add_argument_group("memory of training, and the options of the run that it is estimated for")
    memory.add_argument("--memory", action="store_true", help="estimate the peak of a training step in every mode")
    memory.add_argument("--batch-size", type=int, default=8, metavar="N", help="blocks per forward pass (default: 8)")
    memory.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per block (default: 1024, or what the model has)"
    )
    memory.add_argument(
        "--gradient-accumulation-steps", type=int, default=1, metavar="N", help="forward passes per step (default: 1)"
    )
    memory.add_argument("--gradient-checkpointing", action="store_true", help="activations are recomputed in backward")
    memory.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), default="no",
        help="arithmetic; weights are in --dtype, which stands for float32 here if it is not given (default: no)",
    )  # fmt: skip
    memory.add_argument("--optim", default="adamw_torch", metavar="NAME", help="form of AdamW (default: adamw_torch)")

    convert = add("convert", "factorize a dense checkpoint into a compact one")
    _model(convert)
    _size(convert)
    convert.add_argument("--plan", metavar="FILE", help="ranks from a file that plan --json wrote, edited or not")
    convert.add_argument(
        "--method", metavar="NAME",
        help="svd (the weight alone), activation, or anchored (default; svd for models that cannot write text, "
        "unless --calibration-data is given)",
    )  # fmt: skip
    convert.add_argument(
        "--refine-epochs",
        type=int,
        metavar="N",
        help="passes that train each block to match its dense twin (default: 1)",
    )
    convert.add_argument(
        "--distill-epochs", type=float, metavar="N",
        help="passes that train all factors to match the dense model's output (default: 1)",
    )  # fmt: skip
    convert.add_argument(
        "--activations-dir", metavar="DIR", help="keep hidden states in files there, where memory does not hold them"
    )
    _calibration(convert)
    _output(convert, "lowrank")
    _device(convert)
    _hub(convert)

    add(
        "finetune", "fine-tune while the dense weight is phased out; starts accelerate launch", add_help=False,
        usage="lowrank-ft finetune [--config FILE.yaml] [options of recipes/finetune.py] [-- options of accelerate]",
    )  # fmt: skip

    add(
        "pretrain", "train from scratch with low rank, guided at first; starts accelerate launch", module="finetune",
        add_help=False,
        usage="lowrank-ft pretrain [--config FILE.yaml] [options of recipes/pretrain.py] [-- options of accelerate]",
    )  # fmt: skip

    tokenize = add("tokenize", "turn text of any size into token files that training maps into memory", module="tokens")
    tokenize.add_argument(
        "dataset", nargs="+", help="text, json(l) or parquet files, folders, glob patterns, or datasets on the Hub"
    )
    tokenize.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder or Hub id with the tokenizer")
    tokenize.add_argument(
        "--output-dir", required=True,
        help="folder for the result; it appears whole or not at all, and a run that was killed goes on",
    )  # fmt: skip
    tokenize.add_argument(
        "--held-out", type=float, default=0.01, metavar="F",
        help="share of the documents to hold out, by a hash of their text (default: 0.01)",
    )  # fmt: skip
    tokenize.add_argument(
        "--glob", nargs="+", default=[], metavar="PATTERN",
        help="the files to read in folders, such as '*.py' (default: by the endings of text, json(l) and parquet)",
    )  # fmt: skip
    tokenize.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME",
        help="names of files and folders in them to leave out, such as site-packages or 'test_*'",
    )  # fmt: skip
    tokenize.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    tokenize.add_argument("--data-split", default="train", help="split of a dataset on the Hub (default: train)")
    tokenize.add_argument("--data-config", help="configuration of a dataset on the Hub")
    tokenize.add_argument("--data-revision", help="branch, tag or commit of a dataset on the Hub")
    tokenize.add_argument("--max-shard-size", default="128MB", help="largest token file (default: 128MB)")
    tokenize.add_argument(
        "--overwrite", action="store_true", help="replace token files there, and what an unfinished run left"
    )
    tokenize.add_argument("--json", action="store_true", help="print the summary as JSON")
    tokenize.add_argument("--revision", help="branch, tag or commit of the tokenizer on the Hub")
    tokenize.add_argument("--token", help="Hub token (default: the stored one)")
    tokenize.add_argument("--trust-remote-code", action="store_true", help="run Python code that the tokenizer brings")

    evaluate = add(
        "eval", "measure perplexity, size, speed and task scores, alone or against a baseline", module="evaluate"
    )
    _model(evaluate)
    evaluate.add_argument("--data", help="a text, jsonl or parquet file, or a dataset on the Hub")
    evaluate.add_argument("--data-split", default="test", help="split of a dataset on the Hub (default: test)")
    evaluate.add_argument("--data-config", help="configuration of a dataset on the Hub")
    evaluate.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    evaluate.add_argument("--baseline", metavar="MODEL", help="a second model, such as the dense one, to compare with")
    evaluate.add_argument("--block-size", type=int, help="tokens of context (default: 1024, or what the model allows)")
    evaluate.add_argument(
        "--stride", type=int, metavar="N",
        help="overlap the blocks: each begins N tokens after the one before, and only tokens that are new count",
    )  # fmt: skip
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="read the first N tokens of the text only")
    evaluate.add_argument(
        "--tasks", nargs="+", metavar="NAME",
        help="tasks of lm-evaluation-harness (needs the extra eval) by name, or YAML files of tasks, or folders of them",
    )  # fmt: skip
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only")
    evaluate.add_argument("--batch-size", type=int, default=8, help="blocks or items per forward pass (default: 8)")
    evaluate.add_argument("--json", action="store_true", help="print the numbers as JSON")
    _device(evaluate)

    report = add("report", "write one HTML page about a compact checkpoint: size, ranks, errors, training, evaluation")
    report.add_argument("checkpoint", help="folder that convert, finetune or export wrote")
    report.add_argument("--output", metavar="FILE", help="where to (default: report.html in that folder)")
    report.add_argument("--overwrite", action="store_true", help="replace the file that --output names")
    report.add_argument("--baseline", metavar="MODEL", help="the dense model (default: its origin, if a folder here)")
    report.add_argument("--data", help="evaluate both on this text, jsonl or parquet file, or dataset on the Hub")
    report.add_argument("--data-split", default="test", help="split of a dataset on the Hub (default: test)")
    report.add_argument("--data-config", help="configuration of a dataset on the Hub")
    report.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    report.add_argument("--block-size", type=int, help="tokens of context (default: 1024, or what the model allows)")
    report.add_argument("--batch-size", type=int, default=8, help="blocks per forward pass (default: 8)")
    report.add_argument("--eval", metavar="FILE", help="take the numbers from a file that eval --json wrote")
    report.add_argument("--update-card", action="store_true", help="put the numbers into the table of README.md, too")
    report.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda or mps if there is one)")
    report.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings")

    export = add("export", "write the compact checkpoint of a training checkpoint or of a PEFT adapter")
    export.add_argument("checkpoint", help="a run's checkpoints/step-N folder, or a folder with adapter_config.json")
    export.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings")
    _output(export, "compact")
    _device(export, device=False)
    _hub(export)

    merge = add("merge", "multiply U V back into dense weights, for software that knows nothing else")
    _model(merge)
    _output(merge, "merged")
    _device(merge, device=False)

    push = add("push", "upload a finished checkpoint to the Hub")
    push.add_argument("folder", help="what convert, finetune or export wrote")
    push.add_argument("--repo-id", required=True, help="name on the Hub, such as me/llama-lowrank")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="branch to push to; made if need be (default: main)")
    push.add_argument("--commit-message", help="message of the commit")
    push.add_argument("--token", help="Hub token (default: the stored one)")

    demo = add("demo", "the whole path on a small model that ships with the package; no network needed")
    demo.add_argument("--output-dir", default="lowrank-ft-demo", help="where to (default: lowrank-ft-demo)")
    demo.add_argument("--param-ratio", type=float, default=0.6, help="share of the linears to keep (default: 0.6)")
    demo.add_argument("--max-steps", type=int, default=120, help="optimizer steps of each training (default: 120)")
    return parser


def _model(parser: argparse.ArgumentParser, or_preset: bool = False) -> None:
    model = parser.add_argument("model", help="folder or Hub id")
    if or_preset:
        parser.add_argument(
            "--preset", metavar="NAME", action=_InPlaceOf, replaces=model,
            help="in place of a model, one of Wei et al. (2024): wei2024-{s,m,l,xl}[-r63|-r32] or wei2024-{m,l}-wide",
        )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--token", help="Hub token (default: the stored one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings")
    parser.add_argument("--adapter", action="store_true", help="merge the PEFT adapter that lies beside the weights")


def _size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("how much is kept (one of)")
    size.add_argument("--rank", type=_number, metavar="N", help="the same rank for all, or a fraction of full rank")
    size.add_argument(
        "--param-ratio", type=float, metavar="F", help="factored over dense parameters: 0.6 removes 40 %%"
    )
    size.add_argument("--energy", type=float, metavar="F", help="share of the squared singular values; reads weights")
    which = parser.add_argument_group("which linears (default: all of the repeated blocks)")
    which.add_argument(
        "--target-modules", nargs="+", metavar="NAME",
        help="names or suffixes, as in PEFT; one regular expression for whole names; or all-linear",
    )  # fmt: skip
    which.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="names or suffixes that stay dense")
    which.add_argument(
        "--rank-pattern", nargs="+", metavar="PATTERN=N", help="ranks of linears that differ, as in PEFT: q_proj=64"
    )
    which.add_argument(
        "--allow-past-break-even", action="store_true", help="factorize linears even where that makes them larger"
    )


def _training_cost(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cost of a training from scratch")
    group.add_argument(
        "--tokens", type=count, metavar="N",
        help="add training FLOPs for so many tokens: 2.2B, 300M (a preset has a number of its own)",
    )  # fmt: skip
    group.add_argument(
        "--sequence-length", type=count, metavar="N",
        help="tokens of context in the FLOPs (default: 1024, or what the model allows)",
    )  # fmt: skip
    group.add_argument(
        "--set", nargs="+", action="extend", metavar="NAME=VALUE",
        help="change values of a preset: hidden_size=512 num_hidden_layers=8 vocab_size=4096 ...",
    )  # fmt: skip


def _calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--allocation", metavar="NAME",
        help="how ranks share the parameters: uniform, energy or loss; convert takes loss by default where "
        "--param-ratio says how many there are",
    )  # fmt: skip
    group.add_argument(
        "--calibration-data", metavar="DATA",
        help="a text, jsonl or parquet file, a dataset on the Hub, or self: text that the model writes (default)",
    )  # fmt: skip
    group.add_argument("--calibration-split", default="train", help="split of a dataset on the Hub (default: train)")
    group.add_argument("--calibration-config", help="configuration of a dataset on the Hub")
    group.add_argument("--calibration-column", default="text", help="column that holds the text (default: text)")
    group.add_argument(
        "--calibration-tokens", type=int, metavar="N", help="at most so many tokens (default: 262144; of self, 65536)"
    )
    group.add_argument(
        "--calibration-block-size",
        type=int,
        metavar="N",
        help="tokens per text (default: 512, or what the model allows)",
    )
    group.add_argument("--seed", type=int, default=0, help="choice and order of the calibration data (default: 0)")


def _output(parser: argparse.ArgumentParser, suffix: str) -> None:
    parser.add_argument(
        "--output-dir", help=f"folder for the result; it appears whole or not at all (default: NAME-{suffix})"
    )
    parser.set_defaults(output_suffix=suffix)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint there")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")


def _device(parser: argparse.ArgumentParser, device: bool = True) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dtype (default: its own)"
    )
    if device:
        parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda or mps if there is one)")


def _hub(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push-to-hub", action="store_true", help="push the result")
    hub.add_argument("--hub-model-id", help="its name on the Hub, such as me/llama-lowrank")
    hub.add_argument("--private", action="store_true", help="make a new repository private")


def _number(text: str) -> int | float:
    """``64`` is a rank, ``0.5`` a fraction."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def count(text: str) -> int:
    """``2.2B`` is 2,200,000,000; the suffixes are k, M, B and T.

    Raises:
        argparse.ArgumentTypeError: not such a number, not whole, or not positive.
    """
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?([kMBT]?)", text.replace("_", "").replace(",", ""))
    if found:
        whole, fraction, scale = found[1], found[2] or "", 10 ** (3 * " kMBT".index(found[3] or " "))
        number, rest = divmod(int(whole + fraction) * scale, 10 ** len(fraction))
        if number > 0 and not rest:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number such as 1024, 300M or 2.2B")


class _InPlaceOf(argparse.Action):
    """A flag that makes a positional argument unnecessary (one that may always be left out would be lost after flags)."""

    def __init__(self, *args: Any, replaces: argparse.Action, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaces = replaces

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(options, self.dest, values)
        self.replaces.required = False


class _Version(argparse.Action):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(version("lowrank-ft"))
        parser.exit()


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _one_line(error: Exception) -> str:
    from lowrank_ft.errors import LowRankError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, LowRankError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'} (--debug shows the traceback)"


if __name__ == "__main__":
    sys.exit(main())
