"""What tests of runs in processes of their own share."""

import os

import pytest


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process on the CPU; those of a module share what they compile."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    cache = str(tmp_path_factory.mktemp("cache"))
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
