"""Signals: before there is something to save they end the process, then the first is a wish."""

import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from hcp_jax.train.hosts.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_agreed_on_after_the_step_in_hand(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.agreed() is None
        signal.raise_signal(number)
        assert signals.agreed() == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once_and_handlers_are_put_back():
    def interrupt_twice():
        with Signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone():
    agreed = []

    def run():
        with Signals() as signals:
            agreed.append(signals.agreed())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert agreed == [None]
    assert signal.getsignal(signal.SIGINT) is before


class Ends:
    """Notes what a process would be ended by, in whatever thread."""

    def __init__(self):
        self.calls, self._came = [], threading.Event()

    def __call__(self, number, stepping):
        self.calls.append((number, stepping))
        self._came.set()

    def wait(self):
        assert self._came.wait(60)
        self._came.clear()
        return self.calls[-1]


def test_before_the_first_step_a_signal_ends_the_process_even_inside_the_garbage_collector():
    """An exception that a handler raises there is printed and lost."""
    ends = Ends()

    def in_collector(phase, info):
        if phase == "start" and not ends.calls:
            signal.raise_signal(signal.SIGINT)

    with Signals(ends) as signals:
        gc.callbacks.append(in_collector)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(in_collector)
        assert ends.wait() == (signal.SIGINT, False)
        assert signals.agreed() == signal.SIGINT


def test_once_steps_are_made_only_a_second_ctrl_c_ends_it():
    ends = Ends()
    with Signals(ends) as signals:
        signals.begin_steps()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.agreed() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert ends.wait() == (signal.SIGINT, True)
    assert len(ends.calls) == 1


# Reads "for ever": in C code that lets other threads run, as XLA's compiler does, or in Python with
# a callback of the collector that swallows what is raised in it.
_IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
_IN_COLLECTOR = """
import gc
def busy(phase, info):
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
gc.callbacks.append(busy)
while True:
    gc.collect()
"""
_PROGRAM = """
import sys, time
import hcp_jax.train.evaluation
from hcp_jax import cli

def never(*args, **options):
    print("reading", flush=True)
    exec({code!r}, {{"time": time}})

hcp_jax.train.evaluation.open_corpora = never
sys.exit(cli.main(["train", {config!r}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [_IN_C, _IN_COLLECTOR], ids=["compiled code", "collector"])
def test_hcp_train_ends_cleanly_whatever_runs(code, tmp_path):
    from tests.train.tiny import write_config

    program = _PROGRAM.format(code=code, config=str(write_config(tmp_path, run_dir=str(tmp_path))))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number, process in processes.items():
        assert process.stdout.readline() == "reading\n", process.stderr.read()
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else 0)
        [line] = told.splitlines()
        assert line == (
            f"hcp: stopped by {number.name} before the first step. Nothing is lost; give the same "
            "command again."
        )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_every_command_hears_a_signal_that_the_collector_swallows(number, code):
    program = f"""
import gc, signal
from hcp_jax.base import watch
with watch.interruptible(grace=0.1):
    def swallow(phase, info):
        signal.raise_signal({int(number)})
    gc.callbacks.append(swallow)
    gc.collect()
    gc.callbacks.clear()
    while True:
        pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code
    said = {signal.SIGINT: "hcp: interrupted", signal.SIGTERM: "hcp: stopped by SIGTERM"}
    assert done.stderr.splitlines()[-1].startswith(said[number])
