"""Which tiles a call gets."""

import pytest

from hcp_jax.kernels.tiles import describe, tiles_for


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA GB200", "B200"),
    ],
)
def test_a_known_device_kind_is_named(kind, named):
    assert describe(kind) == f"tiles for {named}"


def test_an_unknown_device_kind_gets_tiles_that_fit_any_and_says_so():
    """A10 is not A100 cut short."""
    assert tiles_for("NVIDIA A10", "bfloat16", 128, 128) == tiles_for(
        "NVIDIA A100-SXM4-80GB", "bfloat16", 128, 128
    )
    assert describe("NVIDIA A10").startswith("tiles that fit any GPU since Ampere ('NVIDIA A10'")


def test_the_greater_of_the_two_head_sizes_decides():
    assert tiles_for("NVIDIA H200", "bfloat16", 192, 128) == tiles_for(
        "NVIDIA H200", "bfloat16", 128, 192
    )
    assert tiles_for("NVIDIA H200", "bfloat16", 80, 80) == tiles_for(
        "NVIDIA H200", "bfloat16", 128, 128
    )
