"""Work in a thread: a signal reaches whoever waits, wherever the work is."""

import gc
import os
import signal
import threading

import pytest

from hcp_jax.train.data.background import StoppedError, in_background


def test_results_and_errors_come_through():
    assert in_background(lambda work: threading.current_thread().name) == "data"
    with pytest.raises(ZeroDivisionError):
        in_background(lambda work: 1 // 0)


def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost():
    ended, stopped = threading.Event(), threading.Event()

    def interrupt(phase, info):
        if threading.current_thread().name == "data" and phase == "start":
            gc.callbacks.remove(interrupt)
            os.kill(os.getpid(), signal.SIGINT)

    def read(work):
        def pieces():
            while True:
                gc.collect()
                yield

        try:
            for _ in work.through(pieces()):
                ended.wait(0.01)
        except StoppedError:
            stopped.set()

    gc.callbacks.append(interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_background(read)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.wait(60)  # the work ends soon, too
