"""Copy the configs into the package when it is built, so that wheels have them.

They stay in `configs/` of the repository, where people look for them; pyproject.toml has the rest.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package, with `configs/` in it."""

    def run(self) -> None:
        """Copy the configs besides the modules; an editable install reads them where they are."""
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib, "hcp_jax", "configs")
            shutil.copytree("configs", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
