"""Steps that were skipped because their loss or gradient was not finite: told, counted, bounded.

The step itself leaves the state alone (`apply_gradients`); here the loop learns of it, one step
late, without having waited for the devices.
"""

import math
from collections.abc import Callable, Mapping, Sequence


class SkippedSteps:
    """Counts skipped steps, tells each, and stops training after too many in a row.

    Args:
        limit: steps in a row after which training stops.
        tell: prints a line.
    """

    def __init__(self, limit: int, tell: Callable[[str], None]):
        self._limit, self._tell = limit, tell
        self._in_row = self.total = 0

    def note(
        self,
        step: int,
        values: Mapping[str, float],
        documents: Sequence[int],
        checkpoint: int | None,
    ) -> None:
        """Takes in the metrics of a step.

        Args:
            step: its number.
            values: as `apply_gradients` gives them.
            documents: those that the step had tokens of.
            checkpoint: the step of the last checkpoint, for the message.

        Raises:
            FloatingPointError: after `limit` skipped steps in a row; says what to look at.
        """
        if not values["skipped"]:
            self._in_row = 0
            return
        self._in_row += 1
        self.total += 1
        what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self._tell(
            f"step {step} skipped: {what} ({self._in_row} in a row, {self.total} in all); "
            f"{_of_documents(documents)}"
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
            "loss is" if not math.isfinite(values["loss"]) else "loss is finite but its gradient is"
        )
        raise FloatingPointError(
            f"{steps} skipped, as many in a row as optimizer.max_skipped allows. In the last, the "
            f"{at_fault} not finite ({what}; {_of_documents(documents)}). Look at the documents of "
            "these steps; a lower optimizer.learning_rate, more warmup_steps or a lower clip_norm "
            f"may help. {saved}; the parameters have not changed since step {first}."
        )


def _of_documents(documents: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, documents[:most]))
    return f"documents {shown}" + (f" and {len(documents) - most} more" * (len(documents) > most))
