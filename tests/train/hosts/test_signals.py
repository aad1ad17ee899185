"""Signals: the first is a wish, the second is not; nothing is left behind."""

import signal
import threading

import pytest

from hcp_jax.train.hosts.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_agreed_on_after_the_step_in_hand(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.agreed(1) is None
        signal.raise_signal(number)
        assert signals.agreed(2) == number
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
            agreed.append(signals.agreed(1))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert agreed == [None]
    assert signal.getsignal(signal.SIGINT) is before
