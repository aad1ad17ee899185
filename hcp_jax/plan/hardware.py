"""GPUs, links and clusters as data, each number with the place it comes from.

What a GPU is (cores, memory, clock) is what OpenXLA's own target specifications say of it; what a
link carries is what the vendor's data sheet says; how fast kernels and collectives really run is a
`Rate`, measured by somebody or modelled by us, and says which. A GPU that is not here is described
in a YAML file, as what differs from one that is:

    name: h20                 # hcp plan --gpu h20.yaml --hosts 4 --gpus-per-host 8
    like: h100
    core_count: 78
    memory_bytes: 102_005_473_280
    peak_flops: 148.0e12
    sources: {peak_flops: "vendor's data sheet"}

Plain Python, without jax: a plan is made on any machine.
"""

import argparse
import dataclasses
import difflib
import math
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from hcp_jax import arguments
from hcp_jax.datasheet import PEAK_FLOPS

NO_LINK, INSIDE, BETWEEN = "no link", "inside a host", "between hosts"

_SPEC = "OpenXLA target specification"
_SHEET = "vendor's data sheet"
_KERNELS = "H100 SXM, 16k tokens, causal, head size 128: tokamax's committed autotuning times"


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast something runs in practice.

    Attributes:
        value: FLOP/s or bytes/s.
        measured: whether somebody measured it on this very kind of GPU.
        source: who and how; or how it was modelled.
    """

    value: float
    measured: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Link:
    """What the devices of a group talk over.

    Attributes:
        name: such as "NVLink 4" or "InfiniBand NDR".
        peak: bytes/s that one GPU can send, while it receives as many.
        rate: bytes/s that a large collective reaches.
        latency: seconds from the start of a collective to its first byte, launch included.
    """

    name: str
    peak: float
    rate: Rate
    latency: float


@dataclasses.dataclass(frozen=True, eq=False)
class GPU:
    """One kind of GPU.

    Attributes:
        name: short name: "h200".
        device_kind: what `jax.Device.device_kind` says.
        compute_capability: (major, minor).
        core_count: streaming multiprocessors.
        fpus_per_core: float32 lanes of each.
        memory_bytes: memory of the device.
        memory_bandwidth: bytes/s.
        l2_bytes: size of the L2 cache.
        clock_ghz: boost clock.
        shared_bytes_per_core: shared memory of a core.
        shared_bytes_per_block: the most that one block may ask for.
        peak_flops: dense bfloat16 products, by data sheet.
        nvlink: link to the GPUs of its NVLink domain.
        network: link to all others.
        matmul: large bfloat16 products in practice, FLOP/s.
        attention: FLOP/s of (implementation, "forward" or "backward"); FLOPs counted exactly.
        nvlink_domain: GPUs that NVLink joins; 0 means those of one host.
        sources: where a number comes from that is not from the target specification.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    clock_ghz: float
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    peak_flops: float
    nvlink: Link
    network: Link
    matmul: Rate
    attention: dict[tuple[str, str], Rate]
    nvlink_domain: int = 0
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def attention_rate(self, implementation: str, direction: str) -> Rate:
        """FLOP/s of an implementation of the core in one direction.

        Raises:
            ValueError: if there is no figure for it.
        """
        try:
            return self.attention[implementation, direction]
        except KeyError:
            known = sorted({name for name, _ in self.attention})
            raise ValueError(
                f"no rate of implementation {implementation!r} on {self.name}; "
                f"there are rates of {', '.join(known)}."
            ) from None


