"""Keep compiled programs on disk while tests of one module run, and no longer."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_programs(folder: pathlib.Path, least_seconds: float = 1.0) -> Iterator[pathlib.Path]:
    """Keep programs that took at least so long to compile in a folder.

    Once jax has opened a cache, it goes on to use it when its settings have been put back, until it
    is reset.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": least_seconds,
    }
    before = {name: jax.config.values[name] for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield folder
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
