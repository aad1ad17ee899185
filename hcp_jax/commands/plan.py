"""Run `hcp plan`: rank the splits of a cluster for a model and a sequence length, and explain them.

    hcp plan --model llama3-8b --seq-len 1048576 --gpu h200 --hosts 8 --gpus-per-host 8
    hcp plan --model llama3-8b --seq-len 131072 --gpu h100 --hosts 4 --verify 3 --write best.yaml

`planner/search.py` ranks the splits. `--verify` compiles the best few for the cluster and replaces
their modelled memory by that of the compiled program. `--write` writes a config of the best split
for `hcp train`.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from hcp_jax import hardware
from hcp_jax.base import arguments, tables, terminal
from hcp_jax.commands.arguments import add_cluster_arguments, add_json_argument
from hcp_jax.cost.models import MODELS, model_fields
from hcp_jax.planner.candidate import Candidate
from hcp_jax.planner.search import Plan, plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp plan`."""
    parser.add_argument(
        "--model",
        type=arguments.non_empty,
        required=True,
        help=f"one of {', '.join(MODELS)}, or a config's path",
    )
    parser.add_argument(
        "--seq-len",
        type=arguments.length,
        required=True,
        help="tokens of a stream: 131072, 128K or 1M",
    )
    parser.add_argument(
        "--batch",
        type=arguments.whole(),
        help="streams per step; one per dp replica if not given",
    )
    add_cluster_arguments(parser)
    parser.add_argument(
        "--implementation",
        type=arguments.non_empty,
        default="triton",
        help="implementation of the attention core, whose rates are used (triton)",
    )
    parser.add_argument(
        "--top", type=arguments.whole(), default=10, help="how many splits to show (10)"
    )
    parser.add_argument(
        "--verify",
        type=arguments.whole(least=0),
        default=0,
        metavar="K",
        help="compile the best K for their memory",
    )
    add_json_argument(parser)
    parser.add_argument(
        "--write",
        type=arguments.output(".yaml", ".yml"),
        metavar="FILE",
        help="write the best as a config for hcp train",
    )


def uses_jax(args: argparse.Namespace) -> bool:
    """Return whether the command compiles anything."""
    return args.verify > 0


def run(args: argparse.Namespace) -> int:
    """Run `hcp plan`; return the exit code."""
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
        terminal.say(text)
        return 0
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    tell(found, args.top)
    return 0


_HEADINGS = (
    *("pp", "dp", "tp", "cp", "[in, out]", "ep", "comm type", "remat", "fsdp"),
    *("step s", "tok/s/GPU", "MFU", "waits", "bubble", "GB NVLink", "GB network", "GiB"),
)
# A column of these alone is not shown.
_PLAIN = {"pp": "1", "ep": "1", "bubble": "0.0%"}
_DROP = ("GB NVLink", "GB network", "fsdp", "bubble", "waits", "tok/s/GPU", "MFU", "remat")


def tell(found: Plan, top: int) -> None:
    """Print the best splits and the reasons for the first one."""
    console = tables.console()
    fitting = sum(candidate.fits for candidate in found.candidates)
    console.print(
        f"{found.seq_len:,} tokens on {found.cluster}: {len(found.candidates)} splits, "
        f"{fitting} of them fit. Times are modelled.\n"
    )
    rows = [_row(candidate) for candidate in found.candidates[:top]]
    left = ("[in, out]", "comm type", "remat", "fsdp")
    shown = [
        i for i, name in enumerate(_HEADINGS) if any(row[i] != _PLAIN.get(name) for row in rows)
    ]
    drop = [name for name in _DROP if name in (headings := [_HEADINGS[i] for i in shown])]
    tables.show(console, headings, [[row[i] for i in shown] for row in rows], left=left, drop=drop)
    console.print()
    for line in found.explain().splitlines():
        console.print(f"- {line}")


