"""Steps that were skipped because their loss or gradient was not finite: told, counted, bounded.

The step itself leaves the state alone (`apply_gradients`); here the loop learns of it, one step
late, without having waited for the devices.
"""

import math
from collections.abc import Callable, Mapping


class SkippedSteps:
    """Counts skipped steps, tells each, and stops training after too many in a row.

    Args:
        limit: steps in a row after which training stops.
        tell: prints a line.
    """

    def __init__(self, limit: int, tell: Callable[[str], None]):
        self._limit, self._tell = limit, tell
        self._in_row = self.total = 0

    def note(self, step: int, values: Mapping[str, float], checkpoint: int | None) -> None:
        """Takes in the metrics of a step.

        Args:
            step: its number.
            values: as `apply_gradients` gives them.
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
        self._tell(f"step {step} skipped: {what} ({self._in_row} in a row, {self.total} in all)")
        if self._in_row < self._limit:
            return
        first = step - self._in_row + 1
        since = f"steps {first} to {step} were" if first < step else f"step {step} was"
        saved = (
            "There is no checkpoint"
            if checkpoint is None
            else f"The last checkpoint is of step {checkpoint}"
        )
        cause = (
            "The loss itself is not finite: look at the documents of these steps and at the "
            "parameters that training began with"
            if not math.isfinite(values["loss"])
            else "The loss is finite, its gradient is not: look at the documents of these steps"
        )
        raise FloatingPointError(
            f"{since} skipped, as many in a row as optimizer.max_skipped allows ({what} in the "
            f"last). {cause}; a lower optimizer.learning_rate, more warmup_steps or a lower "
            f"clip_norm may help. {saved}; the parameters have not changed since step {first}."
        )
