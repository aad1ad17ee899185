"""Simulate the timing of a compiled schedule: when a device computes, sends and waits.

The instructions of a compiled program are issued in order on one compute stream. The start of a
collective puts a transfer on its link, where transfers queue; its done waits for the last byte.
Walking over the schedule with a clock shows which transfers are hidden behind which kernels.
Seconds are modelled:

    attention kernel   FLOPs from its shapes and the mask's density, at the kernel's rate
    matrix product     the longer of its FLOPs at the GPU's rate and its bytes at the memory's rate
    anything else      bytes read and written, at the memory's rate; every kernel adds a launch
    transfer           bytes that a device sends at the rate of its link, plus a latency

Order, and what lies between a start and its done, are facts; only the seconds are modelled.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hcp_jax.compiled import hlo
from hcp_jax.cost.shape import BACKWARD
from hcp_jax.cost.traffic import EXPERT_ROUNDS
from hcp_jax.hardware import GPU, Path

LAUNCH_S = 2e-6  # seconds from one kernel to the next on one stream
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# The two backward kernels compute seven products: three for dq, four for dk and dv.
_BACKWARD_SHARES = {"dq": 3 / 7, "dkv": 4 / 7}
_MOST_SPANS = 20_000


@dataclasses.dataclass(frozen=True)
class Span:
    """Kernel or transfer in a schedule.

    Attributes:
        lane: "compute", or the link that a transfer runs on.
        kind: "attention", "product" or "other" for a kernel; the kind of collective for a transfer.
        name: name of the kernel or of the collective.
        begin: seconds from the start of the program to its begin.
        end: seconds from the start of the program to its end.
    """

    lane: str
    kind: str
    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Flight:
    """Executions of a collective; its last one stands for those of all later trips of a loop.

    Attributes:
        seconds: seconds that it occupies its link.
        until: seconds from its start to its last byte, including the wait for its link.
        exposed: seconds in which the device waits for it, as the mean over all executions.
        attention: seconds of attention issued between its start and its done.
        behind: names of kernels issued between start and done, the longest first.
    """

    seconds: float
    until: float
    exposed: float
    attention: float
    behind: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Simulated timing of a compiled program.

    Attributes:
        spans: kernels and transfers in order of their begin; only the first ones of a long program.
        flights: execution of every collective, by the name of its (start) instruction.
        compute_s: seconds in which the device computes, by kind.
        exposed_s: seconds in which the device waits.
        step_s: seconds of one run of the program.
    """

    spans: tuple[Span, ...]
    flights: dict[str, Flight]
    compute_s: dict[str, float]
    exposed_s: float
    step_s: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Rates for the simulation of a schedule.

    Attributes:
        gpu: GPU whose rates are used.
        implementation: implementation of the attention kernels.
        density: visible share of the (query, key) pairs given to attention kernels.
        path: returns the path of a collective.
    """

    gpu: GPU
    implementation: str
    density: float
    path: Callable[[hlo.Collective], Path]


def simulate(module: hlo.Module, costs: Costs) -> Schedule:
    """Simulate the timing of a compiled program.

    Args:
        module: `hlo.parse(compiled.as_text())`.
        costs: rates of kernels and links.
    """
    return _Walk(module, costs).run()


def kind_of(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> str:
    """Return the kind of an instruction: "attention", "product", "other", or "" for no kernel."""
    if instruction.opcode in _FREE:
        return ""
    products = _product_flops(module, computation, instruction) > 0
    kernel = instruction.opcode == "custom-call" or products
    if kernel and re.search(r"\battend(_grads)?\b", instruction.op_name):
        return "attention"
    return "product" if products else "other"


def label(instruction: hlo.Instruction) -> str:
    """Return a short name: the name of the kernel, or the last part of jax's name stack."""
    match = re.search(r'\bname = "([^"]+)"', instruction.attributes)
    if match and instruction.opcode == "custom-call":
        return match.group(1).strip("_")
    return instruction.op_name.rsplit("/", 1)[-1] or instruction.name


class _Departed(NamedTuple):
    """Transfer in flight, with the compute totals at its start."""

    issued: float
    begin: float
    end: float
    attention: float
    kernels: int


