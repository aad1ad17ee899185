"""Pictures of runs: they show what is in the records, and the legend says what differs."""

import argparse
import json

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from hcp_jax.commands import plot
from hcp_jax.viz import runs as figures
from hcp_jax.viz.runs import Run


def evaluation(step, losses, stderr=0.1):
    n = len(losses)
    return {
        "step": step,
        "loss": losses[-1],
        "stderr": stderr,
        "positions": [0, *(2**i for i in range(n))],
        "loss_by_position": losses,
        "stderr_by_position": [None] + [stderr] * (n - 1),
    }


def steps(number, level=5.5):
    return [
        {"step": i, "loss": level * np.exp(-i / 40), "tokens": 64, "tokens_per_second": 1000 + i}
        for i in range(number)
    ]


def run_folder(path, number=100, evaluations=(), **config):
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "run_dir": "y"} | config))
    for name, lines in (("metrics", steps(number)), ("eval", evaluations)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text)
    return path


def test_the_loss_is_drawn_across_the_picture(tmp_path):
    assert figures.draw_run(tmp_path, "nothing yet") == []
    folder = run_folder(tmp_path / "run")
    [picture] = figures.draw_run(folder, "a test")
    image = imread(picture)[..., :3]
    assert image.shape[:2] == (675, 1200)
    blue = np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    assert blue.any(axis=0).mean() > 0.7  # the line crosses most of the width


def test_a_run_that_evaluated_has_two_pictures(tmp_path):
    folder = run_folder(tmp_path / "run", evaluations=[evaluation(0, [5.0, 4.0, 3.0])])
    drawn = figures.draw_run(folder, "a test")
    assert [path.name for path in drawn] == ["loss.png", "eval_by_position.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_loss_by_position_is_drawn_at_the_bins_places_a_curve_for_each_of_some_steps():
    evaluations = [evaluation(i, [4.0 - 0.1 * i, None, 3.0 - 0.1 * i]) for i in range(20)]
    [axes] = figures.draw_by_position(evaluations, "a test").axes
    assert [line.get_label() for line in axes.lines] == ["0", "4", "8", "11", "15", "19"]
    place, loss = axes.lines[-1].get_data()
    np.testing.assert_allclose(place, [0.5, 2.5])  # the bin without tokens is left out
    np.testing.assert_allclose(loss, [4.0 - 1.9, 3.0 - 1.9])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "4"]


def test_an_untrained_models_curve_does_not_flatten_the_others_and_is_told():
    evaluations = [evaluation(i, [loss, loss]) for i, loss in ((0, 9.0), (5, 3.0), (9, 2.5))]
    [axes] = figures.draw_by_position(evaluations, "a test").axes
    assert [line.get_label() for line in axes.lines] == ["0 (9.0, above)", "5", "9"]
    assert axes.get_ylim()[1] < 4
    assert len(axes.lines[0].get_xdata()) == 0


def test_the_legend_says_what_the_configs_differ_in_and_nothing_else():
    shared = {"name": "a", "model.num_layers": 2, "steps": 5, "log.every": 1}
    runs = [
        Run("a-001", shared | {"parallel.comm_type": "p2p", "data.path": None}, [], []),
        Run(
            "a-002", shared | {"parallel.comm_type": "a2a", "data.path": None, "name": "b"}, [], []
        ),
    ]
    assert figures.labels(runs) == ["a-001: comm_type p2p", "a-002: comm_type a2a"]
    assert figures.labels(runs[:1]) == ["a-001"]
    both = {"data.path": "x", "eval.path": "y"}
    assert figures.labels([runs[0], Run("c", runs[0].config | both, [], [])])[1] == (
        "c: data.path x, eval.path y"
    )


def test_runs_are_drawn_side_by_side_against_steps_or_tokens(tmp_path):
    a = run_folder(tmp_path / "a", evaluations=[evaluation(n, [4.0, 3.0]) for n in (0, 100)])
    b = run_folder(tmp_path / "b", number=50, seed=1)
    runs = [figures.read_run(folder) for folder in (a, b)]
    by_step, by_tokens = (figures.draw_runs(runs, against) for against in ("step", "tokens"))
    assert [len(figure.axes) for figure in (by_step, by_tokens)] == [3, 3]
    assert by_step.axes[1].get_ylim()[0] == 0
    assert max(line.get_xdata().max() for line in by_step.axes[0].lines) == 99
    assert max(line.get_xdata().max() for line in by_tokens.axes[0].lines) == 6400
    np.testing.assert_allclose(by_tokens.axes[2].lines[0].get_xdata(), [0, 6400])
    assert len(figures.draw_runs(runs[1:]).axes) == 2  # nothing was held out


def test_hcp_plot_writes_the_picture_it_names(tmp_path, capsys):
    folder = run_folder(tmp_path / "a")
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    out = tmp_path / "x.png"
    assert plot.run(parser.parse_args([str(folder), "--out", str(out)])) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert imread(out).shape[0] > 400


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.yaml"):
        figures.read_run(tmp_path)
    with pytest.raises(ValueError, match="has no steps yet"):
        figures.read_run(run_folder(tmp_path / "new", number=0))


def test_the_running_mean_is_of_the_values_before_and_starts_where_the_data_do():
    values = np.asarray([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(figures.running_mean(values, 2), [0, 1.5, 4.5, 3])
    np.testing.assert_array_equal(figures.running_mean(values, 1), values)


def test_steps_that_were_skipped_do_not_count_in_the_mean():
    lines = [{"step": i, "loss": loss} for i, loss in enumerate([4.0, 9.0, float("nan"), 2.0])]
    lines[1]["skipped"] = 1.0
    [axes] = figures.draw_loss(Run("", {}, lines, [])).axes
    step, mean = axes.lines[1].get_data()
    assert (step.tolist(), mean.tolist()) == ([0, 3], [4.0, 3.0])
    lines = [{"step": 0, "loss": float("nan")}]
    [axes] = figures.draw_loss(Run("", {}, lines, [])).axes
    assert [line.get_label() for line in axes.lines] == ["each step"]


def test_runs_without_evaluations_are_told():
    with pytest.raises(ValueError, match=r"no evaluations to draw; set eval\.every"):
        figures.draw_by_position([])
