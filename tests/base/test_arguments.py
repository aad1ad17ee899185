"""Values of the command line: what is accepted, and how the rest is refused."""

import argparse

import pytest

from hcp_jax.base import arguments


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("131072", 131072),
        ("128K", 131072),
        ("128k", 131072),
        ("1M", 2**20),
        ("0.5m", 2**19),
        ("1g", 2**30),
        ("131_072", 131072),
        (" 7 ", 7),
        ("2147483647", 2**31 - 1),
    ],
)
def test_lengths(text, tokens):
    assert arguments.length(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "nan", "inf", "1e14", "1.5", "0.3K", "2G", "9" * 40, "1T", "K", "1MM", "0x10"],
)
def test_what_is_no_length_is_refused_with_what_is_needed(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"tokens.*, got "):
        arguments.length(text)


def test_a_file_to_write_is_checked_before_the_work(tmp_path):
    write = arguments.output(".png", ".svg", screen=True)
    assert write("-") == "-"
    assert write(str(tmp_path / "a.png")) == str(tmp_path / "a.png")
    (tmp_path / "d.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in {
        "": "is empty",
        str(tmp_path / "a.xyz"): "ends in .png, .svg",
        str(tmp_path / "gone" / "a.png"): "there is no folder",
        str(tmp_path / "d.png"): "is a folder",
        str(tmp_path / "file" / "a.png"): "is not a folder|there is no folder",
        "/proc/version/a.png": "is not a folder|there is no folder",
        "a\0b.png": "null",
        "x" * 5000 + ".png": "too long",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            write(name)


def test_a_folder_to_write_in(tmp_path):
    (tmp_path / "file").write_text("")
    assert arguments.writable_folder(str(tmp_path / "new" / "deep")) == tmp_path / "new" / "deep"
    for name in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below"), "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.writable_folder(name)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "1.5", "9" * 40, "x"])
def test_counts_start_at_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number"):
        arguments.whole()(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e400", "x"])
def test_numbers_are_finite_and_above_zero(text):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        arguments.positive(text)
