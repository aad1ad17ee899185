"""Make random documents on groups of devices, and the exact attention of each by itself."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int64, Shaped

from hcp_jax import dynamic
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.microbatch import place_microbatch
from hcp_jax.sequence import groupings
from hcp_jax.sequence.packing import Microbatch, PackedMicrobatch
from hcp_jax.verify import measures
from hcp_jax.verify.measures import Attended

_NO_TOKEN = 50.0  # value of slots without a token; it must not change results


class PackedDocuments(NamedTuple):
    """Microbatch with the lengths of its documents, which are numbered from 0 group by group."""

    microbatch: Microbatch
    lengths: Int64[np.ndarray, "n"]

    def packed(self, tokens: int) -> tuple[PackedMicrobatch, Int64[np.ndarray, "D M"]]:
        """Return its buffers, and the token number in each slot, or -1 for an empty slot.

        Tokens are numbered over all documents, concatenated.
        """
        packed = dynamic.pack(self.microbatch, self.lengths, tokens)
        begins = np.append(np.cumsum(self.lengths) - self.lengths, -1)
        return packed, begins[packed.document] + packed.position


def some_groupings(cp: ContextParallel, widest: int, lanes: int) -> list[groupings.Grouping]:
    """Return groupings that the program serves: of its widest groups, and of mixed ones."""
    devices = cp.axis_size(cp.flat_axes)
    sizes = [n for n in groupings.chain(devices, cp.axis_size(cp.cp_inner), lanes) if n <= widest]
    equal = (widest,) * (devices // widest)
    narrow = sizes[0]
    mixed = (*equal[1:], *(narrow,) * (widest // narrow))
    return [equal] if mixed == equal else [equal, mixed]


def random_microbatch(
    cp: ContextParallel,
    model: ModelConfig,
    grouping: groupings.Grouping,
    lanes: int,
    tokens: int,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a batch for one layer's attention, and the exact results in its buffers."""
    held = random_documents(grouping, lanes, tokens, rng)
    inputs = measures.random_inputs(rng, model, (int(held.lengths.sum()),))
    packed, index = held.packed(tokens)
    exact = {
        part: in_buffers(x, index, -np.inf if part == "lse" else 0.0)
        for part, x in _alone(model, held.lengths, inputs)._asdict().items()
    }
    float32 = {
        name: in_buffers(x.astype(np.float32), index, _NO_TOKEN) for name, x in inputs.items()
    }
    batch = place_microbatch(cp, packed, float32, sliding_window=model.widest_window)
    return batch, exact


def random_documents(
    grouping: groupings.Grouping, lanes: int, tokens: int, rng: np.random.Generator
) -> PackedDocuments:
    """Return up to six random documents per group; a widest group is full, a narrowest empty."""
    full, empty = grouping.index(max(grouping)), grouping.index(min(grouping))
    if full == empty and len(grouping) > 1:
        empty = full + 1
    lengths: list[int] = []
    documents = []
    for group, size in enumerate(grouping):
        most = size * tokens
        total = most if group == full else 0 if group == empty else rng.integers(1, most + 1)
        borders = np.unique([0, *rng.integers(0, total + 1, 5), total])
        documents.append(tuple(range(len(lengths), len(lengths) + borders.size - 1)))
        lengths += np.diff(borders).tolist()
    return PackedDocuments(
        Microbatch(grouping, tuple(documents), lanes), np.array(lengths, np.int64)
    )


def _alone(
    model: ModelConfig, lengths: Int64[np.ndarray, "n"], inputs: dict[str, np.ndarray]
) -> Attended:
    """Compute dense float64 attention on each document by itself; concatenate the results."""
    answers = []
    for begin, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        # Pad to few different lengths, because each is compiled; the document does not see the
        # padding after it.
        tail = max(16, 1 << int(length - 1).bit_length()) - length
        row = {
            name: np.pad(x[begin : begin + length], ((0, tail), (0, 0), (0, 0)))[None]
            for name, x in inputs.items()
        }
        with jax.enable_x64(True):
            found = measures.attention(
                None, model.logits_soft_cap, "reference", row | {"mask": model.mask()}
            )
        answers.append([np.asarray(x)[0, :length] for x in found])
    return Attended(*map(np.concatenate, zip(*answers, strict=True)))


def in_buffers(
    natural: Shaped[np.ndarray, "T ..."], index: Int64[np.ndarray, "D M"], otherwise: float
) -> Shaped[np.ndarray, "D M ..."]:
    """Move values of concatenated tokens to their slots; `otherwise` fills the empty slots."""
    inside = (index >= 0).reshape(*index.shape, *[1] * (natural.ndim - 1))
    return np.where(inside, natural[index], np.asarray(otherwise, natural.dtype))
