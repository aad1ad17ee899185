"""Parse compiled programs: the optimised HLO text that `compiled.as_text()` returns.

Compiled HLO is *scheduled*: the instructions of a computation are listed in the order in which they
are issued. An asynchronous collective is split into a start and a done; the instructions between
them can hide it. A `while` runs its body `known_trip_count` times.

    module = parse(compiled.as_text())
    for collective in collectives(compiled.as_text()):
        print(collective.kind, collective.count, collective.bytes, collective.groups)

It reads programs of any platform and knows nothing about meshes or time (`report.py` does), so that
tests of any room can count collectives with it. When XLA compiles for CPUs it widens bfloat16
collectives to float32, so bytes are exact there only for float32 programs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from hcp_jax.compiled.replica_groups import parse_groups
from hcp_jax.cost.traffic import sent_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_NAME = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=\s]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its module.
        opcode: such as "fusion", "custom-call", "all-gather-start".
        shape: type of its result, in HLO syntax.
        operands: names of the instructions it reads.
        attributes: everything after the operands, in HLO syntax.
        literal: text in the place of the operands if there are none, such as a parameter's number
            or the beginning of a constant.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @property
    def bytes(self) -> int:
        """Size of its result in bytes, summed over the elements of a tuple."""
        return shape_bytes(self.shape)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs, without the condition of a while."""
        found: list[str] = []
        for one, many in _CALLED.findall(self.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", many)
        return tuple(found)

    @property
    def op_name(self) -> str:
        """Origin in the Python program: jax's name stack, or ''."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def target(self) -> str:
        """Target of a custom call, or ''."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def trip_count(self) -> int | None:
        """Number of times that a while runs its body; None if the compiler does not know."""
        match = _TRIPS.search(self.attributes)
        return int(match.group(1)) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Sequence of instructions, in the order in which they are issued."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}


@dataclasses.dataclass(frozen=True)
class Module:
    """Compiled program: its computations by name, and the name of the entry."""

    entry: str
    computations: dict[str, Computation]
    num_devices: int
    scheduled: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, in any of its computations.

    Attributes:
        kind: one of `KINDS`.
        bytes: bytes that one device puts in, each time.
        count: how often it runs in one run of the program: the product of the trip counts of the
            loops around it. A loop of unknown length counts once.
        groups: groups of communicating devices, as logical numbers. For a permute, its rings: each
            lists the devices along the pairs, from its first device on.
        pairs: (source, target) pairs of a permute; empty for other kinds.
        name: name of the (start) instruction.
        computation: computation that contains it.
        op_name: origin in the Python program: jax's name stack.
        asynchronous: True if it is split into a start and a done.
        between: names of the instructions issued between start and done; empty if synchronous.
    """

    kind: str
    bytes: int
    count: int
    groups: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    name: str
    computation: str
    op_name: str
    asynchronous: bool
    between: tuple[str, ...]

    @property
    def group_size(self) -> int:
        """Number of devices in the largest group."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends each time; see `cost.traffic.sent_bytes`."""
        return sent_bytes(self.kind, self.bytes, self.group_size)


def parse(hlo_text: str) -> Module:
    """Parse the computations of a module.

    Args:
        hlo_text: `compiled.as_text()`.

    Raises:
        ValueError: if the text is not an HLO module with an entry.
    """
    head = hlo_text[: hlo_text.find("\n")]
    counts = [re.search(rf"\b{word}=(\d+)", head) for word in ("num_partitions", "replica_count")]
    num_devices = math.prod(int(count.group(1)) if count else 1 for count in counts)
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    body: list[Instruction] = []
    for line in hlo_text.splitlines():
        if (header := _HEADER.match(line)) and " = " not in line.split("(")[0]:
            name, body = header.group(2), []
            entry = name if header.group(1) else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, tuple(body))
            name = ""
        elif name and (instruction := _instruction(line)):
            body.append(instruction)
    if entry not in computations:
        raise ValueError(
            "this is not the text of a compiled HLO module: it has no ENTRY computation. "
            "Pass jax.jit(f).lower(...).compile().as_text()."
        )
    return Module(entry, computations, num_devices, "is_scheduled=true" in head)


def collectives(hlo_text: str) -> list[Collective]:
    """Return every collective of a compiled program, in the order in which they run.

    Raises:
        ValueError: if the text is not an HLO module, or writes its groups in an unknown syntax.
    """
    return module_collectives(parse(hlo_text))


