"""Name the folder of the user's caches."""

import pathlib


def cache_folder() -> pathlib.Path:
    """Return the folder in which this user's caches are kept; it may not exist yet."""
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_path("hcp_jax", appauthor=False))
