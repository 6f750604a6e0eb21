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

import ast
import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import bottle
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


# -- websocket process -----------------------------------------------------------------------------------------------


class Recorder(WebSocketHandler):
    """A handler that tells the test, by message, what is called in it; `on` says what to answer."""

    test = None
    on = staticmethod(lambda frame, state: ("ok", state))

    def init(self, state):
        send(self.test, ("init", self_pid()))
        return "ok", state

    def websocket_handle(self, frame, state):
        send(self.test, ("frame", frame))
        return self.on(frame, state)

    def websocket_info(self, info, state):
        return self.on(info, state)

    def terminate(self, reason, req, state):
        send(self.test, ("terminate", reason))


@pytest.fixture
def recorder(me):
    """A Recorder class of this test's own; `recorder.on = ...` sets its behaviour."""
    return type("TestHandler", (Recorder,), {"test": me})


def on(recorder, fn):
    recorder.on = staticmethod(fn)
    return ("/ws", recorder, {"protocol": "ws"})


def ended(reason):
    """Waits for terminate, and checks that it was called once and with this reason."""
    assert expect(is_a("terminate"))[1] == reason
    assert receive(0, is_a("terminate")) is None


def is_a(tag):
    return lambda message: isinstance(message, tuple) and message[0] == tag


def close_code(sock):
    """The close code in what a bare socket still receives; None where the server just closes."""
    data = read_to_end(sock).rpartition(b"\r\n\r\n")[2]
    at = data.rfind(b"\x88")
    return int.from_bytes(data[at + 2 : at + 4], "big") if at >= 0 and data[at + 1] else None


def upgraded(server, path="/ws"):
    """A bare socket behind the 101."""
    sock = bare(server, handshake(path))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return sock


def test_the_tutorials_echo(recorder):
    with serving(on(recorder, lambda frame, state: ("reply", ("text", "Echo: " + frame[1]), state))) as server:
        with ws(server) as client:
            client.send("hello ☃")
            assert client.recv(PATIENCE) == "Echo: hello ☃"
        ended(("remote", 1000, ""))


def test_what_one_says_reaches_all_the_sender_included():
    class Comments(WebSocketHandler):
        def init(self, state):
            pubsub.join("comments")
            return "ok", state

        def websocket_handle(self, frame, state):
            pubsub.broadcast("comments", "new_comment", frame[1])
            return "ok", state

        def websocket_info(self, info, state):
            return "reply", ("text", info[4]), state

    with serving(("/ws", Comments, {"protocol": "ws"})) as server, ws(server) as one, ws(server) as two:
        for number in range(100):
            one.send(f"{number}")
        assert [two.recv(PATIENCE) for _ in range(100)] == [one.recv(PATIENCE) for _ in range(100)]


def test_all_callbacks_run_in_the_connections_own_process_init_included(me):
    class Asks(WebSocketHandler):
        def init(self, state):
            return "ok", [self_pid()]

        def websocket_init(self, state):
            return "ok", [*state, self_pid()]

        def websocket_handle(self, frame, state):
            state.append(self_pid())
            state[0].send("an info")
            return "ok", state

        def websocket_info(self, info, state):
            me.send((*state, self_pid()))
            return "stop", state

    with serving(("/ws", Asks, {"protocol": "ws"})) as server, ws(server) as client:
        client.send("x")
        assert len(set(expect())) == 1