def module_collectives(module: Module) -> list[Collective]:
    """Return the `collectives` of a parsed module."""
    return list(_walk(module, module.computations[module.entry], 1))


def find_collective(module: Module, instruction: Instruction) -> Instruction | None:
    """Return the collective that an instruction is or wraps; None if there is none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return instruction
    if instruction.opcode not in ("fusion", "async-start", "call"):
        return None
    for name in instruction.called:
        for inner in module.computations[name].instructions:
            found = find_collective(module, inner)
            if found is not None:
                return found
    return None


def done_of(computation: Computation, start: Instruction) -> int | None:
    """Return the index of the instruction that waits for `start`; None if it is synchronous."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return None
    waits = {start.name}
    for place, instruction in enumerate(computation.instructions):
        if waits.isdisjoint(instruction.operands):
            continue
        if instruction.opcode.endswith("-update"):
            waits.add(instruction.name)
        elif instruction.opcode.endswith("-done"):
            return place
    return None


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array type, or the sum over a tuple type.

    >>> shape_bytes("(f32[2,3]{1,0}, bf16[4]{0})")
    32
    """
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        numbers = [int(size.replace("<=", "")) for size in sizes.split(",") if size.strip()]
        elements = math.prod(numbers)
        width = re.search(r"\d+", dtype)
        item = _ITEM_BITS.get(dtype, int(width.group()) if width else 8)
        bits += elements * item
    return -(-bits // 8)


def shape_sizes(shape: str) -> tuple[int, ...]:
    """Return the sizes of the dims of an array type.

    >>> shape_sizes("bf16[2,2048,128]{2,1,0}")
    (2, 2048, 128)
    """
    match = _ARRAY.search(shape)
    return tuple(int(size) for size in match.group(2).split(",") if size) if match else ()


def _walk(module: Module, computation: Computation, times: int) -> Iterator[Collective]:
    places = {instruction.name: i for i, instruction in enumerate(computation.instructions)}
    for instruction in computation.instructions:
        found = find_collective(module, instruction)
        if found is not None:
            done = done_of(computation, instruction)
            first = places[instruction.name] + 1
            between = computation.instructions[first:done] if done is not None else ()
            yield _collective(
                module, computation, instruction, found, times, tuple(i.name for i in between)
            )
        elif instruction.opcode in ("while", "conditional", "call", "async-start"):
            inner = times * ((instruction.trip_count or 1) if instruction.opcode == "while" else 1)
            for name in instruction.called:
                yield from _walk(module, module.computations[name], inner)


def _collective(
    module: Module,
    computation: Computation,
    issued: Instruction,
    found: Instruction,
    times: int,
    between: tuple[str, ...],
) -> Collective:
    home = computation if issued is found else _home(module, found)
    operands = [home.by_name[name].bytes for name in found.operands if name in home.by_name]
    pairs = _pairs(found.attributes)
    kind = found.opcode.removesuffix("-start")
    permutes = kind == "collective-permute"
    return Collective(
        kind=kind,
        bytes=sum(operands),
        count=times,
        groups=_rings(pairs) if permutes else parse_groups(found.attributes, module.num_devices),
        pairs=pairs if permutes else (),
        name=issued.name,
        computation=computation.name,
        op_name=found.op_name,
        asynchronous=done_of(computation, issued) is not None,
        between=between,
    )


def _home(module: Module, instruction: Instruction) -> Computation:
    return next(c for c in module.computations.values() if instruction.name in c.by_name)


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    opcode, attributes = rest[:opening].strip(), rest[closing + 1 :]
    literal = "" if operands else inside[:32]
    return Instruction(match.group(2), opcode, shape, operands, attributes, literal)


def _closing(text: str, opening: int) -> int:
    """Return the index of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def _pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    match = re.search(r"source_target_pairs=\{([\d,{}\s]*)\}", attributes)
    numbers = [int(n) for n in re.findall(r"\d+", match.group(1))] if match else []
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _rings(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Return the rings that (source, target) pairs form, each from its lowest device on."""
    target = dict(pairs)
    heads = sorted(set(target) - set(target.values())) + sorted(target)
    seen: set[int] = set()
    rings = []
    for head in heads:
        ring: list[int] = []
        at: int | None = head
        while at is not None and at not in seen:
            seen.add(at)
            ring.append(at)
            at = target.get(at)
        if ring:
            rings.append(tuple(ring))
    return tuple(sorted(rings))
