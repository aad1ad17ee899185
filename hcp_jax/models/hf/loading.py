"""Load weights of Hugging Face folders (safetensors) into parameters.

`slots.py` says which tensor is which parameter.

Each process reads only the parts that its devices hold, one tensor at a time: a tensor is put on
its devices, at its index among the layers, before the next one is opened. Nothing is unpickled.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families import FAMILIES
from hcp_jax.models.hf.model_folder import CONFIG, Stored, member, some, stored_tensors
from hcp_jax.models.hf.parts import Part
from hcp_jax.models.hf.slots import Slot, slots
from hcp_jax.models.transformer import abstract_model

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes that a stored tensor may have; each is exact in float32."""


def check(config: ModelConfig, folder: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of a folder, after checking that they are exactly those of the model.

    Raises:
        ValueError: as `stored_tensors`, or if a tensor is missing, has another shape or a dtype not
            in `DTYPES`, or does not belong to the model; names these tensors.
    """
    found = stored_tensors(folder)
    place = printable(folder)
    needed = {slot.name: slot for slot in slots(config, stored_family(folder))}
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"{place} lacks {some(missing)}{_why_missing(found, needed)}.")
    for name, slot in needed.items():
        stored = found[name]
        if stored.shape != slot.stored_shape:
            raise ValueError(
                f"{place}: {name} is {printable(list(stored.shape))} in "
                f"{printable(stored.file.name)}, and the model needs {list(slot.stored_shape)}."
            )
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{place}: {name} is stored as {stored.dtype}; only {', '.join(DTYPES)} can be "
                "read."
            )
    _require_first_rows(needed, found)
    others = [name for name in found if name not in needed and not _is_passed_over(name)]
    if config.tie_embeddings and "lm_head.weight" in others:
        _require_tied(folder, found)
        others.remove("lm_head.weight")
    if others:
        raise ValueError(f"{place} has tensors that the model has not: {some(others)}.")
    return {name: found[name] for name in needed}


def stored_family(folder: pathlib.Path) -> str | None:
    """Return the family that a folder's config.json names, whose names its tensors have.

    None if the folder has no config.json, or one of a family that is not supported.
    """
    if not reading.is_regular(folder / CONFIG):
        return None
    raw = reading.read_json(member(folder, CONFIG))
    family = raw.get("model_type") if isinstance(raw, dict) else None
    return family if isinstance(family, str) and family in FAMILIES else None


def load_params(config: ModelConfig, folder: pathlib.Path, shardings: Any = None) -> dict[str, Any]:
    """Load the parameters of a model in float32 onto their devices.

    This process reads only the parts of each tensor that its own devices hold, and keeps at most
    one tensor in the host's memory at a time.

    Args:
        config: the model.
        folder: a Hugging Face folder with weights of this model.
        shardings: a tree of `NamedSharding`s like the parameters; None for one device.

    Raises:
        ValueError: as `check`.
    """
    found = check(config, folder)
    shapes = abstract_model(config)[1]
    alone = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: alone, shapes) if shardings is None else shardings
    params = jax.tree.map(lambda x: x, shapes)
    for slot in slots(config, stored_family(folder)):
        parent: Any = functools.reduce(lambda tree, key: tree[key], slot.path[:-1], params)
        sharding = functools.reduce(lambda tree, key: tree[key], slot.path, shardings)
        key, stored = slot.path[-1], found[slot.name]
        if slot.layer is None:
            parent[key] = _placed(slot, stored, sharding)
            continue
        if not any(slot.at):
            parent[key] = _zeros(parent[key].shape, sharding)
        one = _placed(slot, stored, _part_sharding(sharding, len(slot.at)))
        # Wait, because until then the tensor is in the host's memory.
        parent[key] = jax.block_until_ready(_put_part(sharding)(parent[key], one, slot.at))
    return params


def read_slot(slot: Slot, stored: Stored) -> np.ndarray:
    """Read a tensor in the form of its parameter, in float32."""
    return _read(slot, stored, tuple(slice(None) for _ in slot.shape))


def _placed(slot: Slot, stored: Stored, sharding: Any) -> jax.Array:
    """Put a tensor on its devices."""
    read: dict[str, np.ndarray] = {}

    def device_part(index: Any) -> np.ndarray:
        # Devices that hold the same part share one host copy.
        if str(index) not in read:
            read[str(index)] = _read(slot, stored, index)
        return read[str(index)]

    return jax.make_array_from_callback(slot.shape, sharding, device_part)


def _read(slot: Slot, stored: Stored, index: tuple[slice, ...]) -> np.ndarray:
    """Read the part `index` of a tensor, in the form of its parameter."""
    if slot.part is not None:
        return _read_shared(slot, slot.part, stored)[index]
    k = slot.inputs
    # In a file heads and head size are one dim; only the outermost dim can be read in part.
    outermost = {0, k}
    read = [i if d in outermost else slice(None) for d, i in enumerate(index)]
    rest = tuple(slice(None) if d in outermost else i for d, i in enumerate(index))
    try:
        # Open the file for each tensor, so that at most one tensor of it stays mapped.
        with safe_open(stored.file, framework="numpy") as file:
            tensor = file.get_slice(slot.name)
            if k is None:
                return _finite(np.asarray(tensor[index], np.float32), slot.name, stored)
            outputs = _flat(read[k:], slot.shape[k:])
            part = tensor[outputs, _flat(read[:k], slot.shape[:k])].T if k else tensor[outputs]
    except SafetensorError as error:
        raise _unreadable(slot, stored, error) from None
    sizes = [len(range(*i.indices(n))) for i, n in zip(read, slot.shape, strict=True)]
    part = np.ascontiguousarray(part.reshape(sizes)[rest], np.float32)
    return _finite(part, slot.name, stored)


def _read_shared(slot: Slot, part: Part, stored: Stored) -> np.ndarray:
    """Read the whole parameter of a slot from the rows of a tensor that has others, too."""
    try:
        with safe_open(stored.file, framework="numpy") as file:
            rows = np.asarray(file.get_slice(slot.name)[part.rows], np.float32)
    except SafetensorError as error:
        raise _unreadable(slot, stored, error) from None
    values = np.ascontiguousarray(part.take(rows).reshape(slot.shape))
    return _finite(values, slot.name, stored)


def _unreadable(slot: Slot, stored: Stored, error: Exception) -> ValueError:
    return ValueError(f"{printable(stored.file)}: {slot.name} cannot be read ({printable(error)}).")


def _finite(values: np.ndarray, name: str, stored: Stored) -> np.ndarray:
    """Return the values if all are finite; a single NaN would make every loss NaN."""
    wrong = values.size - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise ValueError(
            f"{printable(stored.file)}: {name} has {wrong:,} values of {values.size:,} read that "
            "are NaN or infinite; the file was written by a run that had diverged, or is damaged."
        )
    return values


def _require_first_rows(needed: dict[str, Slot], found: dict[str, Stored]) -> None:
    """Read one row of each tensor, so that weights full of NaNs are refused before loading."""
    by_file = sorted((found[name].file, name) for name in needed)
    for file, entries in itertools.groupby(by_file, key=lambda pair: pair[0]):
        with safe_open(file, framework="numpy") as opened:
            for _, name in entries:
                row = opened.get_slice(name)[:1]
                _finite(np.asarray(row, np.float32), name, found[name])


def _why_missing(found: dict[str, Stored], needed: dict[str, Slot]) -> str:
    """Return the end of an error that says where tensors with such names come from."""
    if any(".lora_" in name or name.startswith("base_model.") for name in found):
        return "; it holds an adapter (LoRA): merge it into its base model first, and save that"
    for name in list(needed)[:20]:
        for other in found:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return (
                    f"; its tensors have {printable(prefix)!r} before their names, as a wrapper "
                    "or a larger model saves them: save the language model on its own"
                )
            if name.endswith(f".{other}"):
                return (
                    f"; its tensors lack {name.removesuffix(other)!r} before their names: it is "
                    "the base model without its head. Save it with AutoModelForCausalLM"
                )
    return f"; it has {some(found)}, named as in no family that is read here" if found else ""


def _flat(index: Sequence[slice], shape: Sequence[int]) -> slice:
    """Return the slice of several dims merged into one, of which only the outermost is cut."""
    begin, end, _ = index[0].indices(shape[0])
    inner = math.prod(shape[1:])
    return slice(begin * inner, end * inner)


def _zeros(shape: tuple[int, ...], sharding: Any) -> jax.Array:
    return jax.jit(functools.partial(jnp.zeros, shape, jnp.float32), out_shardings=sharding)()


def _part_sharding(sharding: Any, dims: int) -> Any:
    """Return the sharding of one index of the first dims."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[dims:])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


@functools.cache
def _put_part(sharding: Any) -> Any:
    """Return a jitted (parameter, one part, its index) -> parameter that updates in place."""

    def put(whole: Any, part: Any, index: tuple[Any, ...]) -> Any:
        start = [*index, *[0] * part.ndim]
        return jax.lax.dynamic_update_slice(
            whole, part.reshape(*[1] * len(index), *part.shape), start
        )

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _is_passed_over(name: str) -> bool:
    """Return whether a tensor holds frequencies, which old versions saved and the config gives."""
    return name.endswith("rotary_emb.inv_freq")


def _require_tied(folder: pathlib.Path, found: dict[str, Stored]) -> None:
    """Require that a stored output head equals the embedding if the embeddings are tied."""
    head, table = found["lm_head.weight"], found["model.embed_tokens.weight"]
    same = head.shape == table.shape
    with (
        safe_open(head.file, framework="numpy") as head_file,
        safe_open(table.file, framework="numpy") as table_file,
    ):
        a, b = (
            head_file.get_slice("lm_head.weight"),
            table_file.get_slice("model.embed_tokens.weight"),
        )
        for row in range(0, table.shape[0] if same else 0, 1024):
            rows = slice(row, min(row + 1024, table.shape[0]))
            same = same and np.array_equal(a[rows], b[rows])
    if not same:
        raise ValueError(
            f"{folder}: config.json says that embeddings are tied, but lm_head.weight is not "
            "model.embed_tokens.weight. Say tie_word_embeddings=false, or remove the tensor."
        )
