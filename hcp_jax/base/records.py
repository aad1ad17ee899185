"""Read the record of a run, and say over how many steps its loss is averaged."""

import pathlib
from typing import Any

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable


def averaged_steps(steps: int) -> int:
    """Return the number of steps whose mean loss the console and the pictures show.

    Args:
        steps: steps that the run has made.

    >>> averaged_steps(100), averaged_steps(3000)
    (10, 100)
    """
    return max(10, steps // 30)


def read(folder: pathlib.Path) -> list[dict[str, float]]:
    """Return the metrics of all steps of a run, in order.

    A last line that was cut off because a process died is left out.
    """
    return _read_lines(folder / "metrics.jsonl")


def read_evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return all evaluations of a run, in order, each as from `Evaluation.to_json`; see `read`."""
    return _read_lines(folder / "eval.jsonl")


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [_record(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def _record(line: str, where: str) -> dict[str, Any]:
    values = reading.parse_json(line, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold keys and values, got {type(values).__name__}.")
    for key in ("step", "loss"):
        if type(values.get(key)) not in (int, float):
            got = printable(repr(values.get(key)), 80)
            raise ValueError(f"{where}: {key} must be a number, got {got}.")
    return values
