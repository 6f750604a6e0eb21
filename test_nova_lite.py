#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "gevent>=24.10", "gevent-websocket>=0.10.1,<0.11", "bottle>=0.13,<0.14",
#   "pytest>=8", "hypothesis>=6.100", "websockets>=14",
# ]
# ///
"""The specification of nova_lite, in the order of the file's rooms.

`uv run test_nova_lite.py` runs it with nothing installed; `python test_nova_lite.py` and `pytest` do where the tools
are. The client is the `websockets` package, an independent judge; where it is too polite, a bare socket is used.
"""

from __future__ import annotations

if "pytest" not in __import__("sys").modules:  # as a script: patch before anything else, as a program would
    from gevent import monkey

    monkey.patch_all()

import http.client
import json
import socket
import sys
from contextlib import contextmanager

import gevent
import pytest
from gevent import monkey
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

monkey.patch_all()

import nova_lite
from nova_lite import (
    CallError, CallTimeout, GenServer, Message, NoProc, Nova, Pid, Server, ServerDied, WebSocketHandler, call,
    cancel_timer, cast, demonitor, exit, link, monitor, process_flag, pubsub, receive, register, reply, self_pid, send,
    send_after, spawn, start_link, start_supervisor, stop, unlink, whereis,
)  # fmt: skip

PATIENCE = 5  # seconds after which a test gives up on an event; none waits so long when all is well


@pytest.fixture(autouse=True)
def me():
    """The test itself as a process, with an empty mailbox; afterwards no other process and no channel may be left."""
    pid = self_pid()
    yield pid
    process_flag("trap_exit", False)
    until(lambda: set(nova_lite._processes.values()) == {pid})
    pubsub_left = pubsub.which_channels()
    for channel in pubsub_left:
        pubsub.leave(channel)
    while receive(0) is not None:
        pass
    assert pubsub_left == []


def until(condition):
    """Waits for an event that announces itself to nobody."""
    with gevent.Timeout(PATIENCE, AssertionError(f"it never came to {condition}")):
        while not (value := condition()):
            gevent.sleep(0.001)
    return value


def expect(match=None):
    """The next message, which must come."""
    message = receive(PATIENCE, match)
    assert message is not None, "no such message has come"
    return message


@contextmanager
def serving(*routes, security=False, **settings):
    """A server with these routes on a free port."""
    app = Nova([{"security": security, "routes": routes}], **settings)
    with Server(app, port=0, drain_time=PATIENCE) as server:
        yield server


def ws(server, path="/ws", **options):
    """A client of the `websockets` package."""
    return connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None, open_timeout=PATIENCE, **options)


def http_request(server, method, path, body=None, headers=None):
    """(status, headers, body) of a request over a connection of its own."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        client.request(method, path, body, headers or {})
        response = client.getresponse()
        return response.status, response.headers, response.read()
    finally:
        client.close()


def get_json(server, path, **headers):
    status, _, body = http_request(server, "GET", path, headers=headers)
    return status, json.loads(body)

HANDSHAKE = {
    "Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip


def handshake(path="/ws", **changes):
    """The bytes of an opening handshake; a header that is None is left out."""
    headers = {**HANDSHAKE, **{name.replace("_", "-"): value for name, value in changes.items()}}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


def masked(opcode, payload=b"", fin=True, mask=b"\x01\x02\x03\x04", length=None):
    """A client's frame; `length` lies about the payload."""
    size = len(payload) if length is None else length
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([0x80 | 127]) + size.to_bytes(8, "big")
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def bare(server, first=b""):
    """A bare socket, on which `first` has been sent."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    sock.sendall(first)
    return sock


def read_to_end(sock):
    """All that comes until the server closes."""
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
