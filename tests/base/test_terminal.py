"""Whatever is quoted cannot steer the terminal: each choke point, and each command with hostile names."""

import ast
import io
import json
import logging
import pathlib

import numpy as np
import pytest
import rich.table
from safetensors.numpy import save_file

import hcp_jax
from hcp_jax import cli
from hcp_jax.base import terminal

ROOT = pathlib.Path(hcp_jax.__file__).parent

EVIL = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202eabc\u2066\u2028\x00 [bold]x[/] :smile: \ud800"


def is_safe(text):
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    "code", [*range(32), 127, *range(128, 160), 0x202E, 0x2066, 0x2028, 0xD800]
)
def test_every_character_that_steers_is_escaped(code):
    shown = terminal.printable(f"a{chr(code)}b")
    assert shown.isascii()
    assert shown.startswith("a\\")
    assert ast.literal_eval(f"'{shown}'") == f"a{chr(code)}b"


def test_what_can_be_read_stays_and_is_bounded():
    assert terminal.printable("grün 漢字 – ✓") == "grün 漢字 – ✓"
    assert terminal.printable("x" * 10_000, limit=20) == "x" * 20 + "… (9980 more characters)"
    assert terminal.printable(3) == "3"
    assert terminal.safe_lines("a\n\x1bb") == "a\n\\x1bb"


def test_rich_prints_text_and_its_own_styles_only():
    out = io.StringIO()
    console = terminal.console(file=out, width=300)
    table = rich.table.Table("[in, out]", EVIL, title=EVIL)
    table.add_row(EVIL, "[/nope]")
    console.print(EVIL)
    console.print(EVIL, soft_wrap=True)
    console.print(table)
    assert is_safe(out.getvalue())
    assert out.getvalue().count("[bold]x[/]") >= 3
    assert "[in, out]" in out.getvalue()
    colours = io.StringIO()
    terminal.console(file=colours, force_terminal=True).print("text", style="bold")
    assert colours.getvalue() == "\x1b[1mtext\x1b[0m\n"


def test_logs_and_plain_lines_are_safe(capsys):
    record = logging.LogRecord("x", logging.WARNING, "", 0, "read %s", (EVIL,), None)
    assert is_safe(terminal.log_handler().format(record))
    terminal.say(EVIL)
    terminal.say_error(EVIL * 1000)
    try:
        raise RuntimeError(EVIL)
    except RuntimeError as error:
        terminal.say_traceback(error)
    captured = capsys.readouterr()
    assert is_safe(captured.out + captured.err)
    assert "RuntimeError: \\x1b[31mred" in captured.err


def test_a_terminal_without_unicode_still_gets_the_message():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.say("grün", file=out)
    assert out.buffer.getvalue() == b"gr\\xfcn\n"


def test_nothing_is_printed_around_it():
    """`print` of anything but a constant, and a Rich console of one's own, would be a way around."""
    around = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "terminal.py" or not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            printed = name == "print" and not all(isinstance(a, ast.Constant) for a in node.args)
            if printed or name.endswith((".Console", "print_exception")) or name == "Console":
                around.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert around == []


@pytest.fixture
def hostile(tmp_path):
    """A folder with a hostile name, which is many things at once, none of them whole."""
    folder = tmp_path / "a\x1b[31m\u202e\nb [bold]"
    folder.mkdir()
    (folder / "x\x1b]0;t\x07.txt").write_bytes(b"\xff\xfe\x1b[2J")
    (folder / "config.yaml").write_text('"steps\\e[31m": "\\e[2J"')
    (folder / "metrics.jsonl").write_text('{"\\u001b[2J": 1, "\\u001b[2J": 2}\n')
    (folder / "offsets.npy").write_bytes(b"\x1b[2J")
    return folder


def test_no_command_prints_a_hostile_name_as_it_is(hostile, tmp_path, capsys):
    text = str(hostile)
    file = str(hostile / "config.yaml")
    commands = [
        [EVIL],
        ["train", f"--{EVIL}"],
        ["train", f"{text}/none"],
        ["train", file],
        ["train", "configs/quickstart.yaml", "--data.path", text],
        ["train", "configs/quickstart.yaml", "--model.remat", EVIL],
        ["train", "configs/quickstart.yaml", "--init_from", text],
        ["train", "--resume", text],
        ["launch", file, "--num-processes", "1"],
        ["tokenize", text, "--tokenizer", f"{text}/none", "--out", f"{text}/out"],
        ["import", text],
        ["import", EVIL.replace("\0", "").replace("\ud800", "")],
        ["export", text, f"{text}/out"],
        ["plot", text, "--out", f"{text}/x.png"],
        ["verify", file],
        ["audit", file],
        ["plan", EVIL],
        ["plan", "llama3-8b", "--gpu", text],
        ["bench", EVIL],
        ["dynamic", EVIL],
        ["dynamic", "simulate", "--lengths", text],
        ["dynamic", "calibrate", file],
    ]
    for command in commands:
        code = cli.main(command)
        captured = capsys.readouterr()
        assert code == 2, (command, captured)
        assert captured.err.startswith("hcp: "), command
        assert is_safe(captured.out + captured.err), command


def test_hostile_tensors_keys_and_values_of_a_folder_are_printed_safe(tmp_path, capsys):
    raw = {"model_type": EVIL}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert cli.main(["import", str(tmp_path)]) == 2
    raw = {
        "model_type": "llama",
        "vocab_size": 32,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    name = "\x1b[2J\u202e.weight"
    save_file({name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert cli.main(["import", str(tmp_path)]) == 2
    (tmp_path / "model.safetensors").rename(tmp_path / "\x1b[2J.bin")
    assert cli.main(["import", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 3
    assert is_safe(captured.err)


def test_a_pipe_is_no_terminal_even_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    made = terminal.console(file=file)
    made.print("text", style="bold")
    assert not made.is_terminal
    assert file.getvalue() == "text\n"
