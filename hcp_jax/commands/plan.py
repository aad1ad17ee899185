"""`hcp plan`: which split of a cluster trains a model on a length of sequence fastest, and why.

    hcp plan --model llama3-8b --seq-len 1048576 --gpu h200 --hosts 8 --gpus-per-host 8
    hcp plan --model llama3-8b --seq-len 131072 --gpu h100 --hosts 4 --verify 3 --write best.yaml

`search.py` ranks; `--verify` compiles the best few for that cluster and puts compiled memory in
place of modelled; `--write` makes a config of the winner for `hcp train`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from hcp_jax import hardware
from hcp_jax.commands.arguments import add_cluster_arguments
from hcp_jax.cost.models import MODELS, model_fields
from hcp_jax.planner.candidate import Candidate
from hcp_jax.planner.search import Plan, plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp plan`."""
    parser.add_argument(
        "--model", required=True, help=f"one of {', '.join(MODELS)}, or a config's path"
    )
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a stream")
    parser.add_argument(
        "--batch", type=int, help="streams per step; one per dp replica if not given"
    )
    add_cluster_arguments(parser)
    parser.add_argument("--implementation", default="triton", help="of the attention core (triton)")
    parser.add_argument("--top", type=int, default=10, help="how many splits to show (10)")
    parser.add_argument(
        "--verify", type=int, default=0, metavar="K", help="compile the best K for their memory"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - for the screen")
    parser.add_argument("--write", metavar="FILE", help="write the best as a config for hcp train")


def run(args: argparse.Namespace) -> int:
    """Runs `hcp plan`; returns the exit code."""
    model = _model(args.model)
    found = plan(
        args.model if model is None else model,
        args.seq_len,
        gpu=args.gpu,
        hosts=args.hosts,
        gpus_per_host=args.gpus_per_host,
        batch=args.batch,
        implementation=args.implementation,
    )
    if args.verify:
        found = verify(found, _config_fields(args.model, model), args.verify)
    if args.write:
        text = config_text(found, _config_fields(args.model, model))
        pathlib.Path(args.write).write_text(text)
    text = json.dumps(found.to_json(), indent=2)
    if args.json == "-":
        print(text)
        return 0
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    tell(found, args.top)
    return 0


def tell(found: Plan, top: int) -> None:
    """Print the best splits and why the first is the first."""
    import rich.console
    import rich.table

    width = None if sys.stdout.isatty() else 120
    console = rich.console.Console(file=sys.stdout, highlight=False, width=width, soft_wrap=True)
    fitting = sum(candidate.fits for candidate in found.candidates)
    console.print(
        f"{found.seq_len:,} tokens on {found.cluster}: {len(found.candidates)} splits, "
        f"{fitting} of them fit. Times are modelled."
    )
    table = rich.table.Table("dp", "tp", "cp", "[in, out]", "comm type", "remat", "fsdp")
    for name in ("step s", "tok/s/GPU", "MFU", "waits", "GB NVLink", "GB network", "GiB"):
        table.add_column(name, justify="right")
    for candidate in found.candidates[:top]:
        table.add_row(*_row(candidate))
    console.print(table)
    for line in found.explain().splitlines():
        console.print(f"- {line}")


def verify(found: Plan, fields: dict[str, Any], count: int) -> Plan:
    """Compile the best few for the cluster, and rank them again by their true memory.

    Args:
        found: a plan.
        fields: `ModelConfig`'s, of its model.
        count: how many to compile; minutes each for large models.
    """
    from hcp_jax.planner.audit import audit_step, chosen_flags, place

    verified = []
    for candidate in found.candidates[:count]:
        config = _train_config(found, candidate, fields)
        cp = place(config, found.cluster)
        read = audit_step(cp, found.cluster, config, chosen_flags(found.cluster, []))
        verified.append(dataclasses.replace(candidate, compiled_bytes=read.memory.peak_bytes))
    ranked = sorted(verified, key=lambda candidate: not candidate.fits)
    return dataclasses.replace(found, candidates=(*ranked, *found.candidates[count:]))


def config_text(found: Plan, fields: dict[str, Any]) -> str:
    """The best split as a config that `hcp train` runs."""
    from hcp_jax.train import config as configuration

    head = f"# {found.best.split}\n# hcp plan, for {found.seq_len} tokens on {found.cluster}.\n"
    return head + configuration.dump(_train_config(found, found.best, fields))


def _train_config(found: Plan, candidate: Candidate, fields: dict[str, Any]) -> Any:
    from hcp_jax.models.config import ModelConfig
    from hcp_jax.parallel import ParallelConfig
    from hcp_jax.train.config import TrainConfig

    split = candidate.split
    names = ("dp", "tp", "cp_outer", "cp_inner", "comm_type", "fsdp")
    batch = split.dp if found.batch is None else found.batch
    return TrainConfig(
        name="planned",
        steps=1000,
        batch_size=batch,
        accumulation=batch // split.dp,
        seq_len=found.seq_len,
        model=ModelConfig(**fields | {"remat": split.remat}),
        parallel=ParallelConfig(**{name: getattr(split, name) for name in names}),
    )


def _model(name: str) -> Any:
    """The `ModelConfig` of a config's path; None for a name."""
    if not name.endswith((".yaml", ".yml")):
        return None
    from hcp_jax.train import config as configuration

    return configuration.load(name).model


def _config_fields(name: str, model: Any) -> dict[str, Any]:
    if model is None:
        return model_fields(name)
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}


def _row(candidate: Candidate) -> list[str]:
    split, cost = candidate.split, candidate.cost
    memory = f"{candidate.peak_bytes / 2**30:.1f}" + ("" if candidate.fits else " too much")
    return [
        str(split.dp),
        str(split.tp),
        str(split.cp),
        f"[{split.cp_inner}, {split.cp_outer}]",
        split.comm_type if split.cp > 1 else "-",
        split.remat,
        "yes" if split.fsdp else "no",
        f"{cost.step_s:.3g}",
        f"{cost.tokens_per_s:.0f}",
        f"{cost.mfu:.1%}",
        f"{cost.exposed_s / cost.step_s:.1%}",
        f"{cost.bytes_on(hardware.INSIDE) / 1e9:.1f}",
        f"{cost.bytes_on(hardware.BETWEEN) / 1e9:.1f}",
        memory,
    ]
