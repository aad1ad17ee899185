"""Eight simulated devices for every test, before jax's backend starts.

`HCP_TEST_PLATFORM=gpu` leaves the platform alone, so that `pytest -m gpu` sees the GPUs.
"""

import collections
import gc
import os
import pathlib
import signal

import hypothesis
import jax
import jaxtyping
import pytest

NUM_DEVICES = 8

if os.environ.get("HCP_TEST_PLATFORM", "cpu") == "cpu":
    # Tests compile much and compute little: without LLVM's optimisations they take a third less.
    # The older emitters of loops compile in less than half the time. Later jaxlibs have lost them,
    # and a flag that they do not know ends the process.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
else:
    # The workers of pytest-xdist share the GPU: none may take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Tracing makes many objects and little garbage: collecting it as often as Python does by default
# takes a fifth of the time.
gc.set_threshold(50_000, 20, 20)

# A shell that starts tests in the background lets them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test reads or writes the user's compiled programs, nor do the commands that tests start.
os.environ["HCP_PROGRAM_CACHE"] = "off"

# Nor what the user's GPUs have passed, nor their tiles: all tests compile alike everywhere.
os.environ["HCP_KERNEL_CHECK"] = "off"
os.environ["HCP_KERNEL_TILES"] = "off"

# The annotations of the kernels' functions are checked in every call, shapes included. Not those of
# rooms whose public functions answer wrong shapes with a ValueError of their own.
jaxtyping.install_import_hook(["hcp_jax.kernels"], "beartype.beartype")

# Arrays of different ranks that broadcast by accident are an error, as in jax's own tests.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The time of one example says little: the first one compiles.
hypothesis.settings.register_profile("hcp", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("hcp")


MOST_BYTES = 2 << 30
"""A process that holds more at the end of a file of tests drops its compiled programs."""


@pytest.fixture(autouse=True, scope="module")
def _programs_of_earlier_files_do_not_fill_the_memory():
    yield
    pages = pathlib.Path("/proc/self/statm")  # only Linux has it
    if (
        pages.exists()
        and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > MOST_BYTES
    ):
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items):
    # Files with many slow tests first: one that began last would leave the other worker without
    # work. Each file stays whole, and keeps the order of its tests.
    slow = collections.Counter(i.path for i in items if i.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="no GPU here (run with HCP_TEST_PLATFORM=gpu on a GPU machine)")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
