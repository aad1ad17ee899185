"""Print the table of docs/pipeline.md, and draw its picture: modelled schedules, no jax.

    python benchmarks/pipeline_bubbles.py [--devices 16] [--plot docs/pipeline.png]

Documents of a step are scheduled by `hcp.dynamic.schedule`; the seconds of its microbatches are
those of its cost model. The table says how long the ticks of a step take, over the time of stages
that never wait.
"""

import argparse

import numpy as np

from hcp_jax.dynamic import schedule
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
    print("| lengths | microbatches | pp | in order | two chunks | in random order |")
    print("|---|---|---|---|---|---|")
    for spec, tokens in DISTRIBUTIONS.items():
        for number in (12, 28, 60):
            plan = planned(spec, tokens, args.devices, number)
            times = np.array(plan.microbatch_seconds)
            for pp in (2, 4, 8):
                shuffled = np.random.default_rng(0).permutation(times)
                drawn = seconds(make_schedule(times.size, pp), shuffled / 3, shuffled * (2 / 3))
                cells = (
                    ratio_to_ideal(times, pp),
                    ratio_to_ideal(times, pp, 2),
                    drawn / times.sum(),
                )
                print(
                    f"| {spec} | {times.size} | {pp} |", " | ".join(f"{x:.2f}" for x in cells), "|"
                )
    if args.plot:
        picture(args.plot)


def planned(spec: str, tokens: int, devices: int, number: int):
    """Return a schedule of about `number` microbatches."""
    documents = round(number * devices * tokens * 0.97 / mean_length(spec))
    return schedule(draw_lengths(spec, max(1, documents), 0), devices, tokens)


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
