"""The meeting port: strangers of every kind cost nothing, and the processes of the run get through."""

import argparse
import contextlib
import json
import random
import socket
import sys
import threading

import jax
import pytest

from hcp_jax.commands.launch import _free_port, _from_launcher
from hcp_jax.train.hosts import cluster, meeting
from hcp_jax.train.hosts.line import Line
from hcp_jax.train.hosts.meeting import Address, Admission


class Meeting:
    """Process 0 at its door, in a thread; whatever becomes of it is in `result`."""

    def __init__(self, processes, timeout=60.0):
        self.address = Address(f"127.0.0.1:{_free_port()}", 0, processes)
        self.result = None
        self._strangers = []
        self._thread = threading.Thread(target=self._gather, args=(timeout,))
        self._thread.start()

    def _gather(self, timeout):
        try:
            self.result = Admission(self.address, timeout).gather()
        except BaseException as error:
            self.result = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._thread.join()
        lines = self.result.values() if isinstance(self.result, dict) else []
        for sock in (*self._strangers, *(line.sock for line in lines)):
            sock.close()

    def connect(self):
        while True:
            try:
                sock = socket.create_connection(("127.0.0.1", self.address.port), 10)
                self._strangers.append(sock)
                return sock
            except ConnectionRefusedError:  # it does not listen yet
                assert self._thread.is_alive(), self.result

    def join(self, *numbers):
        """The processes of these numbers come; what each of them found."""
        found = {}

        def come(number):
            address = Address(self.address.coordinator, number, self.address.processes)
            try:
                found[number] = meeting.join(address, 60.0)
                found[number].sock.close()
            except ValueError as error:
                found[number] = error

        threads = [threading.Thread(target=come, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def all_met(self):
        self._thread.join()
        assert isinstance(self.result, dict), self.result
        assert sorted(self.result) == list(range(1, self.address.processes))


def greeting(**changes):
    said = {"hcp": "here", "process": 1, "processes": 3, "secret": meeting.secret()}
    return json.dumps(said | changes).encode() + b"\n"


ODD = [
    None,
    True,
    1.0,
    -1,
    0,
    3,
    99,
    2**63,
    10**400,
    "1",
    [],
    [1],
    {},
    {"a": 1},
    "x" * 1000,
    "\x1b[2J",
]


def said_by_a_stranger(rng):
    """Bytes of one stranger."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 3000))
    if kind == 1:
        return rng.randbytes(20) + b"\n" + rng.randbytes(20)
    if kind == 2:
        return rng.choice([b"[", b'{"a":', b"[{"]) * rng.choice([30, 1000, 100_000]) + b"\n"
    if kind == 3:
        return b"x" * rng.choice([4095, 4096, 5000, 200_000])
    if kind == 4:
        return rng.choice(
            [b"\n" * 50, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0", b"\0" * 9, b"null\n"]
        )
    if kind == 5:  # of the right secret, and yet none of the run's
        key, value = rng.choice(["hcp", "process", "processes", "more"]), rng.choice(ODD)
        fits = isinstance(value, str) if key == "hcp" else value == 3
        return greeting(**{key: None if fits else value})
    if kind == 6:
        return greeting(process=rng.choice([1, 2]), secret=rng.choice(["", "guess", "\ud800"]))
    if kind == 7:
        return greeting()[: rng.randrange(60)]
    return greeting(process=rng.choice([0, 3, -1, 2**40])) * rng.randint(1, 50)


def test_strangers_cost_neither_the_run_nor_its_time(monkeypatch):
    """400 strangers, seeded, 200 of them silent and there to the end: all processes come in.

    One after the other, the silent ones alone would take half an hour.
    """
    monkeypatch.setenv(meeting.SECRET, "a word")
    rng = random.Random(13)
    with Meeting(3) as here:
        for _ in range(100):
            here.connect()  # says nothing, and stays
        for number in range(200):
            stranger = here.connect()
            with contextlib.suppress(OSError):  # it may be sent away before it has said all
                stranger.sendall(said_by_a_stranger(rng))
            if number % 3 == 0:
                stranger.close()
        for _ in range(100):
            here.connect()
        assert {type(found) for found in here.join(1, 2).values()} == {Line}
        here.all_met()


def test_no_more_than_so_many_wait_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(meeting, "MAX_PENDING", 4)
    with Meeting(2) as here:
        silent = [here.connect() for _ in range(10)]
        last = here.connect()
        last.sendall(greeting(process=7))
        assert "refused" in last.makefile().readline()  # all before it have been heard
        assert [sock.recv(1) for sock in silent[:7]] == [b""] * 7
        for sock in silent[7:]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        here.join(1)
        here.all_met()


def test_who_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(meeting, "GREETING_SECONDS", 0.1)
    with Meeting(2) as here:
        silent, half = here.connect(), here.connect()
        half.sendall(greeting()[:9])
        assert (silent.recv(1), half.recv(1)) == (b"", b"")
        here.join(1)
        here.all_met()


def test_who_has_no_place_is_told_why_and_process_0_waits_on(caplog):
    with Meeting(2) as here:
        for said in ({"process": 7}, {"process": 0}, {"processes": 3}, {"secret": "x"}):
            stranger = here.connect()
            stranger.sendall(greeting(**({"processes": 2} | said)))
            answer = json.loads(stranger.makefile().readline())
            assert (
                "on here was started as number" in answer["refused"]
                or "HCP_SECRET" in answer["refused"]
            )
        assert type(here.join(1)[1]) is Line
        here.all_met()
    assert "process 7 on here was started as number 7 of 2" in caplog.text


def test_a_number_is_free_again_once_its_process_is_gone():
    with Meeting(3) as here:
        first = here.connect()
        first.sendall(greeting())
        second = here.connect()
        second.sendall(greeting(hcp="other"))  # while the first one is there, it is not let in
        assert "process 1 on other was started as number 1 of 3" in second.makefile().readline()
        first.close()
        assert {type(found) for found in here.join(1, 2).values()} == {Line}
        here.all_met()


def test_who_was_sent_away_is_named_when_time_is_up():
    with Meeting(2, timeout=2.0) as here:
        stranger = here.connect()
        stranger.sendall(greeting(hcp="\x1b[2J", processes=5))
        assert "refused" in stranger.makefile().readline()
        here._thread.join()
        assert "process 1 of 2 did not come" in str(here.result)
        assert r"process 1 on \x1b[2J was started as number 1 of 5" in str(here.result)


def test_a_process_is_not_fooled_by_what_else_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(f"127.0.0.1:{server.getsockname()[1]}", 1, 2)

        def answer():
            with server.accept()[0] as sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="is no run's process 0"):
            meeting.join(address, 10.0)
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this host on Linux alone")
def test_a_run_on_loopback_listens_nowhere_else():
    address = Address(f"127.0.0.1:{_free_port()}", 0, 2)
    with meeting.listening(address), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", address.port), 5)


@pytest.mark.parametrize(
    ("address", "host", "jax_address"),
    [
        ("127.0.0.1:25000", "127.0.0.1", "127.0.0.1:25000"),
        ("localhost:25000", "127.0.0.1", "127.0.0.1:25000"),
        ("203.0.113.7:25000", "", None),  # an address that is not this host's: behind a NAT, say
        ("node-0.cluster:25000", "", None),
    ],
)
def test_the_address_that_is_listened_at(address, host, jax_address):
    address = Address(address, 0, 2)
    assert (address.bind_host, cluster._bind_address(address)) == (host, jax_address)


def test_jax_s_service_listens_where_the_meeting_did(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    address = f"127.0.0.1:{_free_port()}"
    args = argparse.Namespace(
        coordinator=address,
        num_processes=1,
        process_id=0,
        distributed=False,
        start_timeout=5.0,
        heartbeat_timeout=5.0,
    )
    with cluster.joined(args, {}):
        pass
    assert given["coordinator_bind_address"] == address


def test_each_launch_has_a_secret_of_its_own(monkeypatch):
    assert _from_launcher()[meeting.SECRET] != _from_launcher()[meeting.SECRET]
    monkeypatch.setenv(meeting.SECRET, "chosen")
    assert _from_launcher()[meeting.SECRET] == "chosen"
