"""Text: each document once, in order, and what is no text is told by file and line."""

import pytest

from hcp_jax.train.data.text import documents


def test_jsonl_is_read_line_by_line_and_faults_are_placed_in_the_whole_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n{"text": "\xe9"}\n')
    found = documents(path)
    assert [next(found), next(found)] == [b"one", b"two"]
    with pytest.raises(ValueError, match=r"byte 0xe9 at offset 43 \(line 4\)"):
        next(found)
