"""Run microbatches forward through the stages of a pipeline, to evaluate their losses."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.dynamic.pipeline import make_schedule
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import cross_entropy_by_bin
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.carry import specs_over
from hcp_jax.pipeline.feed import CHUNK, Given, given_specs, stacked, work_numbers
from hcp_jax.pipeline.on_device import OnDevice, chunk_of
from hcp_jax.pipeline.ticks import Pipeline


class ForwardPipeline(Pipeline):
    """The program of a pipeline that computes losses by bins of positions, and no gradients.

    Args:
        model: as for `Pipeline`.
        cp: as for `Pipeline`.
        begins: the first position of each of n bins, ascending from 0.
        words: further arguments of `Pipeline`.

    Raises:
        ValueError: as `Pipeline`.
        NotImplementedError: as `Pipeline`.

    >>> import hcp_jax as hcp
    >>> from hcp_jax.models.transformer import init_params
    >>> model = ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, intermediate_size=32,
    ...                     num_heads=4, num_kv_heads=2)
    >>> cp = hcp.ContextParallel(hcp.make_mesh(pp=2, devices=jax.devices()[:2]), "p2p")
    >>> pipeline = ForwardPipeline(model, cp, (0, 1, 8))
    >>> params = pipeline.shard_params(init_params(model, jax.random.key(0)))
    >>> ids = np.arange(16, dtype=np.int32)[None]
    >>> batch = cp.shard_batch({"tokens": ids, "positions": ids, "targets": ids + 1,
    ...                         "weights": np.ones((1, 16), np.float32), "mask": model.mask()})
    >>> ((losses, weights),) = pipeline.by_bin(params, 1, lambda number: batch)
    >>> weights.tolist()
    [[[1.0, 7.0, 8.0]]]
    """

    def __init__(
        self, model: ModelConfig, cp: ContextParallel, begins: tuple[int, ...], **words: Any
    ):
        super().__init__(model, cp, **words)
        self._begins = np.asarray(begins, np.int32)
        self._forward = _ForwardOnDevice(self.stages, self.cp, self.axis, self._flat)

    def by_bin(
        self, params: Any, number: int, microbatch: Callable[[int], Any]
    ) -> Iterator[Float[Array, "2 B C n"]]:
        """Yield Σ weight · cross entropy, and Σ weight, by row, cp device and bin.

        Args:
            params: parameters of the stages (`shard_params`).
            number: how many microbatches there are.
            microbatch: returns each of them, from 0 on, on the devices; it is called once for each.
                They have equal shapes, as for `sums`.
        """
        stages, held = self.stages, {0: microbatch(0)}
        last = stages.virtual_stages - 1
        arriving = self._begin_forward(*held[0]["tokens"].shape)
        for tick in make_schedule(number, stages.num_stages, stages.virtual_stages).ticks:
            if not any(tick.forward):
                break
            numbers = [None if w is None else w.microbatch for w in tick.forward]
            held |= {n: microbatch(n) for n in numbers if n is not None and n not in held}
            some = next(iter(held.values()))
            row = [some if n is None else held[n] for n in numbers]
            arriving, sums = self._forward_tick(params, arriving, work_numbers(tick.forward), row)
            done = tick.forward[-1]
            if done is not None and done.chunk == last:
                yield sums
                if len(held) > 1:
                    del held[done.microbatch]

    def compile_forward(self, params: Any, batch: Any) -> int:
        """Compile the programs; return the bytes per device that they need beside arguments.

        Args:
            params: shapes, dtypes and shardings of the parameters of the stages.
            batch: a microbatch, on the devices; all must have its shapes.
        """
        shape, pp = batch["tokens"].shape, self.stages.num_stages
        begin = self._begin_forward.lower(*shape)
        arriving = jax.ShapeDtypeStruct(
            begin.out_info.shape, begin.out_info.dtype, sharding=self._carry_shardings.arriving
        )
        work = np.zeros((pp, 3), np.int32)
        tick = self._forward_tick.lower(params, arriving, work, [batch] * pp).compile()
        begun = begin.compile()
        self.__dict__["_begin_forward"] = lambda *_: begun()
        self.__dict__["_forward_tick"] = tick
        return int(tick.memory_analysis().temp_size_in_bytes)

    @functools.cached_property
    def _begin_forward(self) -> Any:
        """The program `(rows, tokens) -> arriving` of zeros."""
        model, pp = self.stages.model, self.stages.num_stages

        def begin(rows: int, tokens: int) -> Any:
            return jnp.zeros((pp, rows, tokens, model.hidden_size), model.compute_dtype)

        out = self._carry_shardings.arriving
        return jax.jit(begin, static_argnums=(0, 1), out_shardings=out)

    @functools.cached_property
    def _forward_tick(self) -> Any:
        """The program `(params, arriving, work, batches) -> (arriving, sums)`."""
        whole = NamedSharding(self.cp.mesh, PartitionSpec())
        out = self._carry_shardings.arriving, whole
        return jax.jit(self._run_forward, donate_argnums=1, out_shardings=out)

    def _run_forward(self, params: Any, arriving: Any, work: Any, batches: Any) -> Any:
        model, cp, last = self.stages.model, self.cp, batches[-1]
        given = stacked(batches, model)
        begun = last["positions"][..., None] >= self._begins[None, None]
        bins = jnp.sum(begun, axis=-1, dtype=jnp.int32) - 1
        ends = {"in": batches[0]["tokens"], "bins": bins}
        ends |= {name: last[name] for name in ("targets", "weights")}
        moving = specs_over(self._manual, self._carry_shardings).arriving
        in_specs = (
            self._param_specs,
            moving,
            PartitionSpec(),
            given_specs(given, cp, ends["in"].shape[0]),
            dict.fromkeys(ends, cp.spec(2)),
        )
        out_specs = moving, PartitionSpec(None, *cp.spec(3))
        on_device = functools.partial(self._forward.by_bin, self._begins.size)
        return self._map(on_device, in_specs, out_specs)(params, arriving, work, given, ends)


class _ForwardOnDevice(OnDevice):
    """The forward pass of a device; see `OnDevice`."""

    def by_bin(
        self, num_bins: int, params: Any, arriving: Any, work: Any, given: Given, ends: Any
    ) -> tuple[Any, Any]:
        """Return what is sent to the next stage, and the sums of the last stage's microbatch."""
        model, mine = self.stages.model, jax.lax.axis_index(self.axis)
        x = self._embed(params["embed_tokens"], ends["in"])
        x = jnp.where((mine == 0) & (work[mine, CHUNK] == 0), x, arriving[0])
        y, _ = self._apply(chunk_of(params["layers"], work[mine, CHUNK]), x, self._own(given))
        last = mine == self.stages.num_stages - 1
        name = "embed_tokens" if model.tie_embeddings else "lm_head"
        sums = cross_entropy_by_bin(
            nnx.merge(self._norm, params["norm"])(self._sum_stages(jnp.where(last, y, 0))),
            params[name]["embedding"],
            ends["targets"],
            ends["weights"],
            ends["bins"],
            num_bins,
            cp=self.cp,
            chunk=model.loss_chunk,
            soft_cap=model.final_soft_cap,
            vocab_axes=(self.axis,),
        )
        return self._send(y, 1)[None], jnp.stack(sums)
