"""What differs between the versions of JAX that the library supports (0.10.2 to 0.12).

It stands alone so that nothing else asks for a version: when the oldest one is dropped, this is the
file to shorten.
"""

import warnings


def expect_pallas_triton() -> None:
    """Silence JAX's notice that Pallas on Triton will go; that and no other warning.

    JAX 0.11 and later warn whenever such a kernel is *lowered*, which happens in the caller's
    `jit`, long after our code has returned. So the filter is set (again, if somebody has reset
    the filters) each time that a kernel is traced.
    """
    warnings.filterwarnings(
        "ignore",
        message="The Pallas Triton backend is deprecated",
        category=DeprecationWarning,
    )
