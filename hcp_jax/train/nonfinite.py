"""Report, count and limit steps that were skipped because a number was not finite.

The step itself leaves the state unchanged (`apply_gradients`); the loop learns of it one step late,
so that it does not wait for the devices.
"""

import math
from collections.abc import Callable, Mapping, Sequence


class SkippedSteps:
    """Counts skipped steps, reports each, and stops training after too many in a row.

    Args:
        limit: steps in a row after which training stops.
        tell: prints a line.

    Attributes:
        total: number of steps that were skipped.
    """

    def __init__(self, limit: int, tell: Callable[[str], None]):
        self._limit, self._tell = limit, tell
        self._in_row = self.total = 0
        self._unsaved = 0  # good steps since the last checkpoint
        self._told = -1

    def allow_saving(self, step: int, ends: bool, checkpoint: int | None) -> bool:
        """Return whether a checkpoint that is due may be written now; print a line if not.

        While steps are skipped, none may: each would hold the parameters of the last good step, and
        replace an older checkpoint. Only at the end of the run one is written, if good steps would
        be lost otherwise.

        Args:
            step: steps done, all of which have been noted.
            ends: whether the run ends here.
            checkpoint: the step of the last checkpoint.
        """
        first = step - self._in_row
        if self._in_row == 0 or (ends and self._unsaved):
            if self._in_row:
                self._tell(f"the checkpoint of step {step} has the parameters of step {first}")
            self._unsaved = 0
            return True
        if self._told != first:
            last = "there is none" if checkpoint is None else f"the last is of step {checkpoint}"
            self._tell(f"no checkpoint at step {step}, since steps are being skipped; {last}")
        self._told = first
        return False

    def note(
        self,
        step: int,
        values: Mapping[str, float],
        documents: Sequence[int],
        checkpoint: int | None,
    ) -> None:
        """Note the metrics of a step.

        Args:
            step: its number.
            values: the metrics of `apply_gradients`.
            documents: the numbers of the step's documents.
            checkpoint: the step of the last checkpoint, for the message.

        Raises:
            FloatingPointError: after `limit` skipped steps in a row; says what to check.
        """
        if not values["skipped"]:
            self._in_row = 0
            self._unsaved += 1
            return
        self._in_row += 1
        self.total += 1
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._tell(
            f"step {step} skipped: {what} ({self._in_row} in a row, {self.total} in all); "
            f"{_list_documents(documents)}"
        )
        if self._in_row < self._limit:
            return
        first = step - self._in_row + 1
        steps = f"steps {first} to {step} were" if first < step else f"step {step} was"
        saved = (
            "There is no checkpoint"
            if checkpoint is None
            else f"The last checkpoint is of step {checkpoint}"
        )
        at_fault = (
            "loss is"
            if not math.isfinite(values["loss"])
            else "loss is finite but its gradient is"
            if not math.isfinite(values["grad_norm"])
            else "loss and its gradient are finite but the parameters after the step would be"
        )
        raise FloatingPointError(
            f"{steps} skipped, as many in a row as optimizer.max_skipped allows. In the last, the "
            f"{at_fault} not finite ({what}; {_list_documents(documents)}). Look at the documents "
            "of these steps; a lower optimizer.learning_rate, more warmup_steps or a lower "
            f"clip_norm may help. {saved}; the parameters have not changed since step {first}."
        )


def _list_documents(documents: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, documents[:most]))
    return f"documents {shown}" + (f" and {len(documents) - most} more" * (len(documents) > most))
