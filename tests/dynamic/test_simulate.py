import argparse
import json

import pytest

from hcp_jax.commands import dynamic


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    dynamic.add_arguments(parser)
    return dynamic.run(parser.parse_args([str(word) for word in words]))


ARGUMENTS = ("simulate", "--lengths", "uniform:min=10,max=400", "--max-tokens-per-device", 128)


def test_the_table_the_json_and_the_picture_tell_of_every_strategy(tmp_path, capsys):
    files = "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"
    assert run(*ARGUMENTS, "--devices", 4, 6, "--batches", 2, *files) == 0
    shown = capsys.readouterr().out
    for words in (
        "seeded greedy",
        "fixed CP, packed",
        "with its padding",
        "above the proven lower bound",
    ):
        assert words in shown
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["devices"] for record in records] == [4, 6]
    for record in records:
        assert record["above_lower_bound"] >= 0
        assert set(record["programs"]) <= {1, 2, 4, 6}
        assert record["strategies"]["seeded greedy, with its padding"]["padding"] > 0
        for row in record["strategies"].values():
            assert row["seconds"] > 0
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_a_batch_is_drawn_to_the_number_of_microbatches_that_was_asked_for(tmp_path):
    path = tmp_path / "out.json"
    run(*ARGUMENTS, "--devices", 8, "--microbatches", 20, "--json", path)
    (record,) = json.loads(path.read_text())
    assert abs(record["tokens"] / (8 * 128) - 20) < 4


def test_a_pipeline_takes_the_time_of_its_ticks(tmp_path, capsys):
    found = []
    for stages in ((), ("--pp", 4), ("--pp", 4, "--virtual-stages", 2)):
        out = "--json", tmp_path / "out.json"
        assert run(*ARGUMENTS, "--devices", 4, *stages, *out) == 0
        found += json.loads((tmp_path / "out.json").read_text())
    seconds = [record["strategies"]["fixed CP, packed"]["seconds"] for record in found]
    # Microbatches of one width take about the same time: m + (pp - 1) / v of them.
    m = found[0]["strategies"]["fixed CP, packed"]["num_microbatches"]
    assert seconds[1] / seconds[0] == pytest.approx((m + 3) / m / 4, rel=0.02)
    assert seconds[2] < seconds[1]
    assert found[1]["stages"]["over_ideal"] > found[2]["stages"]["over_ideal"] > 1
    assert "4 stages of 4 devices, 2 chunks on each" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--virtual-stages 2 needs a pipeline"):
        run(*ARGUMENTS, "--devices", 4, "--virtual-stages", 2)


def test_calibrated_costs_are_used(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    row = {"grouping": [2, 2], "lengths": [[100], [90]], "tokens": 128, "seconds": 0.5}
    rows.write_text(json.dumps(row) + "\n")
    assert run("calibrate", rows, "--output", tmp_path / "cost.json") == 0
    assert "1 microbatches, modelled within 0.0% of each" in capsys.readouterr().out
    out = "--json", tmp_path / "out.json"
    run(*ARGUMENTS, "--devices", 4, "--cost", tmp_path / "cost.json", *out)
    (record,) = json.loads((tmp_path / "out.json").read_text())
    ours = record["strategies"]["dynamic (ours)"]
    assert ours["seconds"] / ours["num_microbatches"] > 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]\n", ":1 is not an object"),
        ('{"grouping": [2], "lengths": [[1], [2]], "tokens": 8, "seconds": 1}\n', "one list of"),
        ("", "at least one row"),
    ],
)
def test_rows_that_are_none_are_told(tmp_path, text, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    with pytest.raises(ValueError, match=words):
        run("calibrate", rows)


def test_a_file_that_holds_no_cost_is_told(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text('{"speed": 3}')
    with pytest.raises(ValueError, match="holds no cost"):
        run(*ARGUMENTS, "--devices", 4, "--cost", path)


def test_batches_must_be_some():
    with pytest.raises(SystemExit):
        run(*ARGUMENTS, "--batches", 0)
