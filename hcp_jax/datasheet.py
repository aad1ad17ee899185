"""What data sheets promise of each kind of GPU.

A table of its own, since the planner divides by it what a step should reach, and the trainer what
it did reach (MFU). Plain numbers, without jax.
"""

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
"""FLOP/s of dense bfloat16 products at boost clock, by `jax.Device.device_kind`."""

GPU_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(kind.split()[1].split("-")[0].lower() for kind in PEAK_FLOPS)
)
"""Short names of these GPUs, such as "h200", as `--gpu` takes them."""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of dense bfloat16 products by data sheet; None for a device whose sheet is not here.

    Args:
        device_kind: `jax.Device.device_kind`, taken to the letter: a PCIe card is not an SXM one.

    >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    return PEAK_FLOPS.get(device_kind)