class _Walk:
    def __init__(self, module: hlo.Module, costs: Costs):
        self.module, self.costs = module, costs
        self.collectives = {c.name: c for c in hlo.module_collectives(module)}
        self.now, self.exposed = 0.0, 0.0
        self.free: dict[str, float] = {}
        self.compute: dict[str, float] = {"attention": 0.0, "product": 0.0, "other": 0.0}
        self.spans: list[Span] = []
        self.flights: dict[str, Flight] = {}
        self.weight = 1  # number of executions that an instruction stands for, in loops
        self.waited: dict[str, tuple[int, float]] = {}  # executions and waits of each collective
        self.seen: list[tuple[float, str]] = []  # (seconds, name) of every kernel issued so far

    def run(self) -> Schedule:
        self.walk(self.module.computations[self.module.entry])
        return Schedule(
            tuple(sorted(self.spans, key=lambda span: span.begin)),
            self.flights,
            self.compute,
            self.exposed,
            self.now,
        )

    def walk(self, computation: hlo.Computation) -> None:
        flying: dict[str, _Departed] = {}
        waits_for: dict[str, str] = {}
        for instruction in computation.instructions:
            if instruction.name in self.collectives:
                collective = self.collectives[instruction.name]
                flying[instruction.name] = self.depart(collective)
                waits_for[instruction.name] = instruction.name
                if not collective.asynchronous:
                    self.arrive(instruction.name, flying.pop(instruction.name))
            elif instruction.opcode.endswith(("-update", "-done")):
                for name in instruction.operands:
                    start = waits_for.get(name)
                    if start is not None:
                        waits_for[instruction.name] = start
                        if instruction.opcode.endswith("-done") and start in flying:
                            self.arrive(start, flying.pop(start))
            elif instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                assert body is not None, instruction.name
                self.loop(self.module.computations[body.group(1)], instruction.trip_count or 1)
            elif instruction.opcode == "conditional":
                branches = [self.module.computations[name] for name in instruction.called]
                # An even load is assumed, which needs no second round of dispatch.
                self.one_of(branches, min if EXPERT_ROUNDS in instruction.op_name else max)
            elif instruction.opcode == "call":
                self.walk(self.module.computations[instruction.called[0]])
            else:
                self.execute(computation, instruction)

    def depart(self, collective: hlo.Collective) -> "_Departed":
        path = self.costs.path(collective)
        begin = max(self.now, self.free.get(path.link, 0.0))
        end = begin + path.latency + collective.sent_bytes / path.rate
        self.free[path.link] = end
        self.span(path.link, collective.kind, collective.name, begin, end)
        return _Departed(self.now, begin, end, self.compute["attention"], len(self.seen))

    def arrive(self, name: str, departed: "_Departed") -> None:
        exposed = max(0.0, departed.end - self.now)
        times, waited = self.waited.get(name, (0, 0.0))
        times, waited = times + self.weight, waited + self.weight * exposed
        self.waited[name] = times, waited
        kernels = sorted(self.seen[departed.kernels :], reverse=True)
        self.flights[name] = Flight(
            seconds=departed.end - departed.begin,
            until=departed.end - departed.issued,
            exposed=waited / times,
            attention=self.compute["attention"] - departed.attention,
            behind=tuple(dict.fromkeys(kernel for _, kernel in kernels))[:2],
        )
        self.exposed += exposed
        self.now = max(self.now, departed.end)

    def loop(self, body: hlo.Computation, trips: int) -> None:
        """Walk over the body twice; all later trips take the same time as the second.

        The first trip differs: it may wait for transfers that were issued before the loop and still
        occupy a link.
        """
        self.walk(body)
        if trips == 1:
            return
        now, exposed, compute = self.now, self.exposed, dict(self.compute)
        free = dict(self.free)
        first, more = len(self.spans), trips - 2
        weight, self.weight = self.weight, self.weight * (trips - 1)
        self.walk(body)
        self.weight = weight
        seconds, spans = self.now - now, self.spans[first:]
        self.now += more * seconds
        self.exposed += more * (self.exposed - exposed)
        for kind, before in compute.items():
            self.compute[kind] += more * (self.compute[kind] - before)
        for link, end in self.free.items():
            if end != free.get(link):  # a transfer of the last trip may still occupy its link
                self.free[link] = end + more * seconds
        for trip in range(1, trips - 1):
            if len(self.spans) + len(spans) > _MOST_SPANS:
                break
            shift = trip * seconds
            self.spans += [
                dataclasses.replace(s, begin=s.begin + shift, end=s.end + shift) for s in spans
            ]

    def one_of(self, branches: list[hlo.Computation], choose: Callable[..., Any]) -> None:
        """Walk over all branches from the same start time, and keep what happened in one.

        Args:
            branches: the branches of a conditional.
            choose: `max` keeps the branch that takes longest, `min` the one that ends first.
        """
        start, flights, waited = self.now, dict(self.flights), dict(self.waited)
        ends = []
        exposed, compute, free = self.exposed, dict(self.compute), dict(self.free)
        for branch in branches:
            self.now, self.exposed, self.compute = start, exposed, dict(compute)
            self.free = dict(free)  # only one branch runs: none waits for another's transfers
            self.flights, self.waited = dict(flights), dict(waited)
            self.walk(branch)
            ends.append(
                (self.now, self.exposed, self.compute, self.free, self.flights, self.waited)
            )
        kept = choose(ends, key=lambda end: end[0])
        self.now, self.exposed, self.compute, self.free, self.flights, self.waited = kept

    def execute(self, computation: hlo.Computation, instruction: hlo.Instruction) -> None:
        kind = kind_of(self.module, computation, instruction)
        if not kind:
            return
        seconds = LAUNCH_S + _seconds(self.module, computation, instruction, kind, self.costs)
        name = label(instruction)
        self.span("compute", kind, name, self.now, self.now + seconds)
        self.seen.append((seconds, name))
        self.compute[kind] += seconds
        self.now += seconds

    def span(self, lane: str, kind: str, name: str, begin: float, end: float) -> None:
        if len(self.spans) < _MOST_SPANS:
            self.spans.append(Span(lane, kind, name, begin, end))


