"""Find the configs that come with the package, so that `hcp train quickstart` works anywhere."""

import os
import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """Return the folder of the configs: inside the installed package, or that of a checkout."""
    installed = _PACKAGE / "configs"  # setup.py copies them into wheels
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of the configs, such as "quickstart"."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(config: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a config: a file, or the name of one that comes with the package.

    Args:
        config: a path; or, where no such file exists, a name without folder and suffix.

    Raises:
        FileNotFoundError: if there is neither; names the configs that there are.

    >>> find("quickstart").name
    'quickstart.yaml'
    """
    path = pathlib.Path(config)
    if path.exists():
        return path
    if str(config) in names():
        return folder() / f"{config}.yaml"
    raise FileNotFoundError(
        f"there is no config {str(config)!r}. Give a YAML file, or one of those that come with "
        f"hcp_jax: {', '.join(names())}."
    )
