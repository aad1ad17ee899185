import importlib.util

import pytest

needs_cuda_compiler = pytest.mark.skipif(
    not any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{name}")
        for name in ("xla_cuda12", "xla_cuda13")
    ),
    reason="the CUDA compiler is not installed (pip install 'hcp_jax[aot]')",
)
