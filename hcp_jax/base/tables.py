"""Print tables and text that fit a narrow terminal and are complete in a file or a pipe.

`console` returns a console that knows the width of the output; `show` prints a table. If the
terminal is too narrow, `show` leaves out the least important columns and says so; if that is not
enough, it prints each row as a line of names and values. Text is printed unchanged: Rich markup,
such as `[in, out]`, is never interpreted.
"""

import sys
from collections.abc import Sequence

import rich.box
import rich.cells
import rich.console
import rich.table
import rich.text

from hcp_jax.base import terminal

_GAP = 1  # padding in character cells; each vertical line of the box takes one more
_NO_LIMIT = 10_000  # width in character cells when the output is a file or a pipe


def console() -> rich.console.Console:
    """Return a console on standard output, as wide as the terminal; unlimited in a file or pipe."""
    width = None if sys.stdout.isatty() else _NO_LIMIT
    return terminal.console(file=sys.stdout, width=width)


def show(
    to: rich.console.Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    drop: Sequence[str] = (),
    title: str = "",
) -> None:
    """Print a table.

    Args:
        to: console to print on.
        headings: heading of each column.
        rows: rows, each with one cell per column.
        left: columns to align to the left; the others hold numbers and align to the right.
        drop: columns to leave out if the table is too wide, in this order.
        title: text printed above the table.
    """
    cells = [headings, *rows]
    widths = {
        name: max(rich.cells.cell_len(str(row[i])) for row in cells)
        for i, name in enumerate(headings)
    }
    kept = list(headings)
    dropped = []
    for name in drop:
        if _total(widths, kept) <= to.width:
            break
        kept.remove(name)
        dropped.append(name)
    if title:
        to.print(title)
    if _total(widths, kept) > to.width:
        for row in rows:
            cells_of = zip(headings, row, strict=True)
            to.print("- " + ", ".join(f"{name} {cell}".strip() for name, cell in cells_of))
        return
    chosen = [[row[i] for i, name in enumerate(headings) if name in kept] for row in rows]
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, _GAP, 0, 0),
    )
    for name in kept:
        table.add_column(
            rich.text.Text(name),
            justify="left" if name in left else "right",
            no_wrap=True,
        )
    for row in chosen:
        table.add_row(*(rich.text.Text(str(cell)) for cell in row))
    to.print(table)
    if dropped:
        to.print(
            f"(left out at {to.width} columns: {', '.join(dropped)}; a wider terminal, a pipe or "
            "--json has them)"
        )


def _total(widths: dict[str, int], kept: Sequence[str]) -> int:
    return sum(widths[name] + _GAP for name in kept) + len(kept) - 1
