"""What a signal costs: no checkpoint, and no evaluation that could not be made up for."""

import io
import os
import signal

import pytest
import rich.console

from hcp_jax.train import config as configuration
from hcp_jax.train import folder, loop
from hcp_jax.train.evaluation import Evaluator
from hcp_jax.train.metrics import metrics
from tests.kept_programs import kept_programs
from tests.train.tiny import write_config

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Evaluates after two steps and after four, in several batches; all runs share programs."""
    place = tmp_path_factory.mktemp("stopping")
    path = write_config(
        place,
        steps=STEPS,
        run_dir=str(place / "runs"),
        eval={"every": 2, "holdout": 0.2},
        parallel={"cp_outer": 8},
    )
    with kept_programs(place / "cache", 0.1):
        yield configuration.load(path)


@pytest.fixture(scope="module")
def whole(config):
    """The last evaluation of a run that no signal came to."""
    outcome, _ = train(config)
    return metrics.read_evaluations(outcome.folder)[-1]


def train(config, **options):
    """The outcome, and what was printed."""
    printed = io.StringIO()
    console = rich.console.Console(file=printed, width=200)
    return loop.train(config, console=console, **options), printed.getvalue()


def evaluated(run):
    return [line["step"] for line in metrics.read_evaluations(run)]


def _signal_while_evaluating(monkeypatch, at):
    """SIGTERM comes before the second batch of the evaluation after `at` steps."""
    evaluate = Evaluator.evaluate

    def with_signal(self, step, params, stops=lambda: False):
        asked = []

        def stops_too():
            asked.append(stops())
            if step == at and len(asked) == 2:
                signal.raise_signal(signal.SIGTERM)
                return stops()
            return asked[-1]

        assert len(self._text) > 2
        return evaluate(self, step, params, stops_too)

    monkeypatch.setattr(Evaluator, "evaluate", with_signal)


@pytest.mark.slow
def test_a_signal_breaks_an_evaluation_off_and_what_was_made_is_saved(config, monkeypatch):
    with monkeypatch.context() as patch:
        _signal_while_evaluating(patch, at=2)
        outcome, printed = train(config)
    assert (outcome.steps, outcome.stopped_by) == (2, signal.SIGTERM)
    assert "evaluation after 2 steps: stopped by a signal" in printed
    assert f"hcp train --resume {outcome.folder}" in printed
    assert (outcome.folder / "checkpoints" / "2").is_dir()
    assert evaluated(outcome.folder) == [0]
    # The run goes on with the evaluation that it lacks.
    again, _ = train(config, resume=outcome.folder)
    assert again.stopped_by is None
    assert evaluated(outcome.folder) == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in the last step", "in the last evaluation"])
def test_an_evaluation_that_a_signal_cost_is_made_when_the_run_is_started_again(
    config, whole, monkeypatch, when
):
    write = metrics.Recorder.write
    with monkeypatch.context() as patch:
        if when == "in the last evaluation":
            _signal_while_evaluating(patch, at=STEPS)
        else:

            def signal_at_last(self, step, values):
                write(self, step, values)
                if step == STEPS - 2:  # reported while the last step is made
                    signal.raise_signal(signal.SIGTERM)

            patch.setattr(metrics.Recorder, "write", signal_at_last)
        outcome, printed = train(config)
    assert outcome.steps == STEPS
    assert evaluated(outcome.folder) == [0, 2]
    again, printed = train(config, resume=outcome.folder, begin=True)
    assert "its last evaluation is missing" in printed
    assert again.steps == STEPS
    last = metrics.read_evaluations(outcome.folder)[-1]
    assert (last["step"], last["loss"]) == (STEPS, whole["loss"])
    assert len(metrics.read(outcome.folder)) == STEPS
    _, printed = train(config, resume=outcome.folder, begin=True)
    assert "has made all its 4 steps." in printed
    with pytest.raises(ValueError, match="has made all its 4 steps; to go on"):
        train(config, resume=outcome.folder)


def test_resume_latest_takes_the_newest_run_that_has_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there are no runs"):
        folder.latest(str(tmp_path))
    for number, (name, steps) in enumerate([("old", "5"), ("new", "3"), ("empty", None)]):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("")
        os.utime(run / "config.yaml", (number, number))
        if steps is not None:
            (run / "checkpoints" / steps).mkdir(parents=True)
    assert folder.latest(str(tmp_path)) == tmp_path / "new"
    (tmp_path / "new" / "checkpoints" / "3").rmdir()
    (tmp_path / "old" / "checkpoints" / "5").rmdir()
    with pytest.raises(ValueError, match="none of the 3 runs in .* has a checkpoint"):
        folder.latest(str(tmp_path))
