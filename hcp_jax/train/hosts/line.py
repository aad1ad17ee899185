"""Send and receive messages over a connection between two processes of a run."""

import contextlib
import json
import socket
import threading
import time
from typing import Any

from hcp_jax.base import reading

_LONGEST_MESSAGE = 2**24


class NoMessageError(ValueError):
    """Something other than a message of a run came over a connection."""


class Line:
    """A connection that carries messages: JSON, one per line.

    Args:
        sock: the socket.

    Attributes:
        peer: a description of the other end.
        heard: the time of the last data from there.
    """

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.peer = "?"
        self.heard = time.monotonic()
        self._read = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; ignore a closed connection, which `receive` notices."""
        with self._sending, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, longest: int = _LONGEST_MESSAGE) -> list[dict[str, Any]] | None:
        """Return the messages that have come; None at the end of the connection.

        Raises:
            NoMessageError: if other data came, or a message of more than `longest` bytes.
        """
        try:
            got = self.sock.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            got = b""
        if not got:
            return None
        self.heard = time.monotonic()
        *lines, self._read = (self._read + got).split(b"\n")
        if max(map(len, [*lines, self._read])) > longest:
            raise NoMessageError("a message that is too long")
        return [_message(line) for line in lines]

    def is_over(self) -> bool:
        """Return whether the other end has closed the connection; the socket must not block."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = reading.parse_json(reading.decode(line, "the message"), "the message")
    except ValueError as error:
        raise NoMessageError(str(error)) from None
    if not isinstance(message, dict):
        raise NoMessageError("the message has no keys")
    return message
