"""`hcp verify` passes groups that are right, and fails those that are not."""

import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
import rich.console

import hcp_jax as hcp
from hcp_jax.compiled.hlo import Collective
from hcp_jax.cost.traffic import RING_HOP
from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.parallel.peers import Peers
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import DataConfig
from hcp_jax.verify import documents, group_traffic, groups
from tests.verify.test_streams import MODEL

MENU = [4, 1]
QUIET = rich.console.Console(file=io.StringIO())


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "text.jsonl"
    lines = ("a document of some length, " * (1 + i * i % 7) for i in range(40))
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    dynamic = DynamicConfig(enabled=True, max_tokens_per_device=16, menu=MENU)
    return TrainConfig(
        model=MODEL,
        parallel=ParallelConfig(
            cp_outer=4, cp_inner=2, comm_type=["a2a+p2p", "p2p"], dynamic=dynamic
        ),
        data=DataConfig(path=str(text)),
        seq_len=64,
    )


def tables(config: TrainConfig) -> list[list[groups.Check]]:
    cp = config.parallel.context_parallel(config.model.num_layers)
    return [list(rows) for _, rows in groups.checks(config, cp, QUIET)]


@pytest.mark.slow
def test_every_program_of_the_menu_computes_what_one_device_computes(config):
    attention, step, traffic = tables(config)
    assert [row for row in attention + step + traffic if not row.passed] == []
    shown = [(row.cells["comm type"], row.cells["widest"]) for row in attention]
    assert sorted(shown) == sorted(itertools.product(("a2a+p2p", "p2p"), map(str, MENU)))
    assert {row.cells["groupings"] for row in attention} == {
        "4×2, 4 + 2×2",  # members of two lanes
        "4×2, 4 + 1×4",
        "1×8",
    }
    assert [row.cells[""] for row in step] == ["loss", "grad norm"]
    # Pairs exchange heads in one layer; alone, devices send nothing.
    moving = [(row.cells["widest"], row.cells["for"]) for row in traffic]
    assert moving == [("4", "ring hop"), ("4", "exchange heads")] * 2


@pytest.mark.slow
def test_hops_that_do_not_communicate_are_caught_by_every_table(config, monkeypatch):
    monkeypatch.setattr(Peers, "permute", lambda peers, tree, source, scope: tree)
    jax.clear_caches()  # or programs compiled with the ring would still be used
    dynamic = dataclasses.replace(config.parallel.dynamic, menu=MENU[:1])
    parallel = dataclasses.replace(config.parallel, comm_type="a2a+p2p", dynamic=dynamic)
    model = dataclasses.replace(MODEL, num_layers=1)
    attention, step, traffic = tables(dataclasses.replace(config, model=model, parallel=parallel))
    assert not any(row.passed for row in attention + step)
    rings = [row for row in traffic if row.cells["for"] == RING_HOP.replace("_", " ")]
    assert [(row.cells["bytes"], row.passed) for row in rings] == [("0", False)] * 2
    assert all(row.passed for row in traffic if row.cells["for"] == "exchange heads")
    jax.clear_caches()


def collective(kind, devices, pairs=(), size=10, count=3) -> Collective:
    return Collective(kind, size, count, devices, pairs, "", "", "", False, ())


def test_a_collective_that_leaves_its_group_is_a_stray_wherever_the_mesh_puts_its_devices():
    mesh = hcp.make_mesh(dp=2, tp=2, cp_inner=2)
    cp = hcp.ContextParallel(mesh, "p2p", widest_group=2)
    # In a program, tp varies more slowly than cp: the first block is devices 0, 1 and 2, 3.
    inside = collective("collective-permute", ((0, 1), (2, 3)), ((0, 1), (1, 0), (2, 3), (3, 2)))
    across = collective("collective-permute", ((1, 4),), ((1, 4), (4, 1)))
    across_tp = collective("all-to-all", ((0, 2), (1, 3)))
    assert group_traffic.count_strays([inside], cp) == 0
    assert (
        group_traffic.count_strays([inside, across], cp)
        == group_traffic.count_strays([across_tp], cp)
        == 3
    )
    assert group_traffic.moved_bytes([inside, across], cp).tolist() == [30, 60, 30, 30, 30, 0, 0, 0]
    assert group_traffic.moved_bytes([across_tp], cp).tolist() == [30] * 4 + [0] * 4
    kv_bytes = 2 * 8 * MODEL.num_kv_heads // 2 * MODEL.head_dim * 4
    assert group_traffic.needed_bytes(MODEL, cp, 8)["ring_hop"] == MODEL.num_layers * kv_bytes


def test_groups_that_cannot_have_a_comm_type_are_told_before_anything_compiles(config):
    dynamic = dataclasses.replace(config.parallel.dynamic, menu=[8])
    a2a = dataclasses.replace(config.parallel, comm_type="a2a", dynamic=dynamic)
    with pytest.raises(NotImplementedError, match="'a2a' keeps a document on devices"):
        tables(dataclasses.replace(config, parallel=a2a))


@pytest.mark.parametrize(
    ("grouping", "lanes"), [((8,), 2), ((4, 4), 4), ((4, 2, 2), 1), ((1,) * 8, 1)]
)
def test_random_documents_fill_one_group_and_leave_one_of_several_empty(grouping, lanes):
    held = documents.random_documents(grouping, lanes, 31, np.random.default_rng(0))
    numbers = [d for group in held.microbatch.documents for d in group]
    assert numbers == list(range(held.lengths.size))
    tokens = [int(held.lengths[list(group)].sum()) for group in held.microbatch.documents]
    assert tokens[grouping.index(max(grouping))] == 31 * max(grouping)
    assert tokens.count(0) == (len(grouping) > 1)
    packed, places = held.packed(31)
    assert sorted(places[places >= 0]) == list(range(sum(tokens)))
    assert np.array_equal(places < 0, packed.document < 0)
