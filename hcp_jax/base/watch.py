"""React to signals at once, whatever the main thread is doing.

Python runs its signal handlers in the main thread, between two bytecode instructions. They do not
run while compiled code runs (XLA compiles for minutes). If they run inside a callback of the
garbage collector (jax registers one), an exception that they raise is printed and lost. So a
handler must not raise, and a separate thread must do what cannot wait. Python's C handler writes
each signal's number to a file descriptor at once (`signal.set_wakeup_fd`); the thread reads it.
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
    """Call `act` with the number of each signal in a separate thread, as soon as it arrives.

    Signals without a Python handler are not seen. Called outside the main thread, this does
    nothing.
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
    """Print a message and end this process immediately; can be called from any thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        terminal.say_error(text)
    os._exit(code)


@contextlib.contextmanager
def interruptible(grace: float = 3.0, terminated: int = 143) -> Iterator[None]:
    """End the process at once after SIGTERM, and `grace` seconds after a Ctrl-C that was lost.

    A command that sets its own handlers for these signals handles them itself.

    Args:
        grace: seconds within which a KeyboardInterrupt must end the command.
        terminated: exit code after SIGTERM.
    """
    done = threading.Event()

    def note(number: int, frame: Any) -> None:
        """Do nothing; with a Python handler, SIGTERM is seen and does not kill the process."""

    def act(number: int) -> None:
        handler = signal.getsignal(number)
        if number == signal.SIGTERM and handler is note:
            end_now("hcp: stopped by SIGTERM; run the same command to start again.", terminated)
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
