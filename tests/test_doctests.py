"""Every example in a docstring is true, on the eight simulated devices of the tests."""

import doctest
import importlib
import inspect
import pathlib

import pytest

import hcp_jax

ROOT = pathlib.Path(hcp_jax.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_are_true(module):
    outcome = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_public_name_has_an_example():
    """Those of `hcp`, of its rooms, and what a user calls of a `ContextParallel`."""
    public = {}
    for name in hcp_jax.__all__:
        found = getattr(hcp_jax, name)
        inside = {f"{name}.{n}": getattr(found, n) for n in getattr(found, "__all__", ())}
        public |= inside or {name: found}
    methods = "describe padded_length place positions roll shard shard_batch shard_buffers unshard unshard_buffers"
    public |= {name: getattr(hcp_jax.ContextParallel, name) for name in methods.split()}
    public["Pipeline"] = importlib.import_module("hcp_jax.pipeline.ticks").Pipeline
    assert len(public) > 50
    assert [name for name, found in public.items() if ">>> " not in inspect.getdoc(found)] == []
