"""Run `hcp tokenize`: convert text to a folder of tokens; a stopped run can be continued."""

import argparse
import contextlib
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from hcp_jax.base import arguments, terminal, watch
from hcp_jax.train.data import token_writer, tokens
from hcp_jax.train.data.background import Work, in_background
from hcp_jax.train.data.formats import shown
from hcp_jax.train.data.text import Texts
from hcp_jax.train.data.tokenizer import Tokenizer
from hcp_jax.train.sections import SKIPPED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp tokenize`."""
    parser.add_argument(
        "data",
        type=pathlib.Path,
        help="a file of text, JSON lines, JSON, CSV or Parquet, or a folder of them",
    )
    parser.add_argument(
        "--tokenizer",
        type=arguments.existing_file,
        required=True,
        help="the model's tokenizer.json",
    )
    parser.add_argument(
        "--out",
        type=arguments.writable_folder,
        required=True,
        help="a new folder, to be named in data.path; an unfinished one is continued",
    )
    parser.add_argument(
        "--field",
        type=arguments.non_empty,
        default="text",
        help="field that holds a record's text (text)",
    )
    for name, does in (("bos", "begins"), ("eos", "ends")):
        parser.add_argument(
            f"--{name}",
            metavar="TOKEN",
            help=f"the token that {does} a text, if no tokenizer_config.json beside the tokenizer "
            "says so",
        )
    parser.add_argument(
        "--special-tokens",
        choices=("text", "control"),
        default="text",
        help='what becomes of text that spells a special token, such as "</s>" (text)',
    )
    parser.add_argument(
        "--bad-lines",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with a line that cannot be read (refuse)",
    )


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: text is read on the host."""
    return False


def run(args: argparse.Namespace) -> int:
    """Run `hcp tokenize`.

    Returns:
        0, also after SIGTERM; 130 after Ctrl-C. In both cases the same command continues the work.
    """
    tokenizer = Tokenizer(args.tokenizer, args.bos, args.eos, args.special_tokens)
    texts = Texts(args.data, args.field, args.bad_lines)
    for line in tokenizer.describe():
        terminal.say(line)
    asked = {
        "source": str(args.data),
        "field": args.field,
        "bad_lines": args.bad_lines,
        "skip": list(SKIPPED),
    }

    def write(work: Work) -> tokens.Meta:
        documents = lambda: work.through(texts.documents())  # noqa: E731
        return token_writer.write(documents, tokenizer, args.out, asked, terminal.say)

    began = time.perf_counter()
    try:
        with _terminated_as_interrupt():
            meta = in_background(write)
    except (KeyboardInterrupt, _TerminatedError) as stop:
        how = "hcp: stopped; the same command goes on where it stopped"
        terminal.say_error(f"{how} ({shown(args.out)}).")
        return 130 if isinstance(stop, KeyboardInterrupt) else 0
    seconds = time.perf_counter() - began
    for line in texts.report():
        terminal.say(line)
    terminal.say(
        f"{shown(args.out)}: {meta.documents:,} documents, {meta.tokens:,} tokens as "
        f"{tokenizer.dtype}, vocabulary of {meta.vocab_size:,}, in {seconds:.0f} s"
    )
    return 0


class _TerminatedError(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _TerminatedError

    def leave_it(number: int) -> None:
        """Do nothing: the handlers of the main thread end the command."""

    # Signals are taken from the watch around every command: its thread could look at the handler
    # only after it was restored, and would then end the process with another exit code.
    with watch.signals_to(leave_it):
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