@pytest.mark.parametrize(
    ("answer", "received", "code"),
    [
        (lambda state: ("ok", state), [], None),
        (lambda state: ("ok", state, "hibernate"), [], None),
        (lambda state: "ok", [], None),
        (lambda state: ("reply", ("text", "å"), state), ["å"], None),
        (lambda state: ("reply", ("text", "a"), state, "hibernate"), ["a"], None),
        (lambda state: ("reply", ("binary", b"\0\xff"), state), [b"\0\xff"], None),
        (lambda state: ("reply", [], state), [], None),
        (lambda state: ("reply", [("text", "a"), "ping", ("pong", b""), ("binary", b"b")], state), ["a", b"b"], None),
        (lambda state: ("reply", [("text", "a"), ("close", 4000, "why")], state), ["a"], 4000),
        (lambda state: ("reply", ("close", 1001, ""), state), [], 1001),
        (lambda state: ("reply", "close", state), [], 1005),
        (lambda state: ("stop", state), [], 1000),
        (lambda state: ("stop", state, "hibernate"), [], 1000),
        (lambda state: None, [], 1011),
        (lambda state: ("reply", ("text", b"bytes"), state), [], 1011),
        (lambda state: ("reply", ("nonsense", "x"), state), [], 1011),
        (lambda state: ("reply", ("text", "\ud800"), state), [], 1011),
        (lambda state: ("reply", ("close", 1005, ""), state), [], 1011),
        (lambda state: ("reply", ("ping", b"x" * 126), state), [], 1011),
        (lambda state: ("no", "such", "thing"), [], 1011),
    ],
)
@pytest.mark.parametrize("how", ["frame", "info"])
def test_what_a_callback_answers(recorder, answer, received, code, how):
    def answer_once(what, state):
        return answer(state) if what in ("x", ("text", "x")) else ("ok", state)

    with serving(on(recorder, answer_once)) as server, ws(server) as client:
        pid = expect(is_a("init"))[1]
        client.send("x") if how == "frame" else pid.send("x")
        assert [client.recv(PATIENCE) for _ in received] == received
        if code is None:
            assert client.ping().wait(PATIENCE)
        else:
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(PATIENCE)
            assert closed.value.rcvd.code == code


def test_a_callback_that_raises_is_logged_once_and_hurts_no_other_connection(recorder, caplog):
    def crash_or_echo(frame, state):
        if frame[1] == "crash":
            raise KeyError("deliberate")
        return "reply", frame, state

    with serving(on(recorder, crash_or_echo)) as server, ws(server) as other, ws(server) as client:
        client.send("crash")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE)
        assert closed.value.rcvd.code == 1011
        reason = expect(is_a("terminate"))[1]
        assert reason[:2] == ("crash", KeyError)
        assert reason[2].args == ("deliberate",)
        other.send("still here")
        assert other.recv(PATIENCE) == "still here"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "TestHandler.crash_or_echo" in record.getMessage() or "websocket_handle" in record.getMessage()
    assert record.exc_info[0] is KeyError


def test_frames_right_behind_the_handshake_are_handled(recorder):
    with serving(on(recorder, lambda frame, state: ("reply", frame, state))) as server:
        with bare(server, handshake() + masked(1, b"early") + masked(1, b"x" * 20_000) + masked(8)) as sock:
            data = read_to_end(sock)
            assert b"\x81\x05early" in data
            assert b"x" * 20_000 in data


def test_bytes_may_come_one_by_one(recorder):
    with serving(on(recorder, lambda frame, state: ("reply", frame, state))) as server:
        with bare(server) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in handshake() + masked(1, "ä".encode() * 100) + masked(8, b"\x03\xe8"):
                sock.sendall(bytes([byte]))
            assert "ä".encode() * 100 in read_to_end(sock)


def test_a_ping_is_answered_and_told_to_the_handler(recorder):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server, ws(server) as client:
        assert client.ping(b"are you there").wait(PATIENCE)
        assert expect(is_a("frame")) == ("frame", ("ping", b"are you there"))
        client.pong(b"unasked")
        assert expect(is_a("frame")) == ("frame", ("pong", b"unasked"))


@pytest.mark.parametrize(
    ("last", "reason", "code"),
    [
        (masked(8, b"\x03\xe8bye"), ("remote", 1000, "bye"), 1000),
        (masked(8, b"\x0f\xa0"), ("remote", 4000, ""), 4000),
        (masked(8), "remote", None),
        (masked(3), ("error", "badframe"), 1002),
        (masked(1, b"\xff"), ("error", "badencoding"), 1007),
        (masked(2, length=2_000_000), ("error", "badsize"), 1009),
    ],
)
def test_how_a_client_ends_it(recorder, last, reason, code):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server:
        with upgraded(server) as sock:
            sock.sendall(last)
            assert close_code(sock) == code
            ended(reason)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_just_goes_away(recorder, reset):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server:
        with upgraded(server) as sock:
            sock.sendall(masked(1, b"last words"))
            if reset:
                expect(is_a("frame"))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ended(("error", "closed"))
        if not reset:
            assert expect(is_a("frame")) == ("frame", ("text", "last words"))


