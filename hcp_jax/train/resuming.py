"""Decide which settings a resumed run may change, and report the changes.

Each field of the config declares its kind (`hcp_jax/base/settings.py`). A change of a fixed setting
is refused; a change of the numbers, or of the text, is refused without consent; other changes are
only reported.
"""

import dataclasses
from typing import Any

import numpy as np

from hcp_jax.base import settings
from hcp_jax.base.settings import CONSENT, Change
from hcp_jax.train.checkpoint.manager import Restored
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import fingerprint
from hcp_jax.train.optimizer import make_schedule
from hcp_jax.train.program import Program
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.step import TrainState, updates_made


@dataclasses.dataclass(frozen=True)
class Resumption:
    """A run that is resumed from a checkpoint.

    Attributes:
        config: the run's config from now on.
        files: the fingerprint of its text (`fingerprint.run_fingerprint`).
        accept: words of `CONSENT`.
    """

    config: TrainConfig
    files: dict[str, Any]
    accept: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for word in self.accept:
            if word not in CONSENT:
                raise ValueError(f"accept must be words of {', '.join(CONSENT)}, got {word!r}.")

    def require(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint that this run cannot be resumed from.

        Args:
            about: as in `Restored`.

        Raises:
            ValueError: if settings or text differ; says how, and which option accepts it.
        """
        found = self._changes(about)
        kept = [str(change) for change in found if change.kind == "fixed"]
        if kept:
            raise ValueError(
                f"a run keeps these settings: {'; '.join(kept)}. Resume with the run's own config, "
                "or begin a new run."
            )
        numbers = [str(change) for change in found if change.kind == "numbers"]
        if numbers and "numbers" not in self.accept:
            raise ValueError(
                f"these settings change what is computed: {'; '.join(numbers)}. Go on with them by "
                "--accept numbers, or resume with the run's own config."
            )
        files = fingerprint.changes(about["files"] or {}, self.files)
        if files and "data" not in self.accept:
            raise ValueError(
                f"the text is not what the run was trained on: {'; '.join(files)}. Go on with it "
                "by --accept data, or put the files back."
            )

    def describe(self, restored: Restored[TrainState]) -> list[str]:
        """Return lines for the log that list the changes.

        Args:
            restored: a checkpoint that `require` has accepted.
        """
        about = restored.about
        found = self._changes(about)
        lines = [
            f"going on with other settings, which change {what}: {'; '.join(map(str, changed))}"
            for kind, what in (
                ("numbers", "what is computed (accepted)"),
                ("free", "memory, speed or reports, or the length of the run"),
            )
            if (changed := [change for change in found if change.kind == kind])
        ]
        files = fingerprint.changes(about["files"] or {}, self.files)
        if files:
            lines.append(f"going on with other text (accepted): {'; '.join(files)}")
        lines += fingerprint.doubts(about["files"] or {}, self.files)
        rates = self._rates(about, int(updates_made(restored.state)))
        return lines + ([] if rates is None else [rates])

    def restore_data(self, program: Program, data: dict[str, Any]) -> list[str]:
        """Restore the state of the data; if their order changed and is accepted, start them anew.

        Returns:
            Lines for the log.

        Raises:
            ValueError: if the order of the data changed, and that is not accepted.
        """
        beginning = program.data_state()
        try:
            program.restore_data(data)
        except ValueError as error:
            if "data" not in self.accept:
                raise ValueError(f"{error} Start them anew by --accept data.") from None
            program.restore_data(beginning)
            return [f"the documents start anew, in their new order (accepted): {error}"]
        return []

    def _changes(self, about: dict[str, Any]) -> list[Change]:
        return [] if about["config"] is None else settings.changes(about["config"], self.config)

    def _rates(self, about: dict[str, Any], updates: int) -> str | None:
        """Return a line that says how the learning rate jumps; None if it does not."""
        before = about["config"]
        if before is None:
            return None
        known = {field.name for field in dataclasses.fields(OptimizerConfig)}
        settings_before = {k: v for k, v in before["optimizer"].items() if k in known}
        schedules = (
            make_schedule(OptimizerConfig(**settings_before), before["steps"]),
            make_schedule(self.config.optimizer, self.config.steps),
        )
        old, new = (float(schedule(updates)) for schedule in schedules)
        if np.isclose(old, new, rtol=1e-6, atol=0):
            return None
        return (
            f"learning rate at step {about['step']}: {new:.3g} from here on, before "
            f"{old:.3g} (its steps were {before['steps']} and are {self.config.steps}). With "
            "optimizer.schedule constant or wsd, more steps leave the rate as it is."
        )
