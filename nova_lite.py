#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["gevent>=24.10", "gevent-websocket>=0.10.1,<0.11", "bottle>=0.13,<0.14"]
# ///
"""nova_lite: Erlang Nova's WebSockets and pub/sub, in one Python file.

    from gevent import monkey; monkey.patch_all()
    from nova_lite import Nova, WebSocketHandler, pubsub

    class Chat(WebSocketHandler):
        def init(self, state):
            pubsub.join("chat")
            return "ok", state
        def websocket_handle(self, frame, state):
            match frame:
                case ("text", text): pubsub.broadcast("chat", "said", text)
            return "ok", state
        def websocket_info(self, info, state):
            return "reply", ("text", info[4]), state

    Nova([{"routes": [("/chat", Chat, {"protocol": "ws"})]}]).run(port=8080)

The map. The file reads from top to bottom; a room uses only the rooms above it.

    processes               mailboxes, runners; spawn, send, receive, monitor, link
    gen_server, supervisor  servers that answer calls; restarting what has crashed
    pub/sub                 who is in which channel; broadcast
    requests, responses     what a controller takes and what it gives back
    frames                  RFC 6455, in pure functions and one incremental parser
    websocket process       a connection: its loop, its single writer, its limits
    Nova                    routes as data, security, the gate before the 101
    server                  HTTP, handing sockets over, draining, reloading, workers
    cluster                 other nodes, through Redis
    board                   what this node is doing
    demo, main              the tutorial, working; the command line

Erlang's words, here. An atom is a string, a tuple a tuple, a pid a `Pid`; `Pid ! Msg` is `pid.send(msg)`, `self()` is
`self_pid()`, `receive ... after` is `receive(timeout, match)`, a behaviour is a class (or any object) with the
callbacks, and a value that a callback returns means what it means in OTP, in Nova and in Cowboy.

What differs from Erlang:

  * Processes take turns: a callback that computes for long holds up all the others; one that waits holds up nobody.
  * A payload is handed on, not copied: who has sent it no longer changes it.
  * `receive` takes the first message that its predicate accepts, and answers None when the time is over.
  * Membership is a set: joining twice is joining once (pg counts).
  * A greenlet that becomes a process by asking for its pid ends with its greenlet, in a request with the request. The
    main greenlet is nobody's to kill: an exit signal that it does not trap is logged, and it goes on.
  * Callbacks share their greenlets: a gevent.Timeout that a callback leaves running may hit another process, and what
    it puts into contextvars may be seen there. Close what you open (`with gevent.Timeout(...)`).
  * Another OS thread may `send`, `broadcast` and `exit`; it has no mailbox of its own.
  * Sending to a name that nobody has is silent, as sending to the dead is.
  * Across nodes, delivery is at most once; ("nova_resync", channel) says that something may be missing. Only what
    MessagePack, tuples, pids and datetimes can say crosses; a link does not.
  * `init` of a WebSocket handler runs in the connection's own process, so joining there works over HTTP/1.1 as well.
  * `terminate` of a WebSocket handler runs whatever ends the connection, `exit(pid, "kill")` included.
  * The default view of ("ok", variables) is named after the controller function, not after its module.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything imports threading, socket or bottle: they must see the patched modules
    from gevent import monkey

    monkey.patch_all()

# ---------------------------------------------------------------------------------------------------------------------
# Prologue: imports, and the defaults with their reasons.
# House rule: importing this file patches nothing, opens nothing, starts nothing and logs nothing.
# ---------------------------------------------------------------------------------------------------------------------

import _socket
import codecs
import errno
import gc
import importlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cache, lru_cache, partial
from heapq import nlargest
from http.cookies import SimpleCookie
from io import BytesIO
from itertools import count, islice
from math import inf, isfinite
from socket import IPPROTO_TCP, TCP_NODELAY, gethostname
from ssl import SSLEOFError, SSLWantReadError, SSLWantWriteError, SSLZeroReturnError
from time import monotonic
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote_to_bytes, urlencode, urlsplit

import bottle
import gevent
import gevent.event
import gevent.local
import gevent.monkey
import gevent.pywsgi
import gevent.socket
import gevent.subprocess
from bottle import HTTPError, HTTPResponse
from gevent.hub import Hub, Waiter, get_hub
from geventwebsocket.handler import WebSocketHandler as UpgradeHandler
from greenlet import getcurrent, greenlet

__version__ = "0.1.0"
__all__ = [
    "Message",
    "Nova",
    "Pid",
    "Request",
    "Server",
    "Settings",
    "WebSocketHandler",
    "cancel_timer",
    "demonitor",
    "exit",
    "heartbeat",
    "link",
    "monitor",
    "process_flag",
    "pubsub",
    "receive",
    "register",
    "run",
    "self_pid",
    "send",
    "send_after",
    "spawn",
    "unlink",
    "whereis",
]  # fmt: skip -- the rooms behind the core add their own

log = logging.getLogger("nova_lite" if __name__ == "__main__" else __name__)

rooms: dict[str, SimpleNamespace] = {}  # what a room below offers to those above it, by the room's name


def room(name: str) -> SimpleNamespace:
    """Returns what a room offers. Raises RuntimeError if it was cut off."""
    if name not in rooms:
        raise RuntimeError(f"this copy of nova_lite has no room {name!r}")
    return rooms[name]


@dataclass(frozen=True)
class Settings:
    """What `Nova(..., name=value)` sets for an application, and a route's options for one route."""

    max_body: int = 1024 * 1024  # bytes of a request's body, 413 beyond; an upload wants bottle's `request.body`
    max_message_size: int = 1_000_000  # bytes of a message, fragments counted; 1009 beyond, before the bytes are held
    idle_timeout: float = 60.0  # seconds without a byte from the client before it is taken for gone (Cowboy's default)
    ping_interval: float = 25.0  # seconds of silence between pings: two chances to answer within `idle_timeout`
    mailbox_limit: int = 1_000  # messages that may wait for a client that does not read; then it is cut with 1013
    send_timeout: float = 10.0  # seconds that a client may take nothing of what is ready for it; then 1013, too
    backlog: int = 64  # frames (and `max_message_size` bytes) that may wait for their handler before reading pauses
    on_slow: str = "close"  # or "drop_oldest", "drop_new": what happens beyond `mailbox_limit`; drops are logged
    origins: Any = None  # None: the request's own host, or no Origin header at all; else a list of origins, or "*"
    trust_proxy: int = 0  # proxies in front, True is 1; of X-Forwarded-Proto and -Host, the farthest one's word counts
    subprotocols: Any = ()  # what the handler speaks; the first of the client's that is among them is chosen
    compress: bool = False  # permessage-deflate (RFC 7692) with clients that offer it; costs CPU


# ---------------------------------------------------------------------------------------------------------------------
# Processes: a mailbox, a turn on a runner, and signals, as Erlang has them.
# House rule: this room knows no sockets.
#
# A process waits as a mailbox and a state, nothing more. What reaches an idle one puts it on the ready queue; one hub
# callback hands the queue to a runner, a greenlet that takes process after process and lets each empty its mailbox. A
# callback that blocks keeps that runner until it returns; the hub callback carries on with another. Hence:
#
#   * a process is on the queue or on a runner at most once (`wake` is None all the while);
#   * whatever a turn raises ends that process, never its runner;
#   * only the hub's own thread touches a process: other threads hand what they want over to the hub.
# ---------------------------------------------------------------------------------------------------------------------

TIME_SLICE = 0.003  # seconds that turns may take before sockets and timers get theirs: nothing shall wait for 5 ms
YIELD_DELAY = 1e-6  # seconds: after sleep(0), gevent runs up to 50 callbacks before it looks at sockets again
_FOREVER = 1e9  # seconds
SPARE_RUNNERS = 64  # idle runners kept: a burst of callbacks that block should not cost as many stacks ever after

# Patched, get_ident would tell greenlets apart, not threads.
get_ident: Callable[[], int] = gevent.monkey.get_original("_thread", "get_ident")
_node = "nova@" + gethostname()
_serials = count(1)
refs = count(1)
processes: dict[int, Process] = {}  # every live process, by its serial
registered: dict[str, Process] = {}
exit_hooks: list[Callable[[Process], None]] = []  # what other rooms do when a process has ended


class ProcessExit(gevent.GreenletExit):
    """Ends the process in which it is raised; `except Exception` does not stop it."""

    def __init__(self, reason: Any = "normal") -> None:
        super().__init__(reason)
        self.reason = reason


class Pid:
    """The handle of a process that everybody holds: hashable, printed like `<nova@host.42>`."""

    __slots__ = ("serial",)
    serial: int

    def send(self, message: Any) -> None:
        """Puts `message` into the mailbox. Never fails and never blocks; silent to the dead; from any thread."""
        raise NotImplementedError

    def watch(self, ref: Any, watcher: Any) -> None:
        """`watcher.down(ref, self, reason)` once it has ended; at once, with "noproc", if it is dead."""
        raise NotImplementedError

    def unwatch(self, ref: Any) -> None:
        """Ends that."""
        raise NotImplementedError

    def signal(self, source: Pid, reason: Any) -> None:
        """An exit signal, from `exit` or along a link."""
        raise NotImplementedError

    def kill(self, reason: Any) -> None:
        """An exit signal that cannot be trapped."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{_node}.{self.serial}>"


class Process(Pid):
    """A local process. Its kinds say what a turn is: `step`."""

    __slots__ = (
        "channels", "exiting", "handled", "links", "mailbox", "monitored_by", "name", "owned", "runner",
        "started_at", "trapping", "wake",
    )  # fmt: skip

    def __init__(self) -> None:
        self.serial = next(_serials)
        self.mailbox: deque[Any] = deque()  # _NOWHERE once it has ended
        self.wake: Callable[[Any], None] | None = None  # what the next message calls for; None: it is queued or running
        self.runner: Runner | None = None  # the greenlet that runs it, or that it blocks
        self.exiting: ProcessExit | None = None  # a signal that is to end it: no message is received any more
        self.trapping = False
        self.name: str | None = None
        self.links: Any = ()  # a set once there are some; symmetric
        self.monitored_by: dict[Any, Any] | None = None  # ref -> who monitors this process
        self.owned: dict[Any, Any] | None = None  # ref -> a monitor or timer that goes with it, by its `unwatch(ref)`
        self.channels: Any = ()  # pub/sub's own: a dict once there are some
        self.started_at = monotonic()
        self.handled = 0  # messages, in all
        processes[self.serial] = self

    def step(self) -> None:
        """One turn, on a runner."""
        raise NotImplementedError

    def send(self, message: Any) -> None:
        if get_ident() == scheduler.thread:
            self.deliver(message)
        else:
            scheduler.run_in_hub(self.deliver, message)

    def deliver(self, message: Any) -> None:
        """`send` for those who know that they are in the hub's thread."""
        self.mailbox.append(message)
        wake = self.wake
        if wake is not None:
            wake(self)

    def reschedule(self) -> None:
        """At the end of a turn: waits for the next message, or queues again for those that are there."""
        if self.mailbox or self.exiting is not None:
            enqueue(self)
        else:
            self.wake = enqueue

    def before_blocking(self) -> None:
        """A callback is about to wait; called in its own greenlet, and must not wait itself."""

    def watch(self, ref: Any, watcher: Any) -> None:
        if self.mailbox is DEAD_MAILBOX:
            watcher.down(ref, self, "noproc")
            return
        if self.monitored_by is None:
            self.monitored_by = {}
        self.monitored_by[ref] = watcher

    def unwatch(self, ref: Any) -> None:
        if self.monitored_by:
            self.monitored_by.pop(ref, None)

    def own(self, ref: Any, thing: Any) -> None:
        """Calls `thing.unwatch(ref)` at the end of this process."""
        if self.owned is None:
            self.owned = {}
        self.owned[ref] = thing

    def disown(self, ref: Any) -> Any:
        """Returns what was owned under `ref`, or None."""
        return self.owned.pop(ref, None) if self.owned else None

    # -- signals

    def signal(self, source: Pid, reason: Any) -> None:
        if self.trapping:
            self.deliver(("EXIT", source, reason))
        elif reason != "normal" or source is self:
            self.kill(reason)

    def kill(self, reason: Any) -> None:
        """Ends the process: here and now if it is the one that runs, else as soon as the hub comes by."""
        if self.mailbox is DEAD_MAILBOX or (self.exiting is not None and reason != "killed"):
            return
        self.exiting = signal = ProcessExit(reason)
        if current_process() is self:
            raise signal
        if self.holder() is not None:
            scheduler.hub.loop.run_callback(self._interrupt, signal)
        elif self.wake is not None:
            enqueue(self)

    def _interrupt(self, signal: ProcessExit) -> None:
        # Between `kill` and this callback the runner may have finished with the process, and then `rest` has queued it;
        # or `receive` has raised the signal already: a second time would end the process's own `finally`.
        holder = self.holder()
        if holder is not None and self.exiting is signal and signal.__traceback__ is None:
            holder.throw(signal)

    def holder(self) -> Any:
        """Returns the greenlet that runs the process or is blocked by it, or None."""
        return self.runner

    def check_signals(self) -> None:
        """Raises the exit signal that has come, if any: what was sent after it must not be received."""
        if self.exiting is not None and self.exiting is not TERMINATING:
            raise self.exiting

    def handle_exit(self, error: BaseException) -> None:
        """A turn was left by `error`, or a signal came between turns: last words, then the end. Never raises."""
        self.exiting = TERMINATING
        try:
            reason = self.cleanup(error)
        except BaseException as failure:
            reason = self.log_crash(failure, "its last words")
        self.finish(reason)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            get_hub().handle_system_error(type(error), error, error.__traceback__)

    def cleanup(self, error: BaseException) -> Any:
        """Does what is left to do and tells the exit reason."""
        return error.reason if isinstance(error, ProcessExit) else self.log_crash(error, "")

    def log_crash(self, error: BaseException, where: str) -> Any:
        """Logs a crash, once, with its traceback; a death by signal is none. Tells the exit reason."""
        if isinstance(error, gevent.GreenletExit):
            return getattr(error, "reason", "killed")
        known = vars(error)  # what `Message.once` raises in all receivers is logged for the first
        if not isinstance(error, KeyboardInterrupt | SystemExit) and not known.get("_is_logged"):
            log.error("%r%s crashed%s", self, self.title(), where and f" in {where}", exc_info=error)
        if "_is_logged" in known:
            known["_is_logged"] = True
            error.with_traceback(None)  # the message would keep this receiver's frames
        return error

    def role(self) -> str:
        """What it is to people: its handler, server or function."""
        return type(self).__name__

    def title(self) -> str:
        """What the log says behind the pid."""
        return f" {self.name}" if self.name else ""

    def finish(self, reason: Any) -> None:
        """The one and only end: name and channels go, monitors and links hear of it."""
        if self.mailbox is DEAD_MAILBOX:
            return
        self.mailbox, self.wake, self.exiting = DEAD_MAILBOX, None, TERMINATING
        processes.pop(self.serial, None)
        if self.name is not None:
            del registered[self.name]
        for hook in exit_hooks:
            hook(self)
        owned, monitored_by, links = self.owned or {}, self.monitored_by or {}, self.links
        self.owned, self.monitored_by, self.links = None, None, ()
        for ref, thing in owned.items():
            thing.unwatch(ref)
        for ref, watcher in monitored_by.items():
            watcher.down(ref, self, reason)
        for other in links:
            other.links.discard(self)
            other.signal(self, reason)

    def down(self, ref: int, process: Pid | str, reason: Any) -> None:
        """A process that this one monitors has ended."""
        self.disown(ref)
        self.deliver(("DOWN", ref, "process", process, reason))


DEAD_MAILBOX: deque[Any] = deque(maxlen=0)  # the mailbox of the dead: takes everything, keeps nothing
TERMINATING = ProcessExit("ending")  # `exiting` during the last words: only "kill" cuts them short


class Task(Process):
    """What `spawn` starts: a function that keeps its runner for life, since it waits where it pleases."""

    __slots__ = ("args", "fn")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self.fn, self.args = fn, args

    def step(self) -> None:
        self.fn(*self.args)
        self.finish("normal" if self.exiting is None else self.exiting.reason)

    def role(self) -> str:
        return getattr(self.fn, "__qualname__", repr(self.fn))

    def title(self) -> str:
        return super().title() or f" {self.role()}"


class GreenletProcess(Process):
    """A greenlet that somebody else has started, and that became a process by asking for its pid."""

    __slots__ = ("greenlet",)

    def __init__(self, current: greenlet) -> None:
        super().__init__()
        self.greenlet = weakref.ref(current, self._collected)
        if isinstance(current, gevent.Greenlet):
            current.rawlink(self._ended)

    def _ended(self, done: gevent.Greenlet) -> None:
        value = done.value if done.successful() else done.exception
        if isinstance(value, gevent.GreenletExit):
            value = getattr(value, "reason", "killed")
        self.finish("normal" if done.successful() and value is done.value else value)

    def _collected(self, _greenlet: Any) -> None:
        scheduler.run_in_hub(self.finish, "normal")

    def finish(self, reason: Any) -> None:
        super().finish(self.exiting.reason if self.exiting is not None and reason == "normal" else reason)
        target = self.greenlet()
        if target is not None:
            _adopted.pop(target, None)
        if isinstance(target, gevent.Greenlet):
            target.unlink(self._ended)

    def kill(self, reason: Any) -> None:
        target = self.greenlet()
        if target is not None and target.parent is None and self.mailbox is not DEAD_MAILBOX:
            log.error("%r is the main greenlet and goes on; the exit signal was %r", self, reason)
        else:
            scheduler.bind_thread()
            super().kill(reason)

    def holder(self) -> Any:
        return self.greenlet()


class Runner(greenlet):
    """A greenlet that gives turns to processes; `process` is the one that it runs, or that blocks it."""

    process: Process | None = None

    def run(self) -> None:
        ready = scheduler.ready
        while True:
            while ready and monotonic() < scheduler.deadline:
                process = self.process = ready.popleft()
                process.runner = self
                try:
                    if process.exiting is None:
                        process.step()
                    else:
                        process.handle_exit(process.exiting)
                except BaseException as error:
                    process.handle_exit(error)
                process.runner = None
            self.process = process = None  # type: ignore[assignment]  # an idle runner keeps nobody alive
            if len(scheduler.idle) >= SPARE_RUNNERS:
                return
            scheduler.idle.append(self)
            try:
                while self in scheduler.idle:  # else the switch was meant for a callback that is long gone
                    scheduler.hub.switch()
            except BaseException:  # a gevent.Timeout that a callback has left running
                scheduler.idle.remove(self)
                return

    def switch_out(self) -> None:
        """gevent's hook: this greenlet is about to wait."""
        if self.process is not None:
            self.process.before_blocking()


class Scheduler:
    """The ready queue and its runners. At home in the thread that has started the first process."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.hub: Any = None
        self.ready: deque[Process] = deque()
        self.idle: list[Runner] = []
        self.deadline = 0.0
        self.called = False  # `serve` is among the hub's callbacks
        self.again: Any = None  # the timer that calls it after a slice
        self.iteration = -1  # of the hub's loop, in which the slice of `receive` began
        self.slice_end = 0.0  # when that slice is over
        self.detached: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()  # by other threads, to be called
        self.alarm: Any = None  # the watcher that other threads wake the hub with

    def enqueue(self, process: Process) -> None:
        process.wake = None
        self.ready.append(process)
        if not self.called:
            self.called = True
            self.hub.loop.run_callback(self.serve)

    def serve(self) -> None:
        """Hub callback: runners take turns until the queue is empty or the time slice is over."""
        self.deadline = monotonic() + TIME_SLICE
        while self.ready and monotonic() < self.deadline:
            runner = self.idle.pop() if self.idle else Runner(parent=self.hub)
            runner.switch()  # comes back when it is idle, or when a callback blocks it
        self.called = bool(self.ready)
        if self.called:  # by a timer: gevent runs 50 callbacks before it looks at sockets again
            self.again.start(self.serve)

    def yield_after_slice(self) -> None:
        """Waits for a moment if the hub has not looked at its sockets and timers for a time slice."""
        iteration = self.hub.loop.iteration
        if iteration != self.iteration:
            self.iteration, self.slice_end = iteration, monotonic() + TIME_SLICE
        elif monotonic() > self.slice_end and getcurrent() is not self.hub:
            gevent.sleep(YIELD_DELAY)
            if iteration < 0:  # libuv's loop does not count
                self.slice_end = monotonic() + TIME_SLICE

    def bind_thread(self) -> None:
        """Makes this thread and its hub the home of all processes, unless there is one."""
        if self.thread is None:
            self.hub = get_hub()
            self.again = self.hub.loop.timer(0)
            self.alarm = self.hub.loop.async_(ref=False)
            self.alarm.start(self.call_handed_over)
            self.thread = get_ident()  # the last: other threads look at this

    def run_in_hub(self, fn: Callable[..., Any], *args: Any) -> None:
        """Calls `fn` in the home thread: at once if this is it, else as a callback of its hub, in order."""
        if self.thread is None or self.thread == get_ident():
            fn(*args)
        else:  # not by `run_callback_threadsafe`: it corrupts the loop's count of references (gevent's issue 2212)
            self.detached.append((fn, args))
            self.alarm.send()

    def call_handed_over(self) -> None:
        """Hub callback: calls what other threads have handed over, for a time slice."""
        end = monotonic() + TIME_SLICE
        while self.detached:
            fn, args = self.detached.popleft()
            try:
                fn(*args)
            except BaseException:
                self.hub.handle_error(fn, *sys.exc_info())
            if monotonic() > end:
                self.alarm.send()
                break


scheduler = Scheduler()
enqueue = scheduler.enqueue
_adopted: weakref.WeakKeyDictionary[greenlet, Process] = weakref.WeakKeyDictionary()


def current_process() -> Process | None:
    """The process that the current greenlet runs, if it is one."""
    current = getcurrent()
    return current.process if type(current) is Runner else _adopted.get(current)


def self_pid() -> Pid:
    """The pid of the calling process. Any greenlet becomes a process by asking (erlang:self/0)."""
    return current_process() or _adopt(getcurrent())


def _adopt(current: greenlet) -> Process:
    process = GreenletProcess(current)
    if scheduler.thread not in (None, get_ident()) or isinstance(current, Hub):
        process.finish("noproc")  # in another thread, or a callback of the hub: a sender without a mailbox
    _adopted[current] = process
    return process


def calling_process() -> Process:
    """The calling process, for those who need its mailbox. Raises RuntimeError in a thread that is not the hub's."""
    scheduler.bind_thread()
    if get_ident() != scheduler.thread:
        raise RuntimeError("only send, broadcast and exit work from a thread other than the hub's")
    return self_pid()  # type: ignore[return-value]


def resolve(target: Pid | str) -> Any:
    """A pid, or the process that has this name, or None. Raises TypeError for anything else."""
    if isinstance(target, str):
        return registered.get(target)
    if isinstance(target, Pid):
        return target
    raise TypeError(f"a pid or a registered name is needed, not {target!r}")


def wait_for(waiter: Waiter, timeout: float | None) -> Any:
    """What `waiter` is given, or None after `timeout` seconds."""
    if timeout is None and getcurrent().parent is not None:
        return waiter.get()
    # Without a timer, gevent would raise LoopExit in the main greenlet, though a thread may send yet.
    with get_hub().loop.timer(_FOREVER if timeout is None else max(timeout, 0)) as timer:
        timer.start(waiter.switch, None, update=True)
        return waiter.get()


def spawn(fn: Callable[..., Any], *args: Any) -> Pid:
    """Starts a process that runs `fn(*args)` in a greenlet of its own (erlang:spawn/1)."""
    if not callable(fn):
        raise TypeError(f"spawn needs a function, not {fn!r}")
    scheduler.bind_thread()
    task = Task(fn, args)
    scheduler.run_in_hub(enqueue, task)
    return task


def send(target: Pid | str, message: Any) -> Any:
    """Sends to a pid or a registered name, and answers the message (erlang:send/2). Silent where nobody listens."""
    process = resolve(target)
    if process is not None:
        process.send(message)
    return message


def receive(timeout: float | None = None, match: Callable[[Any], Any] | None = None) -> Any:
    """The first message that `match` accepts, or None after `timeout` seconds; the others stay, in their order."""
    me = calling_process()
    deadline = None if timeout is None else monotonic() + timeout
    seen = 0  # messages that `match` has refused
    mailbox = me.mailbox
    if mailbox or timeout == 0:
        scheduler.yield_after_slice()
    while True:
        if me.exiting is not None:
            me.check_signals()
        if match is not None:
            seen = _count_refused(me, match, seen)
            me.check_signals()  # `match` may have waited
        if seen < len(mailbox):
            message = mailbox[seen]
            del mailbox[seen]
            me.handled += 1
            return message
        if deadline is not None and monotonic() >= deadline:
            return None
        _await_message(me, None if deadline is None else deadline - monotonic())


def _count_refused(me: Process, match: Callable[[Any], Any], seen: int) -> int:
    """Returns how many messages come before the first that `match` accepts; all, if it accepts none."""
    mailbox, handled = me.mailbox, me.handled
    messages = islice(mailbox, seen, None)
    while True:
        try:
            message = next(messages)
        except StopIteration:
            return seen
        except RuntimeError:  # the mailbox has changed: `match` has sent to this process, or waited
            messages = islice(mailbox, seen, None)
            continue
        accepted = match(message)
        if me.handled != handled:  # `match` has received: the others have moved up
            seen, handled, messages = 0, me.handled, islice(mailbox, 0, None)
        elif accepted:
            return seen
        else:
            seen += 1
            if not seen % 16:
                scheduler.yield_after_slice()


def _await_message(me: Process, timeout: float | None) -> None:
    waiter = Waiter()

    def wake(process: Process) -> None:
        process.wake = None
        waiter.hub.loop.run_callback(waiter.switch, True)

    me.wake = wake
    try:
        wait_for(waiter, timeout)
    finally:
        me.wake = None


