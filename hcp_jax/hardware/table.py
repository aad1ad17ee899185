"""List the known GPUs and links in one table, each number with its source.

Cores, memory and clocks come from OpenXLA's target specifications. Peaks of matrix products and of
links come from the vendor's data sheets. The speed that kernels and collectives reach is a `Rate`,
which says whether it was measured or modelled. A GPU that is not here can be described in a YAML
file: see `custom.py`. To add a GPU to the library, add it here, and its peak to `PEAK_FLOPS`.

Plain Python without jax and NumPy, so that a plan can be made on any machine.
"""

import dataclasses
import difflib
import pathlib

from hcp_jax.hardware.custom import read_gpu
from hcp_jax.hardware.gpu import GPU, Direction, Rate, infiniband, modelled_share, nvlink

_SHEET = "vendor's data sheet"
_KERNELS = "H100 SXM, 16k tokens, causal, head size 128: tokamax's committed autotuning times"

PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA L40S": 362e12,
}
"""Data sheets' FLOP/s of dense bfloat16 products at boost clock, by `jax.Device.device_kind`."""

# FLOP/s of public kernels of the same kind; "blockwise" has the rate of XLA's dense attention.
_H100_ATTENTION: dict[tuple[str, Direction], float] = {
    ("triton", "forward"): 361e12,
    ("triton", "backward"): 338e12,
    ("mosaic", "forward"): 636e12,
    ("mosaic", "backward"): 452e12,
    ("blockwise", "forward"): 37e12,
    ("blockwise", "backward"): 36e12,
}
_H100_PEAK = PEAK_FLOPS["NVIDIA H100 80GB HBM3"]
_A100_PEAK = PEAK_FLOPS["NVIDIA A100-SXM4-80GB"]
_B200_PEAK, _GB200_PEAK = PEAK_FLOPS["NVIDIA B200"], PEAK_FLOPS["NVIDIA GB200"]


def _attention(peak: float, measured: bool = False) -> dict[tuple[str, Direction], Rate]:
    """Return the rates of the H100's kernels, scaled to the peak of another GPU."""
    if measured:
        return {
            key: Rate(value, key[0] != "blockwise", f"{_KERNELS} ({key[0]})")
            for key, value in _H100_ATTENTION.items()
        }
    source = "modelled: the share of its peak that the H100 reaches"
    return {
        key: Rate(value / _H100_PEAK * peak, False, source)
        for key, value in _H100_ATTENTION.items()
    }


