"""Shard arrays in pinned host memory, from which GPUs can fetch them.

In JAX this is the memory kind "pinned_host" of a sharding. For devices that are not attached (those
of a topology, which `compiled/aot.py` compiles for) JAX does not know the memories and silently
drops the kind, which changes the program. Only this file works around that.
"""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh, NamedSharding

KIND = "pinned_host"


def on_host(sharding: NamedSharding) -> NamedSharding:
    """Return the same sharding, but in pinned host memory.

    Raises:
        NotImplementedError: if the hosts of the devices offer no such memory.
    """
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    require(mesh)
    if mesh.devices.flat[0].addressable_memories():
        return sharding.with_memory_kind(KIND)
    return _AbsentHostSharding(mesh, sharding.spec)


def require(mesh: Mesh) -> None:
    """Check that the mesh's devices, if they are attached, can use pinned host memory.

    Raises:
        NotImplementedError: if not; the message names the memories that they have.
    """
    kinds = [memory.kind for memory in mesh.local_devices[0].addressable_memories()]
    if kinds and KIND not in kinds:
        raise NotImplementedError(
            f"{mesh.local_devices[0].device_kind} has the memories {', '.join(kinds)}, none of "
            f"them {KIND}: model.offload_activations and optimizer.offload must be false here."
        )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Hide the memory kind while a program is compiled for devices that are not attached.

    Lowering needs the kind. But when JAX compares the outputs of the compiled program with the
    requested shardings, its own shardings have lost the kind, so ours must not show it either.
    """
    _AbsentHostSharding.kind = None
    try:
        yield
    finally:
        _AbsentHostSharding.kind = KIND


class _AbsentHostSharding(NamedSharding):
    kind: str | None = KIND

    @property
    def memory_kind(self) -> str | None:
        return self.kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AbsentHostSharding) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((KIND, super().__hash__()))
