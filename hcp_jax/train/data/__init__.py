"""Turn files on disk into batches: text, tokens, packed streams, and the documents of each step.

The names are imported on first use: `hcp tokenize` needs no jax, but batches do.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcp_jax.train.data.batches import describe_packing as describe_packing
    from hcp_jax.train.data.batches import evenly as evenly
    from hcp_jax.train.data.batches import held_out_batches as held_out_batches
    from hcp_jax.train.data.batches import make_batches as make_batches
    from hcp_jax.train.data.batches import packing_metrics as packing_metrics
    from hcp_jax.train.data.corpus import SEPARATOR as SEPARATOR
    from hcp_jax.train.data.corpus import VOCAB_SIZE as VOCAB_SIZE
    from hcp_jax.train.data.corpus import Corpus as Corpus
    from hcp_jax.train.data.corpus import open_corpus as open_corpus
    from hcp_jax.train.sections import DataConfig as DataConfig

_HOME = {
    "SEPARATOR": "data.corpus",
    "VOCAB_SIZE": "data.corpus",
    "Corpus": "data.corpus",
    "DataConfig": "sections",
    "describe_packing": "data.batches",
    "evenly": "data.batches",
    "held_out_batches": "data.batches",
    "make_batches": "data.batches",
    "open_corpus": "data.corpus",
    "packing_metrics": "data.batches",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hcp_jax.train.{_HOME[name]}"), name)