_H100 = GPU(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    core_count=132,
    fpus_per_core=128,
    memory_bytes=84_942_979_072,
    memory_bandwidth=3_352_320_000_000,
    l2_bytes=52_428_800,
    clock_ghz=1.98,
    shared_bytes_per_core=233_472,
    shared_bytes_per_block=232_448,
    peak_flops=_H100_PEAK,
    nvlink=nvlink("NVLink 4", 450e9),
    network=infiniband("InfiniBand NDR", 50e9),
    product_rate=modelled_share(_H100_PEAK, 0.7, "the data sheet"),
    attention_rates=_attention(_H100_PEAK, measured=True),
    sources={"peak_flops": _SHEET, "nvlink": _SHEET, "network": _SHEET},
)
_H200 = dataclasses.replace(
    _H100,
    name="h200",
    device_kind="NVIDIA H200",
    memory_bytes=151_397_597_184,
    memory_bandwidth=4_800_000_000_000,
    product_rate=Rate(790e12, True, "H200: bfloat16 products of large matrices"),
    attention_rates=_attention(_H100_PEAK),
)
_A100 = GPU(
    name="a100",
    device_kind="NVIDIA A100-SXM4-80GB",
    compute_capability=(8, 0),
    core_count=108,
    fpus_per_core=64,
    memory_bytes=85_100_068_864,
    memory_bandwidth=2_039_040_000_000,
    l2_bytes=41_943_040,
    clock_ghz=1.41,
    shared_bytes_per_core=167_936,
    shared_bytes_per_block=166_912,
    peak_flops=_A100_PEAK,
    nvlink=nvlink("NVLink 3", 300e9),
    network=infiniband("InfiniBand HDR", 25e9),
    product_rate=modelled_share(_A100_PEAK, 0.7, "the data sheet"),
    attention_rates=_attention(_A100_PEAK),
    sources=_H100.sources,
)
_B200 = dataclasses.replace(
    _H100,
    name="b200",
    device_kind="NVIDIA B200",
    compute_capability=(10, 0),
    core_count=148,
    memory_bytes=191_514_411_008,
    memory_bandwidth=7_672_320_000_000,
    l2_bytes=132_644_864,
    clock_ghz=1.965,
    peak_flops=_B200_PEAK,
    nvlink=nvlink("NVLink 5", 900e9),
    product_rate=modelled_share(_B200_PEAK, 0.7, "the data sheet"),
    attention_rates=_attention(_B200_PEAK),
)
_GB200 = dataclasses.replace(
    _B200,
    name="gb200",
    device_kind="NVIDIA GB200",
    core_count=152,
    memory_bytes=197_897_748_480,
    memory_bandwidth=7_928_064_000_000,
    l2_bytes=135_528_448,
    clock_ghz=2.062,
    peak_flops=_GB200_PEAK,
    product_rate=modelled_share(_GB200_PEAK, 0.7, "the data sheet"),
    attention_rates=_attention(_GB200_PEAK),
    nvlink_domain=72,
    sources=_H100.sources | {"nvlink_domain": "NVL72 data sheet"},
)
_A800 = dataclasses.replace(
    _A100,
    name="a800",
    device_kind="NVIDIA A800-SXM4-80GB",
    nvlink=nvlink("NVLink 3, 400 GB/s both ways", 200e9),
)

GPU_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(kind.split()[1].split("-")[0].lower() for kind in PEAK_FLOPS)
)
"""Short names of all GPUs with a known peak, such as "h20"; only some of them are in `GPUS`."""

GPUS: dict[str, GPU] = {g.name: g for g in (_A100, _A800, _H100, _H200, _B200, _GB200)}
"""GPUs by short name."""


def gpu(name: str) -> GPU:
    """Return a GPU.

    Args:
        name: a short name ("h200"), a `jax.Device.device_kind` ("NVIDIA H100 80GB HBM3"), or the
            path of a YAML file that describes another GPU (see `custom.py`). Case is ignored.

    Raises:
        ValueError: if the name is unknown (the error suggests the nearest one), if only the peak of
            this GPU is known, or if the file is invalid.

    >>> gpu("h200") is gpu("NVIDIA H200")
    True
    """
    by_name = {key.lower(): g for g in GPUS.values() for key in (g.name, g.device_kind)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_gpu(path, GPUS)
    describe = (
        f"there are {', '.join(GPUS)}. Describe another one in a YAML file (name, like: <one of "
        "these>, and what differs) and pass its path."
    )
    if name.lower() in {kind.lower() for kind in PEAK_FLOPS}:
        raise ValueError(f"of GPU {name!r} only the peak FLOP/s are known: {describe}")
    near = difflib.get_close_matches(name.lower(), by_name, 1)
    found = by_name[near[0]] if near else None
    hint = ""
    if found is not None:
        hint = f"did you mean {(found.name if near[0] == found.name else found.device_kind)!r}? "
    raise ValueError(f"unknown GPU {name!r}: {hint}{describe}")


def peak_flops(device_kind: str) -> float | None:
    """Return the data sheet's FLOP/s of dense bfloat16 products; None for an unknown device.

    Args:
        device_kind: exact value of `jax.Device.device_kind`; a PCIe card differs from an SXM one.

    >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    return PEAK_FLOPS.get(device_kind)
