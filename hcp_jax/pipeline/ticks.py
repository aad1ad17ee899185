"""Run microbatches through the stages of a pipeline, tick by tick, and sum loss and gradients.

The mesh has an axis `pp` besides those of the `ContextParallel`; every stage has all devices of the
other axes. The host calls one program for each tick (`dynamic/pipeline.py`): forward, forward and
backward, or backward. In a tick

    forward     the first stage looks its tokens up; each stage keeps its input and applies a chunk
                of layers; the results move to the next stages
    head        what the last chunk has made is broadcast; all stages compute the loss together,
                each with its own part of the vocabulary
    backward    each stage computes a chunk again from the kept input, with `jax.vjp`, and adds to
                its sums of gradients; the gradients of inputs move to the previous stages at the
                start of the next tick

Which microbatch a stage computes, with which grouping, is data, so all stages run the same program
with the same collectives, also while they have nothing to compute. No gradient crosses a tick other
than the one that is sent. Devices sum their gradients over the ticks in float32 each for itself;
they are reduced over dp and the cp axes once, at the end.

The programs are a function of shapes only: a step with any number of microbatches uses the same
three, and two that begin and end the sums.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.dynamic.pipeline import make_schedule
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import lookup
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.stacks import apply_layers
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import as_tuple
from hcp_jax.pipeline.feed import CHUNK, LIVE, SLOT, Feed, check_alike, stacked, work_numbers
from hcp_jax.pipeline.refusals import require_supported
from hcp_jax.pipeline.stages import Stages, stage_params, stage_shardings, without_empty


class Carry(NamedTuple):
    """Arrays that live from tick to tick; the first dim of each is cut over devices.

    Attributes:
        grads: sums of gradients of each device, like the stages' parameters behind a dim of devices
            [dp · C]; those of the last norm have a dim of stages besides.
        loss: sums of the loss of each device, [dp · C].
        kept: inputs of chunks until their backward pass, [pp, slots, B, T, D].
        arriving: what the previous stages have computed, [pp, B, T, D].
        leaving: gradients for the stages before, not sent yet, [pp, B, T, D].
    """

    grads: Any
    loss: Any
    kept: Any
    arriving: Any
    leaving: Any


class Pipeline:
    """The programs of a pipeline; they compile when they are first called.

    Args:
        model: the model.
        cp: the context parallelism of every stage, with one comm type; its mesh has one more axis.
        axis: this axis, of the stages.
        virtual_stages: v, the chunks of consecutive layers on each stage.
        fsdp: whether to cut the parameters of a stage over dp and cp as well; they are gathered,
            and their gradients are reduced, in every tick.

    Raises:
        ValueError: if the mesh lacks the axis, or the axis has a role in `cp`, or the model cannot
            be cut (`Stages`).
        NotImplementedError: for comm types by layer, offloaded activations, Explicit axes, layers
            other than attention or Mamba-2 with a dense MLP, Mamba-2 in groups, multi-token
            prediction, and models whose layers do not repeat in whole periods.

    >>> import numpy as np, hcp_jax as hcp
    >>> from hcp_jax.models.transformer import init_params
    >>> model = ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, intermediate_size=32,
    ...                     num_heads=4, num_kv_heads=2)
    >>> cp = hcp.ContextParallel(hcp.make_mesh(pp=2, devices=jax.devices()[:2]), "p2p")
    >>> pipeline = Pipeline(model, cp)
    >>> params = pipeline.shard_params(init_params(model, jax.random.key(0)))
    >>> ids = np.arange(16, dtype=np.int32)[None]
    >>> batch = cp.shard_batch({"tokens": ids, "positions": ids, "targets": ids + 1,
    ...                         "weights": np.ones((1, 16), np.float32), "mask": model.mask()})
    >>> grads, loss = pipeline.sums(params, [batch, batch, batch])
    >>> grads["norm"]["scale"].shape
    (16,)
    """

    def __init__(
        self,
        model: ModelConfig,
        cp: ContextParallel,
        *,
        axis: str = "pp",
        virtual_stages: int = 1,
        fsdp: bool = False,
    ):
        require_supported(model, cp, axis)
        self.cp, self.axis = cp, axis
        self.stages = Stages(model, cp.mesh.shape[axis], virtual_stages)
        # Along these axes each device sums its own gradients. With FSDP no device has room for all
        # of a stage's: then the axes stay with the compiler, as tp always does.
        self._flat = () if fsdp else cp.flat_axes
        self._manual = (axis, *self._flat)
        graph, self._shapes = abstract_model(model)
        whole = nnx.merge(graph, self._shapes)
        self._layers, self._norm = (nnx.split(part)[0] for part in (whole.layers, whole.norm))
        self._shardings = stage_shardings(self.stages, cp, self._shapes, axis=axis, fsdp=fsdp)
        self._programs: dict[Any, Any] = {}

    @property
    def num_programs(self) -> int:
        """Number of programs compiled so far."""
        return sum(f._cache_size() for f in (self._begin, self._end, *self._programs.values()))

    def shard_params(self, params: Any) -> Any:
        """Return the model's parameters as those of the stages, on the devices.

        Args:
            params: a tree like the parameters of `Transformer`; whole arrays.
        """
        return jax.device_put(self._cut(params), self._shardings)

    def sums(self, params: Any, batches: Sequence[Any]) -> tuple[Any, Float[Array, ""]]:
        """Return the sums over microbatches of the gradients and of the loss.

        Args:
            params: parameters of the stages (`shard_params`).
            batches: microbatches of equal shapes, from `cp.shard_batch` or `hcp.place_microbatch`,
                with "tokens", "targets", "positions", "weights" and a placed "mask". They run in
                this order; `dynamic.pipeline.order` finds a good one.

        Returns:
            Gradients of the loss, a tree like `params`, in float32 and reduced over all devices;
            and Σ weight · loss in nats.

        Raises:
            ValueError: if there is no microbatch, or their shapes or widest groups differ.
        """
        check_alike(batches)
        ticks = make_schedule(len(batches), self.stages.num_stages, self.stages.virtual_stages)
        carry = self._begin(*batches[0]["tokens"].shape)
        for tick in ticks.ticks:
            program = self._tick(any(tick.forward), any(tick.backward))
            rows = [[batches[0 if w is None else w.microbatch] for w in row] for row in tick]
            carry = program(params, carry, *map(work_numbers, tick), *rows)
        grads, loss = self._end(carry.grads, carry.loss)
        return grads, loss

    def abstract_tick(self, batch: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the program of a tick with both passes, and shapes of its arguments, to compile.

        Args:
            batch: shapes and shardings of a microbatch, as for `sums`.
        """

        def like(shapes: Any, shardings: Any) -> Any:
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )

        pp = self.stages.num_stages
        params = like(jax.eval_shape(self._cut, self._shapes), self._shardings)
        begin = functools.partial(self._begin, *batch["tokens"].shape)
        carry = like(jax.eval_shape(begin), self._carry_shardings)
        whole = NamedSharding(self.cp.mesh, PartitionSpec())
        work = jax.ShapeDtypeStruct((pp, 3), jnp.int32, sharding=whole)
        return self._tick(True, True), (params, carry, work, work, [batch] * pp, [batch] * pp)

    @functools.cached_property
    def _num_slots(self) -> int:
        """Slots of a step with many microbatches, so that every step has the same shapes."""
        pp, v = self.stages.num_stages, self.stages.virtual_stages
        return make_schedule(4 * pp, pp, v).num_slots

    @functools.cached_property
    def _begin(self) -> Any:
        """The program `(rows, tokens) -> carry` of zeros."""
        devices, pp = self.cp.axis_size(self._flat), self.stages.num_stages
        model, staged = self.stages.model, jax.eval_shape(self._cut, self._shapes)

        def begin(rows: int, tokens: int) -> Carry:
            shape, dtype = (rows, tokens, model.hidden_size), model.compute_dtype
            norm = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((pp, *x.shape), x.dtype), staged["norm"]
            )
            return Carry(
                jax.tree.map(
                    lambda x: jnp.zeros((devices, *x.shape), x.dtype), staged | {"norm": norm}
                ),
                jnp.zeros(devices, jnp.float32),
                jnp.zeros((pp, self._num_slots, *shape), dtype),
                jnp.zeros((pp, *shape), dtype),
                jnp.zeros((pp, *shape), dtype),
            )

        return jax.jit(begin, static_argnums=(0, 1), out_shardings=self._carry_shardings)

    @functools.cached_property
    def _end(self) -> Any:
        """The program `(sums of each device, their losses) -> (gradients, loss)`."""
        specs = self._carry_specs

        def reduce(grads: Any, loss: Any) -> Any:
            grads, loss = jax.tree.map(lambda x: x[0], (grads, loss))
            if self._flat:
                grads, loss = jax.lax.psum((grads, loss), self._flat)
            norm = jax.lax.psum(jax.tree.map(lambda x: x[0], grads["norm"]), self.axis)
            return grads | {"norm": norm}, loss

        out_specs = self._param_specs, PartitionSpec()
        mapped = self._map(reduce, (specs.grads, specs.loss), out_specs)
        whole = NamedSharding(self.cp.mesh, PartitionSpec())

        def end(grads: Any, loss: Any) -> Any:
            grads, loss = mapped(grads, loss)
            return without_empty(self.stages, grads), loss

        return jax.jit(end, donate_argnums=(0, 1), out_shardings=(self._shardings, whole))

    def _tick(self, forward: bool, backward: bool) -> Any:
        """Return the program `(params, carry, work forward, backward, batches …) -> carry`."""
        key = forward, backward
        if key not in self._programs:
            run = functools.partial(self._run, forward, backward)
            self._programs[key] = jax.jit(
                run, donate_argnums=1, out_shardings=self._carry_shardings
            )
        return self._programs[key]

    def _run(
        self,
        forward: bool,
        backward: bool,
        params: Any,
        carry: Carry,
        *args: Any,
    ) -> Carry:
        f_work, b_work, f_batches, b_batches = args
        stage = Feed(*(stacked(batches) for batches in (f_batches, b_batches)))
        ends = {
            "in": f_batches[0]["tokens"],
            "targets": f_batches[-1]["targets"],
            "weights": f_batches[-1]["weights"],
            "out": b_batches[0]["tokens"],
        }
        tokens = self.cp.spec(2)
        mapped = self._map(
            functools.partial(self._on_device, forward, backward),
            (
                self._param_specs,
                self._carry_specs,
                PartitionSpec(),
                PartitionSpec(),
                Feed(*(self._feed_specs(own, ends["in"].shape[0]) for own in stage)),
                dict.fromkeys(ends, tokens),
            ),
            self._carry_specs,
        )
        moved: Carry = mapped(params, carry, f_work, b_work, stage, ends)
        return moved

    def _on_device(
        self,
        forward: bool,
        backward: bool,
        params: Any,
        carry: Carry,
        f_work: Any,
        b_work: Any,
        feed: Feed,
        ends: Any,
    ) -> Carry:
        """Compute one tick on one device; each array is the device's own part."""
        last = self.stages.num_stages - 1
        mine, f, b = jax.lax.axis_index(self.axis), f_work, b_work
        carry = jax.tree.map(lambda x: x[0], carry)
        grads, dy = carry.grads, jnp.zeros_like(carry.leaving)
        if backward:
            # Sent at the start of the tick that needs it last, so that it is hidden behind the
            # forward pass, or behind computing the chunk again.
            returned = self._send(carry.leaving, -1)
        if forward:
            x = self._embed(params["embed_tokens"], ends["in"])
            x = jnp.where((mine == 0) & (f[mine, CHUNK] == 0), x, carry.arriving)
            slot = f[mine, SLOT]
            kept = jnp.where(f[mine, LIVE], x, carry.kept[slot])
            carry = carry._replace(kept=carry.kept.at[slot].set(kept))
            y = self._apply(_chunk(params["layers"], f[mine, CHUNK]), x, feed.forward)
            carry = carry._replace(arriving=self._send(y, 1))
        if forward and backward:
            from_last = f[last, LIVE] * (f[last, CHUNK] == self.stages.virtual_stages - 1)
            weights = ends["weights"] * from_last
            loss, of_head, dy = self._head(params, y, ends["targets"], weights)
            carry = carry._replace(loss=carry.loss + loss)
            grads = _add(grads, of_head)
        if backward:
            to_last = (mine == last) & (b[mine, CHUNK] == self.stages.virtual_stages - 1)
            dy = jnp.where(to_last, dy, returned)
            dy = jnp.where(b[mine, LIVE], dy, 0)
            chunk = _chunk(params["layers"], b[mine, CHUNK])
            apply = functools.partial(self._apply, batch=feed.backward)
            dlayers, dx = jax.vjp(apply, chunk, carry.kept[b[mine, SLOT]])[1](dy)
            carry = carry._replace(leaving=dx)
            first = (mine == 0) & (b[mine, CHUNK] == 0)
            grads = grads | {"layers": _add_chunk(grads["layers"], dlayers, b[mine, CHUNK])}
            dx = self._sum_stages(jnp.where(first, dx, 0))
            embed = functools.partial(self._embed_part, tokens=ends["out"])
            grads = _add(grads, {"embed_tokens": jax.vjp(embed, params["embed_tokens"])[1](dx)[0]})
        return jax.tree.map(lambda x: x[None], carry._replace(grads=grads))

    def _apply(self, layers: Any, x: Any, batch: Any) -> Any:
        """Apply a chunk of layers to this stage's activations."""
        stage = jax.lax.axis_index(self.axis)
        positions, mask = jax.tree.map(lambda x: x[stage], batch)
        modules = nnx.merge(self._layers, layers)
        model, plan = self.stages.model, self.stages.chunk
        return apply_layers(modules, model, x, positions, mask, self.cp, plan)[0]

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

    def _head(self, params: Any, y: Any, targets: Any, weights: Any) -> tuple[Any, Any, Any]:
        """Return the loss of the last stage's results, gradients of parameters, and of results."""
        model, pp = self.stages.model, self.stages.num_stages
        name = "embed_tokens" if model.tie_embeddings else "lm_head"
        y = self._sum_stages(jnp.where(jax.lax.axis_index(self.axis) == pp - 1, y, 0))

        def loss(used: Any, y: Any) -> Any:
            return summed_cross_entropy(
                nnx.merge(self._norm, used["norm"])(y),
                used[name]["embedding"],
                targets,
                weights,
                cp=self.cp,
                chunk=model.loss_chunk,
                z_loss=model.z_loss,
                soft_cap=model.final_soft_cap,
                vocab_axes=(self.axis,),
            )

        total, back = jax.vjp(loss, {"norm": params["norm"], name: params[name]}, y)
        # Each of the pp devices returns the whole loss. The transpose of a sum over them is a sum
        # as well, so every device has its share of the gradients if each begins with a share of 1.
        grads, dy = back(jnp.full_like(total, 1 / pp))
        grads["norm"] = jax.tree.map(lambda x: x[None], grads["norm"])
        return total, grads, self._sum_stages(dy)

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

    def _map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return spmd.shard_map(self.cp.mesh, self._manual, function, in_specs, out_specs)

    def _cut(self, params: Any) -> Any:
        return stage_params(self.stages, params)

    def _feed_specs(self, own: Any, rows: int) -> Any:
        """Return the specs of positions and masks; each stage has those of all, and takes its own.

        They are small, and so nothing is sent between stages.
        """
        positions, mask = own
        cp = self.cp

        def cut(x: Any) -> str | tuple[str, ...] | None:
            return cp.dp if x.shape[1] == rows else None

        # The devices of a row see all intervals of its mask.
        intervals = jax.tree.map(lambda x: PartitionSpec(None, cut(x)), mask.intervals)
        runs = jax.tree.map(lambda _: PartitionSpec(), mask.runs)
        in_row = PartitionSpec(None, cut(positions), cp.cp_axes or None)
        return in_row, dataclasses.replace(mask, intervals=intervals, runs=runs)

    @property
    def _param_specs(self) -> Any:
        """Specs of the parameters over the Manual axes."""
        return jax.tree.map(lambda x: _only(x.spec, self._manual), self._shardings)

    @property
    def _carry_specs(self) -> Carry:
        """Specs of the carry over the Manual axes."""
        return jax.tree.map(
            lambda x: _only(x.spec, self._manual),
            self._carry_shardings,
            is_leaf=lambda x: isinstance(x, NamedSharding),
        )

    @property
    def _carry_shardings(self) -> Carry:
        axis, mesh = self.axis, self.cp.mesh
        grads = jax.tree.map(lambda x: PartitionSpec(self._flat, *x.spec), self._shardings)
        grads["norm"] = jax.tree.map(
            lambda _: PartitionSpec(self._flat, axis), self._shardings["norm"]
        )
        tokens = self.cp.spec(3)
        moving = PartitionSpec(axis, *tokens)
        specs = Carry(
            grads, PartitionSpec(self._flat), PartitionSpec(axis, None, *tokens), moving, moving
        )
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )


def _chunk(layers: Any, number: Any) -> Any:
    """Return the parameters of one chunk of this stage."""

    def one(x: Any) -> Any:
        if x.shape[1] == 1:
            return x[0, 0]
        return jax.lax.dynamic_index_in_dim(x[0], number, keepdims=False)

    return jax.tree.map(one, layers)


def _add_chunk(sums: Any, grads: Any, number: Any) -> Any:
    return jax.tree.map(lambda x, g: x.at[0, number].add(g), sums, grads)


def _add(sums: dict[str, Any], some: dict[str, Any]) -> dict[str, Any]:
    """Return the sums with gradients of some parameters added."""
    return sums | {n: jax.tree.map(jnp.add, sums[n], grads) for n, grads in some.items()}


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(a for a in as_tuple(dim) if a in axes) or None for dim in spec))
