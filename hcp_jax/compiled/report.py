"""Report what a compiled program moves and hides, and the memory it needs.

`read` finds the memory of any compiled program, its collectives with their mesh axes, links and
bytes, and, by simulated timing (`clock.py`), which of them are not hidden. A ring hop counts as
hidden only if enough attention is scheduled between its start and its done: by the cost model, it
must last until the last byte has arrived.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hcp_jax.compiled import clock, hlo
from hcp_jax.cost.mixers import stream_pairs
from hcp_jax.cost.pairs import pairs_by_hop
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.traffic import (
    EXCHANGE_HEADS,
    EXPERT_DISPATCH,
    GATHER_KV,
    HALO,
    RING_HOP,
    STATE_SCAN,
)
from hcp_jax.hardware import Cluster, Path

# A transfer counts as hidden if the device waits for at most this share of its duration.
_TOLERANCE = 0.01
_NAMES = {
    RING_HOP: "ring",
    EXCHANGE_HEADS: "heads",
    GATHER_KV: "gather",
    STATE_SCAN: "states",
    HALO: "halo",
    EXPERT_DISPATCH: "experts",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
        argument_bytes: bytes of the program's arguments.
        output_bytes: bytes of its outputs.
        alias_bytes: bytes of outputs that reuse the memory of donated arguments.
        temp_bytes: peak of all temporary buffers.
        device_bytes: memory of the GPU.
        host_bytes: bytes offloaded to the host's memory.
        beside_bytes: bytes of arrays that live there besides, and that the program does not get.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    device_bytes: int
    host_bytes: int = 0
    beside_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Bytes of all arrays; aliased outputs count once."""
        program = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes
        return program + self.beside_bytes

    @property
    def fits(self) -> bool:
        """True if a tenth of the GPU is left for CUDA, NCCL's buffers and fragmentation."""
        return self.peak_bytes <= 0.9 * self.device_bytes


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of a program with equal properties, merged into one entry.

    Attributes:
        kind: kind of collective, as HLO names it.
        what: "ring", "heads" or "gather" for attention, "states" or "halo" for recurrent layers,
            "experts" for rows that travel to them, "stages" for what the stages of a pipeline
            exchange; "" for other collectives.
        axes: mesh axes that they run over.
        link: "inside a host" or "between hosts".
        bytes: bytes that one device puts in, each time.
        sent_bytes: bytes that one device sends, each time.
        count: how often they run, in total.
        hidden: True if compute hides them.
        seconds: modelled seconds of all runs.
        exposed_s: seconds of these in which the device waits.
        behind: kernels that hide them, the longest first.
    """

    kind: str
    what: str
    axes: tuple[str, ...]
    link: str
    bytes: int
    sent_bytes: float
    count: int
    hidden: bool
    seconds: float
    exposed_s: float
    behind: tuple[str, ...]

    @property
    def is_send(self) -> bool:
        """True for a send between stages; what else stages exchange are sums."""
        return self.what == "stages" and self.kind == "collective-permute"


@dataclasses.dataclass(frozen=True)
class Audit:
    """Facts and modelled seconds of one program.

    Attributes:
        cluster: cluster that it was compiled for.
        memory: memory of one device.
        collectives: its collectives, equal ones merged, in the order of the program.
        schedule: simulated timing.
        compile_s: seconds of compilation; 0 if unknown.
    """

    cluster: Cluster
    memory: Memory
    collectives: tuple[Moved, ...]
    schedule: clock.Schedule
    compile_s: float = 0.0

    @property
    def ring_hops(self) -> int:
        """Number of ring permutes; K, V and their gradients are counted separately."""
        return sum(moved.count for moved in self.collectives if moved.what == "ring")

    @property
    def ring_hops_hidden(self) -> int:
        """Number of ring permutes that are hidden behind attention."""
        return sum(m.count for m in self.collectives if m.what == "ring" and m.hidden)

    @property
    def sends(self) -> int:
        """Number of sends between stages of a pipeline."""
        return sum(moved.count for moved in self.collectives if moved.is_send)

    @property
    def sends_hidden(self) -> int:
        """Number of sends between stages that compute hides."""
        return sum(moved.count for moved in self.collectives if moved.is_send and moved.hidden)

    @property
    def communication_s(self) -> float:
        """Seconds of all transfers, hidden or not."""
        return sum(moved.seconds for moved in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """Return all figures, as plain numbers and strings."""
        memory = dataclasses.asdict(self.memory)
        return {
            "cluster": str(self.cluster),
            "ring_hops": self.ring_hops,
            "ring_hops_hidden": self.ring_hops_hidden,
            "sends": self.sends,
            "sends_hidden": self.sends_hidden,
            "memory": memory | {"peak_bytes": self.memory.peak_bytes, "fits": self.memory.fits},
            "collectives": [dataclasses.asdict(moved) for moved in self.collectives],
            "modelled": {
                "compute_s": sum(self.schedule.compute_s.values()),
                "attention_s": self.schedule.compute_s["attention"],
                "communication_s": self.communication_s,
                "exposed_s": self.schedule.exposed_s,
                "step_s": self.schedule.step_s,
            },
            "compile_s": self.compile_s,
        }


def read(
    compiled: jax.stages.Compiled,
    mesh: Mesh,
    cluster: Cluster,
    *,
    implementation: str = "triton",
    density: float = 1.0,
    compile_s: float = 0.0,
) -> Audit:
    """Read a compiled program and return its audit.

    Args:
        compiled: program compiled for the devices of `mesh`.
        mesh: mesh of `aot.devices(cluster)`.
        cluster: cluster whose links and rates are used.
        implementation: implementation of the attention core, whose rates are used.
        density: visible share of the (query, key) pairs given to attention kernels; see
            `busiest_density`.
        compile_s: compilation seconds to report.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    module = hlo.parse(text)
    numbers = [_number(device, cluster) for device in mesh.devices.flat]

    def path(collective: hlo.Collective) -> Path:
        return min(
            (cluster.path(collective.kind, [numbers[i] for i in g]) for g in collective.groups),
            key=lambda p: p.rate,
        )

    costs = clock.Costs(cluster.gpu, implementation, density, path)
    found = clock.simulate(module, costs)
    moved = [
        _moved(collective, found.flights[collective.name], mesh, path(collective).link)
        for collective in hlo.module_collectives(module)
        if collective.name in found.flights and collective.group_size > 1
    ]
    return Audit(
        cluster,
        Memory(
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            cluster.gpu.memory_bytes,
            memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        ),
        tuple(_together(moved)),
        found,
        compile_s,
    )


