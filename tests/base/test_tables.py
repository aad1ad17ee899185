"""Tables: what does not fit is left out and told, or told row by row; nothing is cut or taken for markup."""

import io

import pytest

from hcp_jax.base import tables, terminal

HEADINGS = ("name", "[in, out]", "seconds", "share", "remark")
ROWS = [
    ("a2a+p2p", "[8, 4]", "12.5", "30 %", "[red]not red[/red]"),
    ("p2p", "[1, 32]", "9", "1 %", ""),
]


def printed(width, drop=("remark", "share", "seconds")):
    out = io.StringIO()
    console = terminal.console(file=out, width=width)
    tables.show(console, HEADINGS, ROWS, left=("name", "[in, out]", "remark"), drop=drop)
    return out.getvalue()


def test_a_wide_table_is_whole_and_no_text_is_markup():
    text = printed(200)
    assert [name for name in HEADINGS if name not in text] == []
    assert "[red]not red[/red]" in text
    assert "left out" not in text


@pytest.mark.parametrize(
    ("width", "dropped"), [(60, []), (45, ["remark"]), (31, ["share", "remark"])]
)
def test_the_least_important_columns_go_first_and_are_named(width, dropped):
    text = printed(width)
    table, _, told = text.partition("(left out")
    assert [name for name in HEADINGS if name not in table] == dropped
    assert all(name in told for name in dropped)
    assert max(map(len, text.splitlines())) <= width


def test_what_cannot_be_dropped_becomes_a_line_of_names_and_values():
    words = printed(30, drop=()).split()
    told = " ".join(words)
    assert "- name a2a+p2p, [in, out] [8, 4], seconds 12.5, share 30 %, remark [red]not red" in told
    assert "- name p2p, [in, out] [1, 32], seconds 9, share 1 %, remark" in told


def test_a_pipe_has_the_whole_table(capsys):
    wide = [(*row[:-1], "x" * 500) for row in ROWS]
    tables.show(tables.console(), HEADINGS, wide, drop=("remark",))
    assert "x" * 500 in capsys.readouterr().out
