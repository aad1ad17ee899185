"""Define the data of a step: batches, and the microbatches on the devices that make up a step."""

from typing import Any, NamedTuple, NotRequired, TypedDict


class Batch(TypedDict):
    """Packed streams with their targets, in host memory or on the devices.

    With multi-token prediction of D depths, entry d of a token's `mtp_targets` is the target
    d + 1 places further on in its document. What depth d embeds is the target of the depth before.

    Attributes:
        tokens: int32[R, T].
        targets: int32[R, T], the tokens to predict.
        positions: int32[R, T], of each token in its document.
        weights: float32[R, T], 0 where the target does not count.
        mask: `hcp_jax.Mask`.
        mtp_targets: int32[R, T, D]; only with multi-token prediction.
        mtp_weights: float32[R, T, D], 0 past the end of the document; as `mtp_targets`.

    A batch is a plain dict, so that `jax.jit` and `ContextParallel.shard_batch` take it. In host
    memory an array may be `Gathered`: not read yet.
    """

    tokens: Any
    targets: Any
    positions: Any
    weights: Any
    mask: Any
    mtp_targets: NotRequired[Any]
    mtp_weights: NotRequired[Any]


class PlacedMicrobatch(NamedTuple):
    """A batch on the devices, and the program of the menu that computes it.

    Attributes:
        key: the key of its program in `Menu.programs`; anything hashable.
        arrays: the batch.
    """

    key: Any
    arrays: Batch


class PlacedStep(NamedTuple):
    """The microbatches of one optimizer step, on the devices.

    Attributes:
        microbatches: in the order in which they run.
        documents: the numbers, from 0, of the documents in the step.
        facts: metrics of the step that are known before it is computed.
    """

    microbatches: tuple[PlacedMicrobatch, ...]
    documents: tuple[int, ...]
    facts: dict[str, float]
