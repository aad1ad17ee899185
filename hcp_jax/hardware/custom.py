"""Read a GPU that is not in the table from a YAML file that lists its differences from a known GPU.

    name: h20                 # hcp plan --gpu h20.yaml --hosts 4 --gpus-per-host 8
    like: h100
    core_count: 78
    memory_bytes: 102_005_473_280
    peak_flops: 148.0e12
    network: {peak: 50.0e9}   # bytes/s of one GPU's card; name and latency may be given, too
    sources: {peak_flops: "vendor's data sheet"}

A rate that is not given is the same share of the peak as on the GPU named by `like`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from hcp_jax.base import reading
from hcp_jax.hardware.gpu import GPU, Link, Rate, infiniband, nvlink

_LINKS = {"nvlink": nvlink, "network": infiniband}
_TEXTS = ("name", "device_kind")
_MAY_BE_ZERO = ("nvlink_domain", "latency")


def read_gpu(path: pathlib.Path, table: Mapping[str, GPU]) -> GPU:
    """Return the GPU described by a YAML file.

    Args:
        path: the file.
        table: GPUs by short name, for the field `like` (h100 if the file has none).

    Raises:
        ValueError: if the file cannot be read, or a field is unknown, missing or wrong.
    """
    fields = _fields(path)
    like = str(fields.pop("like", "h100"))
    if like not in table:
        raise ValueError(f"{path}: `like` must be one of {', '.join(table)}, got {like!r}.")
    base = table[like]
    known = {field.name for field in dataclasses.fields(GPU)} - {"attention_rates"}
    unknown = sorted(str(name) for name in set(fields) - known)
    if unknown or "name" not in fields:
        problem = f"unknown fields {unknown}" if unknown else "no field `name`"
        raise ValueError(f"{path} has {problem}; there are {', '.join(sorted(known))}.")
    changes = {
        name: _value(path, name, value, getattr(base, name)) for name, value in fields.items()
    }
    scale = changes.get("peak_flops", base.peak_flops) / base.peak_flops
    source = f"modelled: {base.name}'s share of its peak"
    changes.setdefault("product_rate", Rate(base.product_rate.value * scale, False, source))
    rates = {k: Rate(rate.value * scale, False, source) for k, rate in base.attention_rates.items()}
    return dataclasses.replace(base, attention_rates=rates, **changes)


def _fields(path: pathlib.Path) -> dict[Any, Any]:
    try:
        fields = reading.read_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the GPU's description: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold the fields of a GPU, one `name: value` a line.")
    return fields


def _value(path: pathlib.Path, name: str, value: Any, like: Any) -> Any:
    """Check a field and return it in the type of the same field of the GPU `like`."""
    if name in _LINKS:
        return _link(path, name, value)
    if name in _TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name} must be a text, got {value!r}.")
        return value
    if name == "sources":
        if not isinstance(value, dict):
            raise ValueError(f"{path}: sources must map fields to texts, got {value!r}.")
        return {str(k): str(v) for k, v in value.items()}
    if name == "compute_capability":
        return _capability(path, value)
    number = _number(path, name, value)
    if name == "product_rate":
        return Rate(number, True, str(path))
    if isinstance(like, int) and number != int(number):
        raise ValueError(f"{path}: {name} must be a whole number, got {value!r}.")
    return type(like)(number)


def _capability(path: pathlib.Path, value: Any) -> tuple[int, int]:
    parts = value if isinstance(value, list) else str(value).split(".")
    if len(parts) != 2 or not all(str(part).isdecimal() for part in parts):
        raise ValueError(
            f"{path}: compute_capability must be a major and a minor number, such as 9.0, "
            f"got {value!r}."
        )
    return int(parts[0]), int(parts[1])


def _link(path: pathlib.Path, name: str, fields: Any) -> Link:
    if not isinstance(fields, dict) or not {"peak"} <= set(fields) <= {"name", "peak", "latency"}:
        raise ValueError(f"{path}: {name} needs peak (bytes/s), and may have name and latency.")
    link = _LINKS[name](str(fields.get("name", name)), _number(path, "peak", fields["peak"]))
    if "latency" not in fields:
        return link
    return dataclasses.replace(link, latency=_number(path, "latency", fields["latency"]))


def _number(path: pathlib.Path, name: str, value: Any) -> float:
    try:
        # YAML reads 25e9 as a string, because it has no decimal point.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and name not in _MAY_BE_ZERO):
        raise ValueError(f"{path}: {name} must be a number greater than 0, got {value!r}.")
    return number
