"""Training with multi-token prediction has one curve: on one device, on eight, and in groups."""

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
import rich.console

from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import token_arrays
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.dynamic import DynamicProgram
from hcp_jax.train.optimizer import OptimizerConfig, make_optimizer
from hcp_jax.train.step import abstract_state, init_state, make_train_step

STEPS, T = 20, 64
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=3,
    seq_len=T,
    model=ModelConfig(
        vocab_size=264,
        num_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2,
        compute_dtype="float32",
        mtp_depths=2,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=2),
    parallel=ParallelConfig(
        cp_outer=4,
        cp_inner=2,
        dynamic=DynamicConfig(enabled=True, max_tokens_per_device=8, menu=[8, 4]),
    ),
)
LOSSES = "loss", "mtp_loss_1", "mtp_loss_2"


@functools.cache
def corpus():
    """Documents of 1 to 90 bytes: some have no target two places on, and some are cut at T."""
    text, sizes = b"all work and no play makes jack a dull boy. " * 3, [1, 20, 90, 45, 1, 70] * 50
    return data.Corpus([text[i % 40 : i % 40 + n] for i, n in enumerate(sizes)], "a test")


def in_groups():
    """(the losses of each step, the segments of each step)."""
    cp = CONFIG.parallel.context_parallel(1)
    program = DynamicProgram(CONFIG, cp, corpus(), rich.console.Console(file=io.StringIO()))
    optimizer = make_optimizer(CONFIG.optimizer, STEPS)
    beginning = program.data_state()
    planned = iter(program._planned)
    segments = [
        [d for mb in next(planned) for group in mb.documents for d in group] for _ in range(STEPS)
    ]
    program.restore_data(beginning)
    program.compile(abstract_state(CONFIG.model, optimizer, cp))
    state, losses = init_state(CONFIG.model, optimizer, CONFIG.seed, cp), []
    for _ in range(STEPS):
        state, values = program.step(state, program.next_batch())
        losses.append([float(values[name]) for name in LOSSES])
    program.close()
    return np.array(losses), segments


def in_streams(segments, parallel):
    """The losses of each step, its segments in rows of streams."""
    cp = parallel.context_parallel(1, jax.devices()[: parallel.num_devices])
    cut, model = Segments(corpus(), T), CONFIG.model
    step = make_train_step(model, CONFIG.optimizer, STEPS, cp)
    state = init_state(model, make_optimizer(CONFIG.optimizer, STEPS), CONFIG.seed, cp)
    losses = []
    for numbers in segments:
        refs, ids, positions = np.zeros((3, 8, T), np.int64)
        used = [0] * 8
        for number in sorted(numbers, key=lambda n: -cut.sizes[n]):
            size = int(cut.sizes[number])
            row = next(r for r in range(8) if used[r] + size <= T)
            here = slice(used[row], used[row] + size)
            refs[row, here], ids[row, here] = cut.refs(number), number + 1
            positions[row, here] = np.arange(size)
            used[row] += size
        batch = token_arrays(corpus(), refs, 2) | {
            "positions": positions.astype(np.int32),
            "mask": model.mask(ids.astype(np.int32)),
        }
        state, values = step(state, cp.shard_batch(batch))
        losses.append([float(values[name]) for name in LOSSES])
    return np.array(losses)


@pytest.mark.slow
def test_the_curve_is_the_same_on_one_device_on_eight_and_in_groups():
    groups, segments = in_groups()
    sizes = Segments(corpus(), T).sizes
    used = np.concatenate([sizes[numbers] for numbers in segments])
    assert used.min() == 2 < T == used.max()
    eight = dataclasses.replace(CONFIG.parallel, dynamic=DynamicConfig())
    alone = in_streams(segments, ParallelConfig())
    assert (alone[-1] < alone[0] - 1).all()
    np.testing.assert_allclose(in_streams(segments, eight), alone, rtol=0, atol=2e-4)
    np.testing.assert_allclose(groups, alone, rtol=0, atol=2e-4)
