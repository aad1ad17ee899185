"""Text for the terminal: what a file, a name or another host says cannot steer the screen.

Tensor names, file names, keys of JSON, host names and documents are written by others. Control
characters and escape sequences in them could colour, move or clear what is on the screen, line
breaks could forge lines of ours, and characters that reverse the direction of text could make a
name look like another one. So all that the library prints passes through here:

- `say` prints plain text, `console` makes a Rich console, `Formatter` formats log records: whatever
  they are given is made safe on its way out, so that no message can forget it;
- `printable` makes one quoted name safe, on one line and of bounded length.
"""

import logging
import sys
import traceback
from collections.abc import Iterable
from typing import IO, Any

SHOWN = 200
"""Characters of a quoted name in a message, if the caller says nothing else."""

_LONGEST_LINE = 4000  # characters of a line of a log or an error


def printable(text: object, limit: int = SHOWN) -> str:
    r"""Return text as one line that a terminal shows as it is.

    Args:
        text: what is quoted; of other objects, their `str`.
        limit: characters that are kept; of longer text, the number left out is told.

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
    """Return text of several lines with each line made `printable`."""
    return "\n".join(printable(line, limit) for line in str(text).split("\n"))


def say(text: object, *, file: IO[str] | None = None) -> None:
    """Print text of one or several lines, made safe, and flush.

    Args:
        text: what to print.
        file: where to; standard output if None.
    """
    # A terminal that cannot show a letter (an ASCII locale) must not cost the message.
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    line = safe_lines(text, sys.maxsize).encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=file, flush=True)


def say_error(text: object) -> None:
    """Print a message on standard error, lines bounded in length."""
    say(safe_lines(text), file=sys.stderr)


def say_traceback(error: BaseException) -> None:
    """Print the traceback of an error on standard error."""
    say("".join(traceback.format_exception(error)).rstrip("\n"), file=sys.stderr)


class Formatter(logging.Formatter):
    """A log formatter whose lines are safe."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's message, each line safe and bounded."""
        return safe_lines(super().format(record))


def log_handler() -> logging.Handler:
    """Return a handler that writes the messages of log records, safe, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    return handler


def console(**options: Any) -> Any:
    """Return a Rich console that prints what it is given as text, never as markup or control.

    Args:
        **options: of `rich.console.Console`.
    """
    import rich.console

    made = rich.console.Console(**{"highlight": False, "markup": False, "emoji": False} | options)
    made.push_render_hook(_hook())
    return made


def _hook() -> Any:
    """Return a hook of Rich's that makes the text in everything printed safe; styles stay."""
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
            # A Control is an object of Rich's own: no text that is printed becomes one.
            return [r if isinstance(r, rich.control.Control) else Safe(r) for r in renderables]

    return Hook()


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
