"""Import a package's public names when they are first used."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, home: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: name of the package, its `__name__`.
        home: the module of each public name; the module of a name that is a module itself.

    >>> found, names, _ = lazy_names("hcp_jax.base", {"SHOWN": "hcp_jax.base.terminal"})
    >>> found("SHOWN"), names()
    (200, ['SHOWN'])
    """
    public = sorted(home)

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home[name])
        return module if home[name] == f"{package}.{name}" else getattr(module, name)

    return find, lambda: public, public
