"""Draw lengths from distributions that are written as one word on a command line.

lognormal:mean=1024,sigma=1.5,min=128,max=8192
lognormal:mean_before=1024,sigma=1.5,min=128,max=8192
uniform:min=128,max=8192
mix:0.90@2048,0.09@32768,0.01@262144
a path to a CSV file: its column `length`, or its only column
a path to a folder that `hcp tokenize` made: tokens of each document (only offsets.npy is read)
"""

import csv
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from hcp_jax.base import reading
from hcp_jax.base.arguments import MOST_TOKENS, parse_length

MOST_SIGMA = 10.0
"""Largest sigma of a lognormal; with a larger one, nearly all lengths are min or max."""


def draw_lengths(spec: str, count: int, seed: int) -> np.ndarray:
    """Draw `count` lengths from the distribution `spec`; the same seed gives the same lengths.

    From a file or a folder, `count` of its lengths are drawn without repetition (all of them if it
    has fewer).

    The lengths of a lognormal are clipped to [min, max]. `mean` is the mean *after* clipping, which
    can be checked on the data; `mean_before` in its place is the mean before clipping, as other
    systems' benchmarks give it (mu = ln(mean) - sigma² / 2). sigma is that of the logarithm before
    clipping.

    Raises:
        ValueError: if `spec` is not a distribution, or the file contains no lengths.
    """
    if count < 1:
        raise ValueError(f"the number of documents must be >= 1, got {count}.")
    rng = np.random.default_rng(seed)
    kind, _, rest = spec.partition(":")
    if kind == "mix":
        return _mix(rest, count, rng)
    if kind in ("lognormal", "uniform"):
        values = _values(kind, rest)
        if not 1 <= values["min"] <= values["max"] <= MOST_TOKENS:
            raise ValueError(f"{spec!r} needs 1 <= min <= max <= {MOST_TOKENS}.")
        low, high = values["min"], values["max"]
        if kind == "uniform":
            return rng.integers(int(low), int(high) + 1, count)
        sigma = values["sigma"]
        if "mean_before" in values:
            _check_lognormal(values["mean_before"], sigma, low, high)
            mu = math.log(values["mean_before"]) - sigma**2 / 2
        else:
            mu = _location(values["mean"], sigma, low, high)
        return np.rint(np.clip(rng.lognormal(mu, values["sigma"], count), low, high)).astype(int)
    return _from_file(Path(spec), count, rng)


def mean_length(spec: str) -> float:
    """Estimate the mean of `spec` from 200,000 lengths (from a file: all, if there are fewer)."""
    return float(np.mean(draw_lengths(spec, 200_000, 0)))


_NEEDED = {"lognormal": ("mean", "sigma", "min", "max"), "uniform": ("min", "max")}


def _values(kind: str, words: str) -> dict[str, float]:
    values = {}
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        try:
            # Lengths may be written 128K; sigma is a plain number.
            tokens = parse_length(value)
            values[name] = float(value) if tokens is None else float(tokens)
        except ValueError:
            raise ValueError(f"{kind}: {word!r} is not name=number.") from None
        if not math.isfinite(values[name]):
            raise ValueError(f"{kind}: {word!r} is not a finite number.")
    needed = _NEEDED[kind]
    if set(values) not in (set(needed), {"mean_before", *needed} - {"mean"}):
        example = ",".join(f"{name}=…" for name in needed)
        raise ValueError(f"{kind}:{words} must be written {kind}:{example}.")
    return values


def _mix(words: str, count: int, rng: np.random.Generator) -> np.ndarray:
    try:
        parts = [word.split("@") for word in words.split(",")]
        shares = np.array([float(share) for share, _ in parts])
        sizes = np.array([_tokens(size) for _, size in parts])
    except ValueError:
        raise ValueError(f"mix:{words} must be written mix:share@length,share@length,…") from None
    if np.any(shares < 0) or not math.isclose(shares.sum(), 1.0, abs_tol=1e-6) or sizes.min() < 1:
        raise ValueError(f"mix:{words} needs shares that add up to 1, and lengths >= 1.")
    return rng.choice(sizes, count, p=shares / shares.sum())


def _tokens(text: str) -> int:
    tokens = parse_length(text)
    if tokens is None or tokens > MOST_TOKENS:
        raise ValueError(text)
    return tokens


def _from_file(path: Path, count: int, rng: np.random.Generator) -> np.ndarray:
    if path.is_dir():
        lengths = _from_offsets(path / "offsets.npy")
    elif path.is_file():
        lengths = _from_csv(path)
    else:
        raise ValueError(
            f"{str(path)!r} is neither a file, nor a folder, nor one of lognormal:…, uniform:… and "
            "mix:…."
        )
    if not lengths.size:
        raise ValueError(f"{path} holds no lengths.")
    return rng.permutation(lengths)[:count]


def _from_offsets(path: Path) -> np.ndarray:
    """Return the tokens that each document has in training: one more than it has itself."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no offsets.npy; hcp tokenize makes folders that have.")
    return np.diff(np.load(path, mmap_mode="r")) + 1


def _from_csv(path: Path) -> np.ndarray:
    try:
        rows = [row for row in csv.reader(reading.read_text(path).splitlines()) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}.") from None
    column = 0
    if rows and not rows[0][0].strip().isdigit():
        head = [name.strip() for name in rows.pop(0)]
        if len(head) > 1 and "length" not in head:
            raise ValueError(f"{path} has columns {head}; call the one with lengths 'length'.")
        column = head.index("length") if "length" in head else 0
    try:
        return np.array([int(row[column]) for row in rows], np.int64)
    except (ValueError, IndexError):
        raise ValueError(f"{path} must hold one integer length per row.") from None


def _location(mean: float, sigma: float, low: float, high: float) -> float:
    """Return mu of the lognormal whose mean is `mean` after clipping to [low, high]."""
    _check_lognormal(mean, sigma, low, high)
    normal = NormalDist()

    def clipped_mean(mu: float) -> float:
        a, b = (math.log(low) - mu) / sigma, (math.log(high) - mu) / sigma
        middle = math.exp(mu + sigma**2 / 2) * (normal.cdf(b - sigma) - normal.cdf(a - sigma))
        return low * normal.cdf(a) + middle + high * (1 - normal.cdf(b))

    left, right = math.log(low) - 10 * sigma, math.log(high) + 10 * sigma
    for _ in range(200):
        mid = (left + right) / 2
        left, right = (mid, right) if clipped_mean(mid) < mean else (left, mid)
    return (left + right) / 2


def _check_lognormal(mean: float, sigma: float, low: float, high: float) -> None:
    if not low < mean < high or not 0 < sigma <= MOST_SIGMA:
        raise ValueError(
            f"lognormal needs min < mean < max and 0 < sigma <= {MOST_SIGMA:g}, got mean={mean:g} "
            f"and sigma={sigma:g}."
        )
