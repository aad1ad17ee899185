"""Draw cases for the property tests of `dynamic`: clusters of any size, documents that fit."""

import dataclasses
from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from hcp_jax.dynamic import Cost

# Deterministic, and as many cheap cases as there is time for.
QUICK = {"deadline": None, "derandomize": True, "max_examples": 500}

NUM_DEVICES = st.one_of(
    st.integers(1, 24), st.sampled_from([32, 48, 64, 96, 100, 127, 128, 256, 384, 512])
)


@dataclasses.dataclass(frozen=True)
class Case:
    num_devices: int
    tokens: int
    lengths: list[int]
    min_size: int
    max_size: int | None
    cost: Cost


@st.composite
def costs(draw) -> Cost:
    """Draw from links that cost nothing to links that are all that counts; hosts of any size."""
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    default = Cost()
    return dataclasses.replace(
        default,
        seconds_per_byte_inside=default.seconds_per_byte_inside * scale,
        seconds_per_byte_across=default.seconds_per_byte_across * scale,
        seconds_per_token=default.seconds_per_token * draw(st.sampled_from([0.0, 0.01, 1.0])),
        tile=draw(st.sampled_from([0, 64])),
        devices_per_host=draw(st.sampled_from([1, 4, 8, 72])),
        lanes=draw(st.sampled_from([1, 2, 3, 8, 16])),
        kv_heads=draw(st.sampled_from([1, 2, 8])),
        head_chunks=draw(st.sampled_from([1, 4])),
    )


@st.composite
def cases(draw, max_documents: int = 40, num_devices=NUM_DEVICES) -> Case:
    """Draw documents that fit, of lengths that are hard on borders: powers of two, one more, one less."""
    devices = draw(num_devices)
    tokens = draw(st.sampled_from([1, 7, 64, 100, 2048]))
    cost = draw(costs())
    sizes = cost.widths(devices)
    min_size, max_size = 1, None
    if draw(st.booleans()):
        min_size = draw(st.sampled_from(sizes))
        max_size = draw(st.sampled_from([None, *(size for size in sizes if size >= min_size)]))
    widest = (devices if max_size is None else max_size) * tokens
    near = st.sampled_from([tokens, 2 * tokens, tokens + 1, 2 * tokens - 1, widest, widest // 2])
    length = st.one_of(
        st.integers(1, min(widest, tokens)), st.integers(1, widest), near.map(lambda x: max(x, 1))
    )
    lengths = draw(st.lists(length.map(lambda x: min(x, widest)), max_size=max_documents))
    return Case(devices, tokens, lengths, min_size, max_size, cost)


def all_groupings(sizes: Sequence[int], num_devices: int) -> Iterator[tuple[int, ...]]:
    """Yield every grouping over a few devices, groups in descending order."""

    def partitions(rest: int, allowed: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if rest == 0:
            yield ()
            return
        for i, size in enumerate(allowed):
            if size <= rest:
                for tail in partitions(rest - size, allowed[i:]):
                    yield (size, *tail)

    return partitions(num_devices, tuple(sorted(sizes, reverse=True)))
