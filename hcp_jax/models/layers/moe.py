"""Compute a mixture of experts without dropping tokens.

A device sorts its tokens by expert, multiplies each row with the weights of its expert
(`kernels/expert_product.py`), and adds up each token's rows. So an expert may get all tokens, or
none. All of it is written per device (`shard_map`): the counts of the load-balance loss cross
devices, and rows, if experts are cut over devices (`moe_dispatch.py`).
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.kernels import expert_product
from hcp_jax.models.layers import moe_order, moe_router
from hcp_jax.models.layers.embedding import live_axes, live_tp
from hcp_jax.models.layers.mlp import GATED, MLP
from hcp_jax.models.layers.moe_dispatch import Dispatch
from hcp_jax.models.layers.moe_documents import RoutedTokens, document_loads
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.rules import Rule, Rules, bias, find, matrix
from hcp_jax.models.specs import MoESpec
from hcp_jax.parallel import one_device, spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import as_tuple
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.placement import Groups


class Gate(nnx.Module):
    """The parameters of a router."""

    def __init__(self, spec: MoESpec, *, rngs: nnx.Rngs):
        shape = spec.hidden_size, spec.num_experts
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        zeros = jnp.zeros(spec.num_experts, jnp.float32)
        self.bias = nnx.Param(zeros) if spec.bias else None
        correction = jnp.zeros(spec.num_experts, jnp.float32)
        self.correction = nnx.Param(correction) if spec.correction else None


class Experts(nnx.Module):
    """The weights of all experts, stacked; they have no module each."""

    def __init__(self, spec: MoESpec, *, rngs: nnx.Rngs):
        inner, outer, number = spec.intermediate_size, spec.hidden_size, spec.num_experts

        def weights(inputs: int, outputs: int, gain: float) -> Any:
            init = nnx.initializers.variance_scaling(gain, "fan_in", "normal", batch_axis=0)
            return nnx.Param(init(rngs.params(), (number, inputs, outputs), jnp.float32))

        self.gate_proj = weights(outer, inner, 1.0)
        self.up_proj = weights(outer, inner, 1.0)
        self.down_proj = weights(inner, outer, 0.5 / spec.depth)
        for name, size in (("gate", inner), ("up", inner), ("down", outer)):
            zeros = jnp.zeros((number, size), jnp.float32)
            setattr(self, f"{name}_bias", nnx.Param(zeros) if spec.bias else None)


class MoE(nnx.Module):
    """Mixture of experts, as `MoESpec` describes it; each expert is a gated MLP."""

    NAME: ClassVar[str] = "mlp"
    RULES: ClassVar[Rules] = {
        ("gate", "kernel"): matrix(),  # [D, E]
        ("gate", "correction"): Rule(signal=True),  # [E]
        ("experts", "gate_proj"): matrix(tp=2)._replace(stacked=True),  # [E, D, F]
        ("experts", "up_proj"): matrix(tp=2)._replace(stacked=True),  # [E, D, F]
        ("experts", "down_proj"): matrix(tp=1)._replace(stacked=True),  # [E, F, D]
        ("experts", "gate_bias"): bias(tp=1)._replace(stacked=True),  # [E, F]
        ("experts", "up_bias"): bias(tp=1)._replace(stacked=True),  # [E, F]
        ("experts", "down_bias"): bias()._replace(stacked=True),  # [E, D]
        ("shared_expert_gate", "kernel"): matrix(),  # [D, 1]
    } | {("shared_experts", *p): rule for p, rule in MLP.RULES.items() if p[-1] == "kernel"}

    def __init__(self, spec: MoESpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.gate = Gate(spec, rngs=rngs)
        self.experts = Experts(spec, rngs=rngs)
        shared = spec.shared
        self.shared_experts = None if shared is None else MLP(shared, rngs=rngs)
        self.shared_expert_gate = (
            nnx.Linear(spec.hidden_size, 1, use_bias=False, dtype=spec.dtype, rngs=rngs)
            if spec.shared_gate
            else None
        )

    def treat(
        self, x: Float[Array, "B T D"], tokens: RoutedTokens, cp: ContextParallel | None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        """Apply each token's experts to it; return the router's sums as well.

        Inside a `shard_map` over dp or cp axes, the sums cover the tokens given there.

        Args:
            x: activations, in cp's layout order.
            tokens: say what is padding, which gets zeros from the experts.
            cp: says how tokens and weights are cut; None for one device.
        """
        gate, experts = (nnx.to_pure_dict(nnx.state(m)) for m in (self.gate, self.experts))
        # Cast here, so that weights travel to the devices in the compute dtype.
        experts = jax.tree.map(lambda p: p.astype(self.spec.dtype), experts)
        tp = live_tp(cp)
        if cp is None:
            local = functools.partial(_on_device, self.spec, None, (), ())
            out, sums = local(gate, experts, x, tokens)
        else:
            everywhere = tuple(a for a in cp.flat_axes if cp.mesh.shape[a] > 1)
            live = live_axes(cp, cp.flat_axes)
            if cp.ep > 1 and spmd.manual_axes(cp.mesh_in_context, cp.expert_axes):
                raise NotImplementedError(
                    f"the model was called inside a shard_map over axes that experts are cut over "
                    f"({', '.join(cp.expert_axes)}); use ep=1 there."
                )
            local = functools.partial(_on_device, self.spec, cp, everywhere, live)
            specs = {
                name: _cut(("experts", name), p.ndim, tp, cp.expert_axes)
                for name, p in experts.items()
            }
            whole = jax.tree.map(lambda _: PartitionSpec(), gate)
            each = jax.tree.map(lambda _: cp.spec(2), tokens)
            out_specs = (cp.spec(3), moe_router.WHOLE)
            mapped = spmd.shard_map(
                cp.mesh, cp.axes, local, (whole, specs, cp.spec(3), each), out_specs
            )
            out, sums = spmd.run(cp.mesh, cp.axes, mapped, out_specs, gate, experts, x, tokens)
        if self.shared_experts is not None:
            shared = self.shared_experts(x, cp)
            if self.shared_expert_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_expert_gate(x))
            out = out + shared
        return out, sums


def _cut(
    path: tuple[str, ...], ndim: int, tp: tuple[str, ...], experts: tuple[str, ...]
) -> PartitionSpec:
    dim = find(MoE.RULES, path).tp
    by_dim = {dim: tp or None, 0: experts or None}
    return PartitionSpec(*(by_dim.get(d) for d in range(ndim)))


def _on_device(
    spec: MoESpec,
    cp: ContextParallel | None,
    everywhere: tuple[str, ...],
    live: tuple[str, ...],
    gate: dict[str, Array],
    experts: dict[str, Array],
    x: Float[Array, "b t D"],
    tokens: RoutedTokens,
) -> tuple[Array, RouterSums]:
    """Compute the tokens of one device.

    Args:
        spec: of the layer.
        cp: says how experts are cut; None for one device.
        everywhere: all axes that tokens are cut over.
        live: those of them that no `shard_map` around the model has taken.
        gate: parameters of the router.
        experts: weights of the experts.
        x: activations.
        tokens: its tokens.
    """
    flat, real = x.reshape(-1, x.shape[-1]), tokens.real.reshape(-1)
    routing = moe_router.route(spec, flat, gate["kernel"], gate.get("correction"), gate.get("bias"))
    order = moe_order.by_expert(routing.expert, real, spec.num_experts)
    counts = order.sizes.astype(jnp.float32)
    counts = jax.lax.psum(counts, everywhere) if everywhere else counts
    load = counts * (spec.num_experts / jnp.maximum(jnp.sum(counts), 1))
    by_document = None
    if tokens.document is not None:
        by_document = document_loads(spec, tokens, routing, _holders(cp), counts)
    sums = moe_router.router_sums(spec, routing, real, load, gate.get("correction"), by_document)
    rows = moe_order.spread(spec.top_k, flat, order)
    weight = routing.weight.reshape(-1, 1)
    weight = moe_order.spread(1, weight, order)
    device = one_device.resolve(cp, x)
    how = expert_product.resolve(spec.product, spec.dtype, device.platform, device.device_kind)
    tp = () if cp is None else tuple(a for a in as_tuple(cp.tp) if cp.mesh.shape[a] > 1)
    if tp and spec.bias:  # added by one tp device, because outputs are summed over tp
        first = jax.lax.axis_index(tp) == 0
        experts = experts | {"down_bias": jnp.where(first, experts["down_bias"], 0)}
    compute = functools.partial(_experts, spec, how, experts)
    if cp is None or cp.ep == 1:
        out = compute(rows, order.sizes)
    else:
        dispatch = Dispatch(cp.expert_axes, cp.ep, rows.shape[0], spec.dispatch_parts)
        out = dispatch.through(rows, order.sizes, compute, (*everywhere, *tp))
    out = out * weight.astype(rows.dtype)
    out = moe_order.collect(spec.top_k, out, order).reshape(x.shape)
    out = jax.lax.psum(out, tp) if tp else out
    return out, jax.lax.psum(sums, live) if live else sums


def _holders(cp: ContextParallel | None) -> Peers:
    """Return the devices that one document may lie on."""
    if cp is None:
        return Peers()
    if isinstance(cp.placement, Groups):
        return Peers(cp.flat_axes, cp.placement.num_devices, cp.placement.widest)
    return Peers(cp.cp_axes, cp.size, cp.size)


def _experts(
    spec: MoESpec,
    how: expert_product.How,
    weights: dict[str, Array],
    rows: Float[Array, "n D"],
    sizes: Int32[Array, "E"],
) -> Float[Array, "n D"]:
    """Apply each expert to its rows; rows behind those of the last expert become zero."""

    def product(x: Array, name: str) -> Array:
        out = expert_product.product(how, x, weights[f"{name}_proj"], sizes)
        return out + _biases(weights[f"{name}_bias"], sizes, x.shape[0]) if spec.bias else out

    inner = GATED[spec.activation](product(rows, "gate"), product(rows, "up"))
    return product(inner, "down")


def _biases(bias: Float[Array, "E F"], sizes: Int32[Array, "E"], rows: int) -> Float[Array, "n F"]:
    """Return the bias of each row's expert, zero behind the rows of the last one.

    A dense product with 0 and 1, because the gradient of a gather adds rows in no fixed order.
    """
    end = jnp.cumsum(sizes)[None]
    row = jnp.arange(rows)[:, None]
    own = (row < end) & (row >= end - sizes[None])
    return jnp.dot(own.astype(bias.dtype), bias, precision=jax.lax.Precision.HIGHEST)
