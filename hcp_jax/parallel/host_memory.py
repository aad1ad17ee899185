"""Arrays that lie in the host's memory, pinned, for GPUs to fetch.

JAX says so with the memory kind "pinned_host" of a sharding. Of devices that are not here (those of
a topology, which `plan/aot.py` compiles for) it does not know the memories, and drops the kind
without a word: the program would be another one. What puts that right is in this file and nowhere
else.
"""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh, NamedSharding

KIND = "pinned_host"


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array that is cut in the same way, but lies in the hosts' memory.

    Raises:
        NotImplementedError: if the devices have no such memory.
    """
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    require(mesh)
    if mesh.devices.flat[0].addressable_memories():
        return sharding.with_memory_kind(KIND)
    return _OfAbsentDevices(mesh, sharding.spec)


def require(mesh: Mesh) -> None:
    """Refuses a mesh of devices that are here and have no pinned memory of their host.

    Raises:
        NotImplementedError: in that case; names the memories they have.
    """
    kinds = [memory.kind for memory in mesh.local_devices[0].addressable_memories()]
    if kinds and KIND not in kinds:
        raise NotImplementedError(
            f"{mesh.local_devices[0].device_kind} has the memories {', '.join(kinds)}, none of "
            f"them {KIND}: model.offload_activations and optimizer.offload must be false here."
        )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """While a program that was lowered for devices that are not here is compiled.

    Lowering must be told the kind; but when JAX compares the outputs of the compiled program with
    what was asked for, it has forgotten it of its own, and must not find it in ours.
    """
    _OfAbsentDevices.kind = None
    try:
        yield
    finally:
        _OfAbsentDevices.kind = KIND


class _OfAbsentDevices(NamedSharding):
    kind: str | None = KIND

    @property
    def memory_kind(self) -> str | None:
        return self.kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OfAbsentDevices) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((KIND, super().__hash__()))
