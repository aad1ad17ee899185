"""`hcp verify` passes what is right, and fails what is not."""

import jax
import pytest

from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.parallel.peers import Peers
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import DataConfig
from hcp_jax.verify import streams

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("a document of some length, " * 200)
    return TrainConfig(
        model=MODEL,
        parallel=ParallelConfig(cp_outer=4, cp_inner=2, comm_type=["a2a+p2p", "a2a+all_gather"]),
        data=DataConfig(path=str(text)),
        seq_len=96,
    )


def failures(config: TrainConfig) -> list[dict[str, str]]:
    cp = config.parallel.context_parallel(config.model.num_layers)
    return [row.cells for _, rows in streams.checks(config, cp) for row in rows if not row.passed]


@pytest.mark.slow
def test_what_computes_what_one_device_computes_passes(config):
    assert failures(config) == []


@pytest.mark.slow
def test_a_ring_that_does_not_communicate_is_caught_by_every_table(config, monkeypatch):
    monkeypatch.setattr(Peers, "permute", lambda peers, tree, source, scope: tree)
    jax.clear_caches()  # or programs compiled with the ring would still be used
    found = failures(config)
    assert [row for row in found if row.get("comm type") == "a2a+p2p"]
    assert [row for row in found if row.get("") == "loss"]
    assert [row["bytes"] for row in found if row.get("for") == "ring hop"] == ["0", "0"]
    assert not [row for row in found if row.get("comm type") == "a2a+all_gather"]
    jax.clear_caches()


def test_large_models_are_made_narrow_but_keep_what_is_checked():
    wide = TrainConfig(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_heads=32,
            num_kv_heads=8,
        ),
        parallel=ParallelConfig(cp_outer=4, cp_inner=2, comm_type=["p2p"] * 16 + ["a2a"] * 16),
        seq_len=131_072,
    )
    small, cp = streams._reduced(wide, wide.parallel.context_parallel(32))
    assert (small.model.num_heads, small.model.num_kv_heads) == (32, 8)
    assert cp.comm_type == ("p2p", "a2a")
    assert small.model.num_layers == 2
    assert small.seq_len < 300
