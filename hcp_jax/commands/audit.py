"""Run `hcp audit`: compile a run for a cluster that is not available, and report on the program.

hcp audit configs/llama3-8b-1m.yaml --gpu h200 --hosts 8 --gpus-per-host 8
hcp audit configs/llama3-8b-1m.yaml --gpu h200 --hosts 8 --gpus-per-host 8 --attention --json -
"""

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from hcp_jax.base import arguments, tables, terminal
from hcp_jax.commands.arguments import add_cluster_arguments, add_json_argument, cluster
from hcp_jax.train import config as configuration

if TYPE_CHECKING:
    from hcp_jax.compiled.report import Audit
    from hcp_jax.planner.audit_tick import StepInTicks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp audit`."""
    configuration.add_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument(
        "--attention",
        action="store_true",
        help="one layer's attention, forward and backward, instead of the whole training step (or "
        "a pipeline's tick)",
    )
    parser.add_argument(
        "--widest-group",
        type=arguments.whole(),
        metavar="DEVICES",
        help="dynamic CP's program for groups of up to so many devices; each device has its share "
        "of seq_len as slots",
    )
    parser.add_argument(
        "--xla-flag",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an XLA flag to set besides (or in place of) the library's own; may be repeated",
    )
    parser.add_argument("--no-flags", action="store_true", help="leave the library's flags out")
    add_json_argument(parser)
    parser.add_argument(
        "--picture",
        type=arguments.output(".png", ".svg"),
        metavar="FILE",
        help="draw the schedule there (.png or .svg)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp audit`; return the exit code."""
    from hcp_jax.planner.audit import audit_attention, chosen_flags, place
    from hcp_jax.planner.audit_tick import audit_run, step_in_ticks

    config = configuration.from_arguments(args)
    if config.parallel.dynamic.enabled and not args.widest_group:
        raise NotImplementedError(
            "hcp audit compiles one program, and parallel.dynamic has one for each widest group: "
            "name one with --widest-group, or give --parallel.dynamic.enabled false."
        )
    on = cluster(args)
    flags = chosen_flags(on, args.xla_flag, library=not args.no_flags)
    cp = place(config, on)
    if args.widest_group:
        cp = dataclasses.replace(cp, widest_group=args.widest_group)
    what, step = "step", None
    if args.attention:
        what = "attention"
        rows = max(cp.axis_size(cp.dp), config.batch_size // config.accumulation)
        found = audit_attention(cp, on, config.model, config.seq_len, rows, flags)
    else:
        found = audit_run(cp, on, config, flags)
        if config.parallel.pp > 1:
            what = "tick"
            # Of dynamic context parallelism, only the schedule knows the microbatches of a step.
            step = None if args.widest_group else step_in_ticks(config, found)
    if args.picture:
        from hcp_jax import viz

        drawn = viz.draw_timeline(found.schedule, title(found, what))
        drawn.savefig(args.picture, dpi=130)
    told = {"flags": flags, "program": what} | found.to_json()
    if step is not None:
        told["step"] = step._asdict()
    text = json.dumps(told, indent=2)
    if args.json == "-":
        terminal.say(text)
        return 0
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    tell(found, flags, what, step)
    return 0


_TITLES = {
    "step": "training step",
    "attention": "attention of one layer, forward and backward",
    "tick": "tick of a pipeline, forward and backward,",
}


def title(found: "Audit", what: str) -> str:
    """Return one line that says what was compiled."""
    return f"{_TITLES[what]} on {found.cluster}"


def tell(found: "Audit", flags: dict[str, Any], what: str, step: "StepInTicks | None") -> None:
    """Print the audit: memory, collectives, times, advice.

    Args:
        found: the audit.
        flags: XLA flags that the program was compiled with.
        what: "step", "attention" or "tick".
        step: a step of ticks like this one; None if there is none, or it is not known.
    """
    from hcp_jax.planner.audit import advice, duration

    console = tables.console()
    console.print(f"{title(found, what)}; compiled in {found.compile_s:.0f} s")
    for name, value in flags.items():
        console.print(f"  --{name}={str(value).lower()}")
    gib = {name: size / 2**30 for name, size in found.to_json()["memory"].items()}
    console.print(
        f"memory per GPU   {gib['peak_bytes']:.2f} of {gib['device_bytes']:.0f} GiB: arguments "
        f"{gib['argument_bytes']:.2f}, outputs {gib['output_bytes']:.2f} ({gib['alias_bytes']:.2f}"
        f" of them in place), temporaries {gib['temp_bytes']:.2f}"
        + (f", moments besides {gib['beside_bytes']:.2f}" if found.memory.beside_bytes else "")
    )
    if found.memory.host_bytes:
        console.print(f"offloaded        {gib['host_bytes']:.2f} GiB to the host's memory, per GPU")
    console.print(f"ring hops        {found.ring_hops_hidden} of {found.ring_hops} hidden")
    if found.sends:
        console.print(f"sends to stages  {found.sends_hidden} of {found.sends} hidden")
    rows = []
    for moved in found.collectives:
        name = f"{moved.what}: {moved.kind}" if moved.what else moved.kind
        hidden = ", ".join(moved.behind) if moved.hidden else f"exposed {duration(moved.exposed_s)}"
        size, count = f"{moved.bytes / 2**20:.1f}", str(moved.count)
        axes = " x ".join(moved.axes) or "-"
        rows.append((name, axes, moved.link, size, count, duration(moved.seconds), hidden))
    headings = ("collective", "over", "link", "MiB", "count", "seconds", "hidden behind")
    left = ("collective", "over", "link", "hidden behind")
    console.print()
    tables.show(console, headings, rows, left=left, drop=("link", "count", "over", "seconds"))
    console.print()
    compute = found.schedule.compute_s
    program = "tick" if what == "tick" else "step"
    console.print(
        f"modelled         {program} {duration(found.schedule.step_s)} = attention "
        f"{duration(compute['attention'])} + products {duration(compute['product'])} + other "
        f"{duration(compute['other'])} + waiting {duration(found.schedule.exposed_s)}; "
        f"bound by {_bound(found)}"
    )
    if what == "tick" and step is None:
        console.print("a step           has as many ticks as the schedule of its documents needs")
    if step is not None:
        console.print(
            f"a step           {step.microbatches} microbatches in {step.ticks} ticks: "
            f"{step.forward} forward, {step.both} with both passes as this one, {step.backward} "
            f"backward; they take {step.ticks_of_time:g} times as long, "
            f"{duration(step.modelled_s)}, before the update"
        )
    for line in advice(found, flags, program):
        console.print(f"- {line}")


def _bound(found: "Audit") -> str:
    parts = dict(found.schedule.compute_s) | {"waiting": found.schedule.exposed_s}
    names = {"attention": "attention", "product": "matrix products", "other": "memory bandwidth"}
    most = max(parts, key=lambda part: parts[part])
    return names.get(most, "communication")
