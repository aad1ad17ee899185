"""Targets for compiling GPU programs on a machine without a GPU, as text protos.

The facts are those of OpenXLA's own target specifications.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus_per_core: int
    bandwidth: int
    memory: int
    l2: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory: int  # per block, opted in

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}" + "a" * self.accelerated

    @property
    def proto(self) -> str:
        major, minor = self.capability
        features = "feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory}
  threads_per_core_limit: 2048 core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "{self.name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


TARGETS = {
    "A100": Target(
        "NVIDIA A100-SXM4-80GB",
        *((8, 0), False, 108, 64, 2_039_040_000_000, 85_100_068_864, 41_943_040, 1.41),
        *(167_936, 166_912),
    ),
    "H100": Target(
        "NVIDIA H100 80GB HBM3",
        *((9, 0), True, 132, 128, 3_352_320_000_000, 84_942_979_072, 52_428_800, 1.98),
        *(233_472, 232_448),
    ),
    "H200": Target(
        "NVIDIA H200 141GB HBM3e",
        *((9, 0), True, 132, 128, 4_800_000_000_000, 151_397_597_184, 52_428_800, 1.98),
        *(233_472, 232_448),
    ),
    "B200": Target(
        "NVIDIA B200",
        *((10, 0), True, 148, 128, 7_672_320_000_000, 191_514_411_008, 132_644_864, 1.965),
        *(233_472, 232_448),
    ),
}