def check_name(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name is a string that is not empty, not {name!r}")
    return name


def register(name: str, pid: Pid) -> None:
    """Gives a process a name (erlang:register/2). Raises ValueError where either has one already, or is dead."""
    if not isinstance(pid, Process) or pid.mailbox is DEAD_MAILBOX:
        raise ValueError(f"{pid!r} is no live process of this node")
    if check_name(name) in registered or pid.name is not None:
        raise ValueError(f"{name!r} or {pid!r} is registered already")
    registered[name], pid.name = pid, name


def whereis(name: str) -> Pid | None:
    """The process of that name (erlang:whereis/1)."""
    return registered.get(name)


def monitor(target: Pid | str) -> int:
    """From now on one ("DOWN", ref, "process", pid, reason) when `target` ends; at once, "noproc", if it is dead."""
    me, process, ref = calling_process(), resolve(target), next(refs)
    if process is None:
        me.down(ref, target, "noproc")
    else:
        me.own(ref, process)
        process.watch(ref, me)
    return ref


def demonitor(ref: int, flush: bool = False) -> bool:
    """Ends a monitor; tells whether there was one. With `flush`, a DOWN that has come already goes too."""
    me = calling_process()
    target = me.disown(ref)
    if target is not None:
        target.unwatch(ref)
    elif flush:
        receive(0, is_down(ref))
    return target is not None


def is_down(ref: int) -> Callable[[Any], bool]:
    """Accepts the DOWN of this monitor, and nothing else."""
    return lambda message: isinstance(message, tuple) and message[:2] == ("DOWN", ref)


def link(pid: Pid) -> bool:
    """Ties the calling process and `pid`: if one ends abnormally, so does the other (erlang:link/1).

    TypeError for a process of another node.
    """
    me, other = calling_process(), resolve(pid)
    if other is me:
        return True
    if other is not None and not isinstance(other, Process):
        raise TypeError(f"a link stays on its node, {other!r} is elsewhere: monitor it")
    if other is None or other.mailbox is DEAD_MAILBOX:
        me.signal(pid if other is None else other, "noproc")
        return True
    for one, two in ((me, other), (other, me)):
        if not one.links:
            one.links = set()
        one.links.add(two)
    return True


def unlink(pid: Pid) -> bool:
    """Unties them (erlang:unlink/1)."""
    me, other = calling_process(), resolve(pid)
    if me.links and other in me.links:
        me.links.discard(other)
        other.links.discard(me)
    return True


def exit(pid: Pid | str, reason: Any) -> bool:
    """Sends an exit signal (erlang:exit/2). "normal" is ignored but by oneself; "kill" cannot be trapped."""
    process = resolve(pid)
    if process is not None and reason == "kill":
        scheduler.run_in_hub(process.kill, "killed")
    elif process is not None:
        scheduler.run_in_hub(process.signal, self_pid(), reason)
    return True


def process_flag(flag: str, value: bool) -> bool:
    """Sets "trap_exit" of the calling process and answers what it was. Raises ValueError for any other flag."""
    if flag != "trap_exit":
        raise ValueError(f"the only flag is 'trap_exit', not {flag!r}")
    me = calling_process()
    old, me.trapping = me.trapping, bool(value)
    return old


@dataclass(eq=False)
class Timer:
    """What `send_after` answers; for `cancel_timer`."""

    watcher: Any
    due: float
    owner: Process | None = None  # the process that it goes with; None once it is over

    def fire(self, target: Pid | str, message: Any) -> None:
        self.unwatch(self)
        send(target, message)

    def unwatch(self, _ref: Any) -> None:
        """Ends it, and keeps nothing."""
        self.watcher.close()
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.disown(self)


def send_after(seconds: float, target: Pid | str, message: Any) -> Timer:
    """Sends `message` in so many seconds, unless the process has ended by then (erlang:send_after/3).

    A timer to a name stays. Raises TypeError where `target` is no pid or name.
    """
    calling_process(), resolve(target)
    timer = Timer(scheduler.hub.loop.timer(max(seconds, 0)), monotonic() + seconds)
    if isinstance(target, Process):
        if target.mailbox is DEAD_MAILBOX:
            return timer
        timer.owner = target
        target.own(timer, timer)
    timer.watcher.start(timer.fire, target, message, update=True)
    return timer


def cancel_timer(timer: Timer) -> float | bool:
    """Cancels it: the seconds that were left, or False if it had fired or was cancelled (erlang:cancel_timer/1)."""
    left = max(timer.due - monotonic(), 0.0) if timer.watcher.active else False
    timer.unwatch(timer)
    return left


class Alias(Pid):
    """An address for one answer, as OTP's process aliases: once nobody waits any more, it is deaf."""

    __slots__ = ("__weakref__", "waiter")

    def __init__(self) -> None:
        self.serial, self.waiter = next(_serials), Waiter()

    def send(self, message: Any) -> None:
        scheduler.run_in_hub(self.waiter.hub.loop.run_callback, self.waiter.switch, message)

    def down(self, _ref: int, _process: Pid, reason: Any) -> None:
        self.send(("DOWN", reason))


def send_and_wait(process: Pid, alias: Alias, timeout: float | None, request: Any = None) -> Any:
    """What `process` sends to `alias`, ("DOWN", reason) if it ends before, or None after `timeout` seconds."""
    ref = next(refs)
    process.watch(ref, alias)
    try:
        if request is not None:
            process.send(request)
        return wait_for(alias.waiter, timeout)
    finally:
        process.unwatch(ref)


def is_normal(reason: Any) -> bool:
    """Whether OTP takes this exit reason for an orderly end."""
    return reason in ("normal", "shutdown") or (isinstance(reason, tuple) and reason[:1] == ("shutdown",))


def failing_callback(error: BaseException) -> str:
    """The callback in which `error` was raised: the frame below the last one of this file."""
    names = [(frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [at for at, (filename, _) in enumerate(names) if filename == __file__]
    foreign = names[own[-1] + 1 :] if own else names
    return foreign[0][1] if foreign else names[-1][1] if names else ""


# ---------------------------------------------------------------------------------------------------------------------
# pub/sub: who is in which channel, and broadcast.
# House rule: knows Pids, not what they do.
# ---------------------------------------------------------------------------------------------------------------------


class Message(tuple):
    """What members receive: ("nova_pubsub", channel, sender, topic, payload)."""

    position: str | None = None  # in the history of a channel that is kept; for `join(since=...)`
    _memo: dict[Any, Any] | None = None

    def once(self, fn: Callable[[Message], Any]) -> Any:
        """Returns `fn(self)`, worked out for the first receiver and shared with the others; so is what it raises.

        `fn` is known by its code, so that a lambda will do, or else by its identity. Its value must depend on the
        message alone: ValueError for a bound method or a closure, which bring along something of one receiver.
        """
        if self._memo is None:
            self._memo = {}
        by_code = type(fn) is FunctionType and fn.__defaults__ is None and fn.__kwdefaults__ is None
        key = (
            fn.__code__ if by_code else fn
        )  # by identity: the codes of two files may be equal; kept, so its id is, too
        if id(key) not in self._memo:
            self._memo[id(key)] = key, *self._work_out(fn)
        _, value, error, origin = self._memo[id(key)]
        if error is not None:
            raise error.with_traceback(origin)  # else it would gather the frames of all receivers
        return value

    def _work_out(self, fn: Callable[[Message], Any]) -> tuple[Any, Exception | None, Any]:
        owner = getattr(fn, "__self__", None)
        if getattr(fn, "__closure__", None) or not (owner is None or isinstance(owner, ModuleType)):
            raise ValueError(f"once needs a function of the message alone, not a bound method or a closure: {fn!r}")
        try:
            return fn(self), None, None
        except Exception as error:
            vars(error)["_is_logged"] = False  # for `crashed`, which logs it once for all receivers
            return None, error, error.__traceback__


NO_POSITION = "0"  # of no history: a client that comes back with it gets a resync


class Adapter:
    """What pub/sub asks of the other nodes. This one is for a node that is alone.

    The law: a broadcast reaches every member on every node once. `dispatch` sends it to the members here, by pub/sub's
    own methods, and to the other nodes. All methods but `encode` and `wait_until_subscribed` run in the hub's thread.
    """

    connected = True

    def __init__(self, pubsub: PubSub) -> None:
        self.pubsub = pubsub

    def encode(self, message: Message, exclude: Pid | None) -> Any:
        """Returns what `dispatch` needs besides. Raises TypeError or ValueError for what cannot cross to a node."""

    def dispatch(self, message: Message, exclude: Pid | None, _data: Any) -> None:
        self.pubsub.record_and_deliver(message, exclude)

    def dispatch_here(self, message: Message) -> None:
        self.pubsub.record_and_deliver(message, None)

    def on_join(self, channel: str, process: Process) -> None:
        """A process of this node has joined."""

    def on_leave(self, channel: str, process: Process) -> None:
        """It has left. The channel may be empty now."""

    def on_keep(self, channel: str) -> None:
        """The channel is kept from now on."""

    def wait_until_subscribed(self, channel: str) -> None:
        """Returns when this node receives what other nodes send to the channel."""

    def get_members(self, channel: str) -> list[Pid]:
        """Returns the members on other nodes."""
        return []

    def count_members(self, channel: str) -> int:
        return 0

    def which_channels(self) -> Iterable[str]:
        """Returns the channels that have members on other nodes."""
        return ()

    def info(self) -> dict[str, Any] | None:
        """Returns what `stats` shows of the cluster."""
        return None


class PubSub:
    """Channels and their members (nova_pubsub, on OTP's pg). The one instance is `pubsub`."""

    def __init__(self) -> None:
        self.adapter: Any = Adapter(self)  # the cluster's, once `connect` has been called
        self.channels: dict[str, set[Process]] = {}  # no set is ever empty
        self.monitors: dict[str, dict[int, Process]] = {}  # channel -> ref -> the process to be informed
        self.histories: dict[str, Any] = {}  # channel -> what the room replay keeps of it
        self.message_counts: dict[str, int] = {}  # channel with members here -> messages sent to them
        self._monitored: dict[int, str] = {}  # ref -> channel
        exit_hooks.append(self._on_exit)

    def connect(self, url: str, name: str | None = None) -> str:
        """Makes this node one of a cluster, over the Redis (or Valkey) at `url`, and returns "ok".

        `redis://[user:password@]host[:port][/database][?prefix=...]`, or `rediss://` for TLS; a prefix keeps
        applications apart. Waits at most 5 seconds for the connection. Without one the node continues alone and goes on
        trying. Raises ValueError for a bad URL, ImportError without the packages `redis` and `msgpack`, RuntimeError if
        the node is connected already, if nothing is patched, or if this copy has no room `cluster`.
        """
        return room("cluster").connect(self, url, name)

    def disconnect(self) -> str:
        """Leaves the cluster: "ok", or "not_connected"."""
        return room("cluster").disconnect(self)

    def join(self, channel: str, pid: Pid | None = None, since: str | None = None) -> str:
        """Makes `pid`, or the caller, a member: "ok". Joining twice is joining once; the dead do not stay.

        With `since`, a position in a channel that is kept, the member first gets what it has missed, in order and
        without gap or duplicate; or ("nova_resync", channel), if that cannot be had. In a cluster `join` waits until
        this node hears what is published to the channel, unless Redis is away.
        """
        scheduler.run_in_hub(self._join, check_channel(channel), self._local(pid), since)
        self.adapter.wait_until_subscribed(channel)
        return "ok"

    def leave(self, channel: str, pid: Pid | None = None) -> str:
        """Ends a membership: "ok", or "not_joined"."""
        process = self._local(pid)
        if process not in self.channels.get(check_channel(channel), ()):
            return "not_joined"
        process.channels.pop(channel, None)
        scheduler.run_in_hub(self._leave, channel, process)
        return "ok"

    def keep(self, channel: str, size: int = 100, seconds: float = 300) -> str:
        """Keeps the channel's last messages for `join(since=...)`: so many, and no older than that. "ok".

        In a cluster each node keeps the channel, and Redis does; messages then come by way of Redis, to the members on
        this node as well, which wait for it while it hangs. Raises RuntimeError if this copy has no room `replay`.
        """
        return room("replay").keep(self, channel, size, seconds)

    def get_position(self, channel: str) -> str | None:
        """The position of the last message of a channel that is kept, or None; a message has its own, `position`."""
        history = self.histories.get(check_channel(channel))
        return history.position if history is not None else None

    def broadcast(self, channel: str, topic: str | bytes, payload: Any) -> str:
        """Sends to every member on every node, the caller included if it is one: "ok".

        In a cluster, TypeError for a payload that cannot cross it, and ValueError for one that is too large.
        """
        return self._broadcast(self.make_message(channel, topic, payload), None)

    def local_broadcast(self, channel: str, topic: str | bytes, payload: Any) -> str:
        """Sends to every member on this node: "ok"."""
        scheduler.run_in_hub(self.adapter.dispatch_here, self.make_message(channel, topic, payload))
        return "ok"

    def broadcast_from(self, pid: Pid, channel: str, topic: str | bytes, payload: Any) -> str:
        """As `broadcast`, to all but `pid`."""
        return self._broadcast(self.make_message(channel, topic, payload), pid)

    def get_members(self, channel: str) -> list[Pid]:
        """The members on all nodes, as far as this one has heard."""
        return self.get_local_members(channel) + self.adapter.get_members(channel)

    def get_local_members(self, channel: str) -> list[Pid]:
        """The members on this node."""
        return list(self.channels.get(check_channel(channel), ()))

    def which_channels(self) -> list[str]:
        """The channels that have members, on whatever node (pg:which_groups/1)."""
        return list({*self.channels, *self.adapter.which_channels()})

    def monitor(self, channel: str) -> tuple[int, list[Pid]]:
        """(ref, members), and from now on (ref, "join" | "leave", channel, [pid]) for each change (pg:monitor/2)."""
        ref, me = next(refs), calling_process()
        self.monitors.setdefault(check_channel(channel), {})[ref] = me
        self._monitored[ref] = channel
        me.own(ref, self)
        return ref, self.get_members(channel)

    def demonitor(self, ref: int) -> bool:
        """Ends such a monitor; tells whether there was one (pg:demonitor/2)."""
        channel = self._monitored.pop(ref, None)
        if channel is None:
            return False
        self.monitors[channel].pop(ref).disown(ref)
        if not self.monitors[channel]:
            del self.monitors[channel]
        return True

    unwatch = demonitor

    # -- in the hub's thread

    def _join(self, channel: str, process: Process, since: str | None = None) -> None:
        members = self.channels.get(channel, ())
        if process in members or process.mailbox is DEAD_MAILBOX:
            return
        position = self.get_position(channel)
        if since is not None:
            missed = self.histories[channel].since(since) if channel in self.histories else None
            position = NO_POSITION if missed is None else since
            for message in [("nova_resync", channel)] if missed is None else missed:
                process.deliver(message)
        if not members:
            self.channels[channel], self.message_counts[channel] = set(), 0
        self.channels[channel].add(process)
        if not process.channels:
            process.channels = {}
        process.channels[channel] = position
        self.adapter.on_join(channel, process)
        self.notify_monitors(channel, "join", process)

    def _leave(self, channel: str, process: Process) -> None:
        members = self.channels.get(channel, set())
        if process not in members:
            return
        members.remove(process)
        if not members:
            del self.channels[channel], self.message_counts[channel]
        self.adapter.on_leave(channel, process)
        self.notify_monitors(channel, "leave", process)

    def notify_monitors(self, channel: str, change: str, process: Pid) -> None:
        for ref, monitoring in self.monitors.get(channel, {}).items():
            monitoring.deliver((ref, change, channel, [process]))

    def _on_exit(self, process: Process) -> None:
        for channel in process.channels:
            self._leave(channel, process)

    def _broadcast(self, message: Message, exclude: Pid | None) -> str:
        adapter = self.adapter
        data = adapter.encode(message, exclude)  # may raise, before anyone has received it
        scheduler.run_in_hub(adapter.dispatch, message, exclude, data)
        return "ok"

    def record_and_deliver(self, message: Message, exclude: Pid | None) -> None:
        history = self.histories.get(message[1])
        if history is not None:
            history.add(message)
        self.deliver(message, exclude)

    def deliver_unrecorded(self, message: Message, exclude: Pid | None) -> None:
        """Delivers what a history has missed: no position before it is valid any more."""
        history = self.histories.get(message[1])
        if history is not None:
            history.forget()
        self.deliver(message, exclude)

    def deliver(self, message: Message, exclude: Pid | None) -> None:
        members = self.channels.get(message[1])
        if members is None:
            return
        self.message_counts[message[1]] += 1
        # No callback runs in here, nor anything that joins or leaves: `deliver` only queues.
        for process in members:
            if process is not exclude:
                process.deliver(message)

    def make_message(self, channel: str, topic: str | bytes, payload: Any) -> Message:
        if not isinstance(topic, str | bytes):
            raise TypeError(f"expected a topic, a string or bytes, got {topic!r}")
        return Message(("nova_pubsub", check_channel(channel), self_pid(), topic, payload))

    def _local(self, pid: Pid | None) -> Process:
        process = calling_process() if pid is None else pid
        if not isinstance(process, Process):
            raise TypeError(f"only a process of this node can join, not {pid!r}")
        return process


def check_channel(channel: str) -> str:
    if not isinstance(channel, str):
        raise TypeError(f"a channel is a string, not {channel!r}")
    if not channel:
        raise ValueError("a channel needs a name")
    return channel


pubsub = PubSub()


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses: what a controller takes and what it gives back.
# House rule: no sockets; WSGI's environ in, a bottle response out.
# ---------------------------------------------------------------------------------------------------------------------


class Request(Mapping[str, Any]):
    """What a controller is given: a read-only mapping, worked out lazily, that `match` takes apart.

    `method`, `path`, `bindings` (from the route), `params` (the JSON object or form of the body), `json` (any JSON),
    `body` (bytes), `qs` (the query), `headers` (whatever case), `cookies`, `peer` (address, port), `auth_data` (what
    security said), `subprotocol` (of a WebSocket: the one chosen, or None), `since` (the position up to which a client
    has heard what a channel keeps: its Last-Event-ID, `since` in the query, or None). Asking for `body`, `json` or
    `params` may raise an HTTPError: 400, 408 or 413.
    """

    __slots__ = ("_known", "environ", "settings")

    def __init__(self, environ: dict[str, Any], bindings: dict[str, Any], settings: Settings = Settings()) -> None:
        self.environ, self.settings = environ, settings
        self._known: dict[str, Any] = {"bindings": bindings, "auth_data": None}

    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = _REQUEST_KEYS[key](self)
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(_REQUEST_KEYS)

    def __len__(self) -> int:
        return len(_REQUEST_KEYS)

    def __repr__(self) -> str:
        return f"<Request {self['method']} {printable(self['path'])}>"

    def set_auth_data(self, auth_data: Any) -> None:
        """Security has said yes, and this."""
        self._known["auth_data"] = auth_data

    def agreed(self, subprotocol: str | None) -> None:
        """The handshake has settled on this."""
        self._known["subprotocol"] = subprotocol

    def detach(self) -> None:
        """Outlives its HTTP request: keeps what the client has said, and lets go of the server's buffers."""
        self.environ = {key: value for key, value in self.environ.items() if type(value) is str}

    def is_own_origin(self) -> bool:
        """Returns whether it comes from a page of the application's own, or of `origins`, or from no page at all."""
        return is_own_origin(self.environ, self.settings)

    def content_type(self) -> str:
        return self.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()


class RequestHeaders(bottle.WSGIHeaderDict):
    """The headers of a request, by name in any case. A value is latin-1, whatever its bytes are (PEP 3333)."""

    def __getitem__(self, name: str) -> Any:
        return self.environ[self._ekey(name)]


def printable(text: Any) -> str:
    """Returns what a stranger has said for a line of a log: with escapes for what could end, erase or forge one.

    That is all that is not printable (CWE-117, CWE-150), backslashes and double quotes.
    """
    return repr(str(text))[1:-1].replace('"', '\\"')


def _json(req: Request) -> Any:
    is_json = req.content_type() == "application/json" or req.content_type().endswith("+json")
    return parse_json(req["body"]) if is_json and req["body"] else None


def _params(req: Request) -> Mapping[str, Any]:
    if isinstance(req["json"], dict):
        return req["json"]
    if req.content_type() == "application/x-www-form-urlencoded":
        return dict(parse_qsl(req["body"].decode("utf-8", "replace"), keep_blank_values=True))
    if req.content_type() == "multipart/form-data":
        body = BytesIO(req["body"])  # first: it changes what the environ says of the body
        own = {key: value for key, value in req.environ.items() if not key.startswith("bottle.")}
        try:
            form = dict(bottle.BaseRequest({**own, "wsgi.input": body}).forms.decode())
            "".join([*form, *form.values()]).encode()  # some charsets make lone surrogates
            return form
        except (LookupError, TypeError, ValueError):  # an unknown charset; a part without a name; all else
            raise HTTPError(400, "the form cannot be read")
    return {}


def _cookies(req: Request) -> dict[str, str]:
    """Returns what can be read of the cookies: any page of the domain may have set the others (RFC 6265 §5.4)."""
    cookies = {}
    for pair in req.environ.get("HTTP_COOKIE", "").split(";"):
        # Only what browsers strip, too: with another kind of space before it, `__Host-id` is somebody else's cookie.
        name, equals, value = (part.strip(" \t") for part in pair.partition("="))
        if len(value) > 1 and value[0] == value[-1] == '"':  # as http.cookies writes it
            value = _ESCAPE.sub(lambda found: found[2] or chr(int(found[1], 8)), value[1:-1])
        if equals and name:
            cookies[_as_utf8(name)] = _as_utf8(value)
    return cookies


_ESCAPE = re.compile(r"\\(?:([0-3][0-7]{2})|(.))")


def _as_utf8(text: str) -> str:
    return text.encode("latin-1").decode(errors="replace")


_REQUEST_KEYS: dict[str, Callable[[Request], Any]] = {
    "method": lambda req: req.environ["REQUEST_METHOD"].upper(),
    "path": lambda req: req.environ.get("SCRIPT_NAME", "") + req.environ["PATH_INFO"],
    "bindings": lambda req: {},
    "params": _params,
    "json": _json,
    "body": lambda req: read_body(req.environ, req.settings.max_body),
    "qs": lambda req: dict(parse_qsl(req.environ.get("QUERY_STRING", ""), keep_blank_values=True)),
    "headers": lambda req: RequestHeaders(req.environ),
    "cookies": _cookies,
    "peer": lambda req: (req.environ.get("REMOTE_ADDR", ""), int(req.environ.get("REMOTE_PORT") or 0)),
    "auth_data": lambda req: None,
    "subprotocol": lambda req: None,
    "since": lambda req: req.environ.get("HTTP_LAST_EVENT_ID") or req["qs"].get("since"),
}


def is_own_origin(environ: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a page from this Origin may connect. Browsers send one always, others need not (RFC 6455 §10.2)."""
    origin, allowed = environ.get("HTTP_ORIGIN"), settings.origins
    if origin is None or allowed == "*":
        return True
    if allowed is None:
        scheme = _forwarded(environ, "PROTO", settings.trust_proxy) or environ["wsgi.url_scheme"]
        host = _forwarded(environ, "HOST", settings.trust_proxy) or environ.get("HTTP_HOST", "")
        allowed = [re.sub("^ws", "http", f"{scheme}://{host}")]  # Traefik says wss of a handshake
    parsed = parse_origin(origin)
    return parsed is not None and parsed in map(parse_origin, allowed)


def _forwarded(environ: Mapping[str, Any], name: str, proxies: int) -> str:
    """Returns what the farthest of so many proxies says, or "". Each appends to the list or begins it anew."""
    said = [part.strip() for part in environ.get(f"HTTP_X_FORWARDED_{name}", "").split(",")]
    return next(iter([part for part in said if part][-proxies:]), "") if proxies else ""


_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")


def parse_origin(text: Any) -> tuple[str, str, int] | None:
    """Returns (scheme, host, port) in normal form, or None for what is not scheme://host[:port] (RFC 6454 §6.2)."""
    match = _ORIGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match[3] or 0) > 65535:
        return None
    scheme = match[1].lower()
    return scheme, match[2].lower(), int(match[3] or {"http": 80, "https": 443}.get(scheme, 0))


class BadBody(HTTPError, OSError):
    """The client's body cannot be read: a 400 or a 408, for bottle and for a WSGI application that expects OSError."""


def read_body(environ: dict[str, Any], limit: int) -> bytes:
    """The body, which bottle's `request` may read again. Raises HTTPError: 413 over `limit` bytes, 400 if cut off."""
    file = environ.get("bottle.request.body")
    if file is None or getattr(file, "is_unread", False):
        file = environ.get("wsgi.input")
    else:  # a hook has read it
        file.seek(0)
    chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    try:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = file.read(limit + 1 if chunked else length) if 0 < length <= limit or chunked else b""  # type: ignore[union-attr]
    except HTTPError:
        raise
    except (AttributeError, OSError, ValueError):
        raise HTTPError(400, "the body could not be read")
    if max(length, len(body)) > limit:
        environ["CONTENT_LENGTH"] = str(max(length, len(body)))  # so that the next reader gets the same answer
        raise HTTPError(413, f"the body is larger than {limit} bytes")
    if len(body) < length or length < 0:
        raise HTTPError(400, "the body was cut off")
    # From here on bottle reads it as any other body of a known length.
    for key in ("HTTP_TRANSFER_ENCODING", "bottle.request.body"):
        environ.pop(key, None)
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = BytesIO(body), str(len(body))
    return body


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    return float(number) if isfinite(float(number)) else _not_json(number)


_json_decoder = json.JSONDecoder(parse_constant=_not_json, parse_float=_finite)
_json_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parse_json(body: bytes) -> Any:
    """What the bytes say (RFC 8259). HTTPError 400 where they say nothing that could be said back: NaN, half a pair."""
    try:
        text = body.decode("utf-8")
        value = _json_decoder.decode(text)
        if "\\u" in text:
            _json_encoder.encode(value).encode()  # a lone surrogate is no character, and no UTF-8 can carry it
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise HTTPError(400, f"invalid JSON: {reason}") from None


def to_response(result: Any, method: str = "GET", name: str = "") -> HTTPResponse:
    """A controller's value as a response; ValueError where it is none. `name` is the view that goes without saying.

    A status of 400 and more without a body becomes bottle's HTTPError, so that error pages apply, as in Nova.
    """
    match result:
        case HTTPResponse():
            return result
        case ("json", data):
            return _json_response(201 if method == "POST" else 200, {}, data)
        case ("json", status, headers, data) if _is_head(status, headers):
            return _json_response(status, headers, data)
        case ("status", status) if _is_head(status, {}):
            return HTTPError(status) if status >= 400 else HTTPResponse(b"", status)
        case ("status", status, headers) if _is_head(status, headers):
            response = HTTPError(status) if status >= 400 else HTTPResponse(b"", status)
            response.headers.update(headers)
            return response
        case ("status", status, headers, dict() as data) if _is_head(status, headers):
            return _json_response(status, headers, data)
        case ("status", status, headers, str() | bytes() as body) if _is_head(status, headers):
            return HTTPResponse(body, status, headers)
        case ("ok" | "view", Mapping() as variables):
            return _view(name, variables, {})
        case ("ok" | "view", Mapping() as variables, Mapping() as options):
            return _view(options.get("view", name), variables, options)
        case ("redirect", str(url)):
            return HTTPResponse(b"", 302, {"Location": url})
        case ("sendfile", status, headers, (int(offset), int() | None as length, path), str(mime)) if _is_head(
            status, headers
        ):
            return _file(status, headers, offset, length, path, mime)
    raise ValueError(f"not a response: {result!r}")


def _is_head(status: Any, headers: Any) -> bool:
    """Whether a response may begin with these; what comes before the response proper, 100 to 199, is the server's."""
    return isinstance(status, int) and 200 <= status <= 999 and isinstance(headers, Mapping)


def _json_response(status: int, headers: Mapping[str, str], data: Any) -> HTTPResponse:
    response = HTTPResponse(_json_encoder.encode(data).encode(), status, dict(headers))
    response.headers.setdefault("Content-Type", "application/json")
    return response


def _view(name: str, variables: Mapping[str, Any], options: Mapping[str, Any]) -> HTTPResponse:
    body = bottle.template(name, **variables)
    return HTTPResponse(body, options.get("status_code", 200), dict(options.get("headers", {})))


def _file(
    status: int, headers: Mapping[str, str], offset: int, length: int | None, path: Any, mime: str
) -> HTTPResponse:
    """A file, or `length` bytes of it from `offset` on; HTTPError 404 where there is none."""
    if offset < 0:
        raise ValueError(f"a file has no offset {offset}")
    if not os.path.isfile(path):
        raise HTTPError(404, "there is no such file")
    size = os.stat(path).st_size - offset
    length = max(0, size if length is None else min(length, size))

    def chunks(left: int) -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(offset)
            while left > 0 and (chunk := file.read(min(left, 65536))):
                left -= len(chunk)
                yield chunk

    response = HTTPResponse(chunks(length), status, dict(headers))
    response.headers.setdefault("Content-Type", mime)
    response.headers["Content-Length"] = str(length)
    return response


def error_body(status_line: str, text: str, accept: str) -> tuple[str, bytes]:
    """(content type, body) of an error, in the form that the client accepts: a small page for who asks for HTML."""
    if "text/html" in accept.lower():
        title, text = bottle.html_escape(status_line), bottle.html_escape(text)
        page = f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1><p>{text}</p>\n"
        return "text/html; charset=utf-8", page.encode("utf-8", "replace")
    return "application/json", json.dumps({"error": text}).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Frames: RFC 6455, in pure functions and one incremental parser.
# House rule: no I/O and no greenlets; bytes in, values out.
# ---------------------------------------------------------------------------------------------------------------------

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA  # §5.2
RSV1 = 0x40  # a compressed message (RFC 7692 §6)
DEFLATE_TAIL = b"\x00\x00\xff\xff"  # what ends every compressed message and is not sent (RFC 7692 §7.2.1)
DEFLATE_END = DEFLATE_TAIL + b"\x03\x00"  # and an empty last block: data that was cut off does not come to it
COMPRESS_FROM = 128  # bytes; below, the head of a deflated block eats up what it saves
NO_STATUS = 1005  # §7.1.5: a close frame without a code; never on the wire
Frame = tuple[Any, ...]

_TRANSLATE_FROM = 1_000  # bytes from which translating beats one big integer


class ProtocolError(Exception):
    """What the client has sent ends the connection: `code` is the close code, `what` Cowboy's word for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text
        self.what = {1007: "badencoding", 1009: "badsize"}.get(code, "badframe")


def unmask(data: bytes, mask: bytes) -> bytes:
    """XOR with the client's mask (§5.3)."""
    size = len(data)
    if size < _TRANSLATE_FROM:
        key = (mask * ((size + 3) >> 2))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")
    result = bytearray(data)
    for offset, key_byte in enumerate(mask):
        result[offset::4] = result[offset::4].translate(_xor_table(key_byte))
    return bytes(result)


@cache
def _xor_table(key: int) -> bytes:
    return bytes(byte ^ key for byte in range(256))


def frame_head(opcode: int, size: int) -> bytes:
    """The head of an unmasked, final frame (§5.2)."""
    if size < 126:
        return bytes((0x80 | opcode, size))
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")


def is_close_code(code: int) -> bool:
    """Whether an endpoint may send it (§7.4.1, and the registry that it founded)."""
    return code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def deflated_frame(opcode: int, data: bytes, bits: int) -> bytes:
    """A compressed frame (RFC 7692 §7.2.1). It depends on nothing before it, so that many may be sent the same one."""
    compressor = zlib.compressobj(wbits=-bits)
    body = (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(DEFLATE_TAIL)
    head = frame_head(opcode, len(body))
    return bytes((head[0] | RSV1,)) + head[1:] + body


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; a reason over 123 bytes is cut at a character, NO_STATUS leaves the body empty (§5.5.1)."""
    if code == NO_STATUS:
        return frame_head(CLOSE, 0)
    body = code.to_bytes(2, "big") + reason.encode()[:123].decode("utf-8", "ignore").encode()
    return frame_head(CLOSE, len(body)) + body


def data_frame(opcode: int, data: bytes, bits: int) -> bytes:
    """A message, compressed if `bits`, the window that was agreed on, is not 0 and there is something to win."""
    if bits and len(data) >= COMPRESS_FROM:
        return deflated_frame(opcode, data, bits)
    return frame_head(opcode, len(data)) + data


def encode_frame(frame: Any, bits: int = 0) -> bytes:
    """What a handler replies, as bytes; ValueError where it is no frame."""
    match frame:
        case ("text", text) if isinstance(text, str):  # not str(text), which takes half a microsecond
            return data_frame(TEXT, text.encode(), bits)
        case ("binary", bytes() | bytearray() | memoryview() as data):
            return data_frame(BINARY, bytes(data), bits)
        case ("ping" | "pong" as name, bytes(data)) if len(data) <= 125:
            return frame_head(PING if name == "ping" else PONG, len(data)) + data
        case "ping" | "pong":
            return frame_head(PING if frame == "ping" else PONG, 0)
        case ("close", int(code), str(reason)) if is_close_code(code):
            return close_frame(code, reason)
        case "close":
            return close_frame(NO_STATUS)
    raise ValueError(f"not a frame: {frame!r}")


def encode_event(frame: Any) -> bytes:
    """A text as a server-sent event, one `data:` a line; a ping or pong as a comment. ValueError for anything else."""
    match frame:
        case ("text", text) if isinstance(text, str):
            lines = re.split("\r\n|\r|\n", text)
            return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
        case "ping" | "pong" | ("ping" | "pong", _):
            return b":\n\n"
        case "close" | ("close", _, _):
            return b""
    raise ValueError(f"no event: {frame!r}")


class Parser:
    """The frames of a client, out of bytes that come in any portions. A message is one frame here, however cut.

    Data is checked and unmasked as it comes, so that a bad byte fails at once, and is held in one buffer no larger than
    `limit`; only heads and control frames, up to 139 bytes, are kept to be looked at again.
    """

    __slots__ = (
        "compressed", "decoder", "done", "failure", "final", "inflater", "left", "limit", "mask", "message", "opcode",
        "tail",
    )  # fmt: skip

    def __init__(self, limit: int, compressed: bool = False) -> None:
        self.limit, self.compressed = limit, compressed  # bytes; whether permessage-deflate was agreed on
        self.inflater: Any = None  # of the message under way, if it is compressed
        self.tail = b""  # bytes that make no sense yet
        self.opcode = 0  # of the message under way; 0: none
        self.message: bytearray | None = None  # what is there of it; None: nothing
        self.decoder: Any = None  # says whether a text is UTF-8 so far
        self.left, self.mask, self.final = 0, b"", False  # of the data frame under way: bytes to come, key, FIN
        self.done = False  # a close frame or a failure has come: nothing behind it is looked at
        self.failure: ProtocolError | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes; what is wrong behind them is then in `failure`."""
        frames: list[Frame] = []
        if self.done:
            return frames
        if self.tail:
            data, self.tail = self.tail + data, b""
        position, end = 0, len(data)
        try:
            while position < end and not self.done:
                if self.left:
                    position = self._payload(data, position, frames)
                else:
                    after = self._frame(data, position, frames)
                    if after == position:
                        self.tail = data[position:]
                        break
                    position = after
        except ProtocolError as error:
            self.done, self.message, self.decoder, self.inflater = True, None, None, None
            self.failure = ProtocolError(error.code, error.text)  # without the frames, which hold this parser
        return frames

    def _frame(self, data: bytes, position: int, frames: list[Frame]) -> int:
        """Takes the head at `position` and what is there of its frame; answers the position behind, or the same."""
        available = len(data) - position
        if available < 2:
            return position
        first, second = data[position], data[position + 1]
        opcode, size, head = first & 0x0F, second & 0x7F, position + 2
        frame_end = head + 4 + size
        if (
            0 < first - 0x80 < 3
            and 0x7F < second < 0xFE
            and frame_end <= len(data)
            and not self.opcode
            and size <= self.limit
        ):
            # as nearly always
            frames.append(_message(opcode, unmask(data[head + 4 : frame_end], data[head : head + 4])))
            return frame_end
        self._check_start(first, second, opcode)
        if size > 125:
            width = 2 if size == 126 else 8
            if available < 2 + width:
                return position
            head += width
            size = self._check_size(int.from_bytes(data[head - width : head], "big"), width)
        if opcode < CLOSE:
            self._check_data(opcode, size)
        elif len(data) < head + 4 + size:
            return position
        if len(data) < head + 4:
            return position
        mask, start, frame_end = data[head : head + 4], head + 4, head + 4 + size
        if opcode >= CLOSE:
            frames.append(self._control(opcode, unmask(data[start:frame_end], mask)))
            return frame_end
        if first & 0xC0 == 0x80 and not self.opcode and frame_end <= len(data):  # a whole message in one piece
            frames.append(_message(opcode, unmask(data[start:frame_end], mask)))
            return frame_end
        if first & RSV1:
            self.inflater = zlib.decompressobj(-15)
        self.opcode = self.opcode or opcode
        self.left, self.mask, self.final = size, mask, bool(first & 0x80)
        return self._payload(data, start, frames)

    def _payload(self, data: bytes, position: int, frames: list[Frame]) -> int:
        """Takes what is there of the data frame under way; answers the position behind."""
        part = data[position : position + self.left]
        taken = len(part)
        part = unmask(part, self.mask)
        turn = taken & 3
        self.left, self.mask = self.left - taken, self.mask[turn:] + self.mask[:turn]
        ends = self.final and not self.left
        if self.inflater is not None:
            part = self._inflate(part, ends)
        if self.opcode == TEXT:
            self._check_text(part, ends)
        if self.message is None:
            self.message = bytearray()
        self.message += part
        if ends:
            frames.append(_message(self.opcode, bytes(self.message)))
            self.opcode, self.message, self.decoder, self.inflater = 0, None, None, None
        return position + taken

    def _inflate(self, part: bytes, ends: bool) -> bytes:
        """The part inflated, and never more than the limit allows (RFC 7692 §7.2.2)."""
        room = self.limit - len(self.message or b"")
        try:
            part = self.inflater.decompress(part + DEFLATE_END if ends else part, room + 1)
        except zlib.error:
            raise ProtocolError(1007, "a message that cannot be inflated") from None
        if len(part) > room:
            raise ProtocolError(1009, f"a message over {self.limit} bytes")
        if len(self.inflater.unused_data) > 1 + len(DEFLATE_END) or (ends and not self.inflater.eof):
            raise ProtocolError(1007, "a message that goes on behind its last block, or does not come to it")
        return part

    def _check_start(self, first: int, second: int, opcode: int) -> None:
        if first & (0x30 if self.compressed and opcode in (TEXT, BINARY) else 0x70):
            raise ProtocolError(1002, "reserved bits without an extension")  # §5.2
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(1002, f"unknown opcode {opcode}")  # §5.2
        if not second & 0x80:
            raise ProtocolError(1002, "a client's frame without a mask")  # §5.1
        if opcode >= CLOSE and not (first & 0x80 and second & 0x7F <= 125):
            raise ProtocolError(1002, "a control frame in fragments or over 125 bytes")  # §5.5

    def _check_size(self, size: int, width: int) -> int:
        if size < (126 if width == 2 else 65536) or size >> 63:
            raise ProtocolError(1002, "a length that is not in its shortest form")  # §5.2
        return size

    def _check_data(self, opcode: int, size: int) -> None:
        if (opcode == CONTINUATION) != bool(self.opcode):
            raise ProtocolError(1002, "a fragment out of order")  # §5.4
        if size + len(self.message or b"") > self.limit:
            raise ProtocolError(1009, f"a message over {self.limit} bytes")

    def _check_text(self, part: bytes, ends: bool) -> None:
        if self.decoder is None:
            self.decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            self.decoder.decode(part, ends)
        except UnicodeDecodeError:
            raise ProtocolError(1007, "a text that is not UTF-8") from None  # §8.1
        if self.decoder.getstate()[0][:2] >= b"\xed\xa0" and self.decoder.getstate()[0][0] == 0xED:
            raise ProtocolError(1007, "half a surrogate pair")  # Python's decoder would wait for its third byte

    def _control(self, opcode: int, body: bytes) -> Frame:
        if opcode != CLOSE:
            return "ping" if opcode == PING else "pong", body
        self.done = True
        if not body:
            return "close", NO_STATUS, ""
        code = int.from_bytes(body[:2], "big")
        if len(body) < 2 or not is_close_code(code):
            raise ProtocolError(1002, "a close code that no client may send")  # §7.4
        try:
            return "close", code, body[2:].decode()
        except UnicodeDecodeError:
            raise ProtocolError(1007, "a close reason that is not UTF-8") from None


def _message(opcode: int, body: bytes) -> Frame:
    if opcode == BINARY:
        return "binary", body
    try:
        return "text", body.decode()
    except UnicodeDecodeError:
        raise ProtocolError(1007, "a text that is not UTF-8") from None


# ---------------------------------------------------------------------------------------------------------------------
# WebSocket process: a connection, from its init to the last byte.
# House rule: the only room that touches a WebSocket's socket.
#
#   in    socket readable -> hub callback reads, parses -> inbox -> ready queue. No greenlet waits for a client.
#   out   a turn handles all that inbox and mailbox hold, collects the frames, and writes them with one send. What the
#         socket does not take waits with a write watcher, and the process rests until it is gone.
#   end   a close frame, `terminate`, the end of the process; then the socket alone waits for the client's half.
# ---------------------------------------------------------------------------------------------------------------------

READ_SIZE = 65536  # bytes; one read a wake-up, so that one client's flood leaves room for the others
TURN_TIME = 0.01  # seconds after which a turn ends; 64 broadcasts to 1,000 take 5 ms, and are cheaper in one piece
LINGER = 5.0  # seconds that a closed connection waits for the client to close as well
CACHED_FRAMES, CACHED_BYTES = 256, 1_000_000  # of broadcasts: a flood of 64 channels still finds its frames again


class WebSocketHandler:
    """The callbacks of a connection, one instance each (nova_websocket). All run in the connection's own process.

    They answer ("ok", state), ("reply", frame or [frame, ...], state) or ("stop", state), with or without a trailing
    "hibernate", or plain "ok". A frame is ("text", str), ("binary", bytes), ("ping", bytes), ("pong", bytes),
    ("close", code, reason), or a bare "ping", "pong", "close".
    """

    def init(self, state: Any) -> Any:
        """Before the 101; `state` is {"req": req}. Anything but ("ok", state) refuses the connection with a 500."""
        return "ok", state

    def websocket_handle(self, frame: Frame, state: Any) -> Any:
        """A frame from the client: text, binary, ping (answered already) or pong."""
        return "ok", state

    def websocket_info(self, info: Any, state: Any) -> Any:
        """A message from another process."""
        return "ok", state

    # Optional: websocket_init(state), after the 101, and terminate(reason, req, state), with one of Cowboy's reasons:
    # "stop", "timeout", "remote", ("remote", code, reason), ("error", what), ("crash", class, exception), or what an
    # exit signal said ("shutdown" when the server drains).


class Close(Exception):
    """A connection is to end: close code (None: no close frame), its text, and the reason for `terminate`."""

    def __init__(self, code: int | None, text: str, reason: Any) -> None:
        super().__init__(reason)
        self.code, self.text, self.reason = code, text, reason


_frame_caches: list[dict[Frame, bytes]] = [{} for _ in range(16)]  # by the window of the compression; 0: none
_frame_cache_size = 0


def shared_frame(frame: Frame, bits: int) -> bytes:
    """`encode_frame` for what many are told at once: what has just been encoded, or compressed, is not so again."""
    try:
        return _frame_caches[bits][frame]
    except (KeyError, TypeError, ValueError):  # not there; a bytearray; a memoryview that may change
        return _cache_frame(frame, bits, encode_frame(frame, bits))


def _cache_frame(frame: Frame, bits: int, data: bytes) -> bytes:
    global _frame_cache_size
    if frame[0] in ("text", "binary") and type(frame[1]) in (str, bytes):
        if len(_frame_caches[bits]) >= CACHED_FRAMES or _frame_cache_size > CACHED_BYTES:
            for full in _frame_caches:
                full.clear()
            _frame_cache_size = 0
        _frame_caches[bits][frame] = data
        _frame_cache_size += len(data) + sys.getsizeof(frame[1])
    return data


class Connection(Process):
    """A WebSocket's process: waits as this object, an io watcher and a descriptor; holds no greenlet, no HTTP handler.

    Its life: `Connection(...)`, `start` (runs init), `open` (the socket is handed over), turns, `ends`, lingering.
    """

    __slots__ = (
        "behind", "bits", "closing", "handler", "idle_for", "inbox", "inbox_bytes", "init_waiter", "out", "parser",
        "reader", "registry", "req", "said", "settings", "sock", "stalled_for", "state", "writer",
    )  # fmt: skip
    STATUS = 101  # of the response after which the socket is handed over
    ANSWERS_PINGS = True
    PING = encode_frame("ping")

    def __init__(
        self, handler: Any, req: Request, settings: Settings, registry: ConnectionRegistry, bits: int = 0
    ) -> None:
        self.handler = handler() if isinstance(handler, type) else handler  # may raise: not a process yet
        super().__init__()
        self.req, self.settings, self.registry = req, settings, registry
        self.state: Any = {"req": req}
        self.init_waiter: Alias | None = None  # the gate, which waits for init's answer
        self.sock: Any = None  # non-blocking; None before `open` and once it is closed
        self.reader: Any = None
        self.writer: Any = None  # there while `out` is
        self.out: Any = b""  # what the socket has not taken yet
        self.said: list[bytes] = []  # the frames of this turn
        self.inbox: list[Any] = []  # the client's frames, and perhaps an Ending behind them
        self.inbox_bytes = 0  # about how many bytes have come since it was empty
        self.bits = bits  # the window of the compression that was agreed on; 0: none
        self.parser = Parser(settings.max_message_size, bits > 0)
        self.idle_for = 0.0  # seconds without a byte from the client
        self.stalled_for = 0.0  # seconds in which the client has taken nothing of `out`
        self.behind = 0  # messages beyond the limit at the last sweep
        self.closing = False  # the process has ended; the socket lingers

    # -- before the 101

    def start(self) -> bool:
        """Runs init in the new process, and tells whether it has answered ("ok", state)."""
        scheduler.bind_thread()
        self.registry.enter(self)  # counts from here on: many may be on their way in
        init_waiter = self.init_waiter = Alias()
        enqueue(self)
        try:
            return send_and_wait(self, init_waiter, None) == "ok"
        except BaseException:  # whoever asked is gone, and nobody else would open it
            self.kill("killed")
            raise

    def _init(self) -> None:
        match self.handler.init(self.state):
            case ("ok", state):
                self.state = state
            case result:
                raise ValueError(f"init answered {result!r}, not ('ok', state)")
        init_waiter, self.init_waiter = self.init_waiter, None
        init_waiter.send("ok")  # type: ignore[union-attr]

    def open(self, sock: Any, early: bytes) -> None:
        """After the 101: takes over the socket, and the bytes that came right behind the handshake."""
        if self.exiting is not None:  # killed meanwhile
            sock.close()
            return
        self.sock = sock
        self.reader = scheduler.hub.loop.io(sock.fileno(), 1)
        self.reader.start(self.readable)
        if hasattr(self.handler, "websocket_init"):
            self.inbox.append("$init")
        if early:
            self._receive_bytes(early)
        self.reschedule()

    # -- a turn

    def step(self) -> None:
        if self.init_waiter is not None:
            self._init()
            self.reschedule()
            return
        if self.inbox and not self.out:
            self._handle_inbox()
        if self.mailbox and not self.out and self.exiting is None:
            self._handle_mailbox()
        self.flush()
        self.reschedule()

    def _handle_mailbox(self) -> None:
        handler, mailbox, said, size, deadline = self.handler, self.mailbox, self.said, 0, monotonic() + TURN_TIME
        for done in count(1):
            result = handler.websocket_info(mailbox.popleft(), self.state)
            # A single frame is said in here, not in `_take`: a flood costs a fifth less.
            if type(result) is tuple and len(result) == 3 and result[0] == "reply" and type(result[1]) is tuple:
                _, frame, self.state = result
                data = shared_frame(frame, self.bits)
                said.append(data)
                size += len(data)
                if frame[0] == "close":
                    raise Close(None, "", "stop")
            else:
                size += self._take(result)
            if not mailbox or size > READ_SIZE or self.out or self.exiting is not None:
                break  # what is left waits in the mailbox, where it is shared with other connections, and counted
            if not done % 8 and monotonic() > deadline:  # asked for each message, it would cost a flood 5 %
                break
        self.handled += done

    def _handle_inbox(self) -> None:
        inbox, size, deadline = self.inbox, 0, monotonic() + TURN_TIME
        for done, frame in enumerate(inbox, 1):  # noqa: B007 -- it is used below
            if type(frame) is not tuple:
                self._handle_event(frame)
            elif frame[0] == "close":
                raise Close(frame[1], "", "remote" if frame[1] == NO_STATUS else ("remote", *frame[1:]))
            else:
                if frame[0] == "ping":
                    self.said.append(encode_frame(("pong", frame[1])))
                self.handled += 1
                size += self._take(self.handler.websocket_handle(frame, self.state))
            if size > READ_SIZE:
                self.flush()
                size = 0
            if self.out or self.exiting is not None or monotonic() > deadline:
                break  # the rest waits for its turn, or until the client has read
        del inbox[:done]
        if not inbox:
            self.inbox_bytes = 0
        if not self.reader.active and not self._should_pause():
            self.reader.start(self.readable)

    def _handle_event(self, event: Any) -> None:
        if isinstance(event, Close):
            raise event
        self._take(self.handler.websocket_init(self.state))

    def _take(self, result: Any) -> int:
        """What a callback has answered; tells how many bytes it has said."""
        if type(result) is tuple and len(result) == 3 and result[0] == "reply" and type(result[1]) is tuple:
            self.state = result[2]
            return self._say(result[1])
        match result:
            case "ok":
                pass
            case ("ok", state) | ("ok", state, "hibernate"):
                self.state = state
            case ("reply", answer, state) | ("reply", answer, state, "hibernate"):
                self.state = state
                return sum(self._say(frame) for frame in (answer if isinstance(answer, list) else [answer]))
            case ("stop", state) | ("stop", state, "hibernate"):
                self.state = state
                raise Close(1000, "", "stop")
            case _:
                raise ValueError(f"a callback answered {result!r}")
        return 0

    def _encode(self, frame: Any) -> bytes:
        return encode_frame(frame, self.bits)

    def _say(self, frame: Any) -> int:
        data = self._encode(frame)
        self.said.append(data)
        if frame == "close" or frame[0] == "close":
            raise Close(None, "", "stop")
        return len(data)

    def reschedule(self) -> None:
        if (self.out or self.sock is None) and self.exiting is None:
            self.wake = _apply_overflow
        elif self.inbox or self.mailbox or self.exiting is not None:
            enqueue(self)
        else:
            self.wake = enqueue

    def before_blocking(self) -> None:
        """What was said before a callback waits goes out before it waits."""
        if self.said and self.sock is not None:
            self.flush()

    # -- reading and writing

    def readable(self) -> None:
        """Hub callback."""
        try:
            data = self.sock.recv(READ_SIZE if not self.bits else READ_SIZE // 16)  # compressed, it is many times that
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.idle_for = 0.0
        if self.closing:
            self._await_close(data)
            return
        self._receive_bytes(data)
        if self.wake is enqueue:
            enqueue(self)

    def _receive_bytes(self, data: bytes) -> None:
        frames = self.parser.feed(data)
        self.inbox += frames
        self.inbox_bytes += sum(len(frame[-1]) for frame in frames) if self.bits else len(data)
        if not data or self.parser.failure is not None:
            self._receive_eof(self.parser.failure)
        if self._should_pause():
            self.reader.stop()

    def _should_pause(self) -> bool:
        """Whether reading pauses; or is over."""
        settings, inbox = self.settings, self.inbox
        too_much = self.inbox_bytes > settings.max_message_size and inbox
        return bool(too_much or len(inbox) >= settings.backlog or self.parser.done)

    def _receive_eof(self, failure: ProtocolError | None) -> None:
        """The client is gone, or has broken the protocol."""
        self.parser.done = True
        if failure is None:
            self.inbox.append(Close(None, "", ("error", "closed")))
        else:
            self.inbox.append(Close(failure.code, failure.text, ("error", failure.what)))

    def flush(self) -> None:
        """Writes what was said with one send; what the socket does not take waits in `out`."""
        said = self.said
        if not said:
            return
        data = said[0] if len(said) == 1 else b"".join(said)
        said.clear()
        if self.out:
            self.out = bytes(self.out) + data
            return
        sent = self._send(data)
        if sent < len(data):
            self.out, self.stalled_for = memoryview(data)[sent:], 0.0
            self.writer = scheduler.hub.loop.io(self.sock.fileno(), 2)
            self.writer.start(self.writable)

    def _send(self, data: Any) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody is there to read it; `readable` is about to hear so as well

    def writable(self) -> None:
        """Hub callback."""
        sent = self._send(self.out)
        if sent:
            self.out, self.stalled_for = self.out[sent:], 0.0
        if self.out:
            return
        self.writer.close()
        self.writer = None
        if self.closing:
            self._half_close()
        elif self.wake is _apply_overflow:
            self.reschedule()

    def tick(self, seconds: float) -> None:
        """The sweep comes by, so many seconds after the last time."""
        if self.sock is None:  # cut, and still in its last words
            return
        paused = not self.reader.active and not self.parser.done  # by ourselves: the client is not to blame
        before, self.idle_for = self.idle_for, 0.0 if paused else self.idle_for + seconds
        self.stalled_for += seconds
        settings = self.settings
        if self.closing:
            if self.stalled_for > LINGER:
                self.cut()
        elif self.out and (self.stalled_for > settings.send_timeout or self._is_falling_behind()):
            self.registry.cut += 1
            self.kill(SLOW)
        elif self.idle_for > settings.idle_timeout and self.ANSWERS_PINGS:
            self.kill(IDLE)
        elif before // settings.ping_interval < self.idle_for // settings.ping_interval:
            self.said.append(self.PING)  # from the hub, between turns: a process that is busy is alive, too
            self.flush()

    def _is_falling_behind(self) -> bool:
        """Whether more than the limit waits for the second time, and more than the first time: a burst in one go is no
        reason to cut a client that reads, and one that never catches up has no other end."""
        before, self.behind = self.behind, max(0, len(self.mailbox) - self.settings.mailbox_limit)
        return 0 < before < self.behind

    # -- the end

    def cleanup(self, error: BaseException) -> Any:
        if self.init_waiter is not None:
            return self.log_crash(error, f"{type(self.handler).__name__}.init")
        ending = self._close_for(error)
        ending.__traceback__ = None  # its frames hold it: 3 KiB a connection until the garbage collector comes by
        if self.sock is not None:
            self._start_close(ending)
        log.info("%r%s closed: %r", self, self.title(), ending.reason)
        if hasattr(self.handler, "terminate"):
            self.handler.terminate(ending.reason, self.req, self.state)
        if isinstance(error, ProcessExit) and not isinstance(error.reason, Close):
            return error.reason
        return "normal" if ending.reason[0] != "crash" else error

    def _close_for(self, error: BaseException) -> Close:
        """How a connection ends that is left by `error`."""
        if isinstance(error, ProcessExit):
            if isinstance(error.reason, Close):
                return error.reason
            return Close(1001 if is_normal(error.reason) else 1011, "", error.reason)
        if isinstance(error, Close):
            return error
        self.log_crash(error, f"{type(self.handler).__name__}.{failing_callback(error)}")
        return Close(1011, "", ("crash", type(error), error))

    def role(self) -> str:
        return getattr(self.handler, "__name__", type(self.handler).__name__)  # a module, or an instance

    def title(self) -> str:
        return " {} {}:{}".format(printable(self.req["path"]), *self.req["peer"])

    def _start_close(self, ending: Close) -> None:
        """The close frame, and from here on the socket is on its own."""
        self._queue_close(ending)
        self.flush()
        self.closing, self.stalled_for, self.inbox = True, 0.0, []
        if ending.reason == ("error", "closed"):
            self.cut()
        elif not self.reader.active:
            self.reader.start(self.readable)
        if not self.out:
            self._half_close()

    def _queue_close(self, ending: Close) -> None:
        if ending.code is not None:
            self.said.append(close_frame(ending.code, ending.text))

    def _await_close(self, data: bytes) -> None:
        """The client's half of the close handshake: its close frame, or its end of TCP (§7.1.1)."""
        if not data:
            self.cut()
        else:
            self.parser.feed(data)
            if self.parser.done and not self.out:
                self._half_close()

    def _half_close(self) -> None:
        """All is said. Once the client has said its close too, the server is the one to close TCP; and it reads on to
        the end, since closing with bytes unread would reset the connection and might take our close frame with it."""
        if self.parser.done and self.sock is not None:
            with suppress(OSError):  # the client is gone; `readable` is about to hear so
                self.sock.shutdown(_socket.SHUT_WR)

    def cut(self) -> None:
        """Closes the socket, whatever is still to be said."""
        if self.sock is None:
            return
        for watcher in (self.reader, self.writer):
            if watcher is not None:
                watcher.close()
        self.sock.close()
        self.sock = self.reader = self.writer = None
        self.out, self.parser.message = b"", None  # whoever holds the pid holds this object
        if self.mailbox is DEAD_MAILBOX:
            self.registry.leave(self)

    def finish(self, reason: Any) -> None:
        super().finish(reason)
        if self.sock is not None and not self.closing:  # the last words did not get as far as the goodbye
            self.cut()
        elif self.sock is None:
            self.registry.leave(self)


class EventStream(Connection):
    """The same without an upgrade: what the handler replies goes out as server-sent events (the HTML standard, §9.2).

    The client has nothing to say, and its silence means nothing: one that is gone shows when writing fails or stalls.
    """

    __slots__ = ()
    STATUS = 200
    ANSWERS_PINGS = False
    PING = b":\n\n"
    KEEPALIVE = 15.0  # seconds between pings, at most: proxies cut what is silent
    RETRY = 1_000, 4_000  # milliseconds after which a client reconnects; spread, since many may have lost their server

    def __init__(self, handler: Any, req: Request, settings: Settings, registry: ConnectionRegistry) -> None:
        pinging = replace(settings, ping_interval=min(settings.ping_interval, self.KEEPALIVE))
        super().__init__(handler, req, pinging, registry)

    def open(self, sock: Any, early: bytes) -> None:
        super().open(sock, early)
        if self.sock is not None:
            self.said.append(self._first_event())
            self.flush()

    def _first_event(self) -> bytes:
        """Returns what follows the head at once, so that Firefox fires `open`: the position as of the join.

        With it, a client that is cut off before its first message may come back for what it has missed.
        """
        position = next(filter(None, dict(self.channels).values()), None)  # one will do: the other channels resync
        where = f"event: position\nid: {position}\ndata:\n" if position else ""
        return f"retry: {random.randint(*self.RETRY)}\n{where}\n".encode()

    def _handle_mailbox(self) -> None:
        mailbox, size, deadline = self.mailbox, 0, monotonic() + TURN_TIME
        while True:
            info, count = mailbox.popleft(), len(self.said)
            self.handled += 1
            size += self._take(self.handler.websocket_info(info, self.state))
            position = getattr(info, "position", None)
            if position is not None and len(self.said) > count:
                self.said[-1] = b"id: " + position.encode() + b"\n" + self.said[-1]
            if not mailbox or size > READ_SIZE or self.out or self.exiting is not None or monotonic() > deadline:
                break

    def _encode(self, frame: Any) -> bytes:
        return encode_event(frame)

    def _receive_bytes(self, data: bytes) -> None:
        if not data:
            self._receive_eof(None)
            self.reader.stop()

    def _queue_close(self, _ending: Close) -> None:
        self.parser.done = True  # the client's half is not awaited


SLOW = Close(1013, "too slow", ("error", "slow"))
IDLE = Close(1000, "idle", "timeout")


def _apply_overflow(connection: Connection) -> None:
    """What a message calls for while the socket takes nothing, or is not there yet."""
    policy, mailbox = connection.settings.on_slow, connection.mailbox
    if policy != "close" and len(mailbox) > connection.settings.mailbox_limit:
        at = 0 if policy == "drop_oldest" else -1
        if type(mailbox[at]) is Message:  # a DOWN, an EXIT or a timer is not lost
            del mailbox[at]
            connection.registry.dropped += 1


registries: weakref.WeakSet[ConnectionRegistry] = weakref.WeakSet()


class ConnectionRegistry:
    """The connections of a server, with one sweep for the time limits of all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # connections
        self.leaving = False  # asked to stop, but still serving: see SHUTDOWN_DELAY
        self.draining = False
        self.cut = 0  # connections that did not read
        self.dropped = 0  # messages, for connections that did not read
        self.logged, self.logged_drops = -60.0, 0  # when, and how many
        self.connections: set[Connection] = set()
        self.interval = 1.0  # seconds; a quarter of the shortest limit, at most this
        self.timer: Any = None  # runs while there are connections
        registries.add(self)

    def enter(self, connection: Connection) -> None:
        settings = connection.settings
        shortest = min(settings.idle_timeout, settings.ping_interval, settings.send_timeout, LINGER) / 4
        self.connections.add(connection)
        if self.timer is None or shortest < self.interval:
            self.interval = min(self.interval, shortest)
            self._stop()
            self.timer = scheduler.hub.loop.timer(self.interval, self.interval)
            self.timer.start(self._sweep)

    def leave(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._stop()

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.close()
            self.timer = None

    def _sweep(self) -> None:
        for connection in list(self.connections):
            connection.tick(self.interval)
        if self.dropped > self.logged_drops and monotonic() - self.logged >= 60:
            log.warning("%d messages dropped for clients that do not read", self.dropped - self.logged_drops)
            self.logged, self.logged_drops = monotonic(), self.dropped


# ---------------------------------------------------------------------------------------------------------------------
# Nova: routes to bottle, security, the gate before the 101.
# House rule: a route is data; what it means is decided when the application is made, not when it is asked.
# ---------------------------------------------------------------------------------------------------------------------


class Nova(bottle.Bottle):
    """An application made of groups of routes; for the rest a `bottle.Bottle`, with all that it can.

    A group is {"routes": [(path, controller[, options])], "prefix", "security", "plugins"}. A controller is a function
    of `req`, or, with {"protocol": "ws"}, a handler: a class, a module or any object with the callbacks. Options are
    "methods" (a list), "protocol" ("http" or "ws"), and the names in `Settings`, which `Nova` takes for all routes.
    Raises ValueError for what it does not know.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]] = (), **settings: Any) -> None:
        super().__init__()
        self.settings = _settings(Settings(), settings)
        self.plugins.insert(0, _Outermost())
        for group in [groups] if isinstance(groups, Mapping) else groups:
            self.add(group)

    def add(self, group: Mapping[str, Any]) -> None:
        """One more group of routes. Raises ValueError for what it does not know."""
        unknown = set(group) - {"prefix", "security", "routes", "plugins"}
        if unknown:
            raise ValueError(f"a group of routes has no {', '.join(sorted(unknown))}")
        security = group.get("security", False)
        if security is not False and not callable(security):
            raise ValueError(f"security is False or a function of req, not {security!r}")
        for path, controller, *options in group.get("routes", ()):
            rule = _rule(group.get("prefix", ""), path)
            self._add(rule, controller, security, options[0] if options else {}, group.get("plugins", []))

    def _add(self, rule: str, controller: Any, security: Any, options: Mapping[str, Any], plugins: list[Any]) -> None:
        options = dict(options)
        methods, protocol = options.pop("methods", None), options.pop("protocol", "http")
        if isinstance(methods, str):
            raise ValueError(f"{rule}: methods is a list")
        settings = _settings(self.settings, options)
        endpoint: _Endpoint
        if protocol == "ws":
            endpoint, methods = _WebSocketEndpoint(controller, security, settings), ["get"]
        elif protocol == "http" and callable(controller):
            endpoint = _Endpoint(controller, security, settings)
        else:
            raise ValueError(f"{rule}: {controller!r} cannot serve the protocol {protocol!r}")
        self.route(rule, [method.upper() for method in methods or ["ANY"]], endpoint, apply=plugins)

    def run(self, host: str = "127.0.0.1", port: int = 8080, **options: Any) -> None:
        """Serves the application until SIGINT or SIGTERM; `options` are those of the function `run`."""
        room("server").run(self, host, port, **options)

    def stats(self) -> dict[str, Any]:
        """Returns figures of this node, see the function `stats`."""
        return room("board").stats()

    def board(self, path: str = "/board", security: Any = False, logout: str = "") -> None:
        """Adds the board, a page that shows what this node is doing, see the function `board`."""
        room("board").board(self, path, security, logout)

    def _cast(self, out: Any, peek: Any = None) -> Any:
        """Logs what bottle turns into a 500 in silence: a generator's first step, a body that cannot be encoded."""
        is_silent = isinstance(out, HTTPError) and out.exception and "bottle.exc_info" not in bottle.request.environ
        if is_silent and out.status_code >= 500:
            self._log_crash(out.exception)
        try:
            return super()._cast(out, peek)
        except Exception as error:
            self._log_crash(error)
            return super()._cast(HTTPError(500), peek)

    def _log_crash(self, error: BaseException) -> None:
        where = bottle.request.method, printable(bottle.request.path)
        log.error("the response to %s %s crashed", *where, exc_info=error)

    def default_error_handler(self, res: HTTPError) -> bytes:
        accept = bottle.request.environ.get("HTTP_ACCEPT", "")
        text = str(res.body or res.status_line.partition(" ")[2])
        bottle.response.content_type, body = error_body(res.status_line, text, accept)
        return body


def _settings(settings: Settings, options: Mapping[str, Any]) -> Settings:
    unknown = set(options) - {field.name for field in fields(Settings)}
    if unknown:
        raise ValueError(f"there is no option {', '.join(sorted(unknown))}")
    if isinstance(options.get("origins"), str) and options["origins"] != "*":
        raise ValueError("origins is a list, or '*'")
    for origin in () if options.get("origins") in (None, "*") else options["origins"]:
        if parse_origin(origin) is None:
            raise ValueError(f"expected an origin such as 'https://example.org', without a path, got {origin!r}")
    if not isinstance(options.get("trust_proxy", 0), int) or options.get("trust_proxy", 0) < 0:
        raise ValueError(f"trust_proxy is a number of proxies, or True for one, not {options['trust_proxy']!r}")
    if isinstance(options.get("subprotocols"), str):
        raise ValueError("subprotocols is a list")
    if options.get("on_slow", "close") not in ("close", "drop_oldest", "drop_new"):
        raise ValueError("on_slow is 'close', 'drop_oldest' or 'drop_new'")
    return replace(settings, **options)


def _rule(prefix: str, path: str) -> str:
    """Nova's path as bottle's rule: `:id` is `<id>`, and the prefix alone needs no slash behind it."""
    segments = [part for part in (prefix.strip("/"), path.lstrip("/")) if part]
    return re.sub(r"(?<=/):(\w+)", r"<\1>", "/" + "/".join(segments))


def name_of(controller: Any) -> str:
    return getattr(controller, "__qualname__", None) or type(controller).__qualname__


class _Endpoint:
    """A controller as bottle calls it."""

    def __init__(self, controller: Any, security: Any, settings: Settings) -> None:
        self.controller, self.security, self.settings = controller, security, settings

    def __call__(self, **bindings: Any) -> HTTPResponse:
        req = Request(bottle.request.environ, bindings, self.settings)
        return self.answer(self.check_security(req) or self.guarded_call(self.controller, req), req)

    def check_security(self, req: Request) -> Any:
        """What security answers in place of the controller, if it does; whatever it says that is no yes is a no."""
        if self.security is False:
            return None
        match self.guarded_call(self.security, req):
            case True:
                return None
            case (True, auth_data):
                req.set_auth_data(auth_data)
                return None
            case (False, Mapping() as headers):
                return "status", 401, headers
            case (False, int(status), Mapping() as headers, *body) if len(body) < 2:
                return "status", status, headers, *body
            case ("redirect", _) | HTTPResponse() as answer:
                return answer
        return "status", 401

    def answer(self, result: Any, req: Request) -> HTTPResponse:
        try:
            response = to_response(result, req["method"], getattr(self.controller, "__name__", ""))
        except HTTPResponse as error:
            return error
        except Exception:
            log.exception("controller %s answered %r", name_of(self.controller), result)
            return HTTPError(500)
        if isinstance(response, HTTPError) or not (bottle.response._headers or bottle.response._cookies):
            return response
        merged = bottle.response.copy(HTTPResponse)  # cookies and headers that were set in bottle's own way
        merged.status, merged.body = response.status, response.body
        merged._headers.update(response._headers)
        if response._cookies:
            merged._cookies = SimpleCookie({**(merged._cookies or {}), **response._cookies})
        return merged

    def guarded_call(self, fn: Any, req: Request) -> Any:
        """`fn(req)`; what it raises becomes the response."""
        try:
            return fn(req)
        except HTTPResponse as response:
            return response
        except Exception:
            log.exception("%s crashed at %s %s", name_of(fn), req["method"], printable(req["path"]))
            return HTTPError(500)


class _Outermost:
    """A bottle plugin around all others, which may answer as a controller does."""

    def apply(self, callback: Any, route: bottle.Route) -> Any:
        endpoint = route.callback
        if not isinstance(endpoint, _Endpoint):
            return _refusing_bad_forms(callback)

        def answer(**bindings: Any) -> Any:
            result = callback(**bindings)
            if not isinstance(result, tuple):
                return result
            return endpoint.answer(result, Request(bottle.request.environ, bindings, endpoint.settings))

        return answer


def _refusing_bad_forms(callback: Any) -> Any:
    """Wraps a callback of bottle's own kind: where bottle cannot read the form, the answer is a 400, not a 500."""

    def guarded(*args: Any, **bindings: Any) -> Any:
        try:
            return callback(*args, **bindings)
        except (LookupError, TypeError, ValueError) as error:
            if any(frame.f_code is _BOTTLES_FORM for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise HTTPError(400, "the form cannot be read")
            raise

    return guarded


_BOTTLES_FORM = vars(bottle.BaseRequest)["POST"].getter.__code__


class _WebSocketEndpoint(_Endpoint):
    """The gate before the 101: every refusal is plain HTTP."""

    def __init__(self, handler: Any, security: Any, settings: Settings) -> None:
        missing = [name for name in ("init", "websocket_handle", "websocket_info") if not hasattr(handler, name)]
        if missing:
            raise ValueError(f"the WebSocket handler {handler!r} lacks {', '.join(missing)}")
        super().__init__(handler, security, settings)

    def __call__(self, **bindings: Any) -> HTTPResponse:
        environ, settings = bottle.request.environ, self.settings
        if "nova_lite.registry" not in environ:
            log.error("%s needs nova_lite's own server: app.run() or Server(app)", name_of(self.controller))
            return HTTPError(501, "this server does not do WebSockets")
        req = Request(environ, bindings, settings)
        if asks_for_events(environ):
            check_security = check_no_body(environ) or check_origin(environ, settings) or self.check_security(req)
            return self.answer(check_security or self.accept_connection(EventStream, req, dict(EVENT_STREAM)), req)
        check_security = check_handshake(environ, settings) or self.check_security(req)
        return self.answer(check_security or self.upgrade(req), req)

    def upgrade(self, req: Request) -> HTTPResponse:
        environ, headers = req.environ, {}
        req.agreed(choose_subprotocol(environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", ""), self.settings.subprotocols))
        if req["subprotocol"]:
            headers["Sec-WebSocket-Protocol"] = req["subprotocol"]
        bits = choose_window(environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS", "")) if self.settings.compress else 0
        if bits:
            window = f"; server_max_window_bits={bits}" if bits < 15 else ""
            headers["Sec-WebSocket-Extensions"] = f"permessage-deflate{NO_TAKEOVER}{window}"
        return self.accept_connection(partial(Connection, bits=bits), req, headers)

    def accept_connection(self, kind: Any, req: Request, headers: dict[str, str]) -> HTTPResponse:
        """Runs init. If it agrees, the server sends this response, and hands over the socket."""
        registry: ConnectionRegistry = req.environ["nova_lite.registry"]
        if len(registry.connections) >= registry.limit:
            return HTTPError(503, "there are too many connections", Retry_After="5")
        connection = kind(self.controller, req, self.settings, registry)
        if not connection.start():
            return HTTPError(503 if registry.draining else 500)
        req.environ["nova_lite.upgrading"].append(connection)
        return HTTPResponse(b"", connection.STATUS, headers)


EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def asks_for_events(environ: Mapping[str, Any]) -> bool:
    """Whether a GET is for server-sent events, and not for a WebSocket."""
    accepted = [part.partition(";")[0].strip() for part in environ.get("HTTP_ACCEPT", "").lower().split(",")]
    return "text/event-stream" in accepted and environ["REQUEST_METHOD"] == "GET" and "HTTP_UPGRADE" not in environ


# Neither side keeps a window from one message to the next: a broadcast is compressed once, and an idle connection
# costs no window. A server may ask for both, unasked (RFC 7692 §7.1.1).
NO_TAKEOVER = "; server_no_context_takeover; client_no_context_takeover"


def choose_subprotocol(offered: str, spoken: Iterable[str]) -> str | None:
    """The first of the client's that the handler speaks (RFC 6455 §4.2.2)."""
    return next((name for name in map(str.strip, offered.split(",")) if name in spoken), None)


def choose_window(offered: str) -> int:
    """The window, in bits, of the first offer of permessage-deflate that can be met; 0 if there is none.

    An offer with a parameter that is unknown, comes twice or has a bad value is passed over, as is a window of 8 bits,
    which zlib does not make (RFC 7692 §7.1).
    """
    for offer in offered.split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        pairs = [(key.strip(), value.strip(' "')) for key, _, value in (part.partition("=") for part in parameters)]
        known = all(_DEFLATE_PARAMETERS.get(key, _NEVER).fullmatch(value) for key, value in pairs)
        if name == "permessage-deflate" and known and len(dict(pairs)) == len(pairs):
            return int(dict(pairs).get("server_max_window_bits", 15))
    return 0


_NEVER = re.compile("(?!)")
_DEFLATE_PARAMETERS = {
    "server_no_context_takeover": re.compile(""),
    "client_no_context_takeover": re.compile(""),
    "server_max_window_bits": re.compile("9|1[0-5]"),
    "client_max_window_bits": re.compile("|[89]|1[0-5]"),
}


def check_handshake(environ: Mapping[str, Any], settings: Settings = Settings()) -> HTTPResponse | None:
    """The refusal of a request that is no opening handshake (RFC 6455 §4.2.1), or that comes from a foreign origin."""
    connection = [token.strip() for token in environ.get("HTTP_CONNECTION", "").lower().split(",")]
    if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
        return HTTPError(426, "a WebSocket is served here", Upgrade="websocket", Connection="Upgrade")
    if environ["SERVER_PROTOCOL"] != "HTTP/1.1" or environ["REQUEST_METHOD"] != "GET" or "upgrade" not in connection:
        return HTTPError(400, "a WebSocket handshake is a GET of HTTP/1.1 with Connection: Upgrade")
    if check_no_body(environ) or not environ.get("HTTP_HOST"):
        return HTTPError(400, "a WebSocket handshake has a Host and no body")
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        return HTTPError(426, "only version 13 is served here", Sec_WebSocket_Version="13")
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", environ.get("HTTP_SEC_WEBSOCKET_KEY", "")):
        return HTTPError(400, "Sec-WebSocket-Key is missing or no 16 bytes in base64")
    return check_origin(environ, settings)


def check_no_body(environ: Mapping[str, Any]) -> HTTPResponse | None:
    """The refusal of a request with a body, which would be taken for what the client says afterwards."""
    if environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        return HTTPError(400, "a request for events has no body")
    return None


def check_origin(environ: Mapping[str, Any], settings: Settings) -> HTTPResponse | None:
    """The refusal of a page from elsewhere."""
    return None if is_own_origin(environ, settings) else HTTPError(403, "this origin may not connect")


def heartbeat(req: Request) -> Any:
    """A controller: 200, or 503 once the server is asked to stop, so that a load balancer looks elsewhere.

    Asked with `?cluster`, 503 also while this node is cut off from the others.
    """
    registry = req.environ.get("nova_lite.registry")
    if registry is not None and (registry.leaving or registry.draining):
        return "status", 503, {"Retry-After": "5"}
    if "cluster" in req["qs"] and not pubsub.adapter.connected:
        return "status", 503, {"Retry-After": "5"}
    return "status", 200


# ---------------------------------------------------------------------------------------------------------------------
# Server: pywsgi, handing sockets over, draining, reloading, workers.
# House rule: HTTP is pywsgi's and the handshake gevent-websocket's; only what they cannot do is done here.
# ---------------------------------------------------------------------------------------------------------------------

DRAIN_TIME = 5.0  # seconds that a stopping server gives requests and clients to finish
SHUTDOWN_DELAY = 0.0  # seconds before it drains, in which it serves on and says 503 to a load balancer's heartbeat
MAX_HEADERS = 16_384  # bytes
MAX_LINE = 8192  # bytes of a request line, 414 beyond
READ_AHEAD = 8192  # bytes of a client's buffer; between two reads they are handled in one go, in a few milliseconds
DISCARD_SIZE, DISCARD_TIME = 8 * 1024 * 1024, 2.0  # bytes and seconds spent on what a client sends and nothing reads
BACKLOG = 2048  # connections that may wait to be accepted: a restart brings all clients at once


class Headers(dict[str, str]):
    """The headers of a request, by lower-case name, as strict as RFC 9112 wants servers to be.

    In the place of the standard library's e-mail parser, which takes several times as long and forgives what lets one
    request hide in another. Raises ValueError, and HTTPError 431 over MAX_HEADERS bytes.
    """

    def __init__(self, file: Any) -> None:
        left = MAX_HEADERS
        while (line := file.readline(left + 1)) not in (b"\r\n", b"\n"):
            left -= len(line)
            if left < 0:
                raise HTTPError(431, "the headers are too long")
            match = _HEADER.fullmatch(line.decode("latin-1"))
            if match is None:
                raise ValueError(f"no header: {line!r}")
            name, value = match[1].lower(), match[2].strip(" \t")
            if name in self and name in ("content-length", "host", "transfer-encoding"):
                raise ValueError(f"{name} comes twice")
            self[name] = f"{self[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in self else value
        if not re.fullmatch("[0-9]{1,18}", self.get("content-length", "0")):
            raise ValueError("Content-Length is no number")
        if "transfer-encoding" in self and (self["transfer-encoding"].lower() != "chunked" or "content-length" in self):
            raise ValueError("Transfer-Encoding is chunked alone, and without Content-Length")

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)

    getheader = get  # the names that pywsgi uses

    @property
    def typeheader(self) -> str | None:
        return self.get("content-type")


_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")  # nothing to backtrack in


@lru_cache(maxsize=256)
def _environ_key(name: str) -> str | None:
    """A header's name in WSGI's environ; None for what must not be there, or is there in another way (PEP 3333)."""
    if "_" in name or name in ("content-type", "content-length"):
        return None
    return "HTTP_" + name.replace("-", "_").upper()


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return gevent.pywsgi.format_date_time(second)


_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\x00-\x20\x7f]+) (HTTP/1\.[01])\r?\n")
_TARGET = re.compile(r"(?:https?://([^/?]+))?(|[/?].*)", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+;=-]*)(?::[0-9]{0,5})?")


def split_target(method: str, target: str) -> tuple[str | None, str]:
    """Returns the authority, if there is one, and the path with its query (RFC 9112 §3.2).

    Raises ValueError for what is neither in origin nor in absolute form, and for a path that is not UTF-8.
    """
    if target == "*" and method == "OPTIONS":
        return None, "*"
    match = _TARGET.fullmatch(target)
    if match is None or (match[1] is None and not target.startswith("/")):
        raise ValueError("not a target of a request")
    authority, path = match[1], match[2] if match[2].startswith("/") else "/" + match[2]
    if "%" in path or not path.isascii():
        unquote_to_bytes(path.partition("?")[0].encode("latin-1")).decode()
    return authority, path


class ClientStream(io.RawIOBase):
    """The bytes of an HTTP client, as they come. Reading raises TimeoutError after `deadline`.

    Where bytes are always there, nothing waits: reading then yields to others once a time slice is over.
    """

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.deadline = 0.0  # on the clock of monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        scheduler.yield_after_slice()
        self.sock.settimeout(max(self.deadline - monotonic(), 0.0))  # 0: takes what is there, but does not wait
        try:
            return self.sock.recv_into(buffer)
        except (BlockingIOError, SSLWantReadError, SSLWantWriteError):
            raise TimeoutError("the client takes too long") from None


class Body(io.RawIOBase):
    """The body of a request, up to its end and no further (RFC 9112 §6.2, §7.1). Reading raises BadBody."""

    def __init__(self, file: Any, length: int | None, before: Callable[[], None] | None = None) -> None:
        self.file = file
        self.chunked = length is None
        self.left = length or 0  # bytes to come, of the chunk if it is chunked
        self.ended = length == 0
        self.before = before  # called before the first read: sends the 100 that the client waits for
        self.failure: BadBody | None = None
        self.in_chunk = False  # the CRLF behind a chunk is still to come
        self.extras = 0  # bytes of chunk extensions and trailers, MAX_HEADERS at most
        self.taken = 0  # bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.before is not None:
            before, self.before = self.before, None
            before()
        if self.failure is not None:
            raise self.failure
        try:
            return self._read(memoryview(buffer))
        except BadBody:
            raise
        except OSError as error:
            late = isinstance(error, TimeoutError)
            self._fail("the body took too long" if late else "the body was cut off", 408 if late else 400)

    def _read(self, buffer: memoryview) -> int:
        if self.chunked and not self.left and not self.ended:
            self._next_chunk()
        if self.ended:
            return 0
        size = self.file.readinto1(buffer[: self.left])
        if not size:
            self._fail("the body was cut off")
        self.left -= size
        self.taken += size
        self.ended = not self.left and not self.chunked
        return size

    def _next_chunk(self) -> None:
        if self.in_chunk and self._line() != b"\r\n":
            self._fail("a chunk does not end where it should")
        match = _CHUNK.fullmatch(self._line())
        if match is None:
            self._fail("this is not the beginning of a chunk")
        self.left, self.in_chunk = int(match[1], 16), True
        self._count_extra(match[2])
        while not self.left and not self.ended:
            line = self._line()
            self.ended = line == b"\r\n"
            self._count_extra(line)
            if not self.ended and not _HEADER.fullmatch(line.decode("latin-1")):
                self._fail("this is not a trailer")

    def _line(self) -> bytes:
        line = self.file.readline(MAX_HEADERS)
        if not line.endswith(b"\r\n"):
            self._fail("a line of the chunked body is too long, or does not end with CRLF")
        self.taken += len(line)
        return line

    def _count_extra(self, extra: bytes) -> None:
        self.extras += len(extra)
        if self.extras > MAX_HEADERS:
            self._fail("there are too many chunk extensions or trailers")

    def _fail(self, text: str, status: int = 400) -> NoReturn:
        self.failure = BadBody(status, text)
        raise self.failure

    def _discard(self) -> None:
        """What pywsgi calls; `discard` is called later, when the request is over."""

    def discard(self) -> None:
        """Reads to where the next request begins, unless that takes too much."""
        buffer = memoryview(bytearray(65536))
        with suppress(OSError):
            while self.before is None and self.taken < DISCARD_SIZE and self.readinto(buffer):
                pass


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t\x20-\x7e\x80-\xff])*"'
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*)\r\n" % (_TOKEN, _TOKEN, _QUOTED)
)
_NO_BODY = Body(None, 0)


