"""Describe each layer of a decoder: a mixer and a feed-forward, and how the layers are stacked.

A spec is data: sizes and options of one layer, without jax. The module that computes it has the
same name in `layers/`, and `layers/decoder.py` lists which module computes which spec. Whatever the
rest of the library wants to know about a layer, its weights, its widths, what tp must divide, it
asks of the spec; how its parameters are cut, decayed and stored, it asks of the module's `RULES`.

Layers that are equal are stacked: their parameters are one array each, with a leading dim of
layers, and one scan computes them. A model whose layers repeat in a period (such as five windows
and one full attention) has one stack for each position of the period.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from hcp_jax.cost.experts import Experts
from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.cost.traffic import ITEM_BYTES, Remat, Traffic, layer_traffic
from hcp_jax.kernels.tiles import Product
from hcp_jax.models.layers.rope_scaling import RopeScaling
from hcp_jax.models.moe_config import Router
from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec

if TYPE_CHECKING:
    from hcp_jax.parallel.context import ContextParallel

Activation = Literal["silu", "gelu_tanh", "clamped_silu"]
Norms = Literal["before", "after", "both"]
QKNorm = Literal["head", "heads"]


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """RMSNorm (Zhang and Sennrich, 2019).

    Attributes:
        epsilon: added to the mean square.
        shifted: the parameter is the scale minus 1 (Gemma).
        dtype: dtype of the result.
    """

    epsilon: float
    shifted: bool
    dtype: str


class Rotary(NamedTuple):
    """Rotary embedding of a layer.

    Attributes:
        theta: base of the frequencies.
        dims: number of dims of a head that are rotated, the first ones; even.
        scaling: how frequencies are stretched; None if they are not.
    """

    theta: float
    dims: int
    scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention.

    Attributes:
        hidden_size: D.
        num_heads: N, query heads.
        num_kv_heads: K.
        head_size: H.
        window: number of tokens that a query sees, itself included; None for all earlier ones.
        rotary: rotation of q and k; None for attention without positions (NoPE).
        scale: factor of the logits; 1 / sqrt(H) if None.
        soft_cap: soft cap of the logits; None for no cap.
        sinks: a learnt logit per head that takes part in the softmax but adds no value.
        qk_norm: RMSNorm of q and k over each "head" or over all "heads" together; None for none.
        qkv_bias: a bias on q, k and v.
        o_bias: a bias on the output.
        gate: multiply the output of each head by a learnt sigmoid per entry, before o_proj.
        norm: the norm of q and k.
        depth: number of layers of the model, which scales the initial output weights.
        dtype: dtype of activations, and of weights when they are used.
        implementation: implementation of the attention core; None for the best.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None
    rotary: Rotary | None
    scale: float | None
    soft_cap: float | None
    sinks: bool
    qk_norm: QKNorm | None
    qkv_bias: bool
    o_bias: bool
    gate: bool
    norm: NormSpec
    depth: int
    dtype: str
    implementation: str | None

    kind: ClassVar[str] = "attention"
    recurrence: ClassVar[Recurrence | None] = None

    @property
    def pair_width(self) -> int:
        """Width that each visible pair of a query and a key costs: heads times head size."""
        return self.num_heads * self.head_size

    @property
    def cost(self) -> tuple[int, int | None, Recurrence | None]:
        """Head size of the attention, its window and the recurrence, as `LayerKind` has them."""
        return self.head_size, self.window, None

    @property
    def product_params(self) -> int:
        """Number of weights of the matrix products."""
        heads = (2 + self.gate) * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * self.head_size * heads

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        return {"num_kv_heads": self.num_kv_heads, "num_heads": self.num_heads}

    def traffic(
        self, cp: "ContextParallel", *, rows: int, tokens: int, remat: Remat = "none"
    ) -> tuple[Traffic, ...]:
        """List the collectives of this mixer in one step.

        Args:
            cp: context of the layer.
            rows: rows of the batch, over all dp devices.
            tokens: tokens of a row, with padding.
            remat: what backward recomputes.
        """
        tp = cp.axis_size(cp.tp)
        return layer_traffic(
            cp.strategy,
            cp.mesh.shape,
            tokens=rows // cp.axis_size(cp.dp) * tokens // cp.size,
            heads=self.num_heads // tp,
            kv_heads=self.num_kv_heads // tp,
            head_size=self.head_size,
            item_bytes=ITEM_BYTES[self.dtype],
            remat=remat,
        )


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """Gated MLP: down(activation(gate(x)) · up(x)) (Shazeer, GLU Variants, 2020).

    Attributes:
        hidden_size: D.
        intermediate_size: F.
        activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU with GELU's tanh form) or "clamped_silu"
            (gpt-oss: a steeper SwiGLU of clamped gate and up, with 1 added to up).
        bias: a bias on each of the three products.
        depth: number of layers of the model, which scales the initial output weights.
        dtype: dtype of activations, and of weights when they are used.
        chunk: number of tokens per device in one chunk; None computes all at once.
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation
    bias: bool
    depth: int
    dtype: str
    chunk: int | None

    experts: ClassVar[Experts | None] = None

    @property
    def product_params(self) -> int:
        """Number of weights of the matrix products."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def width(self) -> int:
        """Width of the activations between the products."""
        return self.intermediate_size

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        return {"intermediate_size": self.intermediate_size}


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """Mixture of experts: Σ weight · expert(x) over the top k experts of each token.

    Each expert is a gated MLP as in `MLPSpec`.

    Attributes:
        hidden_size: D.
        num_experts: E.
        top_k: k, experts of each token.
        intermediate_size: F, of each expert.
        router: what scores experts, "softmax" or "sigmoid".
        norm_topk: divide the scores of a token's experts by their sum.
        scaling: factor of these weights.
        groups: number of equal groups of experts.
        topk_groups: number of groups that a token's experts are from.
        correction: a bias on the scores that choose experts, without gradient.
        shared: an MLP that all tokens go through, too; None for none.
        shared_gate: multiply its output by a learnt sigmoid per token.
        activation: as in `MLPSpec`.
        depth: as in `MLPSpec`.
        dtype: as in `MLPSpec`; the router computes in float32.
        bias: a bias on the router and on each product of the experts, not of the shared MLP.
        product: what multiplies rows with weights; None for the best on the devices.
        dispatch_parts: number of parts in which rows travel to experts on other devices.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    router: Router
    norm_topk: bool
    scaling: float
    groups: int
    topk_groups: int
    correction: bool
    shared: MLPSpec | None
    shared_gate: bool
    activation: Activation
    depth: int
    dtype: str
    bias: bool = False
    product: Product | None = None
    dispatch_parts: int = 1

    @property
    def product_params(self) -> int:
        """Number of weights of the matrix products that one token goes through."""
        one = 3 * self.hidden_size * self.intermediate_size
        return self.top_k * one + self._other_params

    @property
    def width(self) -> int:
        """Width of the activations between the products, over all experts of a token."""
        shared = 0 if self.shared is None else self.shared.width
        return self.top_k * self.intermediate_size + shared

    @property
    def experts(self) -> Experts:
        """What determines the cost of the experts."""
        return Experts(self.num_experts, self.top_k, self.intermediate_size, self.shared_gate)

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        shared = {} if self.shared is None else self.shared.tp_sizes
        named = {f"shared_expert_{name}": size for name, size in shared.items()}
        return {"moe_intermediate_size": self.intermediate_size} | named

    @property
    def _other_params(self) -> int:
        shared = 0 if self.shared is None else self.shared.product_params
        return self.hidden_size * (self.num_experts + int(self.shared_gate)) + shared