@pytest.mark.parametrize(
    ("reason", "told", "code"),
    [("shutdown", "shutdown", 1001), ("kill", "killed", 1011), ("other", "other", 1011)],
)
def test_an_exit_signal_from_another_process(recorder, reason, told, code):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server, ws(server) as client:
        pid = expect(is_a("init"))[1]
        ref = monitor(pid)
        exit(pid, "normal")
        exit(pid, reason)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE)
        assert closed.value.rcvd.code == code
        ended(told)
        assert expect(is_a("DOWN")) == ("DOWN", ref, "process", pid, told)


def test_a_handler_may_block_and_the_others_go_on(recorder):
    def wait_if_told(frame, state):
        return "reply", ("text", expect(is_a("wake")) and "woken") if frame[1] == "wait" else frame, state

    with serving(on(recorder, wait_if_told)) as server, ws(server) as waits, ws(server) as other:
        pid = expect(is_a("init"))[1]
        waits.send("wait")
        expect(is_a("frame"))
        other.send("hello")
        assert other.recv(PATIENCE) == "hello"
        pid.send(("wake",))
        assert waits.recv(PATIENCE) == "woken"


def test_what_was_said_before_a_callback_blocks_goes_out_before_it_waits(recorder):
    def echo_or_wait(frame, state):
        if frame[1] == "wait":
            receive(PATIENCE, is_a("wake"))
        return "reply", frame, state

    with serving(on(recorder, echo_or_wait)) as server:
        with upgraded(server) as sock:
            pid = expect(is_a("init"))[1]
            sock.sendall(masked(1, b"first") + masked(1, b"wait"))
            assert sock.recv(100) == b"\x81\x05first"
            pid.send(("wake",))
            assert sock.recv(100) == b"\x81\x04wait"


def greenlets():
    return sum(issubclass(type(thing), gevent.Greenlet) for thing in gc.get_objects())


def test_idle_connections_hold_no_greenlet(recorder):
    with serving(on(recorder, lambda info, state: ("ok", state))) as server:
        before = greenlets()
        socks = [upgraded(server) for _ in range(100)]
        until(lambda: greenlets() <= before + 1)
        assert len(nova_lite._scheduler.runners) < 50
        for sock in socks:
            sock.close()


def test_a_batch_of_messages_goes_out_in_one_piece_and_in_order(recorder):
    with (
        serving(on(recorder, lambda info, state: ("reply", ("text", str(info)), state))) as server,
        ws(server) as client,
    ):
        pid = expect(is_a("init"))[1]
        for number in range(2000):
            pid.send(number)
        assert [client.recv(PATIENCE) for _ in range(2000)] == [str(number) for number in range(2000)]


def test_a_client_that_reads_slowly_misses_nothing(recorder):
    with serving(on(recorder, lambda info, state: ("reply", ("text", info * 10_000), state))) as server:
        with ws(server, max_queue=1) as client:
            pid = expect(is_a("init"))[1]
            for number in range(300):
                pid.send(f"{number:03}")
            received = []
            while len(received) < 300:
                received.append(client.recv(PATIENCE)[:3])
            assert received == [f"{number:03}" for number in range(300)]


def test_a_client_that_does_not_read_is_cut_and_the_others_never_wait(recorder):
    route = ("/ws", recorder, {"protocol": "ws", "mailbox_limit": 50, "max_message_size": 100})
    recorder.on = staticmethod(lambda info, state: ("reply", ("binary", bytes(100_000)), state))
    with serving(route) as server:
        with upgraded(server) as sock:
            slow = expect(is_a("init"))[1]
            with ws(server) as client:
                quick = expect(is_a("init"))[1]
                until(lambda: slow.send(1) or receive(0, is_a("terminate")) == ("terminate", ("error", "slow")))
                for _ in range(500):
                    quick.send(1)
                    assert len(client.recv(PATIENCE)) == 100_000


