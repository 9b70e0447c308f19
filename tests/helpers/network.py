"""No test reaches another machine: it would be slow, or fail, where that one is absent."""

from __future__ import annotations

import gc
import http.server
import ipaddress
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REFUSED: list[str] = []  # hosts that the code asked for since the list was cleared
_LOCAL_NAMES = {"", "localhost", socket.gethostname()}


def forbid_network() -> None:
    """Let this process, for the rest of its life, connect to this machine only."""
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _is_local(host.decode() if isinstance(host, bytes) else host):
        REFUSED.append(str(host))
        raise ConnectionRefusedError(f"a test must not reach the network, here {host}")


def _is_local(host: str | None) -> bool:
    if host is None or host in _LOCAL_NAMES:
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


class _Forbidden(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403, "no such access")

    def log_message(self, *_: Any) -> None:
        """Write nothing to the output of the test."""


@contextmanager
def refusing_server() -> Iterator[str]:
    """Run a server on this machine that answers every request with 403; yield its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbidden) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def message_of(kind: type[Exception], function: Callable[..., Any], *args: Any) -> str:
    """Call a function that must raise; return the message and keep no traceback."""
    with pytest.raises(kind) as caught:
        function(*args)
    return str(caught.value)


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Fail if what ran leaves a socket or a file to the garbage collector."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    left = [str(one.message) for one in caught if one.category is ResourceWarning]
    assert not left, left
