"""The `hcp` command: a table of subcommands, the platform they start on, and how errors are told.

A subcommand is a module with two functions, `add_arguments(parser)` and `run(args) -> exit code`,
and, if it runs on the devices of a mesh, `num_devices(args)`. It is imported when it is called for,
so that `hcp --help` imports no jax, and it is listed once its module exists.

An error of the user's is one line on standard error and exit code 2; a run that goes wrong
(a loss that is no number) is one line and exit code 1. With HCP_DEBUG=1 they are tracebacks.
"""

import argparse
import difflib
import glob
import importlib
import importlib.util
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A subcommand: the module that has `add_arguments` and `run`, and what it does in a line."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("hcp_jax.train.command", "train a model with context parallelism"),
    "tokenize": Command(
        "hcp_jax.train.data.command", "turn text into tokens, for hcp train to read"
    ),
    "import": Command("hcp_jax.train.hf.importing", "begin from a Hugging Face folder's weights"),
    "export": Command("hcp_jax.train.hf.exporting", "write a run as a Hugging Face folder"),
    "launch": Command("hcp_jax.train.launch", "train in several processes on this machine"),
    "plot": Command("hcp_jax.train.record.figures", "draw the curves of runs side by side"),
    "verify": Command("hcp_jax.verify.command", "prove that it computes what one device computes"),
    "bench": Command("hcp_jax.plan.bench", "time attention strategies on the devices at hand"),
    "audit": Command("hcp_jax.plan.audit", "show what a compiled step moves, hides and holds"),
    "plan": Command("hcp_jax.plan.planner", "rank the meshes and comm types for a cluster"),
    "dynamic": Command("hcp_jax.dynamic.command", "schedule documents of uneven lengths"),
    "generate": Command("hcp_jax.models.generate", "continue a text with a trained model"),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, with the nearest right option."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"there is no argument {unknown[0]!r}{_hint(unknown[0], known)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv` if None); returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("hcp: interrupted", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if os.environ.get("HCP_DEBUG", "0") not in ("", "0"):
            raise
        print(f"hcp: {_in_one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def _run(argv: list[str]) -> int:
    available = {n: c for n, c in COMMANDS.items() if _exists(c.module)}
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(available))
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(importlib.import_module("hcp_jax").__version__)
        return 0
    if name not in available:
        raise ValueError(f"there is no command {name!r}{_hint(name, available)}")
    module = importlib.import_module(available[name].module)
    parser = _Parser(prog=f"hcp {name}", description=f"{available[name].summary.capitalize()}.")
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    set_up_platform(module.num_devices(args) if hasattr(module, "num_devices") else None)
    return module.run(args)


def set_up_platform(num_devices: int | None) -> None:
    """Chooses the platform before jax starts: the GPUs if they can be used, else simulated devices.

    What the user chose in JAX_PLATFORMS, JAX_NUM_CPU_DEVICES or XLA_FLAGS stays as it is.

    Args:
        num_devices: how many devices to simulate on the CPU; None for jax's default, one.
    """
    import jax

    gpu = None if os.environ.get("JAX_PLATFORMS") else _gpu_kind()
    if gpu is None and not os.environ.get("JAX_PLATFORMS"):
        # Also keeps a CUDA plugin that finds no GPU from telling so in a traceback.
        jax.config.update("jax_platforms", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    if gpu is not None:
        flags = importlib.import_module("hcp_jax.mesh").xla_flags(gpu)
        ours = [f"--{k}={str(v).lower()}" for k, v in flags.items() if f"--{k}" not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
    simulated = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in given
    if num_devices not in (None, jax.config.values["jax_num_cpu_devices"]) and not simulated:
        jax.config.update("jax_num_cpu_devices", num_devices)


def _gpu_kind() -> str | None:
    """The name of the NVIDIA GPU that jax can use here; None if there is none, or no plugin."""
    smi = shutil.which("nvidia-smi")
    listed = ""
    if smi is not None:
        query = [smi, "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (listed or glob.glob("/dev/nvidia[0-9]*")):
        return None
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        print(
            "hcp: there is an NVIDIA GPU, but no CUDA plugin for jax: pip install "
            "'hcp_jax[cuda13]' (or [cuda12]) to use it. Simulating on the CPU.",
            file=sys.stderr,
        )
        return None
    return listed.splitlines()[0] if listed else "NVIDIA GPU"


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _exists(module: str) -> bool:
    # Asked of the files: find_spec would import the packages above it, and those NumPy.
    path = pathlib.Path(__file__).parents[1].joinpath(*module.split("."))
    return path.with_suffix(".py").is_file()


def _help(available: dict[str, Command]) -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in available.items()]
    return "\n".join(
        [
            "usage: hcp COMMAND ...",
            "",
            "Hierarchical context parallelism for JAX on GPU meshes.",
            "",
            *lines,
            "",
            "'hcp COMMAND --help' tells more. HCP_DEBUG=1 shows errors as tracebacks.",
        ]
    )


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "; see --help."


if __name__ == "__main__":
    sys.exit(main())