class SpooledBody:
    """A chunked body for `bottle.request`, which would take the chunks apart once more: a file, made at first use."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self.is_unread = True

    def __getattr__(self, name: str) -> Any:
        if self.is_unread:
            self._file = tempfile.SpooledTemporaryFile(bottle.BaseRequest.MEMFILE_MAX)  # noqa: SIM115
            shutil.copyfileobj(self._body, self._file)
            self.is_unread = False
        return getattr(self._file, name)


class TLS:
    """A TLS socket as a plain one that never waits: reading raises BlockingIOError, sending sends nothing."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock  # gevent's, which does not wait once its timeout is 0
        self.fileno, self.close = sock.fileno, sock.close

    def recv(self, size: int) -> bytes:
        """One record, and what is left of it: bytes that have left the kernel wake no watcher."""
        try:
            data = self.sock.recv(size)
            while pending := self.sock.pending():
                data += self.sock.recv(pending)
            return data
        except (SSLWantReadError, SSLWantWriteError):
            raise BlockingIOError from None
        except (SSLEOFError, SSLZeroReturnError):
            return b""

    def send(self, data: Any) -> int:
        try:
            return self.sock.send(data)
        except (SSLWantReadError, SSLWantWriteError):
            return 0

    def shutdown(self, how: int) -> None:
        """close_notify, which need not be answered, and TCP's FIN."""
        with suppress(OSError, ValueError):
            self.sock._sslobj.shutdown()
        _socket.socket.shutdown(self.sock._sock, how)


