"""How work is divided among multiprocessors: nothing twice, nothing left out, and evenly."""

import heapq

import jax.numpy as jnp
import numpy as np
import pytest

from hcp_jax import hardware
from hcp_jax.kernels import tiles
from hcp_jax.kernels.triton_call import Grid
from hcp_jax.kernels.work_split import (
    EVEN,
    WorkSplit,
    are_few,
    busiest_over_mean,
    cuts_for,
    part_of,
    parts_for,
    usual_steps,
)

H200 = tiles.processors("NVIDIA H200")


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("blocks", "heads", "programs"), [(7, 6, 4), (9, 32, 132), (5, 1, 5)])
def test_every_part_of_every_item_is_done_once(blocks, heads, rows, programs, parts):
    done = _dealt(WorkSplit(blocks, heads, rows, programs, parts))
    assert len(done) == programs
    done = [item for items in done for item in items]
    expected = {
        (i, p, n, b)
        for i in range(blocks)
        for p in range(parts)
        for n in range(heads)
        for b in range(rows)
    }
    assert len(done) == len(expected)
    assert set(done) == expected


@pytest.mark.parametrize(
    "grid",
    [
        Grid(7, 3, 2, 1, 1, few=False),
        Grid(7, 3, 2, 1, 1, few=True),
        Grid(7, 3, 2, 1, 4, few=True),
        Grid(7, 3, 2, 4, 2, few=True),
    ],
)
def test_every_program_of_a_grid_has_an_item_of_its_own(grid):
    items = {tuple(map(int, grid.item(*map(jnp.int32, at)))) for at in np.ndindex(grid.shape)}
    assert len(items) == np.prod(grid.shape) == 7 * grid.heads * 2 * grid.parts
    assert np.max(list(items), axis=0).tolist() == [6, grid.parts - 1, grid.heads - 1, 1]
    heads = [int(grid.whole_head(jnp.int32(head))) for head in range(grid.heads)]
    assert heads == np.repeat(range(3), grid.head_parts).tolist()


def _dealt(split: WorkSplit):
    """The items of each program: all programs and rounds are asked at once."""
    program = np.arange(split.programs, dtype=np.int32)
    rounds = np.asarray(split.rounds(jnp.asarray(program)))
    turn = np.arange(rounds.max(), dtype=np.int32)
    grid = np.meshgrid(program, turn, indexing="ij")
    fields = [np.broadcast_to(x, grid[0].shape) for x in split.item(*map(jnp.asarray, grid))]
    return [
        [tuple(int(x[p, t]) for x in fields) for t in range(rounds[p])] for p in range(len(program))
    ]


def _steps(item_steps, parts: int):
    """Steps of each part of each block, `[blocks, parts]`."""
    begin, stop = part_of(item_steps[:, None], np.arange(parts), parts)
    return np.broadcast_to(stop - begin, (len(item_steps), parts))


@pytest.mark.parametrize("parts", [1, 2, 5, 32])
def test_parts_have_each_step_once_in_order(parts):
    for steps in (0, 1, 4, 33, 1000):
        bounds = [part_of(jnp.int32(steps), jnp.int32(part), parts) for part in range(parts)]
        assert [int(begin) for begin, _ in bounds] == [0, *(int(stop) for _, stop in bounds[:-1])]
        assert int(bounds[-1][1]) == steps
        assert [part_of(steps, part, parts) for part in range(parts)] == bounds
        sizes = [int(stop) - int(begin) for begin, stop in bounds]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("blocks", "kv_heads"), [(16, 1), (20, 2), (64, 8)])
def test_what_is_counted_is_what_is_dealt(blocks, kv_heads):
    split = WorkSplit.over_processors(blocks, kv_heads, 1, blocks * 8, H200)
    dealt = _dealt(split)
    for item_steps in usual_steps(blocks, blocks * 8).values():
        steps = _steps(item_steps, split.parts)
        assert steps.sum() == item_steps.sum()
        busiest = max(sum(steps[rank, part] for rank, part, _, _ in items) for items in dealt)
        got = busiest_over_mean(item_steps, kv_heads, split.parts, H200)
        assert got == pytest.approx(busiest * H200 / (steps.sum() * kv_heads))


