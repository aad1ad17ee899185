"""What is seen of a run while it runs: a bar on a terminal, plain lines anywhere else."""

import time
from collections.abc import Mapping

import rich.console
import rich.progress


class Progress:
    """Shows steps as they are done, and times them.

    Args:
        console: where to.
        steps: of the whole run.
        start: steps that were done before this part of the run.
        every: steps between two lines where the console is no terminal.
    """

    def __init__(self, console: rich.console.Console, steps: int, start: int, every: int):
        self._console, self._steps, self._start, self._every = console, steps, start, every
        self._tokens = 0.0
        self._bar = _bar(console) if console.is_terminal else None
        self._began = self._last = 0.0

    def __enter__(self) -> "Progress":
        self._began = self._last = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self._steps, completed=self._start, loss="-", speed="-")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the first step of this part began."""
        return self._last - self._began

    def show(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Shows a step as done.

        Args:
            step: its number, from 0.
            metrics: "loss", "learning_rate" and "tokens" among them.

        Returns:
            What it took: "seconds" and "tokens_per_second".
        """
        now = time.perf_counter()
        took, self._last = now - self._last, now
        done = step + 1 - self._start
        mean = self.seconds / done
        left = mean * (self._steps - step - 1)
        self._tokens += metrics["tokens"]
        speed = f"{self._tokens / self.seconds:,.0f} tokens/s"
        if self._bar is not None:
            loss = f"{metrics['loss']:.3f}"
            self._bar.update(self._bar.task_ids[0], completed=step + 1, loss=loss, speed=speed)
        elif step % self._every == 0 or step + 1 == self._steps:
            self._console.print(
                f"step {step:>{len(str(self._steps))}}  loss {metrics['loss']:.4f}  "
                f"learning rate {metrics['learning_rate']:.2e}  {speed}  {_clock(left)} left",
                markup=False,
            )
        return {"seconds": took, "tokens_per_second": metrics["tokens"] / took}


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
