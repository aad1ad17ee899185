"""The pages of the docs: examples run, links lead somewhere, commands and keys are those there are."""

import argparse
import functools
import importlib
import pathlib
import re
import shlex
import warnings

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax import cli, program_cache
from hcp_jax.train import config, config_keys

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_COMMANDS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *PAGES]
WITH_EXAMPLES = [
    page for page in PAGES if "A test runs the blocks of this page" in page.read_text()
]
FAQ = (ROOT / "docs" / "faq.md").read_text()


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


@functools.cache
def parser(name):
    made = cli._Parser(prog=name)
    importlib.import_module(cli.COMMANDS[name].module).add_arguments(made)
    return made


def options(made):
    found = set(made._option_string_actions)
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options, action.choices.values()))
    return found


def commands(text):
    """Each `hcp ...` of a page: in blocks of bash, in indented blocks, and within sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    blocks += re.findall(r"^ {4}hcp .*(?:\\\n.*)*", text, re.M)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\|", line):
            found = re.search(r"(?:^|/| do )hcp ([a-z].*)", part.strip())
            if found:
                yield shlex.split(found[1], comments=True)
    for found in re.findall(r"`hcp ([a-z][^`]*)`", text):
        yield found.split()


def test_commands_that_the_pages_show_have_these_options():
    shown, wrong = 0, []
    for page in WITH_COMMANDS:
        for name, *rest in commands(page.read_text()):
            shown += 1
            known = options(parser(name)) if name in cli.COMMANDS else set()
            given = [word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)]
            spelt = {cli._one_spelling(option) for option in known}
            wrong += [
                (page.name, name, option)
                for option in given
                if name not in cli.COMMANDS or cli._one_spelling(option) not in spelt
            ]
            wrong += [] if name in cli.COMMANDS else [(page.name, name)]
    assert shown > 60
    assert wrong == []


def test_keys_of_configs_that_the_pages_name_are_keys():
    known = {key for key, _, _ in config_keys.keys(config.TrainConfig)}
    parts = {key.rsplit(".", depth)[0] for key in known for depth in (0, 1, 2, 3)}
    sections = sorted({key.split(".")[0] for key in known if "." in key})
    named = re.compile(rf"`-{{0,2}}((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)(?![\w/])")
    found = {(page.name, key) for page in WITH_COMMANDS for key in named.findall(page.read_text())}
    files = {"eval.jsonl", "model.safetensors", "checkpoint.py"}
    assert len(found) > 40
    assert [(page, key) for page, key in sorted(found) if key not in parts | files] == []


def test_messages_that_the_faq_quotes_are_those_that_come():
    mesh = hcp.make_mesh(cp_outer=2, cp_inner=4)
    q = jax.ShapeDtypeStruct((1, 64, 6, 8), np.float32)

    def attend(q, comm_type):
        cp = hcp.ContextParallel(mesh, comm_type=comm_type)
        return hcp.dot_product_attention(q, q, q, cp=cp)

    start, needs = re.search(r'"(q has N=6 heads; a2a over) … (needs N % 8 == 0)', FAQ).groups()
    with pytest.raises(ValueError, match=f"^{start} .* {needs}.*one of 1, 2, 3, 6 for") as error:
        jax.eval_shape(lambda q: attend(q, "a2a"), q)
    assert "Use comm_type='p2p'" in str(error.value)
    assert jax.eval_shape(lambda q: attend(q, "p2p"), q).shape == q.shape

    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), comm_type="p2p")
    x = cp.shard(np.ones((1, 50, 1, 4), np.float32))
    assert '"attention with this mask also sees padding"' in FAQ
    with pytest.warns(UserWarning, match="attention with this mask also sees padding"):
        jax.eval_shape(lambda x: hcp.dot_product_attention(x, x, x, cp=cp), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = hcp.bidirectional() & hcp.lengths(50)
        jax.eval_shape(lambda x: hcp.dot_product_attention(x, x, x, cp=cp, mask=mask), x)
    assert f"`{program_cache.VARIABLE}`" in FAQ
