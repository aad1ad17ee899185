"""Refuse what pipelines do not compute; what the cut into stages needs is in `stages.py`."""

from jax.sharding import AxisType

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.recurrent_specs import Mamba2Spec
from hcp_jax.models.specs import AttentionSpec, MLPSpec
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.placement import Groups

_PARTS = {"embed_tokens", "layers", "norm", "lm_head"}
"""Parts of a model that a pipeline computes."""


def require_supported(model: ModelConfig, cp: ContextParallel, axis: str) -> None:
    """Check that a pipeline computes this model on this mesh, whatever its stages.

    Args:
        model: the model.
        cp: the context parallelism inside a stage.
        axis: the mesh axis of the stages.

    Raises:
        ValueError: if the mesh lacks the axis, or it has a role in `cp`.
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
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise NotImplementedError(
            "pipelines need a mesh whose axes are of type Auto (hcp.make_mesh makes one), got "
            f"{mesh.axis_types}."
        )
    if not isinstance(cp.comm_type, str):
        raise NotImplementedError(
            "all stages of a pipeline run one program, so all layers need one comm_type; got "
            f"{cp.comm_type}."
        )
    kinds = {
        type(part) for stack in model.plan.stacks for part in (stack.spec.mixer, stack.spec.ffn)
    }
    if unknown := sorted(kind.__name__ for kind in kinds - {AttentionSpec, Mamba2Spec, MLPSpec}):
        raise NotImplementedError(
            "pipelines support layers of attention or Mamba-2 and a dense MLP, but this model has "
            f"{', '.join(unknown)}: not proven inside stages yet."
        )
    if Mamba2Spec in kinds and isinstance(cp.placement, Groups):
        raise NotImplementedError(
            "pipelines with groups (widest_group) support layers of attention only, but this model "
            "has Mamba-2 layers; use streams (widest_group=None)."
        )
    if further := sorted(set(abstract_model(model)[1]) - _PARTS):
        raise NotImplementedError(
            f"pipelines have no place for the model's {', '.join(further)} (such as depths of "
            "multi-token prediction); train them without a pipeline."
        )
    if model.offload_activations:
        raise NotImplementedError(
            "offload_activations is not supported in a pipeline: stages keep little besides the "
            "inputs of their chunks. Use remat='full', or more stages."
        )
