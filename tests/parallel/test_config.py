"""ParallelConfig: Megatron's words map to the mesh; contradictions are refused."""

import pytest

from hcp_jax.parallel.config import ParallelConfig


def test_megatrons_words_map_to_the_mesh():
    config = ParallelConfig(
        dp=1,
        context_parallel_size=8,
        hierarchical_context_parallel_sizes=[2, 4],
        cp_comm_type="a2a+p2p",
    )
    cp = config.context_parallel()
    assert (cp.mesh.shape["cp_inner"], cp.mesh.shape["cp_outer"]) == (2, 4)
    flat = ParallelConfig(context_parallel_size=8, cp_comm_type="p2p").resolve()
    assert (flat.cp_outer, flat.cp_inner) == (8, 1)
    heads = ParallelConfig(context_parallel_size=8, cp_comm_type="a2a").resolve()
    assert (heads.cp_outer, heads.cp_inner) == (1, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"context_parallel_size": 16, "hierarchical_context_parallel_sizes": [2, 4]},
            "multiply to 8",
        ),
        ({"hierarchical_context_parallel_sizes": [8]}, "needs two sizes"),
        ({"context_parallel_size": 8}, "needs hierarchical_context_parallel_sizes"),
        ({"context_parallel_size": 8, "cp_outer": 8}, "use one of the two"),
        ({"cp_outer": 8, "comm_type": ["p2p", "a2a"]}, "lists 2 layers, but the model has 3"),
        ({"cp_outer": 3}, "needs 3 devices, but there are 8"),
        ({"cp_outer": 8, "comm_type": "p3p"}, "did you mean 'p2p'"),
    ],
)
def test_invalid_parallel_configs_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**words).context_parallel(num_layers=3)
