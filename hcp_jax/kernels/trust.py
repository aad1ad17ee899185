"""Decide whether kernels that few GPUs have run may be taken where the user names none.

These are Mosaic's kernels of attention (`implementation=None`) and Triton's of the products of
experts (`model.moe.product` None). Before they are taken on a kind of GPU, `self_check.py` runs
them there: against a reference, twice for equal bits, and for their speed beside what else would be
taken. That happens once, on first use, in a process of its own, so that a kernel that crashes or
hangs does not take the caller with it. The verdict is kept in the user's cache folder, for this
kind of GPU, version of jax and source of the kernels.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax

from hcp_jax.kernels import user_cache

VARIABLE = "HCP_KERNEL_CHECK"
"""The environment variable that, set to "off", lets no check run and believes none."""

CHECK_SECONDS = 600
"""A check that takes longer counts as failed: a kernel may wait for ever."""

EXPERT_PRODUCT = "expert_product"
"""The name, beside those of `core.IMPLEMENTATIONS`, of Triton's kernels for products of experts."""

FILE = "kernels.json"
"""The file of verdicts in the user's cache folder."""

_log = logging.getLogger("hcp_jax")


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        passed: whether the kernels are exact, deterministic and not slower than what else is taken.
        reason: in one line, why not, or what was seen.
    """

    passed: bool
    reason: str


@functools.lru_cache(maxsize=32)
def why_not(kernels: str, device_kind: str) -> str | None:
    """Return why kernels may not be taken unasked on this kind of GPU; None if they may.

    They may once they have passed their check. It runs if there is no verdict yet, the GPU is here,
    and this is the only process. With several processes it does not: all of them must choose alike,
    and their hosts' verdicts may differ. They take what the config names. The answer is logged on
    first use.

    Args:
        kernels: name of an implementation of attention, such as "mosaic", or `EXPERT_PRODUCT`.
        device_kind: `jax.Device.device_kind`.
    """
    reason, failed = _reason(kernels, device_kind)
    if reason is not None and jax.process_index() == 0:
        if kernels == EXPERT_PRODUCT:
            who, named = "experts do", "model.moe.product=triton"
        else:
            who, named = "attention does", f"model.implementation={kernels}"
            named += f" (implementation={kernels!r} in a call)"
        # Without their kernels experts are many times slower; attention has others.
        level = logging.WARNING if failed or kernels == EXPERT_PRODUCT else logging.INFO
        _log.log(
            level,
            f"{who} not use the {kernels} kernels on {device_kind}: {reason}. `hcp verify "
            f"--kernels` checks them; {named} takes them whatever the verdict.",
        )
    return reason


def _reason(kernels: str, device_kind: str) -> tuple[str | None, bool]:
    """Return why the kernels may not be taken, or None; and whether they failed their check."""
    if os.environ.get(VARIABLE, "").lower() in ("off", "0", "false", "no"):
        return f"{VARIABLE} is off", False
    if jax.process_count() > 1:
        return "several processes must choose alike, and do not compare verdicts", False
    verdict = kept(kernels, device_kind)
    if verdict is None:
        if not user_cache.is_here(device_kind):
            return "they have not been checked, and this machine has no such GPU", False
        _log.info(
            f"checking the {kernels} kernels on {device_kind}: once, for about a minute "
            f"({VARIABLE}=off skips it)"
        )
        verdict = check(kernels, device_kind)
    return (None, False) if verdict.passed else (verdict.reason, True)


def kept(kernels: str, device_kind: str) -> Verdict | None:
    """Return the verdict that was kept of an earlier check; None if there is none."""
    try:
        found = user_cache.read(FILE).get(user_cache.key(kernels, device_kind))
    except ValueError:  # not whole: the next check writes it anew
        return None
    if isinstance(found, list) and len(found) == 2:
        return Verdict(found[0] is True, str(found[1]))
    return None


def check(kernels: str, device_kind: str) -> Verdict:
    """Run the check in a process of its own on a GPU of this machine, and keep the verdict."""
    command = [sys.executable, "-m", "hcp_jax.kernels.self_check", kernels]
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
    user_cache.write(FILE, user_cache.key(kernels, device_kind), list(verdict))
    return verdict


def _last_line(done: subprocess.CompletedProcess[str]) -> Verdict:
    """Return the verdict that the process printed last, or how it ended without one."""
    with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
        found = json.loads(done.stdout.splitlines()[-1])
        return Verdict(found["passed"] is True, str(found["reason"]))
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return Verdict(False, f"the check ended with code {done.returncode}: {last[:200]}")
