"""One folder, one run: a lock on the run folder, which names its holder and dies with it.

The lock is the kernel's (`flock` on `run.lock`): it ends with the process that holds it, however
that ends, so that no lock of a dead process is ever in the way, and on NFS (from version 4 on, and
with a lock service before) and Lustre (mounted with `flock`) it reaches other hosts. The file's
content says who holds it; it is for people only, and decides nothing.
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

from hcp_jax.train.hosts.kv_store import Words, in_words

NAME = "run.lock"

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger("hcp_jax")


class RunInUseError(ValueError):
    """Another process trains in this run folder."""


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is not there, while the context lasts.

    Of several processes of a run, all must call this; process 0 holds it for all of them.

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
    for in_use, why in Words("run folder").of_all(
        [isinstance(error, RunInUseError), in_words(error)]
    ):
        if why is not None:
            raise (RunInUseError if in_use else OSError)(why) from error
    try:
        yield
    finally:
        if file is not None:
            # The file stays: to remove it could take away the lock of who comes next.
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)


def _take(folder: pathlib.Path) -> int:
    path = folder / NAME
    # Not inherited by what this process starts, which would keep the lock after its end.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(file, folder)
        _tell_of_another_host(_holder(file), folder)
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
                f"{folder} is on a file system that has no locks ({error.strerror}): nothing keeps "
                "a second run out of it."
            )
        elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunInUseError(
                f"{folder} is in use: {_describe(_holder(file))}. One folder is for one run at a "
                "time: wait until that one has ended (or stop it), or name another folder."
            ) from None
        else:
            raise


def _myself() -> dict[str, str | int]:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _holder(file: int) -> dict[str, str]:
    """Read who wrote the file last and did not end properly; nothing if that is not told."""
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return {name: ascii(said[name]).strip("'")[:100] for name in ("host", "process", "since")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _describe(holder: dict[str, str]) -> str:
    if not holder:
        return "another process, which has not said its name yet, holds it"
    return "process {process} on {host} has held it since {since}".format(**holder)


def _tell_of_another_host(holder: dict[str, str], folder: pathlib.Path) -> None:
    if holder and holder["host"] != ascii(socket.gethostname()).strip("'"):
        _log.warning(
            f"the run in {folder} before this one was cut off ({_describe(holder)}) and its lock "
            "is free. If it still runs there, the file system's locks do not reach other hosts: "
            "stop one of the two."
        )
