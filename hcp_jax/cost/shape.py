"""Describe the shape of a decoder, and count the FLOPs of its training step as MFU counts them.

The count covers what the model needs, not what a run computes: no recomputation by remat, and no
softmax, norms or activations. Of attention it counts only the (query, key) pairs that are visible
in the actual batch: a packed stream of short documents has fewer than one long document. (Counting
T² pairs, or half of them, for every batch would make packing or a window seem to raise MFU.)
Backward counts as twice forward (PaLM: Chowdhery et al., 2022, appendix B):

    matrix products   6 · weights · tokens           with the output head, without embedding lookup
    attention         12 · heads · H · pairs         per layer: two products of 2 FLOPs, times 3
    recurrences       3 · FLOPs of a token · tokens  per layer (`recurrence.py`)

The planner, the memory model, the scheduler of dynamic CP and the trainer's MFU all use this shape.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Any

from hcp_jax.cost.experts import Experts
from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.cost.traffic import Remat

BACKWARD = 2.5  # FLOPs of an attention kernel's backward over its forward: five products to two


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Equal layers of a decoder.

    Attributes:
        count: number of these layers.
        intermediate_size: of their MLP.
        head_size: H; 0 for layers that do not attend.
        sliding_window: number of tokens that a query sees; None for all earlier tokens.
        recurrence: the recurrence of layers that do not attend; None for attention.
        experts: as in `ModelShape`.
        in_period: number of these layers in one period of the pattern.
    """

    count: int
    intermediate_size: int
    head_size: int
    sliding_window: int | None
    recurrence: Recurrence | None = None
    experts: Experts | None = None
    in_period: int = 1


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes that determine the cost of a decoder; the names are those of `ModelConfig`.

    Attributes:
        head_size: H; 0 for layers that do not attend.
        mlp_products: number of matrices of an MLP: 3 with a gate, 2 without.
        recurrence: the recurrence of layers that do not attend; None for attention.
        mtp_depths: depths of multi-token prediction. Each has a projection from twice the hidden
            size, one more layer as the last one, and a use of the output head.
        experts: the experts of a layer; None for a dense MLP. `intermediate_size` is then the sum
            over the experts of a token, with the shared one.
        period: number of layers of the pattern that the layers repeat, the last time perhaps a
            part of it; 0 if they repeat none.
        kinds: the kinds of layers, if there are several; they replace the sizes above. The layers
            of depths are counted in theirs.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    tie_embeddings: bool = False
    sliding_window: int | None = None
    loss_chunk: int = 1024
    mlp_products: int = 3
    recurrence: Recurrence | None = None
    mtp_depths: int = 0
    experts: Experts | None = None
    period: int = 1
    kinds: tuple[LayerKind, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """Return the shape of a `ModelConfig`."""
        first, *others = config.plan.sections
        repeats = all(set(section.stacks) <= set(first.stacks) for section in others)
        period = len(first.stacks) if repeats else 0

        def kind_of(layer: Any) -> Any:
            return layer.ffn.width, layer.mixer.cost, layer.ffn.experts

        counted = collections.Counter(kind_of(config.specs[i]) for i in config.computed_layers)
        once = collections.Counter(map(kind_of, config.specs[:period]))
        kinds = tuple(
            LayerKind(count, width, head_size, window, recurrence, experts, once[key])
            for key, count in counted.items()
            for width, (head_size, window, recurrence), experts in (key,)
        )
        one = dict(vars(next((kind for kind in kinds if kind.head_size), kinds[0])))
        del one["count"], one["in_period"]
        ours = {"mlp_products", "kinds", "period", *one}
        named = {
            f.name: getattr(config, f.name) for f in dataclasses.fields(cls) if f.name not in ours
        }
        return cls(**named, **one, period=period, kinds=kinds if len(kinds) > 1 else ())

    @functools.cached_property
    def by_kind(self) -> "tuple[ModelShape, ...]":
        """The shape of a decoder of each kind of layers alone; its `num_layers` is their number."""
        if not self.kinds:
            return (dataclasses.replace(self, num_layers=self.computed_layers, mtp_depths=0),)
        return tuple(
            dataclasses.replace(
                self,
                num_layers=kind.count,
                intermediate_size=kind.intermediate_size,
                head_size=kind.head_size,
                sliding_window=kind.sliding_window,
                recurrence=kind.recurrence,
                experts=kind.experts,
                mtp_depths=0,
                kinds=(),
            )
            for kind in self.kinds
        )

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Sizes that tp must divide."""
        recurrent = [kind.recurrence.tp_sizes for kind in self.by_kind if kind.recurrence]
        mlps: list[int] = []
        for kind in self.by_kind:
            e = kind.experts
            routed = 0 if e is None else e.per_token * e.intermediate_size
            mlps += [] if e is None else [e.intermediate_size]
            mlps += [] if kind.intermediate_size == routed else [kind.intermediate_size - routed]
        return (self.num_kv_heads, self.vocab_size, *mlps, *itertools.chain(*recurrent))

    @property
    def computed_layers(self) -> int:
        """Number of layers with those of multi-token prediction."""
        return self.num_layers + self.mtp_depths

    @property
    def query_width(self) -> int:
        """Query heads times head size."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Kv heads times head size."""
        return self.num_kv_heads * self.head_size

    @property
    def layer_params(self) -> int:
        """Number of weights of the matrix products of one layer, of the first kind."""
        mlp = self.mlp_products * self.intermediate_size
        attention = 2 * self.query_width + 2 * self.kv_width
        mixer = 0 if self.recurrence is None else self.recurrence.product_params
        return self.hidden_size * (attention + mlp) + mixer

    def repeated_params(self, remat: Remat) -> int:
        """Return the number of weights of one layer whose products backward computes again.

        Experts and recurrences are computed again by every policy except "none".
        """
        if remat in ("attention", "full"):
            return self.layer_params
        if remat == "none":
            return 0
        mixer = 0 if self.recurrence is None else self.recurrence.product_params
        ffn = self.hidden_size * self.mlp_products * self.intermediate_size
        return mixer + (0 if remat == "mlp" and self.experts is None else ffn)

    @property
    def idle_params(self) -> int:
        """Number of weights of a layer beside those that one token is multiplied by."""
        return 0 if self.experts is None else self.experts.idle_params(self.hidden_size)

    @property
    def experts_params(self) -> int:
        """Number of weights of the experts of all layers, which ep cuts."""
        kinds = ((k.num_layers, k.experts) for k in self.by_kind)
        return sum(n * e.params(self.hidden_size) for n, e in kinds if e is not None)

    @property
    def layers_params(self) -> int:
        """Number of weights of the matrix products of all layers, with those of depths."""
        projections = 2 * self.mtp_depths * self.hidden_size**2
        return projections + sum(kind.num_layers * kind.layer_params for kind in self.by_kind)

    @property
    def held_params(self) -> int:
        """Number of weights of all layers, with those that a token is not multiplied by."""
        return self.layers_params + sum(k.num_layers * k.idle_params for k in self.by_kind)

    @property
    def head_params(self) -> int:
        """Number of weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def product_params(self) -> int:
        """Number of weights that every token is multiplied by: all layers and the output head.

        The head counts once for the next token, and once more for each depth.
        """
        return self.layers_params + (1 + self.mtp_depths) * self.head_params

    @property
    def params(self) -> int:
        """Number of all parameters, with norms."""
        embeddings = self.head_params * (1 if self.tie_embeddings else 2)
        norms = (2 * self.num_layers + 1 + 5 * self.mtp_depths) * self.hidden_size
        return self.held_params + embeddings + norms


def step_flops(model: ModelShape, tokens: float, pairs: float) -> float:
    """Return the FLOPs of a training step, summed over all devices.

    Args:
        model: shape of the decoder.
        tokens: number of tokens in the step.
        pairs: visible (query, key) pairs of one head of one layer, summed over all streams; the
            mean over the layers, each weighted by its heads' width, if they have several windows.

    >>> tiny = ModelShape(10, 1, 4, 8, 2, 1, 2)
    >>> step_flops(tiny, 5, 15) == 6 * (4 * (12 + 24) + 40) * 5 + 12 * 2 * 2 * 15
    True
    """
    kinds = model.by_kind
    per_pair = sum(kind.num_layers * kind.query_width for kind in kinds)
    recurrent = sum(
        kind.num_layers * kind.recurrence.token_flops for kind in kinds if kind.recurrence
    )
    return (6.0 * model.product_params + 3.0 * recurrent) * tokens + 12.0 * per_pair * pairs
