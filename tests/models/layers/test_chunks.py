import jax.numpy as jnp
import numpy as np
import pytest

from hcp_jax.models.layers import chunks


@pytest.mark.parametrize(("rows", "length", "chunk"), [(1, 7, 3), (2, 12, 8), (3, 5, 1), (1, 4, 9)])
def test_joined_chunks_are_what_was_split(rows, length, chunk):
    x = jnp.arange(rows * length * 2).reshape(rows, length, 2)
    blocks = chunks.split(x, chunk)
    assert blocks.shape[1] == rows
    assert blocks.shape[1] * blocks.shape[2] <= max(chunk, rows)
    np.testing.assert_array_equal(chunks.join(blocks, length), x)


def test_a_length_is_filled_up_only_if_no_number_of_chunks_divides_it():
    assert chunks.split(jnp.zeros((1, 12)), 5).shape == (3, 1, 4)
    assert chunks.split(jnp.zeros((1, 13)), 5).shape == (3, 1, 5)
