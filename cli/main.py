"""``lowrank-ft``: parse the command line, run the chosen command, and say in one line what went wrong."""

import argparse
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from lowrank_ft_cli.commands import COMMANDS, PASS_ON, build_parser
from lowrank_ft_cli.launch import launch_command, split_launch


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``lowrank-ft`` command; returns one of ``EXIT_CODES``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could follow; the answer ends the process
        import argcomplete

        argcomplete.autocomplete(parser)
    if arguments[:1] in ([], ["help"]):
        parser.print_help()
        return 0 if arguments else 2
    arguments, launch = split_launch(arguments)
    options, unknown = parser.parse_known_args(arguments)
    if options.command in PASS_ON:
        options.passed_on = arguments[arguments.index(options.command) + 1 :]
    elif unknown:
        parser.commands[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    formatwarning = warnings.formatwarning
    _quieten(options)
    signal.signal(signal.SIGTERM, _interrupt)  # so that half-written output is cleaned up
    hangup = getattr(signal, "SIGHUP", None)  # the terminal is closed; there is none on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(hangup, _interrupt)
    try:
        code = launch_command(arguments, launch) if launch else int(COMMANDS[options.command].run(options) or 0)
        sys.stdout.flush()  # a reader that is gone is found out here, and not at exit
        return code
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks for all
            print(f"error: interrupted; {str(stop) or 'nothing was left behind'}", file=sys.stderr)
        return 1
    except Exception as error:
        from lowrank_ft.console import print_error, reader_is_gone  # it is imported by now, or quick to

        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return 1
        if options.debug:
            raise
        print_error(error, "--debug")
        return 1
    finally:
        warnings.formatwarning = formatwarning


def _quieten(options: argparse.Namespace) -> None:
    """Nothing but our own words in the terminal, and each once."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # an unreachable Hub is reported once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if options.command == "tokenize" else "false")
    if not options.debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # Where it is installed, it warns of a kernel that nobody asked for.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