def test_a_client_that_takes_nothing_for_too_long_is_cut(recorder):
    route = ("/ws", recorder, {"protocol": "ws", "send_timeout": 0.1})
    recorder.on = staticmethod(lambda info, state: ("reply", ("binary", bytes(20_000_000)), state))
    with serving(route) as server:
        with upgraded(server) as sock:
            expect(is_a("init"))[1].send("now")
            ended(("error", "slow"))


def test_a_client_that_sends_faster_than_its_handler_works_is_held_back(recorder):
    def wait(frame, state):
        receive(PATIENCE, is_a("wake"))
        return "stop", state

    with serving(on(recorder, wait)) as server:
        with upgraded(server) as sock:
            pid = expect(is_a("init"))[1]
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while True:
                    sock.sendall(masked(2, bytes(60_000)))
            assert sum(len(frame[1]) for frame in pid.inbox) < 70 * 60_000
            pid.send(("wake",))
            ended("stop")


def test_a_silent_client_is_pinged_and_one_that_does_not_answer_is_closed(recorder):
    limits = {"protocol": "ws", "idle_timeout": 0.2, "ping_interval": 0.05}
    with serving(("/ws", recorder, limits)) as server, ws(server, ping_interval=None) as answers:
        with upgraded(server) as sock:
            assert sock.recv(2) == b"\x89\x00"
            while b"\x88\x06\x03\xe8idle" not in (data := sock.recv(100)):
                assert set(data) == {0x89, 0}
            ended("timeout")
            answers.send("still here, since the library answers pings")
            expect(lambda message: message[0] == "frame" and message[1][0] == "text")


def test_an_end_by_several_hands_is_one_end(recorder):
    with serving(on(recorder, lambda frame, state: ("stop", state))) as server:
        for _ in range(20):
            with upgraded(server) as sock:
                pid = expect(is_a("init"))[1]
                sock.sendall(masked(1, b"x") + masked(8, b"\x03\xe8"))
                exit(pid, "shutdown")
                exit(pid, "kill")
                sock.shutdown(socket.SHUT_WR)
                assert read_to_end(sock).count(b"\x88") <= 1
                expect(is_a("terminate"))
        assert receive(0, is_a("terminate")) is None
        until(lambda: not server.lounge.connections)


def test_connections_that_come_and_go_leave_nothing_behind(recorder):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    with serving(on(recorder, lambda frame, state: ("reply", frame, state))) as server:
        before = descriptors()
        for number in range(200):
            with upgraded(server) as sock:
                sock.sendall([masked(1, b"x"), masked(8), masked(3), b"\x81"][number % 4])
        until(lambda: not server.lounge.connections and not server.handlers and descriptors() <= before)


def test_init_joins_before_the_101_so_nothing_is_missed_after_it():
    class Joins(WebSocketHandler):
        def init(self, state):
            pubsub.join("news")
            pubsub.broadcast("news", "said", "in init")
            return "ok", state

        def websocket_info(self, info, state):
            return "reply", ("text", info[4]), state

    with serving(("/ws", Joins, {"protocol": "ws"})) as server, ws(server) as client:
        pubsub.broadcast("news", "said", "after the 101")
        assert [client.recv(PATIENCE), client.recv(PATIENCE)] == ["in init", "after the 101"]


# -- server ----------------------------------------------------------------------------------------------------------


def hello(_req):
    return "status", 200, {"Content-Type": "text/plain"}, "hello"


HELLO = ("/hello", hello, {"methods": ["get"]})


def test_a_response_leaves_in_one_packet_and_the_connection_is_kept():
    sizes = []

    class Counts(nova_lite.RequestHandler):
        def _sendall(self, data):
            sizes.append(len(data))
            super()._sendall(data)

    with serving(HELLO) as server, bare(server) as sock:
        server.handler_class = Counts
        for _ in range(3):
            sock.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1000).endswith(b"\r\n\r\nhello")
    assert len(sizes) == 3