class Path(NamedTuple):
    """How a collective travels: kind of link, bytes/s that each device sends, seconds to start."""

    link: str
    rate: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts of equal GPUs."""

    gpu: GPU
    hosts: int
    gpus_per_host: int

    def __post_init__(self):
        for name in ("hosts", "gpus_per_host"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.hosts * self.gpus_per_host

    @property
    def domain(self) -> int:
        """GPUs that NVLink joins."""
        return self.gpu.nvlink_domain or self.gpus_per_host

    def path(self, kind: str, group: Sequence[int]) -> "Path":
        """What a collective of some devices runs over, and how fast.

        Where a group has several GPUs in each host, gathers and reductions cross hosts over all of
        their network cards at once; in a permute and an all-to-all, each GPU has its own alone.

        Args:
            kind: of the collective, in HLO's words.
            group: numbers of its devices, host by host.
        """
        members = Counter(device // self.domain for device in group)
        if len(group) < 2:
            return Path(NO_LINK, math.inf, 0.0)
        inside, network = self.gpu.nvlink, self.gpu.network
        if len(members) == 1:
            return Path(INSIDE, inside.rate.value, inside.latency)
        shared = kind not in ("collective-permute", "all-to-all", "ragged-all-to-all")
        cards = min(members.values()) if shared else 1
        return Path(BETWEEN, min(inside.rate.value, cards * network.rate.value), network.latency)

    def __str__(self) -> str:
        return f"{self.hosts} x {self.gpus_per_host} {self.gpu.name.upper()}"


def _share(peak: float, share: float, of: str) -> Rate:
    return Rate(peak * share, False, f"modelled: {share:.0%} of {of}")


def _nvlink(name: str, peak: float) -> Link:
    return Link(name, peak, _share(peak, 0.8, "the data sheet"), 10e-6)


def _infiniband(name: str, peak: float) -> Link:
    return Link(name, peak, _share(peak, 0.9, "the data sheet"), 25e-6)


# FLOP/s of public kernels of the same kind; XLA's dense attention stands for "blockwise".
_H100_ATTENTION = {
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


def _attention(peak: float, measured: bool = False) -> dict[tuple[str, str], Rate]:
    """The rates of the H100's kernels, or the same share of another GPU's peak."""
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
    nvlink=_nvlink("NVLink 4", 450e9),
    network=_infiniband("InfiniBand NDR", 50e9),
    matmul=_share(_H100_PEAK, 0.7, "the data sheet"),
    attention=_attention(_H100_PEAK, measured=True),
    sources={"peak_flops": _SHEET, "nvlink": _SHEET, "network": _SHEET},
)
_H200 = dataclasses.replace(
    _H100,
    name="h200",
    device_kind="NVIDIA H200",
    memory_bytes=151_397_597_184,
    memory_bandwidth=4_800_000_000_000,
    matmul=Rate(790e12, True, "H200: bfloat16 products of large matrices"),
    attention=_attention(_H100_PEAK),
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
    nvlink=_nvlink("NVLink 3", 300e9),
    network=_infiniband("InfiniBand HDR", 25e9),
    matmul=_share(_A100_PEAK, 0.7, "the data sheet"),
    attention=_attention(_A100_PEAK),
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
    nvlink=_nvlink("NVLink 5", 900e9),
    matmul=_share(_B200_PEAK, 0.7, "the data sheet"),
    attention=_attention(_B200_PEAK),
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
    matmul=_share(_GB200_PEAK, 0.7, "the data sheet"),
    attention=_attention(_GB200_PEAK),
    nvlink_domain=72,
    sources=_H100.sources | {"nvlink_domain": "NVL72 data sheet"},
)
_A800 = dataclasses.replace(
    _A100,
    name="a800",
    device_kind="NVIDIA A800-SXM4-80GB",
    nvlink=_nvlink("NVLink 3, 400 GB/s both ways", 200e9),
)

GPUS: dict[str, GPU] = {g.name: g for g in (_A100, _A800, _H100, _H200, _B200, _GB200)}


def gpu(name_or_file: str) -> GPU:
    """A GPU by its name, or by the YAML file that describes it (see the module's docstring).

    Raises:
        ValueError: if the name is not known and no such file exists, or the file is wrong.
    """
    if name_or_file.lower() in GPUS:
        return GPUS[name_or_file.lower()]
    path = pathlib.Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        return _described(path)
    near = difflib.get_close_matches(name_or_file.lower(), GPUS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown GPU {name_or_file!r}: {hint}there are {', '.join(GPUS)}. Describe another one in "
        "a YAML file (name, like: <one of these>, and what differs) and pass its path."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a cluster."""
    parser.add_argument(
        "--gpu",
        type=arguments.filled,
        required=True,
        help=f"one of {', '.join(GPUS)}, or a YAML file that describes another",
    )
    parser.add_argument(
        "--hosts", type=arguments.whole(most=2**15), required=True, help="number of hosts"
    )
    parser.add_argument(
        "--gpus-per-host",
        type=arguments.whole(most=2**10),
        default=8,
        help="GPUs in each (8)",
    )


def target_config(gpu: GPU) -> str:
    """The text proto by which XLA compiles for this GPU on a machine that has none."""
    major, minor = gpu.compute_capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {gpu.shared_bytes_per_core}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  core_count: {gpu.core_count}  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(gpu.memory_bandwidth)}  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  device_address_bits: 64  ecc_enabled: true
  platform_version: "Compute Capability {major}.{minor}{"a" if major >= 9 else ""}"
  pcie_bandwidth: 34359738368  name: "{gpu.device_kind}"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.device_kind}"
"""


_LINK_FIELDS = ("nvlink", "network")


def _described(path: pathlib.Path) -> GPU:
    import yaml

    try:
        told: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the GPU's description {path}: {error}") from None
    if not isinstance(told, dict) or told.get("like", "h100") not in GPUS:
        raise ValueError(f"{path} must give the fields of a GPU; `like` is one of {list(GPUS)}.")
    base = GPUS[told.pop("like", "h100")]
    fields = {field.name for field in dataclasses.fields(GPU)} - {"attention"}
    unknown = sorted(set(told) - fields)
    if unknown or "name" not in told:
        problem = f"unknown fields {unknown}" if unknown else "no field `name`"
        raise ValueError(f"{path} has {problem}; there are {', '.join(sorted(fields))}.")
    for name in _LINK_FIELDS:
        if name in told:
            told[name] = _described_link(path, name, told[name])
    for name in set(told) - {"name", "device_kind", "sources", *_LINK_FIELDS}:
        told[name] = _number(path, name, told[name], like=getattr(base, name))
    peak = told.get("peak_flops", base.peak_flops)
    scale = peak / base.peak_flops
    matmul = _share(base.matmul.value * scale, 1.0, f"{base.name}'s share of its peak")
    told["matmul"] = Rate(told["matmul"], True, str(path)) if "matmul" in told else matmul
    attention = {
        key: Rate(rate.value * scale, False, f"modelled: {base.name}'s share of its peak")
        for key, rate in base.attention.items()
    }
    return dataclasses.replace(base, attention=attention, **told)


def _described_link(path: pathlib.Path, name: str, told: Any) -> Link:
    if not isinstance(told, dict) or not {"peak"} <= set(told) <= {"name", "peak", "latency"}:
        raise ValueError(f"{path}: {name} needs peak (bytes/s), and may have name and latency.")
    make = _nvlink if name == "nvlink" else _infiniband
    link = make(str(told.get("name", name)), _number(path, name, told["peak"], like=1.0))
    return dataclasses.replace(link, latency=float(told.get("latency", link.latency)))


def _number(path: pathlib.Path, name: str, value: Any, like: Any) -> Any:
    if isinstance(like, tuple):
        parts = str(value).split(".") if not isinstance(value, list) else value
        return tuple(int(part) for part in parts)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{path}: {name} must be a number, got {value!r}.")
    return int(number) if isinstance(like, int) else number
