"""What a run that goes on may change, and what it says of it.

The kinds of changes stand beside the fields of the config (`hcp_jax/base/settings.py`). What a run
keeps is refused with another value; what changes the numbers, or the text, is refused without
consent; the rest is told.
"""

import dataclasses
from typing import Any

import numpy as np

from hcp_jax.base import settings
from hcp_jax.base.settings import CONSENT, Change
from hcp_jax.train.checkpoint.manager import Restored
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import fingerprint
from hcp_jax.train.optimizer import OptimizerConfig, make_schedule
from hcp_jax.train.program import Program
from hcp_jax.train.step import TrainState, updates_made


@dataclasses.dataclass(frozen=True)
class GoingOn:
    """A run that goes on from a checkpoint.

    Attributes:
        config: the run, as it is to go on.
        files: the fingerprint of its text (`fingerprint.run_fingerprint`).
        accept: words of `CONSENT`.
    """

    config: TrainConfig
    files: dict[str, Any]
    accept: frozenset[str] = frozenset()

    def __post_init__(self):
        for word in self.accept:
            if word not in CONSENT:
                raise ValueError(f"accept must be words of {', '.join(CONSENT)}, got {word!r}.")

    def require(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint that this run cannot go on from.

        Args:
            about: as in `Restored`.

        Raises:
            ValueError: says what differs, and by which word to go on all the same.
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
        """Return what is to be told of the changes, in lines for a person.

        Args:
            restored: what `require` has let pass.
        """
        about = restored.about
        found = self._changes(about)
        lines = [
            f"going on with other settings, which change {what}: {'; '.join(map(str, of_kind))}"
            for kind, what in (
                ("numbers", "what is computed (accepted)"),
                ("free", "memory, speed or reports, or the length of the run"),
            )
            if (of_kind := [change for change in found if change.kind == kind])
        ]
        files = fingerprint.changes(about["files"] or {}, self.files)
        if files:
            lines.append(f"going on with other text (accepted): {'; '.join(files)}")
        lines += fingerprint.doubts(about["files"] or {}, self.files)
        rates = self._rates(about, int(updates_made(restored.state)))
        return lines + ([] if rates is None else [rates])

    def restore_data(self, program: Program, data: dict[str, Any]) -> list[str]:
        """Put the data where they stood; if they are others, and accepted, at their beginning.

        Returns:
            What is to be told of it, in lines for a person.

        Raises:
            ValueError: if the data have another order, and that is not accepted.
        """
        beginning = program.data_state()
        try:
            program.restore_data(data)
        except ValueError as error:
            if "data" not in self.accept:
                raise ValueError(f"{error} Begin them anew by --accept data.") from None
            program.restore_data(beginning)
            return [f"the documents begin anew, in their new order (accepted): {error}"]
        return []

    def _changes(self, about: dict[str, Any]) -> list[Change]:
        return [] if about["config"] is None else settings.changes(about["config"], self.config)

    def _rates(self, about: dict[str, Any], updates: int) -> str | None:
        """Say how the learning rate jumps; None if it does not."""
        before = about["config"]
        if before is None:
            return None
        known = {field.name for field in dataclasses.fields(OptimizerConfig)}
        of_before = {k: v for k, v in before["optimizer"].items() if k in known}
        schedules = (
            make_schedule(OptimizerConfig(**of_before), before["steps"]),
            make_schedule(self.config.optimizer, self.config.steps),
        )
        old, new = (float(schedule(updates)) for schedule in schedules)
        if np.isclose(old, new, rtol=1e-6, atol=0):
            return None
        return (
            f"learning rate at step {about['step']}: {new:.3g} from here on, where the run had "
            f"{old:.3g} (its steps were {before['steps']} and are {self.config.steps}). With "
            "optimizer.schedule constant or wsd, more steps leave the rate as it is."
        )