def test_a_websocket_may_follow_an_ordinary_request_on_the_same_connection(recorder):
    with serving(HELLO, on(recorder, lambda frame, state: ("reply", frame, state))) as server:
        with bare(server, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            assert sock.recv(1000).endswith(b"hello")
            sock.sendall(handshake() + masked(1, b"hi") + masked(8))
            assert b"\x81\x02hi" in read_to_end(sock)


def test_a_request_is_a_process_for_as_long_as_it_lasts(me):
    def controller(_req):
        me.send(self_pid())
        return "status", 200

    with serving(("/", controller)) as server, bare(server) as sock:
        for _ in range(2):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        one, two = expect(), expect()
        assert one is not two
        monitor(one)
        assert expect()[4] == "noproc"


def test_a_hook_that_replaces_the_101_ends_the_process_that_waited_for_it(recorder):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server:

        @server.application.hook("after_request")
        def refuse():
            raise bottle.HTTPResponse("no", 403)

        with bare(server, handshake()) as sock:
            assert sock.recv(1000).startswith(b"HTTP/1.1 403")
        ended(("error", "closed"))


def test_what_hooks_and_security_put_into_the_headers_is_in_the_101(recorder):
    with serving(on(recorder, lambda frame, state: ("ok", state))) as server:

        @server.application.hook("after_request")
        def sign():
            bottle.response.set_header("X-Signed", "yes")

        with ws(server) as client:
            assert client.response.headers["X-Signed"] == "yes"
            assert "Content-Type" not in client.response.headers


def test_each_request_is_one_line_in_the_log(caplog):
    caplog.set_level("INFO", "nova_lite")
    with serving(HELLO) as server:
        http_request(server, "GET", "/hello")
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r'127.0.0.1:\d+ "GET /hello HTTP/1.1" 200 \d+ [\d.]+ ms', line)


