"""The connection between two ranks: JSON objects, one a line, and whether the other end is still there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from typing import Any

LOST_S = 30  # of silence, until a host counts as lost
LOST_ERRORS = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
LINE_BYTES = 2**20  # of one message; more is no rank of ours


class Line:
    """A connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        # A host that loses power or its network closes nothing: the kernel asks whether it is still there.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {
            "TCP_KEEPIDLE": max(1, LOST_S // 3),
            "TCP_KEEPINTVL": max(1, LOST_S // 6),
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": 1000 * LOST_S,  # the same for what was sent and is not acknowledged
        }
        for option, value in options.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.name = ""  # of the rank at the other end
        self.host: int | None = None  # its number
        self.host_name = ""
        self.lost: str | None = None  # why the connection broke, if no process closed it
        self._rest = b""

    @property
    def address(self) -> str:
        """This end's address."""
        return str(self.socket.getsockname()[0])

    def send(self, message: dict[str, Any]) -> None:
        """Sends ``message``; no error where nobody is left to read it."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Waits for the next message; None at the end of the connection, or for anything that is no message."""
        while b"\n" not in self._rest:
            try:
                part = self.socket.recv(65536)
            except OSError as error:
                if error.errno in LOST_ERRORS:
                    reason = os.strerror(error.errno or 0).lower()
                    self.lost = f"no answer for {LOST_S} s ({reason}); its host or the network is down"
                return None
            if not part or len(self._rest) > LINE_BYTES:
                return None
            self._rest += part
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None
