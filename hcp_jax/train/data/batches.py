"""Make batches of packed streams from a corpus: for training without end, for evaluation once.

The `tokens` and `targets` of a batch are `Gathered`: not read yet.

Only the seed is random, so the state of a pipeline is a few integers: they are saved with a
checkpoint, and the batches after it are the same. Streams are packed from the sizes of documents
alone. Every process does so for the whole global batch, and so has the same state, which fits any
number of processes. A batch holds references to tokens; `ContextParallel.shard_batch` reads only
those tokens that belong on a process's own devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64

from hcp_jax.parallel.placing import Gathered
from hcp_jax.sequence.mask import Mask, causal, documents
from hcp_jax.train.batch import Batch
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.data.streams import Segments, Stream, Streams
from hcp_jax.train.sections import Packing


def held_out_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    tokens: int | None,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask],
) -> list[Batch]:
    """Return batches to evaluate on; each token comes once, and the order is always the same.

    Args:
        corpus: the documents.
        batch_size: B; the last batch is filled up with rows of weight 0.
        seq_len: T.
        tokens: about how many tokens; segments are taken evenly from the whole corpus. None: all.
        mask: as in `make_batches`.
    """
    segments = Segments(corpus, seq_len)
    rows = list(Streams(segments, None, 1, only=held_out_segments(segments, tokens)))
    rows += [jax.tree.map(np.zeros_like, rows[0])] * (-len(rows) % batch_size)
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [_batch(corpus, jax.tree.map(lambda *x: np.stack(x), *batch), mask) for batch in batches]


def held_out_segments(segments: Segments, tokens: int | None) -> Int64[np.ndarray, "n"]:
    """Return the numbers of the segments to evaluate on, ascending; always the same.

    Args:
        segments: the segments of the held-out text.
        tokens: about how many tokens, taken evenly from the whole text. None: all.
    """
    order = evenly(len(segments))
    if tokens is not None:
        order = order[: 1 + np.searchsorted(np.cumsum(segments.sizes[order]), tokens)]
    return np.sort(order)


def evenly(number: int) -> Int64[np.ndarray, "n"]:
    """Return 0 … number - 1 in an order whose first n numbers are spread evenly, for every n.

    Multiples of the golden ratio modulo 1 are so (Knuth, The Art of Computer Programming, 6.4).

    >>> evenly(10)[:3].tolist()
    [0, 5, 2]
    """
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio
    return np.argsort(np.arange(number, dtype=np.uint64) * golden, kind="stable")


def describe_packing(corpus: Corpus, *, seq_len: int, seed: int, packing: Packing) -> str:
    """Return a line that says how full streams are and how many documents stay whole in them.

    Args:
        corpus: the documents.
        seq_len: T, tokens per stream.
        seed: as in `make_batches`.
        packing: as in `make_batches`.
    """
    return Streams(Segments(corpus, seq_len), seed, packing=packing).describe()


def packing_metrics(corpus: Corpus, batch: Batch) -> dict[str, float]:
    """Return metrics of how a batch of `make_batches` is packed.

    Args:
        corpus: the documents.
        batch: before it is put on devices.

    Returns:
        "fill", the share of the slots that hold a token, and "whole_documents": the share of whole
        documents among those that would fit a stream, 1 if there are none. A document that is cut
        counts in the batch where it begins.
    """
    refs, positions = batch["tokens"].places, batch["positions"]
    used = refs > 0
    begins = used & (positions == 0)
    ends = used & np.pad((positions == 0)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    first, last = refs[begins], refs[ends]
    from_start = first & 2 > 0
    fits = corpus.sizes_at(first[from_start]) < positions.shape[1]
    whole = last[from_start] & 1 > 0
    share = float(whole[fits].mean()) if fits.any() else 1.0
    return {"fill": float(used.mean()), "whole_documents": share}


def _in_documents(segment_ids: Int32[np.ndarray, "B T"]) -> Mask:
    return causal() & documents(segment_ids, padding_id=0)


def make_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask] = _in_documents,
    prefetch: int = 2,
    put: Callable[[Batch], Any] = lambda batch: batch,
    packing: Packing = "whole",
    mtp_depths: int = 0,
) -> grain.DatasetIterator[Any]:
    """Return an iterator over the batches of `packed_batches`, prepared ahead by a thread.

    Args:
        corpus: as in `packed_batches`.
        batch_size: as in `packed_batches`.
        seq_len: as in `packed_batches`.
        seed: as in `packed_batches`.
        mask: as in `packed_batches`.
        prefetch: batches that the thread prepares ahead.
        put: called by that thread with each batch, such as `ContextParallel.shard_batch`.
        packing: as in `packed_batches`.
        mtp_depths: as in `packed_batches`.
    """
    batches = packed_batches(
        corpus,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        mask=mask,
        packing=packing,
        mtp_depths=mtp_depths,
    )
    return iter(prefetched(batches.map(put), prefetch))


def packed_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask] = _in_documents,
    packing: Packing = "whole",
    mtp_depths: int = 0,
) -> grain.IterDataset[Batch]:
    """Return batches of packed streams, in natural order, without end.

    Args:
        corpus: the documents.
        batch_size: B, streams per batch, of all processes together.
        seq_len: T, tokens per stream.
        seed: seed of the order of the documents.
        mask: returns the model's mask for streams whose documents have these segment ids
            (`ModelConfig.mask`).
        packing: whether documents stay whole or every slot is filled; see `DataConfig`.
        mtp_depths: number of depths of multi-token prediction to give targets for.
    """
    streams = Streams(Segments(corpus, seq_len), seed, packing=packing)
    return streams.batch(batch_size).map(lambda rows: _batch(corpus, rows, mask, mtp_depths))


def token_arrays(
    corpus: Corpus, refs: Int64[np.ndarray, "R T"], mtp_depths: int = 0
) -> dict[str, Any]:
    """Return the entries of a `Batch` that are read from the corpus, and their weights.

    Targets further on are those of the document itself, so they do not depend on how documents are
    cut over streams and devices.

    Args:
        corpus: the documents.
        refs: references of the tokens; 0 for padding.
        mtp_depths: number of depths of multi-token prediction; without any, they have no entries.
    """
    arrays = {
        "tokens": Gathered(refs, corpus.tokens_at),
        "targets": Gathered(refs, corpus.targets_at),
        "weights": (refs > 0).astype(np.float32),
    }
    if mtp_depths:
        further = np.stack([corpus.further(refs, d + 1) for d in range(mtp_depths)], axis=-1)
        arrays["mtp_targets"] = Gathered(further, corpus.targets_at)
        arrays["mtp_weights"] = (further > 0).astype(np.float32)
    return arrays


def read(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a batch, with those that are not read yet read as a whole."""
    return {name: x.whole() if isinstance(x, Gathered) else x for name, x in arrays.items()}


def prefetched(dataset: grain.IterDataset[Any], number: int) -> grain.IterDataset[Any]:
    """Return a dataset of which a thread prepares the next `number` elements ahead."""
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=number)


def _batch(
    corpus: Corpus,
    rows: Stream,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask],
    mtp_depths: int = 0,
) -> Batch:
    others = {"positions": rows.positions, "mask": mask(rows.segment_ids)}
    batch: Any = token_arrays(corpus, rows.refs, mtp_depths) | others
    return batch
