"""Wrong command lines: one line on standard error, exit code 2, and nothing has been compiled.

All are called in this process, so that they are cheap. The first test is a table of lines with what
must be said of them. The second draws lines from a seed: every option of every command with values
that are wrong in most places; whatever is accepted stops at the first door behind the checks.
"""

import argparse
import pathlib
import random

import jax
import pytest

from hcp_jax import cli

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
Q = str(CONFIGS / "quickstart.yaml")
CLUSTER = "--gpu h100 --hosts 4"
PLAN = f"plan --model llama3-8b {CLUSTER} --seq-len 128K"
SIMULATE = "dynamic simulate --lengths uniform:min=1,max=100"

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)


class DoorError(BaseException):
    """What was asked for is about to begin."""


def _stop(*_, **__):
    raise DoorError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with files of the wrong kinds; it is the current one, too."""
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "to_fill.yaml").write_text("data: {path: FILL_IN}\nparallel: {cp_inner: 2}\n")
    (tmp_path / "gpus.yaml").write_text("made_for: 8 x 8 H200\nparallel: {cp_outer: 64}\n")
    (tmp_path / "large.yaml").write_text(
        "model: {num_layers: 4000, hidden_size: 8192, intermediate_size: 32768}\n"
    )
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    # The devices of the tests have been simulated already.
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return tmp_path


LINES = {
    # From the issue.
    f"plan --model llama3-8b {CLUSTER} --seq-len 1000000007": "no split of 1000000007 tokens",
    f"plan --model llama3-8b {CLUSTER} --seq-len 100000000000000": "must be at most 2,147,483,647",
    f"plan --model llama3-8b {CLUSTER} --seq-len 1e14": "such as 131072, 128K or 1M, got '1e14'",
    f"plan --model llama3-8b {CLUSTER} --seqlen 1M": "no option '--seqlen'; did you mean '--seq-len'",
    f"audit {Q} --gpu h200 --hosts 1 --picture out.xyz": "ends in .png, .svg",
    f"audit {Q} --gpu h200 --hosts 1 --json /nowhere/x": "there is no folder /nowhere",
    "verify": "nothing to compare one device with",
    "verify empty.yaml": "empty.yaml: the mesh has one device",
    "bench attention --length 0": "must be a number of tokens",
    f"train {Q} --folder list.yaml": "needs a folder, and list.yaml is a file",
    f"train {Q} --profile 0": "must be a whole number, at least 1, got '0'",
    "train binary.yaml": "binary.yaml is not UTF-8 text",
    f"train {Q} --context-parallel-size 8": "did you mean '--parallel.context_parallel_size'",
    f"train {Q} --parallel.comm_type ring": "did you mean 'p2p'",
    f"train {Q} --parallel.comm_type ulysses": "did you mean 'a2a'",
    f"train {Q} --parallel.comm_type a2a --model.num_heads 6 --model.hidden_size 96": "use comm_type 'p2p', or one of 1, 2, 3, 6",
    # What cannot run here.
    "train gpus.yaml": "made for 8 x 8 H200, and there is no GPU here",
    "launch gpus.yaml --num-processes 8": "made for 8 x 8 H200",
    "train large.yaml": "the state of training",
    "train to_fill.yaml": "data.path: still FILL_IN",
    "launch to_fill.yaml --num-processes 2": "data.path: still FILL_IN",
    f"verify {Q} --parallel.cp_outer 100000": "at most 1,024 can be simulated",
    # Files and folders.
    "train list.yaml": "must hold keys and values, got list",
    "train folder": "folder: Is a directory",
    f"train {Q} --run_dir list.yaml": "run_dir: needs a folder, and list.yaml is a file",
    f"train {Q} --run_dir /proc/x": "run_dir: /proc/x: a folder cannot be written there",
    f"train {Q} --data.path ": "data.path is empty",
    f"train {Q} --resume ": "--resume: is empty",
    f"train {Q} --profile 1000": "this run makes steps 0 to 99",
    f"{PLAN} --write folder": "needs a file, and folder is a folder",
    f"{PLAN} --json folder": "needs a file, and folder is a folder",
    f"plan --model binary.yaml {CLUSTER} --seq-len 1M": "binary.yaml is not UTF-8 text",
    "plan --model llama3-8b --gpu list.yaml --hosts 4 --seq-len 1M": "must hold the fields of a GPU",
    "tokenize folder --tokenizer folder --out x": "needs a file, and folder is a folder",
    "tokenize folder --tokenizer list.yaml --out list.yaml": "needs a folder, and list.yaml is a file",
    "import list.yaml": "list.yaml is a file; give the Hugging Face folder",
    "export folder x": "folder is no run folder",
    "plot folder --out x.docx": "ends in .png, .pdf, .svg",
    f"{SIMULATE} --cost binary.yaml": "binary.yaml is not UTF-8 text",
    f"{SIMULATE} --json /nowhere/x": "there is no folder /nowhere",
    "dynamic simulate --lengths binary.yaml": "binary.yaml is not UTF-8 text",
    "dynamic calibrate binary.yaml": "binary.yaml is not UTF-8 text",
    # Numbers.
    "plan --model llama3-8b --gpu h100 --hosts 400000000 --seq-len 1M": "at most 32,768",
    f"{PLAN} --batch 0": "at least 1, got '0'",
    f"train {Q} --optimizer.learning_rate -1e-3": "must be positive, got -0.001",
    f"train {Q} --start-timeout nan": "must be a finite number above 0",
    f"{SIMULATE} --microbatches 1e300": "documents is too large",
    "dynamic simulate --lengths uniform:min=1,max=nan": "not a finite number",
    "dynamic simulate --lengths uniform:min=1,max=1e30": "needs 1 <= min <= max <= 2147483647",
    # Spelling.
    "trian": "no command 'trian'; did you mean 'train'",
    "generate": "no command 'generate'",
    f"train {Q} --comm_type p2p": "did you mean '--parallel.comm_type'",
    f"{SIMULATE} --device 8": "did you mean '--devices'",
    f"train {Q} extra": "no argument 'extra'",
}


def _said(capsys, argv):
    """(exit code, what was said on standard error), or None at a door."""
    before = len(COMPILED)
    try:
        code = cli.main(argv)
    except DoorError:
        code = None
    err = capsys.readouterr().err
    assert COMPILED[before:] == [], argv
    return code, err


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_answered_in_one_line_before_anything_compiles(place, capsys, line):
    code, err = _said(capsys, line.split(" "))
    assert code == 2
    assert err.startswith("hcp: ")
    assert err.count("\n") == 1
    assert LINES[line] in err
    assert {p.name for p in place.iterdir()} <= {
        *("binary.yaml", "list.yaml", "empty.yaml", "to_fill.yaml", "gpus.yaml", "large.yaml"),
        "folder",
    }


def test_what_compiles_is_noticed():
    before = len(COMPILED)
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert len(COMPILED) > before


@pytest.mark.parametrize("option", ["--seq-len", "--seq_len", "--Seq-Len"])
def test_options_may_be_spelt_with_either_dash(place, capsys, option):
    line = f"plan --model qwen3-0.6b --gpu h100 --hosts 1 {option} 64K --top 1"
    assert cli.main(line.split()) == 0
    assert "65,536 tokens on" in capsys.readouterr().out


def test_lengths_of_a_config_may_be_written_with_k_and_m(place, monkeypatch):
    found = []
    monkeypatch.setattr(
        "hcp_jax.train.loop.train", lambda config, **_: found.append(config) or _stop()
    )
    (place / "long.yaml").write_text("seq_len: 4K\neval: {tokens: 1M}\nparallel: {cp-inner: 2}\n")
    assert cli.main(["train", "long.yaml"]) == 2  # a key of a file has one spelling
    (place / "long.yaml").write_text("seq_len: 4K\neval: {tokens: 1M}\n")
    with pytest.raises(DoorError):
        cli.main(["train", "long.yaml", "--model.loss-chunk", "0.5K", "--parallel.cp-inner", "2"])
    [config] = found
    assert (config.seq_len, config.eval.tokens, config.model.loss_chunk) == (4096, 2**20, 512)


BAD = [
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "9" * 25,
    "",
    " ",
    "folder",
    "/proc/x",
    "binary.yaml",
    "x\0y",
    "[",
    "\x1b[31m",
    "null",
    "-1e-3",
    "1K",
    "ring",
]

BASES = {
    "train": [Q],
    "launch": [Q, "--num-processes", "2"],
    "verify": [Q],
    "bench": ["attention", "--length", "64", "--stream", "64", "--document", "64"],
    "audit": [Q, "--gpu", "h200", "--hosts", "1"],
    "longest": [Q, "--gpu", "h200", "--hosts", "1"],
    "plan": PLAN.split()[1:],
    "tokenize": ["folder", "--tokenizer", "list.yaml", "--out", "new"],
    "import": ["folder"],
    "export": ["folder", "new"],
    "plot": ["folder"],
    "dynamic": [*SIMULATE.split()[1:], "--devices", "4", "--microbatches", "1"],
}

DOORS = [
    "hcp_jax.train.loop.train",
    "hcp_jax.commands.launch._Processes",
    "hcp_jax.verify.streams.checks",
    "hcp_jax.verify.groups.checks",
    "hcp_jax.commands.bench._compare",
    "hcp_jax.planner.audit_tick.audit_run",
    "hcp_jax.planner.longest.longest",
    "hcp_jax.dynamic.simulate.simulate",
    "hcp_jax.train.hosts.cluster.Peers",
]


def _options(command):
    """Every option of a command that takes a value."""
    parser = cli._Parser(prog="hcp")
    __import__(cli.COMMANDS[command].module)
    module = __import__("sys").modules[cli.COMMANDS[command].module]
    module.add_arguments(parser)
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += action.choices["simulate"]._actions
    return [a.option_strings[-1] for a in actions if a.option_strings and a.nargs != 0]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_with_any_value_is_accepted_or_answered_in_one_line(
    place, monkeypatch, capsys, command
):
    for door in DOORS:
        monkeypatch.setattr(door, _stop)
    pairs = [(option, value) for option in _options(command) for value in BAD]
    chosen = random.Random(command).sample(pairs, min(len(pairs), 150))
    assert len(chosen) >= 18
    refused = 0
    for option, value in chosen:
        code, err = _said(capsys, [command, *BASES[command], option, value])
        if code == 2:
            refused += 1
            assert err.startswith("hcp: "), (option, value, err)
            assert err.count("\n") == 1, (option, value, err)
            assert "\x1b" not in err, (option, value)
        else:
            assert code in (0, None), (option, value, code, err)
    assert refused > 0.5 * len(chosen)


def test_every_misspelt_option_finds_the_right_one(place, capsys):
    rng = random.Random(0)
    for command in cli.COMMANDS:
        for option in rng.sample(_options(command), min(8, len(_options(command)))):
            if len(option) < 8:
                continue
            at = rng.randrange(4, len(option) - 1)
            wrong = option[:at] + option[at + 1 :]
            code, err = _said(capsys, [command, *BASES[command], wrong, "1"])
            assert code == 2
            assert f"no option {wrong!r}; did you mean '--" in err
