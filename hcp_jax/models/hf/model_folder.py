"""Find and check the files of a Hugging Face folder.

A folder is not trusted. Nothing outside it is read, nothing is unpickled, and only the headers of
weight files are read. If the folder is something else (an adapter, GGUF, a name of the Hub, a
cache), the error says what it is and what to do.
"""

import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"

_INDEX_BYTES = 2**26  # the index of a model of 100,000 tensors has about 10 MB

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_OTHERS = {
    ".gguf": "GGUF files, of llama.cpp, whose weights are mostly quantised",
    ".ggml": "GGML files, of llama.cpp",
    ".h5": "weights of TensorFlow",
    ".msgpack": "weights of Flax",
    ".onnx": "an ONNX graph",
    ".distcp": "a distributed checkpoint of PyTorch",
    ".nemo": "an archive of NeMo",
    ".npz": "arrays of NumPy",
}


class Stored(NamedTuple):
    """Tensor in a file: its location, dtype and shape."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


def require(folder: pathlib.Path) -> None:
    """Check, by the names of its files, that a folder is a Hugging Face folder.

    Raises:
        ValueError: if it is not; the error says what it is, and what to do.
    """
    text = printable(folder)
    try:
        there, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError):  # the name is too long or contains a NUL
        there = is_folder = False
    if is_folder:
        if not reading.is_regular(folder / CONFIG):
            raise ValueError(f"{text} is not a Hugging Face folder: {_what_else(folder)}")
        return
    if there:
        raise ValueError(f"{text} is a file; give the Hugging Face folder with its {CONFIG}.")
    hub = re.fullmatch(
        r"(?:https?:/+(?:huggingface\.co|hf\.co)/|hf:/+)?([\w.-]+/[\w.-]+?)/*", str(folder)
    )
    if hub and not folder.is_absolute() and not hub[1].startswith("."):
        name = hub[1].split("/")[1]
        raise ValueError(
            f"{text} is not a folder here. Weights are read from a local folder, and nothing is "
            f"downloaded. If it is a model of the Hugging Face Hub: hf download {hub[1]} "
            f"--local-dir {name} (pip install huggingface_hub), then give the folder {name}."
        )
    raise ValueError(
        f"{text} is not a Hugging Face folder: it has no {CONFIG}, because it does not exist."
    )


def member(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of a regular file of a folder; a link must point inside the folder.

    In the cache of the Hugging Face Hub, the files of `snapshots/REVISION` are links into `blobs`
    beside it; these are followed.

    Raises:
        ValueError: if there is no such file, or its name or link leads out of the folder.
    """
    shown = printable(name)
    if pathlib.PurePath(name).name != name or not reading.is_regular(folder / name):
        raise ValueError(f"{printable(folder)} has no file {shown!r}.")
    root = folder.resolve()
    target = (folder / name).resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise ValueError(
            f"{printable(folder / name)} is a link to {printable(target)}, outside of the folder, "
            "and is not followed; put the file itself there."
        )
    return folder / name


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Return all tensors of a folder by name; only the headers of its files are read.

    Raises:
        ValueError: if there are no safetensors (a pickle is never opened), a file is missing or
            damaged, or the index does not match the files.
    """
    if not reading.is_regular(folder / INDEX):
        if not reading.is_regular(folder / ONE_FILE):
            raise ValueError(_no_safetensors(folder))
        return _file_tensors(member(folder, ONE_FILE))
    index = member(folder, INDEX)
    placed = _read_index(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(placed.values())):
        if pathlib.PurePath(name).name != name or not reading.is_regular(folder / name):
            raise ValueError(
                f"{printable(index)} names the file {printable(name)!r}, which is not in "
                f"{printable(folder)}."
            )
        found |= _file_tensors(member(folder, name))
    for name, file in placed.items():
        if name not in found or found[name].file.name != file:
            raise ValueError(
                f"{printable(index)} says that {printable(name)} is in {printable(file)}, but it "
                "is not."
            )
    if reading.is_regular(folder / ONE_FILE) and ONE_FILE not in placed.values():
        raise ValueError(
            f"{printable(folder)} has two sets of weights: {ONE_FILE}, which transformers reads, "
            f"and {some(sorted(set(placed.values())))}, which {INDEX} names. Remove the one that "
            "is not meant (with the index, if it is that one)."
        )
    return found


def some(names: Iterable[str]) -> str:
    """Return the first names, each safe to print, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name, 100) for name in names[:3]) + more


def _read_index(index: pathlib.Path) -> dict[str, str]:
    try:
        held: Any = reading.read_json(index, _INDEX_BYTES)
    except ValueError as error:
        raise ValueError(f"{printable(index)} is not an index of tensors ({error})") from None
    placed = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(
            f"{printable(index)} is not an index of tensors: it needs a weight_map "
            "from tensor names to files."
        )
    return placed


def _file_tensors(file: pathlib.Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in slices.items()
            }
    # An OSError raised by safetensors has neither an error number nor a file name.
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{printable(file)} is damaged, or not whole ({printable(error)}); fetch it again."
        ) from None


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _what_else(folder: pathlib.Path) -> str:
    """Return the end of an error that says what a folder without a config.json is."""
    names = _names(folder)
    if "adapter_config.json" in names:
        return _ADAPTER
    if "snapshots" in names or any(name.startswith("models--") for name in names):
        return "it is a cache of the Hugging Face Hub; give the folder snapshots/REVISION inside."
    if "config.yaml" in names:
        return "it is a run of hcp train; hcp export writes one from it, --resume goes on with it."
    if "params.json" in names:
        return (
            "it has params.json, the original form of Meta's or Mistral's weights; take the "
            "folder in the form of transformers."
        )
    return f"it has no {CONFIG}{_holds(names)}."


def _holds(names: list[str]) -> str:
    """Return the end of a sentence that says what the files are, by their suffixes."""
    for suffix, what in _OTHERS.items():
        found = [name for name in names if name.lower().endswith(suffix)]
        if found:
            return f", and holds {what} ({some(found)}), which are not read here"
    return ""


_ADAPTER = (
    "it holds an adapter (LoRA), which is weights to add to a base model. Merge it into its base "
    "first, in transformers and peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
    ".save_pretrained(NEW_FOLDER)."
)


def _no_safetensors(folder: pathlib.Path) -> str:
    names, text = _names(folder), printable(folder)
    if "adapter_config.json" in names:
        return f"{text} has no weights of a model: {_ADAPTER}"
    safetensors = [name for name in names if name.endswith(".safetensors")]
    shards = [name for name in safetensors if re.search(r"-\d+-of-\d+\.safetensors$", name)]
    if shards:
        return (
            f"{text} has shards ({some(shards)}) without {INDEX}, which says what is in which; "
            "fetch it from where the shards came from."
        )
    if safetensors:
        return f"{text} has {some(safetensors)}, but neither {ONE_FILE} nor {INDEX}; rename it."
    pickles = [name for name in names if pathlib.PurePath(name).suffix in _PICKLES]
    if not pickles:
        return f"{text} has no weights: neither {ONE_FILE} nor {INDEX}{_holds(names)}."
    return (
        f"{text} has its weights in {some(pickles)} and none in safetensors. Such a file is a "
        "pickle: to open it is to run whatever code is in it, so it is never opened here. Where "
        "you trust it, write it anew with transformers: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
    )
