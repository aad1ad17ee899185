"""From files on disk to batches: text, tokens, streams, and which documents each step trains on."""

from hcp_jax.train.data.corpus import (
    SEPARATOR,
    VOCAB_SIZE,
    Corpus,
    DataConfig,
    evenly,
    held_out_batches,
    make_batches,
    open_corpus,
)

__all__ = [
    "SEPARATOR",
    "VOCAB_SIZE",
    "Corpus",
    "DataConfig",
    "evenly",
    "held_out_batches",
    "make_batches",
    "open_corpus",
]
