"""From outside: what will this run cost, and what will the compiler make of it?

    best = hcp.plan("llama3-8b", 131072, gpu="h100", hosts=4).best

The package can be called, because the verb and the place have one name: `hcp.plan(...)` is
`hcp_jax.plan.search.plan(...)`.
"""

import sys
import types
from typing import Any


class _Plan(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `hcp_jax.plan.search.plan`."""
        from hcp_jax.plan.search import plan

        return plan(*args, **options)


sys.modules[__name__].__class__ = _Plan
