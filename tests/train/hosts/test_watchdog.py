"""Peers: who is missing, who differs, who died; each told by name, in bounded time."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from hcp_jax.commands.launch import _free_port
from hcp_jax.train.hosts.watchdog import GONE, Peers, Place

# One process: meets, agrees, and then does what it is told on its standard input.
PROCESS = """
import json, sys, time
from hcp_jax.train.hosts.watchdog import Peers, Place

place, timeout, silence, same = json.loads(sys.argv[1])
peers = Peers(Place(*place), timeout, silence)
try:
    peers.meet()
    peers.agree(same)
except ValueError as error:
    sys.exit(str(error))
print("met", flush=True)
for line in sys.stdin:
    exec(line)
peers.close()
"""


class Started:
    def __init__(self, processes, same=None, timeout=20.0, silence=20.0, numbers=None):
        address = f"127.0.0.1:{_free_port()}"
        self.all = []
        for i in range(processes) if numbers is None else numbers:
            place = [address, i, processes]
            told = json.dumps([place, timeout, silence, (same or {}).get(i, {"a": 1})])
            self.all.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROCESS, told],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()

    def met(self):
        assert [process.stdout.readline() for process in self.all] == ["met\n"] * len(self.all)

    def ended(self, *which):
        """(exit code, what was said on standard error) of some of them."""
        found = []
        for i in which:
            code = self.all[i].wait(60)
            lines = self.all[i].stderr.read().strip().splitlines()
            waits = [line for line in lines if " waits at 127.0.0.1:" in line]
            assert len(waits) == (i == 0 and len(self.all) > 1)
            found.append((code, "\n".join(line for line in lines if line not in waits)))
        return found


def test_processes_that_end_after_each_other_mind_nothing():
    with Started(3) as started:
        started.met()
        for i in (1, 0, 2):
            started.all[i].stdin.close()
            assert started.ended(i) == [(0, "")]


def test_a_process_that_is_killed_takes_the_others_down_at_once_by_its_name():
    with Started(3) as started:
        started.met()
        began = time.monotonic()
        started.all[1].kill()
        for code, error in started.ended(0, 2):
            assert code == GONE
            assert error.startswith("hcp: process 1 on ")
            assert " died; so process " in error
        assert time.monotonic() - began < 10


def test_the_death_of_the_first_process_is_told_by_all_others():
    with Started(3) as started:
        started.met()
        started.all[0].kill()
        for code, error in started.ended(1, 2):
            assert code == GONE
            assert "process 0 on" in error
            assert "died" in error


def test_an_error_of_one_is_told_by_all():
    with Started(3) as started:
        started.met()
        started.all[2].stdin.write("peers.fail('no such shard'); sys.exit(3)\n")
        started.all[2].stdin.close()
        for code, error in started.ended(0, 1):
            assert code == GONE
            assert "process 2 on" in error
            assert "stopped: no such shard" in error
        assert started.all[2].wait(10) == 3


@pytest.mark.parametrize(
    "said", [b"\xff\n", b"[" * 9999 + b"\n", b"3\n", b'{"failed": 1}\n', b'{"same": [1]}\n']
)
def test_a_process_that_speaks_nonsense_is_named(said):
    with Started(2) as started:
        started.met()
        started.all[1].stdin.write(f"peers._lines[0].sock.sendall({said!r}); time.sleep(60)\n")
        started.all[1].stdin.flush()
        [(code, error)] = started.ended(0)
        assert code == GONE
        assert error.startswith("hcp: process 1 on ")
        assert "says what is no message of a run" in error


def test_an_error_that_comes_of_anothers_death_is_told_by_that_ones_name():
    """A collective that a process died in raises what jax makes of it, a ValueError for one."""
    with Started(2) as started:
        started.met()
        jax_error = "ValueError('Gloo AllGather failed: connection reset by peer')"
        started.all[1].stdin.write(
            "from hcp_jax.train.hosts import cluster; print('met', flush=True)\n"
            f"cluster._leave(peers, {jax_error})\n"
        )
        started.all[1].stdin.flush()
        assert started.all[1].stdout.readline() == "met\n"
        time.sleep(0.3)  # the error is there before the end of the connection
        started.all[0].kill()
        [(code, error)] = started.ended(1)
        assert code == GONE
        assert error.startswith("hcp: process 0 on ")
        assert "died" in error


def test_a_process_that_hangs_is_named():
    with Started(2, silence=1.0) as started:
        started.met()
        started.all[1].send_signal(signal.SIGSTOP)
        [(code, error)] = started.ended(0)
        assert code == GONE
        assert "process 1 on" in error
        assert "has given no sign of life" in error


def test_what_differs_is_told_to_every_process():
    with Started(3, {1: {"a": 1, "steps": 30}, 2: {"a": 2}}) as started:
        for code, error in started.ended(0, 1, 2):
            assert code == 1
            assert "steps is 30 in process 1 on" in error
            assert "a is 2 in process 2 on" in error
            assert "and 1 in process 0" in error


def test_processes_that_do_not_come_are_named_to_those_that_did():
    with Started(4, timeout=2.0, numbers=[0, 2]) as started:
        for _, error in started.ended(0, 1):
            assert "process 1, 3 of 4 did not come to 127.0.0.1:" in error
            assert "within 2 s" in error


def test_a_coordinator_that_cannot_be_reached_is_told_in_bounded_time():
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot reach the coordinator at 127\.0\.0\.1:\d+ after"):
        Peers(Place(f"127.0.0.1:{_free_port()}", 1, 2), timeout=0.5).meet()
    assert time.monotonic() - began < 5


def test_two_processes_of_one_number_are_refused():
    with Started(3, timeout=5.0, numbers=[0, 1, 1]) as started:
        assert "was started as number 1 of 3" in started.ended(0)[0][1]


def test_a_stranger_at_the_port_is_sent_away():
    with Started(2, numbers=[0]) as started:
        place = json.loads(started.all[0].args[3])[0]
        port = int(place[0].rpartition(":")[2])
        _talk(port, b"GET / HTTP/1.1\r\n\r\n")
        peers = Peers(Place(place[0], 1, 2), timeout=10)
        peers.meet()
        peers.agree({"a": 1})
        started.met()
        peers.close()


def _talk(port, said):
    for _ in range(200):
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as stranger:
                stranger.sendall(said)
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("address", ["host", "host:port", ":1", "host:70000"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="must be ADDRESS:PORT"):
        Place(address, 0, 1)