def test_stopping_lets_requests_finish_and_closes_websockets_with_1001(recorder, me):
    def slow(_req):
        me.send(("working", self_pid()))
        receive(PATIENCE)
        return "status", 200, {}, "finished"

    with serving(("/slow", slow), on(recorder, lambda frame, state: ("ok", state))) as server:
        with ws(server) as client, bare(server, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n") as busy, bare(server) as idle:
            request = expect(is_a("working"))[1]
            stopping = gevent.spawn(server.stop)
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(PATIENCE)
            assert closed.value.rcvd.code == 1001
            ended("shutdown")
            assert idle.recv(1) == b""
            with pytest.raises(ConnectionRefusedError):
                bare(server)
            request.send("go on")
            assert read_to_end(busy).endswith(b"finished")
            stopping.get(timeout=PATIENCE)


def test_stopping_takes_no_longer_than_the_drain_time(me):
    def stuck(_req):
        me.send(self_pid())
        receive(PATIENCE)
        return "status", 200

    with serving(("/", stuck)) as server, bare(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        request = expect()
        server.stop(0.05)
        assert read_to_end(sock) == b""
        request.send("go on")


def test_two_servers_in_one_program_stop_each_for_itself(recorder):
    route = on(recorder, lambda frame, state: ("reply", frame, state))
    with serving(route) as stays, ws(stays) as client:
        with serving(route) as goes:
            assert goes.port != stays.port
        client.send("x")
        assert client.recv(PATIENCE) == "x"


# -- demo ------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
PROGRAM = ROOT / "nova_lite.py"


class Demo:
    """`python nova_lite.py`, in a process of its own; `port` is 0 for the helpers until it serves."""

    def __init__(self, *args, cwd, env=None):
        command = [sys.executable, str(PROGRAM), "--port", "0", *args]
        self.process = subprocess.Popen(
            command, cwd=cwd, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.log = []
        self.reader = gevent.spawn(self.read)
        self.port = int(until(lambda: re.search(r"serving on http://\S+:(\d+)/", "".join(self.log)))[1])

    def read(self):
        for line in self.process.stderr:
            self.log.append(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
        assert self.wait() is not None

    def wait(self):
        try:
            return self.process.wait(2 * PATIENCE)
        finally:
            self.process.kill()
            self.reader.join(PATIENCE)
            self.process.stderr.close()

    def notes(self, method, path="", data=None):
        body = None if data is None else json.dumps(data)
        status, _, body = http_request(self, method, f"/api/notes{path}", body, {"Content-Type": "application/json"})
        return status, json.loads(body) if body else None


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with Demo(cwd=tmp_path_factory.mktemp("demo")) as demo:
        yield demo


NOTE = {"title": "Groceries", "body": "milk & bread", "author": "Ada"}


def test_the_page_is_there_and_asks_for_nothing_from_elsewhere(demo):
    status, headers, body = http_request(demo, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(rb"""(src|href)=["']?(https?:)?//""", body)


def test_heartbeat_is_a_200_and_empty(demo):
    assert http_request(demo, "GET", "/heartbeat")[::2] == (200, b"")


def test_the_demo_echoes(demo):
    with ws(demo, "/ws") as client:
        client.send("hi")
        assert client.recv(PATIENCE) == "Echo: hi"


def test_a_comment_reaches_every_client(demo):
    with ws(demo, "/comments") as one, ws(demo, "/comments") as two, ws(demo, "/ws") as other:
        one.send("hello")
        assert (one.recv(PATIENCE), two.recv(PATIENCE)) == ("hello", "hello")
        other.send("x")
        assert other.recv(PATIENCE) == "Echo: x"


def test_a_note_is_made_read_changed_and_deleted_and_every_client_hears_of_it(demo):
    with ws(demo, "/notifications") as one, ws(demo, "/notifications") as two:

        def heard():
            events = [json.loads(client.recv(PATIENCE)) for client in (one, two)]
            assert events[0] == events[1]
            return events[0]["event"], events[0]["data"]

        one.send("ping")
        assert one.recv(PATIENCE) == "pong"
        status, note = demo.notes("POST", "", NOTE)
        assert (status, note) == (201, {**NOTE, "id": note["id"]})
        assert heard() == ("note_created", note)
        assert demo.notes("GET", f"/{note['id']}") == (200, note)
        assert note in demo.notes("GET")[1]["notes"]
        changed = {**note, "title": "Shopping", "body": "cheese"}
        assert demo.notes("PUT", f"/{note['id']}", {"title": "Shopping", "body": "cheese"}) == (200, changed)
        assert heard() == ("note_updated", changed)
        assert demo.notes("DELETE", f"/{note['id']}") == (204, None)
        assert heard() == ("note_deleted", {"id": note["id"]})
        assert demo.notes("GET", f"/{note['id']}") == (404, {"error": "note not found"})
        assert demo.notes("POST", "", NOTE)[1]["id"] > note["id"]


@pytest.mark.parametrize(
    ("method", "path", "data", "status"),
    [
        ("POST", "", {}, 422),
        ("POST", "", {"title": "", "body": "b", "author": "a"}, 422),
        ("POST", "", {"title": 1, "body": "b", "author": "a"}, 422),
        ("POST", "", ["title", "body", "author"], 422),
        ("PUT", "/1", {"title": "t"}, 422),
        ("PUT", "/999999", {"title": "t", "body": "b"}, 404),
        ("GET", "/999999", None, 404),
        ("GET", "/99999999999999999999999", None, 404),
        ("GET", "/one", None, 404),
        ("DELETE", "/999999", None, 404),
        ("PATCH", "/1", {}, 405),
        ("POST", "", {"title": "\ud800", "body": "b", "author": "a"}, 400),
    ],
)
def test_what_the_api_refuses(demo, method, path, data, status):
    answer = demo.notes(method, path, data)
    assert answer[0] == status
    assert isinstance(answer[1]["error"], str)


def test_the_indexer_finds_notes_by_their_words(demo):
    def found(words):
        return [note["id"] for note in get_json(demo, f"/api/notes/search?q={words}")[1]["notes"]]

    id = demo.notes("POST", "", {**NOTE, "body": "a Zebra, spotted"})[1]["id"]
    assert until(lambda: found("zebra")) == [id]
    assert found("SPOTTED+groceries") == [id]
    assert found("zebra+unheard-of") == found("") == []
    demo.notes("PUT", f"/{id}", {"title": "Groceries", "body": "a giraffe"})
    until(lambda: found("giraffe") == [id] and found("zebra") == [])
    demo.notes("DELETE", f"/{id}")
    until(lambda: found("giraffe") == [])


def test_an_indexer_that_is_killed_comes_back_and_knows_everything(tmp_path):
    notes = nova_lite.Notes(str(tmp_path / "notes.db"))
    note = notes.create("Groceries", "zebra", "Ada")
    supervisor = nova_lite.start_indexer(notes)
    first = whereis("note_indexer")
    exit(first, "kill")
    until(lambda: whereis("note_indexer") not in (None, first))
    assert call("note_indexer", ("search", "zebra")) == [note["id"]]
    ref = monitor(supervisor)
    exit(supervisor, "shutdown")
    expect(lambda message: message[:2] == ("DOWN", ref))
    notes.close()


def test_a_query_does_not_stall_the_hub(tmp_path):
    notes = nova_lite.Notes(str(tmp_path / "notes.db"))
    slow = gevent.spawn(
        notes._query,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT 1, 2, 3, i FROM n LIMIT 300000",
    )
    ticks = 0
    while not slow.ready():
        gevent.sleep(0.001)
        ticks += 1
    assert len(slow.get()) == 300_000
    assert ticks > 20
    notes.close()


def test_a_note_outlives_a_kill_right_after_its_201(tmp_path):
    with Demo("--db", "kept.db", cwd=tmp_path) as demo:
        note = demo.notes("POST", "", NOTE)[1]
        demo.process.kill()
    with Demo("--db", "kept.db", cwd=tmp_path) as demo:
        assert demo.notes("GET", f"/{note['id']}") == (200, note)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(tmp_path, number):
    with Demo("--db", ":memory:", cwd=tmp_path) as demo, ws(demo, "/ws") as client:
        demo.process.send_signal(number)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE)
        assert closed.value.rcvd.code == 1001
        assert demo.process.wait(PATIENCE) == 0
        assert not any("Traceback" in line for line in demo.log)
    assert list(tmp_path.iterdir()) == []


# -- main ------------------------------------------------------------------------------------------------------------


def run_program(*args, **env):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *args], capture_output=True, text=True, timeout=30, env={**os.environ, **env}
    )


def test_help_teaches():
    done = run_program("--help")
    assert done.returncode == 0
    for word in ("--host", "--port", "--db", "--reload", "--log-level", "PORT", "HOST", "8080", "notes.db"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("args", "env", "code", "words"),
    [
        (["--port", "99999"], {}, 2, "99999 is no port"),
        ([], {"PORT": "http"}, 2, "invalid port_number value: 'http'"),
        (["--db", "/no/such/folder/notes.db"], {}, 1, "the database /no/such/folder/notes.db cannot be used"),
        (["--db", str(PROGRAM), "--port", "0"], {}, 1, "cannot be used"),
        (["--host", "256.0.0.1"], {}, 1, "cannot listen on 256.0.0.1:8080"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_in_one_line(args, env, code, words):
    done = run_program(*args, **env)
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_program("--db", ":memory:", PORT=str(port))
    assert done.returncode == 1
    assert done.stderr == f"nova_lite: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_reload_starts_again_when_the_file_changes_with_sockets_open(tmp_path, monkeypatch):
    copy = tmp_path / "nova_lite.py"
    copy.write_text(PROGRAM.read_text())
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", copy)
    with Demo("--reload", "--db", ":memory:", cwd=tmp_path) as demo, ws(demo, "/ws"):
        copy.write_text(copy.read_text() + "this is no Python\n")
        until(lambda: any("SyntaxError" in line for line in demo.log))
        demo.log.clear()
        copy.write_text(PROGRAM_TEXT.replace("Echo: ", "Echo again: "))
        demo.port = int(until(lambda: re.search(r"serving on http://\S+:(\d+)/", "".join(demo.log)))[1])
        with ws(demo, "/ws") as client:
            client.send("x")
            assert client.recv(PATIENCE) == "Echo again: x"
    with pytest.raises(ConnectionRefusedError):
        bare(demo)


# -- house rules -----------------------------------------------------------------------------------------------------

PROGRAM_TEXT = PROGRAM.read_text()
ABOVE, LINE, BELOW = PROGRAM_TEXT.partition("# ----- delete from here when vendoring ")


def python(code, cwd):
    """Runs a program in a fresh interpreter, and answers what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_every_public_name_is_there_and_has_a_docstring():
    for name in nova_lite.__all__:
        assert getattr(nova_lite, name).__doc__, name


def test_importing_patches_nothing_opens_nothing_starts_nothing_and_logs_nothing():
    code = """
import logging, os, sys, threading
before = set(os.listdir("/proc/self/fd")), threading.active_count(), list(logging.root.handlers)
import nova_lite
from gevent import monkey
assert not any(monkey.is_module_patched(name) for name in ("socket", "threading", "time", "ssl"))
assert before == (set(os.listdir("/proc/self/fd")), threading.active_count(), list(logging.root.handlers))
from gevent._hub_local import get_hub_if_exists
assert get_hub_if_exists() is None
assert "redis" not in sys.modules and "msgpack" not in sys.modules
"""
    assert python(code, ROOT) == ""


@pytest.mark.parametrize("text", [PROGRAM_TEXT, ABOVE], ids=["whole", "above the line"])
def test_a_copy_works_in_a_package_of_another_project(tmp_path, text):
    package = tmp_path / "mypkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nova_lite.py").write_text(text)
    code = """
from mypkg.nova_lite import *
class S(GenServer):
    def handle_call(self, request, from_, state):
        return "reply", request * 2, state
print(call(start_link(S), 21))
with Server(Nova([{"routes": [("/", lambda req: ("json", 1))]}]), port=0) as server:
    print(server.port > 0)
"""
    assert python(code, tmp_path) == "42\nTrue\n"


def test_no_room_uses_a_room_below_it():
    tree = ast.parse(PROGRAM_TEXT)
    defined = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in names + [target.id for target in targets if isinstance(target, ast.Name)]:
            defined.setdefault(name, node.lineno)
    banners = [number for number, line in enumerate(PROGRAM_TEXT.splitlines(), 1) if line.startswith("# -----")]

    def room(line):
        return max(banner for banner in [0, *banners] if banner <= line)

    wrong = [
        f"line {node.lineno}: {node.id} of line {defined[node.id]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and room(defined.get(node.id, 0)) > room(node.lineno)
    ]
    assert wrong == []


def test_the_demo_uses_the_public_api_only():
    own = {node.name for node in ast.walk(ast.parse(BELOW_CODE)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    above = {
        name
        for node in ast.parse(ABOVE).body
        for name in ([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [])
    }
    used = {node.id for node in ast.walk(ast.parse(BELOW_CODE)) if isinstance(node, ast.Name)}
    assert used & above - own - set(nova_lite.__all__) == set()


BELOW_CODE = BELOW.partition("\n")[2]


def test_functions_are_short():
    def size(node):
        return node.end_lineno - node.lineno + 1

    functions = [node for node in ast.walk(ast.parse(PROGRAM_TEXT)) if isinstance(node, ast.FunctionDef)]
    assert [(node.name, size(node)) for node in functions if size(node) > 45] == []


def test_it_stays_lite():
    assert ABOVE.count("\n") < 2500
    assert BELOW.count("\n") < 900


@pytest.mark.parametrize("patched", [True, False])
def test_one_warning_says_that_the_patch_is_missing(tmp_path, patched):
    first = "from gevent import monkey; monkey.patch_all()\n" if patched else "import bottle\n"
    program = tmp_path / "program.py"
    program.write_text(first + "from nova_lite import Nova\nNova([]).run(port=0)\n")
    process = subprocess.Popen(
        [sys.executable, program], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    lines = []
    while not lines or "serving on" not in lines[-1]:
        lines.append(process.stderr.readline())
    process.terminate()
    assert process.wait(PATIENCE) == 0
    process.stderr.close()
    assert sum("monkey.patch_all()" in line for line in lines) == (0 if patched else 1)


def test_the_readmes_program_runs_as_printed(tmp_path):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert program.count("\n") <= 15
    (tmp_path / "app.py").write_text(program.replace("port=8080", "port=0"))
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        line = process.stderr.readline()
        server = SimpleNamespace(port=int(re.search(r"serving on http://\S+:(\d+)/", line)[1]))
        with ws(server, "/chat") as one, ws(server, "/chat") as two:
            one.send("hello")
            assert (one.recv(PATIENCE), two.recv(PATIENCE)) == ("hello", "hello")
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
        process.stderr.close()


def test_the_docstrings_program_is_the_readmes():
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]

    def squeeze(text):
        return "".join(text.split())

    assert squeeze(program) in squeeze(nova_lite.__doc__)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
