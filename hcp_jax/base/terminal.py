"""Print text safely: untrusted text cannot control the terminal.

Tensor names, file names, JSON keys, host names and documents are untrusted. Control characters and
escape sequences in them could colour, move or clear the screen, line breaks could forge lines of
output, and characters that reverse the direction of text could make one name look like another. So
everything that the library prints passes through this module:

- `say` prints plain text, `console` makes a Rich console and `Formatter` formats log records; each
  escapes unsafe characters on output, so that callers cannot forget to;
- `printable` escapes one quoted name, on one line and of bounded length.
"""

import logging
import sys
import traceback
from collections.abc import Iterable
from typing import IO, Any

SHOWN = 200
"""Default number of characters of a quoted name in a message."""

_LONGEST_LINE = 4000  # characters of a line of a log or an error


def printable(text: object, limit: int = SHOWN) -> str:
    r"""Return text as one line, with every character escaped that could control a terminal.

    Args:
        text: text to quote; other objects are converted with `str`.
        limit: most characters to keep; the result says how many were left out.

    >>> printable("\x1b[31mred\nand\u202egreen")
    '\\x1b[31mred\\nand\\u202egreen'
    >>> printable("a" * 300, limit=5)
    'aaaaa… (295 more characters)'
    """
    text = str(text)
    head = text[:limit]
    if not head.isprintable():
        head = "".join(c if c.isprintable() else _escaped(c) for c in head)
    left = len(text) - limit
    return f"{head}… ({left} more characters)" if left > 0 else head


def safe_lines(text: object, limit: int = _LONGEST_LINE) -> str:
    """Return text of several lines, each line passed through `printable`."""
    return "\n".join(printable(line, limit) for line in str(text).split("\n"))


def say(text: object, *, file: IO[str] | None = None) -> None:
    """Print text of one or several lines, escaped, and flush.

    Args:
        text: text to print.
        file: stream to print to; standard output if None.
    """
    # If the terminal cannot show a character (an ASCII locale), the message must still appear.
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    line = safe_lines(text, sys.maxsize).encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=file, flush=True)


def say_error(text: object) -> None:
    """Print a message on standard error, with the length of its lines bounded."""
    say(safe_lines(text), file=sys.stderr)


def say_traceback(error: BaseException) -> None:
    """Print the traceback of an error on standard error."""
    say("".join(traceback.format_exception(error)).rstrip("\n"), file=sys.stderr)


class Formatter(logging.Formatter):
    """Log formatter that escapes every line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's message with each line escaped and its length bounded."""
        return safe_lines(super().format(record))


def log_handler() -> logging.Handler:
    """Return a handler that writes log messages, escaped, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    return handler


def console(**options: Any) -> Any:
    """Return a Rich console that prints plain text and never interprets markup or control codes.

    Args:
        **options: options of `rich.console.Console`.
    """
    import rich.console

    settings: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if not (options.get("file") or sys.stdout).isatty():
        # FORCE_COLOR, which Jupyter and CI services set, would let Rich move the cursor in a pipe.
        settings["force_terminal"] = False
    made = rich.console.Console(**settings | options)
    made.push_render_hook(_hook())
    return made


def _hook() -> Any:
    """Return a Rich render hook that escapes all printed text and keeps styles."""
    import rich.console
    import rich.control
    import rich.segment

    class Safe:
        def __init__(self, shown: Any):
            self._shown = shown

        def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
            for segment in console.render(self._shown, options):
                if segment.control:
                    yield segment
                else:
                    yield rich.segment.Segment(safe_lines(segment.text, sys.maxsize), segment.style)

    class Hook(rich.console.RenderHook):
        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            # Controls are created by Rich itself; printed text never becomes one.
            return [r if isinstance(r, rich.control.Control) else Safe(r) for r in renderables]

    return Hook()


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