def _queued(item_steps, grid: Grid) -> float:
    """As `busiest_over_mean`, if each processor takes the next program when it is free."""
    steps = _steps(item_steps, grid.parts)
    if grid.few:
        assert grid.shape == (grid.heads * grid.parts, len(item_steps), 1)
        programs = np.tile(steps[:, None], (1, grid.heads, 1)).reshape(-1)
    else:
        assert grid.shape == (len(item_steps), grid.heads, 1)
        programs = np.tile(item_steps, grid.heads)
    busy = [0] * H200
    for steps in programs.tolist():
        heapq.heapreplace(busy, busy[0] + steps)
    return max(busy) * H200 / programs.sum()


# Blocks of 128 tokens on a device, from 2K on; 17 to 19 of one or two heads divide badly (1.14).
BLOCKS = [16, *range(20, 100), *range(100, 260, 3)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_gradients_of_keys_and_values_are_shared_evenly(kv_heads):
    """Steps of the busiest multiprocessor over the mean, with the tiles of head size 128.

    Four query heads read each kv head, as in Llama 3. Hardware that deals Triton's parts has no
    plan: seven of these lengths, with one kv head, are between 1.1 and 1.16.
    """
    tile = tiles.mosaic_tiles_for("NVIDIA H200", 128).dkv
    on_triton = tiles.tiles_for("NVIDIA H200", "bfloat16", 128, 128).dkv
    assert (tile.block_q, tile.block_k) == (on_triton.block_q, on_triton.block_k) == (64, 128)
    above = 0
    for blocks in BLOCKS:
        most = blocks * (tile.block_k // tile.block_q) * 4
        parts = WorkSplit.over_processors(blocks, kv_heads, 1, most, H200).parts
        assert parts == parts_for(blocks, kv_heads, most, H200)
        for mask, item_steps in usual_steps(blocks, most).items():
            dealt = busiest_over_mean(item_steps, kv_heads, parts, H200)
            assert dealt < EVEN, ("mosaic", blocks, mask, parts)
        cuts = cuts_for(blocks, kv_heads, 4, most // 4, H200)
        grid = Grid(blocks, kv_heads, 1, *cuts, are_few(blocks * kv_heads, H200))
        for mask, item_steps in usual_steps(blocks, most // 4).items():
            found = _queued(item_steps, grid)
            above += found > EVEN + 1e-9
            assert found < 1.16, ("triton", blocks, mask, cuts)
    assert above <= (9 if kv_heads == 1 else 0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_outputs_and_gradients_of_queries_are_shared_evenly(kv_heads):
    """Within two steps where that is more: at 2K a processor has four or five of them."""
    heads = kv_heads * 4
    for blocks in BLOCKS:
        parts = WorkSplit.over_processors(blocks, heads, 1, blocks, H200).parts
        for mask, item_steps in usual_steps(blocks, blocks).items():
            mean = item_steps.sum() * heads / H200
            busiest = busiest_over_mean(item_steps, heads, parts, H200) * mean
            assert busiest <= max(EVEN * mean, np.ceil(mean) + 2), (blocks, mask, parts)


def test_work_that_is_even_is_not_cut():
    assert parts_for(blocks=1024, copies=8, steps=8192, processors=132) == 1
    assert parts_for(blocks=64, copies=4, steps=512, processors=132) == 1
    assert WorkSplit.over_processors(64, 4, 1, 512, 132) == WorkSplit(64, 4, 1, 132)


def test_long_sequences_of_many_heads_share_causal_work_within_a_hundredth():
    for tokens, heads in ((4096, 32), (16384, 16), (131072, 2)):
        split = WorkSplit(tokens // 128, heads, 1, 132)
        work = [sum(split.blocks - rank for rank, *_ in items) for items in _dealt(split)]
        assert max(work) <= 1.01 * np.mean(work)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_the_kernels_and_the_planner_count_the_same_multiprocessors(name):
    gpu = hardware.gpu(name)
    assert tiles.processors(gpu.device_kind) == gpu.core_count