class RequestHandler(UpgradeHandler):
    """A client's HTTP connection. gevent-websocket's upgrade is kept for when the application has said 101."""

    busy = False  # between a request's first line and the end of its response
    response_headers: list[tuple[bytes, bytes]]
    environ: dict[str, Any]
    path: Any
    socket: Any
    websocket: Any
    code: Any
    provided_date: Any
    provided_content_length: Any
    wsgi_input: Any = _NO_BODY
    logger = log  # gevent-websocket would set up one of its own
    body_left: int | None = None  # bytes of the response that Content-Length still allows; None: no limit
    agreed = False  # the response is that of a connection in the lobby
    detached = False  # the socket belongs to a connection's process

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        self.socket, self.client_address, self.server = sock, address, server
        self.stream = ClientStream(sock)
        self.rfile = io.BufferedReader(self.stream, READ_AHEAD)

    def handle(self) -> None:
        if self.server.registry.draining:  # accepted just before the listener closed
            return
        self.server.handlers.add(self)
        try:
            super().handle()
        finally:
            self.server.handlers.discard(self)

    # -- the request

    def handle_one_request(self) -> Any:
        try:
            return super().handle_one_request()
        except HTTPError as error:  # of the request line
            return self._handle_client_error(error)

    def read_requestline(self) -> str:
        self.stream.deadline = monotonic() + self.server.KEEP_ALIVE
        self.rfile.peek(1)
        scheduler.yield_after_slice()  # a client may pipeline many requests
        self.stream.deadline = monotonic() + self.server.HEAD_TIME
        try:
            line = self.rfile.readline(MAX_LINE + 1)
            if line in (b"\r\n", b"\n"):  # an empty one is no harm (RFC 9112 §2.2)
                line = self.rfile.readline(MAX_LINE + 1)
        except TimeoutError as error:
            raise HTTPError(408, str(error)) from None
        self.requestline = line.decode("latin-1").rstrip("\r\n")
        if len(line) > MAX_LINE:
            raise HTTPError(414, "the request line is too long")
        return line.decode("latin-1")

    def read_request(self, raw_requestline: str) -> bool:
        self.busy = True
        self.requestline = raw_requestline.rstrip("\r\n")
        match = _REQUEST_LINE.fullmatch(raw_requestline)
        if match is None:
            raise ValueError("this is not a request line of HTTP/1.1 or 1.0")
        self.command, target, self.request_version = match.groups()
        headers = self.headers = Headers(self.rfile)
        authority, self.path = split_target(self.command, target)
        if authority is not None:
            headers["host"] = authority
        if not _HOST.fullmatch(headers.get("host", "")) or (
            self.request_version == "HTTP/1.1" and "host" not in headers
        ):
            raise ValueError("there is no Host, or it is not one")
        if self.request_version == "HTTP/1.0" and "transfer-encoding" in headers:
            raise ValueError("there are no chunks in HTTP/1.0")
        self.content_length = int(headers.get("content-length", "0"))
        options = _tokens(headers.get("connection", ""))
        self.close_connection = "close" in options or (
            self.request_version == "HTTP/1.0" and "keep-alive" not in options
        )
        return True

    def _handle_client_error(self, ex: Exception) -> None:
        """Refuses a request that cannot be read, and hangs up: where the next one begins is not known."""
        status = (
            "408 Request Timeout" if isinstance(ex, TimeoutError) else getattr(ex, "status_line", "400 Bad Request")
        )
        reason = str(getattr(ex, "body", None) or ex)
        log.info(
            '%s:%d "%s" refused: %s (%s)',
            *self.client_address[:2],
            printable(self.requestline or ""),
            status,
            printable(reason),
        )
        kind, body = error_body(status, status[4:], "")
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with suppress(OSError):
            self._sendall(head.encode() + body)
        self.stream.deadline = monotonic() + DISCARD_TIME
        self._await_close()

    def _await_close(self) -> None:
        """Ends the response, and reads on until `deadline`: closing with bytes unread would reset the connection, and
        the client might never see its response (RFC 9112 §9.6)."""
        left = DISCARD_SIZE
        with suppress(OSError):
            self.socket.shutdown(_socket.SHUT_WR)
            while left > 0 and (part := self.rfile.read1(READ_AHEAD)):
                left -= len(part)

    def _connection_upgrade_requested(self) -> bool:
        return False  # else pywsgi loses sight of the body, and of where the next request begins

    def _headers(self) -> Iterator[tuple[str, str]]:
        for name, value in self.headers.items():
            key = _environ_key(name)
            if key is not None:
                yield key, value

    def get_environ(self) -> dict[str, Any]:
        environ = super().get_environ()
        chunked = "transfer-encoding" in self.headers
        if not chunked and not self.content_length:
            self.wsgi_input, environ["wsgi.input"] = _NO_BODY, BytesIO()
            return environ
        expects = self.headers.get("expect", "").lower() == "100-continue" and self.request_version == "HTTP/1.1"
        body = Body(self.rfile, None if chunked else self.content_length, self._send_continue if expects else None)
        self.wsgi_input, environ["wsgi.input"] = body, io.BufferedReader(body)
        if chunked:
            environ["bottle.request.body"] = SpooledBody(environ["wsgi.input"])
        return environ

    def _send_continue(self) -> None:
        if not self.headers_sent:
            self.socket.settimeout(self.server.WRITE_TIME)
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- the application

    def handle_one_response(self) -> None:
        try:
            super().handle_one_response()
        finally:
            self.busy = False
            process = current_process()
            if process is not None:  # a request is a process for as long as it lasts
                process.finish("normal")
        if not self.wsgi_input.ended:
            self._skip_body(self.wsgi_input)

    def _skip_body(self, body: Body) -> None:
        self.stream.deadline = monotonic() + DISCARD_TIME
        if not self.close_connection:
            body.discard()
        if not body.ended:
            self.close_connection = True
            self._await_close()

    def run_application(self) -> None:
        upgrading: list[Connection] = []
        self.environ["nova_lite.upgrading"], self.environ["nova_lite.registry"] = upgrading, self.server.registry
        self.stream.deadline = monotonic() + self.server.BODY_TIME
        try:
            gevent.pywsgi.WSGIHandler.run_application(self)
            if upgrading and self.agreed:
                self._detach(upgrading[0])
                upgrading.clear()
        except Exception:  # pywsgi would take any OSError of the application for a client that has gone
            self.handle_error(*sys.exc_info())
        finally:
            for connection in upgrading:  # the 101 was replaced by a hook or a plugin, or did not get through
                connection.kill(("error", "closed"))

    def handle_error(self, kind: Any, error: Any, tb: Any) -> None:
        if (self.code or 0) < 0:  # it could not be sent: nobody is there, so nobody is told
            self.close_connection = True
        elif isinstance(error, BadBody):
            self._refuse(error.status_code, str(error.body))
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            super().handle_error(kind, error, tb)
        else:
            if not isinstance(error, gevent.GreenletExit):
                where = *self.client_address[:2], printable(self.requestline or "")
                log.error('%s:%d "%s" crashed', *where, exc_info=(kind, error, tb))
            self._refuse(500)

    def _send_error_response_if_possible(self, error_code: int) -> None:
        self._refuse(error_code)

    def _refuse(self, status: int, text: str = "") -> None:
        """Sends an error in the place of the application's response. If that has begun, closing tells that its end is
        missing."""
        self.close_connection = True
        if self.headers_sent:
            return
        error = HTTPError(status)
        kind, body = error_body(error.status_line, text or error.status_line[4:], self.environ.get("HTTP_ACCEPT", ""))
        with suppress(OSError):
            self.start_response(error.status_line, [("Content-Type", kind), ("Content-Length", str(len(body)))])
            self.write(body)

    # -- the response

    def process_result(self) -> None:
        upgrading = self.environ["nova_lite.upgrading"]
        # Else there is none, or a hook or a plugin has put another response, with a body, in the place of its own.
        self.agreed = bool(upgrading) and self.code == upgrading[0].STATUS and not self.result
        if not self.agreed:
            super().process_result()
            if self.body_left:
                self.close_connection = True
                log.error("%s: Content-Length is %d bytes too large", printable(self.requestline), self.body_left)
            return
        headers = [header for header in self.response_headers if header[0] != b"Content-Length"]  # bottle's, of nothing
        if self.code == 101:
            self.upgrade_connection()
            self._disarm(self.environ.pop("wsgi.websocket"))
            headers = self.response_headers + [header for header in headers if header[0] != b"Content-Type"]
        self.response_headers, self.close_connection = headers, True
        self.write(b"")

    def write(self, data: Any) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"a WSGI application answers with bytes, not {data!r:.100} (PEP 3333)")
        if self.headers_sent:
            scheduler.yield_after_slice()
            self._write(self._clip(data))
        elif not self.status:
            raise self.ApplicationError("The application did not call start_response()")
        else:
            self._write_with_headers(data)

    def _clip(self, data: Any) -> Any:
        """Returns what may still be sent of the body."""
        if self.body_left is not None:
            data = data[: self.body_left]
            self.body_left -= len(data)
        return data

    def _write_with_headers(self, data: Any) -> None:
        """Head and body in one packet: in two, a kept-alive client's delayed ACK holds the second back for 40 ms."""
        self.headers_sent = True
        self.finalize_headers()
        data = self._clip(data)
        lines = [b"HTTP/1.1 " + self.status, *(b"%b: %b" % header for header in self.response_headers), b"\r\n"]
        head = b"\r\n".join(lines)
        if self.response_use_chunked or len(data) > 65536:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + data)

    def finalize_headers(self) -> None:
        if not self.provided_date:
            self.provided_date = True
            self.response_headers.append((b"Date", _date(int(time.time()))))
        if not self.agreed:
            self._frame_response()
        if self.code != 101:
            self._finalize_connection()

    def _frame_response(self) -> None:
        """Decides how the client learns where the body ends (RFC 9112 §6.3)."""
        self.body_left = None
        if self.command == "HEAD" or self.code in (204, 304):
            self.body_left = 0
        elif self.provided_content_length is not None:
            self.body_left = int(self.provided_content_length)
        elif hasattr(self.result, "__len__"):
            self.body_left = sum(map(len, self.result))
            self.response_headers.append((b"Content-Length", b"%d" % self.body_left))
        elif self.request_version == "HTTP/1.1":
            self.response_use_chunked = True
            self.response_headers.append((b"Transfer-Encoding", b"chunked"))
        else:
            self.close_connection = True

    def _finalize_connection(self) -> None:
        """Merges what the application and pywsgi say of the connection with whether it closes."""
        options = []
        for header in [header for header in self.response_headers if header[0].lower() == b"connection"]:
            options += _tokens(header[1].decode("latin-1"))
            self.response_headers.remove(header)
        if "close" in options or self.server.registry.draining or self.wsgi_input.before is not None:
            self.close_connection = True  # `before`: what comes next may be the body that was not asked for, or not
        options = [option for option in options if option not in ("close", "keep-alive")]
        if self.close_connection:
            options.append("close")
        elif self.request_version == "HTTP/1.0":
            options.append("keep-alive")
        if options:
            self.response_headers.append((b"Connection", ", ".join(options).encode("latin-1")))

    def _sendall(self, data: bytes) -> None:
        """In pieces, each with its time: a client that does not read its response is hung up on in the end."""
        left = memoryview(data)
        try:
            while left:
                self.socket.settimeout(self.server.WRITE_TIME)
                left = left[self.socket.send(left[:65536]) :]
                if left:
                    scheduler.yield_after_slice()
        except OSError:
            self.code = -abs(self.code or 500)  # pywsgi's mark for what could not be sent
            raise
        self.response_length += len(data)

    # -- handing over

    def _disarm(self, websocket: Any) -> None:
        """gevent-websocket's object is not used. Its __del__ would write a close frame; and it holds this handler,
        which holds it: 7 KiB a connection until the garbage collector comes by."""
        websocket.closed, self.websocket = True, None
        del websocket.handler, websocket.stream

    def _detach(self, connection: Connection) -> None:
        """The socket goes to the connection's process; pywsgi lets go of its own handle, buffers and greenlet."""
        sock, early = self.socket, b""
        self.stream.deadline = 0.0
        with suppress(TimeoutError):
            early = self.rfile.peek()  # frames that came right behind the handshake
        raw: Any
        if self.server.ssl_enabled:
            if sock.pending():
                early += sock.recv(sock.pending())
            sock.setblocking(False)
            raw = TLS(sock)
        else:
            raw = _socket.socket(sock.family, sock.type, sock.proto, sock.detach())
            raw.setblocking(False)  # whatever socket.setdefaulttimeout says
        self.socket, self.detached = None, True
        connection.req.detach()
        connection.open(raw, early)
        if self.server.registry.draining:
            connection.kill("shutdown")

    # -- the log

    def log_request(self) -> None:
        if log.isEnabledFor(logging.INFO):
            milliseconds = (self.time_finish - self.time_start) * 1000
            peer, port = self.client_address[:2]
            status = (self._orig_status or "000").split()[0]
            line = printable(self.requestline or ""), status, self.response_length, milliseconds
            log.info('%s:%d "%s" %s %d %.1f ms', peer, port, *line)

    def log_error(self, msg: str, *args: Any) -> None:
        log.info("bad request: " + printable(msg), *map(printable, map(str, args)))  # noqa: G003


def _tokens(value: str) -> list[str]:
    """Returns the options of a Connection header, in lower case (RFC 9110 §7.6.1)."""
    return [token for token in re.split(r"[ \t,]+", value.lower()) if token]


