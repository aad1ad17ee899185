"""Decide whether `implementation=None` may take an implementation that few GPUs have run.

Before it is taken on a kind of GPU, `self_check.py` runs it there: against the reference, twice for
equal bits, and for its speed beside Triton's. That happens once, on first use, in a process of its
own, so that a kernel that crashes or hangs does not take the caller with it. The verdict is kept in
the user's cache folder, for this kind of GPU, version of jax and source of the kernels.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax

from hcp_jax.base.cache_folder import cache_folder

VARIABLE = "HCP_KERNEL_CHECK"
"""The environment variable that, set to "off", lets no check run and believes none."""

CHECK_SECONDS = 600
"""A check that takes longer counts as failed: a kernel may wait for ever."""

_log = logging.getLogger("hcp_jax")


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        passed: whether the implementation is exact, deterministic and not slower than Triton's.
        reason: in one line, why not, or what was seen.
    """

    passed: bool
    reason: str


@functools.lru_cache(maxsize=32)
def trusted(implementation: str, device_kind: str) -> bool:
    """Return whether an implementation has passed its check on this kind of GPU.

    The check runs if there is no verdict yet, the GPU is here, and this is the only process. With
    several processes it does not: all of them must choose alike, and their hosts' verdicts may
    differ. They take what the config names, or Triton.

    Args:
        implementation: name of the implementation, such as "mosaic".
        device_kind: `jax.Device.device_kind`.
    """
    if os.environ.get(VARIABLE, "").lower() in ("off", "0", "false", "no"):
        return False
    if jax.process_count() > 1:
        _log.info(
            f"attention does not use the {implementation} kernels: with several processes they are "
            f"used only by name. Run `hcp verify --kernels` on each host, then set "
            f"model.implementation={implementation} (implementation={implementation!r} in a call)."
        )
        return False
    verdict = kept(implementation, device_kind)
    if verdict is None and _is_here(device_kind):
        _log.info(
            f"checking the {implementation} kernels on {device_kind}: once, for about a minute "
            f"({VARIABLE}=off skips it)"
        )
        verdict = check(implementation, device_kind)
        if not verdict.passed:
            _log.warning(
                f"attention does not use the {implementation} kernels on {device_kind}: "
                f"{verdict.reason}. `hcp verify --kernels` checks them again."
            )
    return verdict is not None and verdict.passed


def kept(implementation: str, device_kind: str) -> Verdict | None:
    """Return the verdict that was kept of an earlier check; None if there is none."""
    found = _read().get(_key(implementation, device_kind))
    if isinstance(found, list) and len(found) == 2:
        return Verdict(found[0] is True, str(found[1]))
    return None


def check(implementation: str, device_kind: str) -> Verdict:
    """Run the check in a process of its own on a GPU of this machine, and keep the verdict."""
    command = [sys.executable, "-m", "hcp_jax.kernels.self_check", implementation]
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # The caller's process holds most of the GPU's memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        verdict = Verdict(False, f"the check did not end in {CHECK_SECONDS} s")
    except OSError as error:
        verdict = Verdict(False, f"the check could not be started: {error.strerror}")
    else:
        verdict = _last_line(done)
    _keep(_key(implementation, device_kind), verdict)
    return verdict


def _last_line(done: subprocess.CompletedProcess[str]) -> Verdict:
    """Return the verdict that the process printed last, or how it ended without one."""
    with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
        found = json.loads(done.stdout.splitlines()[-1])
        return Verdict(found["passed"] is True, str(found["reason"]))
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return Verdict(False, f"the check ended with code {done.returncode}: {last[:200]}")


def _is_here(device_kind: str) -> bool:
    return any(d.device_kind == device_kind and d.platform == "gpu" for d in jax.local_devices())


def _key(implementation: str, device_kind: str) -> str:
    return f"{implementation} | {device_kind} | jax {jax.__version__} | kernels {_sources()}"


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    """Return a digest of the source of the kernels: other kernels need another check."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _path() -> pathlib.Path:
    return cache_folder() / "kernels.json"


def _read() -> dict[str, object]:
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):  # none yet, or not whole
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, verdict: Verdict) -> None:
    """Write the verdict beside the others; a folder that cannot be written is told, no error."""
    found = _read() | {key: list(verdict)}
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_path().parent, delete=False) as file:
            json.dump(found, file, indent=1)
        pathlib.Path(file.name).replace(_path())
    except OSError as error:
        _log.warning(f"the check of the kernels is not kept: {_path()}: {error.strerror}")
