"""From files on disk to batches: text, tokens, streams, and which documents each step trains on."""

from hcp_jax.train.data.corpus import (
    SEPARATOR,
    VOCAB_SIZE,
    Corpus,
    DataConfig,
    corpus_files,
    describe_packing,
    evenly,
    held_out_batches,
    make_batches,
    open_corpus,
    packing_metrics,
)

__all__ = [
    "SEPARATOR",
    "VOCAB_SIZE",
    "Corpus",
    "DataConfig",
    "corpus_files",
    "describe_packing",
    "evenly",
    "held_out_batches",
    "make_batches",
    "open_corpus",
    "packing_metrics",
]