class Server(gevent.pywsgi.WSGIServer):
    """Serves an application; `with Server(app, port=0) as server:` starts it and stops it, `server.port` tells where.

    For programs that have a main loop of their own; `Nova.run` is for those that have none. With `certfile` (and
    `keyfile`), https and wss. `max_connections` is for WebSockets: by default what the descriptor limit allows. With
    `reuse_port`, other processes may serve the same port. Raises OSError where the address is taken or a file cannot be
    read.
    """

    KEEP_ALIVE, HEAD_TIME, BODY_TIME = 75.0, 10.0, 30.0  # seconds for the next request, its head and its body to come
    WRITE_TIME = 30.0  # seconds that a client may take nothing of a response

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        drain_time: float = DRAIN_TIME,
        certfile: str | None = None,
        keyfile: str | None = None,
        max_connections: int | None = None,
        reuse_port: bool = False,
    ) -> None:
        self.registry = ConnectionRegistry(_descriptor_limit() - 64 if max_connections is None else max_connections)
        self.handlers: set[RequestHandler] = set()
        self.drain_time = drain_time
        self.short_of_descriptors = -60.0  # when it was last logged
        tls = {"ssl_context": _tls_context(certfile, keyfile)} if certfile else {}
        if reuse_port:
            self.get_listener = lambda _address, backlog, _family: _bound_socket(host, port, backlog)
        super().__init__((host, port), app, BACKLOG, log=None, error_log=log, handler_class=RequestHandler, **tls)

    def __enter__(self) -> Server:
        self.start()
        return self

    @property
    def port(self) -> int:
        return self.address[1]

    def init_socket(self) -> None:
        _check_patch()
        scheduler.bind_thread()
        super().init_socket()
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # accepted sockets inherit it

    def do_read(self) -> Any:
        """Accepts; when descriptors have run out, pauses, and lets the clients wait in the kernel's queue."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        if monotonic() - self.short_of_descriptors > 60:
            self.short_of_descriptors = monotonic()
            log.warning("no descriptors are left (ulimit -n): new clients wait")
        self.stop_accepting()
        self._timer = self.loop.timer(0.1)
        self._timer.start(self._start_accepting_if_started)
        return None

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        try:
            with gevent.Timeout(self.HEAD_TIME, TimeoutError("no TLS handshake in time")):
                sock = self.wrap_socket(client_socket, server_side=True)
        except OSError as error:
            log.info("%s:%d refused: %s", *address[:2], error)
            client_socket.close()
            return
        handler = self.handler_class(sock, address, self)
        handler.handle()
        if not handler.detached:
            sock.close()

    def stop(self, timeout: float | None = None) -> None:
        """Closes the listener, lets requests finish, closes WebSockets with 1001; cuts what is left after `timeout`.

        The 1001s are spread, a millisecond or two each but over no more than half the time, so that not all clients
        come back at once. Who asks meanwhile on a connection that is kept alive is answered, and told to close it.
        """
        timeout = self.drain_time if timeout is None else timeout
        deadline = monotonic() + timeout
        self.registry.draining = True
        self.close()
        connections = list(self.registry.connections)
        random.shuffle(connections)
        at_once = 1 + int(len(connections) / (250 * timeout + 1))  # no sleep is shorter than a millisecond
        for number, connection in enumerate(connections):
            exit(connection, "shutdown")
            if number % at_once == 0:
                gevent.sleep(0.001)
        while self.active_count() and monotonic() < deadline:
            gevent.sleep(0.01)
        for handler in list(self.handlers):
            with suppress(OSError, AttributeError):
                handler.socket.shutdown(_socket.SHUT_RDWR)
        for connection in list(self.registry.connections):
            connection.kill("killed")
        gevent.sleep(0)
        for connection in list(self.registry.connections):
            connection.cut()
        registries.discard(self.registry)

    def active_count(self) -> int:
        """How many requests and WebSockets are under way."""
        return sum(handler.busy for handler in self.handlers) + len(self.registry.connections)


def _bound_socket(host: str, port: int, backlog: int | None) -> Any:
    """On a port that others may have as well; it listens, if there is a backlog."""
    sock = gevent.socket.socket(gevent.socket.AF_INET6 if ":" in host else gevent.socket.AF_INET)
    sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_REUSEPORT, 1)
    sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        if backlog is not None:
            sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _tls_context(certfile: str, keyfile: str | None) -> Any:
    from gevent import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # else a read might have to wait for a write
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # OpenSSL's own words name neither the file nor the fault
        raise OSError(error.errno, f"the certificate {certfile} cannot be used: {error.strerror}") from error
    return context


def run(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    cluster: str | None = None,
    name: str | None = None,
    workers: int = 1,
    drain_time: float = DRAIN_TIME,
    shutdown_delay: float = SHUTDOWN_DELAY,
    reload: bool = False,
    log_level: str = "info",
    **options: Any,
) -> None:
    """Serves `app` until SIGINT or SIGTERM, then drains for at most `drain_time` seconds and returns.

    Before it drains it serves on for `shutdown_delay` seconds, in which `heartbeat` says 503: a load balancer needs the
    time to notice. A second signal ends the process at once.
    `cluster` is the URL of a Redis, see `pubsub.connect`, and `name` this node's name there. More than one of the
    `workers` need a cluster, else ValueError; see `run_workers`. `reload` starts the program again whenever one of its
    files changes; `options` are `Server`'s. Raises OSError where the address is taken.
    """
    process = "%(process)d " if workers > 1 else ""
    logging.basicConfig(level=log_level.upper(), format=f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s")
    if reload:
        room("launch").reload_on_change()
    if workers > 1:
        if cluster is None:
            raise ValueError("workers need a cluster, or a broadcast would reach the clients of one of them only")
        number, port = room("launch").run_workers(workers, host, port, drain_time + shutdown_delay)
        options["reuse_port"], name = True, f"{name or _node}-{number}"
    _raise_descriptor_limit()
    if reload:
        drain_time, shutdown_delay = min(drain_time, 0.3), 0.0
    try:
        _serve(Server(app, host, port, drain_time=drain_time, **options), shutdown_delay, cluster, name)
    finally:
        if cluster is not None:
            pubsub.disconnect()


def _serve(server: Server, shutdown_delay: float, cluster: str | None, name: str | None) -> None:
    asked_to_stop = gevent.event.Event()
    with server:
        watchers = [gevent.signal_handler(sign, _on_signal, asked_to_stop) for sign in (signal.SIGINT, signal.SIGTERM)]
        closers = [close for hook in while_serving if (close := hook(asked_to_stop.set))]
        if cluster is not None:
            pubsub.connect(cluster, name)
        host = server.address[0]
        scheme, shown = "https" if server.ssl_enabled else "http", f"[{host}]" if ":" in host else host
        log.info("serving on %s://%s:%d/ (Ctrl-C stops)", scheme, shown, server.port)
        log.info("the descriptor limit allows %d WebSockets", server.registry.limit)
        gc.collect()
        gc.freeze()  # what is there now stays: a full collection then takes 3 ms, not 15
        asked_to_stop.wait()
        if shutdown_delay > 0:
            log.info("serving on for %s s; the heartbeat says 503", shutdown_delay)
            server.registry.leaving = True
            gevent.sleep(shutdown_delay)
        log.info("stopping: %d requests and WebSockets to finish", server.active_count())
    for close in [watcher.cancel for watcher in watchers] + closers:
        close()


rooms["server"] = SimpleNamespace(run=run)
while_serving: list[Callable[[Callable[[], None]], Any]] = []  # hooks: take what stops the server, return a closer


def _on_signal(asked_to_stop: gevent.event.Event) -> None:
    if asked_to_stop.is_set():
        os._exit(1)  # asked twice: somebody is in a hurry
    asked_to_stop.set()


def _check_patch() -> None:
    """Warns where the library is not patched. What bottle then shares is kept per greenlet, or one client's response
    would carry the cookies of another."""
    is_shared = _is_seen_elsewhere(bottle.request)
    if is_shared:
        for kind in (bottle.LocalRequest, bottle.LocalResponse):
            _keep_per_greenlet(kind)
    if is_shared or not gevent.monkey.is_module_patched("socket"):
        when = "too late" if gevent.monkey.is_module_patched("threading") else "not at all"
        log.warning(
            "the standard library is patched %s: whatever blocks will stop every connection. "
            "Make this the first line of your program: from gevent import monkey; monkey.patch_all()",
            when,
        )


def _is_seen_elsewhere(request: Any) -> bool:
    """Returns whether another greenlet sees the environ that this one binds: bottle was imported before the patch."""
    seen: list[Any] = []

    def look() -> None:
        with suppress(RuntimeError):  # "Request context not initialized", as it should be
            seen.append(request.environ)

    request.bind({})
    greenlet(look).switch()
    return bool(seen)


def _keep_per_greenlet(kind: type) -> None:
    """Replaces the attributes that bottle keeps per thread."""
    values = gevent.local.local()

    def property_of(name: str) -> property:
        def read(_: Any) -> Any:
            try:
                return getattr(values, name)
            except AttributeError:
                raise RuntimeError("Request context not initialized.")  # bottle's own words

        return property(read, lambda _, value: setattr(values, name, value), lambda _: delattr(values, name))

    for name in [name for name, value in vars(kind).items() if isinstance(value, property)]:
        setattr(kind, name, property_of(name))


def _descriptor_limit() -> int:
    with suppress(ImportError):
        import resource  # not on Windows

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 10_000


def _raise_descriptor_limit() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ----- cut here: without gen_server ----------------------------------------------------------------------------------
# Lost: GenServer, start_link, call, cast, reply, stop; supervisors.


# ---------------------------------------------------------------------------------------------------------------------
# gen_server, supervisor: OTP's two behaviours that everything else is built from.
# House rule: uses processes only.
# ---------------------------------------------------------------------------------------------------------------------


class CallError(Exception):
    """A `call` that got no answer."""


class CallTimeout(CallError, TimeoutError):
    """The server did not answer in time. If it still does, nobody hears it."""


class NoProc(CallError):
    """There is no such process."""


class ServerDied(CallError):
    """The server ended, for `reason`, before it answered."""

    def __init__(self, reason: Any) -> None:
        super().__init__(reason)
        self.reason = reason


class GenServer:
    """The callbacks of a server, one instance a server (OTP's gen_server). All run in the server's own process."""

    def init(self, args: Any) -> Any:
        """("ok", state), ("stop", reason) or "ignore"."""
        return "ok", args

    def handle_call(self, request: Any, from_: Any, state: Any) -> Any:
        """("reply", value, state), ("noreply", state), ("stop", reason, value, state) or ("stop", reason, state)."""
        return "stop", ("bad_call", request), state

    def handle_cast(self, request: Any, state: Any) -> Any:
        """("noreply", state) or ("stop", reason, state)."""
        return "stop", ("bad_cast", request), state

    def handle_info(self, info: Any, state: Any) -> Any:
        """As handle_cast, for any other message."""
        log.warning("%r %s: unexpected message %r", self_pid(), type(self).__name__, info)
        return "noreply", state

    def terminate(self, reason: Any, state: Any) -> None:
        """The server is about to end by its own doing, by a crash, or by its parent's exit signal if it traps exits."""


class _Stop(Exception):
    """A callback has asked for the end."""

    def __init__(self, reason: Any, answer: Callable[[], Any] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.answer = reason, answer


def _is_timeout(rest: list[Any]) -> bool:
    """Returns whether a result ends in nothing more, or in a timeout, None and "infinity" included, or "hibernate"."""
    match rest:
        case [] | [None | "infinity" | "hibernate"]:
            return True
        case [int() | float() as seconds] if not isinstance(seconds, bool):
            return seconds >= 0
    return False


class ServerProcess(Process):
    """The loop of a gen_server."""

    __slots__ = (
        "args", "init_waiter", "parent", "server", "state", "timer",
    )  # fmt: skip

    def __init__(self, server: Any, args: Any, parent: Process) -> None:
        super().__init__()
        self.server, self.args, self.parent = server, args, parent
        self.init_waiter: Alias | None = Alias()  # who waits for init's answer
        self.state: Any = None
        self.timer: Any = None  # runs while it rests, if a callback has asked for "timeout"

    def step(self) -> None:
        if self.timer is not None:
            self.timer.close()
            self.timer = None
        timeout = self._init() if self.init_waiter is not None else None
        mailbox = self.mailbox
        while mailbox and self.exiting is None:
            self.handled += 1
            timeout = self._handle(mailbox.popleft())
            if monotonic() > scheduler.deadline:
                break
        self.reschedule()
        if isinstance(timeout, int | float) and self.wake is not None:
            self.timer = scheduler.hub.loop.timer(timeout)
            self.timer.start(self._time_out, update=True)

    def _time_out(self) -> None:
        if self.wake is not None:  # else a message has come in the same turn of the hub, and cancels it
            self.deliver("timeout")

    def _init(self) -> Any:
        result, init_waiter = self.server.init(self.args), self.init_waiter
        match result:
            case ("ok", state, *timeout) if _is_timeout(timeout):
                self.state, self.init_waiter = state, None
                init_waiter.send("ok")  # type: ignore[union-attr]
                return timeout[0] if timeout else None
            case ("stop", reason):
                raise _Stop(reason)
            case "ignore":
                raise _Stop("normal", lambda: init_waiter.send("ignore"))  # type: ignore[union-attr]
        raise _Stop(("bad_return_value", result))

    def _handle(self, message: Any) -> Any:
        """Handles one message and tells the timeout that the callback asks for."""
        match message:
            case ("$gen_call", (_, Pid()) as from_, request):
                return self._take(self.server.handle_call(request, from_, self.state), from_)
            case ("$gen_cast", request):
                return self._take(self.server.handle_cast(request, self.state))
            case ("$stop", reason):
                raise _Stop(reason)
            case ("EXIT", self.parent, reason):
                raise _Stop(reason)
        return self._take(self._optional("handle_info")(message, self.state))

    def _optional(self, callback: str) -> Callable[..., Any]:
        """A callback that OTP does not ask for: GenServer's, where the server has none."""
        return getattr(self.server, callback, None) or partial(getattr(GenServer, callback), self.server)

    def _take(self, result: Any, from_: Any = None) -> Any:
        match result:
            case ("noreply", state, *timeout) if _is_timeout(timeout):
                self.state = state
            case ("reply", value, state, *timeout) if from_ and _is_timeout(timeout):
                self.state = state
                reply(from_, value)
            case ("stop", reason, state):
                self.state = state
                raise _Stop(reason)
            case ("stop", reason, value, state) if from_:
                self.state = state
                raise _Stop(reason, lambda: reply(from_, value))
            case _:
                raise _Stop(("bad_return_value", result))
        return timeout[0] if timeout else None

    def cleanup(self, error: BaseException) -> Any:
        if self.timer is not None:
            self.timer.close()
        if self.init_waiter is not None:
            return self._fail_start(error)
        if isinstance(error, ProcessExit):
            return error.reason
        reason = self._reason(error)
        try:
            self._optional("terminate")(reason, self.state)
        except BaseException as failure:
            reason = self.log_crash(failure, "terminate")
        if isinstance(error, _Stop) and error.answer:
            error.answer()
        return reason

    def _fail_start(self, error: BaseException) -> Any:
        """`start_link` tells its caller; no exit signal does it a second time."""
        if self.parent in self.links:
            self.links.discard(self.parent)
            self.parent.links.discard(self)
        if isinstance(error, _Stop) and error.answer:
            error.answer()
        return error.reason if isinstance(error, _Stop) else self.log_crash(error, "init")

    def _reason(self, error: BaseException) -> Any:
        if not isinstance(error, _Stop):
            return self.log_crash(error, failing_callback(error))
        if not is_normal(error.reason):
            log.error("%r%s stopped: %r", self, self.title(), error.reason)
        return error.reason

    def role(self) -> str:
        return getattr(type(self.server), "__name__", "")

    def title(self) -> str:
        return super().title() or f" {self.role()}"


def start_link(cls: Any, args: Any = None, name: str | None = None) -> Any:
    """Starts a server, linked to the caller, and waits for its `init` (gen_server:start_link/4).

    `cls` is a class, or any object with the callbacks. Answers the Pid; ("error", reason) if `init` stops or crashes,
    ("error", ("already_started", pid)) if `name` is taken; "ignore" if `init` says so.
    """
    me = calling_process()
    if name is not None and check_name(name) in registered:
        return "error", ("already_started", registered[name])
    server = ServerProcess(cls() if isinstance(cls, type) else cls, args, me)
    if name is not None:
        register(name, server)
    link(server)
    init_waiter = server.init_waiter
    enqueue(server)
    match send_and_wait(server, init_waiter, None):  # type: ignore[arg-type]
        case "ok":
            return server
        case ("DOWN", reason):
            return "error", reason
    return "ignore"


def call(server: Pid | str, request: Any, timeout: float | None = 5.0) -> Any:
    """Asks a server and waits for its answer (gen_server:call/3); `timeout` in seconds, None for ever.

    Raises CallTimeout, NoProc or ServerDied, all of them CallError.
    """
    me, process, alias = calling_process(), resolve(server), Alias()
    if process is None:
        raise NoProc(server)
    if process is me:
        raise CallError(f"{me!r} calls itself")
    match send_and_wait(process, alias, timeout, ("$gen_call", (me, alias), request)):
        case ("reply", value):
            return value
        case ("DOWN", "noproc"):
            raise NoProc(server)
        case ("DOWN", reason):
            raise ServerDied(reason)
    raise CallTimeout(f"no answer from {server!r} to {request!r} in {timeout} s")


def cast(server: Pid | str, request: Any) -> str:
    """Sends a request that nobody answers; "ok", whether the server lives or not (gen_server:cast/2)."""
    send(server, ("$gen_cast", request))
    return "ok"


def reply(from_: tuple[Pid, Pid], value: Any) -> str:
    """Answers a call from anywhere; `from_` is what handle_call was given (gen_server:reply/2)."""
    try:
        from_[1].send(("reply", value))
    except (TypeError, ValueError) as error:  # it cannot cross to the caller's node: no reason for the server to die
        log.error("%r cannot answer %r: %s", self_pid(), from_[0], error)
        from_[1].send(("DOWN", str(error)))
    return "ok"


def stop(server: Pid | str, reason: Any = "normal", timeout: float | None = None) -> str:
    """Lets a server end after what is in its mailbox, and waits for it (gen_server:stop/3).

    Raises NoProc if there is none, ServerDied if it ends for another reason (`terminate` crashes, it is killed), and
    CallTimeout after `timeout` seconds.
    """
    process = resolve(server)
    if process is None:
        raise NoProc(server)
    if process is calling_process():
        raise CallError(f"{process!r} stops itself")
    match send_and_wait(process, Alias(), timeout, ("$stop", reason)):
        case None:
            raise CallTimeout(f"{server!r} did not stop in {timeout} s")
        case ("DOWN", "noproc"):
            raise NoProc(server)
        case ("DOWN", other) if other != reason:
            raise ServerDied(other)
    return "ok"


class Supervisor(GenServer):
    """OTP's supervisor, one_for_one: a child that ends is started again, unless that happens too often.

    Its state is {id: (spec, pid)} in starting order; pid is None for a child that is not running.
    """

    SHUTDOWN = 5.0  # seconds that a child has to end before it is killed (OTP's default)

    def __init__(self, children: list[dict[str, Any]], intensity: int, period: float) -> None:
        self.children, self.intensity, self.period = children, intensity, period
        self.restarts: deque[float] = deque()

    def init(self, _args: Any) -> Any:
        process_flag("trap_exit", True)
        state: dict[Any, Any] = {}
        for spec in self.children:
            pid = self._start(spec)
            if isinstance(pid, tuple):
                self.terminate("shutdown", state)
                return "stop", ("shutdown", ("failed_to_start_child", spec["id"], pid[1]))
            if pid is not None or spec["restart"] != "temporary":  # OTP forgets a temporary child that is ignored
                state[spec["id"]] = (spec, pid)
        return "ok", state

    def _start(self, spec: dict[str, Any]) -> Any:
        """The Pid of a child; None if it said "ignore"; ("error", reason)."""
        fn, *args = spec["start"]
        crash = None
        try:
            answer = fn(*args)
        except Exception as error:
            answer, crash = ("error", error), error
        match answer:
            case Pid():
                link(answer)
                return answer
            case "ignore":
                return None
            case ("error", _):
                pass
            case _:
                answer = "error", answer
        log.error("%r child %r could not be started: %r", self_pid(), spec["id"], answer[1], exc_info=crash)
        return answer

    def handle_call(self, request: Any, from_: Any, state: Any) -> Any:
        if request == "which_children":
            return "reply", [(id, pid, spec["restart"]) for id, (spec, pid) in state.items()], state
        return "reply", ("error", "unknown_request"), state

    def handle_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("EXIT", pid, reason):
                ids = [id for id, (_, child) in state.items() if child is pid]
                return self._ended(ids[0], reason, state) if ids else ("noreply", state)
            case ("$restart", id) if id in state and state[id][1] is None:
                return self._restart(id, state)
        return "noreply", state

    def _ended(self, id: Any, reason: Any, state: Any) -> Any:
        spec, pid = state[id]
        state[id] = (spec, None)
        if spec["restart"] == "temporary":
            del state[id]
        elif spec["restart"] == "permanent" or not is_normal(reason):
            log.warning("%r child %r, %r, ended: %r; starting it again", self_pid(), id, pid, reason)
            return self._restart(id, state)
        return "noreply", state

    def _restart(self, id: Any, state: Any) -> Any:
        now = monotonic()
        self.restarts.append(now)
        while now - self.restarts[0] > self.period:
            self.restarts.popleft()
        if len(self.restarts) > self.intensity:
            log.error("%r gives up: more than %d restarts in %s s", self_pid(), self.intensity, self.period)
            return "stop", "shutdown", state
        spec, _ = state[id]
        pid = self._start(spec)
        if isinstance(pid, tuple):
            pid = None
            self_pid().send(("$restart", id))
        state[id] = (spec, pid)
        return "noreply", state

    def terminate(self, reason: Any, state: Any) -> None:
        for _, pid in reversed(state.values()):
            if pid is not None:
                self._shut_down(pid)

    def _shut_down(self, pid: Pid) -> None:
        ref = monitor(pid)
        unlink(pid)  # else the EXIT of each would stay in the mailbox, and in the way of the next DOWN
        exit(pid, "shutdown")
        is_supervisor = isinstance(pid, ServerProcess) and isinstance(
            pid.server, Supervisor
        )  # has children to wait for
        if receive(None if is_supervisor else self.SHUTDOWN, is_down(ref)) is None:
            exit(pid, "kill")
            receive(None, is_down(ref))


def _child(spec: Any) -> dict[str, Any]:
    """Returns a child with all its keys. Raises ValueError that says what is wrong with it."""
    if not isinstance(spec, dict):
        raise ValueError(f"a child must be a dict, got {spec!r}")
    child = {"restart": "permanent", **spec}
    unknown = child.keys() - {"id", "start", "restart"}
    start, restart = child.get("start"), child["restart"]
    if "id" not in child:
        problem = "no id"
    elif unknown:
        problem = f"unknown keys {sorted(map(str, unknown))}"
    elif not (isinstance(start, tuple | list) and start and callable(start[0])):
        problem = f"start must be (function, *arguments), got {start!r}"
    elif restart not in ("permanent", "transient", "temporary"):
        problem = f"restart must be 'permanent', 'transient' or 'temporary', got {restart!r}"
    else:
        return child
    raise ValueError(f"child {child.get('id')!r}: {problem}")


def start_supervisor(
    children: Iterable[dict[str, Any]], intensity: int = 1, period: float = 5, name: str | None = None
) -> Any:
    """Starts the children in order and keeps them running (OTP's supervisor, one_for_one).

    A child is {"id", "start": (fn, *args), "restart": "permanent" (the default) | "transient" | "temporary"}. More than
    `intensity` restarts in `period` seconds end the children in reverse order and then the supervisor, with "shutdown".
    `call(supervisor, "which_children")` lists (id, pid, restart). Answers as `start_link`. Raises ValueError for a bad
    child, `intensity` or `period`.
    """
    if not isinstance(intensity, int) or isinstance(intensity, bool) or intensity < 0:
        raise ValueError(f"intensity must be a number of restarts, got {intensity!r}")
    if not isinstance(period, int | float) or isinstance(period, bool) or not period > 0:
        raise ValueError(f"period must be a number of seconds above 0, got {period!r}")
    specs = [_child(child) for child in children]
    if len({spec["id"] for spec in specs}) < len(specs):
        raise ValueError("two children have the same id")
    return start_link(Supervisor(specs, intensity, period), name=name)


__all__ += [
    "CallError", "CallTimeout", "GenServer", "NoProc", "ServerDied", "call", "cast", "reply", "start_link",
    "start_supervisor", "stop",
]  # fmt: skip


# ----- cut here: without replay --------------------------------------------------------------------------------------
# Lost: pubsub.keep; join(since=...) then answers with a resync.


# ---------------------------------------------------------------------------------------------------------------------
# Replay: channels that are kept; what a member has missed comes first.
# House rule: plugs into pub/sub; knows no cluster.
# ---------------------------------------------------------------------------------------------------------------------


class History:
    """The last messages of a channel, numbered without a gap. A position is "life.number"."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds
        self.messages: deque[tuple[float, Message]] = deque(maxlen=size)  # when it came, and the message
        self.forget()

    def resize(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds
        self.messages = deque(self.messages, maxlen=size)

    def begin(self, life: str, number: int) -> None:
        """The last message was that one, and none before it is known."""
        self.life, self.number, self.known = life, number, number  # nothing is missing behind `known`
        self.messages.clear()

    def forget(self) -> None:
        """Something is missing: no position from before is of use."""
        self.begin(os.urandom(4).hex(), 0)

    def load(self, life: str, number: int, messages: list[tuple[float, Message]]) -> None:
        """Takes over what is kept elsewhere, up to `number`; what has come since then stays."""
        newer = [entry for entry in self.messages if self._is_behind(entry[1].position, life, number)]
        self.begin(life, number - len(messages))
        for at, message in messages + newer:
            self.add(message, at)

    @property
    def position(self) -> str:
        return f"{self.life}.{self.number}"

    def add(self, message: Message, at: float | None = None) -> None:
        """Takes the next message, which may know its position already; `at` is when it came, if not now."""
        if message.position is None:
            message.position = f"{self.life}.{self.number + 1}"
        life, number = self._parse(message.position)
        if (life, number) != (self.life, self.number + 1):  # nobody knows what came between
            self.begin(life, number)
        self.number = number
        self.messages.append((monotonic() if at is None else at, message))

    def since(self, position: Any) -> list[Message] | None:
        """What came behind `position`, or None if that cannot be told: it is too old, or of another life."""
        while self.messages and monotonic() - self.messages[0][0] > self.seconds:
            self.messages.popleft()
        life, number = self._parse(position)
        missed = self.number - number
        if life != self.life or number < self.known or not 0 <= missed <= len(self.messages):
            return None
        return [message for _, message in list(self.messages)[len(self.messages) - missed :]]

    def _is_behind(self, position: Any, life: str, number: int) -> bool:
        return self._parse(position)[0] == life and self._parse(position)[1] > number

    @staticmethod
    def _parse(position: Any) -> tuple[str, int]:
        life, _, number = str(position).rpartition(".")
        return (life, int(number)) if re.fullmatch("[0-9]{1,18}", number) else ("", 0)


def _keep(pubsub: PubSub, channel: str, size: int, seconds: float) -> str:
    if not (size >= 1 and 0 < seconds < inf):
        raise ValueError("a history has a size and a time")
    scheduler.run_in_hub(_start_history, pubsub, check_channel(channel), size, seconds)
    return "ok"


def _start_history(pubsub: PubSub, channel: str, size: int, seconds: float) -> None:
    if channel in pubsub.histories:
        pubsub.histories[channel].resize(size, seconds)
    else:
        pubsub.histories[channel] = History(size, seconds)
        pubsub.adapter.on_keep(channel)


rooms["replay"] = SimpleNamespace(keep=_keep)


# ----- cut here: without launch --------------------------------------------------------------------------------------
# Lost: reload=True and workers=N; reload_on_change, run_workers.


# ---------------------------------------------------------------------------------------------------------------------
# Launch: reloading, workers.
# House rule: starts processes of the system; knows nothing of what they serve.
# ---------------------------------------------------------------------------------------------------------------------


_RELOADED = "NOVA_LITE_RELOADED"  # in the environment of the process that serves


def reload_on_change() -> None:
    """Runs this program as a child, again whenever a file of it changes. In the child it returns at once.

    A child that fails is not started again before a file has changed: it would only fail again.
    """
    if _RELOADED in os.environ:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        stamps = _file_stamps()
        child = subprocess.Popen(_own_command(), env={**os.environ, _RELOADED: "1"})
        try:
            while _file_stamps() == stamps:
                time.sleep(0.1)
                if child.poll() == 0:
                    sys.exit(0)
        except KeyboardInterrupt:  # Ctrl-C has reached the child as well; `kill -INT` has not
            with suppress(subprocess.TimeoutExpired):
                sys.exit(child.wait(1))
            child.terminate()
            sys.exit(child.wait())
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
        log.info("a file has changed: starting again")


_WORKER = "NOVA_LITE_WORKER"  # in the environment of a worker: its number, the port, and the descriptor of a pipe


def run_workers(count: int, host: str, port: int, drain_time: float = DRAIN_TIME) -> tuple[int, int]:
    """Runs this program `count` times, as workers on one port; in a worker it returns (its number, the port) at once.

    A worker that ends is started again; where that happens at once, three times in a row, all end with exit code 1.
    SIGINT and SIGTERM drain all of them. Raises OSError where the address is taken.
    """
    if _WORKER in os.environ:
        number, port, _ = map(int, os.environ[_WORKER].split(":"))
        return number, port
    reserved = _bound_socket(host, port, None)  # so that a port 0 means the same one to all
    sys.exit(Workers(reserved.getsockname()[1], drain_time).run(count))


class Workers:
    """The master of some processes that serve one port."""

    def __init__(self, port: int, drain_time: float) -> None:
        self.port, self.drain_time = port, drain_time
        self.lifeline, self.held = os.pipe()  # each worker sees its end when the master is gone, however it went
        self.children: dict[int, Any] = {}
        self.asked_to_stop = gevent.event.Event()
        self.failed = False

    def run(self, count: int) -> int:
        """Until a signal comes, or they cannot be kept running; the exit code."""
        for sign in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(sign, self.stop)
        log.info("%d workers on port %d", count, self.port)
        gevent.joinall([gevent.spawn(self._keep, number) for number in range(1, count + 1)])
        return 1 if self.failed else 0

    def _keep(self, number: int) -> None:
        quick_ends = 0
        while not self.asked_to_stop.is_set():
            child = self.children[number] = self._start(number)
            if self.asked_to_stop.is_set():  # meanwhile
                self.stop()
            started, code = monotonic(), child.wait()
            if self.asked_to_stop.is_set():
                return
            log.error("worker %d, process %d, ended with %d", number, child.pid, code)
            quick_ends = quick_ends + 1 if monotonic() - started < 3 else 0
            if quick_ends == 3:
                self.failed = True
                self.stop()
            self.asked_to_stop.wait(1 if quick_ends else 0)

    def _start(self, number: int) -> Any:
        env = {**os.environ, _WORKER: f"{number}:{self.port}:{self.lifeline}"}
        # A session of its own: Ctrl-C is for the master, which then tells all.
        options = {"pass_fds": [self.lifeline], "stdin": gevent.subprocess.DEVNULL, "start_new_session": True}
        child = gevent.subprocess.Popen(_own_command(), env=env, **options)
        log.info("worker %d is process %d", number, child.pid)
        return child

    def stop(self) -> None:
        """Lets them drain. Asked again, they are in a hurry, too; and who takes too long is killed."""
        self.asked_to_stop.set()
        for child in self.children.values():
            if child.poll() is None:
                child.terminate()
                gevent.spawn_later(self.drain_time + 5, child.kill)


def _on_orphaned(stop: Callable[[], None]) -> Any:
    """In a worker: calls `stop` when the master is gone."""
    if _WORKER not in os.environ:
        return None
    watcher = get_hub().loop.io(int(os.environ[_WORKER].split(":")[2]), 1)

    def orphaned() -> None:
        watcher.stop()
        stop()

    watcher.start(orphaned)
    return watcher.close


def _own_command() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # there is one under python -m
    return [sys.executable, *(["-m", spec.name, *sys.argv[1:]] if spec else sys.argv)]


def _file_stamps() -> dict[str, float]:
    """When each file of the program has changed: what is imported, less what is installed."""
    stamps = {}
    installed = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path and not path.startswith(installed):
            with suppress(OSError):
                stamps[path] = os.stat(path).st_mtime
    return stamps


while_serving.append(_on_orphaned)
__all__ += ["reload_on_change", "run_workers"]
rooms["launch"] = SimpleNamespace(reload_on_change=reload_on_change, run_workers=run_workers)


# ----- cut here: without cluster -------------------------------------------------------------------------------------
# Lost: cluster=URL, pubsub.connect, publish: a node is alone.
# Needs: the packages redis and msgpack, once a cluster is asked for.


# ---------------------------------------------------------------------------------------------------------------------
# Cluster: other nodes, through Redis or Valkey.
# House rule: nobody above imports it; it plugs into pub/sub, and what it says to a node it says with `_say`.
#
# Each node subscribes to `<prefix>nodes`, to `<prefix>node:<its id>`, and to `<prefix>channel:<name>` where it has
# members. Redis keeps the order of what one connection publishes, and a node publishes over one. On `nodes` it says
#
#   hello [name, sequence, members]   once its subscriptions are live; each other answers with `state`, the same, to it
#   delta [sequence, changes]         who has joined and left; a gap in the sequence asks for the state again
#   beat [sequence]                   every BEAT seconds; its own one, coming back, is the probe of its line
#   resync [channels]                 it may have failed to publish there (None: anywhere); members are told
#   bye                               before it goes
#
# and to one node's own channel: state, need (answer with `state`), send, exit, watch, unwatch, down; to itself loaded.
# A message is STAMP, the id of its sender, and MessagePack; what is not is dropped and counted. A node that comes back
# has another id, were it under the same name. Who was cut off forgets what it could not say, and says so: at most once.
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"N1"  # and the version of what follows
HEARTBEAT_INTERVAL = 2.0  # seconds
NODE_TIMEOUT = 6.2  # seconds without a word until a node is taken for dead: with a tick, less than 7
TRANSPORT_TIMEOUT = 4.0  # seconds without one's own beat until the line is taken for dead: with a tick, less than 5
TICK = 0.5  # seconds
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds before connecting again, doubled each time, with jitter
MAX_PAYLOAD = 16 * 1024 * 1024  # bytes of a message between nodes; Redis itself cuts subscribers 32 MB behind
MAX_OUTBOX = 64 * 1024 * 1024  # bytes that may wait for Redis; beyond, messages are lost, and members told so
JOIN_TIME = 5.0  # seconds that a join waits for its subscription at most, and `connect` for Redis
MAX_NAMES = 1000  # of nodes that have left; the pids of those before print the node's id
MAX_LOST = 10_000  # names of channels to be told; beyond, all are
MAX_DEPTH = 32  # tuples within tuples: each takes msgpack 40 KB of the C stack, and beyond that is a segfault
_TUPLE, _PID, _DATETIME = 1, 2, 3  # MessagePack's extension types

# What Redis does for a channel that is kept. KEYS: a hash (life, number of the last message, run), a stream of them,
# the channel. ARGV: a life to begin, the server's run_id, how many, seconds, the message, which goes out behind its
# position. A server that starts again may have an older copy: with another run begins another life.
KEPT_MARK = b"@"
_BEGIN = """
if redis.call('HGET', KEYS[1], 'run') ~= ARGV[2] then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'life', ARGV[1], 'run', ARGV[2], 'number', 0)
end
local life, now = redis.call('HGET', KEYS[1], 'life'), redis.call('TIME')[1]
"""
KEEP = f"""
local position = ''
pcall(function()  -- where there is no memory left, it is published without a position
  {_BEGIN}
  local number = redis.call('HINCRBY', KEYS[1], 'number', 1)
  local message = '{KEPT_MARK.decode()}' .. life .. '.' .. number .. ' ' .. ARGV[5]
  redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], number .. '-0', 'at', now, 'message', message)
  redis.call('EXPIRE', KEYS[1], ARGV[4] * 2)
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  position = life .. '.' .. number
end)
return redis.call('PUBLISH', KEYS[3], '{KEPT_MARK.decode()}' .. position .. ' ' .. ARGV[5])
"""
LOAD = f"""{_BEGIN}
return {{life, redis.call('HGET', KEYS[1], 'number'), now, redis.call('XRANGE', KEYS[2], '-', '+')}}
"""


class RemotePid(Pid):
    """A process of another node. To send it what cannot cross is a TypeError, or a ValueError if it is too large."""

    __slots__ = ("cluster", "node")

    def __init__(self, cluster: Cluster, node: bytes, serial: int) -> None:
        self.cluster, self.node, self.serial = cluster, node, serial

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePid) and (self.node, self.serial) == (other.node, other.serial)

    def __hash__(self) -> int:
        return hash((self.node, self.serial))

    def __repr__(self) -> str:
        return f"<{self.cluster.names.get(self.node, self.node.hex())}.{self.serial}>"

    def send(self, message: Any) -> None:
        self.cluster.tell(self.node, "send", self.serial, message)

    def watch(self, ref: Any, watcher: Any) -> None:
        self.cluster.watch(self, ref, watcher)

    def unwatch(self, ref: Any) -> None:
        if self.cluster.watches.pop(ref, None):
            self.cluster.tell(self.node, "unwatch", self.serial, ref)

    def signal(self, source: Pid, reason: Any) -> None:
        self.cluster.tell(self.node, "exit", self.serial, source, self.cluster.codec.exit_reason(reason))

    def kill(self, reason: Any) -> None:
        self.cluster.tell(self.node, "exit", self.serial, None, "kill")


class Codec:
    """MessagePack with tuples, pids and datetimes."""

    def __init__(self, cluster: Any, id: bytes) -> None:
        self.cluster, self.id = cluster, id
        self.msgpack = _package("msgpack")

    def encode(self, value: Any) -> bytes:
        """Raises TypeError for what cannot cross, ValueError for what is too large."""
        try:
            data = self._pack(value, 0)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TypeError(f"this cannot cross to another node: {error}") from None
        if len(data) > MAX_PAYLOAD - 64:
            raise ValueError(f"{len(data)} bytes are too many to cross to another node: {MAX_PAYLOAD} are the limit")
        return MAGIC + self.id + data

    def _pack(self, value: Any, depth: int) -> bytes:
        if depth > MAX_DEPTH:
            raise ValueError(f"tuples nested more than {MAX_DEPTH} deep")
        # strict: a tuple, and whatever else is not exactly MessagePack's, comes to `_extend`
        extend = partial(self._extend, depth)
        return self.msgpack.packb(value, default=extend, strict_types=True, unicode_errors="surrogatepass")

    def _extend(self, depth: int, value: Any) -> Any:
        if isinstance(value, tuple):
            return self.msgpack.ExtType(_TUPLE, self._pack(list(value), depth + 1))
        if isinstance(value, Pid):
            if isinstance(value, Alias):
                _aliases[value.serial] = value
            node = value.node if isinstance(value, RemotePid) else self.id
            return self.msgpack.ExtType(_PID, node + value.serial.to_bytes(8, "big"))
        if isinstance(value, datetime):
            return self.msgpack.ExtType(_DATETIME, value.isoformat().encode())
        raise TypeError(f"{type(value).__name__} {value!r:.80}")

    def exit_reason(self, reason: Any) -> Any:
        """A reason that crosses: an exception, say, as its text."""
        try:
            self.encode(reason)
        except (TypeError, ValueError):
            return repr(reason)
        return reason

    def decode(self, data: bytes, depth: int = 0) -> Any:
        """What `encode` was given. Raises, one way or another, where the bytes are nothing of that kind."""
        if depth > MAX_DEPTH:
            raise ValueError(f"tuples nested more than {MAX_DEPTH} deep")
        restore = partial(self._restore, depth)
        return self.msgpack.unpackb(data, ext_hook=restore, strict_map_key=False, unicode_errors="surrogatepass")

    def _restore(self, depth: int, code: int, data: bytes) -> Any:
        if code == _TUPLE:
            return tuple(self.decode(data, depth + 1))
        if code == _DATETIME:
            return datetime.fromisoformat(data.decode())
        if code != _PID or len(data) != 16:
            raise ValueError(f"an extension of type {code} and {len(data)} bytes")
        node, serial = data[:8], int.from_bytes(data[8:], "big")
        local = _local_pid(serial) if node == self.id else None
        return local or RemotePid(self.cluster, node, serial)


# Those that another node has heard of, by their serials.
_aliases: weakref.WeakValueDictionary[int, Alias] = weakref.WeakValueDictionary()


def _local_pid(serial: int) -> Pid | None:
    return processes.get(serial) or _aliases.get(serial)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("a cluster needs two more packages: pip install redis hiredis msgpack") from None


class Redis:
    """Where the nodes meet; makes connections, and knows the names of the channels there."""

    def __init__(self, url: str) -> None:
        self.module = _package("redis")
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.prefix = query.pop("prefix", "nova") + ":"
        place = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
        self.title = f"{parts.scheme}://{place}"  # for the log: no password, not even one with a slash
        options = {"protocol": 2, "socket_timeout": None, "socket_connect_timeout": 5, "socket_keepalive": True}
        options |= {"decode_responses": False, "health_check_interval": 0}
        query = {name: value for name, value in query.items() if name not in options}
        try:
            client = self.module.Redis.from_url(parts._replace(query=urlencode(query)).geturl(), **options)
            self.pool = client.connection_pool
            self.pool.make_connection()  # not connected yet, but it raises where it does not know an option
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.title} is no URL of a Redis: {error}") from None
        self.errors = (OSError, self.module.RedisError)

    def connect(self) -> Any:
        connection = self.pool.make_connection()
        connection.connect()
        return connection

    def key(self, kind: str, name: str = "") -> bytes:
        return f"{self.prefix}{kind}{name}".encode("utf-8", "surrogatepass")


@dataclass(eq=False)
class Node:
    """What is known of another node."""

    name: str
    sequence: int
    members: dict[str, set[int]]  # channel -> serials; no set is ever empty
    heard: float  # when


class Transport:
    """Two connections to Redis, for as long as they hold; a greenlet reads one, another writes both."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.reading: Any = None
        self.writing: Any = None
        self.run = ""  # which start of the server it is
        self.commands: list[Any] = []  # for `reading`: SUBSCRIBE and UNSUBSCRIBE
        self.outbox: deque[tuple[str | None, Any]] = deque()  # for `writing`: (channel of a broadcast, command)
        self.waiting = 0  # bytes in it
        self.work = gevent.event.Event()

    def open(self) -> None:
        self.writing = self.redis.connect()
        self.writing.send_command("INFO", "server")
        with suppress(self.redis.module.ResponseError):  # it may not be allowed
            self.run = b"".join(re.findall(rb"run_id:(\w+)", self.writing.read_response())).decode()
        self.reading = self.redis.connect()

    def close(self) -> None:
        for connection in (self.reading, self.writing):
            if connection is not None:
                with suppress(*self.redis.errors):
                    connection.disconnect()

    def command(self, name: str, key: bytes) -> None:
        self.commands.append((name, key))
        self.work.set()

    def publish(self, key: bytes, data: bytes, channel: str | None = None) -> None:
        self.send(("PUBLISH", key, data), channel)

    def send(self, command: tuple[Any, ...], channel: str | None) -> None:
        """A command whose last argument is the message."""
        self.outbox.append((channel, command))
        self.waiting += len(command[-1])
        self.work.set()

    def write(self) -> None:
        """Writes what there is, a batch with one round trip."""
        self.work.clear()
        if self.commands:
            commands, self.commands = self.commands, []
            self.reading.send_packed_command(self.reading.pack_commands(commands))
        batch: list[Any] = []
        size = 0
        for _, command in islice(self.outbox, 1000):
            batch.append(command)
            size += len(command[-1])
            if size > 1_000_000:
                break
        if batch:
            self.writing.send_packed_command(self.writing.pack_commands(batch))
        for _ in batch:
            self.writing.read_response()
            self.waiting -= len(self.outbox.popleft()[1][-1])  # not before: what fails on the way is still here
        if self.outbox:
            self.work.set()


