"""Compute one tick on one device of a stage; the programs of `ticks.py` map it over the devices.

In a tick

    forward     the first stage looks its tokens up; each stage keeps its input and applies a chunk
                of layers; the results move to the next stages
    head        what the last chunk has made is broadcast; all stages compute the loss together,
                each with its own part of the vocabulary, and the depths of multi-token prediction
    backward    each stage computes a chunk again from the kept input, with `jax.vjp`, and adds to
                its sums of gradients; the gradients of inputs move to the previous stages at the
                start of the next tick

All stages run the same collectives in the same order, also while they have nothing to compute.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models import mtp
from hcp_jax.models.layers.embedding import lookup
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.loss_terms import depth_means, router_loss, router_means
from hcp_jax.models.stacks import apply_layers, real_tokens
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.carry import SHARED, Carry
from hcp_jax.pipeline.feed import CHUNK, LIVE, SLOT, Feed, Given
from hcp_jax.pipeline.stages import Stages


class Tick(NamedTuple):
    """What a tick takes besides parameters and the carry; each array is the device's own part.

    Attributes:
        work: numbers of the work of all stages, for the forward and the backward passes.
        feed: what the layers of each stage's microbatches take.
        ends: tokens of the first stage's microbatches ("in", and "out" of the backward pass), and
            targets and weights of the last stage's.
    """

    work: Feed
    feed: Feed
    ends: dict[str, Any]


class OnDevice:
    """The computation of a device; call it inside a `shard_map` over the stages' axis.

    Args:
        stages: how the model is cut.
        cp: the context parallelism of a stage.
        axis: the mesh axis of the stages.
        flat: axes that are Manual besides, along which each device sums for itself.
    """

    def __init__(self, stages: Stages, cp: ContextParallel, axis: str, flat: tuple[str, ...]):
        self.stages, self.cp, self.axis, self.flat = stages, cp, axis, flat
        graph, shapes = abstract_model(stages.model)
        whole = nnx.merge(graph, shapes)
        self._layers, self._norm = (nnx.split(part)[0] for part in (whole.layers, whole.norm))
        self._mtp: Any = nnx.split(whole.mtp)[0] if stages.model.mtp_depths else None
        self._chunk_cp = stages.chunk_context(cp)

    def __call__(self, passes: tuple[bool, bool], params: Any, carry: Carry, tick: Tick) -> Carry:
        """Compute one tick.

        Args:
            passes: whether the tick has forward passes, and backward passes.
            params: of the stage.
            carry: before the tick.
            tick: the work.
        """
        forward, backward = passes
        last = self.stages.num_stages - 1
        mine, (f, b) = jax.lax.axis_index(self.axis), tick.work
        carry = _without_devices(carry)
        grads, dy = carry.grads, jnp.zeros_like(carry.leaving)
        if backward:
            # Sent at the start of the tick that needs it last, so that it is hidden behind the
            # forward pass, or behind computing the chunk again.
            returned = self._send(carry.leaving, -1)
        if forward:
            x = self._embed(params["embed_tokens"], tick.ends["in"])
            x = jnp.where((mine == 0) & (f[mine, CHUNK] == 0), x, carry.arriving)
            slot = f[mine, SLOT]
            kept = jnp.where(f[mine, LIVE], x, carry.kept[slot])
            carry = carry._replace(kept=carry.kept.at[slot].set(kept))
            chunk = chunk_of(params["layers"], f[mine, CHUNK])
            y, sums = self._apply(chunk, x, self._own(tick.feed.forward))
            carry = carry._replace(arriving=self._send(y, 1))
            if sums is not None:
                means = _times(router_means(self.stages.model, sums), f[mine, LIVE])
                carry = carry._replace(means=_add(carry.means, means))
        if forward and backward:
            live = f[last, LIVE] * (f[last, CHUNK] == self.stages.virtual_stages - 1)
            given = jax.tree.map(lambda x: x[last], tick.feed.forward)
            of_head, dy, loss, means = self._head(params, y, tick.ends, given, live)
            weight = live * jnp.sum(tick.ends["weights"])
            loss, weight, means = _times((loss, weight, means), mine == last)
            carry = carry._replace(
                loss=carry.loss + loss,
                weight=carry.weight + weight,
                means=_add(carry.means, means),
            )
            grads = _add(grads, of_head)
        if backward:
            to_last = (mine == last) & (b[mine, CHUNK] == self.stages.virtual_stages - 1)
            dy = jnp.where(to_last, dy, returned)
            dy = jnp.where(b[mine, LIVE], dy, 0)
            given = self._own(tick.feed.backward)
            chunk, kept = chunk_of(params["layers"], b[mine, CHUNK]), carry.kept[b[mine, SLOT]]
            added = b[mine, LIVE].astype(jnp.float32)
            apply = functools.partial(self._apply_with_loss, given=given)
            dlayers, dx = jax.vjp(apply, chunk, kept)[1]((dy, added))
            carry = carry._replace(leaving=dx)
            first = (mine == 0) & (b[mine, CHUNK] == 0)
            grads = grads | {"layers": _add_chunk(grads["layers"], dlayers, b[mine, CHUNK])}
            dx = self._sum_stages(jnp.where(first, dx, 0))
            embed = functools.partial(self._embed_part, tokens=tick.ends["out"])
            grads = _add(grads, {"embed_tokens": jax.vjp(embed, params["embed_tokens"])[1](dx)[0]})
        return _with_devices(carry._replace(grads=grads))

    def _own(self, given: Given) -> Given:
        """Return what this stage's layers take."""
        stage = jax.lax.axis_index(self.axis)
        own: Given = jax.tree.map(lambda x: x[stage], given)
        return own

    def _apply(self, layers: Any, x: Any, given: Given) -> tuple[Any, Any]:
        """Apply a chunk of layers to this stage's activations."""
        modules = nnx.merge(self._layers, layers)
        model, plan = self.stages.model, self.stages.chunk
        found: tuple[Any, Any] = apply_layers(
            modules, model, x, given.positions, given.mask, self._chunk_cp, plan
        )
        return found

    def _apply_with_loss(self, layers: Any, x: Any, given: Given) -> tuple[Any, Any]:
        """Apply a chunk of layers; return the losses of its routers as well."""
        y, sums = self._apply(layers, x, given)
        return y, self._router_loss(sums, given)

    def _router_loss(self, sums: Any, given: Given) -> Float[Array, ""]:
        moe = self.stages.model.moe
        if sums is None or moe is None:
            return jnp.zeros((), jnp.float32)
        real = real_tokens(given.mask, given.weights.shape, self.cp)
        both = jnp.stack([jnp.sum(given.weights), jnp.sum(real.astype(jnp.float32))])
        weight, tokens = jax.lax.psum(both, self.flat) if self.flat else both
        return router_loss(moe, sums, weight / jnp.where(tokens > 0, tokens, 1))

    def _embed_part(self, embed: Any, tokens: Any) -> Any:
        """Return the embeddings of the tokens that are in this stage's part, else zero."""
        table, model = embed["embedding"], self.stages.model
        row = tokens - jax.lax.axis_index(self.axis) * table.shape[0]
        here = (row >= 0) & (row < table.shape[0])
        x = lookup(table, jnp.where(here, row, 0), model.compute_dtype, self.cp)
        x = jnp.where(here[..., None], x, 0)
        scale = model.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def _embed(self, embed: Any, tokens: Any) -> Any:
        return self._sum_stages(self._embed_part(embed, tokens))

    def _head(self, params: Any, y: Any, ends: Any, given: Given, live: Any) -> tuple[Any, ...]:
        """Return gradients of parameters and of the last stage's results, the loss and means.

        The depths of multi-token prediction are computed by every stage alike: in a tick of one
        program that takes no more time than if the last stage alone did it.

        Args:
            params: of the stage.
            y: this stage's results, of which those of the last stage count.
            ends: targets and weights of their microbatch.
            given: what the layers of the depths take of it.
            live: 1 if the last stage has results of the last chunk, else 0.
        """
        model, pp = self.stages.model, self.stages.num_stages
        table = "embed_tokens" if model.tie_embeddings else "lm_head"
        names = {"norm", table} | ({"mtp", "embed_tokens"} if model.mtp_depths else set())
        y = self._sum_stages(jnp.where(jax.lax.axis_index(self.axis) == pp - 1, y, 0))

        def total(used: Any, y: Any) -> tuple[Any, Any]:
            summed = functools.partial(self._cross_entropy, used[table]["embedding"])
            hidden = nnx.merge(self._norm, used["norm"])(y)
            main = summed(hidden, ends["targets"], ends["weights"] * live)
            if not model.mtp_depths:
                return main, (main, {})
            further, weights = ends["mtp_targets"], ends["mtp_weights"] * live
            before = jnp.concatenate([ends["targets"][..., None], further[..., :-1]], axis=-1)
            outputs, sums = mtp.apply_depths(
                nnx.merge(self._mtp, used["mtp"]),
                model,
                hidden,
                lambda depth: self._embed(used["embed_tokens"], before[..., depth]),
                (given.positions, given.mask),
                self.cp,
            )
            found = [summed(x, further[..., d], weights[..., d]) for d, x in enumerate(outputs)]
            by_depth = jnp.stack(found)
            means = depth_means(by_depth, weights)
            if sums is not None:
                means |= _times(router_means(model, sums), live)
            added = model.mtp_loss_weight * jnp.mean(by_depth)
            return main + added + live * self._router_loss(sums, given), (main, means)

        used = {name: params[name] for name in sorted(names)}
        whole, back, (loss, means) = jax.vjp(total, used, y, has_aux=True)
        # Each of the pp devices returns the whole loss. The transpose of a sum over them is a sum
        # as well, so every device has its share of the gradients if each begins with a share of 1.
        grads, dy = back(jnp.full_like(whole, 1 / pp))
        for name in names & set(SHARED):
            grads[name] = jax.tree.map(lambda x: x[None], grads[name])
        return grads, self._sum_stages(dy), loss, means

    def _cross_entropy(self, table: Any, hidden: Any, targets: Any, weights: Any) -> Any:
        model = self.stages.model
        return summed_cross_entropy(
            hidden,
            table,
            targets,
            weights,
            cp=self.cp,
            chunk=model.loss_chunk,
            z_loss=model.z_loss,
            soft_cap=model.final_soft_cap,
            vocab_axes=(self.axis,),
        )

    def _sum_stages(self, x: Any) -> Any:
        """Sum activations over the stages."""
        # With every axis Manual: XLA for CPUs aborts on a sum in bfloat16 while some are Auto.
        spec = self.cp.spec(3)
        total = functools.partial(jax.lax.psum, axis_name=self.axis)
        return spmd.shard_map(self.cp.mesh, self.cp.axes, total, spec, spec)(x)

    def _send(self, x: Any, by: int) -> Any:
        """Send to the next stage (1) or to the one before (-1); around if stages are virtual."""
        pp = self.stages.num_stages
        around = self.stages.virtual_stages > 1
        pairs = [(s, (s + by) % pp) for s in range(pp) if around or 0 <= s + by < pp]
        return jax.lax.ppermute(x, self.axis, pairs)


