"""Train one model on the same documents in three ways, and draw the three curves.

    python benchmarks/dynamic_convergence.py --steps 300 --seeds 0 1 --plot docs/dynamic-curves.png

On 16 devices, with documents of up to 1024 tokens and buffers of 64 tokens a device in dynamic CP
(the longest document needs all 16):

    padded      cp 16, a row of 1024 tokens for each document (bshd)
    packed      cp 16, documents side by side in rows of 1024 tokens (thd)
    dynamic     each microbatch with its own groups of up to 16 devices

The three see the same documents in every step, and start from the same parameters, so they differ
in rounding only. With `--experts` the second layer has 8 experts, 2 for each token, cut over 4
devices; their load-balance loss has no weight, since its shares are those of a microbatch, which
the three cut differently. A seed decides the parameters and the documents. Each step is a line of
JSON in `--out`, so that a picture can be drawn of what there is (`--steps 0`).
"""

import argparse
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hcp_jax.cli import set_up_platform

LONGEST, TOKENS, DEVICES = 1024, 64, 16
ROWS = 8  # the most documents of a step
WAYS = ("padded", "packed", "dynamic")


def main() -> None:
    """Train, write each step's losses, print how far apart the curves are, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("curves.jsonl"))
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts")
    args = parser.parse_args()
    if args.steps:
        set_up_platform(DEVICES)
        with args.out.open("w") as out:
            for seed in args.seeds:
                for step, losses in enumerate(curves(seed, args.steps, args.experts)):
                    out.write(json.dumps({"seed": seed, "step": step, **losses}) + "\n")
                    out.flush()
    found = [json.loads(line) for line in args.out.read_text().splitlines()]
    report(found)
    if args.plot:
        draw(found, args.plot)


def curves(seed: int, steps: int, experts: bool = False) -> Iterator[dict[str, float | str]]:
    """Yield the losses of each step of the three ways."""
    import jax
    import jax.numpy as jnp
    import rich.console

    from hcp_jax.train import data
    from hcp_jax.train.dynamic import DynamicProgram
    from hcp_jax.train.optimizer import make_optimizer
    from hcp_jax.train.step import abstract_state, init_state, make_train_step

    config = make_config(seed, steps, experts)
    cp = config.parallel.context_parallel(config.model.num_layers)
    corpus = data.Corpus(texts(seed), "files of the standard library, cut at random lengths")
    program = DynamicProgram(config, cp, corpus, rich.console.Console(file=io.StringIO()))
    optimizer = make_optimizer(config.optimizer, config.steps)
    program.compile(abstract_state(config.model, optimizer, cp))
    fixed = make_train_step(config.model, config.optimizer, config.steps, cp)
    initial = init_state(config.model, optimizer, seed, cp)
    states = {way: jax.tree.map(jnp.copy, initial) for way in WAYS}
    segments = program._text.segments
    for planned in program._planned:
        documents = [d for mb in planned for group in mb.documents for d in group]
        metrics: dict[str, Any] = {}
        states["dynamic"], metrics["dynamic"] = program.step(
            states["dynamic"], program.next_batch()
        )
        for way in WAYS[:2]:
            held = (
                packed(documents, segments.sizes) if way == "packed" else [[d] for d in documents]
            )
            batch = rows_of(held, segments, corpus, config.model)
            states[way], metrics[way] = fixed(states[way], cp.shard_batch(batch))
        assert len({float(m["tokens"]) for m in metrics.values()}) == 1, "not the same documents"
        yield {way: float(metrics[way]["loss"]) for way in WAYS} | {
            "grouping": str([mb.grouping for mb in planned])
        }
        steps -= 1
        if not steps:
            break
    program.close()


def make_config(seed: int, steps: int, experts: bool) -> Any:
    """Return the run: 2 layers, 64 wide, the second perhaps with experts, on 4 × 4 devices."""
    from hcp_jax.dynamic.config import DynamicConfig
    from hcp_jax.models.config import ModelConfig
    from hcp_jax.models.moe_config import MoEConfig
    from hcp_jax.parallel.config import ParallelConfig
    from hcp_jax.train.config import TrainConfig
    from hcp_jax.train.sections import OptimizerConfig

    moe = MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        router_aux_loss_coef=0.0,
        decoder_sparse_step=2,
    )
    model = ModelConfig(
        vocab_size=264,
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=4,
        compute_dtype="float32",
        remat="none",
        moe=moe if experts else None,
    )
    groups = DynamicConfig(
        enabled=True, max_tokens_per_device=TOKENS, menu=[4, 8, 16], min_cp_size=4, lookahead=1
    )
    return TrainConfig(
        steps=max(1, steps),
        batch_size=2,
        seq_len=LONGEST,
        seed=seed,
        model=model,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
        parallel=ParallelConfig(cp_outer=4, cp_inner=4, ep=4 if experts else 1, dynamic=groups),
    )


def texts(seed: int) -> list[bytes]:
    """Return documents of 256 to 1023 bytes, so that a step has at most `ROWS` of them."""
    import sysconfig

    rng = np.random.default_rng(seed)
    whole = b"".join(
        path.read_bytes()
        for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    )
    lengths = np.clip(rng.lognormal(6.1, 0.6, 1500), LONGEST // 4, LONGEST - 1).astype(int)
    begins = rng.integers(0, len(whole) - LONGEST, lengths.size)
    return [whole[b : b + n] for b, n in zip(begins, lengths, strict=True)]


def packed(documents: Sequence[int], sizes: np.ndarray) -> list[list[int]]:
    """Return rows of documents: each goes into the first row with room, the longest first."""
    rows: list[list[int]] = []
    for document in sorted(documents, key=lambda d: -sizes[d]):
        room = [row for row in rows if sizes[row].sum() + sizes[document] <= LONGEST]
        if not room:
            rows.append([])
        (room or rows[-1:])[0].append(document)
    return rows


def rows_of(rows: Sequence[Sequence[int]], segments: Any, corpus: Any, model: Any) -> Any:
    """Return a batch of rows of documents, and empty rows up to a multiple of `ROWS` / 2."""
    number = ROWS // 2 if len(rows) <= ROWS // 2 else ROWS
    refs, ids, positions = np.zeros((3, number, LONGEST), np.int64)
    for row, held in enumerate(rows):
        at = 0
        for name, document in enumerate(held, 1):
            here = slice(at, at := at + int(segments.sizes[document]))
            refs[row, here], ids[row, here] = segments.refs(document), name
            positions[row, here] = np.arange(segments.sizes[document])
    return {
        "tokens": corpus.tokens_at(refs),
        "targets": corpus.targets_at(refs),
        "positions": positions.astype(np.int32),
        "weights": (ids > 0).astype(np.float32),
        "mask": model.mask(ids.astype(np.int32)),
    }


def report(found: Sequence[dict[str, Any]]) -> None:
    """Print the last losses of each way, and how far the ways and the seeds are apart."""
    seeds = sorted({line["seed"] for line in found})
    last = {}
    for seed in seeds:
        losses = np.array([[line[way] for way in WAYS] for line in found if line["seed"] == seed])
        last[seed] = losses[-50:].mean(axis=0)
        apart = np.abs(losses - losses[:, -1:]).max(axis=0)
        ends = ", ".join(f"{way} {x:.4f}" for way, x in zip(WAYS, last[seed], strict=True))
        print(
            f"seed {seed}, {len(losses)} steps: mean loss of the last 50: {ends}; furthest from "
            f"dynamic in any step: padded {apart[0]:.1e}, packed {apart[1]:.1e}"
        )
    if len(seeds) > 1:
        print(f"between seeds: {abs(last[seeds[0]] - last[seeds[1]]).max():.4f}")


def draw(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the curves, and below how far they are from dynamic CP."""
    from matplotlib.figure import Figure

    seeds = sorted({line["seed"] for line in found})
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid: Any = figure.subplots(2, len(seeds), squeeze=False, sharex=True, sharey="row")
    styles = dict(zip(WAYS, ("-", "--", ":"), strict=True))
    for column, seed in enumerate(seeds):
        lines = [line for line in found if line["seed"] == seed]
        top, bottom = grid[0, column], grid[1, column]
        for way in WAYS:
            losses = [line[way] for line in lines]
            top.plot(losses, styles[way], label=way, linewidth=2 if way == "padded" else 1.2)
        for way, colour in (("padded", "C0"), ("packed", "C1")):
            apart = [abs(line[way] - line["dynamic"]) for line in lines]
            bottom.semilogy(np.maximum(apart, 1e-8), colour, label=f"{way} - dynamic", linewidth=1)
        top.set_title(f"seed {seed}")
        bottom.set_xlabel("step")
        top.legend(frameon=False)
        bottom.legend(frameon=False)
    grid[0, 0].set_ylabel("loss, nats per byte")
    grid[1, 0].set_ylabel("difference of the losses")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
