"""Refuse what pipelines do not compute; what the cut into stages needs is in `stages.py`."""

from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel


def require_supported(model: ModelConfig, cp: ContextParallel, axis: str) -> None:
    """Check that a pipeline computes a model on a mesh, whatever its stages.

    Args:
        model: the model.
        cp: the context parallelism inside a stage.
        axis: the mesh axis of the stages.

    Raises:
        ValueError: if the mesh lacks the axis, or it has a role in `cp`, or tp does not divide what
            it cuts.
        NotImplementedError: for what is not supported; the error says what.
    """
    mesh = cp.mesh
    if axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has no axis {axis!r} for the stages, but {mesh.axis_names}: use "
            "hcp.make_mesh(pp=...), or name the mesh's own axis."
        )
    if axis in cp.axes:
        raise ValueError(
            f"the mesh axis {axis!r} has a role in cp; stages need an axis of their own."
        )
    require_supported_model(model)
    tp = cp.axis_size(cp.tp)
    sizes = [size for stack in model.plan.stacks for size in stack.spec.tp_sizes.items()]
    for name, size in sizes:
        if size % tp:
            raise ValueError(f"tp={tp} cannot cut {name}={size}; use a tp that divides it.")
    require_vocabulary(model, mesh.shape[axis], tp)


def require_vocabulary(model: ModelConfig, pp: int, tp: int) -> None:
    """Check that stages and tp together can cut the vocabulary.

    Raises:
        ValueError: if they cannot; says which size they can.
    """
    if tp > 1 and model.vocab_size % (pp * tp):
        raise ValueError(
            f"pp x tp = {pp * tp} cannot cut vocab_size={model.vocab_size}: the vocabulary is cut "
            f"over both. Round vocab_size up to {-(-model.vocab_size // (pp * tp)) * pp * tp}."
        )


def require_supported_model(model: ModelConfig) -> None:
    """Check that a pipeline computes a model, on whatever mesh.

    Raises:
        NotImplementedError: for what is not supported; the error says what.
    """
    if model.offload_activations:
        raise NotImplementedError(
            "offload_activations is not supported in a pipeline: stages keep little besides the "
            "inputs of their chunks. Use remat='full', or more stages."
        )
