"""Turn files on disk into batches: text, tokens, packed streams, and the documents of each step.

The names are imported on first use: `hcp tokenize` needs no jax, but batches do.
"""

from typing import TYPE_CHECKING

from hcp_jax.base.lazy import lazy_names

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
    "Corpus": "hcp_jax.train.data.corpus",
    "DataConfig": "hcp_jax.train.sections",
    "SEPARATOR": "hcp_jax.train.data.corpus",
    "VOCAB_SIZE": "hcp_jax.train.data.corpus",
    "describe_packing": "hcp_jax.train.data.batches",
    "evenly": "hcp_jax.train.data.batches",
    "held_out_batches": "hcp_jax.train.data.batches",
    "make_batches": "hcp_jax.train.data.batches",
    "open_corpus": "hcp_jax.train.data.corpus",
    "packing_metrics": "hcp_jax.train.data.batches",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME)