def verify(found: Plan, fields: dict[str, Any], count: int) -> Plan:
    """Compile the best splits for the cluster, and rank again by their compiled memory.

    Args:
        found: a plan.
        fields: fields of the `ModelConfig` of its model.
        count: number of splits to compile; large models take minutes each.
    """
    from hcp_jax.planner.audit import chosen_flags, place
    from hcp_jax.planner.audit_tick import audit_run

    verified = []
    for candidate in found.candidates[:count]:
        config = _train_config(found, candidate, fields)
        cp = place(config, found.cluster)
        read = audit_run(cp, found.cluster, config, chosen_flags(found.cluster, []))
        verified.append(dataclasses.replace(candidate, compiled_bytes=read.memory.peak_bytes))
    ranked = sorted(verified, key=lambda candidate: not candidate.fits)
    return dataclasses.replace(found, candidates=(*ranked, *found.candidates[count:]))


def config_text(found: Plan, fields: dict[str, Any]) -> str:
    """Return the best split as a config for `hcp train`, with lines marked for the user."""
    from hcp_jax.train import config as configuration

    text = configuration.dump(_train_config(found, found.best, fields))
    lines = [f"{line}{_NOTES.get(line.strip(), '')}" for line in text.splitlines()]
    head = [
        f"# {found.best.split}",
        f"# Written by hcp plan for {found.seq_len:,} tokens on {found.cluster}.",
        "#",
        f"# Replace every {configuration.FILL_IN} before hcp train; hcp audit and hcp verify read "
        "the file as it is.",
        "# Check the lines marked with <- as well.",
        "",
    ]
    return "\n".join([*head, *lines, ""])


_NOTES = {
    "path: FILL_IN": "  # <- a folder of text, or of tokens (hcp tokenize)",
    "tokenizer: null": "  # <- the model's tokenizer.json, unless data.path has tokens already",
    "run_dir: runs": "  # <- a folder that all hosts see",
    "steps: 1000": "  # <- steps and optimizer are a starting point, not a recipe",
}


def _train_config(found: Plan, candidate: Candidate, fields: dict[str, Any]) -> Any:
    from hcp_jax.models.config import from_fields
    from hcp_jax.parallel.config import ParallelConfig
    from hcp_jax.train.config import FILL_IN, TrainConfig
    from hcp_jax.train.sections import CheckpointConfig, DataConfig

    split = candidate.split
    names = ("dp", "tp", "cp_outer", "cp_inner", "comm_type", "fsdp", "ep", "pp", "virtual_stages")
    batch = split.dp * split.pp if found.batch is None else found.batch
    return TrainConfig(
        name="planned",
        steps=1000,
        batch_size=batch,
        accumulation=batch // split.dp,
        seq_len=found.seq_len,
        made_for=str(found.cluster),
        data=DataConfig(path=FILL_IN),
        checkpoint=CheckpointConfig(every_minutes=30.0),
        model=from_fields(fields | {"remat": split.remat}),
        parallel=ParallelConfig(**{name: getattr(split, name) for name in names}),
    )


def _model(name: str) -> Any:
    """Return the `ModelConfig` if `name` is the path of a config; None if it names a model."""
    if not name.lower().endswith((".yaml", ".yml")) and not pathlib.Path(name).is_file():
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
    chunks = f" x {split.virtual_stages}" if split.virtual_stages > 1 else ""
    return [
        f"{split.pp}{chunks}",
        str(split.dp),
        str(split.tp),
        str(split.cp),
        f"[{split.cp_inner}, {split.cp_outer}]",
        str(split.ep),
        split.comm_type if split.cp > 1 else "-",
        split.remat,
        "yes" if split.fsdp else "no",
        f"{cost.step_s:.3g}",
        f"{cost.tokens_per_s:.0f}",
        f"{cost.mfu:.1%}",
        f"{cost.exposed_s / cost.step_s:.1%}",
        f"{cost.bubble_s / cost.step_s:.1%}",
        f"{cost.bytes_on(hardware.INSIDE) / 1e9:.1f}",
        f"{cost.bytes_on(hardware.BETWEEN) / 1e9:.1f}",
        memory,
    ]
