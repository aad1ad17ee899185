"""Run microbatches through the stages of a pipeline, tick by tick, and sum loss and gradients.

The mesh has an axis `pp` besides those of the `ContextParallel`; every stage has all devices of the
other axes. The host calls one program for each tick (`dynamic/pipeline.py`): forward, forward and
backward, or backward. `on_device.py` says what a device computes in it.

Which microbatch a stage computes, with which grouping, is data, so all stages run the same program
with the same collectives, also while they have nothing to compute. No gradient crosses a tick other
than the one that is sent. Devices sum their gradients over the ticks in float32 each for itself;
they are reduced over dp and the cp axes once, at the end.

The programs are a function of shapes only: a step with any number of microbatches uses the same
three, and two that begin and end the sums.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.dynamic.pipeline import make_schedule
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.loss_terms import Mean
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.carry import SHARED, Carry, StepSums, shardings, specs_over, zeros
from hcp_jax.pipeline.feed import Feed, check_alike, end_arrays, given_specs, stacked, work_numbers
from hcp_jax.pipeline.meshes import on_mesh, with_auto_axes
from hcp_jax.pipeline.on_device import OnDevice, Tick
from hcp_jax.pipeline.refusals import require_supported
from hcp_jax.pipeline.stages import Stages, stage_params, stage_shardings, without_empty


class Pipeline:
    """The programs of a pipeline; they compile when they are first called.

    Args:
        model: the model.
        cp: the context parallelism of every stage; its mesh has one more axis.
        axis: this axis, of the stages.
        virtual_stages: v, the chunks of consecutive layers on each stage.
        fsdp: whether to cut the parameters of a stage over dp and cp as well; they are gathered,
            and their gradients are reduced, in every tick.

    Raises:
        ValueError: if the mesh lacks the axis, or the axis has a role in `cp`, or the model cannot
            be cut (`Stages`).
        NotImplementedError: for what pipelines do not compute (`refusals.py`), and for layers that
            do not repeat in periods.

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
        self._mesh, cp = cp.mesh, with_auto_axes(cp)
        self.cp, self.axis = cp, axis
        self.stages = Stages(model, cp.mesh.shape[axis], virtual_stages)
        # Along these axes each device sums its own gradients. With FSDP no device has room for all
        # of a stage's, and of experts that are cut it has only its own: then the axes stay with the
        # compiler, as tp always does.
        self._flat = () if fsdp or cp.ep > 1 else cp.flat_axes
        self._manual = (axis, *self._flat)
        self._shapes = abstract_model(model)[1]
        self._shardings = stage_shardings(self.stages, cp, self._shapes, axis=axis, fsdp=fsdp)
        self._carry_shardings = shardings(model, self._shardings, cp, axis, self._flat)
        self._on_device = OnDevice(self.stages, cp, axis, self._flat)
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
        return self._outside(jax.device_put(self._cut(params), self._shardings))

    def sums(self, params: Any, batches: Sequence[Any]) -> tuple[Any, Float[Array, ""]]:
        """Return the sums over microbatches of the gradients and of the loss.

        Args:
            params: parameters of the stages (`shard_params`).
            batches: microbatches of equal shapes, from `cp.shard_batch` or `hcp.place_microbatch`,
                with "tokens", "targets", "positions", "weights" and a placed "mask", and with
                "mtp_targets" and "mtp_weights" for multi-token prediction. They run in this order;
                `dynamic.pipeline.order` finds a good one.

        Returns:
            Gradients of all that is trained on (the losses of depths and routers included), a tree
            like `params`, in float32 and reduced over all devices; and Σ weight · loss of the next
            tokens in nats.

        Raises:
            ValueError: if there is no microbatch, or their shapes or widest groups differ, or
                targets of the model's depths are missing.
        """
        return self.sums_and_means(params, batches)[:2]

    def sums_and_means(
        self, params: Any, batches: Sequence[Any]
    ) -> tuple[Any, Float[Array, ""], dict[str, Mean]]:
        """Return gradients and loss as `sums` does, and the means of depths and routers.

        Args:
            params: as in `sums`.
            batches: as in `sums`.

        Returns:
            Gradients, loss, and sums of the means by name (`loss_terms.mean_names`).

        Raises:
            ValueError: as `sums`.
        """
        check_alike(batches, self.stages.model)
        if self._mesh == self.cp.mesh:
            return self._step(params, batches)
        with jax.set_mesh(self.cp.mesh):
            found = self._step(*on_mesh(self.cp.mesh, (params, list(batches))))
        return self._outside(found)

    def _step(self, params: Any, batches: Sequence[Any]) -> Any:
        found = self._end(self.unreduced(params, batches))
        return found.grads, found.loss, found.means

    def unreduced(self, params: Any, batches: Sequence[Any]) -> StepSums:
        """Return the sums of each device over microbatches; `reduced` adds them up.

        Args:
            params: as for `sums`, on a mesh whose axes are Auto.
            batches: as for `sums`, which checks them; compiled programs do so, too.
        """
        ticks = make_schedule(len(batches), self.stages.num_stages, self.stages.virtual_stages)
        carry = self._begin(*batches[0]["tokens"].shape)
        for tick in ticks.ticks:
            program = self._tick(any(tick.forward), any(tick.backward))
            rows = [[batches[0 if w is None else w.microbatch] for w in row] for row in tick]
            carry = program(params, carry, *map(work_numbers, tick), *rows)
        return StepSums.of(carry)

    def compile(self, params: Any, batch: Any) -> tuple[StepSums, int]:
        """Compile the programs of `unreduced`; from then on, nothing else is compiled or accepted.

        Args:
            params: shapes, dtypes and shardings of the parameters of the stages.
            batch: a microbatch, on the devices; all must have its shapes.

        Returns:
            Shapes, dtypes and shardings of the results of `unreduced`; and the bytes per device
            that the largest program needs, arguments included.
        """
        shape, pp = batch["tokens"].shape, self.stages.num_stages
        begin, carry = self._begin.lower(*shape).compile(), self._abstract_carry(shape)
        self.__dict__["_begin"] = lambda *_: begin()
        work, rows = np.zeros((pp, 3), np.int32), [batch] * pp
        most = 0
        for key in ((True, False), (True, True), (False, True)):
            program = self._tick(*key).lower(params, carry, work, work, rows, rows).compile()
            self._programs[key] = program
            memory = program.memory_analysis()
            most = max(most, memory.argument_size_in_bytes + memory.temp_size_in_bytes)
        return StepSums.of(carry), int(most)

    def _outside(self, tree: Any) -> Any:
        """Return arrays on the mesh of the caller, whose axes may be Explicit."""
        return tree if self._mesh == self.cp.mesh else on_mesh(self._mesh, tree)

    def abstract_tick(self, batch: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the program of a tick with both passes, and shapes of its arguments, to compile.

        Args:
            batch: shapes and shardings of a microbatch, as for `sums`.
        """
        pp = self.stages.num_stages
        params = _like(jax.eval_shape(self._cut, self._shapes), self._shardings)
        carry = self._abstract_carry(batch["tokens"].shape)
        whole = NamedSharding(self.cp.mesh, PartitionSpec())
        work = jax.ShapeDtypeStruct((pp, 3), jnp.int32, sharding=whole)
        return self._tick(True, True), (params, carry, work, work, [batch] * pp, [batch] * pp)

    def _abstract_carry(self, shape: tuple[int, ...]) -> Carry:
        """Return shapes, dtypes and shardings of a carry, for microbatches of a shape."""
        shapes = jax.eval_shape(functools.partial(self._begin, *shape))
        carry: Carry = _like(shapes, self._carry_shardings)
        return carry

    @functools.cached_property
    def _num_slots(self) -> int:
        """Slots of a step with many microbatches, so that every step has the same shapes."""
        pp, v = self.stages.num_stages, self.stages.virtual_stages
        return make_schedule(4 * pp, pp, v).num_slots

    @functools.cached_property
    def _begin(self) -> Any:
        """The program `(rows, tokens) -> carry` of zeros."""
        lead = self.cp.axis_size(self._flat), self.stages.num_stages
        model, staged = self.stages.model, jax.eval_shape(self._cut, self._shapes)

        def begin(rows: int, tokens: int) -> Carry:
            return zeros(model, staged, lead, self._num_slots, (rows, tokens))

        return jax.jit(begin, static_argnums=(0, 1), out_shardings=self._carry_shardings)

    def reduced(self, sums: StepSums) -> StepSums:
        """Return the sums over all devices, gradients like the parameters; to be traced.

        Args:
            sums: from `unreduced`.
        """
        specs = StepSums.of(specs_over(self._manual, self._carry_shardings))

        def reduce(sums: StepSums) -> Any:
            grads, *scalars = jax.tree.map(lambda x: x[0], sums)
            if self._flat:
                grads, scalars = jax.lax.psum((grads, scalars), self._flat)
            shared = {name: grads[name] for name in SHARED if name in grads}
            shared, scalars = jax.tree.map(lambda x: x[0], (shared, scalars))
            shared, scalars = jax.lax.psum((shared, scalars), self.axis)
            return grads | shared, *scalars

        whole = (PartitionSpec(),) * 3
        mapped = self._map(reduce, (specs,), (self._param_specs, *whole))
        grads, loss, weight, means = mapped(sums)
        return StepSums(without_empty(self.stages, grads), loss, weight, means)

    @functools.cached_property
    def _end(self) -> Any:
        """The program of `reduced`."""
        whole = NamedSharding(self.cp.mesh, PartitionSpec())
        means = jax.tree.map(lambda _: whole, self._carry_shardings.means)
        out = StepSums(self._shardings, whole, whole, means)
        return jax.jit(self.reduced, donate_argnums=0, out_shardings=out)

    def _tick(self, forward: bool, backward: bool) -> Any:
        """Return the program `(params, carry, work forward, backward, batches …) -> carry`."""
        key = forward, backward
        if key not in self._programs:
            run = functools.partial(self._run, key)
            self._programs[key] = jax.jit(
                run, donate_argnums=1, out_shardings=self._carry_shardings
            )
        return self._programs[key]

    def _run(self, passes: tuple[bool, bool], params: Any, carry: Carry, *args: Any) -> Carry:
        f_work, b_work, f_batches, b_batches = args
        model, cp = self.stages.model, self.cp
        feed = Feed(stacked(f_batches, model), stacked(b_batches, model))
        tick = Tick(Feed(f_work, b_work), feed, end_arrays(f_batches, b_batches))
        rows = tick.ends["in"].shape[0]
        specs = Tick(
            Feed(PartitionSpec(), PartitionSpec()),
            Feed(*(given_specs(given, cp, rows) for given in feed)),
            dict.fromkeys(tick.ends, cp.spec(2)),
        )
        carry_specs = specs_over(self._manual, self._carry_shardings)
        on_device = functools.partial(self._on_device, passes)
        mapped = self._map(on_device, (self._param_specs, carry_specs, specs), carry_specs)
        moved: Carry = mapped(params, carry, tick)
        return moved

    def _map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return spmd.shard_map(self.cp.mesh, self._manual, function, in_specs, out_specs)

    def _cut(self, params: Any) -> Any:
        return stage_params(self.stages, params)

    @property
    def _param_specs(self) -> Any:
        """Specs of the parameters over the Manual axes."""
        return specs_over(self._manual, self._shardings)


def _like(shapes: Any, shardings: Any) -> Any:
    """Return shapes with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
