"""Rank every split of a cluster for a model and a sequence length.

Every (pp, dp, tp, cp_outer, cp_inner, comm type, ep, remat policy) that fills the cluster and that
the model's heads, layers and experts allow goes through the cost model and the memory model; those
that fit are ranked by tokens per second. Nothing is compiled, so 64 GPUs take a second or two.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, get_args

from hcp_jax import hardware
from hcp_jax.base import checks
from hcp_jax.base.arguments import MOST_TOKENS
from hcp_jax.cost import stages
from hcp_jax.cost.memory import USABLE, estimate_memory
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import FLAT_AXES, Split
from hcp_jax.cost.step import estimate
from hcp_jax.cost.traffic import COMM_TYPES, Remat
from hcp_jax.hardware import Cluster
from hcp_jax.planner.candidate import Candidate
from hcp_jax.planner.explain import explain

REMATS: tuple[Remat, ...] = get_args(Remat)
VIRTUAL_STAGES = 1, 2
MOST_GPUS = 2048  # the tables of (2 cp)² pairs of chunks grow with the square of cp


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ranked splits of a cluster for a model and a sequence length.

    Attributes:
        model: shape of the decoder.
        cluster: the cluster.
        seq_len: T.
        batch: streams per step, over all of dp; None for one stream per replica, and pp of them for
            one of pp stages, so that a step has as many streams as with dp in place of pp.
        candidates: every valid split, the best first; splits that fit come before the others.
    """

    model: ModelShape
    cluster: Cluster
    seq_len: int
    batch: int | None
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The fastest split that fits."""
        return self.candidates[0]

    def explain(self) -> str:
        """Return the reasons, in words, why the best split is the best."""
        return explain(self.candidates, self.seq_len, stages.refusal(self.model))

    def to_json(self) -> dict[str, Any]:
        """Return all figures, as plain numbers and strings."""
        return {
            "cluster": str(self.cluster),
            "seq_len": self.seq_len,
            "batch": self.batch,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "why": self.explain(),
        }


def plan(
    model: str | Any,
    seq_len: int,
    *,
    gpu: str = "h100",
    hosts: int = 1,
    gpus_per_host: int = 8,
    batch: int | None = None,
    implementation: str = "triton",
) -> Plan:
    """Rank every split of a cluster for a model and a sequence length.

    Args:
        model: a name in `MODELS`, or a `ModelConfig`.
        seq_len: T, tokens of a stream.
        gpu: a name in `hardware.GPUS`, or a YAML file that describes another GPU.
        hosts: number of hosts.
        gpus_per_host: number of GPUs in each host.
        batch: streams per step, over all of dp; a replica computes its streams one by one. None
            gives each replica one stream, so splits with more dp have larger steps; a replica of pp
            stages has pp of them, which is few: give the batch of the run to rank pipelines.
        implementation: implementation of the attention core, whose rates are used.

    Returns:
        The plan; see `plan.best.split` and `plan.explain()`.

    Raises:
        ValueError: for an unknown model or GPU, or if nothing fits; the error then names the
            smallest cluster of such hosts that would.

    >>> plan("llama3-8b", 131072, gpu="h100", hosts=4).best.fits
    True
    """
    shape = model_shape(model)
    hosts = checks.integer("hosts", hosts, least=1)
    gpus_per_host = checks.integer("gpus_per_host", gpus_per_host, least=1)
    seq_len = checks.integer("seq_len", seq_len, least=1, most=MOST_TOKENS)  # positions are int32
    batch = None if batch is None else checks.integer("batch", batch, least=1)
    cluster = Cluster(hardware.gpu(gpu), hosts, gpus_per_host)
    if cluster.size > MOST_GPUS:
        raise NotImplementedError(
            f"{cluster} are {cluster.size:,} GPUs; the planner ranks at most {MOST_GPUS:,}. Plan "
            "for a part of the cluster, and multiply dp."
        )
    found = _ranked(shape, cluster, seq_len, batch, implementation)
    if not found or not found[0].fits:
        raise ValueError(_nothing_fits(shape, cluster, seq_len, found))
    return Plan(shape, cluster, seq_len, batch, tuple(found))


def splits(model: ModelShape, gpus: int, seq_len: int) -> Iterator[Split]:
    """Yield every split of `gpus` devices that is valid for the model and the sequence."""
    for pp, virtual in itertools.product(_divisors(gpus), VIRTUAL_STAGES):
        if stages.cut(model, pp, virtual) is not None:
            for split in _stage_splits(model, gpus // pp, seq_len):
                if split.tp > 1 and model.vocab_size % (split.tp * pp):
                    continue
                yield dataclasses.replace(split, pp=pp, virtual_stages=virtual)


def _stage_splits(model: ModelShape, gpus: int, seq_len: int) -> Iterator[Split]:
    """Yield every split of the devices of one stage."""
    for tp in _divisors(gpus):
        if any(size % tp for size in model.tp_sizes):
            continue
        for cp in _divisors(gpus // tp):
            dp = gpus // tp // cp
            if seq_len < 2 * cp * 128:
                continue
            comm_types = COMM_TYPES if cp > 1 else COMM_TYPES[:1]
            for inner, comm_type in itertools.product(_divisors(cp), comm_types):
                split = Split(dp, tp, cp // inner, inner, comm_type)
                if _valid(model, split):
                    choices = itertools.product(REMATS, (True, False), _expert_cuts(model, split))
                    for remat, fsdp, ep in choices:
                        if fsdp or dp * cp > 1:
                            yield dataclasses.replace(split, remat=remat, fsdp=fsdp, ep=ep)


def _expert_cuts(model: ModelShape, split: Split) -> list[int]:
    """Return every ep: numbers of devices of the innermost axes that divide the experts."""
    numbers = {kind.experts.number for kind in model.by_kind if kind.experts is not None}
    found, ep = [1], 1
    for axis in reversed(FLAT_AXES):
        ep *= getattr(split, axis)
        if ep > found[-1] and numbers and not any(number % ep for number in numbers):
            found.append(ep)
    return found


def _ranked(
    model: ModelShape, cluster: Cluster, seq_len: int, batch: int | None, implementation: str
) -> list[Candidate]:
    found = []
    for split in splits(model, cluster.size, seq_len):
        if batch is not None and batch % split.dp:
            continue
        # A replica computes its streams one by one: more of them cost time, not memory.
        each = split.pp if batch is None else batch // split.dp
        chunks = 2 * split.cp
        padded = -(-seq_len // chunks) * chunks
        cost = estimate(
            model, split, cluster, padded, microbatches=each, implementation=implementation
        )
        memory = estimate_memory(model, split, padded)
        found.append(Candidate(split, cost, memory, cluster.gpu.memory_bytes))
    return sorted(found, key=_rank)


def _rank(candidate: Candidate) -> tuple[float, ...]:
    """Return a sort key: splits that fit first, then by speed in steps of 1 %, then by memory."""
    if not candidate.fits:
        return (1, candidate.peak_bytes, 0.0, 0.0)
    speed = candidate.cost.tokens_per_s
    one_percent = round(math.log(speed) / math.log(1.01))
    return (0, -one_percent, round(candidate.peak_bytes / 2**30), -speed)


def _valid(model: ModelShape, split: Split) -> bool:
    heads = model.num_heads // split.tp
    if heads % split.exchange:
        return False
    if split.strategy.exchange and split.strategy.move:
        return split.cp_inner > 1 and split.cp_outer > 1
    # With one level, use only one axis: the inner one for heads, or the outer one for K and V.
    return (split.cp_inner if split.strategy.move else split.cp_outer) == 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nothing_fits(model: ModelShape, cluster: Cluster, seq_len: int, found: list[Candidate]) -> str:
    least = (
        f"the best split needs {found[0].peak_bytes / 2**30:.0f} GiB" if found else "none is valid"
    )
    words = (
        f"no split of {seq_len} tokens over {cluster} fits: {least} per GPU, and there are "
        f"{USABLE * cluster.gpu.memory_bytes / 2**30:.0f}."
    )
    for doublings in range(1, 8):
        bigger = dataclasses.replace(cluster, hosts=cluster.hosts * 2**doublings)
        limit = USABLE * cluster.gpu.memory_bytes
        # Nothing needs less memory than these.
        tried = (s for s in splits(model, bigger.size, seq_len) if s.fsdp and s.remat == "full")
        if any(estimate_memory(model, split, seq_len).peak <= limit for split in tried):
            return f"{words} {bigger} would do."
    return words
