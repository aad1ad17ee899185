"""Lock a run folder, so that only one run at a time trains in it.

The lock is the kernel's (`flock` on `run.lock`). It ends with the process that holds it, however
that process ends, so that a dead process never keeps a folder locked. On NFS (from version 4 on,
and before with a lock service) and on Lustre (mounted with `flock`) it holds for other hosts, too.
The file's content says who holds the lock; it is for people only, and decides nothing.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from hcp_jax.train.hosts.kv_store import Messages, describe_error

NAME = "run.lock"

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger("hcp_jax")


class RunInUseError(ValueError):
    """Another process trains in this run folder."""


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Lock a run folder while the context lasts; make the folder if it does not exist.

    All processes of a run must call this; process 0 holds the lock for all of them.

    Args:
        folder: the run folder.

    Raises:
        RunInUseError: if another process holds it; says which one, on which host, since when.
        OSError: if there can be no file in the folder.
    """
    file: int | None = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _take(folder)
        except (OSError, RunInUseError) as caught:
            error = caught
    for in_use, why in Messages("run folder").gather(
        [isinstance(error, RunInUseError), describe_error(error)]
    ):
        if why is not None:
            raise (RunInUseError if in_use else OSError)(why) from error
    try:
        yield
    finally:
        if file is not None:
            # The file stays: removing it could remove the lock of the next run.
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)


def _take(folder: pathlib.Path) -> int:
    path = folder / NAME
    # Child processes must not inherit the file: they would keep the lock after this one ends.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(file, folder)
        _warn_of_other_host(_holder(file), folder)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_myself()).encode(), 0)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, folder: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            _log.warning(
                f"{folder} is on a file system that has no locks ({error.strerror}): nothing "
                "prevents a second run in it."
            )
        elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunInUseError(
                f"{folder} is in use: {_describe(_holder(file))}. One folder is for one run at a "
                "time: wait until that one has ended (or stop it), or give another folder."
            ) from None
        else:
            raise


def _myself() -> dict[str, str | int]:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _holder(file: int) -> dict[str, str]:
    """Return who wrote the file last and did not end properly; empty if the file does not say."""
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return {name: ascii(said[name]).strip("'")[:100] for name in ("host", "process", "since")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _describe(holder: dict[str, str]) -> str:
    if not holder:
        return "another process, which has not written its name yet, holds it"
    return "process {process} on {host} has held it since {since}".format(**holder)


def _warn_of_other_host(holder: dict[str, str], folder: pathlib.Path) -> None:
    if holder and holder["host"] != ascii(socket.gethostname()).strip("'"):
        _log.warning(
            f"the run in {folder} before this one was cut off ({_describe(holder)}) and its lock "
            "is free. If it still runs there, the file system's locks do not reach other hosts: "
            "stop one of the two."
        )
