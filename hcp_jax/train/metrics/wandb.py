"""Send the numbers of a run to Weights & Biases, beside TensorBoard (`log.wandb`).

The package `wandb` is an extra. It sends in a process of its own, so a network that is slow or down
does not hold up training; WANDB_MODE=offline only writes files, for `wandb sync`.
"""

import importlib
import importlib.util
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any


def require_installed(project: str | None) -> None:
    """Refuse a project if the package is missing; call it before the run begins.

    Raises:
        ValueError: says how to install it.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={project!r} needs the package wandb: pip install 'hcp_jax[wandb]', or "
            "leave log.wandb out."
        )


class Wandb:
    """Writes numbers to a run of Weights & Biases that has the name of the run folder.

    Args:
        project: the project; it is created if there is none.
        folder: the run folder. wandb's own files go to `folder/wandb`, and the run's id to
            `folder/wandb-id`, so that a resumed run goes on in the same curves.
        config: every value of the config by its dotted key; shown beside the curves.

    Raises:
        ValueError: if wandb is missing or cannot start, because nobody is logged in, for example.
    """

    def __init__(self, project: str, folder: pathlib.Path, config: Mapping[str, Any]):
        require_installed(project)
        wandb: Any = importlib.import_module("wandb")
        known = folder / "wandb-id"
        run_id = known.read_text().strip() if known.exists() else secrets.token_hex(6)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=run_id,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),  # the run has its own log
            )
        except wandb.errors.Error as error:
            why = str(error).rstrip(".")
            raise ValueError(
                f"log.wandb={project!r}: wandb cannot start: {why}. Log in with `wandb login`, or "
                "set WANDB_MODE=offline."
            ) from error
        known.write_text(run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step; those of steps that it already has are ignored there."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()
