"""Run `hcp verify`: check, on the available devices, that a mesh computes the same as one device.

It prints tables of three comparisons: attention against dense attention in float64, a training step
against the same step on one device, and the bytes that the compiled programs move against those
that the algorithm must move. `streams.py` does this for streams that are cut over the mesh,
`groups.py` for documents on groups of devices (`parallel.dynamic`).

Sequences are short and large models are narrowed; heads, masks, comm types and mesh are kept. The
mathematics does not depend on the rest.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hcp_jax import program_cache
from hcp_jax.base import tables, terminal
from hcp_jax.train import config as configuration
from hcp_jax.train.config import TrainConfig

if TYPE_CHECKING:
    from hcp_jax.verify.measures import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp verify`."""
    configuration.add_arguments(parser)
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="check the GPU kernels on this GPU instead, and keep the verdict: attention takes "
        "Mosaic's, and experts take Triton's, only where they passed",
    )


def num_devices(args: argparse.Namespace) -> int:
    """Return the number of devices to simulate if there is no GPU."""
    return 1 if args.kernels else _config(args).parallel.num_devices


def keep_programs(args: argparse.Namespace) -> None:
    """Keep compiled programs for the next start, unless the config says not to."""
    if not args.kernels and _config(args).program_cache:
        program_cache.turn_on()


def run(args: argparse.Namespace) -> int:
    """Run `hcp verify`; return 0, or 1 if a check failed."""
    from hcp_jax.verify import groups, streams

    if args.kernels:
        if args.config is not None:
            raise ValueError(
                "--kernels checks the GPU kernels, whatever the config: leave out "
                f"{args.config}, or leave out --kernels to check the config."
            )
        return _check_kernels()
    config = _config(args)
    console = tables.console()
    cp = config.parallel.context_parallel(config.model.num_layers)
    console.print(cp.describe())
    checked: Iterable[tuple[str, Iterator[Check]]]
    if config.parallel.dynamic.enabled:
        checked = groups.checks(config, cp, console)
    else:
        checked = streams.checks(config, cp)
    total = failed = 0
    for title, checks in checked:
        rows = list(checks)
        total += len(rows)
        failed += sum(not check.passed for check in rows)
        if rows:
            headings = (*rows[0].cells, "")
            cells = [(*check.cells.values(), "ok" if check.passed else "FAILED") for check in rows]
            console.print()
            tables.show(console, headings, cells, left=headings, title=title)
    console.print()
    if failed:
        console.print(f"{failed} of {total} checks FAILED")
        return 1
    console.print(f"all {total} checks passed: this computes what one device computes")
    return 0


def _check_kernels() -> int:
    """Check the kernels of attention and of experts that this GPU supports; return 1 on failure."""
    import jax

    from hcp_jax.kernels import core, trust

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(
            f"--kernels checks kernels on a GPU, and this is {device.device_kind!r}. Without one, "
            "they run in interpreters: `pytest tests/kernels`."
        )
    problem = core.Problem("bfloat16", 8, 2, 128, 128, "gpu", device.device_kind)
    passed = True
    for name in ("mosaic", "triton", trust.EXPERT_PRODUCT):
        why = None if name == trust.EXPERT_PRODUCT else core.unsupported(name, problem)
        if why is not None:
            terminal.say(f"{name}: not checked: {why}")
            continue
        verdict = trust.check(name, device.device_kind)
        passed &= verdict.passed
        terminal.say(f"{name}: {'ok' if verdict.passed else 'FAILED'}: {verdict.reason}")
    return 0 if passed else 1


def _config(args: argparse.Namespace) -> TrainConfig:
    config = configuration.from_arguments(args)
    if config.parallel.num_devices == 1:
        where = (
            "no config is given, and the default" if args.config is None else f"{args.config}: the"
        )
        raise ValueError(
            f"{where} mesh has one device: there is nothing to compare one device with. Name a "
            "config, such as configs/quickstart.yaml, or sizes, such as --parallel.cp_inner 4."
        )
    return config