def busiest_density(
    model: ModelShape, seq_len: int, cp_size: int, layout: str, ring_size: int
) -> float:
    """Return the visible share of the (query, key) pairs given to the busiest device's kernels.

    Args:
        model: gives the mask.
        seq_len: T, padded.
        cp_size: C.
        layout: "zigzag" or "contiguous".
        ring_size: number of devices that K and V move over.
    """
    chunks = cp_size * (2 if layout == "zigzag" else 1)
    by_hop = pairs_by_hop(stream_pairs(model, seq_len, chunks), cp_size, layout, ring_size)
    return float(by_hop.sum(axis=1).max()) / (seq_len / ring_size * seq_len)


def collective_axes(collective: hlo.Collective, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which a collective's devices differ."""
    varying: set[str] = set()
    for group in collective.groups:
        coordinates = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
        differs = (coordinates != coordinates[:, :1]).any(axis=1)
        varying |= {axis for axis, d in zip(mesh.axis_names, differs, strict=True) if d}
    return tuple(axis for axis in mesh.axis_names if axis in varying)


def _number(device: jax.Device, cluster: Cluster) -> int:
    """Return a device's number in the cluster, counted host by host."""
    host: int = device.process_index
    return host * cluster.gpus_per_host + device.id % cluster.gpus_per_host


def _moved(c: hlo.Collective, flight: clock.Flight, mesh: Mesh, link: str) -> Moved:
    what = next((name for scope, name in _NAMES.items() if scope in c.op_name), "")
    axes = collective_axes(c, mesh)
    if not what and axes == ("pp",):
        what = "stages"
    if what == "ring":
        hidden = flight.attention >= flight.until
    else:
        hidden = c.asynchronous and flight.exposed <= _TOLERANCE * flight.seconds
    return Moved(
        c.kind,
        what,
        axes,
        link,
        c.bytes,
        c.sent_bytes,
        c.count,
        hidden,
        c.count * flight.seconds,
        c.count * flight.exposed,
        flight.behind if hidden else (),
    )


def _together(moved: list[Moved]) -> list[Moved]:
    alike: dict[tuple[Any, ...], Moved] = {}
    for one in moved:
        key = (one.kind, one.what, one.axes, one.link, one.bytes, one.hidden)
        same = alike.get(key)
        if same is None:
            alike[key] = one
            continue
        alike[key] = dataclasses.replace(
            same,
            count=same.count + one.count,
            seconds=same.seconds + one.seconds,
            exposed_s=same.exposed_s + one.exposed_s,
            behind=tuple(dict.fromkeys((*same.behind, *one.behind)))[:2],
        )
    return list(alike.values())