Mixer = AttentionSpec | Mamba2Spec | GatedDeltaSpec | KDASpec
FeedForward = MLPSpec | MoESpec


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer: `x + mixer(x)`, then `x + ffn(x)`, each with norms.

    Attributes:
        mixer: what mixes tokens.
        ffn: what treats each token alone.
        norms: whether RMSNorm comes "before" mixer and ffn (Llama), "after" them (OLMo 2) or
            "both" (Gemma 3).
        norm: these norms.
    """

    mixer: Mixer
    ffn: FeedForward
    norms: Norms
    norm: NormSpec

    @property
    def product_params(self) -> int:
        """Number of weights of the matrix products that a token goes through."""
        return self.mixer.product_params + self.ffn.product_params

    @property
    def tp_sizes(self) -> dict[str, int]:
        """Sizes that tp must divide, by the name of their setting."""
        return self.mixer.tp_sizes | self.ffn.tp_sizes


class Stack(NamedTuple):
    """Equal layers, whose parameters are stacked.

    Attributes:
        spec: one of them.
        layers: their numbers in the model, ascending.
    """

    spec: LayerSpec
    layers: tuple[int, ...]


class Section(NamedTuple):
    """Consecutive layers that repeat a period; a scan computes them.

    Attributes:
        stacks: indices of the stacks of one period, in order.
        first: number of its first layer.
        turns: number of periods.
        skipped: number of layers of each of these stacks that belong to earlier sections.
    """

    stacks: tuple[int, ...]
    first: int
    turns: int
    skipped: int


class Plan(NamedTuple):
    """How the layers of a model are stacked, and in which order the stacks are computed."""

    stacks: tuple[Stack, ...]
    sections: tuple[Section, ...]


def plan(specs: Sequence[LayerSpec]) -> Plan:
    """Stack the layers by their position in the period, or by runs if that compiles fewer layers.

    The last period may be cut off. If the layers do not repeat, such as windows on the upper half,
    each run of equal layers is a stack.

    >>> plan("AAAB" * 3).sections
    (Section(stacks=(0, 1, 2, 3), first=0, turns=3, skipped=0),)
    >>> [stack.layers for stack in plan("AAB").stacks]
    [(0, 1), (2,)]
    """
    number = len(specs)
    period = next(p for p in range(1, number + 1) if specs[p:] == specs[:-p] or p == number)
    borders = [i for i in range(1, number) if specs[i] != specs[i - 1]]
    if (period <= len(borders) + 1 and period < number) or period == 1:
        stacks = [Stack(specs[p], tuple(range(p, number, period))) for p in range(period)]
        turns, rest = divmod(number, period)
        sections = [Section(tuple(range(period)), 0, turns, 0)]
        if rest:
            sections.append(Section(tuple(range(rest)), turns * period, 1, turns))
        return Plan(tuple(stacks), tuple(sections))
    runs = list(zip([0, *borders], [*borders, number], strict=True))
    return Plan(
        tuple(Stack(specs[first], tuple(range(first, last))) for first, last in runs),
        tuple(Section((i,), first, last - first, 0) for i, (first, last) in enumerate(runs)),
    )
