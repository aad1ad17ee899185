"""Words: what one process says to itself; two of them are in test_checkpoint_processes.py."""

from hcp_jax.train.hosts.kv_store import Words, in_words


def test_a_process_alone_hears_its_own_word():
    words = Words("test")
    assert words.of_all([1, "a"]) == [[1, "a"]]
    assert words.error_of_any(None) is None
    assert words.error_of_any(OSError("disk")) == "disk"


def test_an_error_is_told_in_a_line_by_what_it_began_with():
    wrapped = RuntimeError("pages of details")
    wrapped.__cause__ = OSError("no space\n  left")
    assert in_words(wrapped) == "no space left"
    assert in_words(KeyError()) == "KeyError"
    assert len(in_words(ValueError("long" * 1000))) == 600
    assert in_words(None) is None
