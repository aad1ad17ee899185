"""Messages: what one process says to itself; two of them are in test_checkpoint_processes.py."""

from hcp_jax.train.hosts.kv_store import Messages, describe_error


def test_a_process_alone_hears_its_own_word():
    words = Messages("test")
    assert words.gather([1, "a"]) == [[1, "a"]]
    assert words.first_error(None) is None
    assert words.first_error(OSError("disk")) == "disk"


def test_an_error_is_told_in_a_line_by_what_it_began_with():
    wrapped = RuntimeError("pages of details")
    wrapped.__cause__ = OSError("no space\n  left")
    assert describe_error(wrapped) == "no space left"
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(ValueError("long" * 1000))) == 600
    assert describe_error(None) is None
