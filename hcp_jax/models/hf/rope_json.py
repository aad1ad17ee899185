"""Read and write the rotary settings of a config.json."""

import math
from collections.abc import Sequence
from typing import Any

from hcp_jax.base.terminal import printable
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.layers.rope_scaling import RopeScaling

Rope = tuple[float, RopeScaling | None]
"""Base of the frequencies, and their scaling."""

THETA = 1.5, 1e15
"""Bounds of the base of the frequencies."""

_LEAST, _MOST = 1e-6, 1e6  # bounds of RoPE's factors


KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds of scaling that all families but Phi-3 have."""


def read(fields: Fields, default_theta: float = 10_000.0, kinds: Sequence[str] = KINDS) -> Rope:
    """Return the base of the frequencies and their scaling, from either form of config.json.

    Args:
        fields: the whole file.
        default_theta: base of the frequencies if the file has none.
        kinds: values of rope_type that the family has.
    """
    rope = fields.mapping("rope_scaling")
    if not rope.values:
        rope = fields.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise NotImplementedError(
            f"{fields.place}: rope_parameters={printable(repr(rope.values))} is not supported: the "
            f"rotation is one for all layers of model_type={fields.values.get('model_type')!r}."
        )
    theta = fields.number_or_none("rope_theta", *THETA) or default_theta
    return read_part(rope, fields, theta, kinds)


def read_share(fields: Fields, usual: float) -> float:
    """Return the share of each head that is rotated; `usual` if the file has none."""
    for part in (fields.mapping("rope_scaling"), fields.mapping("rope_parameters"), fields):
        share = part.number_or_none("partial_rotary_factor", 1e-6, 1)
        if share is not None:
            return share
    return usual


def require_whole_heads(part: Fields) -> None:
    """Refuse a partial rotation, which no supported family computes.

    Raises:
        NotImplementedError: if `part` has a partial_rotary_factor other than 1.
    """
    share = part.values.get("partial_rotary_factor")
    if share not in (None, 1):
        raise NotImplementedError(
            f"{part.place}: partial_rotary_factor={printable(repr(share))} is not supported: the "
            "supported families rotate whole heads."
        )


def read_part(
    rope: Fields, fields: Fields, default_theta: float, kinds: Sequence[str] = KINDS
) -> Rope:
    """Return the base and the scaling that one mapping describes.

    Args:
        rope: the mapping, such as rope_parameters.
        fields: the whole file.
        default_theta: base of the frequencies if the mapping has none.
        kinds: as in `read`.
    """
    longest = fields.whole_or_none("max_position_embeddings")
    theta = rope.number_or_none("rope_theta", *THETA) or default_theta
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in kinds:
        raise NotImplementedError(
            f"{fields.place}: rope_type={printable(repr(kind))} is not supported for "
            f"model_type={fields.values.get('model_type')!r}; supported are {', '.join(kinds)}."
        )
    if kind == "default":
        return theta, None
    return theta, _scaling(kind, rope, fields, longest)


def _scaling(kind: str, rope: Fields, fields: Fields, longest: int | None) -> RopeScaling:
    original = "original_max_position_embeddings"
    context = fields.whole_or_none(original) or rope.whole_or_none(original) or longest
    needed: dict[str, Any] = {"factor": rope.number_or_none("factor", 1, _MOST)}
    if kind != "linear":
        needed[original] = context
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            needed[name] = rope.number_or_none(name, _LEAST, _MOST)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            needed[name] = rope.numbers_or_none(name, _LEAST, _MOST)
    if kind in ("yarn", "longrope") and needed["factor"] is None and longest and context:
        needed["factor"] = longest / context
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{fields.place}: rope_type={kind!r} needs {', '.join(missing)}, too.")
    options: dict[str, Any] = dict(needed)
    if kind == "yarn":
        options |= {
            "beta_fast": rope.number_or_none("beta_fast", _LEAST, _MOST) or 32.0,
            "beta_slow": rope.number_or_none("beta_slow", _LEAST, _MOST) or 1.0,
            "attention_factor": _attention_factor(rope, options["factor"]),
            "truncate": rope.flag("truncate", True),
        }
    if kind == "longrope":
        options["attention_factor"] = rope.number_or_none("attention_factor", _LEAST, _MOST)
    return RopeScaling(kind, **options)  # type: ignore[arg-type]


def _attention_factor(rope: Fields, factor: float) -> float | None:
    """Return yarn's attention factor; None if it follows from the context factor alone."""
    given = rope.number_or_none("attention_factor", _LEAST, _MOST)
    if given is not None:
        return given
    one = rope.number_or_none("mscale", 0, _MOST)
    all_dims = rope.number_or_none("mscale_all_dim", 0, _MOST)
    if not (one and all_dims):
        return None
    growth = 0.1 * math.log(factor)
    return (one * growth + 1) / (all_dims * growth + 1)


def write(raw: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """Write RoPE's settings in the form that versions 4 and 5 of transformers both read."""
    for key in ("rope_parameters", "original_max_position_embeddings"):
        raw.pop(key, None)
    raw["rope_theta"], raw["rope_scaling"] = theta, None
    if scaling is None:
        return
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
        "longrope": ("attention_factor", "short_factor", "long_factor"),
    }[scaling.kind]
    values |= {name: getattr(scaling, name) for name in names}
    values = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
    raw["rope_scaling"] = {name: value for name, value in values.items() if value is not None}
