"""Run the `hcp` command: find the subcommand, set up the platform, and report errors.

A subcommand is a module with two functions, `add_arguments(parser)` and `run(args) -> exit code`.
It may have three more: `num_devices(args)`, if it runs on the devices of a mesh,
`uses_jax(args)`, if it can run without jax, and `keep_programs(args)`, if it compiles programs that
are worth keeping on disk. A subcommand's module is imported only when it is
called, so `hcp --help` imports no other module. It imports jax only inside these functions, so
`hcp COMMAND --help` and the refusal of an option need no jax.

An error of the user prints one line on standard error and exits with code 2. A run that fails
(a loss that is NaN or infinite) prints one line and exits with code 1. With HCP_DEBUG=1 both print
tracebacks.
"""

import argparse
import difflib
import glob
import importlib
import importlib.util
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from hcp_jax.base import terminal, watch


class Command(NamedTuple):
    """A subcommand: the module that has `add_arguments` and `run`, and a one-line summary."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("hcp_jax.commands.train", "train a model with context parallelism"),
    "tokenize": Command("hcp_jax.commands.tokenize", "turn text into tokens, for hcp train"),
    "import": Command("hcp_jax.commands.importing", "begin from a Hugging Face folder's weights"),
    "export": Command("hcp_jax.commands.export", "write a run as a Hugging Face folder"),
    "launch": Command("hcp_jax.commands.launch", "train in several processes on this machine"),
    "plot": Command("hcp_jax.commands.plot", "draw the curves of runs side by side"),
    "verify": Command("hcp_jax.commands.verify", "prove that it computes what one device computes"),
    "bench": Command("hcp_jax.commands.bench", "time attention strategies on the devices at hand"),
    "audit": Command("hcp_jax.commands.audit", "show what a compiled step moves, hides and holds"),
    "plan": Command("hcp_jax.commands.plan", "rank the meshes and comm types for a cluster"),
    "longest": Command("hcp_jax.commands.longest", "find the longest sequence that fits"),
    "dynamic": Command("hcp_jax.commands.dynamic", "schedule documents of uneven lengths"),
}


MOST_SIMULATED = 1024
"""Most devices that one process may simulate; each costs memory and threads."""


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, with the nearest known option.

    Options may be written with `-` or `_`: `--seq-len` means `--seq_len`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        spelt = self._spelt(given)
        if not self._subparsers:  # otherwise the options belong to a subparser
            self._require_known(spelt)
        parsed, unknown = super().parse_known_args(spelt, namespace)
        if unknown:
            self._require_known(unknown)
            self.error(f"there is no argument {unknown[0]!r}; see --help.")
        return parsed, unknown

    def _require_known(self, args: list[str]) -> None:
        """Refuse the first unknown option; argparse would first report a missing argument."""
        known = self._options()
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            name = arg.partition("=")[0]
            if name.startswith("-") and name not in known and not _is_negative_number(name):
                if name == "-":
                    continue
                self.error(f"there is no option {name!r}{_hint(name, known)}")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _spelt(self, args: list[str]) -> list[str]:
        """Return `args` with options in their known spelling, and -1e-3 joined to its option."""
        known = {_one_spelling(option): option for option in self._options()}
        spelt: list[str] = []
        for arg in args:
            name, equals, value = arg.partition("=")
            if spelt and spelt[-1] in known.values() and _is_negative_number(arg):
                spelt[-1] = f"{spelt[-1]}={arg}"  # argparse would read -1e-3 as an option
            elif name.startswith("--") and len(name) > 2:
                spelt.append(known.get(_one_spelling(name), name) + equals + value)
            else:
                spelt.append(arg)
        return spelt


def _one_spelling(option: str) -> str:
    return option.replace("_", "-").lower()


def _is_negative_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.startswith("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` if None) and return the exit code."""
    logging.basicConfig(handlers=[terminal.log_handler()], level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        return _complete()
    terminated = 0 if argv[:1] == ["train"] else 143
    try:
        with watch.interruptible(terminated=terminated):
            return _run(argv)
    except KeyboardInterrupt:
        print("hcp: interrupted", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if os.environ.get("HCP_DEBUG", "0") not in ("", "0"):
            raise
        terminal.say_error(f"hcp: {_in_one_line(error)}")
        return 1 if isinstance(error, FloatingPointError) else 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        terminal.say(_help())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        terminal.say(importlib.import_module("hcp_jax").__version__)
        return 0
    if name not in COMMANDS:
        hint = _hint(name, COMMANDS, "hcp --help")
        raise ValueError(f"there is no command {name!r}{hint}")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    summary = f"{command.summary[0].upper()}{command.summary[1:]}."
    parser = _Parser(prog=f"hcp {name}", description=summary)
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    if not hasattr(module, "uses_jax") or module.uses_jax(args):
        set_up_platform(module.num_devices(args) if hasattr(module, "num_devices") else None)
        if hasattr(module, "keep_programs"):
            module.keep_programs(args)
    code: int = module.run(args)
    return code


def _complete() -> int:
    """Answer a shell that asks, by argcomplete's environment variables, which words may come next.

    Only the command that the line names is imported, so an answer takes well under a second.
    """
    if importlib.util.find_spec("argcomplete") is None:
        return 2
    words = os.environ.get("COMP_LINE", "").split()
    parser = _Parser(prog="hcp")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary)
        if name in words[1:2]:
            importlib.import_module(command.module).add_arguments(subparser)
    importlib.import_module("argcomplete").autocomplete(parser)
    return 0


def set_up_platform(num_devices: int | None = None) -> None:
    """Choose NVIDIA GPUs if they can be used, else devices simulated on the CPU.

    Call it before jax starts: before the first array, or the first call of `jax.devices`. On GPUs
    it adds `hcp.xla_flags` to XLA_FLAGS. Values that the user set in JAX_PLATFORMS,
    JAX_NUM_CPU_DEVICES or XLA_FLAGS are kept. On a machine without a GPU it also prevents jax's
    CUDA plugin, if one is installed, from printing a traceback.

    Args:
        num_devices: number of devices to simulate on the CPU; None for jax's default, one.

    Raises:
        RuntimeError: from jax, if it has already started with another number of devices.
        ValueError: if there is no GPU and `num_devices` is more than can be simulated.

    >>> import hcp_jax as hcp
    >>> hcp.set_up_platform(8)
    """
    import jax

    gpu = None if os.environ.get("JAX_PLATFORMS") else _gpu_kind()
    if gpu is None and not os.environ.get("JAX_PLATFORMS"):
        # This also prevents a CUDA plugin that finds no GPU from printing a traceback.
        jax.config.update("jax_platforms", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    if gpu is not None:
        flags = importlib.import_module("hcp_jax.parallel.mesh").xla_flags(gpu)
        ours = [f"--{k}={str(v).lower()}" for k, v in flags.items() if f"--{k}" not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
    simulated = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in given
    if gpu is None and num_devices is not None and num_devices > MOST_SIMULATED:
        raise ValueError(
            f"the mesh has {num_devices:,} devices; without GPUs at most {MOST_SIMULATED:,} can be "
            "simulated. Make the sizes under `parallel` smaller; hcp audit compiles for a cluster "
            "that is not here."
        )
    if num_devices not in (None, jax.config.values["jax_num_cpu_devices"]) and not simulated:
        jax.config.update("jax_num_cpu_devices", num_devices)


def _gpu_kind() -> str | None:
    """Return the name of the NVIDIA GPU that jax can use; None without a GPU or a plugin."""
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
            "'jax[cuda13]' (or [cuda12]) to use it. Simulating on the CPU.",
            file=sys.stderr,
        )
        return None
    # Old drivers report a GPU's name without its brand.
    return f"NVIDIA {(listed or 'GPU').splitlines()[0].removeprefix('NVIDIA ')}"


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _help() -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hcp COMMAND ...",
            "",
            "Hierarchical context parallelism for JAX on GPU meshes.",
            "",
            *lines,
            "",
            "Run 'hcp COMMAND --help' for its options. HCP_DEBUG=1 shows errors as tracebacks.",
        ]
    )


def _hint(name: str, known: Iterable[str], see: str = "--help") -> str:
    """Return a hint for the end of an error: the nearest name, or an option that ends in it."""
    name, options = _one_spelling(name.split("=")[0]), list(known)
    spelt = {_one_spelling(option): option for option in options}
    # `--context-parallel-size` is the last part of `--parallel.context_parallel_size`.
    ends = [o for s, o in spelt.items() if s.rpartition(".")[2] == name.lstrip("-") and "." in s]
    near = ends or [spelt[s] for s in difflib.get_close_matches(name, spelt, 1)]
    if not near:
        last = {s.rpartition(".")[2].lstrip("-"): o for s, o in spelt.items()}
        near = [last[s] for s in difflib.get_close_matches(name.lstrip("-"), last, 1, 0.75)]
    return f"; did you mean {near[0]!r}?" if near else f"; see {see}."


if __name__ == "__main__":
    sys.exit(main())
