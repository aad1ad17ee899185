"""Keep compiled programs on disk, so that the second start of a run compiles nothing again.

This is jax's persistent compilation cache, in the user's cache folder. The `hcp` command turns it
on for the subcommands that compile; importing the library never does. jax's keys contain the
program, its flags, the devices and the versions of XLA, and a file lock orders the processes that
share the folder, so any processes may use it at the same time.
"""

import hashlib
import os
import pathlib
import platform

from hcp_jax.base import terminal
from hcp_jax.base.cache_folder import cache_folder

VARIABLE = "HCP_PROGRAM_CACHE"
"""The environment variable that names another folder, or is "off"."""

MOST_BYTES = 8 * 2**30
"""Size of the folder from which on the programs that were not used for longest are deleted."""


def turn_on(*, several_hosts: bool = False, tell: bool = True) -> pathlib.Path | None:
    """Turn on jax's persistent compilation cache in this process, and say so in one line.

    It leaves jax alone where the user has set a folder in jax's own JAX_COMPILATION_CACHE_DIR, or
    JAX_ENABLE_COMPILATION_CACHE to false. A folder that cannot be written is told, not an error.

    Args:
        several_hosts: whether processes on other hosts take part: then only a folder that the user
            names is used. If some processes read a program while others compile it, those wait for
            each other (XLA's autotuning), so all hosts must see the same folder.
        tell: whether to print the line; one process of several should.

    Returns:
        The folder; None if this function turned nothing on.
    """
    import jax

    named = os.environ.get(VARIABLE, "")
    if named.lower() in ("off", "0", "false", "no"):
        return None
    set_up = jax.config.values
    if set_up["jax_compilation_cache_dir"] or not set_up["jax_enable_compilation_cache"]:
        return None
    if several_hosts and not named:
        if tell:
            terminal.say_error(
                f"compiled programs are not kept: to keep them, name a folder that all hosts "
                f"share in {VARIABLE}"
            )
        return None
    folder = (pathlib.Path(named).expanduser() if named else cache_folder() / "programs") / _kind()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "cannot be written", str(folder))
    except OSError as error:
        if tell:
            terminal.say_error(f"compiled programs are not kept: {folder}: {error.strerror}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if tell:
        off = f"{VARIABLE}=off turns this off"
        terminal.say_error(f"compiled programs are kept in {folder} ({off})")
    return folder


def _kind() -> str:
    """Return a name for programs that can run here: jax's version, and the CPU's instructions.

    Machines that share a home folder may have different CPUs, and a program compiled for one may
    have instructions that another lacks.
    """
    import jax

    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    cpu = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
    return f"jax-{jax.__version__}-{cpu}"