class Cluster(Adapter):
    """This node among others; `pubsub.connect` makes it. What it does between waits, it does in the home thread."""

    def __init__(self, pubsub: PubSub, url: str, name: str) -> None:
        super().__init__(pubsub)
        self.id, self.name = os.urandom(8), name
        self.redis = Redis(url)
        self.own_key, self.channel_prefix = self.redis.key("node:", self.id.hex()), self.redis.key("channel:")
        self.codec = Codec(self, self.id)
        self.nodes: dict[bytes, Node] = {}  # the others
        self.names = {self.id: name}  # node -> name, after it has left as well: its pids may still be printed
        self.line: Transport | None = None  # None while there is none
        self.connected = False  # our hello has been said over this line
        self.first_connected = gevent.event.Event()  # ... or over an earlier one
        self.missed = False  # there was a time without a line
        self.sequence = 0  # of our last delta
        self.changes: list[Any] = []  # for the next one
        self.wanted: set[str] = set()  # channels for which the last that we said was SUBSCRIBE
        self.subscribing: dict[str, int] = {}  # channel -> SUBSCRIBEs that Redis has not confirmed yet
        self.live: set[str] = set()  # channels that are wanted, with all of them confirmed
        self.waiters: dict[str, gevent.event.Event] = {}  # channel that is wanted but not live -> who joins waits here
        self.loading: dict[str, tuple[str, int, list[tuple[float, Message]]]] = {}  # channel -> its history, soon
        self.in_flight: deque[tuple[Message, Pid | None]] = deque()  # to the history, and not back yet
        self.lost: set[str] | None = set()  # channels where we have failed to publish; None: there are too many
        self.watches: dict[Any, tuple[RemotePid, Any]] = {}  # ref -> whom we monitor elsewhere, and who wants to know
        self.watched: dict[bytes, dict[Any, Process]] = {}  # node -> ref -> whom it monitors here
        self.dropped = 0  # messages that could not be read
        self.logged, self.logged_drops = -60.0, 0  # when, and how many
        self.heard = self.last_beat = self.last_tick = monotonic()  # our own beat came back, was sent; `_tick` came by
        self.asked: dict[bytes, float] = {}  # node -> when we have asked for its state
        self.timer = get_hub().loop.timer(TICK, TICK)
        self.timer.start(self._tick)
        self.reader = gevent.spawn(self._run)

    def close(self) -> None:
        """Says bye, and nothing after it: who asks for our state now gets no answer."""
        self.timer.close()
        line = self.line
        if line is not None and self.connected:
            self.changes.clear()
            self._say("nodes", "", "bye")
            self.line = None
            with gevent.Timeout(1, False):
                while line.outbox and self.connected:
                    gevent.sleep(0.001)
            line.close()
        self.reader.kill()
        for id in list(self.nodes):
            self._forget(id, "this one has left")

    # -- the line

    def _run(self) -> None:
        """The greenlet that keeps a line and reads from it."""
        delay, failure = 0.0, ""
        while True:
            try:
                gevent.sleep(delay * random.uniform(0.5, 1))
                self._read()
            except Exception as error:
                if not isinstance(error, self.redis.errors):
                    log.exception("cluster: this should not have happened")
                if self.connected or str(error) != failure:
                    what = "lost" if self.connected else "cannot be reached"
                    log.warning("cluster: %s %s: %s; trying again", self.redis.title, what, error)
                delay = FIRST_DELAY if self.connected else min(max(delay, FIRST_DELAY) * 2, LAST_DELAY)
                failure = str(error)
            finally:
                self._on_disconnect()

    def _read(self) -> None:
        self.heard = monotonic()
        line = self.line = Transport(self.redis)
        line.open()
        line.command("SUBSCRIBE", self.redis.key("nodes"))
        for channel in {*self.pubsub.channels, *self.pubsub.histories}:
            self._subscribe(channel)
        line.command("SUBSCRIBE", self.own_key)  # the last: once it is confirmed, all are
        writer = gevent.spawn(self._write, line)
        try:
            turn = monotonic()
            while True:
                self._take(line.reading.read_response())
                if monotonic() - turn > TIME_SLICE:  # there may be much to read, and others want to work
                    gevent.sleep(YIELD_DELAY)
                    turn = monotonic()
        finally:
            writer.kill()

    def _write(self, line: Transport) -> None:
        """The greenlet that writes to the line."""
        try:
            while True:
                line.work.wait()
                if self.changes:
                    self.sequence += 1
                    changes, self.changes = self.changes, []
                    self._say("nodes", "", "delta", self.sequence, changes)
                line.write()
        except Exception as error:
            self.reader.kill(error, block=False)

    def _on_disconnect(self) -> None:
        """The line is dead. What it has not carried is lost; who waits for it is let go."""
        line, self.line, self.connected, self.missed = self.line, None, False, True
        if line is not None:
            line.close()
            for channel, _ in line.outbox:
                if channel is not None:
                    self._record_loss(channel)
        for table in (self.wanted, self.subscribing, self.live, self.changes, self.loading):
            table.clear()
        for history in self.pubsub.histories.values():
            history.forget()  # others go on without us
        while self.in_flight:  # Redis may have them, but our own members do not
            self.pubsub.deliver_unrecorded(*self.in_flight.popleft())
        while self.waiters:
            self.waiters.popitem()[1].set()

    def _record_loss(self, channel: str) -> None:
        if self.lost is not None:
            self.lost.add(channel)
            if len(self.lost) > MAX_LOST:
                self.lost = None

    def _tick(self) -> None:
        """Hub callback: beats, and notices who does not."""
        now = monotonic()
        if now - self.last_tick > 4 * TICK:  # it was us who held everything up
            self.heard = now
            for node in self.nodes.values():
                node.heard = now
        self.last_tick = now
        if self.connected and now - self.last_beat >= HEARTBEAT_INTERVAL - TICK / 2:
            self.last_beat = now
            self._say("nodes", "", "beat", self.sequence)
        if self.connected and self.line is not None and self.line.waiting < MAX_OUTBOX // 2:
            self._announce_losses()  # when Redis was too slow
        if self.line is not None and now - self.heard > TRANSPORT_TIMEOUT:
            self.heard = now
            self.reader.kill(TimeoutError(f"no answer for {TRANSPORT_TIMEOUT:.0f} s"), block=False)
        for id, node in list(self.nodes.items()):
            if now - node.heard > NODE_TIMEOUT:
                self._forget(id, f"silent for {now - node.heard:.1f} s")
        self._log_dropped(now)

    def _log_dropped(self, now: float) -> None:
        if self.dropped > self.logged_drops and now - self.logged >= 60:
            log.warning("cluster: %d messages that could not be read were dropped", self.dropped - self.logged_drops)
            self.logged, self.logged_drops = now, self.dropped

    # -- out

    def _say(self, kind: str, name: str, *body: Any) -> None:
        if self.line is not None:
            self.line.publish(self.redis.key(kind, name), self.codec.encode(list(body)))

    def tell(self, node: bytes, *body: Any) -> None:
        """Says something to one node, from whatever thread. Raises TypeError and ValueError, see Codec."""
        data = self.codec.encode(list(body))
        scheduler.run_in_hub(self._publish, self.redis.key("node:", node.hex()), data, None)

    def encode(self, message: Message, exclude: Pid | None) -> bytes:
        _, _, sender, topic, payload = message
        return self.codec.encode([sender, topic, payload, exclude])

    def dispatch(self, message: Message, exclude: Pid | None, data: bytes) -> None:
        channel = message[1]
        if channel not in self.pubsub.histories or not self.publish_kept(message, exclude, data):
            self.pubsub.deliver_unrecorded(message, exclude)
            self._publish(self.redis.key("channel:", channel), data, channel)

    def dispatch_here(self, message: Message) -> None:
        self.pubsub.deliver(message, None)

    def _publish(self, key: bytes, data: bytes, channel: str | None) -> None:
        if self.connected and self.line is not None and self.line.waiting < MAX_OUTBOX:
            self.line.publish(key, data, channel)
        elif channel is not None:
            self._record_loss(channel)

    # -- channels that are kept: subscribed to all the time, so that this node knows what Redis keeps

    def on_keep(self, channel: str) -> None:
        if channel in self.live:
            gevent.spawn(self._load, channel)
        else:
            self._ensure_subscribed(channel)

    def publish_kept(self, message: Message, exclude: Pid | None, data: bytes) -> bool:
        """By way of the history: it is delivered here when it comes back. False if that is not possible now."""
        channel = message[1]
        line, history = self.line, self.pubsub.histories[channel]
        if not self.connected or channel not in self.live or line is None or line.waiting > MAX_OUTBOX:
            return False
        keys = self._history_keys(channel), self.redis.key("channel:", channel)
        life, seconds = os.urandom(4).hex(), max(1, int(history.seconds))
        line.send(("EVAL", KEEP, 3, *keys[0], keys[1], life, line.run, history.size, seconds, data), channel)
        self.in_flight.append((message, exclude))
        return True

    def _history_keys(self, channel: str) -> tuple[bytes, bytes]:
        return self.redis.key("life:", channel), self.redis.key("history:", channel)

    def _load(self, channel: str) -> None:
        """The greenlet that fetches what Redis has kept."""
        history, life = self.pubsub.histories[channel], os.urandom(4).hex()
        try:
            run, connection = self.line.run, self.redis.connect()  # type: ignore[union-attr]
            try:
                connection.send_command("EVAL", LOAD, 2, *self._history_keys(channel), life, run)
                life, number, now, entries = connection.read_response()
            finally:
                connection.disconnect()
            aged = [(int(now) - int(fields[1]), fields[3]) for _, fields in entries]
            recent = [(monotonic() - age, data) for age, data in aged if age <= history.seconds]
            messages = [(at, self._read_kept(channel, data)[0]) for at, data in recent]
            # Some of them may still be on their way over the line. When this has come over it, all of them have.
            self.loading[channel] = life.decode(), int(number), messages
            self._say("node:", self.id.hex(), "loaded", channel)
        except Exception as error:  # the line is about to fail as well; or a stranger has written there
            log.warning("cluster: the history of %s cannot be read: %s", channel, error)
            history.forget()

    def _read_kept(self, channel: str, data: bytes) -> tuple[Message, Any]:
        position, _, data = data.partition(b" ")
        if not data.startswith(MAGIC):
            raise ValueError("no message of ours")
        message, exclude = self._read_broadcast(channel, self.codec.decode(data[10:]))
        message.position = position[1:].decode() or None
        return message, exclude

    def _on_kept(self, channel: str, data: bytes) -> None:
        position, _, stamped = data.partition(b" ")
        if stamped.startswith(MAGIC + self.id) and self.in_flight:  # Redis keeps the order
            message, exclude = self.in_flight.popleft()
            message.position = position[1:].decode() or None
        else:
            message, exclude = self._read_kept(channel, data)
        deliver = self.pubsub.deliver_unrecorded if message.position is None else self.pubsub.record_and_deliver
        deliver(message, exclude)

    # -- who is in which channel: here

    def on_join(self, channel: str, process: Process) -> None:
        if channel in self.live:
            self._change("join", channel, process)
        else:
            self._ensure_subscribed(channel)

    def on_leave(self, channel: str, process: Process) -> None:
        if channel in self.live:
            self._change("leave", channel, process)
        if channel in self.wanted and channel not in self.pubsub.channels and channel not in self.pubsub.histories:
            self.wanted.discard(channel)
            self.live.discard(channel)
            self.line.command("UNSUBSCRIBE", self.redis.key("channel:", channel))  # type: ignore[union-attr]
            self._wake_joiners(channel)

    def wait_until_subscribed(self, channel: str) -> None:
        """Until this node hears what is published to the channel, or the line is gone. The hub does not wait."""
        event = self.waiters.get(channel)
        if event is not None and get_ident() == scheduler.thread and not isinstance(getcurrent(), Hub):
            event.wait(JOIN_TIME)

    def _ensure_subscribed(self, channel: str) -> None:
        """Subscribes, unless that is done; a line that is not open yet will do it once it is."""
        if channel not in self.wanted and self.line is not None and self.line.reading is not None:
            self._subscribe(channel)

    def _subscribe(self, channel: str) -> None:
        self.line.command("SUBSCRIBE", self.redis.key("channel:", channel))  # type: ignore[union-attr]
        self.wanted.add(channel)
        self.subscribing[channel] = self.subscribing.get(channel, 0) + 1
        self.waiters[channel] = gevent.event.Event()

    def _on_subscribed(self, channel: str) -> None:
        """Redis has done a SUBSCRIBE; an UNSUBSCRIBE and another one may be on their way."""
        self.subscribing[channel] -= 1
        if self.subscribing[channel] == 0:
            del self.subscribing[channel]
            if channel in self.wanted:
                self.live.add(channel)
                for process in self.pubsub.channels.get(channel, ()):
                    self._change("join", channel, process)
                if channel in self.pubsub.histories:
                    gevent.spawn(self._load, channel)
                self._wake_joiners(channel)

    def _wake_joiners(self, channel: str) -> None:
        event = self.waiters.pop(channel, None)
        if event is not None:
            event.set()

    def _change(self, change: str, channel: str, process: Process) -> None:
        if self.connected:  # else the hello will tell
            self.changes.append([change, channel, process.serial])
            self.line.work.set()  # type: ignore[union-attr]

    def _members(self) -> dict[str, list[int]]:
        channels = self.pubsub.channels
        return {channel: [process.serial for process in channels[channel]] for channel in self.live & channels.keys()}

    def _resync(self, channels: Iterable[str]) -> None:
        """Something may have been missed in these channels: their members had better ask anew."""
        for channel in channels:
            for process in self.pubsub.channels.get(channel, ()):
                process.deliver(("nova_resync", channel))

    # -- who is in which channel: elsewhere

    def get_members(self, channel: str) -> list[Pid]:
        nodes = self.nodes.items()
        return [RemotePid(self, id, serial) for id, node in nodes for serial in node.members.get(channel, ())]

    def count_members(self, channel: str) -> int:
        return sum(len(node.members.get(channel, ())) for node in self.nodes.values())

    def info(self) -> dict[str, Any]:
        now = monotonic()
        nodes = [
            {
                "name": node.name,
                "id": id.hex(),
                "members": sum(map(len, node.members.values())),
                "silent_seconds": round(now - node.heard, 1),
            }
            for id, node in self.nodes.items()
        ]
        return {"up": self.connected, "nodes": nodes, "dropped": self.dropped}

    def which_channels(self) -> set[str]:
        return {channel for node in self.nodes.values() for channel in node.members}

    def _apply_state(self, id: bytes, name: str, sequence: int, members: dict[str, list[int]]) -> None:
        """The whole state of a node, in the place of what was known of it."""
        now, known = monotonic(), self.nodes.get(id)
        if known is not None and sequence < known.sequence:  # as in `_apply`
            return
        if known is None:
            log.info("cluster: node %s %s is here", name, id.hex())
        self.names[id] = name
        before = known.members if known is not None else {}
        after = {channel: set(serials) for channel, serials in members.items() if serials}
        self.nodes[id] = Node(name, sequence, after, now)
        self.asked.pop(id, None)
        for channel in self.pubsub.monitors:
            old, new = before.get(channel, set()), after.get(channel, set())
            for change, serials in (("join", new - old), ("leave", old - new)):
                for serial in serials:
                    self.pubsub.notify_monitors(channel, change, RemotePid(self, id, serial))

    def _apply_delta(self, id: bytes, sequence: int, changes: list[Any]) -> None:
        """A delta; one that the state has overtaken is old."""
        node = self.nodes.get(id)
        if node is None or sequence > node.sequence + 1:
            self._request_resync(id)
            return
        if sequence <= node.sequence:  # a connection that was given up may still say what a newer one has overtaken
            return
        node.sequence = sequence
        for change, channel, serial in changes:
            members = node.members.setdefault(channel, set())
            if (change == "join") != (serial in members):
                (members.add if change == "join" else members.discard)(serial)
                self.pubsub.notify_monitors(channel, change, RemotePid(self, id, serial))
            if not members:
                del node.members[channel]

    def _request_resync(self, id: bytes) -> None:
        """A gap in what a node says; or all of it, so far."""
        self._ask_for_state(id)
        if id in self.nodes:
            self._resync(list(self.pubsub.channels))

    def _ask_for_state(self, id: bytes) -> None:
        """Once a second at most."""
        now = monotonic()
        if now - self.asked.get(id, -inf) > 1:
            if len(self.asked) > 1000:  # strangers
                self.asked.clear()
            self.asked[id] = now
            self._say("node:", id.hex(), "need")

    def _forget(self, id: bytes, why: str) -> None:
        """A node is gone: its members leave, and who monitors its processes hears of it."""
        node = self.nodes.pop(id, None)
        if node is None:
            return
        self.names[id] = self.names.pop(id)  # behind those that have left before
        if len(self.names) > len(self.nodes) + MAX_NAMES:
            del self.names[next(old for old in self.names if old != self.id and old not in self.nodes)]
        log.info("cluster: node %s %s is gone: %s", node.name, id.hex(), why)
        for channel, serials in node.members.items():
            for serial in serials:
                self.pubsub.notify_monitors(channel, "leave", RemotePid(self, id, serial))
        for ref, (pid, watcher) in list(self.watches.items()):
            if pid.node == id:
                del self.watches[ref]
                watcher.down(ref, pid, "noconnection")
        for ref, process in self.watched.pop(id, {}).items():
            process.unwatch((id, ref))

    # -- monitors across nodes

    def watch(self, pid: RemotePid, ref: Any, watcher: Any) -> None:
        if pid.node == self.id or pid.node not in self.nodes:
            watcher.down(ref, pid, "noproc" if pid.node == self.id else "noconnection")
        else:
            self.watches[ref] = (pid, watcher)
            self.tell(pid.node, "watch", pid.serial, ref)

    def _watch_again(self, node: bytes | None = None) -> None:
        """What one side has said of a monitor may have been lost."""
        for ref, (pid, _) in self.watches.items():
            if node in (None, pid.node):
                self.tell(pid.node, "watch", pid.serial, ref)

    def _watch_for(self, node: bytes, serial: int, ref: Any) -> None:
        process = processes.get(serial)
        if process is None:
            self._say("node:", node.hex(), "down", serial, ref, "noproc")
        else:
            self.watched.setdefault(node, {})[ref] = process
            process.watch((node, ref), self)

    def down(self, key: tuple[bytes, Any], process: Process, reason: Any) -> None:
        """A process of ours that another node monitors has ended."""
        node, ref = key
        self.watched.get(node, {}).pop(ref, None)
        self._say("node:", node.hex(), "down", process.serial, ref, self.codec.exit_reason(reason))

    # -- in

    def _take(self, response: Any) -> None:
        match response:
            case [b"message", key, data]:
                if data.startswith(MAGIC + self.id):
                    self.heard = monotonic()
                    if key != self.own_key:
                        return
                try:
                    self._on_message(key, data)
                except Exception as error:  # a stranger's, or another version's: whatever it is, it ends here
                    self.dropped += 1
                    log.debug("cluster: dropped %d bytes: %r", len(data), error)
            case [b"subscribe", key, _] if key == self.own_key:
                self._on_connected()
            case [b"subscribe", key, _] if key.startswith(self.channel_prefix):
                self._on_subscribed(self._channel_of(key))

    def _channel_of(self, key: bytes) -> str:
        return key[len(self.channel_prefix) :].decode("utf-8", "surrogatepass")

    def _on_connected(self) -> None:
        """All subscriptions of a new line are live."""
        again = self.first_connected.is_set()
        self.connected, self.last_beat = True, monotonic()
        self.first_connected.set()
        log.info("cluster: %s is connected to %s%s", self.name, self.redis.title, " again" if again else "")
        self.sequence += 1  # who has changed while the line was down was told by no delta
        self._say("nodes", "", "hello", self.name, self.sequence, self._members())
        self._announce_losses()
        if self.missed:
            self.missed = False
            self._watch_again()
            self._resync(list(self.pubsub.channels))

    def _announce_losses(self) -> None:
        if self.lost != set():
            lost, self.lost = self.lost, set()
            self._say("nodes", "", "resync", None if lost is None else list(lost))

    def _on_message(self, key: bytes, data: bytes) -> None:
        """Raises whatever it likes where the bytes are not what they should be."""
        if not data.startswith((MAGIC, KEPT_MARK)) or len(data) > MAX_PAYLOAD:
            raise ValueError("no message of ours, or of another version, or too large")
        if data.startswith(KEPT_MARK):
            self._on_kept(self._channel_of(key), data)
            return
        id, body = data[2:10], self.codec.decode(data[10:])
        if key.startswith(self.channel_prefix):
            self.pubsub.deliver_unrecorded(*self._read_broadcast(self._channel_of(key), body))
            return
        node = self.nodes.get(id)
        if node is not None:
            node.heard = monotonic()
        if key == self.own_key:
            self._on_direct(id, body)
        else:
            self._on_announcement(id, body)

    def _read_broadcast(self, channel: str, body: Any) -> tuple[Message, Any]:
        sender, topic, payload, exclude = body
        if not isinstance(sender, Pid) or not isinstance(topic, str | bytes):
            raise ValueError("no broadcast")
        return Message(("nova_pubsub", channel, sender, topic, payload)), exclude

    def _on_announcement(self, id: bytes, body: Any) -> None:
        """What a node says to all."""
        match body:
            case ["hello", str(name), int(sequence), dict(members)]:
                self._apply_state(id, name, sequence, members)
                self._say("node:", id.hex(), "state", self.name, self.sequence, self._members())
                self._watch_again(id)
            case ["delta", int(sequence), list(changes)]:
                self._apply_delta(id, sequence, changes)
            case ["beat", int(sequence)]:
                if id not in self.nodes or self.nodes[id].sequence < sequence:
                    self._request_resync(id)
            case ["resync", None]:
                self._resync(list(self.pubsub.channels))
            case ["resync", list(channels)]:
                self._resync(channels)
            case ["bye"]:
                self._forget(id, "it said goodbye")
            case _:
                raise ValueError("not understood")

    def _on_direct(self, id: bytes, body: Any) -> None:
        """What a node says to this one."""
        match body:
            case ["send", int(serial), message]:
                send(_local_pid(serial) or "", message)
            case ["state", str(name), int(sequence), dict(members)]:
                self._apply_state(id, name, sequence, members)
            case ["loaded", str(channel)] if id == self.id and channel in self.loading:
                self.pubsub.histories[channel].load(*self.loading.pop(channel))
            case ["need"]:  # it may have forgotten us, and what we monitor there
                self._say("node:", id.hex(), "state", self.name, self.sequence, self._members())
                self._watch_again(id)
            case ["watch", int(serial), ref]:
                self._watch_for(id, serial, ref)
            case ["unwatch", int(serial), ref]:
                process = self.watched.get(id, {}).pop(ref, None)
                if process is not None:
                    process.unwatch((id, ref))
            case ["down", int(serial), ref, reason] if ref in self.watches:
                pid, watcher = self.watches.pop(ref)
                watcher.down(ref, pid, reason)
            case ["exit", int(serial), source, reason] if serial in processes:
                process = processes[serial]
                process.kill("killed") if source is None else process.signal(source, reason)
            case ["down", *_] | ["exit", *_]:
                pass  # too late
            case _:
                raise ValueError("not understood")


def _connect(pubsub: PubSub, url: str, name: str | None = None) -> str:
    global _node
    if isinstance(pubsub.adapter, Cluster):
        raise RuntimeError("this node is in a cluster already")
    if not gevent.monkey.is_module_patched("socket"):
        raise RuntimeError("a cluster needs a patched library: from gevent import monkey; monkey.patch_all()")
    calling_process()
    pubsub.adapter = Cluster(pubsub, url, name or _node)
    _node = pubsub.adapter.name
    if not pubsub.adapter.first_connected.wait(JOIN_TIME):
        log.warning("cluster: alone for now")
    return "ok"


def _disconnect(pubsub: PubSub) -> str:
    cluster = pubsub.adapter
    if not isinstance(cluster, Cluster):
        return "not_connected"
    pubsub.adapter = Adapter(pubsub)
    cluster.close()
    return "ok"


__all__ += ["publish"]
rooms["cluster"] = SimpleNamespace(connect=_connect, disconnect=_disconnect)


def publish(url: str, channel: str, topic: str | bytes, payload: Any) -> int:
    """Broadcasts without being a node, and answers how many nodes had members in the channel.

    Raises OSError or redis.RedisError where Redis cannot be reached, and what `connect` and `broadcast` raise.
    """
    redis = Redis(url)
    _, _, sender, topic, payload = pubsub.make_message(channel, topic, payload)
    key, data = redis.key("channel:", channel), Codec(None, os.urandom(8)).encode([sender, topic, payload, None])
    connection = redis.connect()
    try:
        connection.send_command("PUBLISH", key, data)
        return connection.read_response()
    finally:
        connection.disconnect()


# ----- cut here: without board ---------------------------------------------------------------------------------------
# Lost: app.stats and app.board.


# ---------------------------------------------------------------------------------------------------------------------
# Board: what this node is doing, for programs and, as a page, for people.
# House rule: looks at what the other rooms have, and changes nothing there.
# ---------------------------------------------------------------------------------------------------------------------

BOARD_TIME = 1.0  # seconds between two looks
BOARD_SIZE = 500  # processes shown at most
_started = monotonic()


def stats() -> dict[str, Any]:
    """Figures of this node, as a plain dict that JSON can carry; `app.stats()`.

    node, version; uptime_seconds, cpu_seconds, memory_bytes (resident; where that cannot be had, its maximum);
    connections (WebSockets and event streams) and max_connections, draining; since the start slow_closed (connections
    cut since they did not read) and messages_dropped (for such, `on_slow`); process_count, and processes: the
    BOARD_SIZE with the longest mailboxes, each with pid, name, handler, peer, mailbox (messages that wait), handled
    (messages), age_seconds, channels (five at most), state (idle, ready, running, waiting, slow); channels: channel,
    members (on all nodes), local_members, messages (to members here, since it has any); cluster: None, or up, nodes
    (name, id, members, silent_seconds) and dropped (messages that could not be read).
    """
    busiest = nlargest(BOARD_SIZE, processes.values(), key=lambda process: (len(process.mailbox), process.handled))
    ready = set(scheduler.ready)
    return {
        "node": _node,
        "version": __version__,
        "uptime_seconds": round(monotonic() - _started, 3),
        "cpu_seconds": round(time.process_time(), 3),
        "memory_bytes": _memory(),
        "connections": sum(len(registry.connections) for registry in registries),
        "max_connections": sum(registry.limit for registry in registries),
        "draining": any(registry.leaving or registry.draining for registry in registries),
        "slow_closed": sum(registry.cut for registry in registries),
        "messages_dropped": sum(registry.dropped for registry in registries),
        "process_count": len(processes),
        "processes": [_about_process(process, process in ready) for process in busiest],
        "channels": [_about_channel(channel) for channel in sorted(pubsub.which_channels())],
        "cluster": pubsub.adapter.info(),
    }