def _without_devices(carry: Carry) -> Carry:
    """Return a carry without the dims that count devices, of which each has one."""
    scalars, rest = _split(carry)
    alone: Carry = jax.tree.map(lambda x: x[0], rest)
    return alone._replace(**jax.tree.map(lambda x: x[0, 0], scalars))


def _with_devices(carry: Carry) -> Carry:
    scalars, rest = _split(carry)
    together: Carry = jax.tree.map(lambda x: x[None], rest)
    return together._replace(**jax.tree.map(lambda x: x[None, None], scalars))


def _split(carry: Carry) -> tuple[dict[str, Any], Carry]:
    """Return the sums that are scalars, by name, and the others."""
    scalars = {"loss": carry.loss, "weight": carry.weight, "means": carry.means}
    return scalars, carry._replace(loss=None, weight=None, means={})


def chunk_of(layers: Any, number: Any) -> Any:
    """Return the parameters of one chunk of this stage."""

    def one(x: Any) -> Any:
        if x.shape[1] == 1:
            return x[0, 0]
        return jax.lax.dynamic_index_in_dim(x[0], number, keepdims=False)

    return jax.tree.map(one, layers)


def _add_chunk(sums: Any, grads: Any, number: Any) -> Any:
    return jax.tree.map(lambda x, g: x.at[0, number].add(g), sums, grads)


def _add(sums: dict[str, Any], some: dict[str, Any]) -> dict[str, Any]:
    """Return the sums with some of them increased."""
    return sums | {n: jax.tree.map(jnp.add, sums[n], more) for n, more in some.items()}


def _times(tree: Any, live: Any) -> Any:
    """Return zeros in place of what has not been computed for a microbatch."""
    return jax.tree.map(lambda x: jnp.where(live, x, 0), tree)
