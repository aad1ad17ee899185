"""Print the table of docs/pipeline.md, and draw its picture: modelled schedules, no jax.

    python benchmarks/pipeline_bubbles.py [--devices 16] [--plot docs/pipeline.png]

Documents of a step are scheduled by `hcp.dynamic.schedule`; the seconds of its microbatches are
those of its cost model. The table says how long the ticks of a step take, over the time of stages
that never wait: in order of length, with two chunks a stage, in random order; scheduled for the
stages (`num_stages`); and, with two chunks, as the reference aligns: it splits microbatches of its
own schedule until their number is a multiple of pp, and fails if none can be split.
"""

import argparse

import numpy as np

from hcp_jax.dynamic import schedule
from hcp_jax.dynamic.baselines import seeded_greedy
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.lengths import draw_lengths, mean_length
from hcp_jax.dynamic.pipeline import make_schedule, order, ratio_to_ideal, seconds
from hcp_jax.sequence import groupings

DISTRIBUTIONS = {
    "lognormal:mean=1024,sigma=1.5,min=128,max=8192": 2048,
    "lognormal:mean=3000,sigma=1.8,min=16,max=32768": 8192,
    "mix:0.90@2048,0.09@32768,0.01@262144": 65536,
}


def main() -> None:
    """Print the table as Markdown; draw the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--devices", type=int, default=16, help="devices of a stage (dp * cp)")
    parser.add_argument("--plot", help="file for a picture of the ticks")
    args = parser.parse_args()
    head = "lengths | microbatches | pp | in order | two chunks | in random order | for stages"
    print(f"| {head} | reference, two chunks |")
    print("|---|---|---|---|---|---|---|---|")
    for spec, tokens in DISTRIBUTIONS.items():
        for number in (12, 28, 60):
            plan = planned(spec, tokens, args.devices, number)
            times = np.array(plan.microbatch_seconds)
            for pp in (2, 4, 8):
                shuffled = np.random.default_rng(0).permutation(times)
                drawn = seconds(make_schedule(times.size, pp), shuffled / 3, shuffled * (2 / 3))
                known = np.array(planned(spec, tokens, args.devices, number, pp).microbatch_seconds)
                cells = (
                    ratio_to_ideal(times, pp),
                    ratio_to_ideal(times, pp, 2),
                    drawn / times.sum(),
                    ratio_to_ideal(known, pp) * known.sum() / times.sum(),
                )
                text = " | ".join([*(f"{x:.2f}" for x in cells), aligned(plan, pp)])
                print(f"| {spec} | {times.size} | {pp} | {text} |", flush=True)
    if args.plot:
        picture(args.plot)


def planned(spec: str, tokens: int, devices: int, number: int, pp: int = 1):
    """Return a schedule of about `number` microbatches."""
    documents = round(number * devices * tokens * 0.97 / mean_length(spec))
    drawn = draw_lengths(spec, max(1, documents), 0)
    return schedule(drawn, devices, tokens, num_stages=pp)


def aligned(plan, pp: int) -> str:
    """Return the time of the reference's microbatches in their own order, over that unaligned.

    The fullest microbatch that has documents for two is split first: its groups stay, and each
    deals its documents to both. Every group must keep one, as the reference needs.
    """
    made = seeded_greedy(plan.lengths, plan.num_devices, plan.max_tokens_per_device, Cost())
    left = [(mb.grouping, [list(g) for g in mb.documents]) for mb in made.microbatches]
    while len(left) % pp:
        able = [i for i, (_, groups) in enumerate(left) if min(map(len, groups)) > 1]
        if not able:
            return f"{len(made.microbatches)}: fails"
        grouping, groups = left.pop(max(able, key=lambda i: sum(map(len, left[i][1]))))
        left += [(grouping, [g[half::2] for g in groups]) for half in range(2)]
    times = np.array(
        [
            made.cost.microbatch_seconds(
                grouping,
                [[plan.lengths[d] for d in group] for group in groups],
                plan.max_tokens_per_device,
            )
            for grouping, groups in left
        ]
    )
    took = seconds(make_schedule(times.size, pp, 2), times / 3, times * (2 / 3))
    return f"{len(made.microbatches)} to {times.size}: {took / made.modelled_seconds:.2f}"


def picture(path: str) -> None:
    """Draw the ticks of a step on four stages of eight devices."""
    from hcp_jax import viz

    plan = planned("mix:0.90@2048,0.09@32768,0.01@65536", 8192, 8, 10)
    times = np.array(plan.microbatch_seconds)
    chosen = order(times, 4)
    names = [groupings.describe(plan.microbatches[i].grouping) for i in chosen]
    viz.draw_ticks(make_schedule(times.size, 4), times[chosen], names).savefig(path)


if __name__ == "__main__":
    main()