def _about_process(process: Process, is_ready: bool) -> dict[str, Any]:
    states: dict[Any, str] = {enqueue: "idle", _apply_overflow: "slow", None: "ready" if is_ready else "running"}
    return {
        "pid": repr(process),
        "name": process.name,
        "handler": process.role(),
        "peer": "{}:{}".format(*process.req["peer"]) if isinstance(process, Connection) else None,
        "mailbox": len(process.mailbox),
        "handled": process.handled,
        "age_seconds": round(monotonic() - process.started_at, 1),
        "channels": sorted(islice(process.channels, 5)),
        "state": states.get(process.wake, "waiting"),
    }


def _about_channel(channel: str) -> dict[str, Any]:
    local, remote = len(pubsub.channels.get(channel, ())), pubsub.adapter.count_members(channel)
    messages = pubsub.message_counts.get(channel, 0)
    return {"channel": channel, "members": local + remote, "local_members": local, "messages": messages}


def _memory() -> int:
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # where there is no /proc

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class BoardHandler(WebSocketHandler):
    """The board's WebSocket. One process looks, for all boards that are open; there is none while none is."""

    def init(self, state: Any) -> Any:
        pubsub.join("nova_board")
        if whereis("nova_board") is None:
            register("nova_board", spawn(_publish_stats))
        return "ok", state

    def websocket_init(self, state: Any) -> Any:
        return "reply", ("text", json.dumps(stats())), state

    def websocket_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "nova_board", _sender, "stats", _figures):
                return "reply", ("text", info.once(lambda message: json.dumps(message[4]))), state
        return "ok", state


def _publish_stats() -> None:
    while pubsub.get_local_members("nova_board"):
        pubsub.local_broadcast("nova_board", "stats", stats())
        receive(BOARD_TIME)


def board(app: Nova, path: str = "/board", security: Any = False, logout: str = "") -> None:
    """Adds the board, a page and its WebSocket, to an application; `security` as for any group of routes.

    With the path of a `logout` (a POST), the page has a button for it.
    """
    page = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache"}
    text = BOARD.replace('action="" hidden', f'action="{bottle.html_escape(logout)}"') if logout else BOARD
    routes = [
        ("/", lambda _req: ("status", 200, page, text), {"methods": ["get"]}),
        ("/live", BoardHandler, {"protocol": "ws"}),
    ]
    app.add({"prefix": path, "security": security, "routes": routes})


rooms["board"] = SimpleNamespace(stats=stats, board=board)

BOARD = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Board</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --bg: #f6f5f2; --card: #fff; --ink: #1d1c1a; --dim: #6b6760; --line: #e3e0da;
    --accent: #b3263a; --good: #2c7a4b; --warn: #a35b00; --edge: #8f8a82 }
  @media (prefers-color-scheme: dark) { :root { --bg: #171614; --card: #211f1d; --ink: #eeebe6; --dim: #a29c92;
    --line: #37332f; --accent: #f0788a; --good: #6cc592; --warn: #e8a64c; --edge: #7a746b } }
  * { box-sizing: border-box } h1, h2, p, dd, dl { margin: 0 } a { color: inherit } .up { color: var(--good) }
  body { margin: 0 auto; max-width: 84rem; padding: 1.25rem 1rem; background: var(--bg); color: var(--ink);
    font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums }
  header, .bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center } h2 { font-size: 1.05rem }
  h1 { font-size: 1.35rem; overflow-wrap: anywhere } #about, .bar .note { margin-right: auto }
  #state { font-size: .875rem; padding: .15rem .7rem; border: 1px solid; border-radius: 1rem } .old main { opacity: .6 }
  section { padding-bottom: .25rem }
  main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; margin-top: 1rem }
  .right { text-align: right }
  section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; min-width: 0 }
  dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem }
  .tile { display: flex; flex-direction: column } .tile, .bar, .empty { padding: .75rem 1rem }
  .figure { font-size: 1.5rem; font-weight: 600; line-height: 1.3 } .empty:empty, #nodes input { display: none }
  #about, dt, .note, .empty { color: var(--dim) } .down, .hot .figure, .slow .state { color: var(--warn) }
  svg { display: block; width: 100%; height: 1.1rem } .tile svg { height: 2.25rem }
  polyline { fill: none; stroke: var(--accent); stroke-width: 1.5px; vector-effect: non-scaling-stroke }
  input, button { font: inherit; color: inherit; background: var(--bg); border: 1px solid var(--edge);
    padding: .3rem .6rem; border-radius: .4rem } button { cursor: pointer } button:hover { border-color: var(--ink) }
  input { width: 14rem } [aria-pressed=true] { background: var(--accent); color: var(--card) }
  dt, .note { font-size: .85rem }
  .scroll { max-height: 34rem; overflow: auto; overflow-anchor: none; contain: content; border-radius: 0 0 .7rem .7rem }
  tbody tr:last-child > * { border-bottom: 0 } table { border-spacing: 0; width: 100%; font-size: .875rem }
  .chart { width: 30%; min-width: 6rem } .tile dd:last-child { margin-top: auto }
  th, td { text-align: left; font-weight: inherit; padding: .3rem .75rem; border-bottom: 1px solid var(--line);
    white-space: nowrap; max-width: 18rem; overflow: hidden; text-overflow: ellipsis }
  tr > :first-child { position: sticky; left: 0; padding-left: 1rem; background: var(--card) }
  thead th { position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--dim) }
  thead th:first-child { z-index: 2 } th[aria-sort] { color: var(--ink); font-weight: 600 }
  th button { border: 0; background: none; padding: .2rem 0 } .right button { margin-right: -.8em }
  th button::after { content: "▼"; font-size: .6em; display: inline-block; width: 1.33em; text-align: right;
    opacity: 0 } [aria-sort] button::after { opacity: 1 } [aria-sort=ascending] button::after { content: "▲" }
  tr > .right { padding-right: 1rem } :focus-visible { outline: 2px solid var(--accent); outline-offset: -1px }
  @media (min-width: 64rem) { main { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) }
    dl, #processes, [hidden] + #channels { grid-column: 1 / -1 } section:not(#processes) .scroll { max-height: 18rem } }
  @media (max-width: 40rem) { body { padding: .75rem .5rem } dl { grid-template-columns: 1fr 1fr }
    main, dl { gap: .5rem } .tile { padding: .6rem .75rem } input { width: 100%; font-size: 16px } #about { order: 1;
    width: 100% } h1 { margin-right: auto } .scroll { max-height: 70vh } tr > :first-child { max-width: 8rem } }
</style>
<header><h1 id="node">Board</h1><p id="about">nova_lite</p>
  <span id="state" class="down" role="status">connecting</span><a id="login" href="" hidden>Log in again</a>
  <button id="pause" aria-pressed="false">Pause</button>
  <form method="post" action="" hidden><button>Log out</button></form></header>
<main id="main"><dl id="tiles"></dl></main>
<template id="chart"><svg viewBox="0 -1 60 22" preserveAspectRatio="none" aria-hidden="true"><polyline/></svg>
</template>
<template id="table"><section>
  <div class="bar"><h2></h2><span class="note"></span><input type="search" placeholder="Filter"></div>
  <div class="scroll" tabindex="0" role="region">
    <table><thead><tr></tr></thead><tbody></tbody></table><p class="empty"></p></div></section></template>
