"""Show the progress of a run: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping

import rich.console
import rich.progress


class Progress:
    """Shows steps as they are done.

    Args:
        console: where to show them.
        steps: number of steps of the whole run.
        start: steps that were done before this part of the run.
        every: steps between two lines if the console is not a terminal.

    Attributes:
        seconds: total time of the steps shown so far.
        left: seconds that the remaining steps will take, at the mean speed so far.
    """

    def __init__(self, console: rich.console.Console, steps: int, start: int, every: int):
        self._console, self._steps, self._start, self._every = console, steps, start, every
        # A dumb terminal cannot move its cursor: rich would show nothing there.
        can_draw = console.is_terminal and not console.is_dumb_terminal
        self._bar = _bar(console) if can_draw else None
        self.seconds = self.left = self._tokens = self._mfu = 0.0

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self._steps, completed=self._start, loss="-", speed="-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step as done; speed and MFU are means over all steps so far.

        Args:
            step: its number, from 0.
            values: its "loss", "learning_rate", "tokens", "seconds", and "mfu" if known.
        """
        done = step + 1 - self._start
        self.seconds += values["seconds"]
        self._tokens += values["tokens"]
        self.left = self.seconds / done * (self._steps - step - 1)
        speed = f"{self._tokens / self.seconds:,.0f} tokens/s"
        if "mfu" in values:
            self._mfu += values["mfu"] * values["seconds"]
            speed += f"  MFU {self._mfu / self.seconds:.1%}"
        if self._bar is not None:
            loss = f"{values['loss']:.3f}"
            self._bar.update(self._bar.task_ids[0], completed=step + 1, loss=loss, speed=speed)
        elif step % self._every == 0 or step + 1 == self._steps:
            self._console.print(
                f"step {step:>{len(str(self._steps))}}  loss {values['loss']:.4f}  "
                f"learning rate {values['learning_rate']:.2e}  {speed}  {_clock(self.left)} left",
                markup=False,
            )


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]}", style="bold"),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(compact=True),
        rich.progress.TextColumn("left"),
        console=console,
        expand=True,
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