def _seconds(
    module: hlo.Module,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
    kind: str,
    costs: Costs,
) -> float:
    if kind == "attention" and instruction.opcode == "custom-call":
        return _attention_seconds(computation, instruction, costs)
    moved = _bytes(module, computation, instruction) / costs.gpu.memory_bandwidth
    products = _product_flops(module, computation, instruction)
    return max(moved, products / costs.gpu.product_rate.value)


def _attention_seconds(
    computation: hlo.Computation, instruction: hlo.Instruction, costs: Costs
) -> float:
    """Return the seconds of an attention kernel on q `[B, T, N, H]` and k `[B, S, K, H]`."""
    q, k = (hlo.shape_sizes(computation.by_name[name].shape) for name in instruction.operands[:2])
    flops = 4.0 * math.prod(q) * k[1] * costs.density
    if "attend_grads" not in instruction.op_name:
        return flops / costs.gpu.attention_rate(costs.implementation, "forward").value
    name = label(instruction)
    share = next((s for part, s in _BACKWARD_SHARES.items() if part in name), 1.0)
    rate = costs.gpu.attention_rate(costs.implementation, "backward").value
    return share * BACKWARD * flops / rate


def _product_flops(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> float:
    """Return the FLOPs of the matrix products in an instruction, also inside fusions and calls."""
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    elif instruction.opcode == "custom-call" and "cublas" in instruction.target:
        dims = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes)
    elif instruction.opcode == "custom-call" and "expert_product" in instruction.op_name:
        return _expert_flops(computation, instruction)
    elif instruction.opcode in ("fusion", "call", "async-start"):
        inner = [module.computations[name] for name in instruction.called]
        return sum(_product_flops(module, c, i) for c in inner for i in c.instructions)
    else:
        return 0.0
    left = hlo.shape_sizes(computation.by_name[instruction.operands[0]].shape)
    contracted = [int(dim) for dim in re.findall(r"\d+", dims.group(1) if dims else "")]
    out = hlo.shape_sizes(instruction.shape)
    return 2.0 * math.prod(out) * math.prod(left[dim] for dim in contracted)


def _expert_flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Return the FLOPs of a kernel that multiplies `[M, K]` rows with `[E, K, N]` weights.

    Rows and weights are its operands, or operands and result, in any order. Each row is multiplied
    with the weights of one expert, as if no row were padding.
    """
    shapes = [computation.by_name[name].shape for name in instruction.operands]
    sizes = [hlo.shape_sizes(shape) for shape in (*shapes[1:], instruction.shape)]
    [weights] = [s for s in sizes if len(s) == 3]
    return 2.0 * max(s[0] for s in sizes if len(s) == 2) * math.prod(weights[1:])


def _bytes(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Return the bytes that a kernel reads and writes; for a sliced array only the slices count."""
    operands = [computation.by_name[n] for n in instruction.operands if n in computation.by_name]
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * operands[1].bytes
    if instruction.opcode not in ("fusion", "fusion-start"):
        return float(instruction.bytes + sum(operand.bytes for operand in operands))
    fused = module.computations[instruction.called[0]]
    updates = [i for i in fused.instructions if i.opcode == "dynamic-update-slice"]
    # The type of a start lists its operands as well; the root comes last and is the result alone.
    written = float(fused.instructions[-1].bytes)
    for update in updates:
        written += fused.by_name[update.operands[1]].bytes - update.bytes
    return max(0.0, written) + sum(_read(fused, index) for index in range(len(operands)))


def _read(fused: hlo.Computation, index: int) -> float:
    """Return the bytes that a fusion reads from its operand number `index`."""
    for instruction in fused.instructions:
        if instruction.opcode == "parameter" and instruction.literal == str(index):
            return _read_by_users(fused, instruction)
    return 0.0


def _read_by_users(fused: hlo.Computation, array: hlo.Instruction) -> float:
    read = 0.0
    for user in fused.instructions:
        if array.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            read += user.bytes
        elif user.opcode == "bitcast":
            read += _read_by_users(fused, user)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != array.name:
            return float(array.bytes)
    return min(read, float(array.bytes))