<script>
"use strict";
const $ = id => document.getElementById(id), made = id => $(id).content.firstElementChild.cloneNode(true);
const english = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const number = value => english.format(value < 10 ? value : Math.round(value));
const size = bytes => bytes < 1e9 ? `${number(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
const age = time => [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].filter(([length]) => time >= length).map(
  ([length, unit]) => `${Math.floor(time / length)} ${unit}`)[0] || "0 s";
const byText = new Intl.Collator("en", { numeric: true }).compare, SPAN = 60, MOST = 500;  // seconds, rows
const series = new Map();  // the points of the charts, [uptime, value], by the property or by "#" and the channel
let now = null, frame = 0, paused = false, tries = 0, timer = 0;
function element(tag, properties, ...children) {  // what the server tells is only ever text
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function write(node, text, property = "textContent") {  // what has not changed costs nothing
  if (node["last " + property] !== text) node[property] = node["last " + property] = text;
}
function record(name, value) {
  const points = (series.get(name) || []).filter(([at]) => at >= now.uptime_seconds - SPAN);
  series.set(name, [...points, [now.uptime_seconds, value]]);
}
function plot(svg, name, least) {  // the newest at the right, the highest (or `least`) at the top; answers the highest
  const points = series.get(name), highest = Math.max(...points.map(point => point[1])), top = Math.max(least, highest);
  const place = ([at, value]) => `${(SPAN + at - now.uptime_seconds).toFixed(1)},${(20 - 20 * value / top).toFixed(1)}`;
  const line = points.map(place).join(" ");
  if (svg.line !== line) svg.firstElementChild.setAttribute("points", svg.line = line);
  return highest;
}
const tiles = [  // title, what the chart shows, figure, note, the least at the top of the chart, whether it is an alarm
  ["CPU of one core", "cpu", () => `${number(now.cpu)} %`, peak => `peak ${number(peak)} %`, 10],
  ["Memory", "memory_bytes", () => size(now.memory_bytes), peak => `peak ${size(peak)}`, 1],
  ["Connections", "connections", () => number(now.connections), () => `of ${number(now.max_connections)}`, 10],
  ["Messages/s", "rate", () => number(now.rate), peak => `peak ${number(peak)}`, 10],
  ["Slow clients", "closing", () => number(now.slow_closed), () => `closed, ${number(now.slow)} slow now`, 1, true],
  ["Messages dropped", "dropping", () => number(now.messages_dropped), () => "for slow clients", 1, true],
].map(([title, name, figure, note, least, alarm]) => {
  const nodes = ["figure", "note"].map(className => element("dd", { className })), chart = made("chart");
  const box = element("div", {}, element("dt", { textContent: title }), ...nodes, element("dd", {}, chart));
  $("tiles").append(box);
  return { name, draw() {
    const peak = plot(chart, name, least);
    write(nodes[0], figure());
    write(nodes[1], note(peak));
    write(box, alarm && peak > 0 ? "tile hot" : "tile", "className");
  } };
});
function table(name, key, by, columns) {  // columns: title, property (none: a chart), format (of a number)
  const section = made("table"), find = selector => section.querySelector(selector), filter = find("input");
  const look = ([, property, format]) => format ? "right" : property || "chart", body = find("tbody"), rows = new Map();
  const heads = columns.map((column, index) => element("th", { scope: "col", className: look(column) },
    column[1] ? element("button", { textContent: column[0], onclick: () => sort(index) }) : column[0]));
  Object.assign(filter, { ariaLabel: "Filter " + name, oninput: redraw });
  find(".scroll").ariaLabel = find("h2").textContent = name[0].toUpperCase() + name.slice(1);
  find("tr").append(...heads);
  section.id = name;
  $("main").append(section);
  let sign = 0;
  function sort(to) {
    sign = to === by && sign ? -sign : columns[to][2] ? -1 : 1;
    heads[by].ariaSort = null;
    heads[by = to].ariaSort = sign < 0 ? "descending" : "ascending";
    redraw();
  }
  sort(by);
  function compare(one, two) {
    const [, property, isNumber] = columns[by], a = one[property], b = two[property];
    return sign * (isNumber ? a - b : byText(a, b)) || byText(one[key], two[key]);
  }
  const newRow = () => element("tr", {}, ...columns.map((column, index) =>
    element(index ? "td" : "th", { className: look(column) }, ...(column[1] ? [] : [made("chart")]))));
  return (items, total) => {  // rows are changed and moved, not made again: focus, selection and scrolling stay
    const words = filter.value.toLowerCase().split(" "), texts = columns.filter(column => column[1] && !column[2]);
    const text = item => [item[key], ...texts.map(column => item[column[1]])].join(" ").toLowerCase();
    const has = item => { const all = text(item); return words.every(word => all.includes(word)); };
    const wanted = filter.value ? items.filter(has) : [...items];
    const shown = wanted.sort(compare).slice(0, MOST), ids = new Set(shown.map(item => item[key]));
    for (const [id, row] of rows) if (!ids.has(id) && rows.delete(id)) row.remove();
    let place = body.firstChild;
    for (const item of shown) {
      const row = rows.get(item[key]) || newRow();
      rows.set(item[key], row);
      columns.forEach(([, name, format = text => text], index) => name
        ? write(row.children[index], format(item[name])) : plot(row.children[index].firstChild, "#" + item[key], 1));
      write(row, item.state || "", "className");
      const stays = row.value === (row.value = item[columns[by][1]]);  // those that do have kept their order
      for (let other = place; stays && other && other !== row; other = place) {
        place = other.nextSibling;
        other.remove();
      }
      if (place === row) place = row.nextSibling; else body.insertBefore(row, place);
    }
    write(find(".note"), number(shown.length) + (shown.length < total ? ` of ${number(total)}` : ""));
    write(find(".empty"), shown.length ? "" : filter.value ? "Nothing matches the filter." : "There are none.");
  };
}
const drawNodes = table("nodes", "id", 0, [["Node", "name"], ["Id", "id"], ["Members", "members", number],
  ["Silent", "silent_seconds", seconds => `${seconds.toFixed(1)} s`]]);
const drawChannels = table("channels", "channel", 3, [["Channel", "channel"], ["Last minute"],
  ["Messages/s", "rate", number], ["Members", "members", number], ["Here", "local_members", number]]);
const drawProcesses = table("processes", "pid", 2, [["Process", "title"], ["State", "state"],
  ["Mailbox", "mailbox", number], ["Handled/s", "rate", number], ["Handled", "handled", number],
  ["Age", "age_seconds", age], ["Handler", "handler"], ["Channels", "channels"], ["Peer", "peer"]]);
function redraw() { frame = frame || requestAnimationFrame(draw); }  // not while nobody sees it
function draw() {
  frame = 0;
  if (!now) return;
  const { node, version, cluster } = now, lost = cluster && cluster.dropped ? `, ${number(cluster.dropped)} lost` : "";
  const state = cluster ? `cluster ${cluster.up ? "up" : "cut off"}${lost}` : "no cluster";
  write($("node"), node);
  write($("about"), `nova_lite ${version}, up ${age(now.uptime_seconds)}, ${state}`);
  for (const tile of tiles) tile.draw();
  $("nodes").hidden = !cluster;
  const members = now.channels.reduce((sum, item) => sum + item.local_members, 0);
  drawNodes(cluster ? [{ id: "this one", name: node, members, silent_seconds: 0 }, ...cluster.nodes] : [], 0);
  drawChannels(now.channels, now.channels.length);
  drawProcesses(now.processes, now.process_count);
}
function take(data) {  // what is a rate is the difference from the last time
  const same = now && now.node === data.node && now.uptime_seconds <= data.uptime_seconds, was = same ? now : data;
  const time = data.uptime_seconds - was.uptime_seconds, rate = (value, old) => time && Math.max(0, value - old) / time;
  if (same && time < 0.5) return;  // too short for a rate
  for (const [kind, key, total] of [["channels", "channel", "messages"], ["processes", "pid", "handled"]]) {
    const old = new Map(was[kind].map(item => [item[key], item[total]]));
    for (const item of data[kind]) item.rate = old.has(item[key]) ? rate(item[total], old.get(item[key])) : 0;
  }
  for (const item of data.processes) {  // a pid of this node is short, as in Erlang
    item.title = `${item.name || ""} ${item.pid.replace(`<${data.node}.`, "<0.")}`.trim();
    Object.assign(item, { handler: item.handler || "", peer: item.peer || "", channels: item.channels.join(", ") });
  }
  now = Object.assign(data, { cpu: 100 * rate(data.cpu_seconds, was.cpu_seconds),
    rate: data.channels.reduce((sum, item) => sum + item.rate, 0), closing: rate(data.slow_closed, was.slow_closed),
    dropping: rate(data.messages_dropped, was.messages_dropped),
    slow: data.processes.filter(item => item.state === "slow").length });
  if (!same) series.clear();  // another node, or the same one started again
  for (const tile of tiles) record(tile.name, now[tile.name]);
  for (const item of now.channels) record("#" + item.channel, item.rate);
  for (const [name, points] of series) if (points.at(-1)[0] !== now.uptime_seconds) series.delete(name);
  redraw();
}
function say(text, good, wait, fn) {  // and what to do if nothing happens for so many seconds
  write($("state"), text);
  $("state").className = good ? "up" : "down";
  clearTimeout(timer);
  timer = setTimeout(fn, wait * 1000);
}
function connect() {
  const base = location.origin.replace(/^http/, "ws") + location.pathname.replace(/[/]+$/, "");
  const socket = new WebSocket(base + "/live");
  function lost() {  // 0.5 s, doubled up to 15 s, with jitter
    const delay = Math.min(15, 0.5 * 2 ** tries++) * (0.5 + Math.random() / 2);
    socket.onclose = socket.onmessage = null;
    socket.close();
    document.body.className = "old";
    say(`reconnecting in ${Math.ceil(delay)} s`, false, delay, connect);
    const show = answer => { $("login").hidden = answer.type !== "opaqueredirect" && answer.status !== 401; };
    fetch(location.pathname, { method: "HEAD", redirect: "manual" }).then(show, () => {});
  }
  socket.onclose = lost;
  socket.onmessage = event => {
    if (!paused) take(JSON.parse(event.data));
    say(paused ? "paused" : now.draining ? "draining" : "live", !paused && !now.draining, 10, lost);
    document.body.className = "";
    $("login").hidden = true;
    tries = 0;
  };
  say($("state").textContent, false, 10, lost);
}
connect();
$("pause").onclick = event => event.target.ariaPressed = paused = !paused;
</script>
</html>
"""


# ----- delete from here when vendoring -------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# Demo: Nova's tutorial, working: echo, live comments, notes with notifications, and their indexer.
# Invariant: it uses the public API only, as your program would.
# ---------------------------------------------------------------------------------------------------------------------

import argparse
import ast
import hashlib
import hmac
import secrets
import sqlite3
from contextlib import closing
from itertools import pairwise, takewhile

from gevent.threadpool import ThreadPool


class Notes:
    """Stores notes in a SQLite file, with a transaction for each change. Queries run in a thread, not in the hub."""

    FIELDS = ("id", "title", "body", "author")
    ID = "INTEGER PRIMARY KEY AUTOINCREMENT"  # an id is never used again

    def __init__(self, path: str) -> None:
        self.path = path
        self.thread = ThreadPool(1)  # one: SQLite has one writer, and commits keep their order
        self.db: Any = None
        columns = f"id {self.ID}, title TEXT NOT NULL, body TEXT NOT NULL, author TEXT NOT NULL"
        self._query(f"CREATE TABLE IF NOT EXISTS notes ({columns})")

    def open(self) -> Any:
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # a 201 survives a crash of the machine
        return db

    def execute(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        """Returns the rows of a query. Runs in the thread."""
        if self.db is None:
            self.db = self.open()
        return self.db.execute(sql, values).fetchall()

    def _query(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        rows, error = self.thread.apply(self._guarded_execute, (sql, values))
        if error is not None:
            raise error
        return [dict(zip(self.FIELDS, row, strict=True)) for row in rows]

    def _guarded_execute(self, sql: str, values: tuple[Any, ...]) -> tuple[list[Any], Exception | None]:
        try:
            return self.execute(sql, values), None
        except Exception as error:  # returned, since gevent prints what a thread raises, even if the caller catches it
            return [], error

    def close(self) -> None:
        if self.db is not None:
            self.thread.apply(self.db.close)
        self.thread.kill()

    def all(self) -> list[dict[str, Any]]:
        return self._query("SELECT id, title, body, author FROM notes ORDER BY id")

    def get(self, note_id: int) -> dict[str, Any] | None:
        return next(iter(self._query("SELECT id, title, body, author FROM notes WHERE id = ?", note_id)), None)

    def create(self, title: str, body: str, author: str) -> dict[str, Any]:
        sql = "INSERT INTO notes (title, body, author) VALUES (?, ?, ?) RETURNING id, title, body, author"
        return self._query(sql, title, body, author)[0]

    def update(self, note_id: int, title: str, body: str) -> dict[str, Any] | None:
        sql = "UPDATE notes SET title = ?, body = ? WHERE id = ? RETURNING id, title, body, author"
        return next(iter(self._query(sql, title, body, note_id)), None)

    def delete(self, note_id: int) -> bool:
        return bool(self._query("DELETE FROM notes WHERE id = ? RETURNING id, title, body, author", note_id))


class PostgresNotes(Notes):
    """Stores notes in PostgreSQL, for nodes on several machines. After an error the next query connects again."""

    ID = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"

    def open(self) -> Any:
        import psycopg  # installed only where it is used

        return psycopg.connect(self.path, autocommit=True, connect_timeout=5)

    def execute(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        if self.db is None or self.db.closed:
            self.db = self.open()
        cursor = self.db.execute(sql.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []


def open_notes(db: str) -> Notes:
    """Opens the notes in a SQLite file or at a PostgreSQL URL. Raises ImportError without the package psycopg."""
    if not db.startswith(("postgresql://", "postgres://")):
        return Notes(db)
    try:
        return PostgresNotes(db)
    except ImportError:
        raise ImportError("PostgreSQL needs one more package: pip install 'psycopg[binary]'") from None


class NotesController:
    """Serves the REST API. Broadcasts each change after its commit."""

    NOT_FOUND: Any = ("json", 404, {}, {"error": "note not found"})

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def index(self, _req: Request) -> Any:
        return "json", {"notes": self.notes.all()}

    def create(self, req: Request) -> Any:
        match req["params"]:
            case {"title": str(title), "body": str(body), "author": str(author)} if is_text(title, body, author):
                note = self.notes.create(title, body, author)
                pubsub.broadcast("notes", "note_created", note)
                return "json", 201, {}, note
        return unprocessable(req, "title", "body", "author")

    def show(self, req: Request) -> Any:
        note = self.notes.get(id_in_path(req))
        return ("json", note) if note else self.NOT_FOUND

    def update(self, req: Request) -> Any:
        match req["params"]:
            case {"title": str(title), "body": str(body)} if is_text(title, body):
                note = self.notes.update(id_in_path(req), title, body)
                if note is None:
                    return self.NOT_FOUND
                pubsub.broadcast("notes", "note_updated", note)
                return "json", note
        return unprocessable(req, "title", "body")

    def delete(self, req: Request) -> Any:
        note_id = id_in_path(req)
        if not self.notes.delete(note_id):
            return self.NOT_FOUND
        pubsub.broadcast("notes", "note_deleted", {"id": note_id})
        return "status", 204

    def search(self, req: Request) -> Any:
        try:
            found = call("note_indexer", ("search", req["qs"].get("q", "")))
        except CallError:
            return "json", 503, {"Retry-After": "1"}, {"error": "the index is not available"}
        return "json", {"notes": [note for note_id in found if (note := self.notes.get(note_id))]}


def is_text(*fields: str) -> bool:
    return all(field and "\0" not in field for field in fields)  # PostgreSQL stores no NUL


def unprocessable(req: Request, *names: str) -> Any:
    """Returns a 422 that names the missing fields."""
    given = {name: req["params"].get(name) for name in names}
    fields = {name: "is required" for name in names if not isinstance(given[name], str) or not is_text(given[name])}
    return "json", 422, {}, {"error": f"{', '.join(names[:-1])} and {names[-1]} are required", "fields": fields}


def id_in_path(req: Request) -> int:
    """Returns the id in the path; 0, which no note has, if it is not a number that SQLite can store."""
    text = req["bindings"]["id"]
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


class EchoHandler(WebSocketHandler):
    def websocket_handle(self, frame: Any, state: Any) -> Any:
        match frame:
            case ("text", text):
                return "reply", ("text", "Echo: " + text), state
        return "ok", state


class CommentsHandler(WebSocketHandler):
    def init(self, state: Any) -> Any:
        pubsub.join("comments")
        return "ok", state

    def websocket_handle(self, frame: Any, state: Any) -> Any:
        match frame:
            case ("text", text):
                pubsub.broadcast("comments", "new_comment", text)
            case ("binary", b""):  # the heartbeat of NovaSocket
                return "reply", frame, state
        return "ok", state

    def websocket_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "comments", _sender, "new_comment", text) if isinstance(text, str):
                return "reply", ("text", text), state
        return "ok", state


class NotificationsHandler(WebSocketHandler):
    """Sends each change of a note. With `?since=`, empty at first, adds positions and first sends what was missed."""

    def init(self, state: Any) -> Any:
        since = state["req"]["since"]
        self.as_text = as_json if since is None else as_json_with_position
        pubsub.join("notes", since=since or None)
        return "ok", state

    def websocket_handle(self, frame: Any, state: Any) -> Any:
        match frame:
            case ("text", "ping"):
                return "reply", ("text", "pong"), state
            case ("binary", b""):
                return "reply", frame, state
        return "ok", state

    def websocket_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "notes", _sender, _topic, _payload):
                return "reply", ("text", info.once(self.as_text)), state
            case ("nova_resync", "notes"):  # messages may be missing: the page loads all notes again
                return "reply", ("text", '{"event": "nova_resync", "data": null}'), state
        return "ok", state


class PresenceHandler(WebSocketHandler):
    """Sends the number of members of the channel `comments`, whenever it changes."""

    def init(self, state: Any) -> Any:
        pubsub.join("presence")
        return "ok", state

    def websocket_handle(self, frame: Any, state: Any) -> Any:
        return ("reply", frame, state) if frame == ("binary", b"") else ("ok", state)

    def websocket_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "presence", _sender, _topic, _payload):
                return "reply", ("text", info.once(as_json)), state
        return "ok", state


class Presence(GenServer):
    """Counts these members. Its state is True while a count is due: many changes make one message to each client."""

    PAUSE = 0.25  # seconds between the first change and the count

    def init(self, _args: Any) -> Any:
        for channel in ("comments", "presence"):  # a new PresenceHandler waits for a count
            pubsub.monitor(channel)
        return "ok", False

    def handle_info(self, info: Any, due: Any) -> Any:
        match info:
            case "count":
                count = len(pubsub.get_members("comments"))  # of all nodes; each node informs its own clients
                pubsub.local_broadcast("presence", "presence", {"count": count})
                return "noreply", False
            case (_ref, "join" | "leave", _channel, _pids) if not due:
                send_after(self.PAUSE, self_pid(), "count")
                return "noreply", True
        return "noreply", due


def as_json(message: Message) -> str:
    return json.dumps({"event": message[3], "data": message[4]})


def as_json_with_position(message: Message) -> str:
    return json.dumps({"event": message[3], "data": message[4], "position": message.position})


class NoteIndexer(GenServer):
    """Finds notes by their words. Its state is {id: words}, kept up to date by what the controllers broadcast."""

    def init(self, notes: Notes) -> Any:
        self.notes = notes
        pubsub.join("notes")  # before reading: a change that comes meanwhile is then a message
        return "ok", self.index()

    def index(self) -> dict[int, set[str]]:
        return {note["id"]: tokenize(note) for note in self.notes.all()}

    def handle_call(self, request: Any, from_: Any, state: Any) -> Any:
        match request:
            case ("search", str(text)):
                words = tokenize({"title": text, "body": ""})
                found = [key for key, known in state.items() if words and matches_prefix(known, words)]
                return "reply", sorted(found), state
        return "reply", ("error", "unknown_request"), state

    def handle_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "notes", _, "note_created" | "note_updated", {"id": int(key), "title": _, "body": _}):
                log.info("indexing note %s: %r", key, info[4]["title"])
                state[key] = tokenize(info[4])
            case ("nova_pubsub", "notes", _, "note_deleted", {"id": int(key)}):
                log.info("removing note %s from the index", key)
                state.pop(key, None)
            case ("nova_resync", "notes"):
                state = self.index()
        return "noreply", state


def matches_prefix(known: set[str], words: set[str]) -> bool:
    """Returns whether each of `words` is the beginning of a known word: the user may still be typing."""
    return all(any(other.startswith(word) for other in known) for word in words)


def tokenize(note: Mapping[str, Any]) -> set[str]:
    return set(re.findall(r"\w+", f"{note['title']} {note['body']}".lower()))


def start_indexer(notes: Notes) -> Any:
    """Starts the indexer and the presence, under a supervisor that restarts them."""
    return start_supervisor([
        {"id": "note_indexer", "start": (start_link, NoteIndexer, notes, "note_indexer")},
        {"id": "presence", "start": (start_link, Presence, None, "presence")},
    ])  # fmt: skip


class Login:
    """Protects pages by one password: `routes` is the group with /login and /logout, `security` is for other groups.

    No session is stored. The cookie holds its expiry time and a signature, whose key is derived from the password: all
    workers accept it, it survives a restart, and a new password ends every login.
    """

    LIFE = 12 * 3600  # seconds until a login expires
    TRIES, TRIES_OF_ALL = 5, 30  # wrong passwords a minute, from one address and from all

    def __init__(self, password: str, home: str = "/board") -> None:
        self.home = home
        # Slow by intention: with a stolen cookie, passwords must not be guessed by the million.
        self.key = hashlib.scrypt(password.encode(), salt=b"nova_lite login", n=2**14, r=8, p=1)
        self.proof = self.sign("password", password)
        self.wrong: deque[tuple[float, str]] = deque()  # time, address; at most TRIES_OF_ALL
        post = {"methods": ["post"], "max_body": 4096}
        show = ("/login", self.show, {"methods": ["get"]})
        self.routes = {"routes": [show, ("/login", self.log_in, post), ("/logout", self.log_out, post)]}

    def sign(self, kind: str, text: str) -> str:
        return hmac.new(self.key, f"{kind}:{text}".encode(), "sha256").hexdigest()

    def is_logged_in(self, req: Request) -> bool:
        session, _, signature = req["cookies"].get("nova_login", "").rpartition(".")
        is_ours = hmac.compare_digest(signature.encode(), self.sign("session", session).encode())
        return is_ours and int(session.partition(".")[0]) > time.time()

    def security(self, req: Request) -> Any:
        if self.is_logged_in(req):
            return True
        is_live = "Upgrade" in req["headers"] or "event-stream" in req["headers"].get("Accept", "")
        return False if is_live else ("redirect", "/login")

    def show(self, req: Request) -> Any:
        return ("redirect", self.home) if self.is_logged_in(req) else self.page(200)

    def log_in(self, req: Request) -> Any:
        password, address = req["params"].get("password"), req["peer"][0]
        if not req.is_own_origin():
            return self.page(403, "This form was sent from another site.")
        wait = self.wait(address)  # no other greenlet may run between here and the count
        if wait > 0:
            return self.page(429, f"Too many wrong passwords. Wait {wait} seconds.", {"Retry-After": str(wait)})
        given = password if isinstance(password, str) else ""
        if not hmac.compare_digest(self.sign("password", given), self.proof):
            self.wrong.append((monotonic(), address))
            log.warning("wrong password at /login from %s", address)
            return self.page(401, "That is not the password.")
        session = f"{int(time.time()) + self.LIFE}.{secrets.token_urlsafe(16)}"
        return self.redirect(req, self.home, f"{session}.{self.sign('session', session)}", self.LIFE)

    def log_out(self, req: Request) -> Any:
        return self.redirect(req, "/login", "", 0) if req.is_own_origin() else ("status", 403)

    def wait(self, address: str) -> int:
        """Returns the seconds until this address may try again."""
        now = monotonic()
        while self.wrong and self.wrong[0][0] <= now - 60:
            self.wrong.popleft()
        of_all, own = [at for at, _ in self.wrong], [at for at, other in self.wrong if other == address]
        ends = [*own[-self.TRIES :][: len(own) >= self.TRIES], *of_all[: len(of_all) >= self.TRIES_OF_ALL]]
        return int(max(ends) + 60 - now) + 1 if ends else 0

    def redirect(self, req: Request, path: str, cookie: str, seconds: int) -> Any:
        # Behind a proxy the request may be plain HTTP; the form's Origin has the scheme that the browser uses.
        https = req.environ["wsgi.url_scheme"] == "https" or req["headers"].get("Origin", "").startswith("https:")
        options = f"Max-Age={seconds}; Path=/; HttpOnly; SameSite=Strict{'; Secure' if https else ''}"
        return "status", 303, {"Location": path, "Set-Cookie": f"nova_login={cookie}; {options}"}

    def page(self, status: int, error: str = "", headers: Mapping[str, str] | None = None) -> Any:
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
        own = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
        page = LOGIN_PAGE.replace("ERROR", error).replace("INVALID", str(bool(error)).lower())
        return "status", status, {**own, "Content-Security-Policy": policy, **(headers or {})}, page


def choose_password() -> str:
    """Returns NOVA_PASSWORD. If it is not set, logs a random one and sets it, for workers and reloads."""
    if not os.environ.get("NOVA_PASSWORD"):
        os.environ["NOVA_PASSWORD"] = secrets.token_urlsafe(12)
        log.warning("the password of /board is %s (NOVA_PASSWORD sets another)", os.environ["NOVA_PASSWORD"])
    return os.environ["NOVA_PASSWORD"]


LOGIN_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Log in - nova_lite</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --bg: #f6f5f2; --card: #fff; --ink: #1d1c1a; --line: #8f8a82; --accent: #b3263a }
  @media (prefers-color-scheme: dark) { :root { --bg: #171614; --card: #211f1d; --ink: #eeebe6; --line: #7a746b;
    --accent: #f0788a } } * { box-sizing: border-box }
  body { margin: 0; padding: 15vh 1rem 2rem; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui }
  form { display: grid; gap: .5rem; max-width: 22rem; margin: auto; padding: 1.5rem; background: var(--card);
    border-radius: .75rem } h1 { font-size: 1.35rem; margin: 0 0 .5rem } p { color: var(--accent); margin: 0 }
  input, button { font: inherit; color: inherit; background: var(--bg); border: 1px solid var(--line); width: 100%;
    border-radius: .4rem; padding: .5rem .6rem } [aria-invalid=true] { border-color: var(--accent) }
  button { cursor: pointer; background: var(--accent); color: var(--card); border: 0; font-weight: 600 }
  p:empty { display: none } :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
</style>
<form method="post" action="/login"><h1>nova_lite</h1><label for="password">Password</label>
  <input name="username" value="board" autocomplete="username" hidden>
  <input type="password" id="password" name="password" autocomplete="current-password" required autofocus
    aria-invalid="INVALID" aria-describedby="error">
  <p id="error" role="alert">ERROR</p><button>Log in</button></form>
</html>
"""


def demo(notes: Notes, password: str | None = None) -> Nova:
    """Returns the tutorial's application; with a password, the board too."""
    pubsub.keep("notes")
    api = NotesController(notes)
    page = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache"}
    script = {"Content-Type": "text/javascript; charset=utf-8", "Cache-Control": "no-cache"}
    app = Nova([
        {"routes": [
            ("/", lambda _req: ("status", 200, page, PAGE), {"methods": ["get"]}),
            ("/nova.js", lambda _req: ("status", 200, script, CLIENT), {"methods": ["get"]}),
            ("/heartbeat", heartbeat, {"methods": ["get"]}),
            ("/ws", EchoHandler, {"protocol": "ws"}),
            ("/comments", CommentsHandler, {"protocol": "ws"}),
            ("/notifications", NotificationsHandler, {"protocol": "ws"}),
            ("/presence", PresenceHandler, {"protocol": "ws"}),
        ]},
        {"prefix": "/api/notes", "routes": [
            ("/", api.index, {"methods": ["get"]}),
            ("/", api.create, {"methods": ["post"]}),
            ("/search", api.search, {"methods": ["get"]}),
            ("/:id", api.show, {"methods": ["get"]}),
            ("/:id", api.update, {"methods": ["put"]}),
            ("/:id", api.delete, {"methods": ["delete"]}),
        ]},
    ])  # fmt: skip
    if password:
        login = Login(password)
        app.add(login.routes)
        app.board(login.home, security=login.security, logout="/logout")
    return app


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nova_lite</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'><path
  fill='%23cf8a12' d='M12 0q1 11 12 12-11 1-12 12-1-11-12-12 11-1 12-12z'/></svg>">
<style>
  :root { color-scheme: light dark; --paper: #f4f3ee; --card: #fffefa; --ink: #1a2426; --dim: #566266; --line: #dedcd2;
          --edge: #848d8e; --accent: #0c6470; --on: #fff; --tint: #e0efee; --star: #cf8a12; --flare: #ffebb0;
          --bad: #b02318; --warn: #84500a; --good: #2d7d4f }
  @media (prefers-color-scheme: dark) { :root { --paper: #0f1518; --card: #171f23; --ink: #e7ece8; --dim: #9aa8aa;
          --line: #2b373c; --edge: #6b7b80; --accent: #6ccbd0; --on: #08262a; --tint: #17383c; --star: #f2b84b;
          --flare: #3c3112; --bad: #ff9d90; --warn: #f0ba62; --good: #6cc592 } }
  * { box-sizing: border-box } [hidden] { display: none !important }
  body { margin: 0 auto; max-width: 76rem; min-height: 100dvh; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
         background: var(--paper); color: var(--ink); overflow-wrap: anywhere }
  body, section, form, #comments { display: flex; flex-direction: column; gap: .75rem }
  header, .row, #line { display: flex; flex-flow: row wrap; gap: .25rem .75rem; align-items: center }
  h1, h2, h3, p, ul { margin: 0; padding: 0 } h3 { font-size: 1rem; line-height: 1.35 }
  h1, h2 { font: 600 1.25rem/1 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; letter-spacing: -.04em }
  h2 { font-size: 1.0625rem } h1 svg { width: 1.1em; fill: var(--star); vertical-align: -.2em; margin-right: .35em }
  header { min-height: 2.25rem } header p { order: 1 } .dim, time, small, #line { color: var(--dim) }
  #line { margin-left: auto; gap: .3rem; padding: 0 .6rem; border: 1px solid transparent; border-radius: 2rem }
  #line, small, label, .error, .plain, header p, .row p { font-size: .875rem } .dim:empty { display: none }
  #line::before, #dots i { content: ""; display: inline-block; width: 10px; height: 10px; border: 2px solid;
                           border-radius: 50%; color: var(--accent); margin-right: .25rem }
  #line::before { color: var(--good) } #line:not(.away)::before, #dots :first-child { background: currentColor }
  #line.away, .away::before { color: var(--warn) !important; border-color: currentColor }
  #wait { font-variant-numeric: tabular-nums } main { flex: 1; display: grid; gap: 1rem; min-height: 0 }
  section { min-width: 0; min-height: 0; overflow: auto; padding: 1rem 1rem 0; background: var(--card);
            border: 1px solid var(--line); border-radius: .75rem }
  section > .row { min-height: 2.5rem; justify-content: space-between }
  .list { flex: 1; list-style: none; overflow: auto; min-height: 6rem; margin: 0 -.5rem; padding: .25rem .5rem 1.5rem;
          scrollbar-width: thin; mask: linear-gradient(#000 calc(100% - 1.5rem), transparent) }
  #comments { align-items: flex-start; gap: .4rem; max-height: 40dvh }
  #comments p { max-width: 88%; padding: .35rem .8rem; border: 1px solid var(--line); border-radius: 0 1rem 1rem }
  #comments .mine { align-self: flex-end; background: var(--tint); border-radius: 1rem 0 1rem 1rem }
  time { margin-left: .6rem; font-size: .75rem; white-space: nowrap } .seen { position: absolute; opacity: 0 }
  li { padding: .75rem .2rem .75rem .5rem; margin: 0 -.5rem; border-top: 1px solid var(--line) }
  li .row { margin-top: .2rem }
  li p { white-space: pre-wrap; max-height: 18rem; overflow: auto } li small { flex: 1 }
  form.row { flex-wrap: nowrap } .row input { flex: 1 } #search { max-width: 15rem } label { font-weight: 600 }
  input, textarea, button, summary { font: inherit; color: inherit; border: 1px solid var(--edge); border-radius: .5rem;
         padding: .4rem .7rem; background: var(--card); min-height: 2.5rem } label > * { margin-block: .2rem }
  input, textarea { display: block; width: 100%; min-width: 0; font-size: 1rem; font-weight: 400; resize: vertical }
  ::placeholder { color: var(--dim); opacity: 1 } [aria-invalid=true] { border: 2px solid var(--bad) }
  button, summary { cursor: pointer } button:hover, summary:hover { background: var(--tint) }
  .main, .main:hover { background: var(--accent); border-color: var(--accent); color: var(--on); font-weight: 600 }
  a, .plain, summary { color: var(--accent) } .plain { min-height: 1.75rem; padding: 0 .3rem; border: 0;
         background: none; text-decoration: underline } .error { color: var(--bad) }
  details:not([open]) > summary::before { content: "+"; margin-right: .4em }
  summary { display: flex; align-items: center; justify-content: center; border-style: dashed; font-weight: 600 }
  [open] > summary { border-color: transparent; padding: .4rem 0; justify-content: start; background: none }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
  @media (min-width: 40rem) and (min-height: 30rem) { #comments { max-height: none } header p { order: 0 }
    body { height: 100dvh } main { grid-template: minmax(0, 1fr) / 1fr 1fr } }
  @media (max-width: 40rem) { header:has(.away) p { display: none } }
  @media (pointer: coarse) { main :is(input, textarea, button, summary) { min-height: 2.75rem } }
  @media (prefers-reduced-motion: no-preference) { .new { animation: arrive .3s ease-out, flare 2.5s ease-out }
    svg.new, #dots i { animation: star .8s ease-out } @keyframes arrive { from { opacity: 0; translate: 0 -.6rem } }
    @keyframes flare { from { background: var(--flare) } } @keyframes star { 30% { scale: 1.4; rotate: 45deg } } }
</style>
<header>
  <h1><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 0q1 11 12 12-11 1-12 12-1-11-12-12 11-1 12-12z"/></svg
    >nova_lite</h1>
  <p class="dim">Changes appear in every open window.</p>
  <div id="line" class="away"><span id="state" role="status">connecting</span><span id="wait" aria-hidden="true"></span
    ><button id="now" class="plain" aria-label="Reconnect now" hidden>now</button></div>
</header>
<main>
  <section aria-labelledby="comments-title">
    <div class="row"><h2 id="comments-title">Live comments</h2>
      <p id="here" hidden><span id="dots" aria-hidden="true"></span> <span id="count"></span>
        <a id="second" href="/" target="_blank">Open a second window</a></p></div>
    <form id="say" class="row">
      <input name="text" aria-label="Your comment" placeholder="Say something" autocomplete="off" maxlength="2000">
      <button class="main">Send</button></form>
    <p id="hush" class="dim" role="status">No comments yet. The first appears in every window.</p>
    <div id="comments" class="list" role="log" aria-live="polite" aria-labelledby="comments-title" tabindex="0"></div>
  </section>
  <section aria-labelledby="notes-title">
    <div class="row"><h2 id="notes-title">Notes</h2>
      <form id="search" role="search"><input type="search" aria-label="Search" placeholder="Search notes"></form></div>
    <details id="add"><summary>New note</summary><form id="form" autocomplete="off" novalidate>
      <div><label>Title <input name="title" aria-describedby="e1" required></label><p id="e1" class="error"></p></div>
      <div><label>Text <textarea name="body" aria-describedby="e2" rows="3" required></textarea></label>
        <p id="e2" class="error"></p></div>
      <div><label>Author <input name="author" aria-describedby="e3" required></label><p id="e3" class="error"></p></div>
      <p id="error" class="error" role="alert"></p>
      <div class="row"><button class="main">Save</button><button type="button" name="cancel">Cancel</button></div>
    </form></details>
    <p id="news" class="dim" role="status"></p>
    <p id="found" class="dim" role="status"></p>
    <ul id="notes" class="list" role="list" aria-labelledby="notes-title"></ul>
  </section>
</main>
<template id="card"><li><div><h3></h3><p></p><div class="row"><small></small><button class="plain">Edit</button>
  <button class="plain">Delete</button></div></div></li></template>
<script src="/nova.js"></script>
<script>
"use strict";
const $ = id => document.getElementById(id);

function element(tag, className, ...children) {  // children are text: user input cannot become markup
  const node = Object.assign(document.createElement(tag), { className });
  node.append(...children);
  return node;
}

let unseen = 0;
function arrived(node) {  // highlights the node and the star; counts in the title of a hidden page
  for (const it of [node, document.querySelector("svg")]) {
    it.classList.remove("new");
    void it.clientTop;  // restarts the animation
    it.classList.add("new");
  }
  if (document.hidden) document.title = `(${++unseen}) nova_lite`;
}
document.onvisibilitychange = () => { unseen = 0; document.title = "nova_lite"; };

// The connections, and the number of visitors.
const comments = new NovaSocket("/comments"), events = new NovaSocket("/notifications?since=");
const presence = new NovaSocket("/presence"), lines = [comments, events, presence];
let word = "connecting", ticking;
function report() {
  const away = lines.filter(line => line.state !== "open"), kept = comments.queue.length;
  const wait = Math.min(...away.filter(line => line.state !== "connecting").map(line => line.retryAt - Date.now()));
  if (!away.length) word = "connected";
  else if (word !== "connecting") word = navigator.onLine ? "reconnecting" : "offline";
  if ($("state").textContent !== word) $("state").textContent = word;  // a screen reader reads changes only
  $("wait").textContent = word !== "offline" && wait < Infinity ? `in ${Math.max(1, Math.ceil(wait / 1000))} s` : "";
  $("now").hidden = !away.length || (word === "connecting" && wait === Infinity);
  $("here").hidden = presence.state !== "open";
  $("line").className = away.length ? "away" : "";
  if (kept) $("hush").textContent = `${kept} comment${kept > 1 ? "s" : ""} will be sent when the line is back.`;
  else if (!away.length && $("comments").children.length) $("hush").textContent = "";
  clearTimeout(ticking);
  if (away.length) ticking = setTimeout(report, 250);
}
const now = $("now").onclick = () => lines.forEach(line => line.now());
for (const line of lines) line.on("state", report).on("open", now);  // when one connects, all try again

presence.on("presence", ({ count }) => {
  while ($("dots").children.length > count) $("dots").lastChild.remove();
  while ($("dots").children.length < Math.min(count, 12)) $("dots").append(element("i"));
  $("count").textContent = count > 1 ? `${count} are here` : "Only you are here.";
  $("second").hidden = count > 1;
});
$("second").onclick = event => {  // beside this window, if there is room
  const half = screen.availWidth >> 1, place = `popup,left=${half},top=0,width=${half},height=${screen.availHeight}`;
  if (half > 500 && window.open("/", "_blank", place)) event.preventDefault();
};

// Comments.
const mine = [];  // sent, and not received yet
comments.on("message", text => {
  const own = mine.indexOf(text), time = new Date().toLocaleTimeString([], { timeStyle: "short" });
  const comment = element("p", own < 0 ? "" : "mine", text, element("time", "", time));
  if (own >= 0) mine.splice(own, 1), comment.prepend(element("span", "seen", "You: "));
  $("comments").prepend(comment);
  if ($("comments").children.length > 200) $("comments").lastChild.remove();
  arrived(comment);
  report();
});
$("say").onsubmit = event => {
  event.preventDefault();
  const { text } = event.target.elements, said = text.value.trim();
  if (said && comments.send(said)) mine.push(said), text.value = "";
  report();
};

// Notes: the page changes when the event arrives, in this window as in all others.
const items = new Map(), query = $("search").elements[0];  // id -> its <li>
let loading = null, searching;

async function api(method, path, data) {  // returns [ok, body]
  const options = { method, headers: { "Content-Type": "application/json" }, cache: "no-store" };
  try {
    const answer = await fetch("/api/notes" + path, { ...options, body: data && JSON.stringify(data) });
    return [answer.ok, answer.status === 204 ? {} : await answer.json()];
  } catch { return [false, { error: "The server cannot be reached." }]; }
}

async function load() {  // all notes; changes that arrive meanwhile are applied again
  const changes = loading = [], first = !items.size, [ok, { notes }] = await api("GET", "");
  if (loading !== changes) return;  // a newer load has started
  loading = null;
  if (!ok) return void setTimeout(load, 2000);
  for (const id of items.keys()) if (!notes.some(note => note.id === id)) drop({ id });
  for (const note of notes) put(note, !first);
  for (const change of changes) change();
  search();
}
events.on("open", load).on("nova_resync", load);

for (const [change, word] of [[put, "created"], [put, "updated"], [drop, "deleted"]])
  events.on("note_" + word, note => {
    const title = note.title ?? items.get(note.id)?.note.title;
    loading?.push(() => change(note));
    change(note, true);
    if (title) say(`“${title}” was ${word}.`);
    search();
  });
const say = text => { $("news").textContent = text; };

function search() {  // shows what the indexer finds, or all
  const q = encodeURIComponent(query.value.trim());
  searching = clearTimeout(searching);
  if (!q) return show(null);
  const mine = searching = setTimeout(async () => {
    const [ok, { notes, error }] = await api("GET", `/search?q=${q}`);
    if (searching === mine) ok ? show(notes.map(note => note.id)) : say(error);
  }, 150);
}
query.oninput = () => { say(""); search(); };
$("search").onsubmit = event => event.preventDefault();

function show(ids) {
  for (const [id, item] of items) item.hidden = ids !== null && !ids.includes(id);
  const count = ids ? ids.length : items.size, all = count ? "" : "No notes yet. The first appears in every window.";
  $("found").textContent = ids ? `${count || "No"} note${count === 1 ? "" : "s"} found.` : all;
}

function put(note, glow) {
  const item = items.get(note.id) ?? card(note);
  if (JSON.stringify(item.note) === JSON.stringify(note)) return;
  item.note = note;
  for (const [tag, key] of [["h3", "title"], ["p", "body"], ["small", "author"]])
    item.querySelector(tag).textContent = note[key];
  for (const it of item.querySelectorAll("button")) it.setAttribute("aria-label", `${it.textContent} ${note.title}`);
  if (item === editing && !busy) $("error").textContent = "It has been changed elsewhere. Saving replaces that.";
  if (glow) arrived(item);
}

function card({ id }) {
  const item = $("card").content.firstElementChild.cloneNode(true), [edit, erase] = item.querySelectorAll("button");
  item.hidden = query.value.trim() !== "";  // until the search has found it
  edit.onclick = () => fill(item);
  erase.onclick = async () => {
    const [ok, { error }] = await api("DELETE", `/${id}`);
    if (!ok) say(error);
  };
  $("notes").insertBefore(item, [...$("notes").children].find(other => other.note.id < id) ?? null);
  items.set(id, item);
  return item;
}

function drop({ id }) {
  const item = items.get(id), next = item?.nextElementSibling ?? item?.previousElementSibling ?? $("add");
  if (!item) return;
  if (item.contains(document.activeElement)) next.querySelector("button, summary").focus();
  if (item === editing) $("error").textContent = "It has been deleted elsewhere. Saving adds it again.";
  items.delete(id);
  item.remove();
}

// The form: for a new note, or for a change to that of an item.
const add = $("add"), form = $("form"), { title, body, author, cancel } = form.elements;
let editing = null, draft = ["", ""], busy = false;

function fill(item) {
  if (!editing) draft = [title.value, body.value];
  editing = item;
  [title.value, body.value] = item ? [item.note.title, item.note.body] : draft;
  author.closest("div").hidden = item !== null;  // the author cannot be changed
  add.firstElementChild.textContent = item ? `Edit “${item.note.title}”` : "New note";
  for (const field of [title, body, author]) fault(field);
  $("error").textContent = "";
  add.open = item !== null;
  if (item) title.focus();
}

function leave() {
  const item = editing;
  if (!item) title.value = body.value = "";
  fill(null);
  (item?.isConnected ? item : add).querySelector("button, summary").focus();
}

form.onsubmit = async event => {
  event.preventDefault();
  if (busy) return;
  const item = editing, note = { author: author.value.trim(), ...item?.note };
  [note.title, note.body, busy] = [title.value.trim(), body.value.trim(), true];
  const [ok, { fields, error }] = await (items.has(note.id) ? api("PUT", `/${note.id}`, note) : api("POST", "", note));
  busy = false;
  if (editing !== item) return;  // it has been cancelled
  if (ok) return leave();
  for (const field of [title, body, author]) fault(field, fields?.[field.name]);
  $("error").textContent = fields ? "" : error;
  form.querySelector("[aria-invalid=true]")?.focus();
};
form.oninput = event => fault(event.target);
form.onkeydown = event => { if (event.key === "Escape") leave(); };
cancel.onclick = leave;
add.ontoggle = () => add.open ? title.focus() : editing && fill(null);

function fault(field, text) {
  field.setAttribute("aria-invalid", !!text);
  $(field.getAttribute("aria-describedby")).textContent = text ? `${field.labels[0].textContent.trim()} ${text}.` : "";
}
</script>
</html>
"""


CLIENT = """/* A WebSocket that reconnects. Copy it.

     const notes = new NovaSocket("/notifications?since=");  // replays what was missed, if the server keeps it
     notes.on("open", load).on("nova_resync", load);  // at first, and whenever messages may be missing
     notes.on("note_created", note => ...);           // {"event": "note_created", "data": ...}
     notes.on("message", text => ...);                // any message, as received
     notes.on("state", socket => ...);                // connecting, open, waiting (until `retryAt`), offline or closed
     notes.send("text");                              // false if it can neither be sent nor queued

   A message sent while the connection breaks may be lost. The heartbeat is an empty binary message that the server
   returns (`case ("binary", b""): return "reply", frame, state`). If not, only the browser detects dead connections. */
"use strict";
class NovaSocket {
  static OWN = ["open", "message", "state"];  // the server cannot send events of these names
  static LIMIT = 100;  // messages queued while disconnected
  static BEAT = 20000; static ANSWER = 5000; static CONNECT = 10000;  // ms: silence before a heartbeat; timeouts
  static delay(tries, random = Math.random()) {  // seconds: 0.5 to 1, doubled each time, at most 15 to 30
    return Math.min(30, 2 ** tries) * (1 + random) / 2;
  }

  constructor(path) {
    const end = this.end = new AbortController(), { signal } = end;
    Object.assign(this, { path, listeners: new Map(), queue: [], tries: 0, position: null, answers: false });
    addEventListener("online", () => this.now(), { signal });
    addEventListener("offline", () => this.lost(), { signal });
    document.addEventListener("visibilitychange", () => document.hidden || this.now(), { signal });
    this.connect();
  }
  on(event, fn) {
    this.listeners.set(event, [...this.listeners.get(event) ?? [], fn]);
    return this;
  }
  send(data) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
    else if (this.state === "closed" || this.queue.length >= NovaSocket.LIMIT) return false;
    else this.queue.push(data);
    return true;
  }
  close() { this.end.abort(); this.leave("closed"); }
  now() {  // connects, or checks the connection, immediately
    if (this.state === "open") this.beat();
    else if (["waiting", "offline"].includes(this.state)) this.connect();
  }

  // The rest is private. There is one timer: for the next step, unless something else happens first.
  emit(event, data) {
    for (const fn of this.listeners.get(event) ?? []) try { fn(data); } catch (error) { console.error(error); }
  }
  become(state, ms, next) {
    this.after(ms, next);
    this.state = state;
    this.emit("state", this);
  }
  after(ms, next) {
    clearTimeout(this.timer);
    if (next) this.timer = setTimeout(() => next.call(this), ms);
  }
  connect() {
    const url = new URL(this.path, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    if (this.position !== null) url.searchParams.set("since", this.position);
    const socket = this.socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.opened();
    socket.onmessage = ({ data }) => this.received(data);
    socket.onclose = () => this.lost();
    this.become("connecting", NovaSocket.CONNECT, this.lost);
  }
  opened() {
    this.since = Date.now();
    this.become("open", 0, this.beat);
    this.emit("open", this);
    while (this.queue.length && this.socket.readyState === WebSocket.OPEN) this.socket.send(this.queue.shift());
  }
  beat() {
    this.socket.send(new Uint8Array());
    this.after(NovaSocket.ANSWER, () => this.answers ? this.lost() : this.after(NovaSocket.BEAT, this.beat));
  }
  received(data) {
    this.after(NovaSocket.BEAT, this.beat);  // the connection is alive
    if (data.byteLength === 0) return void (this.answers = true);
    this.emit("message", data);
    let json = {};
    if (data[0] === "{") try { json = JSON.parse(data); } catch { /* not JSON */ }
    if (json.position !== undefined) this.position = json.position;
    if (!NovaSocket.OWN.includes(json.event)) this.emit(json.event, json.data);
  }
  lost() {
    if (this.state === "open" && Date.now() - this.since > 5000) this.tries = 0;  // not if it is closed after opening
    const wait = NovaSocket.delay(this.tries++) * 1000;
    this.retryAt = Date.now() + wait;
    this.leave(navigator.onLine ? "waiting" : "offline", wait, this.connect);
  }
  leave(...next) {
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.become(...next);
  }
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Main: the command line: the demo, broadcast, vendor.
# ---------------------------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nova_lite.py",
        description="Serves the demo: live comments, notes and their notifications. Open the URL in two windows.",
        epilog="HOST and PORT in the environment are the defaults for --host and --port. "
        "`nova_lite.py broadcast --help`: send a message into a running cluster, from a shell or a cron job. "
        "`nova_lite.py vendor --help`: write the copy for your project, without the demo. "
        "To build your own: from nova_lite import Nova, WebSocketHandler, pubsub.",
    )
    env, add = os.environ, parser.add_argument
    add("--host", default=env.get("HOST", "127.0.0.1"), help="address to listen on (%(default)s)")
    add("--port", type=between(int, 0, 65535), default=env.get("PORT", "8080"), help="port; 0: any (%(default)s)")
    add("--db", default="notes.db", help='the notes: a SQLite file, ":memory:", or postgresql://... (%(default)s)')
    add("--cluster", metavar="URL", help="redis://...: broadcasts reach all nodes that share this Redis")
    add("--name", metavar="NODE", help="this node's name in the cluster and in pids")
    add("--workers", type=between(int, 1, 256), default=1, metavar="N", help="processes; needs --cluster (%(default)s)")
    delay = "time between SIGTERM and draining, in which /heartbeat returns 503 (%(default)s)"
    add("--shutdown-delay", type=between(float, 0, 10**9), default=0.0, metavar="SECONDS", help=delay)
    add("--certfile", metavar="FILE", help="certificate (PEM): serve https and wss")
    add("--keyfile", metavar="FILE", help="private key of the certificate, if it is in another file")
    add("--reload", action="store_true", help="restart whenever a file of the program changes")
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", choices=levels, default="info", help="lowest level to log (%(default)s)")
    add("--version", action="version", version=f"nova_lite {__version__}")
    args = parser.parse_args()
    if args.workers > 1 and args.cluster is None:
        parser.error("--workers needs --cluster, or a broadcast would reach the clients of one worker only")
    if args.workers > 1 and args.db == ":memory:":
        parser.error("--workers needs a --db that workers can share, not :memory:")
    return args


def between(kind: type, low: int, high: int) -> Callable[[str], Any]:
    """Returns a function that parses a number from `low` to `high`, for argparse."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return kind(text)

    return number


def main() -> int:
    """Runs a subcommand or the demo, and returns the exit code."""
    for name, subcommand in (("broadcast", broadcast_main), ("vendor", vendor_main)):
        if sys.argv[1:2] == [name]:
            return subcommand(sys.argv[2:])
    args = parse_options()
    process = "%(process)d " if args.workers > 1 else ""
    logging.basicConfig(level=args.log_level.upper(), format=f"%(asctime)s {process}%(levelname)s %(message)s")
    choose_password()  # before workers or a child are started: they must share it
    try:
        if args.reload:
            reload_on_change()  # before the database is opened, which only the child needs
        if args.workers > 1:
            run_workers(args.workers, args.host, args.port, 5.0 + args.shutdown_delay)  # 5.0: how long a server drains
        return serve(**vars(args))
    except OSError as error:  # ssl.SSLError is one
        what = str(error.strerror).partition(":")[0]
        print(f"nova_lite: cannot serve {error.filename or f'{args.host}:{args.port}'}: {what}", file=sys.stderr)
    except (ImportError, ValueError) as error:  # raised by pubsub.connect
        print(f"nova_lite: {error}", file=sys.stderr)
    return 1


def serve(db: str, **options: Any) -> int:
    try:
        notes = open_notes(db)
    except Exception as error:  # sqlite3.Error, psycopg.Error; below, the URL has no password
        print(f"nova_lite: the database {db.rpartition('@')[2]} cannot be used: {error}", file=sys.stderr)
        return 1
    with closing(notes):
        start_indexer(notes)
        demo(notes, choose_password()).run(**options)
    return 0


def broadcast_main(arguments: list[str]) -> int:
    """Runs `nova_lite.py broadcast` and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="nova_lite.py broadcast",
        description="Sends a message to all members of a channel, on all nodes of a cluster.",
    )
    parser.add_argument("channel")
    parser.add_argument("topic")
    parser.add_argument("payload", help="JSON, unless --text is given")
    parser.add_argument("--cluster", metavar="URL", required=True, help="redis://..., as the nodes have it")
    parser.add_argument("--text", action="store_true", help="the payload is plain text")
    args = parser.parse_args(arguments)
    try:
        payload = args.payload if args.text else json.loads(args.payload)
    except ValueError as error:
        parser.error(f"the payload is not JSON ({error}); --text sends it as it is")
    try:
        count = publish(args.cluster, args.channel, args.topic, payload)
    except Exception as error:  # redis and msgpack raise their own
        print(f"nova_lite: nothing was sent: {error}", file=sys.stderr)
        return 1
    print(f"{args.channel} {args.topic}: {count} node{'' if count == 1 else 's'} reached")
    return 0


def vendor_main(arguments: list[str]) -> int:
    """Runs `nova_lite.py vendor` and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="nova_lite.py vendor",
        description="Writes the copy of nova_lite for your project: without the demo, and without the rooms you name.",
    )
    parser.add_argument("--without", metavar="ROOM,...", default="", help="rooms to leave out; see --list")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (standard output)")
    parser.add_argument("--list", action="store_true", help="show the rooms: lines, what is lost without them, needs")
    args = parser.parse_args(arguments)
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    without = set(re.findall(r"[^\s,]+", args.without))
    if unknown := ", ".join(sorted(without - set(find_rooms(source)))):
        parser.error(f"no room {unknown}; the rooms are {', '.join(find_rooms(source))}")
    text = list_rooms(source) if args.list else vendor(source, without)
    try:
        with open(args.output or 1, "w", encoding="utf-8", closefd=bool(args.output)) as file:  # 1: standard output
            file.write(text)
    except OSError as error:
        print(f"nova_lite: cannot write {args.output or 'the copy'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def find_rooms(source: str) -> dict[str, slice]:
    """Returns the detachable rooms, in order: the name, and where its lines are."""
    cut = re.compile("# -+ (?:cut here: without ([a-z_]+)|delete from here)")
    cuts = [(number, found[1]) for number, line in enumerate(source.splitlines()) if (found := cut.match(line))]
    return {name: slice(start, end) for (start, name), (end, _) in pairwise(cuts)}


def list_rooms(source: str) -> str:
    """Returns a table: a room, its lines, and the comment below its cut line, which says what is lost without it."""
    lines, rooms = source.splitlines(), find_rooms(source)
    table = f"{'core':12}{min(part.start for part in rooms.values()):5} lines\n"
    for name, part in rooms.items():
        notes = " ".join(line.strip("# ") for line in takewhile(bool, lines[part][1:]))
        table += f"{name:12}{part.stop - part.start:5} lines  {notes}\n"
    return table


def vendor(source: str, without: Iterable[str] = ()) -> str:
    """Returns the copy to vendor: `source` without the demo, the rooms `without`, and the imports used only there."""
    lines, rooms = source.splitlines(keepends=True), find_rooms(source)
    kept = [name for name in rooms if name not in without]
    core = lines[: min(part.start for part in rooms.values())]
    text = "".join(core + [line for name in kept for line in lines[rooms[name]]])
    besides = ", ".join(kept) or "none"
    head = f"# nova_lite {__version__}, written by `nova_lite.py vendor`. Rooms besides the core: {besides}.\n"
    return head + drop_unused_imports(text[text.index('"""') :]).rstrip() + "\n"  # without what makes it a program


def drop_unused_imports(source: str) -> str:
    tree, used, lines = ast.parse(source), set(), source.splitlines(keepends=True)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):  # of `import a.b`
                used.add(f"{name}.{attribute}")
    for node in reversed(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            lines[node.lineno - 1 : node.end_lineno] = [ast.unparse(node) + "\n"] if node.names else []
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
