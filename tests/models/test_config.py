import numpy as np
import pytest

from hcp_jax.models.config import ModelConfig

SMALL = {
    "vocab_size": 32,
    "num_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"hidden_size": 18}, "give head_size"),
        ({"head_size": 5}, "head size is 5"),
        ({"remat": "some"}, "auto, none, mlp, projections, attention, full"),
        ({"compute_dtype": "float16"}, "float32, bfloat16"),
        ({"sliding_window": 0}, "sliding_window must be positive, got 0"),
        ({"loss_chunk": 0}, "loss_chunk must be positive, got 0"),
        ({"mlp_chunk": 0}, "mlp_chunk must be positive, got 0"),
        ({"remat": "none", "offload_activations": True}, "needs remat 'attention' or 'full'"),
    ],
)
def test_impossible_models_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**{**SMALL, **change})


def test_head_size_is_hidden_size_over_heads_unless_given():
    assert ModelConfig(**SMALL).head_dim == 4
    assert ModelConfig(**SMALL, head_size=6).head_dim == 6


def test_mask_is_causal_within_documents_and_the_window():
    mask = ModelConfig(**SMALL, sliding_window=3).mask(np.array([[0, 0, 0, 0, 0, 1, 1]]))
    start, end = mask.intervals(7)
    assert start.tolist() == [[0, 0, 0, 1, 2, 5, 5]]
    assert end.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert ModelConfig(**SMALL).mask().intervals(3).start.tolist() == [[0, 0, 0]]
