"""Describe recurrent mixers: Mamba-2, gated delta net and KDA; data, without jax.

Each has a config, the section of `ModelConfig` that a user writes, and a spec, which adds what the
model decides (its width, depth and dtype).
"""

import dataclasses
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.cost.traffic import ITEM_BYTES, Remat, Traffic

if TYPE_CHECKING:
    from hcp_jax.parallel.context import ContextParallel


def _size(default: int | None = None) -> int:
    given: dict[str, Any] = {} if default is None else {"default": default}
    made: int = field(**given, metadata=fixed(above=0, most=MOST))
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Sizes of Mamba-2 mixers.

    Attributes:
        num_heads: H.
        head_size: P, the channels of one head.
        state_size: N; the state of a head is `[N, P]`.
        num_groups: G; H / G heads share B and C, and are normalised together.
        conv_size: tokens that the short convolution sees, the current one included.
        step_limit: least and greatest Δ; null for none.
        chunk: tokens per chunk of the recurrence.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    num_heads: int = _size()
    head_size: int = _size(64)
    state_size: int = _size(128)
    num_groups: int = _size(1)
    conv_size: int = _size(4)
    step_limit: tuple[float, float] | None = field(default=None, metadata=numbers(least=0))
    chunk: int = field(default=128, metadata=free(above=0, most=MOST))

    def __post_init__(self):
        check(self, "mamba2.")
        _multiple("mamba2.", self, "num_heads", "num_groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
    """Sizes of gated delta nets.

    Attributes:
        num_key_heads: G, heads of queries and keys.
        num_value_heads: H; H / G of them share a query and key head.
        key_size: K.
        value_size: V; the state of a head is `[K, V]`.
        conv_size: tokens that the short convolution sees, the current one included.
        chunk: tokens per chunk of the recurrence, a power of two.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    num_key_heads: int = _size()
    num_value_heads: int = _size()
    key_size: int = _size(128)
    value_size: int = _size(128)
    conv_size: int = _size(4)
    chunk: int = field(default=64, metadata=free(above=0, most=MOST))

    def __post_init__(self):
        check(self, "gated_delta.")
        _multiple("gated_delta.", self, "num_value_heads", "num_key_heads")
        _power_of_two("gated_delta.", self.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig:
    """Sizes of KDA mixers.

    Attributes:
        num_heads: H.
        head_size: K = V; the state of a head is `[K, K]`. It is also the rank of the gates.
        conv_size: tokens that the short convolution sees, the current one included.
        chunk: tokens per chunk of the recurrence, a power of two.

    Raises:
        ValueError: if a size is less than 1, or `chunk` is not a power of two.
    """

    num_heads: int = _size()
    head_size: int = _size(128)
    conv_size: int = _size(4)
    chunk: int = field(default=64, metadata=free(above=0, most=MOST))

    def __post_init__(self):
        check(self, "kda.")
        _power_of_two("kda.", self.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent:
    """What all recurrent mixers have; each spec adds its sizes.

    Attributes:
        hidden_size: D.
        norm_eps: epsilon of the norm.
        depth: number of layers of the model, which scales the initial output weights.
        dtype: dtype of activations; decays and states are float32.
    """

    hidden_size: int
    norm_eps: float = 1e-5
    depth: int = 1
    dtype: str = "bfloat16"

    kind: ClassVar[str]
    window: ClassVar[int | None] = None  # nothing cuts off what a state holds
    pair_width: ClassVar[int] = 0  # no pairs of queries and keys

    @property
    def recurrence(self) -> Recurrence:
        """What determines the layer's cost."""
        raise NotImplementedError(f"{type(self).__name__} must say what it costs.")

    @property
    def cost(self) -> tuple[int, int | None, Recurrence | None]:
        """Head size of the attention, its window and the recurrence, as `LayerKind` has them."""
        return 0, None, self.recurrence

    @property
    def product_params(self) -> int:
        """Number of weights of the matrix products."""
        return self.recurrence.product_params

    def traffic(
        self, cp: "ContextParallel", *, rows: int, tokens: int, remat: Remat = "none"
    ) -> tuple[Traffic, ...]:
        """List the collectives of this mixer in one step.

        Args:
            cp: context of the layer.
            rows: rows of the batch, over all dp devices.
            tokens: tokens of a row, with padding; only under groups do the bytes depend on them.
            remat: what backward recomputes.
        """
        from hcp_jax.sequence.layout import runs_per_device

        if cp.widest_group is not None:
            return self.recurrence.grouped_traffic(
                cp.flat_axes,
                cp.widest_group,
                tokens=tokens // cp.size,
                tp=cp.axis_size(cp.tp),
                item_bytes=ITEM_BYTES[self.dtype],
                remat=remat,
            )
        return self.recurrence.traffic(
            cp.cp_axes,
            cp.mesh.shape,
            runs=runs_per_device(cp.layout),
            rows=rows // cp.axis_size(cp.dp),
            tp=cp.axis_size(cp.tp),
            item_bytes=ITEM_BYTES[self.dtype],
            remat=remat,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Spec(Recurrent, Mamba2Config):
    """Mamba-2 (Dao and Gu, 2024), as in Nemotron-H."""

    kind: ClassVar[str] = "mamba2"

    @property
    def recurrence(self) -> Recurrence:
        """What determines the layer's cost; z, x and the output are H P wide, B and C G N."""
        inner, states = self.num_heads * self.head_size, self.num_groups * self.state_size
        group = (self.num_groups, self.state_size)
        return Recurrence(
            heads=self.num_heads,
            key_size=self.state_size,
            value_size=self.head_size,
            matrix=False,
            convolved=((self.num_heads, self.head_size), group, group),
            conv_size=self.conv_size,
            chunk=self.chunk,
            product_params=self.hidden_size * (3 * inner + 2 * states + self.num_heads),
            tp_sizes=(self.num_heads,),
            key_heads=self.num_groups,
        )

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide; B and C are whole on every tp device."""
        return {"mamba2.num_heads": self.num_heads}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaSpec(Recurrent, GatedDeltaConfig):
    """Gated delta net (Yang et al., 2024), as in Qwen3-Next."""

    kind: ClassVar[str] = "gated_delta"

    @property
    def recurrence(self) -> Recurrence:
        """What determines the layer's cost; q and k are G K wide, v, z and the output H V."""
        keys, values = self.num_key_heads * self.key_size, self.num_value_heads * self.value_size
        key_heads = (self.num_key_heads, self.key_size)
        width = 2 * keys + 3 * values + 2 * self.num_value_heads
        return Recurrence(
            heads=self.num_value_heads,
            key_size=self.key_size,
            value_size=self.value_size,
            matrix=True,
            convolved=(key_heads, key_heads, (self.num_value_heads, self.value_size)),
            conv_size=self.conv_size,
            chunk=self.chunk,
            product_params=self.hidden_size * width,
            tp_sizes=tuple(self.tp_sizes.values()),
            key_heads=self.num_key_heads,
        )

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        return {
            "gated_delta.num_key_heads": self.num_key_heads,
            "gated_delta.num_value_heads": self.num_value_heads,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDASpec(Recurrent, KDAConfig):
    """Kimi delta attention (Kimi Linear, 2025)."""

    kind: ClassVar[str] = "kda"

    @property
    def recurrence(self) -> Recurrence:
        """What determines the layer's cost; q, k, v and the output are H K wide."""
        heads, size = (self.num_heads, self.head_size), self.head_size
        inner, width = self.num_heads * size, self.hidden_size
        return Recurrence(
            heads=self.num_heads,
            key_size=size,
            value_size=size,
            matrix=True,
            convolved=(heads,) * 3,
            conv_size=self.conv_size,
            chunk=self.chunk,
            product_params=width * (4 * inner + self.num_heads) + 2 * size * (width + inner),
            tp_sizes=(self.num_heads,),
            key_heads=self.num_heads,
            channel_decays=True,
        )

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        return {"kda.num_heads": self.num_heads}


def shrunk(config: Any, most: int) -> Any:
    """Return a config with its heads, each of at most `most` rows and columns; None for None."""
    if config is None:
        return None
    sizes = {
        f.name: min(getattr(config, f.name), most)
        for f in dataclasses.fields(config)
        if f.name in ("head_size", "state_size", "key_size", "value_size")
    }
    return dataclasses.replace(config, **sizes)


def _multiple(prefix: str, config: object, name: str, of: str) -> None:
    number, divisor = getattr(config, name), getattr(config, of)
    if number % divisor:
        raise ValueError(
            f"{prefix}{name}={number} must be a multiple of {of}={divisor}; change one of them."
        )


def _power_of_two(prefix: str, chunk: int) -> None:
    if chunk & (chunk - 1):
        raise ValueError(f"{prefix}chunk must be a power of two, got {chunk}.")
