"""The pages of the docs: their examples run, and their links lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_EXAMPLES = [
    page for page in PAGES if "A test runs the blocks of this page" in page.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_run_from_top_to_bottom(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) > 3
    names = {}
    for block in blocks:
        assert block is blocks[0] or "assert" in block or "agrees" in block
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


TABLES = [*PAGES, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_a_table_has_a_line_below_its_head_and_as_many_columns_everywhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = table.replace("\\|", "").splitlines()
        assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", "".join(lines[1:2]).strip()), table
        assert len({line.strip().count("|") for line in lines}) == 1, table
