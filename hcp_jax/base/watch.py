"""Hear of signals whatever the main thread does.

Python runs its handlers in the main thread, between two instructions: not while compiled code runs
(XLA compiles for minutes), and if that is inside a callback of the garbage collector (jax has one),
an exception that a handler raises is printed and lost. So a handler must not raise, and a thread of
its own must see to what cannot wait. Python's C handler writes each signal's number to a file
descriptor at once (`signal.set_wakeup_fd`), and that is what the thread reads.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hcp_jax.base import terminal


@contextlib.contextmanager
def signals_to(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of each signal that comes, in a thread, as soon as it comes.

    Signals without a handler of Python's are not seen. Outside the main thread nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)

    def listen() -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                act(number)

    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        pythons.close()
        thread.join(1.0)
        ours.close()


def end_now(text: str, code: int) -> None:
    """Print a line and end this process here and now, from any thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        terminal.say_error(text)
    os._exit(code)


@contextlib.contextmanager
def interruptible(grace: float = 3.0, terminated: int = 143) -> Iterator[None]:
    """End the process if a Ctrl-C was lost, `grace` seconds after it, and after SIGTERM at once.

    A command that sets handlers of its own sees to these signals itself.

    Args:
        grace: seconds that a KeyboardInterrupt has to end the command.
        terminated: exit code after SIGTERM.
    """
    done = threading.Event()

    def note(number: int, frame: Any) -> None:
        """Be a handler of Python's, so that SIGTERM is seen and does not kill."""

    def act(number: int) -> None:
        handler = signal.getsignal(number)
        if number == signal.SIGTERM and handler is note:
            end_now("hcp: stopped by SIGTERM; the same command begins again.", terminated)
        lost = number == signal.SIGINT and handler is signal.default_int_handler
        if lost and not done.wait(grace):
            end_now("hcp: interrupted", 130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, note)
    with signals_to(act):
        try:
            yield
        finally:
            done.set()
            if before is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, before)
