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

The map. A room uses the rooms above it, others only through `rooms`. Those after a cut line can be deleted there.

    processes               mailboxes, runners; spawn, send, receive, monitor, link
    pub/sub                 channels and their members; broadcast
    requests, responses     what a controller receives and returns
    frames                  RFC 6455, in pure functions and one incremental parser
    connections             a WebSocket's or event stream's process: its loop, its writer, its limits
    Nova                    routes as data, security, the checks before the 101
    server                  HTTP, detaching sockets, draining
    http                    strict HTTP: limits, framing               (cut line; so have all rooms below)
    tls                     https and wss
    proxy                   what a proxy in front says of the client
    checks                  mistakes in routes and options, as errors that say what to do
    views                   templates and files; the look of pages, and their client, NovaSocket
    plugins                 before and after controllers; cors; pages for statuses; mounted applications
    deflate                 compression (permessage-deflate)
    rate                    clients that may say so much a time
    timers                  messages that are sent later
    gen_server              servers with calls; supervisors
    presence                who is in a channel, by name
    replay                  channels that keep their last messages
    launch                  reloading, workers, the application's children
    codec                   what crosses to another node
    cluster                 other nodes, through Redis
    leases                  a child that runs on one node of the cluster
    sessions                cookies; what the server remembers of a browser between requests
    logs                    the access log; lines in JSON
    stats                   figures of this node and of all nodes
    metrics                 figures of all nodes, for Prometheus
    inspect                 processes and channels, found and described
    board                   a page that shows all that
    demo, main              Nova's tutorial; the command line

Erlang's terms, here. An atom is a string, a tuple a tuple, a pid a `Pid`; `Pid ! Msg` is `pid.send(msg)`, `self()` is
`self_pid()`, `receive ... after` is `receive(timeout, match)`, a behaviour is a class (or any object) with the
callbacks. The README lists what differs from Erlang: payloads are shared, and a callback that computes blocks all.
"""

from __future__ import annotations

try:
    from gevent import monkey

    if __name__ == "__main__":  # before anything imports threading, socket or bottle: they must see the patched modules
        monkey.patch_all()
    import bottle
    from geventwebsocket.handler import WebSocketHandler as UpgradeHandler
except ModuleNotFoundError as error:
    needs = f"nova_lite needs {error.name}, which is not installed: pip install gevent gevent-websocket bottle"
    raise SystemExit(needs) if __name__ == "__main__" else ImportError(needs, name=error.name) from None

# ---------------------------------------------------------------------------------------------------------------------
# Prologue: imports, and the settings with their reasons.
# Invariant: importing this file patches nothing, opens nothing, starts nothing and logs nothing.
# ---------------------------------------------------------------------------------------------------------------------

import _socket
import codecs
import errno
import gc
import importlib
import json
import logging
import os
import random
import re
import signal
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, lru_cache, partial
from io import BytesIO
from ipaddress import ip_address
from itertools import chain, count, islice
from math import inf, isnan
from operator import attrgetter, itemgetter
from socket import IPPROTO_TCP, TCP_NODELAY, gethostname
from time import monotonic
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, unquote_to_bytes, urlencode, urlsplit

import gevent.event
import gevent.local
import gevent.monkey
import gevent.pywsgi
import gevent.socket
from bottle import HTTPError, HTTPResponse
from gevent.hub import Hub, Waiter, get_hub
from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from collections import UserList as _Tuple  # of a subclass of tuple, `case` would leave a plain one
else:
    _Tuple = tuple

__version__ = "0.1.0"
__all__ = [  # the rooms after the core add their own
    "Message", "Nova", "Pid", "ProcessExit", "PubSub", "Request", "Server", "Settings", "WebSocketHandler", "demonitor",
    "exit", "heartbeat", "is_process_alive", "link", "monitor", "process_flag", "pubsub", "receive", "register", "run",
    "self_pid", "send", "spawn", "spawn_link", "spawn_monitor", "unlink", "unregister", "whereis",
]  # fmt: skip

log = logging.getLogger("nova_lite" if __name__ == "__main__" else __name__)
rooms: dict[str, SimpleNamespace] = {}  # what a room offers to those above it, by the room's name


def room(name: str) -> SimpleNamespace:
    """Returns what a room offers. Raises RuntimeError if it was cut off."""
    if name not in rooms:
        raise RuntimeError(f"this copy of nova_lite has no room {name!r}")
    return rooms[name]


@dataclass(frozen=True)
class Settings:
    """Holds the limits and options of a route. `Nova(..., name=value)` sets one for all routes."""

    max_body: int = 1024 * 1024  # bytes of a request's body, 413 beyond; for uploads use bottle's `request.body`
    max_message_size: int = 1_000_000  # bytes of a message with all fragments; 1009 beyond, before they are held
    idle_timeout: float = 60.0  # seconds without a byte from the client before it is disconnected (Cowboy's default)
    ping_interval: float = 25.0  # seconds of silence between pings: two chances to respond within `idle_timeout`
    mailbox_limit: int = 1_000  # messages waiting for a client that does not read; 1013 beyond
    send_timeout: float = 10.0  # seconds in which a client reads nothing of what is ready for it; then 1013
    backlog: int = 64  # frames, or `max_message_size` bytes, waiting for their handler; reading pauses beyond
    on_slow: str = "close"  # beyond `mailbox_limit`; or "drop_oldest", "drop_new": drops messages, and logs that
    origins: Any = None  # list of origins, or "*"; None: the request's own host, or no Origin header at all
    trust_proxy: int = 0  # proxies in front, True is 1; of each X-Forwarded- list, the farthest one's entry counts
    subprotocols: Any = ()  # the handler's; the first of the client's that is among them is chosen
    compress: bool = False  # permessage-deflate (RFC 7692) with clients that offer it; costs CPU
    rate: Any = None  # (messages, seconds) of a client of a WebSocket; None: no limit
    on_flood: str = "wait"  # beyond `rate`: reading pauses; or "close", with 1008


# ---------------------------------------------------------------------------------------------------------------------
# Processes: mailboxes, turns on runners, and signals, as in Erlang.
# Invariant: this room uses no sockets, and only the hub's thread touches a process.
#
# A waiting process is a mailbox and a state, without a greenlet. A message puts it on the ready queue. A hub callback,
# `serve`, switches to a runner: a greenlet that takes process after process and gives each a turn. A callback that
# blocks keeps its runner until it returns; `serve` continues with another runner.
#
#   a process is        from               until
#   idle (`wake` set)   `reschedule`       a message, or an exit signal: `enqueue`
#   ready (no `wake`)   `enqueue`          a runner takes it: on the queue or on a runner at most once
#   running, blocked    `step`             `reschedule`, or an error: this ends the process, never its runner
#   terminating         `handle_exit`      `cleanup` returns (`exiting` is TERMINATING)
#   dead                `finish`           (`mailbox` is DEAD_MAILBOX)
# ---------------------------------------------------------------------------------------------------------------------

TIME_SLICE = 0.003  # seconds of turns before sockets and timers are looked at: none must wait for 5 ms
YIELD_DELAY = 1e-6  # seconds: the shortest sleep that polls sockets; after sleep(0) gevent runs 50 callbacks first
_CALLBACK = re.compile("init|terminate|websocket_[a-z]+|handle_(call|cast|continue|info)")  # of handlers and servers
HOLD_LIMIT = 0.1  # seconds of one turn; what holds the hub longer, and so keeps all others waiting, is logged
SEND_TOGETHER = 16  # turns whose sends follow each other: clients are woken less often (small: a fifth less CPU)
SPARE_RUNNERS = 64  # idle runners kept: a burst of blocking callbacks must not keep as many stacks

# Patched, get_ident would return a greenlet's identifier.
get_ident: Callable[[], int] = gevent.monkey.get_original("_thread", "get_ident")
_serials = count(1)
refs = count(1)
processes: dict[int, Process] = {}  # every live process, by its serial
registered: dict[str, Process] = {}
exit_hooks: list[Callable[[Process], None]] = []  # of other rooms; each is called with a process that has ended


class ProcessExit(gevent.GreenletExit):
    """Ends the process in which it is raised, for `reason` (erlang:exit/1). `except Exception` does not catch it."""

    def __init__(self, reason: Any = "normal") -> None:
        super().__init__(reason)
        self.reason = reason


class Pid:
    """The handle of a process, local or remote: hashable, printed like `<nova@host.42>`."""

    __slots__ = ("serial",)
    serial: int

    def send(self, message: Any) -> None:
        """Puts `message` into the mailbox. Never fails and never blocks; works from any thread."""

    def watch(self, ref: Any, watcher: Any) -> None:
        """Calls `watcher.down(ref, self, reason)` when the process ends; immediately, with "noproc", if it has."""

    def unwatch(self, ref: Any) -> None:
        """Ends `watch`."""

    def signal(self, source: Pid, reason: Any) -> None:
        """Sends an exit signal, by `exit` or along a link."""

    def kill(self, reason: Any) -> None:
        """Sends an exit signal that cannot be trapped."""

    def __repr__(self) -> str:
        return f"<{scheduler.node}.{self.serial}>"


class Process(Pid):
    """A local process. Subclasses define its turn, `step`."""

    __slots__ = (
        "channels", "exiting", "handled", "links", "mailbox", "monitored_by", "name", "owned", "runner",
        "started_at", "trapping", "wake",
    )  # fmt: skip

    def __init__(self) -> None:
        self.serial = next(_serials)
        self.mailbox: deque[Any] = deque()  # DEAD_MAILBOX after the end
        self.wake: Callable[[Any], None] | None = None  # called when a message arrives; None while ready or running
        self.runner: Runner | None = None  # the greenlet of its turn, blocked or not; None between turns
        self.exiting: ProcessExit | None = None  # a pending exit signal, which `receive` raises; TERMINATING; or None
        self.trapping = False
        self.name: str | None = None
        self.links: Any = ()  # a set once there are some; symmetric
        self.monitored_by: dict[Any, Any] | None = None  # ref -> watcher
        self.owned: dict[Any, Any] | None = None  # ref -> monitor or timer whose `unwatch(ref)` is called at the end
        self.channels: Any = ()  # of pub/sub; a dict once there are some: channel -> position at the join, or None
        self.started_at = monotonic()
        self.handled = 0  # number of messages received
        processes[self.serial] = self

    def step(self) -> None:
        """Runs one turn, on a runner."""

    def end_turn(self) -> None:
        """Sends what the turn has to send, for a process that `step` has added to the scheduler's `unsent`."""

    def send(self, message: Any) -> None:
        if get_ident() == scheduler.thread:
            self.deliver(message)
        else:
            scheduler.run_in_hub(self.deliver, message)

    def deliver(self, message: Any) -> None:
        """Does what `send` does, in the hub's thread only."""
        self.mailbox.append(message)
        wake = self.wake
        if wake is not None:
            wake(self)

    def reschedule(self) -> None:
        """Ends a turn: makes the process ready if messages are waiting, else idle."""
        if self.mailbox or self.exiting is not None:
            enqueue(self)
        else:
            self.wake = enqueue

    def before_blocking(self) -> None:
        """Is called when a callback is about to block, in the callback's greenlet. Must not block."""

    def watch(self, ref: Any, watcher: Any) -> None:
        if self.mailbox is DEAD_MAILBOX:
            watcher.down(ref, self, "noproc")
        else:
            self.monitored_by = self.monitored_by or {}
            self.monitored_by[ref] = watcher

    def unwatch(self, ref: Any) -> None:
        if self.monitored_by:
            self.monitored_by.pop(ref, None)
            self.monitored_by = self.monitored_by or None  # an empty one would hold 0.2 KiB a connection

    def own(self, ref: Any, thing: Any) -> None:
        """Calls `thing.unwatch(ref)` when this process ends."""
        self.owned = self.owned or {}
        self.owned[ref] = thing

    def disown(self, ref: Any) -> Any:
        """Ends `own`; returns the thing, or None."""
        return self.owned.pop(ref, None) if self.owned else None

    def signal(self, source: Pid, reason: Any) -> None:
        if self.trapping:
            self.deliver(("EXIT", source, reason))
        elif reason != "normal" or source is self:
            self.interrupt(reason)

    def interrupt(self, reason: Any) -> None:
        """Ends the process with a signal that is not trapped, unless it is ending already."""
        if self.exiting is None:
            self.kill(reason)

    def kill(self, reason: Any) -> None:
        """Raises ProcessExit in the process, even in its final callbacks or after it has caught a signal."""
        pending = self.exiting not in (None, TERMINATING) and self.exiting.__traceback__ is None
        if pending or self.mailbox is DEAD_MAILBOX:  # of two signals, the first counts
            return
        if self.runner is not None and self.runner.parent is None:
            log.error("%r is the main greenlet and continues; the exit signal was %r", self, reason)
            return
        self.exiting = signal = ProcessExit(reason)
        if current_process() is self:
            raise signal
        if self.runner is not None:
            scheduler.hub.loop.run_callback(self._throw, signal)
        elif self.wake is not None:
            enqueue(self)

    def _throw(self, signal: ProcessExit) -> None:
        # The turn may have ended meanwhile, which made the process ready. Or `receive` has raised the signal: raised
        # again, it would interrupt the process's own `finally`.
        runner = self.runner
        if runner is not None and self.exiting is signal and signal.__traceback__ is None:
            runner.throw(signal)

    def handle_exit(self, error: BaseException) -> None:
        """Ends the process after `error` left its turn, or after a signal between turns. Never raises."""
        self.exiting = TERMINATING
        try:
            reason = self.cleanup(error)
        except BaseException as failure:
            reason = self.log_crash(failure, "its final callbacks")
        self.finish(reason)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            get_hub().handle_system_error(type(error), error, error.__traceback__)

    def cleanup(self, error: BaseException) -> Any:
        """Runs the final callbacks and returns the exit reason."""
        return error.reason if isinstance(error, ProcessExit) else self.log_crash(error, "")

    def log_crash(self, error: BaseException, where: str) -> Any:
        """Logs a crash with its traceback and returns the exit reason. An exit signal is not a crash."""
        if isinstance(error, gevent.GreenletExit):
            return getattr(error, "reason", "killed")
        known = vars(error)  # `Message.once` raises one error in all receivers: it is logged for the first
        if not isinstance(error, KeyboardInterrupt | SystemExit) and not known.get("_is_logged"):
            with suppress(Exception):  # a filter of the application's raises: this process must end all the same
                log.error("%r%s crashed%s", self, self.title(), where and f" in {where}", exc_info=error)
        if "_is_logged" in known:
            known["_is_logged"] = True
            error.with_traceback(None)  # the message would keep this receiver's frames
        return error

    def role(self) -> str:
        """Returns the name of its handler, server or function."""
        return type(self).__name__

    def title(self) -> str:
        """Returns what follows the pid in log lines."""
        return f" {self.name or self.role()}"

    def finish(self, reason: Any) -> None:
        """Ends the process, in this method only: releases its name and channels, notifies monitors and links."""
        if self.mailbox is DEAD_MAILBOX:
            return
        if reason == "normal" and self.exiting not in (None, TERMINATING):
            reason = self.exiting.reason  # it has caught the signal
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

    def down(self, ref: int, process: Any, reason: Any) -> None:
        """Delivers the DOWN of a process that this one monitors."""
        self.disown(ref)
        self.deliver(("DOWN", ref, "process", process, reason))


DEAD_MAILBOX: deque[Any] = deque(maxlen=0)  # discards everything
TERMINATING = ProcessExit("terminating")  # `exiting` during the final callbacks: only `kill` interrupts them


class FunctionProcess(Process):
    """What `spawn` starts: a function, which keeps its runner until it returns."""

    __slots__ = ("args", "fn")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__()
        self.fn, self.args = fn, args

    def step(self) -> None:
        self.fn(*self.args)
        self.finish("normal")

    def role(self) -> str:
        return getattr(self.fn, "__qualname__", type(self.fn).__qualname__)


class GreenletProcess(Process):
    """A greenlet that became a process by calling self_pid()."""

    __slots__ = ("greenlet", "thread")
    runner = property(lambda self: self.greenlet(), lambda self, _none: None)

    def __init__(self, current: greenlet) -> None:
        super().__init__()
        self.thread = get_ident()
        self.greenlet = weakref.ref(current, lambda _: scheduler.run_in_hub(self.finish, "normal"))
        if isinstance(current, gevent.Greenlet):
            current.rawlink(self._ended)

    def _ended(self, done: gevent.Greenlet) -> None:
        is_exit = isinstance(done.value, gevent.GreenletExit)
        self.finish(getattr(done.value, "reason", "killed") if is_exit else done.exception or "normal")

    def finish(self, reason: Any) -> None:
        super().finish(reason)
        target = self.greenlet()
        if target is not None:
            target.nova_process = None
        if isinstance(target, gevent.Greenlet):
            target.unlink(self._ended)

    def kill(self, reason: Any) -> None:
        if scheduler.thread is None and get_ident() != self.thread:
            raise RuntimeError(f"{self!r} belongs to another thread, and no process was started there")
        scheduler.bind_thread()
        super().kill(reason)


class Runner(greenlet):
    """A greenlet that runs the turns of processes."""

    nova_process: Process | None = None  # the process that it runs, or that blocks it

    def run(self) -> None:
        ready = scheduler.ready
        while True:
            while ready and monotonic() < scheduler.deadline:
                process = self.nova_process = ready.popleft()
                process.runner = self
                try:
                    if process.exiting is not None:
                        raise process.exiting
                    process.step()
                except BaseException as error:
                    process.handle_exit(error)
                process.runner = None
                if len(scheduler.unsent) >= SEND_TOGETHER:
                    scheduler.end_turns()
            scheduler.end_turns()
            if scheduler.runner is self:
                scheduler.last = self.nova_process
            self.nova_process = process = None  # type: ignore[assignment]  # an idle runner must not keep a process
            if len(scheduler.idle) >= SPARE_RUNNERS:
                return
            scheduler.idle.append(self)
            try:
                while self in scheduler.idle:  # a late switch, for a callback that has returned, resumes it too early
                    scheduler.hub.switch()
            except BaseException:  # a gevent.Timeout that a callback left running
                scheduler.idle.remove(self)
                return

    def switch_out(self) -> None:
        """Called by gevent before this greenlet blocks."""
        if self.nova_process is not None:
            self.nova_process.before_blocking()
            scheduler.end_turns()


class Scheduler:
    """The ready queue and its runners, in the thread that started the first process."""

    def __init__(self) -> None:
        self.node = "nova@" + gethostname()  # the name in pids
        self.thread: int | None = None
        self.hub: Any = None
        self.ready: deque[Process] = deque()
        self.unsent: list[Process] = []  # those whose turn is over but for its send
        self.idle: list[Runner] = []
        self.deadline = 0.0  # end of the time slice of `serve`
        self.yielded: deque[Waiter] = deque()  # one for each greenlet that yielded, in their order
        self.scheduled = False  # whether `serve` is about to be called
        self.timer: Any = None  # calls `serve`
        self.runner: Runner | None = None  # the one that `serve` has switched to; None outside of `serve`
        self.last: Process | None = None  # the last one that `runner` ran; None until `runner` is idle
        self.next_warning = 0.0  # time before which no turn is logged for its length
        self.iteration = -1  # number of the loop's iteration in which `slice_end` was set; libuv's has none
        self.slice_end = 0.0  # end of the time slice of greenlets that may yield
        self.detached: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()  # calls from other threads
        self.alarm: Any = None  # the async watcher by which other threads wake the hub

    def enqueue(self, process: Process) -> None:
        process.wake = None
        self.ready.append(process)
        if not self.scheduled:
            self.scheduled = True
            self.hub.loop.run_callback(self.serve)

    def serve(self) -> None:
        """Resumes greenlets that yielded, and runs ready processes, until the time slice is over. The hub calls it."""
        end = self.deadline = (now := monotonic()) + TIME_SLICE
        if self.yielded:
            self.iteration, self.slice_end = self.hub.loop.iteration, end - TIME_SLICE / 2 if self.ready else end
            while self.yielded and monotonic() < self.slice_end:
                self.yielded.popleft().switch(None)
            self.deadline = max(end, (now := monotonic()) + TIME_SLICE / 10)
        while self.ready and now < self.deadline:
            runner = self.runner = self.idle.pop() if self.idle else Runner(parent=self.hub)
            runner.switch()  # returns when the runner is idle, or when a callback blocks it
            before, now, process = now, monotonic(), runner.nova_process or self.last
            if now - before > HOLD_LIMIT and now >= self.next_warning and process is not None:
                self.next_warning = now + 60
                details = f"{process!r}{process.title()}", process.role(), (now - before) * 1000
                gevent.spawn_raw(log.warning, "%s: a callback of %s held the hub for %d ms", *details)  # it may block
            self.runner = self.last = None
        self.end_turns()  # of a runner whose callback blocks in a greenlet of its own: `switch_out` is not called
        self.scheduled = bool(self.ready or self.yielded)
        if self.scheduled:  # by a timer: gevent would run 50 callbacks before it polls sockets
            self.timer.start(self.serve)

    def end_turns(self) -> None:
        """Sends what the turns that are over have to send."""
        while self.unsent:
            self.unsent.pop(0).end_turn()

    def yield_after_slice(self) -> None:
        """Waits until others have had their turns, once the calling greenlet has used up its time slice.

        Greenlets that never wait share one slice per iteration of the loop, in their order. One that has waited gets a
        little of its own, so that a short request does not wait for a flood to end.
        """
        caller, now, iteration = getcurrent(), monotonic(), self.hub.loop.iteration
        if iteration != self.iteration:
            self.iteration, self.slice_end = iteration, now + TIME_SLICE
        if getattr(caller, "iteration", None) != iteration:
            caller.iteration, caller.slice_end = iteration, max(self.slice_end, now + TIME_SLICE / 10)
        elif now > caller.slice_end and not isinstance(caller, Hub):
            if get_ident() == self.thread:
                waiter = Waiter()
                self.yielded.append(waiter)
                if not self.scheduled:
                    self.scheduled = True
                    self.timer.start(self.serve)
                waiter.get()
            else:
                gevent.sleep(YIELD_DELAY)
            caller.iteration, caller.slice_end = self.iteration, self.slice_end

    def bind_thread(self) -> None:
        """Binds all processes to this thread and its hub, unless they are bound."""
        if self.thread is None:
            self.hub = get_hub()
            self.timer = self.hub.loop.timer(0)
            self.alarm = self.hub.loop.async_(ref=False)
            self.alarm.start(self._call_detached)
            self.thread = get_ident()  # last: other threads read it

    def run_in_hub(self, fn: Callable[..., Any], *args: Any) -> None:
        """Calls `fn` in the hub's thread: immediately if this is it, else in a callback of the hub, in order."""
        if self.thread is None or self.thread == get_ident():
            fn(*args)
        else:  # not by `run_callback_threadsafe`: it corrupts the loop's count of references (gevent's issue 2212)
            self.detached.append((fn, args))
            self.alarm.send()

    def _call_detached(self) -> None:
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


def current_process() -> Process | None:
    """Returns the process that the current greenlet runs, or None."""
    return getattr(getcurrent(), "nova_process", None)


def self_pid() -> Pid:
    """Returns the pid of the calling process; any greenlet becomes one by this call (erlang:self/0)."""
    process = current_process()
    if process is None:
        current = getcurrent()
        process = GreenletProcess(current)
        if scheduler.thread not in (None, get_ident()) or isinstance(current, Hub):
            process.finish("noproc")  # in another thread, or a callback of the hub: a sender without a mailbox
        current.nova_process = process
    return process


def calling_process() -> Process:
    """Returns the calling process. Raises RuntimeError in a thread that is not the hub's: it has no mailbox."""
    scheduler.bind_thread()
    if get_ident() != scheduler.thread:
        raise RuntimeError("only send, broadcast and exit work from a thread other than the hub's")
    return self_pid()  # type: ignore[return-value]


def resolve(target: Pid | str | tuple[str, str]) -> Any:
    """Returns a pid itself, a name's process or None. Raises TypeError for anything else."""
    if isinstance(target, str):
        return registered.get(target)
    if isinstance(target, Pid):
        return target
    if isinstance(target, tuple) and len(target) == 2 and target[0] == "cluster":
        return room("leases").resolve(target[1])
    raise TypeError(f"expected a pid or a registered name, got {target!r}")


def wait_for(waiter: Waiter, timeout: float | None) -> Any:
    """Returns what `waiter` is given, or None after `timeout` seconds. Raises ValueError for NaN."""
    if timeout is None and getcurrent().parent is not None:
        return waiter.get()
    # Without a timer, gevent would raise LoopExit in the main greenlet, though a thread may still send.
    seconds = 1e9 if timeout is None else max(timeout, 0)
    if isnan(seconds):
        raise ValueError("expected seconds, got NaN")
    with get_hub().loop.timer(seconds) as timer:
        timer.start(waiter.switch, None, update=True)
        return waiter.get()


def spawn(fn: Callable[..., Any], *args: Any) -> Pid:
    """Starts a process that runs `fn(*args)` in its own greenlet, and returns its pid (erlang:spawn/1)."""
    if not callable(fn):
        raise TypeError(f"spawn expects a function, got {fn!r}")
    scheduler.bind_thread()
    process = FunctionProcess(fn, args)
    scheduler.run_in_hub(enqueue, process)
    return process


def spawn_link(fn: Callable[..., Any], *args: Any) -> Pid:
    """Does what `spawn` does, and links the process to the caller before it runs (erlang:spawn_link/1)."""
    calling_process()  # raises before anything starts
    process = spawn(fn, *args)
    link(process)
    return process


def spawn_monitor(fn: Callable[..., Any], *args: Any) -> tuple[Pid, int]:
    """Returns (pid, ref) of a process that is monitored before it runs (erlang:spawn_monitor/1)."""
    calling_process()  # raises before anything starts
    process = spawn(fn, *args)
    return process, monitor(process)


def is_process_alive(pid: Pid) -> bool:
    """Returns whether a process has not ended, nor been sent an exit signal (erlang:is_process_alive/1).

    Raises TypeError for what is not a process of this node.
    """
    if not isinstance(pid, Process):
        raise TypeError(f"expected a process of this node, got {pid!r}")
    return pid.mailbox is not DEAD_MAILBOX and pid.exiting in (None, TERMINATING)


def send(target: Pid | str | tuple[str, str], message: Any) -> Any:
    """Sends to a pid or a registered name, and returns the message (erlang:send/2). Silent if there is no process."""
    process = resolve(target)
    if process is not None:
        process.send(message)
    return message


def receive(timeout: float | None = None, match: Callable[[Any], Any] | None = None) -> Any:
    """Returns the first message `match` accepts, or None after `timeout` seconds; others stay in order."""
    me = calling_process()
    deadline = None if timeout is None else monotonic() + timeout
    refused = 0  # messages at the front that `match` has refused
    mailbox = me.mailbox
    if mailbox or timeout == 0:
        scheduler.yield_after_slice()
    while True:
        if match is not None:
            refused = _count_refused(me, match, refused)
        if me.exiting is not None and me.exiting is not TERMINATING:  # `match` may have blocked
            raise me.exiting
        if refused < len(mailbox):
            message = mailbox[refused]
            del mailbox[refused]
            me.handled += 1
            return message
        if deadline is not None and monotonic() >= deadline:
            return None
        _await_message(me, None if deadline is None else deadline - monotonic())


def _count_refused(me: Process, match: Callable[[Any], Any], refused: int) -> int:
    """Returns how many messages precede the first that `match` accepts."""
    mailbox, handled = me.mailbox, me.handled
    while refused < len(mailbox) and me.exiting in (None, TERMINATING):
        # Copies, since `match` may send to this process; of growing size, so that the cost stays linear.
        for message in list(islice(mailbox, refused, 2 * refused + 16)):
            accepted = match(message)
            if me.handled != handled:  # `match` has received a message, which moved the others
                refused, handled = 0, me.handled
                break
            if accepted:
                return refused
            refused += 1
            if not refused % 16:
                scheduler.yield_after_slice()
    return refused


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
        raise ValueError(f"expected a name, a string that is not empty, got {name!r}")
    return name


def register(name: str, pid: Pid) -> None:
    """Gives a process a name (erlang:register/2). Raises ValueError if either has one already, or `pid` is dead."""
    if not isinstance(pid, Process) or pid.mailbox is DEAD_MAILBOX:
        raise ValueError(f"{pid!r} is not a live process of this node")
    if check_name(name) in registered or pid.name is not None:
        raise ValueError(f"{name!r} or {pid!r} is registered already")
    registered[name], pid.name = pid, name


def unregister(name: str) -> None:
    """Takes a name from its process (erlang:unregister/1). Raises ValueError if no process has it."""
    if name not in registered:
        raise ValueError(f"{name!r} is not registered")
    registered.pop(name).name = None


def whereis(name: str | tuple[str, str]) -> Pid | None:
    """Returns the process registered as `name`, or None; ("cluster", id) names a child (erlang:whereis/1)."""
    return resolve(name) if isinstance(name, tuple) else registered.get(name)


def monitor(target: Pid | str | tuple[str, str]) -> int:
    """Sends one ("DOWN", ref, "process", pid, reason) to the caller when `target` ends; returns ref.

    Immediately, with "noproc", if it is dead (erlang:monitor/2).
    """
    me, process, ref = calling_process(), resolve(target), next(refs)
    if process is None:
        me.down(ref, target, "noproc")
    else:
        me.own(ref, process)
        process.watch(ref, me)
    return ref


def demonitor(ref: int, flush: bool = False) -> bool:
    """Ends a monitor; returns whether it was active. With `flush`, removes a DOWN that has arrived already."""
    target = calling_process().disown(ref)
    if target is not None:
        target.unwatch(ref)
    elif flush:
        receive(0, lambda message: isinstance(message, tuple) and message[:2] == ("DOWN", ref))
    return target is not None


def link(pid: Pid) -> bool:
    """Links the caller and `pid`: if one ends abnormally, so does the other (erlang:link/1).

    Raises TypeError for a process of another node.
    """
    me, other = calling_process(), resolve(pid)
    if other is not None and not isinstance(other, Process):
        raise TypeError(f"{other!r} is a process of another node: monitor it, links do not cross nodes")
    if other is None or other.mailbox is DEAD_MAILBOX:
        me.signal(other or pid, "noproc")
    elif other is not me:
        me.links, other.links = me.links or set(), other.links or set()
        me.links.add(other)
        other.links.add(me)
    return True


def unlink(pid: Pid) -> bool:
    """Removes the link between the caller and `pid` (erlang:unlink/1)."""
    me, other = calling_process(), resolve(pid)
    if other in me.links:
        me.links.discard(other)
        other.links.discard(me)
    return True


def exit(pid: Pid | str, reason: Any) -> bool:
    """Sends an exit signal (erlang:exit/2). "normal" is ignored by all but the caller; "kill" cannot be trapped."""
    process = resolve(pid)
    if process is not None and reason == "kill":
        scheduler.run_in_hub(process.kill, "killed")
    elif process is not None:
        scheduler.run_in_hub(process.signal, self_pid(), reason)
    return True


def process_flag(flag: str, value: bool) -> bool:
    """Sets "trap_exit" of the caller and returns its old value. Raises ValueError for any other flag."""
    if flag != "trap_exit":
        raise ValueError(f"the only flag is 'trap_exit', got {flag!r}")
    me = calling_process()
    old, me.trapping = me.trapping, bool(value)
    return old


class Alias(Pid):
    """A one-shot reply address (OTP's process alias); messages after the wait are discarded."""

    __slots__ = ("__weakref__", "waiter")

    def __init__(self) -> None:
        self.serial, self.waiter = next(_serials), Waiter()

    def send(self, message: Any) -> None:
        scheduler.run_in_hub(self.waiter.hub.loop.run_callback, self.waiter.switch, message)

    def down(self, _ref: int, _process: Pid, reason: Any) -> None:
        self.send(("DOWN", reason))


def send_and_wait(process: Pid, alias: Alias, timeout: float | None, request: Any = None) -> Any:
    """Returns what `process` sends to `alias`, ("DOWN", reason) if it ends first, None after `timeout` seconds."""
    ref = next(refs)
    process.watch(ref, alias)
    try:
        if request is not None:
            process.send(request)
        return wait_for(alias.waiter, timeout)
    finally:
        process.unwatch(ref)


def is_normal(reason: Any) -> bool:
    """Returns whether OTP considers the exit reason normal: "normal", "shutdown", ("shutdown", ...)."""
    return reason in ("normal", "shutdown") or (isinstance(reason, tuple) and reason[:1] == ("shutdown",))


def failing_callback(error: BaseException) -> str:
    """Returns the name of the callback in which `error` was raised, "" if that was after it returned."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((c.co_name for c in codes if c.co_filename != __file__ or _CALLBACK.fullmatch(c.co_name)), "")


# ---------------------------------------------------------------------------------------------------------------------
# pub/sub: channels, their members, and broadcast.
# Invariant: a member is a Pid; this room neither runs callbacks nor uses sockets.
# ---------------------------------------------------------------------------------------------------------------------


class Message(_Tuple):
    """What members receive: ("nova_pubsub", channel, sender, topic, payload)."""

    position: str | None = None  # in the history of a kept channel, for `join(since=...)`
    _memo: dict[Any, Any] | None = None

    def once(self, fn: Callable[[Message], Any]) -> Any:
        """Returns `fn(self)`, computed for the first receiver and shared with the others; so is what it raises.

        A function without defaults is identified by its code and its globals, so that a lambda will do; anything else
        by itself. Raises ValueError for a bound method or a closure: its value could differ between receivers.
        """
        if self._memo is None:
            self._memo = {}
        if type(fn) is FunctionType and not (fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__):
            key: Any = id(fn.__code__), id(fn.__globals__)
        else:
            key = id(fn) if _is_shareable(fn) else getattr(fn, "__qualname__", None)
        if key not in self._memo:
            value, failure = None, None
            try:
                if not _is_shareable(fn):
                    raise ValueError(f"once expects a function of the message, not a bound method or a closure: {fn!r}")
                value = fn(self)
            except Exception as error:
                vars(error)["_is_logged"] = False  # for `log_crash`, which logs it for one receiver
                failure = error, error.__traceback__
            self._memo[key] = fn, value, failure  # with `fn`, since an id is unique only while its object exists
        _, value, failure = self._memo[key]
        if failure is not None:
            raise failure[0].with_traceback(failure[1])  # else it would gather the frames of all receivers
        return value


def _is_shareable(fn: Callable[..., Any]) -> bool:
    owner = getattr(fn, "__self__", None)
    return not getattr(fn, "__closure__", None) and (owner is None or isinstance(owner, ModuleType))


class Adapter:
    """What pub/sub calls to reach other nodes. This one is for a node without a cluster.

    The law: a broadcast reaches every member on every node once. `dispatch` sends it to the local members, by pub/sub's
    own methods, and to the other nodes. Other threads may call `encode` only. The methods `wait_until_...` may block.
    """

    connected = True

    def __init__(self, pubsub: PubSub) -> None:
        self.pubsub = pubsub

    def encode(self, message: Message, exclude: Pid | None) -> Any:
        """Returns the data for `dispatch`. Raises TypeError or ValueError for what cannot cross to another node."""

    def dispatch(self, message: Message, exclude: Pid | None, _data: Any) -> None:
        self.pubsub.record_and_deliver(message, exclude)

    def dispatch_here(self, message: Message) -> None:
        self.pubsub.record_and_deliver(message, None)

    def on_join(self, channel: str, process: Process) -> None:
        """Called when a process of this node has joined."""

    def on_leave(self, channel: str, process: Process) -> None:
        """Called when a process of this node has left. The channel may be empty."""

    def on_keep(self, channel: str) -> None:
        """Called when this node starts to keep the channel."""

    def on_track(self, channel: str, key: str, process: Process, meta: dict[str, Any] | None) -> None:
        """Called when presence has tracked a process of this node, or no longer does (None)."""

    def wait_until_subscribed(self, channel: str) -> None:
        """Returns when this node receives what other nodes send to the channel."""

    def wait_until_loaded(self, channel: str) -> None:
        """Returns when this node has what other nodes have kept of the channel."""

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


class Recorder:
    """What pub/sub and a cluster ask of a kept channel. The room `replay` has the implementation."""

    size: int  # messages
    seconds: float
    position: Any  # of the last message, a string
    resize: Callable[[int, float], None]  # sets `size` and `seconds`
    add: Callable[[Message], None]  # records the next message and sets its position, unless it has one
    since: Callable[[Any], list[Message] | None]  # the messages after a position, None if it is too old or unknown
    forget: Callable[[], None]  # invalidates all positions: messages were lost
    load: Callable[[str, int, list[tuple[float, Message]]], None]  # replaces the messages by those kept elsewhere


class PubSub:
    """Channels and their members (nova_pubsub, on OTP's pg). The one instance is `pubsub`."""

    def __init__(self) -> None:
        self.adapter: Any = Adapter(self)  # the cluster's after `connect`
        self.channels: dict[str, set[Process]] = {}  # channel -> local members; no set is empty
        self.monitors: dict[str, dict[int, Process]] = {}  # channel -> ref -> the process to notify; no dict is empty
        self.histories: dict[str, Recorder] = {}  # channel -> its history, of the room replay
        self.message_counts: dict[str, int] = {}  # channel with local members -> messages sent to them
        self._monitored: dict[int, str] = {}  # ref -> channel
        self.presence: Any = None  # the `presence` of the room presence; None without that room
        exit_hooks.append(self._on_exit)

    def connect(self, url: str, name: str | None = None) -> str:
        """Joins a cluster over the Redis (or Valkey) at `url`, with `name` for this node, and returns "ok".

        `redis://[user:password@]host[:port][/database][?prefix=...]`, or `rediss://` for TLS; a prefix separates
        applications. Waits at most 5 seconds for the connection. Without one, the node continues alone and keeps
        trying. Raises ValueError for a bad URL, ImportError without the packages `redis` and `msgpack`, RuntimeError if
        the node is connected already, if nothing is patched, or if this copy has no room `cluster`.
        """
        return room("cluster").connect(self, url, name)

    def disconnect(self) -> str:
        """Leaves the cluster and returns "ok", or "not_connected"."""
        return room("cluster").disconnect(self)

    def join(self, channel: str, pid: Pid | None = None, since: str | None = None) -> str:
        """Makes `pid`, or the caller, a member and returns "ok". A dead process does not become one.

        With `since`, a position in a kept channel, the member first receives the messages after it, in order and
        without gap or duplicate, or ("nova_resync", channel) if they are not available; with "first", all that are
        kept. In a cluster, waits until this node receives what others publish there, unless Redis is not connected.
        """
        process = local_process(pid)
        if since is not None:
            self.adapter.wait_until_loaded(channel)
        self._join(check_channel(channel), process, since)
        self.adapter.wait_until_subscribed(channel)
        return "ok"

    def leave(self, channel: str, pid: Pid | None = None) -> str:
        """Ends a membership and returns "ok", or "not_joined". Messages that are in the mailbox already stay there."""
        process = local_process(pid)
        if process not in self.channels.get(check_channel(channel), ()):
            return "not_joined"
        process.channels.pop(channel, None)
        self._leave(channel, process)
        return "ok"

    def keep(self, channel: str, size: int = 100, seconds: float = 300) -> str:
        """Keeps the channel's last `size` messages of the last `seconds` for `join(since=...)`, and returns "ok".

        In a cluster each node keeps the channel, and Redis does. All messages to it then pass through Redis, those to
        local members as well: these wait while Redis hangs. Raises RuntimeError if this copy has no room `replay`.
        """
        return room("replay").keep(self, channel, size, seconds)

    def get_position(self, channel: str) -> str | None:
        """Returns the position of a kept channel's last message, or None. A message's own is `message.position`."""
        check_channel(channel)
        return self.histories[channel].position if channel in self.histories else None

    def broadcast(self, channel: str, topic: str | bytes, payload: Any) -> str:
        """Sends to every member on every node, the caller included if it is one, and returns "ok".

        In a cluster, raises TypeError for a payload that cannot cross to another node, ValueError for one too large.
        """
        return self.broadcast_from(None, channel, topic, payload)

    def local_broadcast(self, channel: str, topic: str | bytes, payload: Any) -> str:
        """Sends to every member on this node and returns "ok"."""
        scheduler.run_in_hub(self.adapter.dispatch_here, self.make_message(channel, topic, payload))
        return "ok"

    def broadcast_from(self, pid: Pid | None, channel: str, topic: str | bytes, payload: Any) -> str:
        """Does what `broadcast` does, for all members but `pid`."""
        message, adapter = self.make_message(channel, topic, payload), self.adapter
        data = adapter.encode(message, pid)  # may raise, before any member has received the message
        scheduler.run_in_hub(adapter.dispatch, message, pid, data)
        return "ok"

    def get_members(self, channel: str) -> list[Pid]:
        """Returns the members on all nodes. Changes on other nodes arrive with a delay."""
        return self.get_local_members(channel) + self.adapter.get_members(channel)

    def get_local_members(self, channel: str) -> list[Pid]:
        """Returns the members on this node."""
        return list(self.channels.get(check_channel(channel), ()))

    def which_channels(self) -> list[str]:
        """Returns the channels that have members on any node (pg:which_groups/1)."""
        return list({*self.channels, *self.adapter.which_channels()})

    def monitor(self, channel: str) -> tuple[int, list[Pid]]:
        """Returns (ref, members) and sends (ref, "join" | "leave", channel, [pid]) for each change (pg:monitor/2)."""
        ref, me = next(refs), calling_process()
        self.monitors.setdefault(check_channel(channel), {})[ref] = me
        self._monitored[ref] = channel
        me.own(ref, self)
        return ref, self.get_members(channel)

    def demonitor(self, ref: int) -> bool:
        """Ends a monitor of a channel and returns whether there was one (pg:demonitor/2)."""
        channel = self._monitored.pop(ref, None)
        if channel is None:
            return False
        self.monitors[channel].pop(ref).disown(ref)
        if not self.monitors[channel]:
            del self.monitors[channel]
        return True

    unwatch = demonitor

    # -- in the hub's thread

    def _join(self, channel: str, process: Process, since: str | None) -> None:
        members = self.channels.get(channel, ())
        if process in members or process.mailbox is DEAD_MAILBOX:
            return
        position = self.get_position(channel)
        if since is not None:
            missed = self.histories[channel].since(since) if channel in self.histories else None
            position = "0" if missed is None else since  # 0 is no position: a client that returns with it gets a resync
            for message in [("nova_resync", channel)] if missed is None else missed:
                process.deliver(message)
        if not members:
            self.channels[channel], self.message_counts[channel] = set(), 0
        self.channels[channel].add(process)
        process.channels = process.channels or {}
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

    def record_and_deliver(self, message: Message, exclude: Pid | None) -> None:
        if message[1] in self.histories:
            self.histories[message[1]].add(message)
        self.deliver(message, exclude)

    def deliver_unrecorded(self, message: Message, exclude: Pid | None) -> None:
        """Delivers a message that is missing in the history, whose earlier positions become invalid."""
        if message[1] in self.histories:
            self.histories[message[1]].forget()
        self.deliver(message, exclude)

    def deliver(self, message: Message, exclude: Pid | None) -> None:
        members = self.channels.get(message[1], set())
        if members:
            self.message_counts[message[1]] += 1
        for process in members - {exclude} if exclude else members:  # does not change meanwhile: `wake` only queues
            process.mailbox.append(message)  # what follows is `Process.deliver`, whose call would be 5 % of a flood
            if process.wake is not None:
                process.wake(process)

    def make_message(self, channel: str, topic: str | bytes, payload: Any) -> Message:
        if not isinstance(topic, str | bytes):
            raise TypeError(f"expected a topic, a string or bytes, got {topic!r}")
        return Message(("nova_pubsub", check_channel(channel), self_pid(), topic, payload))


def local_process(pid: Pid | None) -> Process:
    me = calling_process()
    process = me if pid is None else pid
    if not isinstance(process, Process):
        raise TypeError(f"expected a process of this node, got {pid!r}")
    return process


def check_channel(channel: str) -> str:
    if not isinstance(channel, str):
        raise TypeError(f"expected a channel, a string, got {channel!r}")
    if not channel:
        raise ValueError("expected a channel, got an empty string")
    return channel


pubsub = PubSub()


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses: what a controller takes and what it returns.
# Invariant: no sockets. WSGI's environ comes in, a bottle response goes out.
# ---------------------------------------------------------------------------------------------------------------------

REFUSAL_KEY = "nova_lite.refusal"  # in WSGI's environ: why the request was refused, for the server's log
AUTH_KEY = "nova_lite.auth_data"  # in WSGI's environ: what the `security` of a mount has returned
MAX_FIELDS = 10_000  # of a form
COOKIES_KEY = "nova_lite.cookies"  # in WSGI's environ: those to send, by the room sessions; None: it is too late
_ESCAPE = re.compile(r"\\(?:([0-3][0-7]{2})|(.))")  # in a cookie's value between quotes
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_SUSPECT = re.compile(r"\\u|[0-9][eE]|[0-9]{300}|NaN|Infinity")  # a lone surrogate, or a number that JSON lacks?
_json_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Request(Mapping[str, Any]):
    """What a controller takes: a read-only mapping, computed lazily, that `match` takes apart.

    `method`, `path`, `bindings` (from the route), `params` (the JSON object or form of the body), `json` (any JSON),
    `body` (bytes), `qs` or `parsed_qs` (the query), `headers` (in any case), `cookies`, `peer` (address, port; with
    `trust_proxy` the client's, with port 0 if the proxy hides it), `auth_data` (what `security` returned),
    `subprotocol` (of a WebSocket: the chosen one, or None), `since` (the last position that the client has received of
    a kept channel: its Last-Event-ID, `since` in the query, or None). `body`, `json` and `params` may raise an
    HTTPError: 400, 408 or 413.
    """

    __slots__ = ("_known", "_packed", "environ", "settings")

    def __init__(self, environ: dict[str, Any], bindings: dict[str, Any], settings: Settings = Settings()) -> None:
        if settings.trust_proxy:
            room("proxy").rewrite(environ, settings.trust_proxy)
        self.environ, self.settings = environ, settings
        self._known: dict[str, Any] = {"bindings": bindings, "auth_data": environ.get(AUTH_KEY), "subprotocol": None}

    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = _LAZY_KEYS[key](self)
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **_LAZY_KEYS})

    def __len__(self) -> int:
        return len({**self._known, **_LAZY_KEYS})

    def __repr__(self) -> str:
        return f"<Request {self['method']} {printable(self['path'])}>"

    def set(self, key: str, value: Any) -> None:
        """Sets a key: what the handshake or `security` determines, or what a plugin has for the controller."""
        self._known[key] = value

    def detach(self) -> None:
        """Drops the server's buffers, for a request that outlives its HTTP connection, and packs what remains."""
        strings = {key: _share(value) for key, value in self.environ.items() if type(value) is str}
        keys, values = zip(*{**strings, AUTH_KEY: self.environ.get(AUTH_KEY), COOKIES_KEY: None}.items(), strict=True)
        self._packed = _share(keys) if len(keys) < 64 else keys, values  # a dict would hold 0.5 KiB more a connection
        self._known.pop("headers", None)
        del self.environ

    if not TYPE_CHECKING:  # for a type checker, a request would have any attribute

        def __getattr__(self, name: str) -> Any:
            """Unpacks `environ` when it is needed again after `detach`."""
            if name != "environ":
                raise AttributeError(f"a request has no attribute {name!r}")
            self.environ = dict(zip(*self._packed, strict=True))
            return self.environ

    def set_cookie(self, name: str, value: Any, **options: Any) -> None:
        """Sends a cookie with the response; `options` are those of the function `set_cookie`."""
        room("sessions").set_cookie(self, name, value, **options)

    def get_cookie(self, name: str, secret: str | bytes | None = None) -> Any:
        """Returns a cookie's value, with `secret` that of a signed one; None if it is missing or forged."""
        return room("sessions").get_cookie(self, name, secret)

    def delete_cookie(self, name: str, **options: Any) -> None:
        """Makes the client forget a cookie, for which `path` and `domain` must be those that it was set with."""
        room("sessions").set_cookie(self, name, "", **{**options, "max_age": 0})

    def is_own_origin(self) -> bool:
        """Returns whether the Origin, if any, is allowed. Only browsers have to send one (RFC 6455 §10.2)."""
        origin, allowed = self.environ.get("HTTP_ORIGIN"), self.settings.origins
        if origin is None or allowed == "*":
            return True
        own = f"{self.environ['wsgi.url_scheme']}://{self.environ.get('HTTP_HOST', '')}"
        why = f"in origins={allowed}"
        if allowed is None:
            why = f"{printable(own)}, this host; behind a proxy see trust_proxy, else origins=[…]"
            allowed = rooms["proxy"].list_origins(own, self.environ) if "proxy" in rooms else [own]
        if parse_origin(origin) in {parse_origin(text) for text in allowed} - {None}:
            return True
        self.environ[REFUSAL_KEY] = f"Origin {printable(origin)} is not {why}"
        return False

    def content_type(self) -> str:
        return self.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()


@lru_cache(maxsize=1024)
def _share(value: Any) -> Any:
    """Returns the first of equal values: requests of one program are much alike."""
    return value


class RequestHeaders(bottle.WSGIHeaderDict):
    """The headers of a request, by name in any case. A value is latin-1, whatever its bytes are (PEP 3333)."""

    def __getitem__(self, name: str) -> Any:
        return self.environ[self._ekey(name)]


def printable(text: Any) -> str:
    """Returns a client's text for a line of the log. What could end, erase or forge a line is escaped (CWE-117, -150):
    all that is not printable, backslashes and double quotes."""
    return repr(str(text))[1:-1].replace('"', '\\"')


def _json(req: Request) -> Any:
    is_json = req.content_type() == "application/json" or req.content_type().endswith("+json")
    return parse_json(req["body"]) if is_json and req["body"] else None


def _params(req: Request) -> Mapping[str, Any]:
    if isinstance(req["json"], dict):
        return req["json"]
    try:
        if req.content_type() == "application/x-www-form-urlencoded":
            text = req["body"].decode("utf-8", "replace")
            return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS))
        if req.content_type() == "multipart/form-data":
            body = getattr(rooms.get("http"), "SlicedBytes", BytesIO)(req["body"])  # first: it changes the environ
            own = {key: value for key, value in req.environ.items() if not key.startswith("bottle.")}
            form = dict(bottle.BaseRequest({**own, "wsgi.input": body}).forms.decode())
            "".join([*form, *form.values()]).encode()  # some charsets make lone surrogates
            return form
    except (LookupError, TypeError, ValueError):  # an unknown charset, a part without a name, too many fields
        raise HTTPError(400, "the form cannot be read")
    return {}


def _cookies(req: Request) -> dict[str, str]:
    """Returns the cookies that can be read: any page of the domain may have set the others (RFC 6265 §5.4)."""
    cookies = {}
    for pair in req.environ.get("HTTP_COOKIE", "").split(";"):
        # Strips only what browsers strip: after another kind of space, `__Host-id` is not the cookie of that name.
        name, equals, value = (part.strip(" \t") for part in pair.partition("="))
        if len(value) > 1 and value[0] == value[-1] == '"':  # as http.cookies writes it
            value = _ESCAPE.sub(lambda found: found[2] or chr(int(found[1], 8)), value[1:-1])
        if equals and name:
            name, value = (text.encode("latin-1").decode(errors="replace") for text in (name, value))
            cookies[name] = value
    return cookies


_LAZY_KEYS: dict[str, Callable[[Request], Any]] = {
    "method": lambda req: req.environ["REQUEST_METHOD"].upper(),
    "path": lambda req: req.environ.get("SCRIPT_NAME", "") + req.environ["PATH_INFO"],
    "params": _params,
    "json": _json,
    "body": lambda req: read_body(req.environ, req.settings.max_body),
    "qs": lambda req: dict(parse_qsl(req.environ.get("QUERY_STRING", ""), keep_blank_values=True)),
    "parsed_qs": lambda req: req["qs"],
    "headers": lambda req: RequestHeaders(req.environ),
    "cookies": _cookies,
    "peer": lambda req: (req.environ.get("REMOTE_ADDR", ""), int(req.environ.get("REMOTE_PORT") or 0)),
    "since": lambda req: req.environ.get("HTTP_LAST_EVENT_ID") or req["qs"].get("since"),
}


def parse_origin(text: Any) -> tuple[str, str, int] | None:
    """Returns (scheme, host, port) in normal form, or None for what is not scheme://host[:port] (RFC 6454 §6.2)."""
    match = _ORIGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match[3] or 0) > 65535:
        return None
    scheme = match[1].lower()
    return scheme, match[2].lower(), int(match[3] or {"http": 80, "https": 443}.get(scheme, 0))


def read_body(environ: dict[str, Any], limit: int) -> bytes:
    """Returns the body, which bottle's `request` may read again.

    Raises HTTPError: 413 over `limit` bytes, 400 if it is cut off, 408 (with the room http) if it takes too long.
    """
    file = environ.get("bottle.request.body")
    if file is None or getattr(file, "is_unread", False):  # the room http's, which no hook has read
        file = environ.get("wsgi.input")
    else:  # a hook has read it
        file.seek(0)
    chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    try:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        is_wanted = chunked or 0 < length <= limit
        body = file.read(limit + 1 if chunked else length) if is_wanted else b""  # type: ignore[union-attr]
    except HTTPError:  # of the room http, which may be an OSError, too: 400, 408 or 413
        raise
    except (AttributeError, OSError, ValueError):
        raise HTTPError(400, "the body could not be read")
    size = max(length, len(body))
    if size > limit:
        environ["CONTENT_LENGTH"] = str(size)  # so that the next reader gets the same answer
        raise HTTPError(413, f"the body is larger than {limit} bytes")
    if len(body) < length or length < 0:
        raise HTTPError(400, "the body was cut off")
    # From here on bottle reads it as any other body of a known length.
    for key in ("HTTP_TRANSFER_ENCODING", "bottle.request.body"):
        environ.pop(key, None)
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = BytesIO(body), str(len(body))
    return body


def parse_json(body: bytes) -> Any:
    """Returns the value of a JSON text (RFC 8259). Raises HTTPError 400 for one that could not be encoded again."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if _SUSPECT.search(text):
            _json_encoder.encode(value).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise HTTPError(400, f"invalid JSON: {reason}") from None


def to_response(result: Any, method: str = "GET", name: str = "") -> HTTPResponse:
    """Returns a controller's result as a response; `name` is the default view. Raises ValueError for any other value.

    A trailing request is accepted, as in Nova. The room `views` makes responses of templates and files.
    """
    match result:  # nova_lite needs Python 3.10 or later: an older one stops here, and shows this line
        case HTTPResponse():
            return result
        case (*form, Request()):
            return to_response(tuple(form), method, name)
        case ("json", data):
            return json_response(201 if method == "POST" else 200, {}, data)
        case ("json", status, headers, data) | ("status", status, headers, dict() as data):
            return json_response(status, headers, data)
        case ("status", status, *headers) if len(headers) < 2:
            return make_response(status, *(headers or [{}]))
        case ("status", status, headers, str() | bytes() as body):
            return make_response(status, headers, body)
        case ("redirect", str(url)):
            return make_response(302, {"Location": url})
        case ("ok" | "view" | "sendfile", *_):
            return room("views").to_response(result, name)
    raise ValueError(f'not a response: {result!r}; expected ("json", data), ("status", status, headers, body), ...')


def make_response(status: Any, headers: Any, body: Any = None) -> HTTPResponse:
    """Returns a response. Raises ValueError unless a final one may begin like this: 100 to 199 belong to the server.

    A status of 400 or more without a body becomes bottle's HTTPError, so that error pages apply, as in Nova.
    """
    if not (isinstance(status, int) and 200 <= status <= 999 and isinstance(headers, Mapping)):
        raise ValueError(f"expected a status from 200 to 999 and a dict of headers, got {status!r}, {headers!r}")
    response = HTTPError(status) if body is None and status >= 400 else HTTPResponse(body or b"", status)
    if headers:
        response.headers.update(headers)
    return response


def json_response(status: Any, headers: Any, data: Any) -> HTTPResponse:
    try:
        response = make_response(status, headers, _json_encoder.encode(data).encode())
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError((rooms["checks"].explain_json(data) if "checks" in rooms else "") or error) from None
    response._headers.setdefault("Content-Type", ["application/json"])
    return response


def error_body(status_line: str, text: str, accept: str) -> tuple[str, bytes]:
    """Returns (content type, body) of an error, in the form that the client accepts: a small page, or JSON."""
    if "text/html" in accept.lower():
        title, text = bottle.html_escape(status_line), bottle.html_escape(text)
        plain = f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1><p>{text}</p>\n"
        page = rooms["views"].error_page(title, text) if "views" in rooms else plain
        return "text/html; charset=utf-8", page.encode("utf-8", "replace")
    return "application/json", json.dumps({"error": text}).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Frames: RFC 6455 as pure functions and one incremental parser.
# Invariant: no I/O and no greenlets; bytes in, values out.
# ---------------------------------------------------------------------------------------------------------------------

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA  # §5.2
NO_STATUS = 1005  # §7.1.5: stands for a close frame without a code; never on the wire

_NAMES = {BINARY: "binary", PING: "ping", PONG: "pong"}
_TRANSLATE_FROM = 1_000  # bytes from which translating beats one big integer
_xor_table = cache(lambda key: bytes(byte ^ key for byte in range(256)))


class Close(Exception):
    """Raised, or sent as an exit reason, to close a connection: code (None: no frame), text, reason for `terminate`."""

    def __init__(self, code: int | None, text: str, reason: Any) -> None:
        super().__init__(code, text, reason)
        self.code, self.text, self.reason = code, text, reason


def protocol_error(code: int, text: str) -> Close:
    """Returns the Close for bytes that no client may send; its reason has Cowboy's word for them."""
    return Close(code, text, ("error", {1007: "badencoding", 1009: "badsize"}.get(code, "badframe")))


def unmask_in_python(data: bytes, mask: bytes) -> bytes:
    """Returns `data` XOR the client's mask (§5.3)."""
    size = len(data)
    if size < _TRANSLATE_FROM:
        key = (mask * ((size + 3) >> 2))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")
    result = bytearray(data)
    for offset, key_byte in enumerate(mask):
        result[offset::4] = result[offset::4].translate(_xor_table(key_byte))
    return bytes(result)


unmask: Callable[[bytes, bytes], bytes] = unmask_in_python
_ACCELERATORS: dict[str, Callable[[Any], Any]] = {  # 64 KiB take 1.3 µs and 36 µs; in pure Python 72 µs
    "websockets.speedups": lambda module: module.apply_mask,
    "wsaccel.xormask": lambda module: lambda data, mask: module.XorMaskerSimple(mask).process(data),
}


@cache
def accelerate() -> None:
    """Replaces `unmask` by the fastest routine in C that is installed. Logs which one it is."""
    global unmask
    for name, find in _ACCELERATORS.items():
        with suppress(ImportError):
            unmask = find(importlib.import_module(name))
            break
    log.debug("frames are unmasked by %s", "pure Python" if unmask is unmask_in_python else name)


def make_frame(opcode: int, data: bytes) -> bytes:
    """Returns an unmasked, final frame (§5.2)."""
    size = len(data)
    if size < 126:
        return bytes((0x80 | opcode, size)) + data
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + data
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + data


def is_close_code(code: int) -> bool:
    """Returns whether an endpoint may send it (§7.4.1, and IANA's registry)."""
    return code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def close_frame(code: int, reason: str = "") -> bytes:
    """Returns a close frame. A reason over 123 bytes ends at a character; NO_STATUS leaves the body empty (§5.5.1)."""
    text = reason.encode()[:123].decode("utf-8", "ignore").encode()
    body = b"" if code == NO_STATUS else code.to_bytes(2, "big") + text
    return make_frame(CLOSE, body)


def encode_frame(frame: Any) -> bytes:
    """Returns a handler's frame as bytes. Raises ValueError for what is not a frame."""
    match frame:
        case ("text", text) if isinstance(text, str):  # not str(text), which takes half a microsecond
            return make_frame(TEXT, text.encode())
        case ("binary", bytes() | bytearray() | memoryview() as data):
            return make_frame(BINARY, bytes(data))
        case ("ping" | "pong" as name, bytes(data)) if len(data) <= 125:
            return make_frame(PING if name == "ping" else PONG, data)
        case "ping" | "pong":
            return encode_frame((frame, b""))
        case ("close", int(code), str(reason)) if is_close_code(code):
            return close_frame(code, reason)
        case "close":
            return close_frame(NO_STATUS)
    raise ValueError(
        f'not a frame: {frame!r}; a frame is ("text", str), ("binary", bytes), ("close", code, reason), ...'
    )


class Parser:
    """Turns a client's bytes, in any portions, into frames. A message is one frame, whatever its fragments.

    Data is checked and unmasked as it arrives, so that the first bad byte fails. It is held in one buffer of at most
    `limit` bytes; only heads and control frames, up to 139 bytes, are kept to be parsed again.
    """

    __slots__ = ("decoder", "done", "final", "left", "limit", "mask", "message", "opcode", "tail")

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.tail = b""  # the start of a frame that is not complete yet
        self.left, self.mask, self.final = 0, b"", False  # of the current data frame: bytes to come, key, FIN
        self.done = False  # after a close frame or a failure: the rest is ignored
        self.reset()

    def reset(self) -> None:
        """Releases the message that has begun: its opcode, or 0; what has arrived of it; the check for UTF-8."""
        self.opcode, self.message, self.decoder = 0, b"", None  # type: int, Any, Any

    def feed(self, data: bytes) -> list[Any]:
        """Returns the frames that `data` completes, and last a Close if a violation follows them."""
        frames: list[Any] = []
        data, position = self.tail + data, 0
        try:
            while position < len(data) and not self.done:
                after = self._payload(data, position, frames) if self.left else self._frame(data, position, frames)
                if after == position:
                    break
                position = after
        except (Close, UnicodeDecodeError) as error:
            self.done = True
            self.reset()
            # A new Close: the frames of a traceback would hold this parser.
            bad_text = protocol_error(1007, "a text that is not UTF-8")  # §8.1
            frames.append(Close(*error.args) if isinstance(error, Close) else bad_text)
        self.tail = b"" if self.done else data[position:]
        return frames

    def _frame(self, data: bytes, position: int, frames: list[Any]) -> int:
        """Parses the frame at `position` as far as it has arrived. Returns its end, or `position` to wait for more."""
        available = len(data)
        if available - position < 2:
            return position
        first, second = data[position], data[position + 1]
        opcode, size, start = first & 0x0F, second & 0x7F, position + 6
        is_message = 0 < first - 0x80 < 3 and second > 0x7F and not self.opcode  # in one frame, as nearly always
        if not is_message:
            self.check_start(first, second)
        if size > 125:
            width = 2 if size == 126 else 8
            start += width
            if available < start - 4:
                return position
            size = int.from_bytes(data[position + 2 : start - 4], "big")
            if size < (126 if width == 2 else 65536) or size >> 63:
                raise protocol_error(1002, "a length that is not in its shortest form")  # §5.2
        if opcode < CLOSE and size + len(self.message) > self.limit:
            raise protocol_error(1009, f"a message over {self.limit} bytes")
        end = start + size
        if end <= available and (is_message or opcode >= CLOSE):
            frames.append(self._decode(opcode, unmask(data[start:end], data[start - 4 : start])))
            return end
        if available < start or opcode >= CLOSE:
            return position
        if not self.opcode:
            self.opcode, self.message = opcode, bytearray()
        self.left, self.mask, self.final = size, data[start - 4 : start], first > 0x7F
        return self._payload(data, start, frames)

    def check_start(self, first: int, second: int) -> None:
        """Raises Close for a frame that may not start with these bytes."""
        opcode = first & 0x0F
        if first & 0x70:
            raise protocol_error(1002, "reserved bits without an extension")  # §5.2
        if opcode & 0x07 > 2:
            raise protocol_error(1002, f"unknown opcode {opcode}")  # §5.2
        if second < 0x80:
            raise protocol_error(1002, "a client's frame without a mask")  # §5.1
        if opcode >= CLOSE and not (first > 0x7F and second & 0x7F <= 125):
            raise protocol_error(1002, "a control frame in fragments or over 125 bytes")  # §5.5
        if opcode < CLOSE and (opcode == CONTINUATION) != bool(self.opcode):
            raise protocol_error(1002, "a fragment out of order")  # §5.4

    def _payload(self, data: bytes, position: int, frames: list[Any]) -> int:
        """Takes what has arrived of a data frame's payload. Returns the position after it."""
        part = unmask(data[position : position + self.left], self.mask)
        offset = len(part) & 3
        self.left, self.mask = self.left - len(part), self.mask[offset:] + self.mask[:offset]
        ends = self.final and not self.left
        self.add_part(part, ends)
        if ends:
            frames.append(self._decode(self.opcode, self.message))
            self.reset()
        return position + len(part)

    def add_part(self, part: bytes, ends: bool) -> None:
        """Adds an unmasked part to the message; `ends` marks the last one. Raises UnicodeDecodeError or Close."""
        self.message += part
        if self.opcode != TEXT or ends or (self.decoder is None and part.isascii()):  # `_decode` checks it all again
            return
        self.decoder = self.decoder or codecs.getincrementaldecoder("utf-8")()
        self.decoder.decode(part)
        if b"\xed\xa0" <= self.decoder.getstate()[0] < b"\xee":
            raise protocol_error(1007, "half a surrogate pair")  # the decoder would wait for its third byte

    def _decode(self, opcode: int, body: Any) -> tuple[Any, ...]:
        if opcode == TEXT:
            return "text", body.decode()
        if opcode != CLOSE:
            return _NAMES[opcode], bytes(body)
        self.done = True
        if not body:
            return "close", NO_STATUS, ""
        code = int.from_bytes(body[:2], "big")
        if len(body) < 2 or not is_close_code(code):
            raise protocol_error(1002, "a close code that no client may send")  # §7.4
        return "close", code, body[2:].decode()


# ---------------------------------------------------------------------------------------------------------------------
# Connections: a WebSocket or an event stream, from its `init` to its last byte.
# Invariant: only this room touches a connection's socket, and `flush` and `writable` alone write to it.
#
#   in    The socket is readable: a hub callback reads, parses, and fills the inbox. No greenlet waits for a client.
#   out   A turn handles inbox and mailbox, and writes all replies with one send. What the socket does not take waits in
#         `write_buffer`, with a write watcher; until that is empty the process handles nothing more.
#
#   phase     what happens                                           next
#   STARTING  `init` runs, the server sends the 101; no socket       OPEN by `open`, CLOSED when the process ends
#   OPEN      turns                                                  CLOSING by `cleanup`, CLOSED by `abort`
#   CLOSING   `terminate` runs; the client's close is awaited        CLOSED by `abort`, after LINGER at the latest
#   CLOSED    no socket; `terminate` may still run
# ---------------------------------------------------------------------------------------------------------------------

REGISTRY_KEY, UPGRADING_KEY = "nova_lite.registry", "nova_lite.upgrading"  # in WSGI's environ: see `run_application`
STARTING, OPEN, CLOSING, CLOSED = "starting", "open", "closing", "closed"
READ_SIZE = 65536  # bytes per read or send, so that one client's flood leaves room for the others
SMALL_READ = 4096  # bytes per read of a client whose bytes take long to parse: tiny frames, or compressed ones
LONG_MAILBOX = 1_000  # messages, from which a connection's mailbox is a deque and no list
TURN_TIME = 0.007  # seconds after its time slice, when a turn ends: 64 broadcasts to 1,000, in one piece, take 5 ms
REFUSALS = (1002, 1007, 1008, 1009, 1013)  # close codes for a client that breaks the protocol or exceeds a limit
LINGER = 5.0  # seconds that a closed connection waits for the client to close as well
CACHED_FRAMES, CACHED_BYTES = 256, 1_000_000  # of broadcasts: a flood on 64 channels still finds its frames


class WebSocketHandler:
    """The callbacks of a connection, one instance each (nova_websocket). All run in the connection's own process.

    They return ("ok", state), ("reply", frame or [frame, ...], state) or ("stop", state), with or without a trailing
    "hibernate", or plain "ok". A frame is ("text", str), ("binary", bytes), ("ping", bytes), ("pong", bytes),
    ("close", code, reason), or a bare "ping", "pong", "close".

    Optional: `websocket_init(state)`, after the 101, and `terminate(reason, req, state)` with one of Cowboy's reasons:
    "stop", "timeout", "remote", ("remote", code, reason), ("error", what), ("crash", class, exception), or an exit
    signal's ("shutdown" when the server drains).
    """

    def init(self, state: Any, /) -> tuple[str, Any]:
        """Runs before the 101; `state` has "req" and "auth_data". Anything but ("ok", state) refuses with a 500."""
        return "ok", state

    def websocket_handle(self, frame: "ClientFrame", state: Any, /) -> "InferredResult":
        """Handles a frame from the client: text, binary, ping (already answered) or pong."""
        return "ok", state

    def websocket_info(self, info: Any, state: Any, /) -> "InferredResult":
        """Handles a message from another process."""
        return "ok", state


class FrameCache(dict[Any, bytes]):
    """The encoded frames of recent broadcasts: each is encoded, and compressed, once for all receivers."""

    size = 0  # bytes

    def add(self, frame: Any, data: bytes) -> None:
        if type(frame[1]) not in (str, bytes):  # a memoryview's bytes may change
            return
        if len(self) >= CACHED_FRAMES or self.size > CACHED_BYTES:
            self.clear()
            self.size = 0
        self[frame] = data
        self.size += len(data) + sys.getsizeof(frame[1])


class Stream(Process):
    """A connection's process: an io watcher and a descriptor, but no greenlet and no HTTP handler while it waits."""

    __slots__ = (
        "excess", "handler", "idle_for", "inbox", "inbox_bytes", "init_waiter", "input_over", "outgoing", "phase",
        "read_size", "reader", "registry", "req", "settings", "sock", "stalled_for", "state", "write_buffer", "writer",
    )  # fmt: skip
    STATUS = 200  # of the response after which the server calls `open`
    MAX_READ = READ_SIZE + 14  # bytes per read of a client whose bytes are quickly parsed: 64 KiB and a frame's head
    shared: FrameCache | None = None  # results of `encode`; None if what is sent depends on more than the frame

    def __init__(self, handler: Any, req: Request, settings: Settings, registry: ConnectionRegistry) -> None:
        self.handler = handler() if isinstance(handler, type) else handler  # may raise: not a process yet
        super().__init__()
        self.mailbox: Any = []  # a deque once it is long: an empty deque would hold 0.7 KiB a connection
        self.req, self.settings, self.registry = req, settings, registry
        self.phase = STARTING
        self.state: Any = {"req": req, "auth_data": req["auth_data"]}
        self.init_waiter: Alias | None = None  # the caller of `start`; None after `init`
        self.sock: Any = None  # non-blocking
        self.reader: Any = None  # watcher; active unless reading is paused
        self.read_size = SMALL_READ  # bytes per read
        self.writer: Any = None  # watcher; None while `write_buffer` is empty
        self.write_buffer: Any = b""  # bytes that the socket has not taken yet
        self.outgoing: list[bytes] = []  # frames of this turn
        self.inbox: list[Any] = []  # frames from the client, "$init" before them, a Close after them
        self.inbox_bytes = 0  # bytes, about, received since the inbox was empty
        self.input_over = False  # the client has closed, disconnected or broken the protocol
        self.idle_for = 0.0  # seconds without a byte from the client
        self.stalled_for = 0.0  # seconds in which the client has taken nothing of `write_buffer`
        self.excess = 0  # messages over the mailbox's limit at the last check

    def parse(self, data: bytes) -> Any:
        """Returns a list of what `data` completes, for the inbox. Sets `input_over` if nothing can follow."""

    def encode(self, frame: Any) -> Any:
        """Returns a frame as bytes. Raises ValueError for what is not a frame."""

    # -- starting

    def start(self) -> bool:
        """Runs `init` in the new process. Returns whether it returned ("ok", state)."""
        scheduler.bind_thread()
        self.registry.add(self)  # it counts before `init` has returned: many clients may connect together
        init_waiter = self.init_waiter = Alias()
        enqueue(self)
        try:
            return send_and_wait(self, init_waiter, None) == "ok"
        except BaseException:  # the caller has ended: nothing else would open the connection
            self.kill("killed")
            raise

    def _init(self, init_waiter: Alias) -> None:
        match self.handler.init(self.state):
            case ("ok", state):
                self.state, self.init_waiter = state, None
            case result:
                raise ValueError(f'{self.role()}.init returned {result!r}; expected ("ok", state)')
        init_waiter.send("ok")
        self.reschedule()

    def open(self, sock: Any, early: bytes) -> None:
        """Takes over the socket after the 101, and the bytes that followed the handshake."""
        if self.exiting is not None:
            sock.close()
            return
        self.phase, self.sock = OPEN, sock
        self.reader = scheduler.hub.loop.io(sock.fileno(), 1)
        self.reader.start(self.readable)
        if hasattr(self.handler, "websocket_init"):
            self.inbox.append("$init")
        if early:
            self._receive_bytes(early)
        enqueue(self)

    # -- a turn

    def step(self) -> None:
        if self.init_waiter is not None:
            self._init(self.init_waiter)
            return
        if self.inbox and not self.write_buffer:
            self._handle_inbox()
        if self.mailbox and not self.write_buffer and self.exiting is None:
            self._handle_mailbox()
        scheduler.unsent.append(self)

    def end_turn(self) -> None:
        try:
            self.flush()
        except BaseException as error:  # in no turn: it ends this process in the next one, and no other
            self.exiting = error  # type: ignore[assignment]
        self.reschedule()

    def _handle_mailbox(self) -> None:
        handler, mailbox, outgoing, shared = self.handler, self.mailbox, self.outgoing, self.shared
        size, done, deadline = 0, 0, scheduler.deadline + TURN_TIME
        while True:
            info, done = mailbox[0], done + 1
            del mailbox[0]
            result = handler.websocket_info(info, self.state)
            # A single frame is queued here, by type and not by pattern: a flood costs a fifth less.
            if (
                type(result) is tuple and len(result) == 3 and result[0] == "reply"
                and type(result[1]) is tuple and shared is not None
            ):  # fmt: skip
                _, frame, self.state = result
                try:
                    data = shared[frame]
                except (KeyError, TypeError, ValueError):  # not in the cache, or has no hash, as a bytearray
                    size += self._queue_frame(frame)
                    shared.add(frame, outgoing[-1])
                else:
                    outgoing.append(data)
                    size += len(data)
            else:
                size += self.handle_result(result, info, "websocket_info")
            if not mailbox or size > READ_SIZE or self.write_buffer or self.exiting is not None:
                break  # the rest waits in the mailbox, where it is counted, and not yet encoded
            if not done % 8:
                if monotonic() > deadline:  # checked for each message, it would cost a flood 5 %
                    break
                if len(mailbox) > LONG_MAILBOX and type(mailbox) is list:  # whose `del` moves all that follow
                    mailbox = self.mailbox = deque(mailbox)
        self.handled += done

    def _handle_inbox(self) -> None:
        inbox, size, deadline = self.inbox, 0, scheduler.deadline + TURN_TIME
        for done, frame in enumerate(inbox, 1):  # noqa: B007 -- it is used below
            if type(frame) is not tuple:
                if frame != "$init":
                    raise frame
                size += self.handle_result(self.handler.websocket_init(self.state), None, "websocket_init")
                result = "ok"
            elif frame[0] == "close":
                raise Close(frame[1], "", "remote" if frame[1] == NO_STATUS else ("remote", *frame[1:]))
            else:
                if frame[0] == "ping":
                    self._queue_frame(("pong", frame[1]))
                self.handled += 1
                result = self.handler.websocket_handle(frame, self.state)
            size += self.handle_result(result)
            if size > READ_SIZE or self.write_buffer or self.exiting is not None or monotonic() > deadline:
                break  # the rest waits for the next turn, or until the client has read
        del inbox[:done]
        if not inbox:
            self.inbox_bytes = 0
        if not self.reader.active and not self.should_pause():
            self.reader.start(self.readable)

    def handle_result(self, result: Any, _info: Any = None, callback: str = "websocket_handle") -> int:
        """Keeps the state and queues the frames that a callback returned. Returns their size in bytes."""
        match result:
            case ("reply", frames, state) | ("reply", frames, state, "hibernate"):
                self.state = state
                if isinstance(frames, list):
                    return sum(self._queue_frame(frame, callback) for frame in frames)
                return self._queue_frame(frames, callback)
            case ("ok", state) | ("ok", state, "hibernate"):
                self.state = state
            case ("stop", state) | ("stop", state, "hibernate"):
                self.state = state
                raise Close(1000, "", "stop")
            case "ok":
                pass
            case _:
                expected = '("ok", state), ("reply", frame, state) or ("stop", state)'
                raise ValueError(f"{self.role()}.{callback} returned {result!r}; expected {expected}")
        return 0

    def _queue_frame(self, frame: Any, callback: str = "websocket_info") -> int:
        try:
            data = self.encode(frame)
        except ValueError as error:
            raise ValueError(f"{self.role()}.{callback} replied with what is {error}") from None
        self.outgoing.append(data)
        if frame == "close" or frame[0] == "close":
            raise Close(None, "", "stop")  # None: the handler's own close frame is queued
        return len(data)

    def reschedule(self) -> None:
        if (self.write_buffer or self.phase is STARTING) and self.exiting is None:
            self.wake = _apply_overflow
        elif self.inbox or self.mailbox or self.exiting is not None:
            enqueue(self)
        else:
            self.wake = enqueue

    def before_blocking(self) -> None:
        if self.phase is OPEN:
            self.flush()

    # -- reading and writing

    def readable(self) -> None:
        """Reads once. The hub calls it when the client has sent something, or is gone."""
        try:
            data = self.sock.recv(self.read_size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.idle_for = 0.0
        if self.phase is OPEN:
            start = monotonic() if len(data) >= SMALL_READ else inf
            self._receive_bytes(data)
            if self.wake is enqueue:
                enqueue(self)
            self.read_size = SMALL_READ if start < inf and monotonic() - start > TIME_SLICE / 3 else self.MAX_READ
        elif not data:
            self.abort()
        else:
            self.parse(data)  # only for the client's close frame
            self._half_close()

    def _receive_bytes(self, data: bytes) -> None:
        self.inbox += self.parse(data)
        if not data:
            self.input_over = True
            self.inbox.append(Close(None, "", ("error", "closed")))
        if self.should_pause():
            self.reader.stop()

    def should_pause(self) -> bool:
        """Returns whether the client has to wait for the handler, or has no more to say."""
        inbox, settings = self.inbox, self.settings
        too_much = self.inbox_bytes > settings.max_message_size and inbox
        return bool(too_much or len(inbox) >= settings.backlog or self.input_over)

    def flush(self) -> None:
        """Writes the turn's frames with one send. What the socket does not take waits in `write_buffer`."""
        if not self.outgoing:
            return
        data = b"".join(self.outgoing)  # not a copy if there is one
        self.outgoing.clear()
        if self.write_buffer:
            self.write_buffer = bytes(self.write_buffer) + data
        elif (sent := self._send(data)) < len(data):
            self.write_buffer, self.stalled_for = memoryview(data)[sent:], 0.0
            self.writer = scheduler.hub.loop.io(self.sock.fileno(), 2)
            self.writer.start(self.writable)

    def _send(self, data: Any) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # the client is gone; `readable` is about to see it, too

    def writable(self) -> None:
        """Writes what waits in `write_buffer`. The hub calls it when the socket takes bytes again."""
        if sent := self._send(self.write_buffer):
            self.write_buffer, self.stalled_for = self.write_buffer[sent:], 0.0
        if self.write_buffer:
            return
        self.writer.close()
        self.write_buffer, self.writer = b"", None
        if self.phase is CLOSING:
            self._half_close()
        elif self.wake is _apply_overflow:
            self.reschedule()

    def check_timeouts(self, seconds: float) -> None:
        """Ends the connection if a limit is exceeded; pings after a silence. The hub calls it every so many seconds."""
        if self.phase not in (OPEN, CLOSING):
            return
        settings = self.settings
        paused = not self.reader.active and not self.input_over  # by ourselves: the client is not to blame
        before, self.idle_for = self.idle_for, 0.0 if paused else self.idle_for + seconds
        excess, self.excess = self.excess, len(self.mailbox) - settings.mailbox_limit if self.write_buffer else 0
        is_falling_behind = 0 < excess < self.excess  # at two checks in a row, and growing: one burst is fine
        self.stalled_for += seconds
        if self.phase is CLOSING:
            if self.stalled_for > LINGER:
                self.abort()
        elif self.write_buffer and (self.stalled_for > settings.send_timeout or is_falling_behind):
            self.registry.slow_closed += 1
            self.interrupt(SLOW)
        elif self.idle_for > settings.idle_timeout:
            self.interrupt(IDLE)
        elif before // settings.ping_interval < self.idle_for // settings.ping_interval:
            self.outgoing.append(self.encode("ping"))  # between turns: a busy process keeps its client, too
            self.flush()

    # -- closing

    def cleanup(self, error: BaseException) -> Any:
        if self.init_waiter is not None:
            return self.log_crash(error, f"{self.role()}.init")
        close = self._close_for(error)
        close.__traceback__ = None  # its frames hold it: 3 KiB a connection until the next garbage collection
        if self.phase is OPEN:
            self._start_close(close)
        text = f" ({close.code} {close.text})" if close.text else ""
        level = logging.WARNING if close.code in REFUSALS else logging.INFO
        log.log(level, "%r%s closed: %r%s", self, self.title(), close.reason, text)
        if hasattr(self.handler, "terminate"):
            self.handler.terminate(close.reason, self.req, self.state)
        if isinstance(error, ProcessExit) and not isinstance(error.reason, Close):
            return error.reason
        return "normal" if close.reason[0] != "crash" else error

    def _close_for(self, error: BaseException) -> Close:
        """Returns how to close after `error` has ended a turn."""
        cause = error.reason if isinstance(error, ProcessExit) else error
        if isinstance(cause, Close):
            return cause
        if isinstance(error, ProcessExit):
            return Close(1001 if is_normal(cause) else 1011, "", cause)
        self.log_crash(error, f"{self.role()}.{failing_callback(error)}".rstrip("."))
        return Close(1011, "", ("crash", type(error), error))

    def role(self) -> str:
        return getattr(self.handler, "__name__", type(self.handler).__name__)  # a module, or an instance

    def title(self) -> str:
        return " {} {}:{}".format(printable(self.req["path"]), *self.req["peer"])

    def _start_close(self, close: Close) -> None:
        """Sends what is queued and the close frame. After that, the hub's callbacks alone handle the socket."""
        if close.code is not None and self.STATUS == 101:
            self.outgoing.append(close_frame(close.code, close.text))
        self.flush()
        self.phase, self.stalled_for, self.inbox = CLOSING, 0.0, []
        if close.reason == ("error", "closed"):
            self.abort()
            return
        if not self.reader.active:
            self.reader.start(self.readable)
        self._half_close()

    def _half_close(self) -> None:
        """Shuts down writing once both sides have closed, then reads to the end (§7.1.1)."""
        if self.input_over and not self.write_buffer:  # closing with unread data could lose our close frame
            with suppress(OSError):  # the client is gone; `readable` is about to see it
                self.sock.shutdown(_socket.SHUT_WR)

    def abort(self) -> None:
        """Closes the socket, whatever remains to be sent."""
        if self.sock is not None:
            for watcher in (self.reader, self.writer):
                if watcher is not None:
                    watcher.close()
            self.sock.close()
            self.sock = self.reader = self.writer = None
            self.write_buffer = b""  # freed now: a program that keeps the pid keeps this object
        self.phase = CLOSED
        if self.mailbox is DEAD_MAILBOX:
            self.registry.connections.discard(self)

    def finish(self, reason: Any) -> None:
        super().finish(reason)
        if self.phase is not CLOSING:  # CLOSED in `terminate`, or never OPEN, or `cleanup` has failed
            self.abort()


class Connection(Stream):
    """A WebSocket (RFC 6455)."""

    __slots__ = ("parser",)
    STATUS = 101
    shared = FrameCache()
    encode = staticmethod(encode_frame)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parser = Parser(self.settings.max_message_size)

    def parse(self, data: bytes) -> list[Any]:
        frames = self.parser.feed(data)
        self.inbox_bytes += len(data)
        self.input_over = self.parser.done
        return frames

    def abort(self) -> None:
        super().abort()
        self.parser.reset()


class EventStream(Stream):
    """A response whose body is the handler's replies, as server-sent events (HTML standard, §9.2).

    The client sends nothing, and its silence means nothing: one that is gone shows when writing fails or stalls.
    """

    __slots__ = ()
    KEEPALIVE = 15.0  # seconds between pings, at most: proxies disconnect a silent stream
    RETRY = 1_000, 4_000  # milliseconds after which a client reconnects; random, since many may have lost their server

    def __init__(self, handler: Any, req: Request, settings: Settings, registry: ConnectionRegistry) -> None:
        interval = min(settings.ping_interval, self.KEEPALIVE)
        super().__init__(handler, req, replace(settings, ping_interval=interval, idle_timeout=inf), registry)

    def open(self, sock: Any, early: bytes) -> None:
        self.outgoing.append(self.preamble())  # immediately: only then does Firefox fire `open`
        super().open(sock, early)

    def preamble(self, fields: bytes = b"") -> bytes:
        return f"retry: {random.randint(*self.RETRY)}\n".encode() + (fields or b"\n")

    def parse(self, _data: bytes) -> list[Any]:
        return []

    def encode(self, frame: Any) -> bytes:
        """Returns a text as an event, a ping or pong as a comment. Raises ValueError for anything else."""
        match frame:
            case ("text", text) if isinstance(text, str):
                lines = re.split("\r\n|\r|\n", text)
                return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
            case "ping" | "pong" | ("ping" | "pong", _):
                return b":\n\n"
            case "close" | ("close", _, _):
                return b""
        raise ValueError(f"not an event: {frame!r}")

    def _start_close(self, close: Close) -> None:
        self.input_over = True  # there is no close frame to wait for
        super()._start_close(close)


SLOW = Close(1013, "too slow", ("error", "slow"))  # this one and IDLE are exit reasons that `check_timeouts` sends
IDLE = Close(1000, "idle", "timeout")


def _apply_overflow(connection: Stream) -> None:
    """Applies `on_slow`. It is `wake`, called for each message, while the socket takes nothing or is not there yet."""
    policy, mailbox = connection.settings.on_slow, connection.mailbox
    if policy != "close" and len(mailbox) > connection.settings.mailbox_limit:
        at = 0 if policy == "drop_oldest" else -1
        if type(mailbox[at]) is Message:  # a DOWN, an EXIT or a timer is not lost
            del mailbox[at]
            connection.registry.dropped += 1


registries: weakref.WeakSet[ConnectionRegistry] = weakref.WeakSet()


class ConnectionRegistry:
    """The connections of a server, with one timer for the time limits of all."""

    def __init__(self, limit: int) -> None:
        accelerate()
        self.limit = limit  # connections
        self.leaving = False  # whether the server is asked to stop, but still serves for SHUTDOWN_DELAY
        self.draining = False
        self.slow_closed = 0  # connections whose client did not read
        self.dropped = 0  # messages, for clients that did not read
        self.logged, self.logged_drops = -60.0, 0  # when drops were logged last, and how many there were then
        self.connections: set[Stream] = set()
        self.interval = 1.0  # seconds; a quarter of the shortest limit, at most this
        self.timer: Any = None  # None while there are no connections
        registries.add(self)

    def add(self, connection: Stream) -> None:
        settings = connection.settings
        shortest = min(settings.idle_timeout, settings.ping_interval, settings.send_timeout, LINGER)
        self.interval = min(self.interval, shortest / 4)
        self.connections.add(connection)
        if self.timer is None:
            self._start_timer()

    def _start_timer(self) -> None:
        self.timer = scheduler.hub.loop.timer(self.interval) if self.connections else None
        if self.timer is not None:
            self.timer.start(self._check_timeouts, self.interval)

    def _check_timeouts(self, seconds: float) -> None:
        self.timer.close()
        self._start_timer()
        for connection in list(self.connections):
            connection.check_timeouts(seconds)
        if self.dropped > self.logged_drops and monotonic() - self.logged >= 60:
            log.warning("%d messages dropped for clients that do not read", self.dropped - self.logged_drops)
            self.logged, self.logged_drops = monotonic(), self.dropped


# ---------------------------------------------------------------------------------------------------------------------
# Nova: routes to bottle, security, the gate before the 101.
# Invariant: a route is data, and is checked when the application is made.
# ---------------------------------------------------------------------------------------------------------------------

EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_BOTTLES_FORM = vars(bottle.BaseRequest)["POST"].getter.__code__
_REST = "rest_of_the_path"  # bottle's name for the binding "..."
GROUP_KEYS, ROUTE_OPTIONS = {"plugins", "prefix", "routes", "security"}, {"methods", "protocol"}  # rooms add theirs


class Nova(bottle.Bottle):
    """An application made of groups of routes. It is a `bottle.Bottle` and can do what that can.

    A group is {"routes": [(path, controller[, options])], "prefix", "security", "plugins"}. A controller is a function
    of `req`, or, with {"protocol": "ws"}, a handler: a class, a module or any object with the callbacks. Options are
    "methods" (a list; "_" is any), "protocol" ("http" or "ws"), and the names in `Settings`, which `Nova` takes for all
    routes. Raises ValueError for unknown keys and options.

    A route (404, controller) makes the page for that status, from 400 to 599. `plugins` are bottle's, or Nova's: tuples
    ("pre_request" or "post_request", plugin, options). A group with Nova's does not have those for all.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]] = (), *, plugins: Iterable[Any] = (), **settings: Any
    ) -> None:
        super().__init__()
        self.settings = _settings("Nova", Settings(), settings)
        self.plugins.insert(0, SimpleNamespace(apply=lambda *args: partial(_call_outermost, *args)))
        if plugins:
            room("plugins").install(self, plugins)
        for group in [groups] if isinstance(groups, Mapping) else groups:
            self.add(group)

    def add(self, group: Mapping[str, Any]) -> None:
        """Adds a group of routes. Raises ValueError for unknown keys and options."""
        if "checks" in rooms:
            rooms["checks"].check_group(self, group, _rule)
        if unknown := set(group) - GROUP_KEYS:  # with a misspelt "security", the group would be open
            raise ValueError(f"a group of routes has no {', '.join(sorted(unknown))}")
        if "plugins" in rooms:
            group = rooms["plugins"].prepare(self, group)
        for route in group.get("routes", ()):
            self._add(group, *route)

    def _add(self, group: Mapping[str, Any], path: str, controller: Any, options: Any = ()) -> None:
        if isinstance(path, int) or any(isinstance(plugin, tuple) for plugin in bottle.makelist(group.get("plugins"))):
            room("plugins")  # which would have taken these; raises if it was cut off
        rule, options = _rule(group.get("prefix", ""), path), dict(options)
        settings = {key: value for key, value in options.items() if key not in ROUTE_OPTIONS}
        methods = ["get"] if options.get("protocol") == "ws" else options.get("methods") or ["_"]
        kind = _WebSocketEndpoint if options.get("protocol") == "ws" else _Endpoint
        endpoint = kind(controller, group.get("security", False), _settings(rule, self.settings, settings))
        names = ["ANY" if method == "_" else method.upper() for method in methods]
        self.route(rule, names, endpoint, apply=group.get("plugins", []))

    def endpoint(self, controller: Callable[[Request], Any], security: Any = False) -> Any:
        """Returns a controller in the form that bottle calls."""
        return _Endpoint(controller, security, self.settings)

    def mount(self, prefix: str, app: Any, *, security: Any = False, **options: Any) -> None:
        """Serves a WSGI application below `prefix` (see the room plugins); `options` are those of bottle's `route`."""
        if "plugins" in rooms or security is not False:
            room("plugins").mount(self, prefix, app, security, options)
        else:
            super().mount(prefix, app, **options)

    def run(self, host: str = "127.0.0.1", port: int = 8080, **options: "ext.Unpack[RunOptions]") -> None:
        """Serves the application until SIGINT or SIGTERM; `options` are those of the function `run`."""
        try:
            room("server").run(self, host, port, **options)
        finally:
            self.close()  # its plugins

    def stats(self) -> dict[str, Any]:
        """Returns figures of this node (see the function `stats`)."""
        return room("stats").stats()

    def board(self, path: str = "/board", security: Any = None, logout: str = "") -> None:
        """Adds the board, a page that shows what this node is doing; without `security`, to this machine only."""
        room("board").board(self, path, room("proxy").is_local if security is None else security, logout)

    def metrics(self, path: str = "/metrics", security: Any = False) -> None:
        """Adds figures of all nodes for Prometheus (see the function `metrics`)."""
        room("metrics").metrics(self, path, security)

    def _cast(self, out: Any, peek: Any = None) -> Any:
        """Logs what bottle turns into a 500 without a word: a generator's first step, a body that cannot be encoded."""
        is_plain = type(out) is HTTPResponse and type(out.body) is bytes and not self._hooks["after_request"]
        if is_plain and out._headers is bottle.response._headers and COOKIES_KEY not in bottle.request.environ:
            out._headers.setdefault("Content-Length", [str(len(out.body))])  # 6 % of a request less than bottle's way
            return [out.body] if out.body else []
        is_error = isinstance(out, HTTPError) and out.status_code >= 500
        try:
            if is_error and out.exception and "bottle.exc_info" not in bottle.request.environ:
                raise out.exception
            return super()._cast(out, peek)
        except Exception as error:
            where = bottle.request.method, printable(bottle.request.path)
            log.error("the response to %s %s crashed", *where, exc_info=error)
            return super()._cast(HTTPError(500, exception=error), peek)
        finally:
            if COOKIES_KEY in bottle.request.environ:
                room("sessions").send_cookies(bottle.request.environ)

    def default_error_handler(self, res: HTTPError) -> bytes:
        accept, text = bottle.request.environ.get("HTTP_ACCEPT", ""), str(res.body or res.status_line.partition(" ")[2])
        bottle.response.content_type, body = error_body(res.status_line, text, accept)
        return body


def _settings(where: str, settings: Settings, options: Mapping[str, Any]) -> Settings:
    if "checks" in rooms:
        rooms["checks"].check_settings(where, options)
    for name, needed in {"compress": "deflate", "trust_proxy": "proxy", "rate": "rate", "on_flood": "rate"}.items():
        if options.get(name):
            room(needed).check(options)  # raises here, and not at the first client, if it was cut off
    return replace(settings, **options)


def _rule(prefix: str, path: str) -> str:
    """Returns Nova's path as a rule of bottle: `:id` is `<id>`, and a prefix alone needs no slash after it."""
    segments = [part for part in (prefix.strip("/"), path.lstrip("/")) if part]
    rule = re.sub(r"(?<=/):(\w+)", r"<\1>", "/" + "/".join(segments))
    return re.sub(r"(?<=/)\[\.\.\.\]$", f"<{_REST}:re:.*>", rule)


def name_of(controller: Any) -> str:
    return getattr(controller, "__qualname__", None) or type(controller).__qualname__


class _Endpoint:
    """A controller in the form that bottle calls."""

    def __init__(self, controller: Any, security: Any, settings: Settings) -> None:
        self.controller, self.security, self.settings = controller, security, settings

    def __call__(self, **bindings: Any) -> HTTPResponse:
        req = self.make_request(bindings)
        return self.answer(self.check_security(req) or self.guarded_call(self.controller, req), req)

    def make_request(self, bindings: dict[str, Any]) -> Request:
        if _REST in bindings:
            bindings["..."] = bindings.pop(_REST)
        return Request(bottle.request.environ, bindings, self.settings)

    def check_security(self, req: Request) -> Any:
        """Returns the refusal, or None. Anything but True or (True, data) refuses."""
        answer = self.security is False or self.guarded_call(self.security, req)
        match answer:
            case True:
                return None
            case (True, auth_data):
                req.set("auth_data", auth_data)
                return None
            case (False, Mapping() as headers):
                return "status", 401, headers
            case (False, int(), Mapping(), *body) if len(body) < 2:
                return "status", *answer[1:]
            case ("redirect", _) | HTTPResponse():
                return answer
        if answer is not False and "checks" in rooms:
            rooms["checks"].warn_of_answer(self, answer, req)
        return "status", 401

    def answer(self, result: Any, req: Request) -> HTTPResponse:
        try:
            response = to_response(result, req["method"], getattr(self.controller, "__name__", ""))
        except HTTPResponse as error:
            return error
        except Exception:
            log.exception("controller %s returned %r", name_of(self.controller), result)
            return HTTPError(500)
        if isinstance(response, HTTPError) or not (bottle.response._headers or bottle.response._cookies):
            return response
        merged = bottle.response.copy(HTTPResponse)  # cookies and headers that were set in bottle's own way
        merged.status, merged.body = response.status, response.body
        merged._headers.update(response._headers)
        if response._cookies:
            merged._cookies = bottle.SimpleCookie({**(merged._cookies or {}), **response._cookies})
        return merged

    def guarded_call(self, fn: Any, req: Request) -> Any:
        """Returns `fn(req)`, or the response for what it raises."""
        try:
            return fn(req)
        except HTTPResponse as response:
            return response
        except Exception as error:
            log.exception("%s crashed at %s %s", name_of(fn), req["method"], printable(req["path"]))
            req.set("crash_info", {"status_code": 500, "class": type(error).__name__, "reason": error})
            return HTTPError(500)


def _call_outermost(callback: Any, route: bottle.Route, **bindings: Any) -> Any:
    """Calls a route with its plugins, which may return what a controller may. A form that cannot be read is a 400."""
    try:
        result = callback(**bindings)
    except (LookupError, TypeError, ValueError) as error:
        if any(frame.f_code is _BOTTLES_FORM for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise HTTPError(400, "the form cannot be read")
        raise
    if isinstance(result, tuple) and isinstance(route.callback, _Endpoint):
        return route.callback.answer(result, route.callback.make_request(bindings))
    return result


class _WebSocketEndpoint(_Endpoint):
    """The gate before the 101: every refusal is plain HTTP."""

    def __call__(self, **bindings: Any) -> HTTPResponse:
        req = self.make_request(bindings)
        if REGISTRY_KEY not in req.environ:
            log.error("%s needs nova_lite's own server: app.run() or Server(app)", name_of(self.controller))
            return HTTPError(501, "this server does not do WebSockets")
        wants_events = asks_for_events(req.environ)
        answer = None if wants_events else check_handshake(req.environ)
        answer = answer or check_opening(req) or self.check_security(req)
        if answer is None and wants_events:
            kind = rooms["replay"].event_stream if "replay" in rooms else EventStream
            answer = self.accept_connection(kind, req, dict(EVENT_STREAM))
        return self.answer(answer or self.upgrade(req), req)

    def upgrade(self, req: Request) -> HTTPResponse:
        environ, headers = req.environ, {}
        offered = map(str.strip, environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", "").split(","))  # the first wins, §4.2.2
        req.set("subprotocol", next((name for name in offered if name in self.settings.subprotocols), None))
        if req["subprotocol"]:
            headers["Sec-WebSocket-Protocol"] = req["subprotocol"]
        kind: Any = Connection
        if self.settings.compress:
            kind, extension = room("deflate").negotiate(environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS", ""))
            headers.update(extension)
        if self.settings.rate:
            kind = room("rate").limit(kind)
        return self.accept_connection(kind, req, headers)

    def accept_connection(self, kind: Any, req: Request, headers: dict[str, str]) -> HTTPResponse:
        """Runs `init`. If it accepts, the server sends this response and detaches the socket."""
        registry: ConnectionRegistry = req.environ[REGISTRY_KEY]
        if len(registry.connections) >= registry.limit:
            req.environ[REFUSAL_KEY] = f"{registry.limit} connections are the limit"
            return HTTPError(503, "there are too many connections", Retry_After="5")
        connection = kind(self.controller, req, self.settings, registry)
        if not connection.start():
            return HTTPError(503 if registry.draining else 500)
        req.environ[UPGRADING_KEY].append(connection)
        return HTTPResponse(b"", connection.STATUS, headers)


def asks_for_events(environ: Mapping[str, Any]) -> bool:
    """Returns whether a GET asks for server-sent events rather than a WebSocket."""
    accepted = [part.partition(";")[0].strip() for part in environ.get("HTTP_ACCEPT", "").lower().split(",")]
    return "text/event-stream" in accepted and environ["REQUEST_METHOD"] == "GET" and "HTTP_UPGRADE" not in environ


def check_handshake(environ: Mapping[str, Any]) -> HTTPResponse | None:
    """Returns the refusal of a request that is not an opening handshake (RFC 6455 §4.2.1)."""
    connection = [token.strip() for token in environ.get("HTTP_CONNECTION", "").lower().split(",")]
    if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
        return HTTPError(426, "a WebSocket is served here", Upgrade="websocket", Connection="Upgrade")
    is_get = (environ["REQUEST_METHOD"], environ["SERVER_PROTOCOL"]) == ("GET", "HTTP/1.1")
    if not is_get or "upgrade" not in connection or not environ.get("HTTP_HOST"):
        return HTTPError(400, "a WebSocket handshake is a GET of HTTP/1.1 with Connection: Upgrade and a Host")
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        return HTTPError(426, "only version 13 is served here", Sec_WebSocket_Version="13")
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", environ.get("HTTP_SEC_WEBSOCKET_KEY", "")):
        return HTTPError(400, "Sec-WebSocket-Key is missing or no 16 bytes in base64")
    return None


def check_opening(req: Request) -> HTTPResponse | None:
    """Returns the refusal of a foreign origin, or of a body, which could be taken for the client's first frames."""
    if req.environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in req.environ:
        return HTTPError(400, "a request for a WebSocket or for events has no body")
    return None if req.is_own_origin() else HTTPError(403, "this origin may not connect")


def heartbeat(req: Request) -> Any:
    """A controller for health checks: 200, or 503 once the server has been told to stop.

    With `?cluster` in the request, 503 also while this node is not connected to the cluster.
    """
    registry = req.environ.get(REGISTRY_KEY)
    is_stopping = registry is not None and (registry.leaving or registry.draining)
    is_cut_off = not pubsub.adapter.connected and "cluster" in req["qs"]
    return ("status", 503, {"Retry-After": "5"}) if is_stopping or is_cut_off else ("status", 200)


# ---------------------------------------------------------------------------------------------------------------------
# Server: pywsgi, detaching sockets, draining, serving until a signal.
# Invariant: HTTP is pywsgi's and the upgrade is gevent-websocket's. This room adds only what they lack.
# ---------------------------------------------------------------------------------------------------------------------

DRAIN_TIME = 5.0  # seconds that a stopping server gives requests and clients to finish
SHUTDOWN_DELAY = 0.0  # seconds between the signal and the drain; the heartbeat already returns 503
BACKLOG = 2048  # connections that may wait to be accepted: after a restart all clients connect together


class RequestHandler(UpgradeHandler):
    """An HTTP connection. gevent-websocket's upgrade runs once the application has returned a 101."""

    busy = False  # whether a response is being made; with the room http, from the request's first line on
    agreed = False  # whether the response is the one that starts a connection
    detached = False  # whether the socket belongs to a connection's process
    response_headers: list[tuple[bytes, bytes]]
    rfile: Any
    socket: Any
    code: Any
    logger = log  # gevent-websocket would set up one of its own

    def handle(self) -> None:
        if self.server.registry.draining:  # accepted just before the listener closed
            return
        self.server.handlers.add(self)
        try:
            super().handle()
        finally:
            self.server.handlers.discard(self)

    def handle_one_response(self) -> None:
        self.busy = True
        try:
            super().handle_one_response()
        finally:
            self.busy = False
            process = current_process()
            if process is not None:  # a request that asked for its pid
                process.finish("normal")

    def _connection_upgrade_requested(self) -> bool:
        return False  # otherwise pywsgi ignores the body, and takes it for the next request

    def run_application(self) -> None:
        upgrading: list[Stream] = []  # the connection that this request starts, if any
        self.environ[UPGRADING_KEY], self.environ[REGISTRY_KEY] = upgrading, self.server.registry
        try:
            gevent.pywsgi.WSGIHandler.run_application(self)
            if upgrading and self.agreed:
                self._detach(upgrading[0])
                upgrading.clear()
        except Exception:  # pywsgi would mistake an OSError of the application for a lost client
            self.handle_error(*sys.exc_info())
        finally:
            for connection in upgrading:  # a hook or a plugin has replaced the 101, or it could not be sent
                connection.interrupt(("error", "closed"))

    def process_result(self) -> None:
        upgrading = self.environ[UPGRADING_KEY]
        # False if this request starts no connection, or if a hook or a plugin has replaced the response.
        self.agreed = bool(upgrading) and self._is_response_of(upgrading[0])
        if not self.agreed:
            super().process_result()
            return
        headers = [header for header in self.response_headers if header[0] != b"Content-Length"]  # bottle's 0
        if self.code == 101:
            self.upgrade_connection()
            # gevent-websocket's object would write a close frame when it is freed; its cycle would hold 7 KiB.
            websocket, self.websocket = self.environ.pop("wsgi.websocket"), None
            websocket.closed = True
            del websocket.handler, websocket.stream
            headers = self.response_headers + [header for header in headers if header[0] != b"Content-Type"]
        self.response_headers, self.close_connection = headers, True
        self.provided_content_length = False  # pywsgi adds none
        self.write(b"")

    def _is_response_of(self, connection: Stream) -> bool:
        kinds = [value for name, value in self.response_headers if name.lower() == b"content-type"]
        is_stream = connection.STATUS == 101 or kinds == [b"text/event-stream"]
        return self.code == connection.STATUS and is_stream and not self.result

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.server.registry.draining:
            self.close_connection = True
        if self.close_connection and self.code != 101:
            headers = [header for header in self.response_headers if header[0].lower() != b"connection"]
            self.response_headers = [*headers, (b"Connection", b"close")]

    def _write_with_headers(self, data: Any) -> None:
        """Sends head and body in one packet: with two, a client's delayed ACK holds the second one back for 40 ms."""
        self.finalize_headers()
        self.headers_sent = True  # not earlier: a failure above must still become a 500
        lines = [b"HTTP/1.1 " + self.status, *(b"%b: %b" % header for header in self.response_headers), b"\r\n"]
        head = b"\r\n".join(lines)
        if self.response_use_chunked or len(data) > 65536:
            self._sendall(head)
            self._write(data)
        else:
            self._sendall(head + data)

    def _detach(self, connection: Stream) -> None:
        """Moves the socket to the connection's process. pywsgi's handler, buffers and greenlet are freed."""
        sock, early = self.socket, b""
        sock.settimeout(0)
        with suppress(OSError):  # there are none, or the client is gone, which `readable` will notice
            early = self.rfile.peek()  # frames right after the handshake
        self.rfile.close()
        raw: Any
        if self.server.ssl_enabled:
            raw, early = room("tls").detach(sock, early)
        else:
            raw = _socket.socket(sock.family, sock.type, sock.proto, sock.detach())
            raw.setblocking(False)  # whatever socket.setdefaulttimeout says
        self.socket, self.detached = None, True
        connection.req.detach()
        connection.open(raw, early)
        if self.server.registry.draining:
            connection.interrupt("shutdown")

    def log_request(self) -> None:
        if "logs" in rooms:
            rooms["logs"].log_request(self)


class Server(gevent.pywsgi.WSGIServer):
    """Serves an application: `with Server(app, port=0) as server:` starts and stops it, `server.port` is its port.

    This is for programs with a main loop of their own; `Nova.run` is for those without. `certfile` (and `keyfile`)
    enable https and wss. `max_connections` limits WebSockets, by default to what the descriptor limit allows. With
    `reuse_port`, other processes may serve the same port. `trust_proxy` is the number of proxies in front, for an
    application that is no `Nova` with that setting. `children` are the application's, as `run` has them: if their
    supervisor ends, `failed` is set and the server stops. Raises OSError if the address is in use or a file cannot be
    read, RuntimeError if a child cannot be started, ValueError if other machines would reach a board without security.
    """

    KEEP_ALIVE, HEAD_TIME, BODY_TIME = 75.0, 10.0, 30.0  # seconds, by the room http: next request, head (or TLS), body
    WRITE_TIME = 30.0  # seconds, by the room http, in which a client reads nothing of a response
    max_accept = 5  # clients between two looks at the others, not gevent's 100: 100 handshakes hold the hub for 20 ms

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
        trust_proxy: int = 0,
        children: "Iterable[ChildSpec]" = (),
    ) -> None:
        self.registry = ConnectionRegistry(_descriptor_limit() - 64 if max_connections is None else max_connections)
        self.handlers: set[RequestHandler] = set()
        self.drain_time = drain_time
        self.short_of_descriptors = -60.0  # time when a lack of descriptors was last logged
        self.tree = room("launch").ApplicationTree(children, self) if children else None
        self.failed = False  # the tree's supervisor has ended
        self.on_failure: Callable[[], Any] = partial(gevent.spawn, self.stop)
        tls = room("tls").set_up(self, certfile, keyfile) if certfile else {}
        if reuse_port:
            self.get_listener = lambda _address, backlog, _family: room("launch").bound_socket(host, port, backlog)
        handler = rooms["http"].handler if "http" in rooms else RequestHandler
        if trust_proxy or "proxy" in rooms:
            handler = room("proxy").set_up(self, app, host, trust_proxy, handler)
        super().__init__((host, port), app, BACKLOG, log=None, error_log=log, handler_class=handler, **tls)

    def __enter__(self) -> Server:
        self.start()
        return self

    def start(self) -> None:
        if self.tree is None:
            super().start()
        else:
            self.tree.start(super().start)

    @property
    def port(self) -> int:
        return self.address[1]

    def init_socket(self) -> None:
        _check_patch()
        scheduler.bind_thread()
        super().init_socket()
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # accepted sockets inherit it

    def do_read(self) -> Any:
        """Accepts connections. Pauses when descriptors run out: clients then wait in the kernel's queue."""
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
        return self._timer.start(self._start_accepting_if_started)

    def stop(self, timeout: float | None = None) -> None:
        """Closes the listener, waits for requests, and closes WebSockets with 1001; aborts the rest after `timeout`.

        The 1001s are spread over at most half of that time, so that clients do not reconnect all at once. A request on
        a kept-alive connection is still answered, with `Connection: close`. The children are stopped last.
        """
        timeout = self.drain_time if timeout is None else timeout
        deadline = monotonic() + timeout
        self.registry.draining = True
        self.close()
        connections = random.sample(list(self.registry.connections), len(self.registry.connections))  # in any order
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
            connection.abort()
        registries.discard(self.registry)
        if self.tree is not None:
            self.tree.stop()

    def active_count(self) -> int:
        """Returns the number of requests and WebSockets."""
        return sum(handler.busy for handler in self.handlers) + len(self.registry.connections)


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
    log_format: str = "plain",
    children: "Iterable[ChildSpec]" = (),
    ready: Callable[[Server], Any] | None = None,
    **options: Any,
) -> None:
    """Serves `app` until SIGINT or SIGTERM, then drains for at most `drain_time` seconds and returns.

    For `shutdown_delay` seconds before the drain it still serves new clients while `heartbeat` returns 503, so that a
    load balancer can notice. A second signal ends the process immediately. `cluster` is the URL of a Redis (see
    `pubsub.connect`), and `name` is this node's name there. `workers` is the number of processes on the port (see
    `run_workers`); more than one need a cluster. `reload` restarts the program when one of its files changes.
    With `log_format="json"`, a line of the log is a JSON object. `ready` is called with the server once it serves.
    `children` (see `start_supervisor`) are started in each process that serves, before it does, and stopped after the
    drain, also if a signal comes while they start; if their supervisor ends, the server drains and the exit code is 1.
    `options` are `Server`'s. Raises OSError if the address is in use, ValueError for a bad child and for workers
    without a cluster, RuntimeError for a child that cannot be started and for a room that this copy lacks.
    """
    if log_format != "plain":
        logging.basicConfig(level=log_level.upper(), handlers=[room("logs").log_handler(log_format)])
    process = "%(process)d " if workers > 1 else ""
    logging.basicConfig(level=log_level.upper(), format=f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s")
    options["children"] = room("gen_server").check_children(children) if children else ()  # before there are workers
    if reload:
        room("launch").reload_on_change()
        drain_time, shutdown_delay = min(drain_time, 0.3), 0.0
    if workers > 1:
        if cluster is None:
            raise ValueError("workers need a cluster: without one a broadcast would reach one worker's clients only")
        number, port = room("launch").run_workers(workers, host, port, drain_time + shutdown_delay)
        options["reuse_port"], name = True, f"{name or scheduler.node}-{number}"
    _descriptor_limit(raised=True)
    _serve(Server(app, host, port, drain_time=drain_time, **options), shutdown_delay, cluster, name, ready)


def _serve(server: Server, shutdown_delay: float, cluster: str | None, name: str | None, ready: Any) -> None:
    asked_to_stop = gevent.event.Event()
    server.on_failure = asked_to_stop.set
    signals = count()

    def on_signal() -> None:
        if next(signals):
            os._exit(1)  # the second one
        asked_to_stop.set()

    with ExitStack() as closers:
        if cluster is not None:
            closers.callback(pubsub.disconnect)
            pubsub.connect(cluster, name)
        for sign in (signal.SIGINT, signal.SIGTERM):  # before the server: children may take long to start
            closers.callback(gevent.signal_handler(sign, on_signal).cancel)
        for close in filter(None, [hook(asked_to_stop.set) for hook in while_serving]):
            closers.callback(close)
        closers.enter_context(server)
        if ready is not None:
            ready(server)
        host = server.address[0]
        scheme, shown = "https" if server.ssl_enabled else "http", f"[{host}]" if ":" in host else host
        log.info("serving on %s://%s:%d/ (Ctrl-C stops)", scheme, shown, server.port)
        log.debug("the descriptor limit allows %d WebSockets", server.registry.limit)
        gc.collect()
        gc.freeze()  # a full collection then takes 3 ms, not 15
        asked_to_stop.wait()
        if shutdown_delay > 0:
            log.info("serving for %s s more; the heartbeat returns 503", shutdown_delay)
            server.registry.leaving = True
            gevent.sleep(shutdown_delay)
        log.info("stopping: %d requests and WebSockets to finish", server.active_count())
    if server.failed:
        sys.exit(1)


rooms["server"] = SimpleNamespace(run=run)
while_serving: list[Callable[[Callable[[], None]], Any]] = []  # called with what stops `run`; may return a closer


def _greenlet_property(key: str) -> property:
    """Returns a property whose value is the greenlet's own. gevent's local takes 4 µs in a new greenlet."""

    def get(_: Any) -> Any:
        try:
            return getattr(getcurrent(), key)
        except AttributeError:
            raise RuntimeError("Request context not initialized.") from None

    return property(get, lambda _, value: setattr(getcurrent(), key, value), lambda _: delattr(getcurrent(), key))


def _check_patch() -> None:
    """Warns if the standard library is not patched, and makes bottle keep each request in its greenlet, not in its
    thread: otherwise one client's response could carry another's cookies."""
    is_late = False  # whether bottle was imported before the patch
    for kind in (bottle.LocalRequest, bottle.LocalResponse):
        for name, value in list(vars(kind).items()):
            if getattr(getattr(value, "fget", None), "__module__", "") == "bottle":
                is_late |= not isinstance(value.fget.__closure__[0].cell_contents, gevent.local.local)
                setattr(kind, name, _greenlet_property(f"{kind.__name__}.{name}"))
    if is_late or not gevent.monkey.is_module_patched("socket"):
        problem = "is patched too late" if gevent.monkey.is_module_patched("threading") else "is not patched"
        advice = "Make this the first line of your program: from gevent import monkey; monkey.patch_all()"
        log.warning("the standard library %s: what blocks will block every connection. %s", problem, advice)


def _descriptor_limit(raised: bool = False) -> int:
    """Returns how many descriptors this process may have open so far. With `raised`, sets the limit to the highest."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if raised:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return limit
    return 10_000


# ----- cut here: without http ----------------------------------------------------------------------------------------
# Lost: strict HTTP (limits of size and time, framing checks, 100-continue, chunked bodies for bottle, close_notify, and
# errors in the form that the client accepts). What remains is pywsgi's, for use behind a proxy that is strict.


# ---------------------------------------------------------------------------------------------------------------------
# HTTP: reads requests strictly, within limits of size and time, and checks the framing of responses (RFC 9112).
# Invariant: a message whose end is in doubt is the last one of its connection.
# ---------------------------------------------------------------------------------------------------------------------

import io
import shutil
import tempfile

MAX_HEADERS = 16_384  # bytes
MAX_LINE = 8192  # bytes of a request line, 414 beyond
READ_AHEAD = 8192  # bytes of a client's buffer, less than MAX_HEADERS
MAX_KNOWN, MAX_KNOWN_LINE = 1024, 200  # lines of heads, and bytes of one, that are kept for the next requests
MAX_UPLOAD = 1024 * 1024 * 1024  # bytes of a body, however it is read; controllers have `max_body`
DISCARD_SIZE, DISCARD_TIME = 8 * 1024 * 1024, 2.0  # bytes and seconds spent on what the application does not read


def read_headers(file: Any) -> dict[str, str]:
    """Returns the headers of a request, by lower-case name, as strict as RFC 9112 §5 demands.

    Replaces the standard library's e-mail parser, which is several times slower and accepts what allows request
    smuggling. Raises ValueError, or HTTPError 431 over MAX_HEADERS bytes.
    """
    headers: dict[str, str] = {}
    left = MAX_HEADERS
    while (line := file.readline(left + 1)) not in (b"\r\n", b"\n"):
        left -= len(line)
        if left < 0:
            raise HTTPError(431, "the headers are too long")
        match = _HEADER.fullmatch(line.decode("latin-1"))
        if match is None:
            raise ValueError(f"not a header: {line!r}")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers and name in ("content-length", "host", "transfer-encoding"):
            raise ValueError(f"{name} comes twice")
        headers[name] = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in headers else value
    return headers


def _check_framing(headers: Mapping[str, str]) -> None:
    if not re.fullmatch("[0-9]{1,18}", headers.get("content-length", "0")):
        raise ValueError("Content-Length is not a number")
    coding = headers.get("transfer-encoding", "chunked").lower()
    if coding != "chunked" or {"transfer-encoding", "content-length"} <= headers.keys():
        raise ValueError("only chunked is supported as Transfer-Encoding, without a Content-Length")


def split_head(head: bytes) -> tuple[Any, dict[str, str]]:
    """Returns the parts of a usual head's first line (see `_parse_request_line`) and its headers. Raises ValueError
    if the head is unusual: it is then read line by line, which accepts what is rare and refuses what is wrong.

    A client sends the same lines again and again: looking them up takes a tenth of the time of reading them.
    """
    line, *lines = head.split(b"\r\n")
    is_long = len(line) > MAX_KNOWN_LINE or b"?" in line  # queries rarely repeat, and may be secret
    request = (_parse_request_line.__wrapped__ if is_long else _parse_request_line)(line)
    headers: dict[str, str] = {}
    for line in lines:
        name, value = _known_headers.get(line) or _parse_header(line)
        if name in headers:
            raise ValueError
        headers[name] = value
    return request, headers


def _parse_header(line: bytes) -> tuple[str, str]:
    match = _HEADER.fullmatch(line.decode("latin-1") + "\r\n")
    if match is None:
        raise ValueError
    header = match[1].lower(), match[2].strip(" \t")
    if len(line) <= MAX_KNOWN_LINE and header[0] not in _UNIQUE:
        if len(_known_headers) >= MAX_KNOWN:
            _known_headers.clear()
        _known_headers[line] = header
    return header


@lru_cache(maxsize=MAX_KNOWN)
def _parse_request_line(line: bytes) -> tuple[str, str, str, str]:
    """Returns the line, the method, HTTP's version, and the path with its query."""
    match = _REQUEST_LINE.fullmatch(line.decode("latin-1") + "\r\n")
    if match is None or match[2][0] != "/":
        raise ValueError
    return match[0][:-2], match[1], match[3], split_target(match[1], match[2])[1]


_known_headers: dict[bytes, tuple[str, str]] = {}  # by line, MAX_KNOWN at most
_UNIQUE = {"authorization", "cookie", "proxy-authorization", "sec-websocket-key"}  # secret, or not sent twice
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 §5.6.2
_HEADER = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")  # cannot backtrack


@lru_cache(maxsize=256)
def _environ_key(name: str) -> str | None:
    """Returns a header's key in WSGI's environ (PEP 3333), or None if it has none."""
    if "_" in name:
        return None
    key = name.replace("-", "_").upper()
    return key if name in ("content-type", "content-length") else "HTTP_" + key


_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([^\x00-\x20\x7f#]+) (HTTP/1\.[01])\r?\n")
_TARGET = re.compile(r"(?:https?://([^/?]+))?(|[/?].*)", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+;=-]*)(?::[0-9]{0,5})?")
_is_host = lru_cache(maxsize=256)(_HOST.fullmatch)


def split_target(method: str, target: str) -> tuple[str | None, str]:
    """Returns the authority, or None, and the path with its query (RFC 9112 §3.2).

    Raises ValueError if the target is neither in origin nor in absolute form, or if the path is not UTF-8.
    """
    if target == "*" and method == "OPTIONS":
        return None, "*"
    match = _TARGET.fullmatch(target)
    if match is None or (match[1] is None and not target.startswith("/")):
        raise ValueError("not the target of a request")
    authority, path = match[1], match[2] if match[2].startswith("/") else "/" + match[2]
    if "%" in path or not path.isascii():
        unquote_to_bytes(path.partition("?")[0].encode("latin-1")).decode()
    return authority, path


class ClientStream(io.RawIOBase):
    """Reads a client's socket. Raises TimeoutError after `deadline`, and yields once a time slice is over."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.deadline: float | None = None  # on the clock of monotonic(); None: the socket's own timeout applies

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        scheduler.yield_after_slice()
        if self.deadline is not None:
            left = self.deadline - monotonic()
            if left <= 0:  # even if bytes have arrived: a client may never stop sending
                raise TimeoutError("the client takes too long")
            self.sock.settimeout(left)
        return self.sock.recv_into(buffer)


class BadBody(HTTPError, OSError):
    """The body cannot be read: a 400, 408 or 413 for bottle, an OSError for any other WSGI application."""


class Body(io.RawIOBase):
    """Reads the body of a request up to its end (RFC 9112 §6.2, §7.1). Raises BadBody."""

    def __init__(self, file: Any, length: int | None, before: Callable[[], None]) -> None:
        self.file = file
        self.chunked = length is None
        self.left = length or 0  # bytes to come, of the chunk if it is chunked
        self.ended = length == 0
        self.before: Callable[[], None] | None = before  # called before the first read
        self.failure: BadBody | None = None
        self.in_chunk = False  # the CRLF behind a chunk has not been read yet
        self.extras = 0  # bytes of chunk extensions and trailers, MAX_HEADERS at most
        self.taken = 0  # bytes read, framing included

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.failure is not None:
            raise self.failure
        try:
            if self.before is not None:
                before, self.before = self.before, None
                before()
            return self._read(memoryview(buffer))
        except BadBody as error:
            self.failure = error
            raise
        except OSError as error:
            late = isinstance(error, TimeoutError)
            self._fail("the body took too long" if late else "the body was cut off", 408 if late else 400)

    def _read(self, buffer: memoryview) -> int:
        if self.chunked and not self.left and not self.ended:
            self._next_chunk()
        if self.ended:
            return 0
        if self.taken + self.left > MAX_UPLOAD:
            self._fail(f"the body is larger than {MAX_UPLOAD} bytes", 413)
        size = self.file.readinto1(buffer[: self.left])
        if not size:
            self._fail("the body was cut off")
        self.left -= size
        self.taken += size
        self.ended = not self.left and not self.chunked
        return size

    def _next_chunk(self) -> None:
        scheduler.yield_after_slice()  # a buffer of one-byte chunks takes 10 ms
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
        """Does nothing: pywsgi calls it too early."""

    def discard(self) -> None:
        """Reads up to the next request, within DISCARD_SIZE bytes."""
        self.before, buffer = None, memoryview(bytearray(65536))
        with suppress(OSError, RuntimeError):  # RuntimeError: a greenlet of the application is still reading
            while self.taken < DISCARD_SIZE and self.readinto(buffer):
                pass


_QUOTED = r'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t\x20-\x7e\x80-\xff])*"'
_EXTENSION = rf"[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*(?:{_TOKEN}|{_QUOTED}))?"
_CHUNK = re.compile(rf"([0-9A-Fa-f]{{1,16}})((?:{_EXTENSION})*)\r\n".encode())
_NO_BODY = Body(None, 0, lambda: None)


class SpooledBody:
    """A chunked body for `bottle.request`, which would decode the chunks a second time: a file, filled at first use."""

    def __init__(self, body: Any) -> None:
        self._body, self.is_unread = body, True
        self._file = tempfile.SpooledTemporaryFile(bottle.BaseRequest.MEMFILE_MAX)  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        scheduler.yield_after_slice()  # bottle reads a form piece by piece
        if self.is_unread:
            shutil.copyfileobj(self._body, self._file)
            self._file.seek(0)
            self.is_unread = False
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def __enter__(self) -> SpooledBody:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class StrictRequestHandler(RequestHandler):
    """Reads requests within limits of size and time, and checks the framing of both messages (RFC 9112)."""

    path: Any
    provided_date: Any
    provided_content_length: Any
    wsgi_input: Any = _NO_BODY
    body_left: int | None = None  # bytes of the response that Content-Length still allows; None: no limit
    expects_continue = False  # the client waits for a 100 before it sends its body
    base_environ: dict[str, Any] | None = None  # what is the same in all requests; None before the first
    buffered = 0  # bytes that have come with the head; 0 if the head was unusual

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        self.socket, self.client_address, self.server = sock, address, server
        self.stream = ClientStream(sock)
        self.rfile = io.BufferedReader(self.stream, READ_AHEAD)

    # -- the request

    def handle_one_request(self) -> Any:
        """Returns whether another request may follow, or None. Replaces pywsgi's method."""
        scheduler.yield_after_slice()  # a client may pipeline many requests
        if not self.rfile.closed and self._read_head():
            self.environ, self.application = self.get_environ(), self.server.application
            self.handle_one_response()
            if not (self.close_connection or self.rfile.closed):
                return True
        if self.socket is not None:
            self.end_tls()
        return None

    def _read_head(self) -> bool:
        """Returns False if there is no request any more, or if it has been refused."""
        self.stream.deadline = monotonic() + self.server.KEEP_ALIVE
        try:
            is_usual = self._take_head(self.rfile.peek(1))
        except OSError:
            return False
        try:
            if not is_usual and not self._read_unusual_head():
                return False
            self._check_request()
            return True
        except Exception as error:
            self._handle_client_error(error)
            return False

    def _take_head(self, buffered: bytes) -> bool:
        """Returns whether a usual head was in the buffer, complete: read in one piece, it takes a third of the time."""
        end, self.buffered = buffered.find(b"\r\n\r\n"), 0
        try:
            request, self.headers = split_head(buffered[: max(end, 0)])
        except ValueError:
            return False
        self.requestline, self.command, self.request_version, self.path = request
        self.rfile.read(end + 4)
        self.buffered = len(buffered) - end - 4
        return True

    def _read_unusual_head(self) -> bool:
        self.stream.deadline = monotonic() + self.server.HEAD_TIME
        try:
            line = self.rfile.readline(MAX_LINE + 1)
            if line in (b"\r\n", b"\n"):  # an empty one is no harm (RFC 9112 §2.2)
                line = self.rfile.readline(MAX_LINE + 1)
        except ConnectionError:
            line = b""
        self.requestline, self.busy = line.decode("latin-1").rstrip("\r\n"), line != b""
        if len(line) > MAX_LINE:
            raise HTTPError(414, "the request line is too long")
        if not line:
            return False
        match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
        if match is None:
            raise ValueError("not a request line of HTTP/1.1 or 1.0")
        self.command, target, self.request_version = match.groups()
        self.headers = read_headers(self.rfile)
        authority, self.path = split_target(self.command, target)
        if authority is not None:
            self.headers["host"] = authority
        return True

    def _check_request(self) -> None:
        headers, is_old, self.content_length = self.headers, self.request_version == "HTTP/1.0", 0
        if "content-length" in headers or "transfer-encoding" in headers:
            _check_framing(headers)
            self.content_length = int(headers.get("content-length", "0"))
        if not _is_host(headers.get("host", "" if is_old else "/")):
            raise ValueError("the Host is missing or malformed")
        if is_old and "transfer-encoding" in headers:
            raise ValueError("HTTP/1.0 has no Transfer-Encoding")
        options = _tokens(headers.get("connection", ""))
        self.close_connection = "close" in options or (is_old and "keep-alive" not in options)
        self.stream.deadline = None  # a body sets its own

    def _handle_client_error(self, ex: Exception) -> None:
        """Refuses a request that cannot be read, and closes: the start of the next one is unknown."""
        late = "408 Request Timeout" if isinstance(ex, TimeoutError) else "400 Bad Request"
        status, reason = getattr(ex, "status_line", late), printable(getattr(ex, "body", None) or ex)
        peer, line = "{}:{}".format(*self.client_address[:2]), printable(self.requestline or "")
        fields = {"peer": peer, "request": line, "status": int(status[:3]), "phrase": status[4:], "reason": reason}
        log.info('%(peer)s "%(request)s" refused: %(status)d %(phrase)s (%(reason)s)', fields)
        self._orig_status = status
        kind, body = error_body(status, status[4:], "")
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with suppress(OSError):
            self._sendall(head.encode() + body)
        self.stream.deadline = monotonic() + DISCARD_TIME
        self._await_close()

    def end_tls(self) -> None:
        """Sends close_notify, over TLS: without it a complete response looks truncated (RFC 9112 §9.8)."""
        if self.server.ssl_enabled:
            room("tls").send_close_notify(self.socket)

    def _await_close(self) -> None:
        """Shuts down writing and reads until `deadline`: closing with unread bytes would reset the connection, and the
        client could lose its response (RFC 9112 §9.6)."""
        left = DISCARD_SIZE
        with suppress(OSError, RuntimeError):  # RuntimeError: a greenlet of the application is still reading
            self.end_tls()
            self.socket.shutdown(_socket.SHUT_WR)
            while left > 0 and (part := self.rfile.read1(READ_AHEAD)):
                left -= len(part)

    def get_environ(self) -> dict[str, Any]:
        if self.base_environ is None:
            own = {"SCRIPT_NAME": "", "wsgi.input_terminated": True}
            if isinstance(self.client_address, tuple):
                own["REMOTE_ADDR"], own["REMOTE_PORT"] = map(str, self.client_address[:2])
            self.base_environ = {**self.server.get_environ(), **own}
        environ = self.base_environ.copy()
        path, _, environ["QUERY_STRING"] = self.path.partition("?")
        environ["PATH_INFO"] = gevent.pywsgi.unquote_latin1(path) if "%" in path else path
        environ["REQUEST_METHOD"], environ["SERVER_PROTOCOL"] = self.command, self.request_version
        for name, value in self.headers.items():
            if key := _environ_key(name):
                environ[key] = value
        self._add_body(environ)
        return environ

    def _add_body(self, environ: dict[str, Any]) -> None:
        chunked, length = "transfer-encoding" in self.headers, self.content_length
        # A body that has come with the head takes no stream, limit or deadline (20 % of a small request).
        is_here = length <= min(self.buffered, MAX_UPLOAD) and "expect" not in self.headers
        if not chunked and (is_here or not length):
            self.wsgi_input, self.expects_continue = _NO_BODY, False
            environ["wsgi.input"] = BytesIO(self.rfile.read(length) if length else b"")
            return
        expect = self.headers.get("expect", "").lower()
        self.expects_continue = expect == "100-continue" and self.request_version == "HTTP/1.1"
        body = Body(self.rfile, None if chunked else self.content_length, self._begin_body)
        self.wsgi_input, environ["wsgi.input"] = body, io.BufferedReader(body)
        if chunked:
            environ["bottle.request.body"] = SpooledBody(environ["wsgi.input"])

    def _begin_body(self) -> None:
        """Runs before the first read: sends the 100 that the client may expect (RFC 9110 §10.1.1)."""
        self.stream.deadline = monotonic() + self.server.BODY_TIME
        if self.expects_continue:
            if self.headers_sent:
                raise BadBody(400, "no 100 can be sent once the response has begun")
            self.expects_continue = False
            self.socket.settimeout(self.server.WRITE_TIME)
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def handle_error(self, kind: Any, error: Any, tb: Any) -> None:
        if (self.code or 0) < 0:  # the client is gone
            self.close_connection = True
        elif isinstance(error, BadBody):
            self._refuse(error.status_code, str(error.body))
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            super().handle_error(kind, error, tb)
        else:
            if not isinstance(error, gevent.GreenletExit):
                line = printable(self.requestline or "")
                fields = {"peer": "{REMOTE_ADDR}:{REMOTE_PORT}".format_map(self.environ), "request": line}
                log.error('%(peer)s "%(request)s" crashed', fields, exc_info=(kind, error, tb))
            self._refuse(500)

    def _refuse(self, status: int, text: str = "") -> None:
        """Sends an error instead of the application's response, or closes if that has begun."""
        self.close_connection = True
        if self.headers_sent:
            return
        error = HTTPError(status)
        kind, body = error_body(error.status_line, text or error.status_line[4:], self.environ.get("HTTP_ACCEPT", ""))
        with suppress(OSError):
            self.start_response(error.status_line, [("Content-Type", kind), ("Content-Length", str(len(body)))])
            self.write(body)

    _send_error_response_if_possible = _refuse

    # -- the response

    def handle_one_response(self) -> None:
        super().handle_one_response()
        if not self.wsgi_input.ended:
            self._skip_body(self.wsgi_input)

    def _skip_body(self, body: Body) -> None:
        self.stream.deadline = monotonic() + DISCARD_TIME
        if not self.close_connection:
            body.discard()
        body.failure = BadBody(400, "the request is over")  # a greenlet of the application may still read
        if not body.ended:
            self.close_connection = True
            self._await_close()

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Raises ValueError for what would break the framing of this response or the next (RFC 9112 §6)."""
        if self.headers_sent and exc_info:
            raise exc_info[1].with_traceback(exc_info[2])
        if not _is_status(status) and not (status[:3] == "101" and self.environ[UPGRADING_KEY]):
            raise ValueError(f"not a status of a response: {status!r}")
        unwanted = _FRAMING if status[:3] in ("204", "304") else _HOP_BY_HOP
        kept, seen = [], {}
        for name, value in headers:
            lower = name.lower()
            is_bad = lower == "content-length" and (lower in seen or not _is_length(value))
            if is_bad or not _is_token(name) or _CONTROL.search(value):
                raise ValueError(f"not a header, or twice: {name!r}: {value!r}")
            seen[lower] = value
            if lower not in unwanted:
                kept.append((name.encode(), value.encode("latin-1")))
        self.status, self._orig_status, self.code = status.encode("latin-1"), status, int(status[:3])
        self.response_headers, self.provided_date = kept, seen.get("date")
        self.provided_content_length = seen.get("content-length")
        if self.headers_sent or self.code == 101:
            self._prepare_response()  # of gevent-websocket
        return self.write

    def process_result(self) -> None:
        super().process_result()
        if self.body_left:
            self.close_connection = True
            log.error('"%s": Content-Length was %d bytes too large', printable(self.requestline), self.body_left)

    def write(self, data: Any) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"a WSGI application must yield bytes (PEP 3333), got {data!r:.100}")
        if self.headers_sent:
            scheduler.yield_after_slice()
        elif self.status and not self.agreed:
            self._frame_response()
        if self.body_left is not None:
            data = data[: self.body_left]
            self.body_left -= len(data)
        super().write(data)

    def _frame_response(self) -> None:
        """Decides how the end of the body is marked (RFC 9112 §6.3)."""
        self.body_left, self.response_use_chunked = None, False
        if self.command == "HEAD" or self.code in (204, 304):
            self.body_left = 0
        elif self.provided_content_length is not None:
            self.body_left = int(self.provided_content_length)
        elif isinstance(self.result, list | tuple):
            self.body_left = sum(map(len, self.result))
            self.response_headers.append((b"Content-Length", b"%d" % self.body_left))
        elif self.request_version == "HTTP/1.1":
            self.response_use_chunked = True
            self.response_headers.append((b"Transfer-Encoding", b"chunked"))
        else:
            self.close_connection = True

    def finalize_headers(self) -> None:
        """Adds Date, and merges the application's Connection header with whether the connection closes."""
        if not self.provided_date:
            self.provided_date = True
            self.response_headers.append((b"Date", _date(int(time.time()))))
        if self.code == 101:
            return
        options = []
        for header in [header for header in self.response_headers if header[0].lower() == b"connection"]:
            options += _tokens(header[1].decode("latin-1"))
            self.response_headers.remove(header)
        # After an unanswered Expect, the next bytes may be the body or the next request.
        in_doubt = self.expects_continue or self.wsgi_input.failure is not None
        if "close" in options or in_doubt or self.server.registry.draining:
            self.close_connection = True
        options = [option for option in options if option not in ("close", "keep-alive")]
        if self.close_connection:
            options.append("close")
        elif self.request_version == "HTTP/1.0":
            options.append("keep-alive")
        if options:
            self.response_headers.append((b"Connection", ", ".join(options).encode("latin-1")))

    def _sendall(self, data: bytes) -> None:
        """Sends in 64 KiB pieces, each with its own time limit."""
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


_is_status = lru_cache(maxsize=256)(re.compile(r"[2-9][0-9]{2} [^\x00-\x1f\x7f]*").fullmatch)
_is_length = lru_cache(maxsize=256)(re.compile("[0-9]{1,18}").fullmatch)
_HOP_BY_HOP = ("transfer-encoding", "keep-alive")  # up to the server (PEP 3333)
_FRAMING = (*_HOP_BY_HOP, "content-length")
_is_token = lru_cache(maxsize=256)(re.compile(_TOKEN).fullmatch)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_date = lru_cache(maxsize=1)(gevent.pywsgi.format_date_time)


def _tokens(value: str) -> list[str]:
    """Returns the options of a Connection header, in lower case (RFC 9110 §7.6.1)."""
    return [token for token in re.split(r"[ \t,]+", value.lower()) if token] if value else []


class _SlicedBytes(BytesIO):
    """Yields to other greenlets while bottle parses a form: 1 MB may take 0.8 s."""

    def read(self, size: int | None = -1) -> bytes:
        scheduler.yield_after_slice()
        return super().read(min(size, 4096) if size and size > 0 else size)


rooms["http"] = SimpleNamespace(handler=StrictRequestHandler, SlicedBytes=_SlicedBytes)
# ----- cut here: without tls -----------------------------------------------------------------------------------------
# Lost: certfile and keyfile: https and wss without a proxy.


# ---------------------------------------------------------------------------------------------------------------------
# TLS: https and wss, with gevent's ssl.
# Invariant: what a connection's process gets behaves like a plain non-blocking socket.
# ---------------------------------------------------------------------------------------------------------------------

from ssl import SSLEOFError, SSLWantReadError, SSLWantWriteError, SSLZeroReturnError


def _set_up_tls(server: Any, certfile: str, keyfile: str | None) -> dict[str, Any]:
    """Returns gevent's arguments for a server that speaks TLS. Raises OSError if a file cannot be used."""
    from gevent import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # with it, reading could require writing
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # OpenSSL's message does not name the file
        raise OSError(error.errno, f"the certificate {certfile} cannot be used: {error.strerror}") from error
    server.wrap_socket_and_handle = partial(_handle_client, server)
    return {"ssl_context": context}


class TLS:
    """Makes a TLS socket look like a plain non-blocking one: `recv` raises BlockingIOError, `send` returns 0."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock  # gevent's, which does not wait once its timeout is 0
        self.fileno, self.close = sock.fileno, sock.close

    def recv(self, size: int) -> bytes:
        """Returns a whole record: bytes that have left the kernel do not trigger a watcher."""
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
        """Sends close_notify and TCP's FIN."""
        with suppress(OSError, ValueError):
            self.sock._sslobj.shutdown()
        _socket.socket.shutdown(self.sock._sock, how)


def _handle_client(server: Server, client_socket: Any, address: Any) -> None:
    """Serves a client that has just connected. Runs in a greenlet of its own."""
    try:
        with gevent.Timeout(server.HEAD_TIME, TimeoutError("no TLS handshake in time")):
            sock = server.wrap_socket(client_socket, server_side=True)
    except OSError as error:
        log.info("%(peer)s refused: %(reason)s", {"peer": "{}:{}".format(*address[:2]), "reason": error})
        client_socket.close()
        return
    handler = server.handler_class(sock, address, server)
    handler.handle()
    if not handler.detached:
        sock.close()


def _detach(sock: Any, early: bytes) -> tuple[TLS, bytes]:
    """Returns the socket for a connection's process, and `early` with the bytes that TLS has read ahead."""
    with suppress(OSError):
        early += sock.recv(sock.pending()) if sock.pending() else b""
    return TLS(sock), early


def _send_close_notify(sock: Any) -> None:
    sock.settimeout(0)  # does not wait for the client's
    with suppress(OSError, ValueError):
        sock.unwrap()


rooms["tls"] = SimpleNamespace(
    set_up=_set_up_tls,
    detach=_detach,
    send_close_notify=_send_close_notify,
)


# ----- cut here: without proxy ---------------------------------------------------------------------------------------
# Lost: trust_proxy; localhost, 127.0.0.1 and [::1] as one host for an Origin; the check that a board without security
# is for this machine only.


# ---------------------------------------------------------------------------------------------------------------------
# Proxy: what a proxy in front says of the client, and by which names a server is called.
# Invariant: without `trust_proxy`, nothing that a client writes in an X-Forwarded header counts.
# ---------------------------------------------------------------------------------------------------------------------

local_registries: weakref.WeakSet[Any] = weakref.WeakSet()  # of servers that only this machine reaches
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_FORWARDED = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP")  # as have all X-Forwarded-…, a proxy's requests
_REWRITTEN = "nova_lite.rewritten"  # in WSGI's environ: nothing is rewritten twice
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}  # some proxies forward wss
_AUTHORITY = re.compile(r"([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_ADDRESS = re.compile(r'"?(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|([0-9A-Fa-f:.]+))(?::([0-9]{1,5}))?"?')


class ProxiedHandler(RequestHandler):
    """An HTTP connection from a proxy. Its log has the clients' addresses."""

    hops: int

    def get_environ(self) -> dict[str, Any]:
        environ = super().get_environ()
        _rewrite(environ, self.hops)
        return environ


def _set_up_proxy(server: Any, app: Any, host: str, hops: Any, handler: type[RequestHandler]) -> Any:
    """Prepares a server, and returns the class of its handlers. Raises ValueError, see `Server`."""
    hops = hops or getattr(getattr(app, "settings", None), "trust_proxy", 0)
    _check_hops({"trust_proxy": hops})
    if is_loopback(host):
        local_registries.add(server.registry)
    if not is_loopback(host) or hops:
        _check_exposure(app, host)
    return type(handler.__name__, (ProxiedHandler, handler), {"hops": hops}) if hops else handler


def _check_hops(options: Mapping[str, Any]) -> None:
    if not isinstance(options["trust_proxy"], int) or options["trust_proxy"] < 0:
        raise ValueError(f"trust_proxy is a number of proxies, or True for one, not {options['trust_proxy']!r}")


def _rewrite(environ: dict[str, Any], hops: int) -> None:
    """Replaces the proxy's address by the client's, and scheme and host by those that the client has asked for.

    Of each list, the entry that the farthest of `hops` proxies wrote counts, or the first if there are fewer. The
    headers keep what counts, for bottle's `request`.
    """
    if _REWRITTEN in environ:
        return
    environ[_REWRITTEN] = hops
    addresses = filter(None, map(_parse_address, _list_trusted(environ, "FOR", hops)))  # "unknown" is skipped
    address, port = next(addresses, ("", ""))
    scheme = _SCHEMES.get("".join(_list_trusted(environ, "PROTO", hops)[:1]).lower(), "")
    host = "".join(_list_trusted(environ, "HOST", hops)[:1])
    host = host if _AUTHORITY.fullmatch(host) else ""
    own = {"REMOTE_ADDR": address, "REMOTE_PORT": port, "wsgi.url_scheme": scheme, "HTTP_HOST": host}
    environ |= {key: value for key, value in own.items() if value}
    for name, value in (("FOR", address), ("PROTO", scheme), ("HOST", host)):
        environ.pop(f"HTTP_X_FORWARDED_{name}", None)
        if value:
            environ[f"HTTP_X_FORWARDED_{name}"] = value


def _list_trusted(environ: Mapping[str, Any], name: str, hops: int) -> list[str]:
    """Returns the entries that the proxies wrote, the farthest one's first. Each proxy appends one or begins a list."""
    values = [part.strip() for part in environ.get(f"HTTP_X_FORWARDED_{name}", "").split(",")]
    return [value for value in values if value][-hops:]


def _parse_address(text: str) -> tuple[str, str] | None:
    """Returns (address, port) in normal form, the port "0" if there is none; or None for what is not an address."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[4] or 0) > 65535:
        return None
    with suppress(ValueError):
        address = ip_address(match[1] or match[2] or match[3])
        return str(getattr(address, "ipv4_mapped", None) or address), match[4] or "0"
    return None


def _list_origins(own: str, environ: Mapping[str, Any]) -> list[str]:
    """Returns the origins of a request's own host, `own` and the same under other names.

    A Host without a port may come from a proxy that hides it: then the port is not compared. On a server that only
    this machine can reach, the names of the loopback address are one host, if the Host is one of them: a name that an
    attacker's DNS resolves to that address is not.
    """
    scheme, _, host = own.partition("://")
    match, origin = _AUTHORITY.fullmatch(host), parse_origin(environ.get("HTTP_ORIGIN"))
    if match is None:
        return [own]
    origins, port = [own], f":{match[2]}" if match[2] else ""
    if _REWRITTEN in environ and not port and origin is not None:
        origins.append(f"{own}:{origin[2]}")
    if match[1].lower() in LOOPBACK_NAMES and environ.get(REGISTRY_KEY) in local_registries:
        origins += [f"{scheme}://{name}{port}" for name in LOOPBACK_NAMES]
    return origins


@lru_cache(maxsize=16)
def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a server that listens on `host`, an address or "localhost"."""
    with suppress(ValueError):
        return host == "localhost" or ip_address(host).is_loopback
    return False


def _is_local(req: Request) -> bool:
    """The `security` of what is for this machine only.

    A request from this machine may be another's: of a site whose name leads here (DNS rebinding), which is the Host
    then, or of a client of a proxy that runs here.
    """
    host = _AUTHORITY.fullmatch(req.environ.get("HTTP_HOST", ""))
    if not is_loopback(req["peer"][0]):
        return False
    if host is None or not is_loopback(host[1].strip("[]").lower()):
        named = printable(req.environ.get("HTTP_HOST", ""))
        req.environ[REFUSAL_KEY] = f"this is for this machine only, and the Host {named} is not localhost"
        return False
    marks = sorted(key for key in req.environ if key in _FORWARDED or key.startswith("HTTP_X_FORWARDED_"))
    if marks:
        header = marks[0].removeprefix("HTTP_").replace("_", "-").title()
        req.environ[REFUSAL_KEY] = f"this is for this machine only, and {header} says that a proxy is in front"
    return not marks


def _check_exposure(app: Any, host: str) -> None:
    """Raises ValueError if what is for this machine only would be served to others."""
    route = next(_list_local_routes(app), None)
    if route is not None:
        why = "trust_proxy says that there is a proxy in front" if is_loopback(host) else f"others may reach {host!r}"
        advice = "give app.board a security, or security=False if everyone may see it"
        raise ValueError(f"the board at {route.rule.rstrip('/')} is for this machine only, but {why}: {advice}")


def _list_local_routes(app: Any) -> Iterator[Any]:
    for route in app.routes if isinstance(app, bottle.Bottle) else ():
        if getattr(route.callback, "security", None) is _is_local:
            yield route
        yield from _list_local_routes(route.config.get("mountpoint.target"))


rooms["proxy"] = SimpleNamespace(
    check=_check_hops,
    is_local=_is_local,
    list_origins=_list_origins,
    rewrite=_rewrite,
    set_up=_set_up_proxy,
)


# ----- cut here: without checks --------------------------------------------------------------------------------------
# Lost: mistakes in routes, options and callbacks are found, with advice, when the application is made or a server is
# started. The core refuses unknown keys of a group; other mistakes show at the request. And the types of what a
# controller and `security` return.


# ---------------------------------------------------------------------------------------------------------------------
# Checks: finds mistakes when the application is made, and says what is wrong, where, and what to do instead.
# Invariant: a program without mistakes runs the same with and without this room. Nothing of the application is called,
# and what cannot be known is no mistake.
# ---------------------------------------------------------------------------------------------------------------------

import difflib
import inspect
from collections.abc import Collection, Sequence
from dataclasses import fields
from types import MethodType
from typing import Literal, Protocol, TypedDict, TypeVar

WEBSOCKET_CALLBACKS = {  # with the arguments of each
    "init": ("state",),
    "websocket_init": ("state",),
    "websocket_handle": ("frame", "state"),
    "websocket_info": ("info", "state"),
    "terminate": ("reason", "req", "state"),
}
GEN_SERVER_CALLBACKS = {
    "init": ("args",),
    "handle_continue": ("term", "state"),
    "handle_call": ("request", "from_", "state"),
    "handle_cast": ("request", "state"),
    "handle_info": ("info", "state"),
    "terminate": ("reason", "state"),
}
_METHODS = (  # IANA's registry, and those in wide use beside it
    "ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT CONNECT COPY DELETE GET HEAD LABEL LINK LOCK M-SEARCH MERGE MKACTIVITY "
    "MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE NOTIFY OPTIONS ORDERPATCH PATCH POST PROPFIND PROPPATCH PURGE PUT "
    "QUERY REBIND REPORT SEARCH SUBSCRIBE TRACE UNBIND UNCHECKOUT UNLINK UNLOCK UNSUBSCRIBE UPDATE UPDATEREDIRECTREF "
    "VERSION-CONTROL ANY _"
)
_COMMON_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_PROTOCOLS = {"websocket": "ws", "websockets": "ws", "wss": "ws", "https": "http"}
_routes: weakref.WeakKeyDictionary[Nova, dict[Any, str]] = weakref.WeakKeyDictionary()  # (rule, method) -> controller
_checked_classes: weakref.WeakSet[Any] = weakref.WeakSet()  # of servers, and modules
_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # endpoints whose `security` has been reported


def _suggest(name: Any, known: Iterable[str]) -> str:
    """Returns the end of a message on an unknown name: the nearest one that is known, else all."""
    nearest = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(sorted(known))}"


# -- types, for editors and checkers

if TYPE_CHECKING:
    import typing_extensions as ext

ClientFrame = tuple[Literal["text"], str] | tuple[Literal["binary", "ping", "pong"], bytes]  # what a handler receives
_Buffer = tuple[Literal["binary"], bytearray | memoryview]
Frame = ClientFrame | _Buffer | tuple[Literal["close"], int, str] | Literal["ping", "pong", "close"]  # what it sends
Info = Message | str  # what a process receives: any tuple counts as a message, and a string has no `once`
_Reply = TypeVar("_Reply")
_Result = (
    Literal["ok"]
    | tuple[Literal["ok", "stop"], Any]
    | tuple[Literal["ok", "stop"], Any, Literal["hibernate"]]
    | tuple[Literal["reply"], _Reply, Any]
    | tuple[Literal["reply"], _Reply, Any, Literal["hibernate"]]
)
HandlerResult = _Result[Frame | list[Frame]]
_Inferred = Frame | tuple[str, Any] | tuple[str, int, str]  # what a frame seems to be in a function without annotations
InferredResult = _Result[_Inferred | Sequence[_Inferred]]


# What a controller and `security` return. Each controller's result may end with the request.
class _BottleResponse(Protocol):
    """A response of bottle's. mypy does not know bottle: by its own name, it would accept anything."""

    @property
    def status_code(self) -> int: ...


_Headers = Mapping[str, Any]
_Body = str | bytes | dict[str, Any]
_Variables = Mapping[str, Any] | list[tuple[str, Any]]
_File = tuple[int, int | None, Any]  # offset, length, path
Response = (
    tuple[Literal["json"], Any]
    | tuple[Literal["json"], int, _Headers, Any]
    | tuple[Literal["json"], int, _Headers, Any, Request]
    | tuple[Literal["status"], int]
    | tuple[Literal["status"], int, _Headers]
    | tuple[Literal["status"], int, _Headers, _Body]
    | tuple[Literal["status"], int, _Headers, _Body, Request]
    | tuple[Literal["ok", "view"], _Variables]
    | tuple[Literal["ok", "view"], _Variables, _Headers]
    | tuple[Literal["ok", "view"], _Variables, _Headers, Request]
    | tuple[Literal["redirect"], str]
    | tuple[Literal["redirect"], str, Request]
    | tuple[Literal["sendfile"], int, _Headers, _File, str]
    | tuple[Literal["sendfile"], int, _Headers, _File, str, Request]
    | _BottleResponse
)
SecurityResult = (
    bool
    | tuple[Literal[True], Any]
    | tuple[Literal[False], _Headers]
    | tuple[Literal[False], int, _Headers]
    | tuple[Literal[False], int, _Headers, _Body]
    | tuple[Literal["redirect"], str]
    | _BottleResponse
)


class ChildSpec(TypedDict, total=False):
    """A child (see `start_supervisor`)."""

    id: ext.Required[Any]
    start: ext.Required[tuple[Any, ...] | list[Any]]
    restart: Literal["permanent", "transient", "temporary"]
    shutdown: float | Literal["infinity", "brutal_kill"]
    type: Literal["worker", "supervisor"]
    scope: Literal["node", "cluster"]


class RunOptions(TypedDict, total=False):  # of `run`, with those of `Server`
    cluster: str | None
    name: str | None
    workers: int
    drain_time: float
    shutdown_delay: float
    reload: bool
    log_level: str
    log_format: str
    ready: Callable[[Server], Any] | None
    children: Iterable[ChildSpec]
    certfile: str | None
    keyfile: str | None
    max_connections: int | None
    reuse_port: bool
    trust_proxy: int


__all__ += ["ChildSpec", "ClientFrame", "Frame", "HandlerResult", "Info", "Response", "SecurityResult"]


# -- groups and routes


def _check_group(app: Nova, group: Any, make_rule: Callable[[str, str], str]) -> None:
    if not isinstance(group, Mapping):
        advice = "" if isinstance(group, str) else f': write Nova([{{"routes": [{_shown(group)}, ...]}}])'
        raise ValueError(f"Nova takes groups of routes, dicts, not {_shown(group)}{advice}")
    where = _name_group(group)
    for key in group:
        if key in ROUTE_OPTIONS or key in _settings_names():
            raise ValueError(f"{where}: {key!r} is an option of a route: (path, controller, {{{key!r}: ...}})")
        if key not in GROUP_KEYS:
            raise ValueError(f"{where} has no key {key!r}; {_suggest(key, GROUP_KEYS)}")
    if not isinstance(group.get("prefix", ""), str):
        raise ValueError(f"{where}: the prefix must be a string, got {group['prefix']!r}")
    _check_security(where, group.get("security", False))
    routes = group.get("routes", ())
    if isinstance(routes, str | bytes | Mapping) or not isinstance(routes, Iterable):
        raise ValueError(f"{where}: routes must be a list of (path, controller[, options]), got {_shown(routes)}")
    for route in routes if isinstance(routes, list | tuple) else ():  # an iterator can be read once only
        _check_route(app, group, route, make_rule)


def _name_group(group: Mapping[Any, Any]) -> str:
    if group.get("prefix"):
        return f"the group with the prefix {group['prefix']!r}"
    match group.get("routes"):
        case [[str(path), *_], *_]:
            return f"the group of the route {path!r}"
    return "a group of routes"


def _check_security(where: str, security: Any) -> None:
    if security is False:
        return
    if not callable(security):
        raise ValueError(f"{where}: security must be False or a function of req, got {security!r}")
    _check_call(f"{where}: security {name_of(security)}", security, ("req",))


def _check_route(app: Nova, group: Mapping[str, Any], route: Any, make_rule: Callable[[str, str], str]) -> None:
    where = _name_group(group)
    if not isinstance(route, tuple | list) or not 2 <= len(route) <= 3:
        raise ValueError(f"{where}: a route must be a tuple (path, controller[, options]), got {_shown(route)}")
    path, controller, options = (*route, {})[:3]
    if isinstance(path, bool) or not isinstance(path, str | int):
        raise ValueError(f"{where}: a route must begin with its path, a string, got {_shown(path)}")
    rule = make_rule(group.get("prefix", ""), path) if isinstance(path, str) else f"the route of the status {path}"
    _check_filters(app, rule)
    try:
        options = dict(options)
    except (TypeError, ValueError):
        raise ValueError(f'{rule}: the options must be a dict such as {{"methods": ["get"]}}, got {options!r}')
    _check_options(rule, options)
    if options.get("protocol", "http") == "ws":
        _check_handler(rule, controller)
    else:
        _check_controller(rule, controller)
    if isinstance(path, str):
        _check_duplicate(app, rule, options, controller)


def _check_filters(app: Nova, rule: str) -> None:
    for name, kind in re.findall(r"<(\w*):(\w+)[:>]", rule):
        if kind not in app.router.filters:
            swapped = f"did you mean <{kind}:{name}>?" if name in app.router.filters else f"write <{kind}>"
            advice = swapped if name in (*app.router.filters, "string") else _suggest(kind, app.router.filters)
            raise ValueError(f"{rule}: there is no filter {kind!r}; {advice}")


def _check_options(rule: str, options: Mapping[str, Any]) -> None:
    known = ROUTE_OPTIONS | _settings_names()
    for key in options:
        if key in GROUP_KEYS - known:
            raise ValueError(f"{rule}: {key!r} is a key of the group, not of a route")
        if key not in known:
            raise ValueError(f"{rule}: there is no option {key!r}; {_suggest(key, known)}")
    protocol, methods = options.get("protocol", "http"), options.get("methods", [])
    if protocol not in ("http", "ws"):
        nearest = _PROTOCOLS.get(str(protocol).lower()) or ("ws" if "socket" in str(protocol).lower() else None)
        advice = f"did you mean {nearest!r}?" if nearest else "it is 'http' or 'ws'"
        raise ValueError(f"{rule}: there is no protocol {protocol!r}; {advice}")
    if not isinstance(methods, list | tuple | set | frozenset):
        raise ValueError(f'{rule}: methods must be a list such as ["get", "post"], got {methods!r}')
    for method in methods:
        _check_method(rule, method)
    if protocol == "ws" and {method.upper() for method in methods} - {"GET", "ANY", "_"}:
        raise ValueError(f"{rule}: a WebSocket route has no methods, since its handshake is a GET")


def _check_method(rule: str, method: Any) -> None:
    """Raises ValueError for what is no method of HTTP, or resembles a common one. Others are accepted in capitals."""
    name = method.upper() if isinstance(method, str) else ""
    if name in _METHODS.split():
        return
    nearest = difflib.get_close_matches(name, _COMMON_METHODS, 1)
    if nearest or name != method or not re.fullmatch("[A-Z0-9_-]+", name):
        advice = f"did you mean {nearest[0].lower()!r}?" if nearest else 'any is "_"; write one of your own in capitals'
        raise ValueError(f"{rule}: {method!r} is no method of HTTP; {advice}")


def _check_controller(rule: str, controller: Any) -> None:
    is_handler = any(hasattr(controller, name) for name in ("websocket_handle", "websocket_info"))
    if is_handler and (isinstance(controller, type) or not callable(controller)):
        raise ValueError(f'{rule}: {_shown(controller)} is a WebSocket handler: its route needs {{"protocol": "ws"}}')
    if not callable(controller):
        advice = {str: "write the function, not its name", ModuleType: "write module.function"}.get(type(controller))
        advice = advice or "write the function without calling it"
        raise ValueError(f"{rule}: a controller must be a function of req, got {_shown(controller)}: {advice}")
    _check_call(f"{rule}: the controller {name_of(controller)}", controller, ("req",))


def _check_duplicate(app: Nova, rule: str, options: Mapping[str, Any], controller: Any) -> None:
    """Raises ValueError for a rule and method that are taken. What a binding is called makes no difference."""
    methods = ["GET"] if options.get("protocol") == "ws" else options.get("methods") or ["_"]
    pattern = re.sub(r"<[^<>:]*", "<", rule)
    taken = _routes.setdefault(app, {})
    for method in {"ANY" if method == "_" else method.upper() for method in methods}:
        if (pattern, method) in taken:
            first = taken[pattern, method]
            method = "any method" if method == "ANY" else method
            raise ValueError(
                f"{rule}: there are two routes for {method}, {first} and {_shown(controller)}, and the second replaces "
                'the first; give them different "methods", or remove one'
            )
        taken[pattern, method] = _shown(controller)


def _shown(thing: Any) -> str:
    """Returns how a message names a function, a class, or anything else."""
    if isinstance(thing, tuple):
        return f"({', '.join(map(_shown, thing))}{',' * (len(thing) == 1)})"
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    return name if isinstance(name, str) else repr(thing)


# -- callbacks


def _check_handler(rule: str, handler: Any) -> None:
    where = f"{rule}: the WebSocket handler {_shown(handler)}"
    _check_callbacks(where, handler, WebSocketHandler, WEBSOCKET_CALLBACKS)
    missing = [name for name in ("init", "websocket_handle", "websocket_info") if not hasattr(handler, name)]
    if missing:
        advice = "inherit from WebSocketHandler, or add them"
        raise ValueError(f"{where} lacks {', '.join(missing)}: {advice}")
    _check_instantiable(where, handler, "every connection has an instance of its own")


def _check_gen_server(server: Any, base: type) -> None:
    """Checks a class, module or object that `start_link` was given; classes once. `base` has the default callbacks."""
    kind = server if isinstance(server, type | ModuleType) else type(server)
    if kind not in _checked_classes:
        _check_callbacks(f"the server {_shown(kind)}", kind, base, GEN_SERVER_CALLBACKS)
        _checked_classes.add(kind)
    _check_instantiable(f"the server {_shown(kind)}", server, "start_link makes the instance")


def _check_instantiable(where: str, thing: Any, why: str) -> None:
    if not isinstance(thing, type):
        return
    if inspect.isabstract(thing):
        lacking: Any = vars(thing)["__abstractmethods__"]
        raise ValueError(f"{where} is abstract: it lacks {', '.join(sorted(lacking))}")
    problem = _find_problem(thing, ())
    if problem:
        raise ValueError(f"{where} must be made without arguments, but it {problem}: {why}; or give an instance")


def _check_spec(spec: Any, places: Iterable[str]) -> None:
    if not isinstance(spec, dict):
        raise ValueError(f"a child must be a dict, got {spec!r}")
    where, start, shutdown = f"child {spec.get('id')!r}", spec.get("start"), spec.get("shutdown", "infinity")
    known = ("id", "start", "restart", "shutdown", "type", "scope")
    values = {"restart": ("permanent", "transient", "temporary"), "type": ("worker", "supervisor"), "scope": [*places]}
    for key in spec:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {_suggest(key, known)}")
        if key in values and spec[key] not in values[key]:
            raise ValueError(f"{where}: {key} must be one of {values[key]}, got {spec[key]!r}")
    if "id" not in spec:
        raise ValueError(f"{where}: no id")
    if not (isinstance(start, tuple | list) and start and callable(start[0])):
        raise ValueError(f"{where}: start must be (function, *arguments), got {start!r}")
    is_seconds = type(shutdown) in (int, float) and 0 <= shutdown < inf
    if not is_seconds and shutdown not in ("infinity", "brutal_kill"):
        raise ValueError(f"{where}: shutdown must be seconds, 'infinity' or 'brutal_kill', got {shutdown!r}")


def _explain_result(server: Any, callback: str, result: Any) -> str:
    """Returns what a server's callback should have returned, for the log."""
    expected = {
        "init": '("ok", state), ("stop", reason) or "ignore"',
        "handle_call": '("reply", value, state), ("noreply", state) or ("stop", reason[, value], state)',
    }.get(callback, '("noreply", state) or ("stop", reason, state)')
    kind = server if isinstance(server, ModuleType) else type(server)
    return f"; {kind.__name__}.{callback} returned {result!r}; expected {expected}"


def _check_callbacks(where: str, thing: Any, base: type, callbacks: Mapping[str, tuple[str, ...]]) -> None:
    for name, arguments in callbacks.items():
        callback, leading = _resolve_callback(thing, name, inspect.getattr_static(thing, name, None))
        if callable(callback):
            _check_call(f"{where}: {name}", callback, (*leading, *arguments))
    own = _list_own_functions(thing, base)
    called = {name for function in own.values() for name in _names_in(function)}  # by its own functions
    for name in sorted(own.keys() - callbacks.keys() - called):
        meant = [callback for callback in callbacks if callback not in own and _is_misspelt(name, callback)]
        if meant:
            nearest = difflib.get_close_matches(name, meant, 1, 0)[0]
            raise ValueError(f"{where} has {name!r}, which is never called; did you mean {nearest!r}?")


def _resolve_callback(thing: Any, name: str, value: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the function that a call of the attribute reaches, and what precedes the arguments; None if unknown."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__, ("cls",) if isinstance(value, classmethod) else ()
    if isinstance(thing, ModuleType) or (not isinstance(thing, type) and name in getattr(thing, "__dict__", ())):
        return value, ()
    return (value, ("self",)) if isinstance(value, FunctionType) else (None, ())


def _names_in(function: Any) -> Iterable[str]:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code.co_names if code is not None else ()


def _list_own_functions(thing: Any, base: type) -> dict[str, Any]:
    """Returns the public functions of a class, an object or a module, by name, without those of `base`."""
    kind = thing if isinstance(thing, type) else type(thing)
    spaces: list[Any] = [vars(one) for one in kind.__mro__ if one not in (object, ModuleType, base)]
    if not isinstance(thing, type):
        spaces.append(getattr(thing, "__dict__", {}))
    functions = FunctionType | staticmethod | classmethod | partial
    own = {name: value for space in spaces for name, value in space.items() if isinstance(value, functions)}
    return {name: value for name, value in own.items() if not name.startswith("_")}


def _is_misspelt(name: str, callback: str) -> bool:
    """Returns whether a name is a callback's with letters transposed, missing or added, or in another case."""
    if name.startswith(callback + "_"):  # with one more word, as in terminate_all
        return False
    head = callback.rpartition("_")[0] + "_"
    longer = callback.startswith("websocket")
    if name.startswith(head):
        name, callback = name[len(head) :], callback[len(head) :]
    name, callback = name.lower().replace("_", ""), callback.replace("_", "")
    if name == callback or name[:1] != callback[:1] or sorted(name) == sorted(callback):
        return name[:1] == callback[:1]
    is_close = difflib.SequenceMatcher(None, name, callback).ratio() >= 0.83
    return is_close and (len(name) != len(callback) or longer)  # handle_cost is not a misspelt handle_cast


def _check_call(where: str, fn: Any, arguments: tuple[str, ...]) -> None:
    if _is_async(fn):
        raise ValueError(f"{where} is an async def, which is not supported: use def; while it waits, others run")
    problem = _find_problem(fn, arguments)
    if problem:
        raise ValueError(f"{where} is called with ({', '.join(arguments)}), but it {problem}")


def _is_async(fn: Any) -> bool:
    while isinstance(fn, partial):
        fn = fn.func
    if not isinstance(fn, type) and not inspect.isroutine(fn):
        fn = type(fn).__call__
    is_function = type(fn) in (FunctionType, MethodType)  # not a mock, which seems to be anything
    return is_function and (inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn))


def _find_problem(fn: Any, arguments: tuple[str, ...]) -> str:
    """Returns why `fn` cannot be called with these arguments, "" if it can or if that cannot be known."""
    try:
        if hasattr(fn, "__signature__"):  # what a decorator wants others to see
            return ""
        signature = inspect.signature(fn, follow_wrapped=False)
    except Exception:  # of a function in C; of annotations that cannot be evaluated
        return ""
    try:
        signature.bind(*arguments)
    except TypeError:
        shown = signature.replace(return_annotation=inspect.Signature.empty)
        return f"takes {shown}"
    return ""


# -- settings


def _settings_names() -> set[str]:
    return {field.name for field in fields(Settings)}


def _is_count(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool) and value >= 0


def _is_seconds(value: Any) -> bool:
    kind = type(value)
    is_number = hasattr(kind, "__float__") or hasattr(kind, "__index__")
    return is_number and not isinstance(value, bool) and bool(value > 0)


def _is_names(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes)


def _is_rate(value: Any) -> bool:
    match value:
        case (int(messages), int() | float() as seconds):
            return messages > 0 and 0 < seconds < inf
    return value is None


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {  # by a setting's name, or by its type
    "max_body": (_is_count, "a number of bytes"),
    "max_message_size": (_is_count, "a number of bytes"),
    "trust_proxy": (lambda value: isinstance(value, int) and value >= 0, "a number of proxies, or True for one"),
    "subprotocols": (_is_names, "a list of names"),
    "on_slow": (lambda value: value in ("close", "drop_oldest", "drop_new"), "'close', 'drop_oldest' or 'drop_new'"),
    "rate": (_is_rate, "(messages, seconds), such as (50, 1)"),
    "on_flood": (lambda value: value in ("wait", "close"), "'wait' or 'close'"),
    "origins": (lambda value: value in (None, "*") or _is_names(value), "a list of origins, or '*'"),
    "int": (_is_count, "a whole number of 0 or more"),
    "float": (_is_seconds, "a number of seconds above 0"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "a string"),
}


def _check_settings(where: str, options: Mapping[str, Any]) -> None:
    types = {field.name: field.type for field in fields(Settings)}
    for name, value in options.items():
        if name in GROUP_KEYS:
            raise ValueError(f'{where}: {name!r} is a key of a group: Nova([{{"{name}": ..., "routes": [...]}}])')
        if name not in types:
            raise ValueError(f"{where}: there is no option {name!r}; {_suggest(name, types)}")
        is_right, what = _EXPECTED.get(name) or _EXPECTED.get(str(types[name])) or (bool, "")
        if what and not is_right(value):
            raise ValueError(f"{where}: {name} must be {what}, got {value!r}")
    for origin in () if options.get("origins") in (None, "*") else options["origins"]:
        if parse_origin(origin) is None:
            raise ValueError(
                f"{where}: expected an origin such as 'https://example.org', without a path, got {origin!r}"
            )


# -- at run time


def _warn_of_answer(endpoint: Any, answer: Any, req: Request) -> None:
    """Logs, once for each route, that `security` has returned neither yes nor no."""
    if endpoint not in _warned:
        _warned.add(endpoint)
        log.warning(
            "security %s returned %r at %s, which is neither yes nor no, so the client gets a 401; expected True, "
            '(True, auth_data), False, (False, headers), (False, status, headers[, body]) or ("redirect", url)',
            _shown(endpoint.security),
            answer,
            printable(req["path"]),
        )


def _explain_json(data: Any) -> str:
    """Returns what in `data` cannot be encoded as JSON, and where; "" if nothing is found."""
    try:
        return _find_unencodable(data, "data", ())
    except RecursionError:
        return "data is nested too deep for JSON"


def _find_unencodable(value: Any, where: str, above: tuple[int, ...]) -> str:
    if id(value) in above:
        return f"at {where}: it contains itself"
    if isinstance(value, dict):
        keys = [key for key in value if not isinstance(key, str | int | float | None) or not _is_scalar(key)]
        if keys:
            return f"at {where}: the key {keys[0]!r} is not JSON"
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        shown = repr(value) if isinstance(value, str | float) else type(value).__name__
        return "" if _is_scalar(value) else f"at {where}: {shown} is not JSON"
    inside = (_find_unencodable(part, f"{where}[{key!r}]", (*above, id(value))) for key, part in items)
    return next(filter(None, inside), "")


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)  # a lone surrogate is not UTF-8
    return isinstance(value, int | None) or (isinstance(value, float) and -inf < value < inf)


rooms["checks"] = SimpleNamespace(
    check_child=_check_spec,
    check_group=_check_group,
    check_gen_server=_check_gen_server,
    check_settings=_check_settings,
    explain_json=_explain_json,
    explain_result=_explain_result,
    warn_of_answer=_warn_of_answer,
)
# ----- cut here: without views ---------------------------------------------------------------------------------------
# Lost: templates and files: ("ok", variables), ("view", variables), ("sendfile", ...), static; the look of pages.


# ---------------------------------------------------------------------------------------------------------------------
# Views: templates and files, which bottle renders and sends; the look of this file's pages, and NovaSocket for yours.
# Invariant: as in requests and responses, no sockets; a bottle response goes out. No path leads out of a static folder.
# ---------------------------------------------------------------------------------------------------------------------

__all__ += ["static"]


def _to_response(result: Any, name: str) -> HTTPResponse:
    match result:
        case ("ok" | "view", Mapping() | list() as variables):
            return _render_view(name, dict(variables), {})
        case ("ok" | "view", Mapping() | list() as variables, Mapping() as options):
            return _render_view(name, dict(variables), options)
        case ("sendfile", status, headers, (int(at), int() | None as size, path), str(mime)):
            return _send_file(status, headers, at, size, path, mime)
    raise ValueError(f"not a response: {result!r}")


def _render_view(name: str, variables: dict[str, Any], options: Mapping[str, Any]) -> HTTPResponse:
    """Renders a template. Raises ValueError for an unknown option, and with the folders if there is no template."""
    unknown = set(options) - {"view", "headers", "status_code"}
    if unknown:
        raise ValueError(f"a view has no option {', '.join(sorted(unknown))}; it has view, headers and status_code")
    try:
        body = bottle.template(options.get("view", name), variables)
    except bottle.TemplateError as error:
        folders = " and ".join(map(os.path.abspath, bottle.TEMPLATE_PATH))
        endings = ", .".join(bottle.SimpleTemplate.extensions)
        raise ValueError(f"{error} The folders searched, for .{endings}, are {folders} (bottle.TEMPLATE_PATH).")
    return make_response(options.get("status_code", 200), options.get("headers", {}), body)


def _send_file(
    status: int, headers: Mapping[str, str], offset: int, length: int | None, path: Any, mime: str
) -> HTTPResponse:
    """Sends a file, or `length` bytes of it from `offset` on. Raises HTTPError 404 if it does not exist."""
    if offset < 0:
        raise ValueError(f"expected an offset of 0 or more, got {offset}")
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

    response = make_response(status, headers, chunks(length))
    response.headers.setdefault("Content-Type", mime)
    response.headers["Content-Length"] = str(length)
    return response


def static(folder: str | os.PathLike[str]) -> Callable[[Request], Any]:
    """Returns a controller that serves the files of `folder`, for a route that ends in "[...]".

    It serves ranges, ETag and Last-Modified (RFC 9110 §8.8, §13, §14), and a folder's index.html. A path that leads out
    of the folder, also by a symbolic link, is a 404. Raises ValueError if there is no such folder.
    """
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"there is no folder {root}")
    return partial(_serve_static, root)


def _serve_static(root: str, req: Request) -> Any:
    path = req["bindings"].get("...")
    if path is None:
        raise ValueError('the path of a static route must end in "[...]"')
    if req["method"] not in ("GET", "HEAD"):
        return "status", 405, {"Allow": "GET, HEAD"}
    file = _find_file(root, path + "index.html" if path.endswith("/") or not path else path)
    if file is not None and os.path.isdir(file):  # relative links in its index.html need the slash
        return "redirect", f"./{bottle.urlquote(os.path.basename(path))}/"
    if file is None or not os.path.isfile(file):
        return "status", 404
    etag = _make_etag(os.stat(file))
    _normalize_conditions(req.environ, etag)
    return bottle.static_file(os.path.relpath(file, root), root, etag=etag)


def _find_file(root: str, path: str) -> str | None:
    """Returns the real path, or None for one outside of `root`."""
    try:
        file = os.path.realpath(os.path.join(root, path.lstrip("/")))
    except (OSError, ValueError):  # too long, or with a NUL
        return None
    return file if os.path.commonpath([root, file]) == root else None


def _make_etag(stat: os.stat_result) -> str:
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'


def _normalize_conditions(environ: dict[str, Any], etag: str) -> None:
    """Reduces the conditions of a request to what bottle understands: one ETag, compared as a string."""
    known = environ.get("HTTP_IF_NONE_MATCH")
    if known is not None:
        environ.pop("HTTP_IF_MODIFIED_SINCE", None)  # RFC 9110 §13.1.3
        environ["HTTP_IF_NONE_MATCH"] = etag if etag in known or known == "*" else known  # a list; W/ of a proxy
    is_current = environ.get("HTTP_IF_RANGE", etag) == etag
    if not is_current or not environ.get("HTTP_RANGE", "").startswith("bytes="):
        environ.pop("HTTP_RANGE", None)  # RFC 9110 §13.1.5, §14.2


# The look that all pages share. Red (--bad) is for errors and danger only; --accent is for what can be clicked.
STAR = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'>"
    "<path fill='%23cf8a12' d='M12 0q1 11 12 12-11 1-12 12-1-11-12-12 11-1 12-12z'/></svg>"
)
STYLE = """
  :root { color-scheme: light dark; --paper: #f4f3ee; --card: #fffefa; --ink: #1a2426; --dim: #566266; --line: #dedcd2;
          --edge: #848d8e; --accent: #0c6470; --on: #fff; --tint: #e0efee; --star: #cf8a12; --flare: #ffebb0;
          --bad: #b02318; --warn: #84500a; --good: #2d7d4f }
  @media (prefers-color-scheme: dark) { :root { --paper: #0f1518; --card: #171f23; --ink: #e7ece8; --dim: #9aa8aa;
          --line: #2b373c; --edge: #6b7b80; --accent: #6ccbd0; --on: #08262a; --tint: #17383c; --star: #f2b84b;
          --flare: #3c3112; --bad: #ff9d90; --warn: #f0ba62; --good: #6cc592 } }
  * { box-sizing: border-box } [hidden] { display: none !important }
  body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
         background: var(--paper); color: var(--ink); overflow-wrap: anywhere }
  h1, h2, h3, p, ul, dl, dd { margin: 0; padding: 0 } .dim, time, small { color: var(--dim) } a { color: var(--accent) }
  h1, h2 { font: 600 1.25rem/1.2 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; letter-spacing: -.04em }
  h2 { font-size: 1.0625rem } h1 a { color: inherit; text-decoration: none }
  .home::before { content: ""; display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.2em;
         margin-right: .35em; background: url("STAR") }
  input, textarea, button, summary { font: inherit; color: inherit; border: 1px solid var(--edge); border-radius: .5rem;
         padding: .4rem .7rem; background: var(--card); min-height: 2.5rem }
  ::placeholder { color: var(--dim); opacity: 1 } [aria-invalid=true] { border: 2px solid var(--bad) }
  button, summary { cursor: pointer } button:hover, summary:hover { background: var(--tint) }
  .main, .main:hover { background: var(--accent); border-color: var(--accent); color: var(--on); font-weight: 600 }
  .error { color: var(--bad) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
""".replace("STAR", STAR)
HEAD = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style>
"""


def _error_page(title: str, text: str) -> str:
    """Returns the page of an error; `title` and `text` are HTML."""
    look = "<style>body { max-width: 32rem; padding: 15vh 1rem } p { margin: 1rem 0; color: var(--dim) }</style>"
    home = '<p><a href="/">Home page</a></p>'
    return f"{HEAD}<title>{title}</title>{look}<main><h1>{title}</h1><p>{text}</p>{home}</main></html>\n"


# The client for pages, JavaScript that depends on nothing: serve it, or copy it.
CLIENT = """/* A WebSocket that reconnects. Copy it.

     const notes = new NovaSocket("/notifications?since=");  // replays what was missed, if the server keeps it
     notes.on("open", load).on("nova_resync", load);  // at first, and whenever messages may be missing
     notes.on("note_created", note => ...);           // {"event": "note_created", "data": ...}
     notes.on("message", text => ...);                // any message, as received
     notes.on("closed", ({ code, reason }) => ...);   // why the connection ended; 1006: without a close frame
     notes.on("state", socket => ...);                // connecting, open, waiting (until `retryAt`), offline, closed,
                                                      // refused (`refusal` says why): only now() tries again
     notes.off("message", fn).send("text");           // false if it can neither be sent nor queued

   The URL may be a function, called for each connection: new NovaSocket(async () => `/live?token=${await fresh()}`).
   The second argument is a subprotocol, or a list of them. A server refuses by the close code 1008, or by a 401, 403 or
   redirect before the 101. A message sent while the connection breaks may be lost. The heartbeat is an empty binary
   message that the server returns (`case ("binary", b""): return "reply", frame, state`); it follows each message, so
   that a dead connection shows within 5 s. If the server does not return it, only the browser detects those. */
"use strict";
class NovaSocket {
  static OWN = ["open", "message", "state", "closed"];  // the server cannot send events of these names
  static LIMIT = 100;  // messages queued while disconnected
  static BEAT = 20000; static ANSWER = 5000; static CONNECT = 10000;  // ms: silence before a heartbeat; timeouts
  static delay(tries, random = Math.random()) {  // seconds: 0.5 to 4, so that many clients do not come back together,
    const least = Math.min(15, 0.5 * 2 ** tries), most = Math.min(30, 4 * 2 ** tries);  // doubled up to 15 to 30
    return least + (most - least) * random;
  }

  constructor(url, protocols = []) {
    const { signal } = this.end = new AbortController();
    Object.assign(this, { url, protocols, listeners: new Map(), queue: [], tries: 0, position: null, answers: false });
    addEventListener("online", () => this.now(), { signal });
    addEventListener("offline", () => this.lost(), { signal });
    addEventListener("pagehide", () => this.leave("offline"), { signal });  // the browser may keep the page
    addEventListener("pageshow", event => event.persisted && this.now(), { signal });
    document.addEventListener("visibilitychange", () => document.hidden || this.now(), { signal });
    this.connect();
  }
  on(event, fn) {
    this.listeners.set(event, [...this.listeners.get(event) ?? [], fn]);
    return this;
  }
  off(event, fn) {
    this.listeners.set(event, (this.listeners.get(event) ?? []).filter(other => other !== fn));
    return this;
  }
  send(data) {
    if (this.state === "open") {
      this.socket.send(data);
      if (!this.beating) this.beat();
    } else if (["closed", "refused"].includes(this.state) || this.queue.length >= NovaSocket.LIMIT) return false;
    else this.queue.push(data);
    return true;
  }
  close() { this.end.abort(); this.leave("closed"); }
  now() {  // connects, or checks the connection, immediately
    if (this.state === "open") this.beat();
    else if (["waiting", "offline", "refused"].includes(this.state)) this.connect();
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
  async connect() {
    const attempt = this.attempt = {};
    this.beating = false;
    this.become("connecting", NovaSocket.CONNECT, this.lost);
    try {
      const given = typeof this.url === "function" ? await this.url() : this.url;
      if (this.attempt !== attempt) return;  // lost or closed meanwhile
      this.address = new URL(given, location.href);
      if (this.position !== null) this.address.searchParams.set("since", this.position);
      const socket = this.socket = new WebSocket(this.address.href.replace(/^http/, "ws"), this.protocols);
      socket.binaryType = "arraybuffer";
      socket.onopen = () => this.opened();
      socket.onmessage = ({ data }) => this.received(data);
      socket.onclose = event => this.lost(event);
    } catch (error) {
      console.error(error);
      if (this.attempt === attempt) this.lost();
    }
  }
  opened() {
    this.since = Date.now();
    this.become("open", 0, this.beat);
    this.emit("open", this);
    while (this.queue.length && this.state === "open") this.socket.send(this.queue.shift());
  }
  beat() {
    this.beating = true;
    this.socket.send(new Uint8Array());
    this.after(NovaSocket.ANSWER, () => this.answers ? this.lost() : this.rest());
  }
  rest() {  // until the next heartbeat
    this.beating = false;
    this.after(NovaSocket.BEAT, this.beat);
  }
  received(data) {
    this.rest();  // the connection is alive
    if (data.byteLength === 0) return void (this.answers = true);
    this.emit("message", data);
    let json = {};
    if (data[0] === "{") try { json = JSON.parse(data); } catch { /* not JSON */ }
    if (json.position !== undefined) this.position = json.position;
    if (!NovaSocket.OWN.includes(json.event)) this.emit(json.event, json.data);
  }
  lost({ code = 1006, reason = "" } = {}) {
    const was = this.state;
    if (was === "refused") return;  // the browser has gone offline
    if (was === "open" && Date.now() - this.since > 5000) this.tries = 0;  // not if it is closed after opening
    if (code === 1008) this.refuse(reason || "the server has closed the connection");
    else {
      const wait = NovaSocket.delay(this.tries++) * 1000;
      this.retryAt = Date.now() + wait;
      this.leave(navigator.onLine ? "waiting" : "offline", wait, this.connect);
      if (was !== "open" && this.tries % 4 === 3) this.ask();
    }
    if (["connecting", "open"].includes(was)) this.emit("closed", { code, reason });
  }
  async ask() {  // why handshakes fail, which browsers do not tell: an event stream is refused for the same reasons
    const { attempt } = this, end = new AbortController(), headers = { Accept: "text/event-stream" };
    const url = this.address?.href.replace(/^ws/, "http");
    try {
      const answer = await fetch(url, { headers, redirect: "manual", cache: "no-store", signal: end.signal });
      const refused = answer.type === "opaqueredirect" || [401, 403].includes(answer.status);
      end.abort();
      if (refused && this.attempt === attempt) this.refuse(answer.status ? `status ${answer.status}` : "log in first");
    } catch { /* the server cannot be reached */ }
  }
  refuse(why) {
    this.tries = 2;  // so that the next failure asks again
    this.refusal = why;
    this.leave("refused");
  }
  leave(...next) {
    this.attempt = null;
    if (this.socket) this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket?.close();
    this.become(...next);
  }
}
"""

rooms["views"] = SimpleNamespace(
    to_response=_to_response,
    error_page=_error_page,
    CLIENT=CLIENT,
    STYLE=STYLE,
    HEAD=HEAD + f'<link rel="icon" href="{STAR}">\n',  # of the pages of this file; an error's has the site's icon
)
# ----- cut here: without plugins -------------------------------------------------------------------------------------
# Lost: plugins in Nova's form, cors, status routes. app.mount is bottle's, and has no security.


# ---------------------------------------------------------------------------------------------------------------------
# Plugins: what runs before and after controllers, pages for statuses, and other applications below a prefix.
# Invariant: a request to an application that uses none of these runs no code of this room.
#
# A plugin is a class, a module or any object with pre_request(req, env, options, state), post_request (the same), or
# both. Optional are init() or init(options), whose result is the first state, and stop(state), which app.close() calls.
# The state belongs to the application: all entries of a plugin share it. `env` is a dict of the request: app, callback,
# secure, plugin_state, and what plugins keep there. Headers for the response are set in req["resp_headers"], before and
# after. After, req["resp_status_code"] is the status. A callback returns, as in nova_plugin_handler,
#
#   ("ok", req, state)                the next plugin, or the controller
#   ("break", req, state)             skips the other plugins of this kind
#   ("stop", answer, req, state)      answers as a controller does, or ("reply"[, status[, headers]], body); this skips
#                                     security, the controller and post_request. Without an answer it is a 204
#   ("error", reason)                 a 500, as are a crash and any other value
#
# and "ok" or "break" with an answer: before the controller its headers count, after it the answer is the response.
# ---------------------------------------------------------------------------------------------------------------------

from copy import copy
from inspect import signature

__all__ += ["cors"]

_KINDS = ("pre_request", "post_request")
_REQUEST, _HEADERS, _PAGE = (f"nova_lite.plugins.{name}" for name in ("request", "headers", "page"))  # in the environ
CORS_OPTIONS: dict[str, Any] = {  # and their defaults
    "origins": None, "headers": "*", "methods": "*", "expose": [], "credentials": False, "max_age": None,
}  # fmt: skip
_ENTITY = re.compile("Content-(?!Security)|Etag|Last-Modified|Accept-Ranges", re.IGNORECASE)  # of one body only
_PLUGIN_RESULTS = 'expected ("ok" | "break" | "stop"[, answer], req, state) or ("error", reason)'


class _Plugin:
    """A plugin of one application: its only instance, and its state, which all its callbacks share."""

    def __init__(self, plugin: Any, options: Any) -> None:
        self.name = plugin.__name__ if isinstance(plugin, ModuleType) else name_of(plugin)
        self.instance = plugin() if isinstance(plugin, type) else plugin
        init = getattr(self.instance, "init", dict)
        wants_options = init is not dict and bool(signature(init).parameters)
        self.state = init(options) if wants_options else init()

    def stop(self) -> None:
        if hasattr(self.instance, "stop"):
            self.instance.stop(self.state)


class _PluginEntry:
    """A plugin at one of its places, before or after the controllers of a group."""

    def __init__(self, extension: _Extension, kind: str, plugin: Any, options: Any = None, priority: int = 0) -> None:
        options = {} if options is None else options
        if kind not in _KINDS:
            raise ValueError(f"a plugin runs at {' or '.join(_KINDS)}, not at {kind!r}")
        if id(plugin) not in extension.plugins:
            extension.plugins[id(plugin)] = _Plugin(plugin, options)
        self.plugin, self.kind, self.priority = extension.plugins[id(plugin)], kind, priority
        try:
            self.callback = getattr(self.plugin.instance, kind)
            signature(self.callback).bind(None, None, None, None)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"the plugin {self.plugin.name} needs {kind}(req, env, options, state)") from None
        check = getattr(self.plugin.instance, "check_options", None)
        self.options = options if check is None else check(options)

    def run(self, req: Request, env: dict[str, Any]) -> tuple[str, Any, Request]:
        """Returns ("ok", "break" or "stop"; an answer or None; the request). What goes wrong is a 500 that stops."""
        env["plugin_state"] = self.kind
        try:
            result = self.callback(req, env, self.options, self.plugin.state)
        except HTTPResponse as response:
            return "stop", response, req
        except Exception as error:
            where = self.plugin.name, self.kind, req["method"], printable(req["path"])
            log.exception("the plugin %s crashed in %s at %s %s", *where)
            req.set("crash_info", {"status_code": 500, "class": type(error).__name__, "reason": error})
            return "stop", HTTPError(500), req
        match result:
            case ("ok" | "break" | "stop" as verdict, *answer, Request() as changed, state) if len(answer) < 2:
                self.plugin.state = state
                changed.set("resp_headers", req["resp_headers"])
                return verdict, answer[0] if answer else None, changed
            case ("error", reason):
                path = printable(req["path"])
                log.error("%s.%s: %r at %s %s", self.plugin.name, self.kind, reason, req["method"], path)
            case reason:
                log.error("%s.%s returned %.500r; %s", self.plugin.name, self.kind, reason, _PLUGIN_RESULTS)
        req.set("crash_info", {"status_code": 500, "class": "error", "reason": reason})
        return "stop", HTTPError(500), req

    def convert(self, answer: Any, req: Request) -> HTTPResponse:
        """Returns an answer as a response: what a controller may return, Nova's ("reply", ...), or None, a 204."""
        form: Any = answer
        try:
            match answer:
                case None:
                    form = ("status", 204)
                case ("reply", *given, str() | bytes() as body) if len(given) < 3:
                    form = "status", given[0] if given else 200, dict(given[1]) if given[1:] else {}, body
            return to_response(form, req["method"], self.plugin.name)
        except HTTPResponse as response:
            return response
        except Exception:
            log.exception("%s.%s returned %r, which is no response", self.plugin.name, self.kind, answer)
            return HTTPError(500)


class _Group:
    """What the routes of a group have of this room. It stands among a route's plugins, as a mark that does nothing."""

    def __init__(self, prefix: str, entries: Iterable[_PluginEntry] | None, statuses: Mapping[int, Any]) -> None:
        segments = [part for part in prefix.split("/") if part]
        pattern = ["[^/]+" if part[0] == ":" or "<" in part else re.escape(part) for part in segments]
        self.pattern = re.compile("".join(f"/{part}" for part in pattern) + "(/|$)")
        self.length = len(segments)
        self.statuses = statuses
        self.inherits = entries is None  # whether it has the plugins for all
        # cors is the first: its headers are on what another plugin answers too, and a preflight has no cookies.
        ordered = sorted(entries or (), key=lambda entry: (entry.plugin.instance is not cors, entry.priority))
        self.before = [entry for entry in ordered if entry.kind == "pre_request"]
        self.after = [entry for entry in ordered if entry.kind == "post_request"]

    def apply(self, callback: Any, _route: bottle.Route) -> Any:
        return callback

    def run_before(self, req: Request, env: dict[str, Any]) -> tuple[HTTPResponse | None, Request]:
        """Returns the response, if a plugin has stopped the request, and the request."""
        for entry in self.before:
            verdict, answer, req = entry.run(req, env)
            if verdict == "stop":
                return entry.convert(answer, req), req
            if answer is not None:  # as in Nova: the controller's status and body replace these
                req["resp_headers"].dict.update(entry.convert(answer, req).headers.dict)
            if verdict == "break":
                break
        return None, req

    def run_after(self, req: Request, env: dict[str, Any], response: HTTPResponse) -> HTTPResponse:
        for entry in self.after:
            req.set("resp_headers", response.headers)
            req.set("resp_status_code", response.status_code)
            verdict, answer, req = entry.run(req, env)
            if answer is not None:
                response.close()
                headers = {name: values for name, values in response.headers.dict.items() if not _ENTITY.match(name)}
                response = _isolate(entry.convert(answer, req))
                _add_headers(response, headers)
            if verdict != "ok":
                break
        return response


class _Extension(dict[int, Any]):
    """What this room adds to an application: its outermost plugin of bottle's, and its error handlers.

    bottle's handlers of errors, `app.error(404)`, remain those of the statuses for which no group has a route.
    """

    def __init__(self, app: Nova) -> None:
        super().__init__(app.error_handler)
        self.app = app
        self.plugins: dict[int, _Plugin] = {}  # by the id of what the application has named
        self.for_all = _Group("", (), {})
        self.groups: list[_Group] = []  # those with longer prefixes first, then those added last
        app.__dict__["error_handler"] = self  # bottle takes an attribute that is set again for a mistake
        app.plugins.insert(0, SimpleNamespace(name="nova", apply=self.apply, close=self.close))
        app.reset()

    def add(self, group: _Group) -> None:
        self.groups = sorted([group, *self.groups], key=lambda group: -group.length)

    def close(self) -> None:
        for plugin in self.plugins.values():
            plugin.stop()

    def find_group(self, route: bottle.Route | None) -> _Group:
        """Returns the group of a route; without one, what is for all groups."""
        marks = [mark for mark in route.plugins if isinstance(mark, _Group)] if route is not None else []
        return marks[0] if marks else self.for_all

    def find_plugins(self, route: bottle.Route) -> _Group:
        group = self.find_group(route)
        return self.for_all if group.inherits else group

    # -- around a controller

    def apply(self, callback: Any, route: bottle.Route) -> Any:
        endpoint, make_request, group = route.callback, self.make_request, self.find_plugins(route)
        if hasattr(endpoint, "make_request"):
            make_request = partial(type(endpoint).make_request, endpoint)
            endpoint.make_request = partial(_find_request, make_request)
            env = {"app": self.app, "callback": endpoint.controller, "secure": endpoint.security}
        else:  # a route of bottle's own
            env = {"app": self.app, "callback": endpoint, "secure": False}
        return partial(self.call, callback, route, group, make_request, env)

    def make_request(self, bindings: dict[str, Any]) -> Request:
        return Request(bottle.request.environ, bindings, self.app.settings)

    def call(
        self, callback: Any, route: bottle.Route, group: _Group, make_request: Any, env: Any, **bindings: Any
    ) -> HTTPResponse:
        environ, env = bottle.request.environ, dict(env)
        req = environ[_REQUEST] = make_request(dict(bindings))
        req.set("resp_headers", bottle.HeaderDict())
        response, req = group.run_before(req, env)
        environ[_REQUEST], headers = req, req["resp_headers"].dict
        if response is not None:
            response = _isolate(getattr(route.callback, "answer", lambda response, _req: response)(response, req))
            _add_headers(response, headers)
        else:
            response = _isolate(_call_route(callback, route, bindings))
            _add_headers(response, headers)
            response = group.run_after(req, env, response)
        environ[_HEADERS] = headers
        if not isinstance(response, HTTPError):
            del environ[_REQUEST]  # a cycle, which would be there until the next garbage collection
        elif environ.get("bottle.app") is not self.app:  # merged into another one
            response = self.make_page(response, req)
        return response

    # -- errors

    def get(self, status: Any, _default: Any = None) -> Any:
        """Returns bottle's handler of a status: it gets an error, sets bottle's response, and returns the body."""
        return self.handle_error

    def handle_error(self, error: HTTPError) -> Any:
        environ = bottle.request.environ
        response: HTTPResponse = error
        req = _find_request(self.make_request, {})
        if _HEADERS not in environ:
            req.set("resp_headers", bottle.HeaderDict())
            environ[_HEADERS] = req["resp_headers"].dict
            response, req = self.handle_unmatched(error, req)
        if isinstance(response, HTTPError):
            response = self.make_page(response, req)
        _add_headers(response, environ[_HEADERS])
        response.apply(bottle.response)
        if isinstance(response, HTTPError):
            return super().get(response.status_code, self.app.default_error_handler)(response)
        return response.body

    def handle_unmatched(self, error: HTTPError, req: Request) -> tuple[HTTPResponse, Request]:
        """Returns the response to a request without a route, and the request.

        If its path has a route for another method, pre_request runs: it may be a preflight. An unknown path is a 404.
        """
        if error.status_code == 404:
            for group in self.list_groups(req):
                for entry in (self.for_all if group.inherits else group).before:
                    if entry.plugin.instance is cors:
                        cors.add_headers(req, entry.options)
                        return error, req
        allowed = error.headers.get("Allow", "").split(",") if error.status_code == 405 else []
        route = self.find_route(req, allowed)
        if route is None or True in route.skiplist:
            return error, req
        env = {"app": self.app, "callback": None, "secure": False, "allowed": allowed}
        response, req = self.find_plugins(route).run_before(req, env)
        return response or error, req

    def find_route(self, req: Request, allowed: list[str]) -> bottle.Route | None:
        """Returns the route of the path for the method that a preflight names, or for another one."""
        asked = req.environ.get("HTTP_ACCESS_CONTROL_REQUEST_METHOD", "")
        for method in sorted(allowed, key=lambda method: method != asked):
            with suppress(HTTPError):
                return self.app.match({"REQUEST_METHOD": method, "PATH_INFO": req.environ["PATH_INFO"]})[0]
        return None

    def list_groups(self, req: Request) -> list[_Group]:
        """Returns the groups with a prefix of the request's path, those with longer ones first."""
        path = "/" + req.environ["PATH_INFO"].removeprefix(self.app.config.get("_mount.prefix", "")).lstrip("/")
        return [group for group in self.groups if group.pattern.match(path)] + [self.for_all]

    def make_page(self, error: HTTPError, req: Request) -> HTTPResponse:
        """Returns the response of the status route of an error, with the error's headers, or the error."""
        environ, status = bottle.request.environ, error.status_code
        groups = [self.find_group(environ.get("bottle.route")), *self.list_groups(req)]
        endpoint = next((group.statuses[status] for group in groups if status in group.statuses), None)
        if endpoint is None or _PAGE in environ:  # the page itself is an error: that one is bottle's
            return error
        environ[_PAGE] = True
        req.set("resp_status_code", status)
        req.set("reason", str(error.body or error.status_line[4:]))
        if error.exception is not None:  # a route of bottle's own
            reason = {"class": type(error.exception).__name__, "reason": error.exception}
            req.set("crash_info", {"status_code": status, **reason})
        result = _with_status(endpoint.guarded_call(endpoint.controller, req), status)
        response = _isolate(endpoint.answer(result, req))
        _add_headers(response, error.headers.dict)
        return response


def _find_request(make_request: Callable[[dict[str, Any]], Request], bindings: dict[str, Any]) -> Request:
    """Returns the request that the plugins have seen, or a new one."""
    req = bottle.request.environ.get(_REQUEST)
    return make_request(bindings) if req is None else req


def _isolate(response: HTTPResponse) -> HTTPResponse:
    """Returns a copy with headers of its own: a controller may return the same response each time."""
    copied = copy(response)
    copied._headers = {name: list(values) for name, values in response._headers.items()}
    return copied


def _call_route(callback: Any, route: bottle.Route, bindings: dict[str, Any]) -> HTTPResponse:
    """Returns the response of a route. A crash in one of bottle's own is the error that bottle makes of it."""
    try:
        result = callback(**bindings)
    except HTTPResponse as raised:
        return raised
    except Exception as error:
        if not route.app.catchall or isinstance(error, bottle.RouteReset):
            raise
        environ, text = bottle.request.environ, traceback.format_exc()
        environ["wsgi.errors"].write(text)
        environ["bottle.exc_info"] = sys.exc_info()
        return HTTPError(500, "Internal Server Error", error, text)
    if isinstance(result, HTTPResponse):
        return result
    response = bottle.response.copy(HTTPResponse)
    response.body = result
    return response


def _with_status(result: Any, status: int) -> Any:
    """Returns a controller's result with the status, if it has none of its own."""
    match result:
        case (*form, Request()):
            return _with_status(tuple(form), status)
        case ("json", data):
            return "json", status, {}, data
        case ("ok" | "view" as kind, variables):
            return kind, variables, {"status_code": status}
        case ("ok" | "view" as kind, variables, Mapping() as options):
            return kind, variables, {"status_code": status, **options}
    return result


def _add_headers(response: HTTPResponse, headers: Mapping[str, list[str]]) -> None:
    """Adds the headers that a response has not. `Vary` and `Set-Cookie` are merged."""
    for name, values in headers.items():
        if name == "Vary":
            _add_vary(response.headers, ", ".join(values))
        elif name == "Set-Cookie":
            known = response.headers.dict.setdefault(name, [])
            known.extend(value for value in values if value not in known)
        else:
            response.headers.dict.setdefault(name, list(values))


def _add_vary(headers: Any, names: str) -> None:
    known = [name.strip() for name in ", ".join(headers.getall("Vary")).split(",") if name.strip()]
    lower = [name.lower() for name in known]
    known += [name for name in map(str.strip, names.split(",")) if name.lower() not in lower]
    headers["Vary"] = "*" if "*" in known else ", ".join(known)


def _extend(app: Nova) -> _Extension:
    handlers = app.error_handler
    return handlers if isinstance(handlers, _Extension) else _Extension(app)


def _install(app: Nova, plugins: Any) -> None:
    """Adds the plugins for all routes: bottle's, and those in Nova's form, which are tuples."""
    plugins = list(plugins)
    _check_plugins(plugins)
    for plugin in plugins:
        if not isinstance(plugin, tuple):
            app.install(plugin)
    extension = _extend(app)
    extension.for_all = _Group("", [_PluginEntry(extension, *item) for item in plugins if isinstance(item, tuple)], {})


def _prepare(app: Nova, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a group as the core takes it: without status routes, and with bottle's plugins only."""
    routes, plugins = group.get("routes", ()), bottle.makelist(group.get("plugins"))
    if isinstance(routes, Iterator):
        routes = list(routes)
        group = {**group, "routes": routes}
    _check_plugins(plugins)
    ours = [plugin for plugin in plugins if isinstance(plugin, tuple)]
    statuses = [route for route in routes if isinstance(route, tuple | list) and route and isinstance(route[0], int)]
    inherits = not ours and (bool(plugins) or "plugins" not in group)
    if inherits and not statuses and not isinstance(app.error_handler, _Extension):
        return group
    extension = _extend(app)
    entries = None if inherits else [_PluginEntry(extension, *plugin) for plugin in ours]
    mark = _Group(group.get("prefix", ""), entries, dict(_status_route(app, *route) for route in statuses))
    extension.add(mark)
    routes = [route for route in routes if not any(route is other for other in statuses)]
    return {**group, "routes": routes, "plugins": [*(item for item in plugins if not isinstance(item, tuple)), mark]}


def _check_plugins(plugins: Any) -> None:
    for plugin in plugins:
        if isinstance(plugin, str) or (isinstance(plugin, tuple) and not 2 <= len(plugin) <= 4):
            form = '("pre_request" | "post_request", plugin, options[, priority])'
            raise ValueError(f"plugins is a list of bottle's plugins and of {form}; it has {plugin!r}")


def _status_route(app: Nova, status: int, controller: Any, options: Any = ()) -> tuple[int, Any]:
    if not 400 <= status <= 599:
        raise ValueError(f"a status route is for a status from 400 to 599, not for {status!r}")
    if set(options) - {"methods"}:
        raise ValueError(f"the status route {status} has no option {', '.join(set(options) - {'methods'})}")
    return status, app.endpoint(controller)


class Cors:
    """A plugin, `("pre_request", cors, {"origins": ["https://example.org"]})`: scripts of other origins use a group.

    Options: "origins" (a list, or "*"), "headers" and "methods" that they may send (lists; without them, those that the
    browser asks for), "expose" (a list: response headers that they may read), "credentials" (whether browsers send
    cookies), "max_age" (seconds for which a browser keeps the answer). It runs before other plugins. A preflight is a
    204, before `security`. Raises ValueError, when the application is made, for another option, and for "*" together
    with credentials.
    """

    def check_options(self, options: Mapping[str, Any]) -> SimpleNamespace:
        unknown = set(options) - set(CORS_OPTIONS)
        if unknown:
            raise ValueError(f"cors has no option {', '.join(sorted(unknown))}; it has {', '.join(CORS_OPTIONS)}")
        rules = SimpleNamespace(**{**CORS_OPTIONS, **options})
        for name in ("origins", "headers", "methods", "expose"):
            value = getattr(rules, name)
            is_list = isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str) for item in value)
            if value != "*" and not is_list:
                raise ValueError(f'cors: {name} is a list of strings, or "*", not {value!r}')
        for origin in () if rules.origins == "*" else rules.origins:
            if parse_origin(origin) is None:
                raise ValueError(f"cors: expected an origin such as 'https://example.org', got {origin!r}")
        if rules.origins == "*" and rules.credentials:
            raise ValueError('cors: with credentials, origins is a list: "*" would open the session to all pages')
        if rules.max_age is not None and (type(rules.max_age) is not int or rules.max_age < 0):
            raise ValueError(f"cors: max_age is a number of seconds, not {rules.max_age!r}")
        if rules.origins != "*":
            rules.origins = {parse_origin(origin) for origin in rules.origins}
        return rules

    def add_headers(self, req: Request, rules: SimpleNamespace) -> bool:
        """Returns whether the origin is allowed."""
        headers, origin = req["resp_headers"], req.environ.get("HTTP_ORIGIN")
        if rules.origins == "*":
            headers["Access-Control-Allow-Origin"] = "*"
        else:
            _add_vary(headers, "Origin")  # also without an Origin: a cache must not give this response to another one
            if origin is None or parse_origin(origin) not in rules.origins:
                return False
            headers["Access-Control-Allow-Origin"] = origin
        if rules.credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        if rules.expose:
            headers["Access-Control-Expose-Headers"] = ", ".join(rules.expose)
        return True

    def pre_request(self, req: Request, env: Any, rules: SimpleNamespace, state: Any) -> Any:
        asked, names = (req.environ.get(f"HTTP_ACCESS_CONTROL_REQUEST_{part}") for part in ("METHOD", "HEADERS"))
        is_allowed = self.add_headers(req, rules)
        if req["method"] != "OPTIONS" or "HTTP_ORIGIN" not in req.environ or asked is None:
            return "ok", req, state
        headers = req["resp_headers"]
        if is_allowed:
            served = {*env.get("allowed", [asked])}
            served |= {"HEAD"} if "GET" in served else set()
            methods = sorted(served) if rules.methods == "*" else [method.upper() for method in rules.methods]
            headers["Access-Control-Allow-Methods"] = ", ".join(methods)
            allowed = names if rules.headers == "*" else ", ".join(rules.headers)
            if allowed:
                headers["Access-Control-Allow-Headers"] = allowed
            if rules.max_age is not None:
                headers["Access-Control-Max-Age"] = str(rules.max_age)
        if rules.headers == "*":
            _add_vary(headers, "Access-Control-Request-Headers")
        return "stop", ("status", 204), req, state


cors = Cors()


# -- other applications


def _mount(app: Nova, prefix: str, other: Any, security: Any, options: dict[str, Any]) -> None:
    """Serves a WSGI application, bottle's and Nova's included, below `prefix`, with or without the slash after it.

    At "/" it gets what no route of `app` is for. `security` is as in a group, for WebSockets too; the application finds
    what it returns in `environ["nova_lite.auth_data"]`, a Nova in `req["auth_data"]`, too. Plugins and hooks of `app`
    are not those of the other, as in bottle; its errors are its own. Raises ValueError for a prefix without a slash.
    """
    if not prefix.startswith("/") or not callable(other):
        raise ValueError(f'expected a prefix such as "/admin" and a WSGI application, got {prefix!r} and {other!r}')
    if security is not False and not callable(security):
        raise ValueError(f"security is False or a function of req, not {security!r}")
    path = re.sub(r"(?<=/):(\w+)", r"<\1>", "/" + "/".join(part for part in prefix.split("/") if part))

    def controller(req: Request) -> HTTPResponse:
        segments = (app.config.get("_mount.prefix", "") + path).split("/")  # `app` may be mounted in bottle's way
        return _call_application(other, len([*filter(None, segments)]), req)

    controller.__qualname__ = f"mount({prefix!r})"
    endpoint = app.endpoint(controller, security)
    options = {"skip": True, "method": "PROXY", "mountpoint": {"prefix": prefix, "target": other}, **options}
    if path == "/":
        if "match" in vars(app.router):
            raise ValueError('there is an application at "/" already')
        route = bottle.Route(app, "/<:re:.*>", "PROXY", endpoint, skiplist=[True])
        app.router.match = partial(_match, app.router.match, route)
    else:
        for rule in (path, f"{path}/<:re:.*>"):
            app.route(rule, callback=endpoint, **options)


def _match(match: Any, rest: bottle.Route, environ: dict[str, Any]) -> Any:
    """Does what the method of bottle's router does, but returns `rest` instead of a 404."""
    try:
        return match(environ)
    except HTTPError as error:
        if error.status_code != 404:
            raise
        return rest, {}


def _call_application(application: Any, depth: int, req: Request) -> HTTPResponse:
    """Calls a WSGI application, mounted below `depth` segments of the path, and returns its response (PEP 3333)."""
    environ, response = _make_environ(req, depth), HTTPResponse()
    begun: list[bool] = []
    written: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if begun and exc_info is None:
            raise AssertionError("start_response was called twice")
        begun[:] = [True]
        response.status = _decode(status)
        response.headers.dict.clear()
        for name, value in headers:
            response.add_header(name, _decode(value))
        return written.append

    saved = bottle.response.copy(HTTPResponse)  # another bottle's application begins with a new one
    try:
        body = application(environ, start_response)
        first, iterator = [], iter(body)
        for chunk in iterator if not begun else ():  # a generator starts its response when it is asked for the first
            first.append(chunk)
            if begun:
                break
    finally:
        bottle.request.bind(req.environ)
        saved.apply(bottle.response)
        req.environ.update({REFUSAL_KEY: environ[REFUSAL_KEY]} if REFUSAL_KEY in environ else {})
    if not begun:
        raise RuntimeError("a mounted application has not called start_response")
    response.body = body
    if written or first:
        response.body = bottle._closeiter(chain(written, first, iterator), getattr(body, "close", None))
    return response


def _make_environ(req: Request, depth: int) -> dict[str, Any]:
    """Returns the environ for an application that is mounted below `depth` segments, without what `app` keeps there."""
    own = "bottle.", "route.", "nova_lite.plugins.", COOKIES_KEY
    environ = {name: value for name, value in req.environ.items() if not name.startswith(own)}
    parts = req.environ["bottle.raw_path"].split("/", depth + 1)  # in latin-1: bottle has decoded the other one
    environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + "/".join(parts[: depth + 1])
    environ["PATH_INFO"] = "/" + "".join(parts[depth + 1 :])
    environ[AUTH_KEY] = req["auth_data"]
    body = req.environ.get("bottle.request.body")
    if body is not None:
        environ["bottle.request.body"] = body
        if not getattr(body, "is_unread", False):  # a hook has read it
            body.seek(0)
            environ["wsgi.input"] = body
    return environ


def _decode(text: str) -> str:
    """Returns a header of WSGI as the text of which bottle makes one again."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


rooms["plugins"] = SimpleNamespace(install=_install, prepare=_prepare, mount=_mount)
# ----- cut here: without deflate -------------------------------------------------------------------------------------
# Lost: compression (permessage-deflate).


# ---------------------------------------------------------------------------------------------------------------------
# Deflate: WebSockets whose messages are compressed, permessage-deflate (RFC 7692).
# Invariant: neither side keeps a window between messages. So a broadcast is compressed once for all clients with the
# same window, and an idle connection holds no window.
# ---------------------------------------------------------------------------------------------------------------------

import zlib

# A server may demand both, whatever the client offers (RFC 7692 §7.1.1).
NO_TAKEOVER = "; server_no_context_takeover; client_no_context_takeover"
RSV1 = 0x40  # marks a compressed message (§6)
DEFLATE_TAIL = b"\x00\x00\xff\xff"  # ends every compressed message, and is not sent (§7.2.1)
DEFLATE_END = DEFLATE_TAIL + b"\x03\x00"  # with an empty last block, which truncated data does not reach
COMPRESS_FROM = 128  # bytes; below, a deflated block's head costs what compression saves

_NEVER = re.compile("(?!)")
_DEFLATE_PARAMETERS = {
    "server_no_context_takeover": re.compile(""),
    "client_no_context_takeover": re.compile(""),
    "server_max_window_bits": re.compile("9|1[0-5]"),
    "client_max_window_bits": re.compile("|[89]|1[0-5]"),
}


def choose_window(offered: str) -> int:
    """Returns the window, in bits, of the first acceptable offer of permessage-deflate, or 0.

    An offer with an unknown, repeated or bad parameter is skipped. So is a window of 8 bits, which zlib does not
    support (RFC 7692 §7.1).
    """
    for offer in offered.split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        pairs = [(key.strip(), value.strip(' "')) for key, _, value in (part.partition("=") for part in parameters)]
        known = all(_DEFLATE_PARAMETERS.get(key, _NEVER).fullmatch(value) for key, value in pairs)
        if name == "permessage-deflate" and known and len(dict(pairs)) == len(pairs):
            return int(dict(pairs).get("server_max_window_bits", 15))
    return 0


def compress_frame(frame: bytes, window_bits: int) -> bytes:
    """Returns a frame with its payload compressed, or as it is if that is too short (RFC 7692 §7.2.1).

    A compressed frame depends on none before it, so that all clients with the same window can be sent the same bytes.
    """
    data = frame[{126: 4, 127: 10}.get(frame[1], 2) :]
    if len(data) < COMPRESS_FROM:  # as that of each control frame
        return frame
    compressor = zlib.compressobj(wbits=-window_bits)
    body = (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(DEFLATE_TAIL)
    return make_frame(frame[0] & 0x0F | RSV1, body)


class InflatingParser(Parser):
    """A parser that accepts compressed messages as well."""

    __slots__ = ("inflater",)

    def reset(self) -> None:
        super().reset()
        self.inflater: Any = None  # of the message that has begun, if it is compressed

    def check_start(self, first: int, second: int) -> None:
        if first & RSV1 and first & 0x0F in (TEXT, BINARY):
            self.inflater = zlib.decompressobj(-15)
            first ^= RSV1
        super().check_start(first, second)

    def add_part(self, part: bytes, ends: bool) -> None:
        super().add_part(part if self.inflater is None else self._inflate(part, ends), ends)

    def _inflate(self, part: bytes, ends: bool) -> bytes:
        """Returns the part inflated, never more than the limit allows (RFC 7692 §7.2.2)."""
        left = self.limit - len(self.message)
        try:
            part = self.inflater.decompress(part + DEFLATE_END if ends else part, left + 1)
        except zlib.error:
            raise protocol_error(1007, "a message that cannot be inflated") from None
        if len(part) > left:
            raise protocol_error(1009, f"a message over {self.limit} bytes")
        if len(self.inflater.unused_data) > 1 + len(DEFLATE_END) or (ends and not self.inflater.eof):
            raise protocol_error(1007, "a message that continues after its last block, or has none")
        return part


class DeflateConnection(Connection):
    """A WebSocket that has agreed on permessage-deflate."""

    __slots__ = ("shared", "window_bits")
    MAX_READ = SMALL_READ  # a few compressed bytes may take long to parse

    def __init__(self, *args: Any, window_bits: int) -> None:
        super().__init__(*args)
        self.window_bits = window_bits
        self.shared = _shared_frames[window_bits]
        self.parser = InflatingParser(self.settings.max_message_size)

    def parse(self, data: bytes) -> list[Any]:
        frames = super().parse(data)
        self.inbox_bytes += sum(len(frame[-1]) for frame in frames if type(frame) is tuple)  # inflated
        return frames

    def encode(self, frame: Any) -> bytes:
        return compress_frame(super().encode(frame), self.window_bits)


_shared_frames = {bits: FrameCache() for bits in range(9, 16)}  # by the window's bits


def negotiate(offered: str) -> tuple[Any, dict[str, str]]:
    """Returns the kind of connection for a client's Sec-WebSocket-Extensions, and the headers of the 101."""
    bits = choose_window(offered)
    if not bits:
        return Connection, {}
    window = f"; server_max_window_bits={bits}" if bits < 15 else ""
    headers = {"Sec-WebSocket-Extensions": f"permessage-deflate{NO_TAKEOVER}{window}"}
    return partial(DeflateConnection, window_bits=bits), headers


rooms["deflate"] = SimpleNamespace(negotiate=negotiate, check=lambda _options: None)


# ----- cut here: without rate ----------------------------------------------------------------------------------------
# Lost: rate=(messages, seconds), on_flood.


# ---------------------------------------------------------------------------------------------------------------------
# Rate: limits how many messages the client of a WebSocket may send in a given time.
# Invariant: a client that sends more waits, or is disconnected. No message is lost, and they stay in order.
#
# A client has `messages` tokens, which it gets back evenly in `seconds`. A message takes one. Without one it is held,
# as is all that follows: messages, the client's close, the end of its bytes. Of the pings and pongs that find no token,
# the last one of each read is handled immediately (RFC 6455 §5.5.3); so reading goes on until `backlog` messages, or
# `max_message_size` bytes, are held. Beyond that, TCP holds the client back, and its pings with it.
# ---------------------------------------------------------------------------------------------------------------------

RELEASE_INTERVAL = 0.02  # seconds, at least: what is held is released in portions, without a timer for each message


class TokenBucket:
    """Holds at most `size` tokens, which come back evenly in `seconds`."""

    __slots__ = ("changed_at", "per_second", "size", "tokens")

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.per_second = size, size / seconds
        self.tokens, self.changed_at = float(size), monotonic()

    def take(self, wanted: int) -> int:
        """Takes as many tokens as there are, `wanted` at most. Returns how many."""
        now = monotonic()
        self.tokens = min(self.size, self.tokens + (now - self.changed_at) * self.per_second)
        self.changed_at = now
        taken = min(wanted, int(self.tokens))
        self.tokens -= taken
        return taken

    def wait_time(self) -> float:
        """Returns the seconds until there is a token."""
        return max(0.0, (1 - self.tokens) / self.per_second)


class RatedConnection(Connection):
    """A WebSocket whose client has a limited rate. It has no slots, so that it combines with other kinds."""

    MAX_READ = SMALL_READ  # bytes per read: what one read brings may have to be held

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bucket = TokenBucket(*self.settings.rate)
        self.held: deque[Any] = deque()  # what the client has sent too early
        self.held_bytes = 0  # of `held`; not reduced before all of it is released
        self.release_timer: Any = None  # None while nothing is held

    def parse(self, data: bytes) -> list[Any]:
        frames = super().parse(data)
        if self.phase is not OPEN:
            return frames
        ready, late_controls = [], {}
        tokens = 0 if self.held else self.bucket.take(sum(map(_takes_token, frames)))
        for frame in frames:
            if not self.held and (tokens > 0 or not _takes_token(frame)):
                ready.append(frame)
                tokens -= _takes_token(frame)
            elif type(frame) is tuple and frame[0] in ("ping", "pong"):
                late_controls[frame[0]] = frame
            elif self.settings.on_flood == "close":
                return [*ready, self._refuse()]
            else:
                self._hold(frame)
        return [*ready, *late_controls.values()]

    def _refuse(self) -> Close:
        self.parser.done = self.input_over = True  # the rest is ignored, as after a violation of the protocol
        self.parser.reset()
        messages, seconds = self.settings.rate
        return Close(1008, f"more than {messages} messages in {seconds} s", ("error", "flood"))

    def _hold(self, frame: Any) -> None:
        self.held.append(frame)
        self.held_bytes += len(frame[-1]) if type(frame) is tuple else 0
        if self.release_timer is None:
            self._schedule_release()

    def _schedule_release(self) -> None:
        self.release_timer = scheduler.hub.loop.timer(max(RELEASE_INTERVAL, self.bucket.wait_time()))
        self.release_timer.start(self._release)

    def _release(self) -> None:
        """Hub callback: puts what has a token now into the inbox."""
        self._cancel_release()
        if self.phase is not OPEN:
            return
        self._hold_end()
        while self.held and len(self.inbox) < self.settings.backlog:
            if _takes_token(self.held[0]) and not self.bucket.take(1):
                break
            self.inbox.append(self.held.popleft())
        if self.held:
            self._schedule_release()
        else:
            self.held_bytes = 0
        if not self.reader.active and not self.should_pause():
            self.reader.start(self.readable)
        if self.inbox and self.wake is enqueue:
            enqueue(self)

    def _cancel_release(self) -> None:
        if self.release_timer is not None:
            self.release_timer.close()
            self.release_timer = None

    def should_pause(self) -> bool:
        settings = self.settings
        is_full = len(self.held) >= settings.backlog or self.held_bytes > settings.max_message_size
        return is_full or super().should_pause()

    def step(self) -> None:
        self._hold_end()
        super().step()

    def _hold_end(self) -> None:
        """Puts the end of the client's bytes behind what is held. A callback may have blocked since it came."""
        if self.held and self.inbox and isinstance(self.inbox[-1], Close):
            self.held.append(self.inbox.pop())

    def check_timeouts(self, seconds: float) -> None:
        if self.held and self.idle_for + seconds > self.settings.idle_timeout:
            self.idle_for = 0.0  # the pause is ours; pings go on, for what is between
        super().check_timeouts(seconds)

    def abort(self) -> None:
        super().abort()
        self._cancel_release()
        self.held.clear()


def _takes_token(frame: Any) -> bool:
    return type(frame) is tuple and frame[0] != "close"


@cache
def _rated(kind: type[Connection]) -> Any:
    return type(f"Rated{kind.__name__}", (RatedConnection, kind), {})


def _limit(kind: Any) -> Any:
    """Returns a kind of connection with a limited rate."""
    if isinstance(kind, partial):
        return partial(_rated(kind.func), *kind.args, **kind.keywords)
    return _rated(kind)


rooms["rate"] = SimpleNamespace(limit=_limit, check=lambda _options: None)


# ----- cut here: without timers --------------------------------------------------------------------------------------
# Lost: send_after, send_interval, read_timer, cancel_timer.


# ---------------------------------------------------------------------------------------------------------------------
# Timers: messages that are sent later.
# Invariant: a timer to a pid goes with its process, and keeps nothing of it.
# ---------------------------------------------------------------------------------------------------------------------

__all__ += ["cancel_timer", "read_timer", "send_after", "send_interval"]


class Timer:
    """What `send_after` and `send_interval` return; for `cancel_timer` and `read_timer`."""

    def __init__(self, target: Any, message: Any, seconds: float, interval: float = 0.0) -> None:
        calling_process(), resolve(target)  # for what they raise
        if isnan(seconds):
            raise ValueError("expected seconds, got NaN")
        self.target, self.message, self.interval = target, message, interval
        self.due, self.ref = monotonic() + seconds, next(refs)
        self.watcher = scheduler.hub.loop.timer(max(seconds, 0), interval)
        self.watcher.start(self._fire, update=True)
        if isinstance(target, Process) or (interval and isinstance(target, Pid)):
            target.watch(self.ref, self)

    def _fire(self) -> None:
        target, message = self.target, self.message
        self.due = max(self.due + self.interval, monotonic())  # as libev, which does not let intervals drift
        if not self.interval:
            self.stop()
        send(target, message)

    def stop(self) -> None:
        """Stops the timer and releases the message."""
        self.watcher.close()
        if isinstance(self.target, Pid):
            self.target.unwatch(self.ref)
        self.target = self.message = None

    def down(self, *_down: Any) -> None:
        self.stop()


def send_after(seconds: float, target: Pid | str, message: Any) -> Timer:
    """Sends `message` after so many seconds, unless the process has ended by then (erlang:send_after/3).

    A timer to a name is not cancelled. Raises TypeError if `target` is not a pid or a name, ValueError for NaN.
    """
    return Timer(target, message, seconds)


def send_interval(seconds: float, target: Pid | str, message: Any) -> Timer:
    """Sends `message` every so many seconds, until the process ends or the timer is cancelled (timer:send_interval/3).

    Raises what `send_after` does, and ValueError for an interval that is not above 0 seconds.
    """
    if not seconds > 0:
        raise ValueError(f"expected an interval above 0 seconds, got {seconds!r}")
    return Timer(target, message, seconds, seconds)


def read_timer(timer: Timer) -> float | bool:
    """Returns the seconds until a timer fires, or False if it has fired or was cancelled (erlang:read_timer/1)."""
    return max(timer.due - monotonic(), 0.0) if timer.target is not None else False


def cancel_timer(timer: Timer) -> float | bool:
    """Cancels a timer; returns what `read_timer` would have returned (erlang:cancel_timer/1)."""
    left = read_timer(timer)
    timer.stop()
    return left


# ----- cut here: without gen_server ----------------------------------------------------------------------------------
# Lost: GenServer, start_link, call, cast, reply, stop; supervisors.


# ---------------------------------------------------------------------------------------------------------------------
# gen_server, supervisor: servers that reply to calls, and restart of processes that end (OTP).
# Invariant: uses processes only; a callback runs in the process of its server.
# ---------------------------------------------------------------------------------------------------------------------


class CallError(Exception):
    """A `call` failed."""


class CallTimeout(CallError, TimeoutError):
    """The server did not reply in time; a late reply is discarded."""


class NoProc(CallError):
    """The server does not exist."""


class ServerDied(CallError):
    """The server ended, with `reason`, before it replied."""

    def __init__(self, reason: Any) -> None:
        super().__init__(reason)
        self.reason = reason


from typing import Literal

_Tail = None | float | Literal["hibernate", "infinity"] | tuple[str, Any]
InitResult = (
    tuple[Literal["ok"], Any] | tuple[Literal["ok"], Any, _Tail] | tuple[Literal["stop"], Any] | Literal["ignore"]
)
CastResult = tuple[Literal["noreply"], Any] | tuple[Literal["noreply"], Any, _Tail] | tuple[Literal["stop"], Any, Any]
_Replied = tuple[Literal["reply"], Any, Any] | tuple[Literal["reply"], Any, Any, _Tail]
CallResult = CastResult | _Replied | tuple[Literal["stop"], Any, Any, Any]


class GenServer:
    """The callbacks of a server (OTP's gen_server), with one instance a server. All run in the server's process.

    After the state, a result may have "hibernate", a timeout in seconds (the info "timeout" unless a message comes
    first), or ("continue", term), with which `handle_continue` is called before the next message is handled.
    """

    def init(self, args: Any, /) -> InitResult:
        """Returns ("ok", state), ("stop", reason) or "ignore"."""
        return "ok", args

    def handle_continue(self, term: Any, state: Any, /) -> CastResult:
        """Continues what `init` or another callback began, and returns as `handle_cast` does."""
        return "stop", ("bad_continue", term), state

    def handle_call(self, request: Any, from_: Any, state: Any, /) -> CallResult:
        """Returns ("reply", value, state), ("noreply", state), ("stop", reason[, value], state)."""
        return "stop", ("bad_call", request), state

    def handle_cast(self, request: Any, state: Any, /) -> CastResult:
        """Returns ("noreply", state) or ("stop", reason, state)."""
        return "stop", ("bad_cast", request), state

    def handle_info(self, info: Any, state: Any, /) -> CastResult:
        """Handles any other message, and returns as `handle_cast` does."""
        log.warning("%r %s: unexpected message %r", self_pid(), type(self).__name__, info)
        return "noreply", state

    def terminate(self, reason: Any, state: Any, /) -> Any:
        """Called before the server stops, crashes, raises ProcessExit, or traps its parent's exit signal."""


class _Stop(Exception):
    """Raised to stop the server; `final` sends what its caller waits for, `hint` is for the log."""

    def __init__(self, reason: Any, final: Callable[[], Any] | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.final, self.hint = reason, final, hint


def _is_tail(rest: list[Any]) -> bool:
    """Returns whether `rest` may follow a state: nothing, "hibernate", a continuation, or a timeout, None included."""
    match rest:
        case [] | [None | "infinity" | "hibernate"] | [tuple(("continue", _))]:
            return True
        case [int() | float() as seconds] if not isinstance(seconds, bool):
            with suppress(OverflowError):
                return float(seconds) >= 0
    return False


class ServerProcess(Process):
    """The loop of a gen_server."""

    __slots__ = ("args", "continuation", "init_waiter", "is_signalled", "parent", "server", "state", "timer")

    def __init__(self, server: Any, args: Any, parent: Process) -> None:
        super().__init__()
        self.server, self.args, self.parent = server, args, parent
        self.init_waiter: Alias | None = Alias()  # the address of `start_link`; None after `init`
        self.state: Any = None
        self.timer: Any = None  # sends "timeout" if no message comes; None unless the last callback returned a timeout
        self.continuation: Any = None  # ("continue", term) while a time slice has ended before `handle_continue`
        self.is_signalled = False  # an exit signal ended it

    def step(self) -> None:
        if self.timer is not None:
            self.timer.close()
            self.timer = None
        mailbox, tail, self.continuation = self.mailbox, self.continuation, None
        if self.init_waiter is not None:
            tail = self._init()
        while self.exiting is None:
            if isinstance(tail, tuple):
                tail = self._handle_result("handle_continue", self._optional("handle_continue")(tail[1], self.state))
            elif mailbox:
                self.handled += 1
                tail = self._handle(mailbox.popleft())
            else:
                break
            if monotonic() > scheduler.deadline:
                break
        self._end_turn(tail)

    def _end_turn(self, tail: Any) -> None:
        if isinstance(tail, tuple):
            self.continuation = tail
            enqueue(self)
        else:
            self.reschedule()
        if isinstance(tail, int | float) and self.wake is not None:
            self.timer = scheduler.hub.loop.timer(tail)
            self.timer.start(self._time_out, update=True)

    def _time_out(self) -> None:
        if self.wake is not None:  # else a message came in the same iteration of the hub
            self.deliver("timeout")

    def _init(self) -> Any:
        result, init_waiter = self.server.init(self.args), self.init_waiter
        match result:
            case ("ok", state, *tail) if _is_tail(tail):
                self.state, self.init_waiter = state, None
                init_waiter.send("ok")  # type: ignore[union-attr]
                return tail[0] if tail else None
            case ("stop", reason):
                raise _Stop(reason)
            case "ignore":
                raise _Stop("normal", lambda: init_waiter.send("ignore"))  # type: ignore[union-attr]
        raise self._refusal("init", result)

    def _handle(self, message: Any) -> Any:
        """Handles one message. Returns what the callback's result has after the state, or None."""
        match message:
            case ("$gen_call", (_, Pid()) as from_, request):
                return self._handle_result("handle_call", self.server.handle_call(request, from_, self.state), from_)
            case ("$gen_cast", request):
                return self._handle_result("handle_cast", self.server.handle_cast(request, self.state))
            case ("$stop", reason):
                raise _Stop(reason)
            case ("EXIT", self.parent, reason):
                raise _Stop(reason)
        return self._handle_result("handle_info", self._optional("handle_info")(message, self.state))

    def _optional(self, callback: str) -> Callable[..., Any]:
        """Returns a callback that the server may lack: then that of GenServer."""
        return getattr(self.server, callback, None) or partial(getattr(GenServer, callback), self.server)

    def _handle_result(self, callback: str, result: Any, from_: Any = None) -> Any:
        match result:
            case ("noreply", state, *tail) if not tail or _is_tail(tail):
                self.state = state
            case ("reply", value, state, *tail) if from_ and (not tail or _is_tail(tail)):
                self.state = state
                reply(from_, value)
            case ("stop", reason, state):
                self.state = state
                raise _Stop(reason)
            case ("stop", reason, value, state) if from_:
                self.state = state
                raise _Stop(reason, lambda: reply(from_, value))
            case _:
                raise self._refusal(callback, result)
        return tail[0] if tail else None

    def _refusal(self, callback: str, result: Any) -> _Stop:
        hint = rooms["checks"].explain_result(self.server, callback, result) if "checks" in rooms else ""
        return _Stop(("bad_return_value", result), hint=hint)

    def handle_exit(self, error: BaseException) -> None:
        self.is_signalled = self.exiting is not None
        super().handle_exit(error)

    def cleanup(self, error: BaseException) -> Any:
        if self.timer is not None:
            self.timer.close()
        if self.init_waiter is not None:
            return self._fail_start(error)
        if isinstance(error, ProcessExit) and self.is_signalled:
            return error.reason
        if isinstance(error, _Stop | ProcessExit):
            reason = error.reason
            if not is_normal(reason):
                log.error("%r%s stopped: %r%s", self, self.title(), reason, getattr(error, "hint", ""))
        else:
            reason = self.log_crash(error, failing_callback(error))
        try:
            self._optional("terminate")(reason, self.state)
        except BaseException as failure:
            reason = self.log_crash(failure, "terminate")
        if isinstance(error, _Stop) and error.final:
            error.final()
        return reason

    def _fail_start(self, error: BaseException) -> Any:
        """Unlinks the parent, which gets the reason from `start_link` and no exit signal. Returns the reason."""
        if self.parent in self.links:
            self.links.discard(self.parent)
            self.parent.links.discard(self)
        if not isinstance(error, _Stop):
            return self.log_crash(error, "init")
        if error.final:
            error.final()
        elif not is_normal(error.reason) and not isinstance(getattr(self.parent, "server", None), Supervisor):
            log.error("%r%s did not start: %r%s", self, self.title(), error.reason, error.hint)  # a supervisor logs it
        return error.reason

    def role(self) -> str:
        return getattr(type(self.server), "__name__", "")


def start_link(cls: Any, args: Any = None, name: str | None = None, timeout: float | None = None) -> Any:
    """Starts a server, linked to the caller, and waits for its `init` (gen_server:start_link/4).

    `cls` is a class, or any object with the callbacks. Returns the Pid; ("error", reason) if `init` stops or crashes;
    ("error", ("already_started", pid)) if `name` is taken; "ignore" if `init` returns it. After `timeout` seconds, None
    for no limit, kills the server and returns ("error", "timeout").
    """
    me = calling_process()
    if "checks" in rooms:
        rooms["checks"].check_gen_server(cls, GenServer)
    if name is not None and check_name(name) in registered:
        return "error", ("already_started", registered[name])
    server = ServerProcess(cls() if isinstance(cls, type) else cls, args, me)
    if name is not None:
        register(name, server)
    link(server)
    init_waiter = server.init_waiter
    enqueue(server)
    match send_and_wait(server, init_waiter, timeout):  # type: ignore[arg-type]
        case "ok":
            return server
        case ("DOWN", reason):
            return "error", reason
        case None:
            unlink(server)
            exit(server, "kill")
            send_and_wait(server, Alias(), None)  # its name is free then
            return "error", "timeout"
    return "ignore"


def call(server: Pid | str | tuple[str, str], request: Any, timeout: float | None = 5.0) -> Any:
    """Sends a request to a server and returns its reply (gen_server:call/3); `timeout` in seconds, None for no limit.

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
    raise CallTimeout(f"no reply from {server!r} to {request!r} in {timeout} s")


def cast(server: Pid | str | tuple[str, str], request: Any) -> str:
    """Sends a request without a reply. Returns "ok", whether the server exists or not (gen_server:cast/2)."""
    send(server, ("$gen_cast", request))
    return "ok"


def reply(from_: tuple[Pid, Pid], value: Any) -> str:
    """Replies to a call, from any process; `from_` is that of `handle_call` (gen_server:reply/2)."""
    try:
        from_[1].send(("reply", value))
    except (TypeError, ValueError) as error:  # cannot cross to the caller's node, for which the server must not crash
        log.error("%r cannot reply to %r: %s", self_pid(), from_[0], error)
        from_[1].send(("DOWN", str(error)))
    return "ok"


def stop(server: Pid | str, reason: Any = "normal", timeout: float | None = None) -> str:
    """Stops a server after the messages in its mailbox, and waits until it has ended (gen_server:stop/3).

    Raises NoProc if it does not exist, ServerDied if it ends for another reason (`terminate` crashes, it is killed),
    and CallTimeout after `timeout` seconds.
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


@dataclass(eq=False, slots=True)
class _Child:
    """A child of a supervisor."""

    spec: dict[str, Any]
    pid: Pid | None = None  # None while it does not run
    is_restarting: bool = False  # its last restart failed, and another attempt follows

    def describe(self) -> tuple[Any, Any, str]:
        return self.spec["id"], "restarting" if self.is_restarting else self.pid, self.spec["type"]


class Supervisor(GenServer):
    """Restarts children that end, unless that happens too often (OTP's supervisor)."""

    def __init__(self, strategy: str, intensity: int, period: float) -> None:
        self.strategy, self.intensity, self.period = strategy, intensity, period
        self.children: dict[Any, _Child] = {}  # by id, in starting order
        self.running: dict[Pid, _Child] = {}  # those with a pid
        self.restarts: deque[float] = deque()  # when each of the last `period` seconds was

    def init(self, specs: list[dict[str, Any]]) -> Any:
        process_flag("trap_exit", True)
        self.children = {spec["id"]: _Child(spec) for spec in specs}
        match self._start_all(list(self.children.values())):
            case (child, reason):
                self.terminate("shutdown", None)
                return "stop", ("shutdown", ("failed_to_start_child", child.spec["id"], reason))
        return "ok", None

    def terminate(self, reason: Any, state: Any) -> None:
        for child in reversed(list(self.children.values())):
            self._shut_down(child)

    def handle_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("EXIT", Pid() as pid, reason) if pid in self.running:
                return self._on_exit(self.running.pop(pid), reason)
            case ("$restart", _Child() as child) if child.is_restarting:  # else it was terminated meanwhile
                return self._restart(child)
        return "noreply", None

    def handle_call(self, request: Any, from_: Any, state: Any) -> Any:
        match request:
            case ("start_child", spec):
                return "reply", self._start_child(spec), None
            case ("terminate_child" | "restart_child" | "delete_child" as act, key):
                child = self.children.get(key) or self.running.get(key)
                return "reply", self._act_on(child, act) if child is not None else ("error", "not_found"), None
            case "which_children":
                return "reply", [child.describe() for child in self.children.values()], None
            case "count_children":
                kinds = [child.spec["type"] for child in self.children.values()]
                counts = {kind + "s": kinds.count(kind) for kind in ("supervisor", "worker")}
                return "reply", {"specs": len(kinds), "active": len(self.running), **counts}, None
        return "reply", ("error", "unknown_request"), None

    def _start_child(self, spec: dict[str, Any]) -> Any:
        child = self.children.get(spec["id"])
        if child is not None:
            return "error", "already_present" if child.pid is None else ("already_started", child.pid)
        child = self.children[spec["id"]] = _Child(spec)
        result = self._start(child)
        if result[0] == "error":
            del self.children[spec["id"]]
        return result

    def _act_on(self, child: _Child, act: str) -> Any:
        if act == "terminate_child":
            self._shut_down(child)
            return "ok"
        if child.pid is not None or child.is_restarting:
            return "error", "restarting" if child.is_restarting else "running"
        if act == "restart_child":
            return self._start(child)
        del self.children[child.spec["id"]]
        return "ok"

    def _start(self, child: _Child) -> Any:
        """Starts a child. Returns ("ok", pid), ("ok", None) if it returns "ignore", or ("error", reason)."""
        spec, crash = child.spec, None
        try:
            fn, *args = scopes[spec["scope"]](spec)
            result = fn(*args)
            if isinstance(result, Pid):
                link(result)
        except (Exception, ProcessExit) as error:
            if calling_process().exiting is not None:  # the supervisor itself is killed
                raise
            result, crash = ("error", getattr(error, "reason", error)), error
        if isinstance(result, Pid):
            child.pid, child.is_restarting, self.running[result] = result, False, child
            return "ok", result
        if result == "ignore":
            self._set_stopped(child)
            return "ok", None
        reason = result[1] if isinstance(result, tuple) and result[:1] == ("error",) and len(result) == 2 else result
        log.error("%r cannot start child %r: %r", self_pid(), spec["id"], reason, exc_info=crash)
        return "error", reason

    def _start_all(self, children: list[_Child]) -> Any:
        """Starts children in order. Returns None, or the first one that does not start, and the reason."""
        for child in children:
            result, reason = self._start(child)
            if result == "error":
                return child, reason
        return None

    def _set_stopped(self, child: _Child) -> None:
        """Marks a child as not running. A temporary one is forgotten."""
        child.pid, child.is_restarting = None, False
        if child.spec["restart"] == "temporary":
            self.children.pop(child.spec["id"], None)

    def _on_exit(self, child: _Child, reason: Any) -> Any:
        pid, restart = child.pid, child.spec["restart"]
        self._set_stopped(child)
        if restart != "permanent" and is_normal(reason):
            return "noreply", None
        log.warning("%r %s child %r, %r, ended: %r", self_pid(), restart, child.spec["id"], pid, reason)
        return self._restart(child) if restart != "temporary" else ("noreply", None)

    def _restart(self, child: _Child) -> Any:
        now = monotonic()
        self.restarts.append(now)
        while now - self.restarts[0] > self.period:
            self.restarts.popleft()
        if len(self.restarts) > self.intensity:
            log.error("%r stops: more than %d restarts in %s s", self_pid(), self.intensity, self.period)
            return "stop", "shutdown", None
        children = [child] if self.strategy == "one_for_one" else list(self.children.values())
        affected = children[children.index(child) if self.strategy == "rest_for_one" else 0 :]
        for other in reversed(affected):
            self._shut_down(other)
        match self._start_all([other for other in affected if other.spec["restart"] != "temporary"]):
            case (failed, _):
                failed.is_restarting = True
                self_pid().send(("$restart", failed))  # after the messages that are waiting, "$stop" among them
        return "noreply", None

    def _shut_down(self, child: _Child) -> None:
        """Ends a child and waits for that. The EXIT of the link, which comes as well, finds it no longer running."""
        pid, spec = child.pid, child.spec
        self._set_stopped(child)
        if pid is None:
            return
        del self.running[pid]
        exit(pid, "kill" if spec["shutdown"] == "brutal_kill" else "shutdown")
        seconds = spec["shutdown"] if isinstance(spec["shutdown"], int | float) else None
        if send_and_wait(pid, Alias(), seconds) is None:
            log.warning("%r child %r, %r, did not stop in %s s: killing it", self_pid(), spec["id"], pid, seconds)
            exit(pid, "kill")
            send_and_wait(pid, Alias(), None)


# By a child's "scope": takes the spec and returns what to start, (fn, *args). The supervisor calls it at each start.
# Without a cluster, such a child simply runs; a later room may replace the function.
scopes: dict[str, Callable[[dict[str, Any]], Any]] = {"node": itemgetter("start"), "cluster": itemgetter("start")}


def check_children(children: Iterable[Any]) -> list[dict[str, Any]]:
    """Returns the specs with all their keys. Raises ValueError for a bad one, and for an id that comes twice."""
    specs = [_check_child(child) for child in children]
    if len({spec["id"] for spec in specs}) < len(specs):
        raise ValueError("two children have the same id")
    return specs


def _check_child(spec: Any) -> dict[str, Any]:
    if "checks" in rooms:
        rooms["checks"].check_child(spec, scopes)
    hash(spec["id"])  # raises here, and not in the supervisor
    kind = spec.get("type", "supervisor" if spec["start"][0] is start_supervisor else "worker")
    shutdown = "infinity" if kind == "supervisor" else 5.0
    return {"restart": "permanent", "shutdown": shutdown, "scope": "node", "type": kind, **spec}


def start_supervisor(
    children: "Iterable[ChildSpec]",
    strategy: Literal["one_for_one", "one_for_all", "rest_for_one"] = "one_for_one",
    intensity: int = 1,
    period: float = 5,
    name: str | None = None,
) -> Any:
    """Starts the children in order and keeps them running (OTP's supervisor). Returns as `start_link` does.

    A child is {"id", "start": (fn, *args)}, where `fn` returns a pid linked to its caller, as `start_link` does, or
    "ignore", or ("error", reason). Other keys: "restart" is "permanent" (the default), "transient" (only after an
    abnormal end) or "temporary" (never). "shutdown" is how long to wait before a child that must end is killed: seconds
    (5), "infinity", or "brutal_kill" (not at all). "type" is "worker" or "supervisor", whose "shutdown" is "infinity".
    With "scope": "cluster", the child runs on one node of a cluster only.

    A restart is that of the child ("one_for_one"), of all children ("one_for_all"), or of the child and those after it
    ("rest_for_one"). More than `intensity` restarts in `period` seconds end the children in reverse order and then the
    supervisor, with "shutdown". Raises ValueError for a bad child, `strategy`, `intensity` or `period`.
    """
    if strategy not in ("one_for_one", "one_for_all", "rest_for_one"):
        raise ValueError(f"strategy must be 'one_for_one', 'one_for_all' or 'rest_for_one', got {strategy!r}")
    if not isinstance(intensity, int) or isinstance(intensity, bool) or intensity < 0:
        raise ValueError(f"intensity must be a number of restarts, got {intensity!r}")
    if not isinstance(period, int | float) or isinstance(period, bool) or not period > 0:
        raise ValueError(f"period must be a number of seconds above 0, got {period!r}")
    return start_link(Supervisor(strategy, intensity, period), check_children(children), name)


def start_child(supervisor: Pid | str, spec: "ChildSpec") -> Any:
    """Adds a child and starts it (supervisor:start_child/2).

    Returns ("ok", pid), ("ok", None) if it returns "ignore", ("error", ("already_started", pid)), ("error",
    "already_present") if a child with its id does not run, or ("error", reason). Raises ValueError for a bad spec.
    """
    return call(supervisor, ("start_child", _check_child(spec)), None)


def terminate_child(supervisor: Pid | str, child: Any) -> Any:
    """Ends a child, given its id or pid, and waits for that (supervisor:terminate_child/2).

    Its spec stays for `restart_child`, unless it is temporary. Returns "ok" or ("error", "not_found").
    """
    return _call_about(supervisor, "terminate_child", child)


def restart_child(supervisor: Pid | str, child_id: Any) -> Any:
    """Starts a child that does not run (supervisor:restart_child/2).

    Returns as `start_child` does, or ("error", "running" | "restarting" | "not_found").
    """
    return _call_about(supervisor, "restart_child", child_id)


def delete_child(supervisor: Pid | str, child_id: Any) -> Any:
    """Removes a child that does not run. Returns "ok", or an error as `restart_child` (supervisor:delete_child/2)."""
    return _call_about(supervisor, "delete_child", child_id)


def _call_about(supervisor: Pid | str, act: str, child: Any) -> Any:
    hash(child)  # raises TypeError here, and not in the supervisor
    return call(supervisor, (act, child), None)


def which_children(supervisor: Pid | str) -> list[tuple[Any, Any, str]]:
    """Returns [(id, pid, type)] in starting order (supervisor:which_children/1).

    Instead of a pid, None means that the child does not run, "restarting" that its restart has failed so far.
    """
    return call(supervisor, "which_children", None)


def count_children(supervisor: Pid | str) -> dict[str, int]:
    """Returns how many "specs", "active" children, "supervisors" and "workers" it has (supervisor:count_children/1)."""
    return call(supervisor, "count_children", None)


def supervisors(limit: int = 100) -> dict[Pid, dict[str, Any]]:
    """Returns the supervisors of this node, each as a dict of its attributes, without calling them.

    "parent" has started it; "children" are the first `limit` of "count": (id, pid, type, restart).
    """
    found: dict[Pid, dict[str, Any]] = {}
    for process in processes.values():
        if isinstance(process, ServerProcess) and isinstance(process.server, Supervisor):
            own, children = vars(process.server), process.server.children.values()
            first = [(*child.describe(), child.spec["restart"]) for child in islice(children, limit)]
            found[process] = {**own, "parent": process.parent, "count": len(children), "children": first}
    return found


__all__ += [
    "CallError", "CallResult", "CallTimeout", "CastResult", "GenServer", "InitResult", "NoProc", "ServerDied", "call",
    "cast", "count_children", "delete_child", "reply", "restart_child", "start_child", "start_link", "start_supervisor",
    "stop", "terminate_child", "which_children",
]  # fmt: skip
rooms["gen_server"] = SimpleNamespace(
    check_children=check_children, scopes=scopes, start_supervisor=start_supervisor, stop=stop, supervisors=supervisors
)


# ----- cut here: without presence ------------------------------------------------------------------------------------
# Lost: presence.


# ---------------------------------------------------------------------------------------------------------------------
# Presence: which users are in a channel, with what each process says of its user (Phoenix.Presence).
# Invariant: `list`, with the events that a member receives after it, adds up to any later `list`.
#
# A change is in `list` immediately. Members receive it GATHER_TIME later, in one event with all others of that time.
# The race: when a member calls `list`, changes that the list includes may still be in its mailbox as an event, or
# wait to be sent, and the member would apply them twice. Therefore `list` removes such events from the caller's
# mailbox, and notes how many of the waiting changes the caller has seen: its next event contains only the others.
# ---------------------------------------------------------------------------------------------------------------------

GATHER_TIME = 0.05  # seconds between a change and the event: short for a reader, long enough for a crowd that connects
MAX_META = 16 * 1024  # bytes of a meta in a cluster, with its channel and key
MAX_METAS = 8 * 1024 * 1024  # bytes of all metas of a node: it sends them to a new node in one message
_Meta = dict[str, Any]
_Metas = list[_Meta]
_ByKey = dict[str, _Metas]
_Changes = list[tuple[str, Pid, "_Meta | None", "_Meta | None"]]  # key, process, meta before and after; None: absent


class Presence:
    """Who is in which channel, by key. The one instance is `presence`.

    A key names a user, for example. Several processes may be tracked under one key, each with a meta of its own, a dict
    of which a copy is kept. Members of the channel receive ("nova_presence", channel, joins, leaves), both {key:
    [meta, ...]}. An update is a leave and a join. The event has the method `once` of a `Message`.
    """

    def __init__(self, pubsub: PubSub) -> None:
        self.pubsub = pubsub
        self.entries: dict[str, dict[str, dict[Pid, _Meta]]] = {}  # channel -> key -> process -> meta; none is empty
        self.changes: dict[str, _Changes] = {}  # channel -> changes that its members have not received
        self.seen: dict[str, dict[Process, int]] = {}  # channel -> caller of `list` -> how many of these it has seen
        self.timer: Any = None  # calls `_flush`
        self.sizes: dict[tuple[str, str, Process], int] = {}  # bytes of the metas that were tracked here in a cluster
        self.total_size = 0  # bytes, the sum
        pubsub.presence = self

    def track(self, channel: str, key: str, meta: _Meta, pid: Pid | None = None) -> str:
        """Tracks `pid`, or the caller, under `key` until it ends. Returns "ok", or "already_tracked".

        A dead process is not tracked. Raises TypeError for a process of another node, for a meta that is not a dict,
        and in a cluster for one that cannot cross to another node; ValueError for an empty key, and in a cluster for
        more than MAX_META bytes, or MAX_METAS on this node.
        """
        process = local_process(pid)
        meta, size = self._check(channel, key, meta, process)
        if process in self._owners(channel, key):
            return "already_tracked"
        if process.mailbox is not DEAD_MAILBOX:
            process.own((self, channel, key, process), self)
            self._put_here(channel, key, process, meta, size)
        return "ok"

    def update(self, channel: str, key: str, meta: _Meta, pid: Pid | None = None) -> str:
        """Replaces the meta of `pid`, or of the caller. Returns "ok", or "not_tracked". Raises what `track` does.

        If the new meta is equal to the old one, members receive no event.
        """
        process = local_process(pid)
        meta, size = self._check(channel, key, meta, process)
        before = self._owners(channel, key).get(process)
        if before is None:
            return "not_tracked"
        if meta != before:
            self._put_here(channel, key, process, meta, size)
        return "ok"

    def untrack(self, channel: str, key: str, pid: Pid | None = None) -> str:
        """Ends the tracking of `pid`, or of the caller. Returns "ok", or "not_tracked"."""
        process = local_process(pid)
        if process.disown((self, channel, key, process)) is None:
            return "not_tracked"
        self._put_here(channel, key, process, None)
        return "ok"

    def list(self, channel: str) -> _ByKey:
        """Returns {key: [meta, ...]} of all nodes. Changes on other nodes arrive with a delay.

        A member that goes on from this list applies the events that it receives afterwards. Those that were waiting in
        its mailbox are removed: the list includes their changes. To miss none, join the channel before.
        """
        self._skip_events(check_channel(channel), calling_process())
        return {key: [*owners.values()] for key, owners in self.entries.get(channel, {}).items()}

    def get_by_key(self, channel: str, key: str) -> _Metas:
        """Returns the metas of one key, on all nodes. The list may be empty."""
        return [*self._owners(channel, key).values()]

    def _owners(self, channel: str, key: str) -> dict[Pid, _Meta]:
        return self.entries.get(check_channel(channel), {}).get(key, {})

    def _check(self, channel: str, key: str, meta: _Meta, process: Process) -> tuple[_Meta, int]:
        """Returns a copy of the meta, which the caller may modify, and its bytes. Raises before any change."""
        if not isinstance(key, str) or not isinstance(meta, dict):
            raise TypeError(f"expected a key, a string, and a meta, a dict, got {key!r} and {meta!r}")
        if not key:
            raise ValueError("expected a key, got an empty string")
        meta = dict(meta)
        message = Message(("nova_presence", check_channel(channel), None, channel, [key, meta]))
        size = len(self.pubsub.adapter.encode(message, None) or b"")
        if size > MAX_META:
            raise ValueError(f"the meta of {key!r:.80} has {size} bytes, more than {MAX_META}: keep it small")
        total = self.total_size + size - self.sizes.get((channel, key, process), 0)
        if size and total > max(MAX_METAS, self.total_size):
            raise ValueError(f"the metas of this node would have {total} bytes, more than {MAX_METAS}")
        return _copy(meta), size

    # -- in the hub's thread

    def put(self, channel: str, key: str, pid: Pid, meta: _Meta | None) -> None:
        """Sets the meta of a process of any node, or removes it if `meta` is None."""
        keys = self.entries.setdefault(channel, {})
        owners = keys.setdefault(key, {})
        before = owners.pop(pid, None) if meta is None else owners.get(pid)
        if meta is not None:
            owners[pid] = meta
        if not owners:
            del keys[key]
        if not keys:
            del self.entries[channel]
        if channel in self.pubsub.channels and before is not meta:
            self._gather(channel, (key, pid, before, meta))

    def _put_here(self, channel: str, key: str, process: Process, meta: _Meta | None, size: int = 0) -> None:
        self.total_size += size - self.sizes.pop((channel, key, process), 0)
        if size:
            self.sizes[channel, key, process] = size
        self.put(channel, key, process, meta)
        self.pubsub.adapter.on_track(channel, key, process, meta)

    def unwatch(self, ref: tuple[Any, str, str, Process]) -> None:
        """Called when a tracked process has ended."""
        self._put_here(*ref[1:], None)

    def _gather(self, channel: str, change: Any) -> None:
        if not self.changes:
            self.timer = self.timer or scheduler.hub.loop.timer(GATHER_TIME)
            self.timer.start(self._flush, update=True)
        self.changes.setdefault(channel, []).append(change)

    def _skip_events(self, channel: str, caller: Process) -> None:
        """Makes sure that the caller receives no change that is in the list now."""
        if channel in self.changes:
            self.seen.setdefault(channel, {})[caller] = len(self.changes[channel])
        mailbox = caller.mailbox
        others = [message for message in mailbox if not _is_event_of(channel, message)]
        if len(others) < len(mailbox):
            caller.handled += len(mailbox) - len(others)  # a `receive` whose predicate called this looks again
            mailbox.clear()
            mailbox.extend(others)

    def _flush(self) -> None:
        """Timer callback: sends the changes to the members of their channels, in one event each."""
        changes, seen = self.changes, self.seen
        self.changes, self.seen = {}, {}
        for channel, its_changes in changes.items():
            event = _make_event(channel, its_changes)
            late = {process: _make_event(channel, its_changes[n:]) for process, n in seen.get(channel, {}).items()}
            for process in self.pubsub.channels.get(channel, ()):  # does not change meanwhile: `deliver` only queues
                message = late.get(process, event)
                if message is not None:
                    process.deliver(message)


def _copy(value: Any) -> Any:
    """Returns a copy of dicts, lists and tuples, with what they contain. Other values are shared."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _make_event(channel: str, changes: _Changes) -> Message | None:
    """Returns what the changes add up to, or None if that is nothing."""
    net: dict[tuple[str, Pid], Any] = {}
    for key, pid, before, after in changes:
        net.setdefault((key, pid), [before, after])[1] = after
    joins: _ByKey = {}
    leaves: _ByKey = {}
    for (key, _), (before, after) in net.items():
        if before is not None and before is not after:
            leaves.setdefault(key, []).append(before)
        if after is not None and before is not after:
            joins.setdefault(key, []).append(after)
    return Message(("nova_presence", channel, joins, leaves)) if joins or leaves else None


def _is_event_of(channel: str, message: Any) -> bool:
    return isinstance(message, Message) and message[:2] == ("nova_presence", channel)


def _set_meta(pubsub: PubSub, channel: str, key: str, pid: Pid, meta: _Meta | None) -> None:
    if pubsub.presence is not None:
        pubsub.presence.put(channel, key, pid, meta)


def _get_local_metas(pubsub: PubSub) -> list[Any]:
    """Returns [channel, serial, key, meta] of each process of this node that is tracked."""
    entries = pubsub.presence.entries.items() if pubsub.presence is not None else ()
    by_key = [(channel, key, owners) for channel, keys in entries for key, owners in keys.items()]
    return [
        [channel, pid.serial, key, meta]
        for channel, key, owners in by_key
        for pid, meta in owners.items()
        if isinstance(pid, Process)
    ]


presence = Presence(pubsub)
__all__ += ["presence"]
rooms["presence"] = SimpleNamespace(set_meta=_set_meta, get_local_metas=_get_local_metas)


# ----- cut here: without replay --------------------------------------------------------------------------------------
# Lost: pubsub.keep. A join with `since` always gets a resync.


# ---------------------------------------------------------------------------------------------------------------------
# Replay: keeps the last messages of a channel for members that come back.
# Invariant: a position names one message; `since` returns all later messages without gap or duplicate, or None.
# ---------------------------------------------------------------------------------------------------------------------


class History(Recorder):
    """The last messages of a channel. A position is "epoch.offset", and the offsets of an epoch have no gap."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds
        self.messages: deque[tuple[float, Message]] = deque(maxlen=size)  # with the time when each came
        self.forget()

    def resize(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds
        self.messages = deque(self.messages, maxlen=size)

    def begin(self, epoch: str, offset: int) -> None:
        """Starts after the message at this offset, with no messages."""
        self.epoch, self.offset = epoch, offset
        self.complete_since = offset  # no message after it is missing
        self.messages.clear()

    def forget(self) -> None:
        """Messages were lost: earlier positions are invalid."""
        self.begin(os.urandom(4).hex(), 0)

    def load(self, epoch: str, offset: int, messages: list[tuple[float, Message]]) -> None:
        """Replaces the messages up to `offset`; later ones stay."""
        positions = [(entry, self._parse(entry[1].position)) for entry in self.messages]
        later = [entry for entry, (its_epoch, its_offset) in positions if its_epoch == epoch and its_offset > offset]
        self.begin(epoch, offset - len(messages))
        for at, message in messages + later:
            self.add(message, at)

    @property
    def position(self) -> str:
        return f"{self.epoch}.{self.offset}"

    def add(self, message: Message, at: float | None = None) -> None:
        """Adds the next message, and sets its position unless it has one. `at` is when it came, by default now."""
        if message.position is None:
            message.position = f"{self.epoch}.{self.offset + 1}"
        epoch, offset = self._parse(message.position)
        if (epoch, offset) != (self.epoch, self.offset + 1):  # messages between them may be missing
            self.begin(epoch, offset)
        self.offset = offset
        self.messages.append((monotonic() if at is None else at, message))
        self._drop_old()

    def _drop_old(self) -> None:
        while self.messages and monotonic() - self.messages[0][0] > self.seconds:
            self.messages.popleft()

    def since(self, position: Any) -> list[Message] | None:
        """Returns the messages after `position`, all for "first"; None if it is too old or from another epoch."""
        self._drop_old()
        if position == "first":
            return [message for _, message in self.messages]
        epoch, offset = self._parse(position)
        missed = self.offset - offset
        if epoch != self.epoch or offset < self.complete_since or not 0 <= missed <= len(self.messages):
            return None
        return [message for _, message in list(self.messages)[len(self.messages) - missed :]]

    @staticmethod
    def _parse(position: Any) -> tuple[str, int]:
        epoch, _, offset = str(position).rpartition(".")
        return (epoch, int(offset)) if re.fullmatch("[0-9]{1,18}", offset) else ("", 0)


def _keep(pubsub: PubSub, channel: str, size: int, seconds: float) -> str:
    if not (size >= 1 and 0 < seconds < inf):
        raise ValueError(f"expected a size of at least 1 and seconds above 0, got {size!r} and {seconds!r}")
    scheduler.run_in_hub(_start_history, pubsub, check_channel(channel), size, seconds)
    return "ok"


def _start_history(pubsub: PubSub, channel: str, size: int, seconds: float) -> None:
    if channel in pubsub.histories:
        pubsub.histories[channel].resize(size, seconds)
    else:
        pubsub.histories[channel] = History(size, seconds)
        pubsub.adapter.on_keep(channel)


class ResumableEventStream(EventStream):
    """An event stream that tells the client the position up to which it has received a kept channel."""

    __slots__ = ()

    def preamble(self, _fields: bytes = b"") -> bytes:
        """Returns also the position as of the join."""
        position = next(filter(None, dict(self.channels).values()), None)  # one will do: the other channels resync
        return super().preamble(_position_event(position))

    def handle_result(self, result: Any, info: Any = None, *callback: str) -> int:
        queued = len(self.outgoing)
        size = super().handle_result(result, info, *callback)
        match info:
            case Message(position=str(position)) if len(self.outgoing) > queued:
                self.outgoing[-1] = f"id: {position}\n".encode() + self.outgoing[-1]
            # After the resync, never before: a client that has not received it must resync again. What is still in the
            # mailbox brings positions of its own.
            case ("nova_resync", str(channel)) if channel in self.channels and not self.mailbox:
                self.outgoing.append(_position_event(pubsub.get_position(channel)))
        return size


def _position_event(position: str | None) -> bytes:
    return f"event: position\nid: {position}\ndata:\n\n".encode() if position else b""


rooms["replay"] = SimpleNamespace(event_stream=ResumableEventStream, keep=_keep)


# ----- cut here: without launch --------------------------------------------------------------------------------------
# Lost: reload=True, workers=N, children=[...], reuse_port=True, reload_on_change, run_workers.


# ---------------------------------------------------------------------------------------------------------------------
# Launch: restarts the program after a change of its files, runs it as several workers, and starts what works in it.
# Invariant: starts the program with its own command line; does not depend on what it serves.
# ---------------------------------------------------------------------------------------------------------------------

import subprocess
import sysconfig

import gevent.subprocess

_RELOADED = "NOVA_LITE_RELOADED"  # in the environment of the process that serves
RELOAD_TIME = 10.0  # seconds after which a process that does not stop, or not start, is killed for a reload


def reload_on_change() -> None:
    """Runs this program as a child, and restarts it after a change of its files. In the child it returns immediately.

    A child that fails is restarted only after a change.
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
        except KeyboardInterrupt:  # Ctrl-C reaches the child as well; `kill -INT` does not
            with suppress(subprocess.TimeoutExpired):
                sys.exit(child.wait(1))
            child.terminate()
            sys.exit(child.wait())
        finally:
            if child.poll() is None:
                child.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(RELOAD_TIME)
                child.kill()
            child.wait()
        log.info("a file has changed: restarting")


_WORKER = "NOVA_LITE_WORKER"  # in the environment of a worker: its number, the port, and the descriptor of a pipe


def run_workers(count: int, host: str, port: int, drain_time: float = DRAIN_TIME) -> tuple[int, int]:
    """Runs this program `count` times, as workers on one port. In a worker it returns (its number, the port).

    A worker that ends is restarted. If one ends within 3 seconds three times in a row, all end, with exit code 1.
    SIGINT and SIGTERM drain all of them. Raises OSError if the address is in use.
    """
    if _WORKER in os.environ:
        number, port, _ = map(int, os.environ[_WORKER].split(":"))
        return number, port
    reserved = bound_socket(host, port, None)  # so that all workers get the same port if it is 0
    sys.exit(Workers(reserved.getsockname()[1], drain_time).run(count))


def bound_socket(host: str, port: int, backlog: int | None) -> Any:
    """Returns a socket on a port that may be shared. It listens if there is a backlog."""
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


class Workers:
    """Runs worker processes that serve one port, and restarts them."""

    def __init__(self, port: int, drain_time: float) -> None:
        self.port, self.drain_time = port, drain_time
        self.lifeline, self.held = os.pipe()  # a worker reads the end of file when this process has ended
        self.children: dict[int, Any] = {}
        self.asked_to_stop = gevent.event.Event()
        self.failed = False

    def run(self, count: int) -> int:
        """Runs until a signal comes, or a worker fails repeatedly. Returns the exit code."""
        for sign in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(sign, self.stop)
        log.info("%d workers on port %d", count, self.port)
        gevent.joinall([gevent.spawn(self._keep, number) for number in range(1, count + 1)])
        return 1 if self.failed else 0

    def _keep(self, number: int) -> None:
        quick_ends = 0
        while not self.asked_to_stop.is_set():
            child = self.children[number] = self._start(number)
            if self.asked_to_stop.is_set():  # while it started; a second SIGTERM would cut the others' drains short
                self._end(child)
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
        # In a session of its own, a worker gets no SIGINT from Ctrl-C: this process stops the workers.
        options = {"pass_fds": [self.lifeline], "stdin": gevent.subprocess.DEVNULL, "start_new_session": True}
        child = gevent.subprocess.Popen(_own_command(), env=env, **options)
        log.info("worker %d is process %d", number, child.pid)
        return child

    def stop(self) -> None:
        """Sends SIGTERM; a second call makes workers exit immediately. Kills those that outlive the drain by 5 s."""
        self.asked_to_stop.set()
        for child in self.children.values():
            self._end(child)

    def _end(self, child: Any) -> None:
        if child.poll() is None:
            child.terminate()
            gevent.spawn_later(self.drain_time + 5, child.kill)


def _on_orphaned(stop_server: Callable[[], None]) -> Any:
    """In a worker, calls `stop_server` when the process that runs the workers has ended."""
    if _WORKER not in os.environ:
        return None
    watcher = get_hub().loop.io(int(os.environ[_WORKER].split(":")[2]), 1)

    def on_end_of_file() -> None:
        watcher.stop()
        stop_server()

    watcher.start(on_end_of_file)
    return watcher.close


def _own_command() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # not None under python -m
    return [sys.executable, *(["-m", spec.name, *sys.argv[1:]] if spec else sys.argv)]


def _file_stamps() -> dict[str, float]:
    """Returns when each imported file changed; without those that are installed."""
    stamps = {}
    installed = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path and not path.startswith(installed):
            with suppress(OSError):
                stamps[path] = os.stat(path).st_mtime
    return stamps


class ApplicationTree:
    """The children of an application, below one supervisor, while a server serves it (OTP's application)."""

    def __init__(self, children: Iterable[dict[str, Any]], server: Any) -> None:
        self.children, self.server = room("gen_server").check_children(children), server
        self.supervisor: Any = None  # None unless it runs

    def start(self, start_server: Callable[[], None]) -> None:
        """Starts the children and then the server; stops them if the server cannot start.

        Raises RuntimeError, with id and reason, if a child cannot be started.
        """
        supervisor = room("gen_server").start_supervisor(self.children)
        match supervisor:
            case ("error", ("shutdown", ("failed_to_start_child", child_id, reason))):
                cause = reason if isinstance(reason, BaseException) else None
                raise RuntimeError(f"child {child_id!r} of the application cannot be started: {reason!r}") from cause
            case ("error", reason):  # killed while it started
                raise RuntimeError(f"the children of the application cannot be started: {reason!r}")
        self.supervisor = supervisor
        unlink(supervisor)  # its end must not end the caller, nor the caller's end the children
        supervisor.watch(self, self)
        try:
            start_server()
        except BaseException:
            self.stop()
            raise

    def down(self, _ref: Any, _pid: Pid, reason: Any) -> None:
        """Runs when the supervisor ends without `stop`."""
        log.critical("the supervisor of the application has ended: %r; the server stops", reason)
        self.supervisor, self.server.failed = None, True
        self.server.on_failure()

    def stop(self) -> None:
        """Ends the children in reverse order, and waits for that."""
        supervisor, self.supervisor = self.supervisor, None
        if supervisor is not None:
            supervisor.unwatch(self)
            try:
                room("gen_server").stop(supervisor, "shutdown")
            except Exception as error:  # killed, for example
                log.error("the supervisor of the application did not stop as it should: %r", error)


while_serving.append(_on_orphaned)
__all__ += ["reload_on_change", "run_workers"]
rooms["launch"] = SimpleNamespace(
    ApplicationTree=ApplicationTree,
    bound_socket=bound_socket,
    reload_on_change=reload_on_change,
    run_workers=run_workers,
)


# ----- cut here: without codec ---------------------------------------------------------------------------------------
# Lost: what a cluster sends: MessagePack with tuples, pids and datetimes. Without it there is no cluster.
# Needs: the package msgpack, once a cluster is asked for.


# ---------------------------------------------------------------------------------------------------------------------
# Codec: the wire format of a cluster, and the pids of its processes.
# Invariant: bytes in, values out; whatever the bytes are, no code of theirs runs.
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"N1"  # with the version of the wire format
MAX_PAYLOAD = 16 * 1024 * 1024  # bytes of a message between nodes; Redis disconnects subscribers that are 32 MB behind
MAX_DEPTH = 32  # nested tuples: each takes 40 KB of the C stack in msgpack, which overflows with a segfault
_TUPLE, _PID, _DATETIME = 1, 2, 3  # MessagePack's extension types


class Codec:
    """MessagePack with tuples, pids and datetimes."""

    def __init__(self, remote_pid: Any, node_id: bytes) -> None:
        self.remote_pid, self.node_id = remote_pid, node_id
        self.msgpack = _import_package("msgpack")

    def encode(self, value: Any) -> bytes:
        """Returns a message. Raises TypeError for what cannot cross to a node, ValueError for what is too large."""
        try:
            data = self._pack(value, 0)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TypeError(f"this cannot cross to another node: {error}") from None
        if len(data) > MAX_PAYLOAD - 64:
            raise ValueError(f"{len(data)} bytes are too many to cross to another node: the limit is {MAX_PAYLOAD}")
        return MAGIC + self.node_id + data

    def _pack(self, value: Any, depth: int) -> bytes:
        if depth > MAX_DEPTH:
            raise ValueError(f"tuples nested more than {MAX_DEPTH} deep")
        # strict: msgpack passes tuples, and subclasses of its types, to `_extend`
        extend = partial(self._extend, depth)
        return self.msgpack.packb(value, default=extend, strict_types=True, unicode_errors="surrogatepass")

    def _extend(self, depth: int, value: Any) -> Any:
        if isinstance(value, tuple):
            return self.msgpack.ExtType(_TUPLE, self._pack(list(value), depth + 1))
        if isinstance(value, Pid):
            if isinstance(value, Alias):
                _aliases[value.serial] = value
            node = getattr(value, "node", self.node_id)
            return self.msgpack.ExtType(_PID, node + value.serial.to_bytes(8, "big"))
        if isinstance(value, datetime):
            return self.msgpack.ExtType(_DATETIME, value.isoformat().encode())
        raise TypeError(f"{type(value).__name__} {value!r:.80}")

    def decode(self, message: bytes) -> tuple[bytes, Any]:
        """Returns the sender's id and the value. Raises any exception for bytes that are not a message."""
        if not message.startswith(MAGIC) or len(message) > MAX_PAYLOAD:
            raise ValueError("not a message of this version, or too large")
        return message[2:10], self._unpack(message[10:], 0)

    def _unpack(self, data: bytes, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"tuples nested more than {MAX_DEPTH} deep")
        restore = partial(self._restore, depth)
        return self.msgpack.unpackb(data, ext_hook=restore, strict_map_key=False, unicode_errors="surrogatepass")

    def _restore(self, depth: int, code: int, data: bytes) -> Any:
        if code == _TUPLE:
            return tuple(self._unpack(data, depth + 1))
        if code == _DATETIME:
            return datetime.fromisoformat(data.decode())
        if code != _PID or len(data) != 16:
            raise ValueError(f"an extension of type {code} and {len(data)} bytes")
        return self.pid(data[:8], int.from_bytes(data[8:], "big"))

    def pid(self, node: bytes, serial: int) -> Pid:
        local = node == self.node_id and (processes.get(serial) or _aliases.get(serial))
        return local or self.remote_pid(node, serial)


# Aliases that were sent to another node, by serial.
_aliases: weakref.WeakValueDictionary[int, Alias] = weakref.WeakValueDictionary()


def _import_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("a cluster needs two more packages: pip install redis hiredis msgpack") from None


rooms["codec"] = SimpleNamespace(Codec=Codec, MAGIC=MAGIC, import_package=_import_package)


# ----- cut here: without cluster -------------------------------------------------------------------------------------
# Lost: cluster=URL, pubsub.connect, publish. A node does not connect to others.
# Needs: the room codec, and the packages redis and msgpack.


# ---------------------------------------------------------------------------------------------------------------------
# Cluster: connects nodes through Redis or Valkey.
# Invariant: a message arrives at most once; where one may be missing, the members get ("nova_resync", channel).
#
# Each node subscribes to `<prefix>nodes`, to `<prefix>node:<its id>`, and to `<prefix>channel:<name>` where it has
# members. Redis keeps the order of what one connection publishes, and a node publishes over one. To `nodes` it sends
#
#   hello [name, sequence, members,   after Redis has confirmed its subscriptions; each other node replies with `state`
#     metas of presence]
#   delta [sequence, changes]         the processes that joined and left, or whose metas changed; after a gap the
#                                     receiver requests the state
#   beat [sequence]                   every HEARTBEAT_INTERVAL; a node's own beat, coming back, probes its transport
#   resync [channels]                 it may have failed to publish there (None: anywhere)
#   bye                               before it leaves
#   ask [room, caller]                a room of each other node sends its answer to the caller, see `cluster_stats`
#
# and to one node's own channel: state, need (requests `state`), send, exit, watch, unwatch, down; to itself loaded.
# Wire format: MAGIC, sender id (8 bytes), MessagePack. Anything else is dropped and counted. A restarted node has a
# new id. A node that was disconnected announces the gap instead of resending.
#
# The phases of a transport:
#
#   DISCONNECTED  to CONNECTING after a delay
#   CONNECTING    to SUBSCRIBING when both connections are open; control messages wait in the outbox from here on
#   SUBSCRIBING   to CONNECTED when Redis has confirmed all subscriptions; then `hello`, and broadcasts cross
#   CONNECTED     to LEAVING after `bye`; nothing is published after it
#   any           to DISCONNECTED when a connection fails, Redis does not respond, or the transport is closed
# ---------------------------------------------------------------------------------------------------------------------

KEPT_MARK = b"@"  # opens a message of a kept channel: its position, a space, and the message follow
HEARTBEAT_INTERVAL = 2.0  # seconds
NODE_TIMEOUT = 6.2  # seconds of silence after which a node is removed: with a tick, less than 7
TRANSPORT_TIMEOUT = 4.0  # seconds without the node's own beat until it reconnects: with a tick, less than 5
TICK = 0.5  # seconds
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds before reconnecting, doubled each time, with jitter
MAX_OUTBOX = 64 * 1024 * 1024  # bytes that may wait for Redis; beyond, broadcasts are lost, which is announced
JOIN_TIME = 5.0  # seconds that `join` waits for its subscription at most, `connect` and `publish` for Redis
MAX_CHANGES = 500  # in one delta: with the largest metas of presence, it is half of what a message may have
MAX_NAMES = 1000  # names of nodes that have left; a pid of an earlier one prints the node's id
MAX_LOST = 10_000  # channels announced one by one; beyond, all channels are
DISCONNECTED, CONNECTING, SUBSCRIBING, CONNECTED, LEAVING = range(5)


class RemotePid(Pid):
    """A process of another node, or an ended one of this. `send` raises TypeError or ValueError, see Codec."""

    __slots__ = ("cluster", "node")

    def __init__(self, cluster: Cluster, node: bytes, serial: int) -> None:
        self.cluster, self.node, self.serial = cluster, node, serial

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePid) and (self.node, self.serial) == (other.node, other.serial)

    def __hash__(self) -> int:
        return hash((self.node, self.serial))

    def __repr__(self) -> str:
        return f"<{self.cluster.membership.names.get(self.node, self.node.hex())}.{self.serial}>"

    def send(self, message: Any) -> None:
        self.cluster.send_to_node(self.node, "send", self.serial, message)

    def watch(self, ref: Any, watcher: Any) -> None:
        if self.node in self.cluster.membership.nodes:
            self.cluster.monitors.monitoring[ref] = (self, watcher)
            self.cluster.send_to_node(self.node, "watch", self.serial, ref)
        else:
            watcher.down(ref, self, "noproc" if self.node == self.cluster.id else "noconnection")

    def unwatch(self, ref: Any) -> None:
        if self.cluster.monitors.monitoring.pop(ref, None):
            self.cluster.send_to_node(self.node, "unwatch", self.serial, ref)

    def signal(self, source: Pid, reason: Any) -> None:
        self.cluster.send_to_node(self.node, "exit", self.serial, source, self.cluster.exit_reason(reason))

    def kill(self, reason: Any) -> None:
        self.cluster.send_to_node(self.node, "exit", self.serial, None, "kill")


class Redis:
    """Opens connections to the Redis of a URL, and names its keys and channels."""

    def __init__(self, url: str, timeout: float | None = None) -> None:
        self.module = room("codec").import_package("redis")
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.prefix = query.pop("prefix", "nova") + ":"
        location = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
        self.label = f"{parts.scheme}://{location}"  # for the log: no password, not even one with a slash
        options = {"protocol": 2, "socket_timeout": timeout, "socket_connect_timeout": 5, "socket_keepalive": True}
        options |= {"decode_responses": False, "health_check_interval": 0}
        query = {name: value for name, value in query.items() if name not in options}
        try:
            self.client = self.module.Redis.from_url(parts._replace(query=urlencode(query)).geturl(), **options)
            self.client.connection_pool.make_connection()  # does not connect, but raises for an unknown option
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.label} is not the URL of a Redis, as redis://host:6379/0 is: {error}") from None

    def connect(self) -> Any:
        connection = self.client.connection_pool.make_connection()
        connection.connect()
        return connection

    def key(self, kind: str, name: str = "") -> bytes:
        return f"{self.prefix}{kind}{name}".encode("utf-8", "surrogatepass")


class Transport:
    """Two connections to Redis. A greenlet connects, reads from one and reconnects; another one writes to both.

    It is subscribed to the channels that have members on this node, and to those that this node keeps.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.redis, self.pubsub = cluster, cluster.redis, cluster.pubsub
        self.phase = DISCONNECTED
        self.reading: Any = None
        self.writing: Any = None
        self.run_id = ""  # of the Redis server, a new one after each start; "" if Redis does not permit INFO
        self.subscriptions: dict[str, gevent.event.Event] = {}  # channel -> set when Redis has confirmed it
        self.commands: list[Any] = []  # SUBSCRIBE and UNSUBSCRIBE, for `reading`
        self.outbox: deque[tuple[str | None, Any]] = deque()  # for `writing`: (channel of a broadcast or None, command)
        self.outbox_bytes = 0
        self.work = gevent.event.Event()
        self.last_heard = cluster.clock  # when the node's own beat came back
        self.reader = gevent.spawn(self._run)

    def close(self) -> None:
        """Publishes nothing more, waits at most a second for the outbox, and disconnects."""
        if self.phase == CONNECTED:
            self.phase = LEAVING
            with gevent.Timeout(1, False):
                while self.outbox and self.phase == LEAVING:
                    gevent.sleep(0.001)
        self.reader.kill()

    def is_subscribed(self, channel: str) -> bool:
        return channel in self.subscriptions and self.subscriptions[channel].is_set()

    def update_subscription(self, channel: str) -> None:
        """Subscribes or unsubscribes, if that is necessary. While it is connecting, it subscribes later."""
        is_needed = channel in self.pubsub.channels or channel in self.pubsub.histories
        if is_needed and channel not in self.subscriptions and self.phase in (SUBSCRIBING, CONNECTED):
            self.subscriptions[channel] = gevent.event.Event()
            self._command("SUBSCRIBE", self.redis.key("channel:", channel))
        elif not is_needed and self.is_subscribed(channel):  # not before: a confirmation is always the latest's
            del self.subscriptions[channel]
            self._command("UNSUBSCRIBE", self.redis.key("channel:", channel))

    def on_subscribed(self, channel: str) -> None:
        for process in self.pubsub.channels.get(channel, ()):
            self.cluster.membership.add_change("join", channel, process)
        self.subscriptions[channel].set()  # after that: other nodes learn of a member before its `join` returns
        if channel in self.pubsub.histories:
            self.cluster.on_keep(channel)
        self.update_subscription(channel)  # all members may have left meanwhile

    def _command(self, name: str, key: bytes) -> None:
        self.commands.append((name, key))
        self.work.set()

    def send(self, channel: str | None, *command: Any) -> None:
        """Queues a command whose last argument is a message; `channel` is None for what is not a broadcast."""
        if self.phase in (CONNECTING, SUBSCRIBING, CONNECTED):
            self.outbox.append((channel, command))
            self.outbox_bytes += len(command[-1])
            self.work.set()

    def accepts_broadcasts(self) -> bool:
        return self.phase == CONNECTED and self.outbox_bytes < MAX_OUTBOX

    def check_timeout(self, now: float) -> None:
        if self.phase != DISCONNECTED and now - self.last_heard > TRANSPORT_TIMEOUT:
            self.last_heard = now
            self.reader.kill(TimeoutError(f"no response for {TRANSPORT_TIMEOUT:.0f} s"), block=False)

    def _run(self) -> None:
        delay, failure = 0.0, ""
        while True:
            try:
                gevent.sleep(delay * random.uniform(0.5, 1))
                self._read()
            except Exception as error:
                if not isinstance(error, OSError | self.redis.module.RedisError):
                    log.exception("cluster: unexpected error")
                was_connected = self.phase in (CONNECTED, LEAVING)
                if was_connected or str(error) != failure:
                    what = "disconnected from" if was_connected else "cannot connect to"
                    log.warning("cluster: %s %s: %s; retrying", what, self.redis.label, error)
                delay = FIRST_DELAY if was_connected else min(max(delay, FIRST_DELAY) * 2, LAST_DELAY)
                failure = str(error)
            finally:
                self._disconnect()

    def _read(self) -> None:
        self.phase, self.last_heard = CONNECTING, self.cluster.clock
        self.writing = self.redis.connect()
        self.writing.send_command("INFO", "server")
        with suppress(self.redis.module.ResponseError):  # Redis may not permit it
            self.run_id = b"".join(re.findall(rb"run_id:(\w+)", self.writing.read_response())).decode()
        self.reading = self.redis.connect()
        self.phase = SUBSCRIBING
        self._command("SUBSCRIBE", self.redis.key("nodes"))
        for channel in {*self.pubsub.channels, *self.pubsub.histories}:
            self.update_subscription(channel)
        self._command("SUBSCRIBE", self.cluster.own_key)  # the last: Redis confirms in order
        writer = gevent.spawn(self._write)
        try:
            last_yield = monotonic()
            while True:
                self.cluster.on_response(self.reading.read_response())
                if monotonic() - last_yield > TIME_SLICE:  # reading buffered responses does not yield
                    gevent.sleep(YIELD_DELAY)
                    last_yield = monotonic()
        finally:
            writer.kill()

    def _write(self) -> None:
        try:
            while True:
                self.work.wait()
                self.work.clear()
                self.cluster.membership.publish_changes()
                if self.commands:
                    commands, self.commands = self.commands, []
                    self.reading.send_packed_command(self.reading.pack_commands(commands))
                if self.outbox:
                    self._write_batch()
        except Exception as error:
            self.reader.kill(error, block=False)

    def _write_batch(self) -> None:
        """Writes a part of the outbox in one round trip."""
        batch: list[Any] = []
        size = 0
        while len(batch) < min(1000, len(self.outbox)) and size < 1_000_000:
            batch.append(self.outbox[len(batch)][1])
            size += len(batch[-1][-1])
        self.writing.send_packed_command(self.writing.pack_commands(batch))
        for _ in batch:
            self.writing.read_response()
            self.outbox_bytes -= len(self.outbox.popleft()[1][-1])  # after the response: else it counts as unsent
        if self.outbox:
            self.work.set()

    def _disconnect(self) -> None:
        for connection in filter(None, (self.reading, self.writing)):
            connection.disconnect()
        for event in self.subscriptions.values():
            event.set()
        for channel, _ in self.outbox:
            self.cluster.record_loss(channel)
        self.phase, self.reading, self.writing, self.outbox_bytes = DISCONNECTED, None, None, 0
        for waiting in (self.outbox, self.commands, self.subscriptions):
            waiting.clear()
        self.cluster.on_disconnect()


@dataclass(eq=False)
class Node:
    """Another node, as far as this one has received its state."""

    name: str
    sequence: int
    last_heard: float
    members: dict[str, set[int]]  # channel -> serials; no set is ever empty
    metas: dict[tuple[str, int, str], Any]  # of presence: (channel, serial, key) -> meta


class Membership:
    """The other nodes with their members, which they announce; and the changes here, for this node's next delta."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.pubsub, self.name = cluster, cluster.pubsub, name
        self.nodes: dict[bytes, Node] = {}
        self.names = {cluster.id: name}  # node id -> name; kept after the node has left, since its pids may be printed
        self.sequence = 0  # of this node's last hello or delta
        self.changes: list[Any] = []
        self.requested: set[bytes] = set()  # nodes whose state was requested since the last tick

    def add_change(self, change: str, channel: str, process: Process, *meta: Any) -> None:
        if self.cluster.connected:  # else `hello` includes it
            self.changes.append([change, channel, process.serial, *meta])
            self.cluster.transport.work.set()

    def publish_changes(self) -> None:
        while self.changes:
            self.sequence += 1
            changes, self.changes = self.changes[:MAX_CHANGES], self.changes[MAX_CHANGES:]
            self.cluster.publish_control(None, "delta", self.sequence, changes)

    def send_state(self, node_id: bytes | None = None) -> None:
        """Sends this node's state to one node, or to all; and its monitors, since they may have removed this node."""
        channels = filter(self.cluster.transport.is_subscribed, self.pubsub.channels)
        members = {channel: [process.serial for process in self.pubsub.channels[channel]] for channel in channels}
        kind = "hello" if node_id is None else "state"
        self.cluster.publish_control(node_id, kind, self.name, self.sequence, members, self.get_metas())
        self.cluster.monitors.watch_again(node_id)

    def get_metas(self) -> list[Any]:
        return room("presence").get_local_metas(self.pubsub) if "presence" in rooms else []

    def on_hello(self, node_id: bytes, *state: Any) -> None:
        self.on_state(node_id, *state)
        self.send_state(node_id)

    def on_state(self, node_id: bytes, name: str, sequence: int, members: Any, metas: list[Any]) -> None:
        node = self.nodes.get(node_id) or Node(name, sequence, self.cluster.clock, {}, {})
        new, new_metas = self._list_members(members), {(*owner,): meta for *owner, meta in metas}
        if sequence < node.sequence:  # old, as in `on_delta`
            return
        if node_id not in self.nodes:
            log.info("cluster: node %s %s joined", name, node_id.hex())
        self.nodes[node_id], self.names[node_id], node.sequence = node, name, sequence
        self.requested.discard(node_id)
        old = self._list_members(node.members)
        self._apply(node_id, [("join", *it) for it in new - old] + [("leave", *it) for it in old - new])
        self._apply(node_id, [("meta", *owner, new_metas.get(owner)) for owner in {*node.metas, *new_metas}])

    def on_beat(self, node_id: bytes, sequence: int) -> bool:
        """Returns whether this node has received all deltas up to `sequence`. Requests the state if not."""
        is_complete = node_id in self.nodes and self.nodes[node_id].sequence >= sequence
        if not is_complete and node_id not in self.requested:
            self.requested.add(node_id)
            self.cluster.publish_control(node_id, "need")
            if node_id in self.nodes:  # else the node is new
                self.cluster.resync()
        return is_complete

    def on_delta(self, node_id: bytes, sequence: int, changes: list[Any]) -> None:
        # One that is old may come from a connection that the node has replaced.
        if self.on_beat(node_id, sequence - 1) and sequence > self.nodes[node_id].sequence:
            self.nodes[node_id].sequence = sequence
            self._apply(node_id, changes)

    def _list_members(self, members: Mapping[str, Iterable[int]]) -> set[tuple[str, int]]:
        return {(channel, serial) for channel, serials in members.items() for serial in serials}

    def _apply(self, node_id: bytes, changes: Iterable[Any]) -> None:
        members = self.nodes[node_id].members
        for change, channel, serial, *meta in changes:
            if change == "meta":
                self._apply_meta(node_id, channel, serial, *meta)
                continue
            serials = members.setdefault(channel, set())
            if (change == "join") != (serial in serials):
                (serials.add if change == "join" else serials.discard)(serial)
                self.pubsub.notify_monitors(channel, change, self.cluster.codec.pid(node_id, serial))
            if not serials:
                del members[channel]

    def _apply_meta(self, node_id: bytes, channel: str, serial: int, key: str, meta: Any) -> None:
        metas, owner = self.nodes[node_id].metas, (channel, serial, key)
        if metas.get(owner) == meta:
            return
        if meta is None:
            del metas[owner]
        else:
            metas[owner] = meta
        if "presence" in rooms:
            room("presence").set_meta(self.pubsub, channel, key, self.cluster.codec.pid(node_id, serial), meta)

    def remove_node(self, node_id: bytes, why: str) -> None:
        if node_id not in self.nodes:
            return
        self._apply(node_id, [("leave", *member) for member in self._list_members(self.nodes[node_id].members)])
        self._apply(node_id, [("meta", *owner, None) for owner in self.nodes[node_id].metas])
        del self.nodes[node_id]
        self.names[node_id] = self.names.pop(node_id)  # the order is that of leaving
        if len(self.names) > len(self.nodes) + MAX_NAMES:
            del self.names[next(old for old in self.names if old != self.cluster.id and old not in self.nodes)]
        log.info("cluster: node %s %s left: %s", self.names[node_id], node_id.hex(), why)
        self.cluster.monitors.remove_node(node_id)


class RemoteMonitors:
    """Monitors across nodes. Both directions are set up again after a gap: `watch` and `down` may have been lost."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.monitoring: dict[Any, tuple[RemotePid, Any]] = {}  # ref -> process elsewhere, and what gets its `down`

    def watch_again(self, node_id: bytes | None) -> None:
        for ref, (pid, _) in self.monitoring.items():
            if node_id in (None, pid.node):
                self.cluster.send_to_node(pid.node, "watch", pid.serial, ref)

    def on_watch(self, node_id: bytes, serial: int, ref: Any) -> None:
        process = self.cluster.codec.pid(self.cluster.id, serial)  # an ended one responds with "noproc"
        process.watch((node_id, ref), self)

    def on_unwatch(self, node_id: bytes, serial: int, ref: Any) -> None:
        self.cluster.codec.pid(self.cluster.id, serial).unwatch((node_id, ref))

    def on_down(self, _node_id: bytes, _serial: int, ref: Any, reason: Any) -> None:
        if ref in self.monitoring:  # else it was demonitored meanwhile
            pid, watcher = self.monitoring.pop(ref)
            watcher.down(ref, pid, reason)

    def down(self, key: tuple[bytes, Any], process: Pid, reason: Any) -> None:
        """A process of this node that another node monitors has ended."""
        self.cluster.publish_control(key[0], "down", process.serial, key[1], self.cluster.exit_reason(reason))

    def remove_node(self, node_id: bytes) -> None:
        for ref, (pid, _) in list(self.monitoring.items()):
            if pid.node == node_id:
                self.on_down(node_id, pid.serial, ref, "noconnection")
        for process in processes.values():
            for key, watcher in list((process.monitored_by or {}).items()):
                if watcher is self and key[0] == node_id:
                    process.unwatch(key)


class KeptChannels:
    """Redis keeps what the room replay keeps, and each node a copy of it: it is always subscribed to these channels.

    A message to one of them is delivered here when it returns from Redis.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.pubsub, self.redis = cluster, cluster.pubsub, cluster.redis
        self.in_flight: deque[tuple[Message, Pid | None]] = deque()  # sent to Redis to be kept, not returned yet
        self.loading: dict[str, Any] = {}  # channel -> the arguments of History.load, while `loaded` is on its way
        self.loaded: set[str] = set()  # kept channels of which this node has what Redis has, or never will

    def send(self, history: Recorder, message: Message, exclude: Pid | None, data: bytes) -> None:
        channel, transport = message[1], self.cluster.transport
        keys = [self.redis.key(kind, channel) for kind in ("life:", "history:", "channel:")]
        epoch, seconds = os.urandom(4).hex(), max(1, int(history.seconds))
        transport.send(channel, "EVAL", KEEP, 3, *keys, epoch, transport.run_id, history.size, seconds, data)
        self.in_flight.append((message, exclude))

    def forget(self) -> None:
        """Called when the transport is disconnected."""
        self.loading.clear()
        self.loaded.clear()
        for history in self.pubsub.histories.values():
            history.forget()  # other nodes continue without this one
        while self.in_flight:  # Redis may have published them, but the members here did not get them
            self.pubsub.deliver_unrecorded(*self.in_flight.popleft())

    def load(self, channel: str) -> None:
        """Runs in a greenlet: reads the history from Redis."""
        history = self.pubsub.histories[channel]
        try:
            keys = self.redis.key("life:", channel), self.redis.key("history:", channel)
            response = self.redis.client.eval(LOAD, 2, *keys, os.urandom(4).hex(), self.cluster.transport.run_id)
            epoch, offset, now, entries = response
            aged = [(int(now) - int(fields[1]), fields[3]) for _, fields in entries]
            recent = [(monotonic() - age, data) for age, data in aged if age <= history.seconds]
            messages = [(at, self.cluster.read_broadcast(channel, *data.split(b" ", 1))[0]) for at, data in recent]
            # The transport may not have delivered some of them yet. After it has delivered `loaded`, it has.
            self.loading[channel] = epoch.decode(), int(offset), messages
            self.cluster.publish_control(self.cluster.id, "loaded", channel)
        except Exception as error:  # the transport fails as well; or a stranger has written there
            log.warning("cluster: cannot read the history of %s: %s", channel, error)
            history.forget()
            self.loaded.add(channel)

    def on_loaded(self, node_id: bytes, channel: str) -> None:
        if node_id == self.cluster.id and channel in self.loading:
            self.pubsub.histories[channel].load(*self.loading.pop(channel))
            self.loaded.add(channel)

    def wait_until_loaded(self, channel: str) -> None:
        if get_ident() == scheduler.thread and not isinstance(getcurrent(), Hub):
            with gevent.Timeout(JOIN_TIME, False):
                while self.cluster.connected and channel in self.pubsub.histories and channel not in self.loaded:
                    gevent.sleep(0.01)


class Cluster(Adapter):
    """Connects pub/sub with the other nodes; `pubsub.connect` makes it. It runs in the hub's thread."""

    def __init__(self, pubsub: PubSub, url: str, name: str) -> None:
        super().__init__(pubsub)
        self.id = os.urandom(8)
        self.redis, self.codec = Redis(url), room("codec").Codec(partial(RemotePid, self), self.id)
        self.header = room("codec").MAGIC + self.id  # of what this node sends
        self.own_key, self.channel_prefix = self.redis.key("node:", self.id.hex()), self.redis.key("channel:")
        self.first_connected = gevent.event.Event()
        self.had_gap = False  # the node was not connected for a time
        self.lost_channels: set[str] = set()  # channels where it failed to publish; more than MAX_LOST: all
        self.dropped, self.logged_drops = 0, 0  # messages that could not be read
        self.last_log = -60.0  # of dropped messages
        self.clock = 0.0  # seconds, in ticks: nothing is silent for longer while this process is blocked
        self.membership, self.monitors, self.kept = Membership(self, name), RemoteMonitors(self), KeptChannels(self)
        self.codec.encode(self.membership.get_metas())  # raises for what was tracked already and cannot cross
        self.handlers: dict[str, tuple[Any, ...]] = {  # of control messages: with the types of the arguments
            "hello": (self.membership.on_hello, str, int, dict, list),
            "state": (self.membership.on_state, str, int, dict, list),
            "need": (self.membership.send_state,),
            "delta": (self.membership.on_delta, int, list),
            "beat": (self.membership.on_beat, int),
            "resync": (lambda _node_id, channels: self.resync(channels), list | None),
            "bye": (partial(self.membership.remove_node, why="disconnected"),),
            "send": (lambda _node_id, serial, message: self.codec.pid(self.id, serial).send(message), int, object),
            "exit": (self._on_exit, int, object, object),
            "watch": (self.monitors.on_watch, int, object),
            "unwatch": (self.monitors.on_unwatch, int, object),
            "down": (self.monitors.on_down, int, object, object),
            "loaded": (self.kept.on_loaded, str),
            "ask": (lambda _node_id, name, caller: room(name).answer(caller), str, Pid),
        }
        self.transport = Transport(self)
        self.timer = get_hub().loop.timer(TICK, TICK)
        self.timer.start(self._tick)

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return self.transport.phase == CONNECTED

    def close(self) -> None:
        self.timer.close()
        if self.connected:
            self.membership.changes.clear()
            self.publish_control(None, "bye")
        self.transport.close()
        self.redis.client.close()
        for node_id in list(self.membership.nodes):
            self.membership.remove_node(node_id, "this node disconnected")

    def _tick(self) -> None:
        """Hub callback: publishes the beat, and checks the timeouts of the transport and the nodes."""
        now = self.clock = self.clock + TICK
        if self.connected and now % HEARTBEAT_INTERVAL < TICK:
            self.publish_control(None, "beat", self.membership.sequence)
        if self.connected and self.transport.outbox_bytes < MAX_OUTBOX // 2:
            self._announce_losses()  # those of an outbox that was full
        self.transport.check_timeout(now)
        self.membership.requested.clear()
        for node_id, node in list(self.membership.nodes.items()):
            if now - node.last_heard > NODE_TIMEOUT:
                self.membership.remove_node(node_id, f"silent for {now - node.last_heard:.1f} s")
        self._log_dropped(monotonic())

    def _log_dropped(self, now: float) -> None:
        if self.dropped > self.logged_drops and now - self.last_log >= 60:
            log.warning("cluster: dropped %d messages that could not be read", self.dropped - self.logged_drops)
            self.last_log, self.logged_drops = now, self.dropped

    # -- the adapter of pub/sub

    def encode(self, message: Message, exclude: Pid | None) -> bytes:
        return self.codec.encode([*message[2:], exclude])

    def dispatch(self, message: Message, exclude: Pid | None, data: bytes) -> None:
        channel, transport = message[1], self.transport
        history = self.pubsub.histories.get(channel)
        if history is None or not transport.is_subscribed(channel) or not transport.accepts_broadcasts():
            self.pubsub.deliver_unrecorded(message, exclude)
            self._publish(self.redis.key("channel:", channel), data, channel)
            return
        self.kept.send(history, message, exclude, data)

    def dispatch_here(self, message: Message) -> None:
        self.pubsub.deliver(message, None)  # Redis does not keep it

    def on_join(self, channel: str, process: Process) -> None:
        if self.transport.is_subscribed(channel):  # else `on_subscribed` announces it
            self.membership.add_change("join", channel, process)
        self.transport.update_subscription(channel)

    def on_leave(self, channel: str, process: Process) -> None:
        if self.transport.is_subscribed(channel):
            self.membership.add_change("leave", channel, process)
        self.transport.update_subscription(channel)

    def on_track(self, channel: str, key: str, process: Process, meta: dict[str, Any] | None) -> None:
        self.membership.add_change("meta", channel, process, key, meta)

    def on_keep(self, channel: str) -> None:
        if self.transport.is_subscribed(channel):
            gevent.spawn(self.kept.load, channel)
        self.transport.update_subscription(channel)

    def wait_until_loaded(self, channel: str) -> None:
        self.kept.wait_until_loaded(channel)

    def wait_until_subscribed(self, channel: str) -> None:
        event = self.transport.subscriptions.get(channel)
        if event is not None and get_ident() == scheduler.thread and not isinstance(getcurrent(), Hub):
            event.wait(JOIN_TIME)

    def get_members(self, channel: str) -> list[Pid]:
        nodes = self.membership.nodes.items()
        return [self.codec.pid(node_id, serial) for node_id, node in nodes for serial in node.members.get(channel, ())]

    def count_members(self, channel: str) -> int:
        return sum(len(node.members.get(channel, ())) for node in self.membership.nodes.values())

    def which_channels(self) -> set[str]:
        return {channel for node in self.membership.nodes.values() for channel in node.members}

    def info(self) -> dict[str, Any]:
        nodes = []
        for node_id, node in self.membership.nodes.items():
            members, silent = sum(map(len, node.members.values())), round(self.clock - node.last_heard, 1)
            nodes.append({"name": node.name, "id": node_id.hex(), "members": members, "silent_seconds": silent})
        return {"up": self.connected, "nodes": nodes, "dropped": self.dropped}

    def publish_control(self, node_id: bytes | None, *body: Any) -> None:
        """Sends a control message to one node, or to all."""
        key = self.redis.key("nodes") if node_id is None else self.redis.key("node:", node_id.hex())
        self.transport.send(None, "PUBLISH", key, self.codec.encode(list(body)))

    def send_to_node(self, node_id: bytes, *body: Any) -> None:
        """Sends a control message to one node, from any thread. Raises TypeError and ValueError, see Codec."""
        data = self.codec.encode(list(body))
        if node_id != self.id:  # else to a process that has ended
            scheduler.run_in_hub(self._publish, self.redis.key("node:", node_id.hex()), data, None)

    def _publish(self, key: bytes, data: bytes, channel: str | None) -> None:
        if self.transport.accepts_broadcasts():
            self.transport.send(channel, "PUBLISH", key, data)
        else:
            self.record_loss(channel)

    def record_loss(self, channel: str | None) -> None:
        if channel is not None and len(self.lost_channels) <= MAX_LOST:
            self.lost_channels.add(channel)

    def _announce_losses(self) -> None:
        if self.lost_channels:
            lost, self.lost_channels = self.lost_channels, set()
            self.publish_control(None, "resync", list(lost) if len(lost) <= MAX_LOST else None)

    def exit_reason(self, reason: Any) -> Any:
        """Returns the reason if it can cross, else (an exception, for example) its text."""
        with suppress(TypeError, ValueError):
            self.codec.encode(reason)
            return reason
        return repr(reason)

    # -- events of the transport

    def _on_connected(self) -> None:
        again = " again" if self.first_connected.is_set() else ""
        self.transport.phase = CONNECTED
        self.first_connected.set()
        log.info("cluster: %s connected to %s%s", self.membership.name, self.redis.label, again)
        self.membership.sequence += 1  # no delta contained the changes while the node was disconnected
        self.membership.send_state()
        self._announce_losses()
        if self.had_gap:
            self.had_gap = False
            self.resync()

    def on_disconnect(self) -> None:
        self.had_gap = True
        self.membership.changes.clear()
        self.kept.forget()

    def on_response(self, response: Any) -> None:
        match response:
            case [b"subscribe", key, _] if key == self.own_key:
                self._on_connected()
            case [b"subscribe", key, _] if key.startswith(self.channel_prefix):
                self.transport.on_subscribed(self._channel_of(key))
            case [b"message", key, data]:
                try:
                    self._on_message(key, data)
                except Exception as error:  # from a stranger or another version: any exception is possible
                    self.dropped += 1
                    log.debug("cluster: dropped %d bytes: %r", len(data), error)

    def _channel_of(self, key: bytes) -> str:
        return key[len(self.channel_prefix) :].decode("utf-8", "surrogatepass")

    def _on_message(self, key: bytes, data: bytes) -> None:
        if data.startswith(self.header):
            self.transport.last_heard = self.clock
            if key != self.own_key:
                return
        if key.startswith(self.channel_prefix):
            self._on_broadcast(self._channel_of(key), data)
            return
        node_id, (kind, *arguments) = self.codec.decode(data)
        if node_id in self.membership.nodes:
            self.membership.nodes[node_id].last_heard = self.clock
        handler, *types = self.handlers[kind]
        if len(arguments) != len(types) or not all(map(isinstance, arguments, types)):
            raise TypeError(f"not the arguments of {kind}")
        handler(node_id, *arguments)

    def _on_exit(self, _node_id: bytes, serial: int, source: Any, reason: Any) -> None:
        process = self.codec.pid(self.id, serial)
        process.kill("killed") if source is None else process.signal(source, reason)

    def _on_broadcast(self, channel: str, data: bytes) -> None:
        position, data = data.split(b" ", 1) if data.startswith(KEPT_MARK) else (b"", data)
        if position and self.kept.in_flight and data.startswith(self.header):  # in the order in which they were sent
            message, exclude = self.kept.in_flight.popleft()
            message.position = position[1:].decode() or None
        else:
            message, exclude = self.read_broadcast(channel, position, data)
        deliver = self.pubsub.deliver_unrecorded if message.position is None else self.pubsub.record_and_deliver
        deliver(message, exclude)

    def read_broadcast(self, channel: str, position: bytes, data: bytes) -> tuple[Message, Any]:
        _, (sender, topic, payload, exclude) = self.codec.decode(data)
        if not isinstance(sender, Pid) or not isinstance(topic, str | bytes):
            raise ValueError("not a broadcast")
        message = Message(("nova_pubsub", channel, sender, topic, payload))
        message.position = position[1:].decode() or None
        return message, exclude

    def resync(self, channels: Iterable[str] | None = None) -> None:
        """Tells local members, by default of all channels, that messages may be missing: they should reload."""
        for channel in list(self.pubsub.channels) if channels is None else channels:
            is_named = channel.startswith("$")  # it gives its members a name, for the room leases
            for process in () if is_named else self.pubsub.channels.get(channel, ()):
                process.deliver(("nova_resync", channel))


# What Redis does for a kept channel. KEYS: a hash (life: the epoch; number: the offset of the last message; run), a
# stream of the messages, the channel. ARGV: an epoch to begin, the server's run_id, size, seconds, the message, which
# is published with its position. A Redis that restarts may load an older copy: another run_id begins another epoch.
_BEGIN = """
if redis.call('HGET', KEYS[1], 'run') ~= ARGV[2] then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'life', ARGV[1], 'run', ARGV[2], 'number', 0)
end
local life, now = redis.call('HGET', KEYS[1], 'life'), redis.call('TIME')[1]
"""
KEEP = f"""
local position = ''
pcall(function()  -- without memory, Redis publishes the message without a position
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


def _connect(pubsub: PubSub, url: str, name: str | None = None) -> str:
    if isinstance(pubsub.adapter, Cluster):
        raise RuntimeError("this node is already in a cluster")
    if not gevent.monkey.is_module_patched("socket"):
        raise RuntimeError("a cluster needs a patched library: from gevent import monkey; monkey.patch_all()")
    calling_process()
    pubsub.adapter = Cluster(pubsub, url, name or scheduler.node)
    scheduler.node = pubsub.adapter.membership.name
    if not pubsub.adapter.first_connected.wait(JOIN_TIME):
        log.warning("cluster: not connected yet, continuing alone")
    return "ok"


def _disconnect(pubsub: PubSub) -> str:
    cluster = pubsub.adapter
    if not isinstance(cluster, Cluster):
        return "not_connected"
    pubsub.adapter = Adapter(pubsub)
    cluster.close()
    return "ok"


def _find_redis() -> Any:
    """Returns (a connection to the cluster's Redis that opens by itself, what names keys), None for a node alone."""
    redis = pubsub.adapter.redis if isinstance(pubsub.adapter, Cluster) else None
    return redis and (redis.client.connection_pool.make_connection(), redis.key)


def publish(url: str, channel: str, topic: str | bytes, payload: Any) -> int:
    """Broadcasts without being a node. Returns how many nodes have members in the channel.

    Raises OSError or redis.RedisError if Redis does not respond within 5 seconds, and what `broadcast` raises.
    """
    redis, message = Redis(url, JOIN_TIME), pubsub.make_message(channel, topic, payload)
    data = room("codec").Codec(None, os.urandom(8)).encode([*message[2:], None])
    with redis.client:
        return redis.client.publish(redis.key("channel:", channel), data)


def start_once(spec: dict[str, Any]) -> Any:
    """Returns what a supervisor starts for a child in the cluster. The room leases replaces this."""
    return room("leases") if isinstance(pubsub.adapter, Cluster) else spec["start"]


getattr(rooms.get("gen_server"), "scopes", {})["cluster"] = start_once
__all__ += ["publish"]
rooms["cluster"] = SimpleNamespace(connect=_connect, disconnect=_disconnect, find_redis=_find_redis)
rooms["cluster"].ask = lambda name, caller: pubsub.adapter.publish_control(None, "ask", name, caller)


# ----- cut here: without leases --------------------------------------------------------------------------------------
# Lost: children that run on one node of the cluster ("scope": "cluster"), names like ("cluster", id), lease_number.


# ---------------------------------------------------------------------------------------------------------------------
# Leases: a child with "scope": "cluster" runs on one node of the cluster, the one that holds its lease in Redis.
# Invariant: a child runs only while, by this node's clock, its lease is not over.
#
# In place of the child the supervisor starts a keeper, which waits for the lease and then starts the child. Its node
# counts LEASE_TIME from before a request is sent, Redis from when it handles it: the lease is over here first. Parts
# of LEASE_TIME after the last renewal:
#   1/4    a greenlet renews the lease, and tries until 5/8
#   5/8    the keeper ends the child by "shutdown", from 13/16 by "kill"
#   15/16  the guard, a timer, kills what the keeper has started, whatever the keeper waits for
#   1      another node's keeper gets the lease (after a release, immediately)
# ---------------------------------------------------------------------------------------------------------------------

LEASE_TIME = 9.0  # seconds: by then, the members of a dead node have left its channels, the child among them
CHILD_CHANNEL, KEEPERS_CHANNEL = "$lease ", "$keepers "  # with an id: of the child alone; for releases

# KEYS: the lease, the last number. ARGV: the owner, milliseconds. Returns a fencing number, or -(milliseconds to wait).
# A restarted Redis may have lost leases: it waits until they are over. It may have lost the last number: the first is
# the time. If the owner has the lease already, an earlier response was lost.
_ACQUIRE = """
local is_known, info = pcall(redis.call, 'INFO', 'server')
local uptime = is_known and tonumber(string.match(info, 'uptime_in_seconds:(%d+)'))
if uptime and (uptime - 1) * 1000 < tonumber(ARGV[2]) then return (uptime - 1) * 1000 - ARGV[2] end
local is_granted = redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) or redis.call('GET', KEYS[1]) == ARGV[1]
if not is_granted then return -math.max(redis.call('PTTL', KEYS[1]), 1) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], redis.call('TIME')[1], 'NX')
return redis.call('INCR', KEYS[2])
"""
_RENEW = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2]) or 0"
_RELEASE = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0"
keepers: dict[Process, Keeper] = {}  # by their processes
_redis_of_cluster: Callable[[], Any] = getattr(rooms.get("cluster"), "find_redis", lambda: None)


class Keeper:
    """A process that runs a child while this node holds the lease."""

    def __init__(self, spec: dict[str, Any], redis: Any) -> None:
        self.spec, self.id, self.supervisor, self.adapter = spec, spec["id"], calling_process(), pubsub.adapter
        self.shutdown = {"brutal_kill": 0.0, "infinity": 1e9}.get(spec["shutdown"], spec["shutdown"])  # seconds
        self.me: Any = None
        self.child: Any = None  # None unless it runs
        self.is_starting = self.is_away = False  # the child; Redis, which is logged
        self.number, self.end = 0, 0.0  # the fencing number; when the lease is over, by `monotonic`
        self.owner, (self.connection, name_key) = os.urandom(16).hex(), redis  # it connects by itself
        self.keys = name_key("lease:", self.id), name_key("lease_number:", self.id)

    def run(self) -> None:
        """Runs until the child or the supervisor ends. What it has started ends with it, even if it is killed."""
        self.me, loop, renewer = calling_process(), scheduler.hub.loop, gevent.Greenlet()
        keepers[self.me] = self
        process_flag("trap_exit", True)
        guard = loop.timer(LEASE_TIME / 32, LEASE_TIME / 32, priority=loop.MAXPRI)
        guard.start(self._guard)  # with the highest priority: the first of all that is due after a pause
        try:
            pubsub.join(KEEPERS_CHANNEL + self.id)
            while True:
                self._wait_for_lease()
                renewer = gevent.spawn(self._renew)
                self._hold_lease()
                renewer.kill()
        finally:
            self.is_starting = False
            self._end_child(0)
            renewer.kill()
            guard.close()
            del keepers[self.me]
            if self.time_left(0) > 0 and self._request(_RELEASE, LEASE_TIME / 8):
                pubsub.broadcast(KEEPERS_CHANNEL + self.id, "released", None)
            self.connection.disconnect()

    def time_left(self, part: float) -> float:
        """Returns the seconds until only `part` of LEASE_TIME is left."""
        return self.end - part * LEASE_TIME - monotonic()

    def _request(self, script: str, seconds: float) -> int | None:
        """Returns Redis' response, or None if there is none within `seconds`, however the connection hangs."""
        response, failure = None, f"no response in {seconds:.1f} s"
        try:
            with gevent.Timeout(seconds, False):
                self.connection.send_command("EVAL", script, 2, *self.keys, self.owner, int(LEASE_TIME * 1000))
                response = int(self.connection.read_response())
        except Exception as error:
            failure = str(error)
        finally:
            if response is None:
                self.connection.disconnect()  # a late response must not be taken for the next one
        if response is None and not self.is_away:
            log.warning("no node can run the cluster child %r while Redis is away: %s", self.id, failure)
        self.is_away = response is None
        return response

    def _wait_for_lease(self) -> None:
        while self.time_left(3 / 8) <= 0:  # as after an acquisition during which this process was stopped
            asked, response = monotonic(), self._request(_ACQUIRE, LEASE_TIME / 8)
            if response is not None and response > 0:
                self.number, self.end = response, asked + LEASE_TIME
            else:
                self._receive(min(-(response or -1e6) / 1000, LEASE_TIME / 4))

    def _hold_lease(self) -> None:
        """Runs the child until the lease is lost."""
        fn, *args = self.spec["start"]
        self.is_starting = True
        result = fn(*args)
        self.is_starting = False
        if isinstance(result, Pid):
            link(result)
            self.child = result
            spawn(pubsub.join, CHILD_CHANNEL + self.id, result)  # it may wait for Redis; the keeper must not
            log.info("cluster child %r runs here, with number %d", self.id, self.number)
        elif result != "ignore" and self.time_left(1 / 16) > 0:
            raise ProcessExit(result)
        while (seconds := self.time_left(3 / 8)) > 0:
            self._receive(min(seconds, LEASE_TIME / 4))
        log.warning("cluster child %r ends here: its lease was not renewed", self.id)
        self._end_child(min(self.shutdown, LEASE_TIME * 3 / 16))

    def _renew(self) -> None:
        """Runs in a greenlet while the lease is held."""
        response: int | None = 1
        while response != 0:
            gevent.sleep(LEASE_TIME / (32 if response is None else 4))
            asked, left = monotonic(), self.time_left(3 / 8)
            if left <= 0:
                return
            response = self._request(_RENEW, min(left, LEASE_TIME / 8))
            if response is not None:
                self.end = asked + LEASE_TIME if response else 0.0
        self.me.send("lost")

    def _receive(self, seconds: float) -> None:
        """Handles one message. Raises ProcessExit if the keeper must end."""
        match receive(seconds):
            case ("EXIT", pid, reason) if pid is self.supervisor:
                self._end_child(self.shutdown)
                raise ProcessExit(reason)
            case ("EXIT", pid, reason) if pid is self.child:
                self.child = None  # if it is done, the lease is kept: no other node must do it again
                if self.time_left(1 / 16) > 0 and (self.spec["restart"] == "permanent" or not is_normal(reason)):
                    raise ProcessExit(reason)
        if self.adapter is not pubsub.adapter:
            self._end_child(self.shutdown)
            raise ProcessExit("cluster_changed")

    def _started(self) -> list[Any]:
        """Returns the processes that the keeper has started: its child, or what is to become it."""
        return [process for process in {self.child, *self.me.links} - {self.supervisor} if process is not None]

    def _end_child(self, seconds: float) -> None:
        """Ends what was started, and waits for that. Kills it after `seconds`, for as many times as it takes."""
        for process in self._started():
            exit(process, "shutdown")
            while send_and_wait(process, Alias(), seconds) is None:
                exit(process, "kill")
                seconds = 0.1
        self.child = None

    def _guard(self) -> None:
        """Hub callback: kills what was started if the lease is nearly over."""
        if self.time_left(1 / 16) > 0:
            return
        for process in self._started() + [self.me] * self.is_starting:
            process.kill("killed")
            signal, runner = process.exiting, process.runner
            if runner is not None and signal is not None and signal.__traceback__ is None:
                runner.throw(signal)  # now: the next callback may be the one that the process waits for


def lease_number() -> int:
    """Returns the fencing number, for the child in the cluster and for the function that starts it.

    Each start of the child has a higher one. It is 0 on a node without a cluster. Ends the caller, by ProcessExit, if
    the lease is over by this node's clock. Raises RuntimeError in any other process, those that the child starts too.
    """
    me = calling_process()
    found = [keeper for keeper in map(keepers.get, [me, *me.links]) if keeper and keeper.supervisor is not me]
    if not found and _redis_of_cluster():
        raise RuntimeError("lease_number is for a child with 'scope': 'cluster'")
    if found and found[0].time_left(1 / 16) <= 0:
        raise ProcessExit("lease_lost")
    return found[0].number if found else 0


def _start(spec: dict[str, Any]) -> Any:
    """Returns what a supervisor starts for a child with "scope": "cluster"."""
    if not isinstance(spec["id"], str):
        raise ValueError(f"the id of a child in the cluster must be a string, got {spec['id']!r}")
    redis = _redis_of_cluster()
    return (spawn_link, Keeper(spec, redis).run) if redis else (_start_alone, spec["id"], *spec["start"])


def _start_alone(child_id: str, fn: Callable[..., Any], *args: Any) -> Any:
    result = fn(*args)
    if isinstance(result, Pid):
        pubsub.join(CHILD_CHANNEL + child_id, result)
    return result


def _resolve(child_id: str) -> Pid | None:
    """Returns the process that ("cluster", child_id) names, on whichever node, or None."""
    if not isinstance(child_id, str):
        raise TypeError(f"expected ('cluster', id) with a string, got {child_id!r}")
    return next(iter(pubsub.get_members(CHILD_CHANNEL + child_id)), None)


def _list_leases() -> list[dict[str, Any]]:
    """Returns the children in the cluster that this node knows, each as {"id", "node", "pid"}: None if none has it."""
    channels = {*pubsub.which_channels(), *(CHILD_CHANNEL + keeper.id for keeper in keepers.values())}
    ids = sorted(name.removeprefix(CHILD_CHANNEL) for name in channels if name.startswith(CHILD_CHANNEL))
    pids = [(child_id, str(_resolve(child_id) or "")) for child_id in ids]
    return [{"id": key, "node": pid[1:].rpartition(".")[0] or None, "pid": pid or None} for key, pid in pids]


getattr(rooms.get("gen_server"), "scopes", {})["cluster"] = _start
__all__ += ["lease_number"]
rooms["leases"] = SimpleNamespace(resolve=_resolve, list_leases=_list_leases)


# ----- cut here: without sessions ------------------------------------------------------------------------------------
# Lost: session, req.set_cookie, req.get_cookie, req.delete_cookie. bottle.response.set_cookie remains.


# ---------------------------------------------------------------------------------------------------------------------
# Sessions: cookies, and what the server remembers of a browser between its requests.
# Invariant: only an id that was made here is a session's. Its hash is stored, the id itself is not, nor is it logged.
#
# A session is some JSON texts, by key. They are in memory, or, on a node of a cluster, in Redis, where one script makes
# each operation atomic. A session exists from the first `set`, or from `renew`, which marks it as a login. Two tables
# hold the logins and the others, in the order of their last use. When there are too many sessions, the others go first.
# A session that is over is removed when it is looked up, or when new ones are made: each of them removes a few.
# ---------------------------------------------------------------------------------------------------------------------

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from hashlib import sha256
from secrets import token_urlsafe

from gevent.queue import LifoQueue

MAX_COOKIE = 4096  # bytes of a name and its value: browsers ignore a larger cookie (RFC 6265bis §5.6)
MAX_SWEEP = 100  # expired sessions that making one removes, at most
MAX_LIFE = 1e9  # seconds
REDIS_TIME = 1.0  # seconds until an operation fails, and between two tries while Redis is away
REDIS_CONNECTIONS = 16  # of a node, at most; each operation has one for itself
SESSION_KEY = "nova_lite.session"  # in WSGI's environ: the hash of the id that the response sends; "" if it deletes it
_COOKIE_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 6265 §4.1.1, as are the next two
_COOKIE_OCTETS = re.compile(r"[!#-+\--:<-\[\]-~]*")
_COOKIE_PATH = re.compile(r"/[ -:<-~]*")
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")


def set_cookie(
    req: Request,
    name: str,
    value: Any,
    *,
    secret: str | bytes | None = None,
    max_age: int | None = None,
    path: str = "/",
    domain: str | None = None,
    secure: bool | None = None,
    httponly: bool = True,
    samesite: str | None = "Lax",
) -> None:
    """Sends a cookie with the response to `req`, whatever that is: a redirect, an error, a WebSocket's 101.

    `value` is a string. With `secret` it is anything that JSON can hold, and signed, so that `get_cookie` does not take
    another one for it, nor that of another name; the client can read it. `max_age` is in seconds, None: until the
    browser ends; a signed cookie is not accepted for longer. `secure` (https only) is by default whether the client
    uses https. `samesite` is "Lax", "Strict", "None" (which needs `secure`) or None, for the browser's default.

    Raises ValueError for what browsers would not take: control characters, more than MAX_COOKIE bytes, a `__Host-`
    without what that demands; TypeError for a value that is no string, or not JSON; RuntimeError if it is too late (a
    WebSocket or an event stream has its response), or if another application than a Nova sends the response.
    """
    secure = is_https(req) if secure is None else secure
    text = _quote(value) if secret is None else _sign(name, value, secret, max_age)
    _check_attributes(name, path, domain, secure, samesite)
    if len(name) + len(text) > MAX_COOKIE:
        raise ValueError(f"the cookie {name!r} has {len(name) + len(text)} bytes; a browser takes {MAX_COOKIE}")
    given = {"Max-Age": None if max_age is None else int(max_age), "Path": path, "Domain": domain, "SameSite": samesite}
    parts = [f"{name}={text}", *(f"{key}={value}" for key, value in given.items() if value is not None)]
    parts += ["HttpOnly"] * httponly + ["Secure"] * secure
    _cookies_to_send(req)[name, path, domain] = "; ".join(parts)


def is_https(req: Request) -> bool:
    """Returns whether the client uses https; behind a proxy, `trust_proxy` must say that there is one."""
    return bool(req.environ.get("wsgi.url_scheme") == "https")


def _cookies_to_send(req: Request) -> dict[Any, str]:
    cookies: dict[Any, str] | None = req.environ.setdefault(COOKIES_KEY, {})
    if cookies is None:
        raise RuntimeError("no cookie can be sent any more: the response to this request has been sent")
    if not isinstance(req.environ.get("bottle.app"), Nova | None):  # it has taken over the routes
        raise RuntimeError("no cookie can be sent: mount the application in bottle's as app.wsgi, not as app")
    return cookies


def _check_attributes(name: str, path: str, domain: str | None, secure: bool, samesite: str | None) -> None:
    if not _COOKIE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a cookie")
    if not _COOKIE_PATH.fullmatch(path) or not re.fullmatch(r"[A-Za-z0-9.-]+", domain or "-"):
        raise ValueError(f"the cookie {name!r} has no such path or domain: {path!r}, {domain!r}")
    if samesite not in ("Lax", "Strict", "None", None) or (samesite == "None" and not secure):
        raise ValueError(f"samesite is 'Lax', 'Strict', None, or, with secure=True, 'None', not {samesite!r}")
    prefix = name.lower().partition("-")[0]
    if prefix in ("__host", "__secure") and not (secure and (prefix == "__secure" or (path, domain) == ("/", None))):
        raise ValueError(f"browsers ignore {name!r}: it needs https, and with __Host- the path '/' and no domain")


def _quote(value: str) -> str:
    """Returns a string as a cookie's value, between quotes if it must be: `req["cookies"]` reads it (http.cookies)."""
    if not isinstance(value, str):
        raise TypeError(f"a cookie's value is a string, or with a secret what JSON can hold, not {value!r}")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError(f"a cookie cannot hold control characters: {value!r}")
    if _COOKIE_OCTETS.fullmatch(value):
        return value
    octets = (chr(octet) for octet in value.encode())
    return '"' + "".join(it if it == " " or _COOKIE_OCTETS.fullmatch(it) else f"\\{ord(it):03o}" for it in octets) + '"'


def _sign(name: str, value: Any, secret: str | bytes, max_age: int | None) -> str:
    """Returns base64(JSON of [value, time of its end or None]), a dot, and the signature of that for this name."""
    end = None if max_age is None else int(time.time()) + max_age
    text = json.dumps([value, end], allow_nan=False, separators=(",", ":"))
    payload = urlsafe_b64encode(text.encode()).rstrip(b"=").decode()
    return f"{payload}.{_signature(name, payload, secret)}"


def _signature(name: str, payload: str, secret: str | bytes) -> str:
    key = secret.encode() if isinstance(secret, str) else secret
    if not key:
        raise ValueError("the secret is empty")
    digest = hmac.digest(key, f"nova_lite cookie {name}={payload}".encode(), "sha256")
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


def _get_cookie(req: Request, name: str, secret: str | bytes | None = None) -> Any:
    if secret is None:
        return req["cookies"].get(name)
    for text in _cookie_values(req, name):
        payload, _, signature = text.rpartition(".")
        if hmac.compare_digest(signature.encode(), _signature(name, payload, secret).encode()):
            value, end = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            if end is None or time.time() < end:
                return value
    return None


def _cookie_values(req: Request, name: str) -> list[str]:
    """Returns the values of all cookies of this name: a page of a parent domain may have set another one."""
    pairs = (pair.partition("=") for pair in req.environ.get("HTTP_COOKIE", "").split(";"))
    return [value.strip(" \t") for key, _, value in pairs if key.strip(" \t") == name]


def _send_cookies(environ: dict[str, Any]) -> None:
    """Adds the cookies to bottle's response, in place of its headers: a program may return one response many times."""
    lines = environ.pop(COOKIES_KEY) or {}
    headers = bottle.response._headers
    cookies = [*headers.get("Set-Cookie", []), *lines.values()]
    bottle.response._headers = {"Cache-Control": ["private"], **headers, "Set-Cookie": cookies}


class Session:
    """What the server remembers of a browser, by key. The one instance is `session`.

    A value is anything that JSON can hold. A key's value is replaced as a whole, and requests that set different keys
    at the same time do not lose any. The functions take the request, in a controller, in `security` and in a WebSocket
    handler. On a node of a cluster the sessions are in Redis; while it is away, they raise an HTTPError (503).
    """

    def __init__(self) -> None:
        self.configure()
        self.memory = _Memory(self)
        self.redis: _RedisSessions | None = None  # of the adapter below; None before it is used
        self.adapter: Any = None

    def configure(
        self,
        *,
        idle: float = 12 * 3600.0,
        absolute: float = 7 * 86400.0,
        cookie: str = "nova_session",
        secure: bool | None = None,
        limit: int = 100_000,
        max_size: int = 16_384,
    ) -> None:
        """Sets the limits; those left out get their defaults. Raises ValueError for limits that admit no session.

        A session is over `idle` seconds after its last use, and `absolute` seconds after it was made or renewed.
        `cookie` is its cookie's name; over https it has the prefix `__Host-`. `secure` is whether clients use https, by
        default what the request says (see `trust_proxy`). There are at most `limit` sessions, and one has at most
        `max_size` bytes of keys and JSON.
        """
        is_possible = 0 < idle < MAX_LIFE and 0 < absolute < MAX_LIFE and limit > 0 and max_size > 0
        if not (is_possible and _COOKIE_NAME.fullmatch(cookie)):
            raise ValueError(f"no session is possible with {idle=}, {absolute=}, {limit=}, {max_size=}, {cookie=}")
        self.idle, self.absolute, self.cookie, self.secure = idle, absolute, cookie, secure
        self.limit, self.max_size = limit, max_size

    def get(self, req: Request, key: str, default: Any = None) -> Any:
        """Returns the value of `key`, or `default` without a session or without that key. Makes no session."""
        name = self._find(req)
        text = self._store().get(name, key) if name else None
        return default if text is None else json.loads(text)

    def set(self, req: Request, key: str, value: Any) -> str:
        """Sets the value of `key`, in a new session if there is none, whose cookie goes out with the response.

        Returns "ok". Raises TypeError for what JSON cannot hold, ValueError over `max_size`, RuntimeError if there is
        no session and the response has been sent (a WebSocket's), HTTPError (503) if there are too many sessions.
        """
        if not isinstance(key, str):
            raise TypeError(f"a session's key is a string, not {key!r}")
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        if len(key.encode()) + len(text) > self.max_size:
            raise ValueError(f"{key!r} has {len(text)} bytes; a session may have {self.max_size}")
        name = self._find(req)
        if not name or not self._store().set(name, key, text):
            self._start(req, lambda new: self._store().create(new, key, text))
        return "ok"

    def delete(self, req: Request, key: str | None = None) -> str:
        """Deletes a key, or, without one, the session: a logout, on all nodes. Returns "ok", also if there is none."""
        names = self._find_all(req)
        for name in names if key is None or len(names) == 1 else ():
            self._store().delete(name, key)
        if key is None:
            if req.environ.get(COOKIES_KEY, {}) is not None and (names or _cookie_values(req, self._cookie_name(req))):
                req.set_cookie(self._cookie_name(req), "", max_age=0, secure=self._is_secure(req))
            req.environ[SESSION_KEY] = ""
        return "ok"

    def renew(self, req: Request) -> str:
        """Gives the session a new id, at a login: a client that knew or chose the old id has none. Returns "ok".

        Makes a session if there is none. Sessions without a login never replace a renewed one. Raises RuntimeError
        if the response has been sent (a WebSocket's).
        """
        names = self._find_all(req)
        self._start(req, lambda new: self._store().renew(names[0] if len(names) == 1 else "", new))
        for name in names if len(names) > 1 else ():  # one of them is the browser's own
            self._store().delete(name, None)
        return "ok"

    def _start(self, req: Request, make: Callable[[str], None]) -> None:
        """Calls `make` with the name of a new session, and sends its id. The id is nowhere else."""
        _cookies_to_send(req)  # raises if it is too late
        session_id = token_urlsafe(16)
        name = _hash(session_id)
        make(name)
        max_age = max(1, int(self.absolute))
        req.set_cookie(self._cookie_name(req), session_id, max_age=max_age, secure=self._is_secure(req))
        req.environ[SESSION_KEY] = name

    def _find(self, req: Request) -> str | None:
        """Returns the name of the session that the request may have, or None.

        Another site of the domain may have set a cookie of this name. Of several, the one that has a session counts;
        none does if two have one, or if there are five or more.
        """
        names = self._find_all(req)
        return names[0] if len(names) == 1 else None

    def _find_all(self, req: Request) -> list[str]:
        """Returns the names of the sessions whose cookies the request has, of four at most."""
        known: str | None = req.environ.get(SESSION_KEY)
        if known is not None:
            return [known] if known else []
        ids = {text for text in _cookie_values(req, self._cookie_name(req)) if _SESSION_ID.fullmatch(text)}
        names = [_hash(text) for text in ids]
        if 1 < len(names) < 5:
            names = [name for name in names if self._store().is_live(name)]
        return names if len(names) < 5 else []

    def _is_secure(self, req: Request) -> bool:
        return is_https(req) if self.secure is None else self.secure

    def _cookie_name(self, req: Request) -> str:
        # With the prefix, no page over http, and none of another host of the domain, can have set it (RFC 6265bis).
        return f"__Host-{self.cookie}" if self._is_secure(req) else self.cookie

    def _store(self) -> _Memory | _RedisSessions:
        if self.adapter is not pubsub.adapter:
            self.adapter = pubsub.adapter
            redis = rooms["cluster"].find_redis if "cluster" in rooms else lambda: None
            self.redis = _RedisSessions(self, redis) if redis() else None
        return self.redis or self.memory


def _hash(session_id: str) -> str:
    return sha256(session_id.encode()).hexdigest()


def _error_503(text: str) -> HTTPError:
    return HTTPError(503, text, Retry_After="1")


@dataclass(eq=False)
class _Entry:
    """A session in memory."""

    values: dict[str, str]  # key -> JSON
    begun: float
    used: float

    __slots__ = ("begun", "used", "values")


class _Memory:
    """The sessions of a node alone, by the hashes of their ids. Nothing here blocks: each operation is atomic."""

    def __init__(self, options: Session) -> None:
        self.options = options
        self.others: OrderedDict[str, _Entry] = OrderedDict()  # not renewed; here and below, the longest unused first
        self.renewed: OrderedDict[str, _Entry] = OrderedDict()

    def is_live(self, name: str) -> bool:
        return self._use(name) is not None

    def get(self, name: str, key: str) -> str | None:
        entry = self._use(name)
        return entry.values.get(key) if entry else None

    def set(self, name: str, key: str, text: str) -> bool:
        entry = self._use(name)
        if entry:
            size = sum(len(it.encode()) for pair in {**entry.values, key: text}.items() for it in pair)
            if size > self.options.max_size:
                raise ValueError(f"a session may have {self.options.max_size} bytes; with {key!r} it has {size}")
            entry.values[key] = text
        return entry is not None

    def create(self, name: str, key: str, text: str) -> None:
        self._evict(is_renewed=False)
        self.others[name] = _Entry({key: text}, monotonic(), monotonic())

    def delete(self, name: str, key: str | None) -> None:
        entry = self._use(name)
        if entry and key is not None:
            entry.values.pop(key, None)
        elif entry:
            self._drop(name)

    def renew(self, old: str, new: str) -> None:
        entry = self._use(old)
        self._drop(old)
        self._evict(is_renewed=True)
        self.renewed[new] = _Entry(entry.values if entry else {}, monotonic(), monotonic())

    def _use(self, name: str) -> _Entry | None:
        """Returns a session that is not over, and counts that as a use."""
        table = self.renewed if name in self.renewed else self.others
        entry, now = table.get(name), monotonic()
        if entry is None or self._is_over(entry, now):
            self._drop(name)
            return None
        entry.used = now
        table.move_to_end(name)
        return entry

    def _is_over(self, entry: _Entry, now: float) -> bool:
        return now - entry.used >= self.options.idle or now - entry.begun >= self.options.absolute

    def _drop(self, name: str) -> None:
        self.renewed.pop(name, None)
        self.others.pop(name, None)

    def _evict(self, is_renewed: bool) -> None:
        for table in (self.others, self.renewed):
            for _ in range(MAX_SWEEP):
                if not table or not self._is_over(next(iter(table.values())), monotonic()):
                    break
                table.popitem(last=False)
        while len(self.others) + len(self.renewed) >= self.options.limit:
            if not self.others and not is_renewed:
                raise _error_503("there are too many sessions")
            (self.others or self.renewed).popitem(last=False)


# KEYS: a session, the others, the renewed, the new session. ARGV: the operation, milliseconds idle and absolute, the
# limits of number and size, key, value. A session is a hash; the tables are sorted by the time of the last use. Returns
# {status, value}: 0 no session, 1 done, 2 too large, 3 too many.
_SESSION_SCRIPT = f"""
local op, idle, absolute, limit, size, field, value = unpack(ARGV)
local time, tables = redis.call('TIME'), {{KEYS[2], KEYS[3]}}
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function drop(key)
  redis.call('DEL', key)
  for _, table in ipairs(tables) do redis.call('ZREM', table, key) end
end
local function evict(is_renewed)
  for _, table in ipairs(tables) do
    local over = redis.call('ZRANGEBYSCORE', table, '-inf', now - idle, 'LIMIT', 0, {MAX_SWEEP})
    for _, key in ipairs(over) do drop(key) end
  end
  while redis.call('ZCARD', tables[1]) + redis.call('ZCARD', tables[2]) >= tonumber(limit) do
    local oldest = redis.call('ZRANGE', tables[1], 0, 0)[1] or is_renewed and redis.call('ZRANGE', tables[2], 0, 0)[1]
    if not oldest then return false end
    drop(oldest)
  end
  return true
end
local function use(key, table, is_new)
  local created = redis.call('HGET', key, 'created')
  local left = created and math.min(idle, created + absolute - now) or 0
  if left <= 0 then return drop(key) end
  redis.call('PEXPIRE', key, left)
  redis.call('ZADD', table or redis.call('ZSCORE', tables[2], key) and tables[2] or tables[1], now, key)
  return true
end
if op == 'create' then
  if not evict(false) then return {{3}} end
  redis.call('HSET', KEYS[1], 'created', now, field, value)
  use(KEYS[1], tables[1])
  return {{1}}
elseif op == 'renew' then
  if redis.call('EXISTS', KEYS[4]) == 1 then return {{1}} end
  if use(KEYS[1]) then redis.call('RENAME', KEYS[1], KEYS[4]) end
  drop(KEYS[1])
  evict(true)
  redis.call('HSET', KEYS[4], 'created', now)
  use(KEYS[4], tables[2])
  return {{1}}
end
if not use(KEYS[1]) then return {{0}} end
if op == 'get' then return {{1, redis.call('HGET', KEYS[1], field)}} end
if op == 'delete' then redis.call('HDEL', KEYS[1], field) end
if op == 'end' then drop(KEYS[1]) end
if op == 'set' then
  local all, sum = redis.call('HGETALL', KEYS[1]), #field + #value - 1
  for at = 1, #all, 2 do
    if all[at] ~= 'created' and all[at] ~= field then sum = sum + #all[at] + #all[at + 1] - 1 end
  end
  if sum > tonumber(size) then return {{2, sum}} end
  redis.call('HSET', KEYS[1], field, value)
end
return {{1}}
"""


class _RedisSessions:
    """The sessions of a cluster. No operation waits for longer than REDIS_TIME, nor while Redis is known to be away."""

    def __init__(self, options: Session, find_redis: Callable[[], Any]) -> None:
        self.options = options
        self.connections: Any = LifoQueue()  # those that no operation is using; they connect by themselves
        for _ in range(REDIS_CONNECTIONS):
            connection, self.key = find_redis()
            self.connections.put(connection)
        self.is_away, self.retry_at = False, 0.0  # the last operation failed; when the next one may try again

    def is_live(self, name: str) -> bool:
        return bool(self._execute("live", name)[0] == 1)

    def get(self, name: str, key: str) -> str | None:
        _, *values = self._execute("get", name, key)
        return values[0].decode() if values and values[0] is not None else None

    def set(self, name: str, key: str, text: str) -> bool:
        status, *sizes = self._execute("set", name, key, text)
        if status == 2:
            raise ValueError(f"a session may have {self.options.max_size} bytes; with {key!r} it has {sizes[0]}")
        return bool(status == 1)

    def create(self, name: str, key: str, text: str) -> None:
        if self._execute("create", name, key, text)[0] == 3:
            raise _error_503("there are too many sessions")

    def delete(self, name: str, key: str | None) -> None:
        self._execute("end", name) if key is None else self._execute("delete", name, key)

    def renew(self, old: str, new: str) -> None:
        self._execute("renew", old, new=new)

    def _execute(self, op: str, name: str, key: str = "", text: str = "", new: str = "") -> list[Any]:
        options = self.options
        limits = int(options.idle * 1000), int(options.absolute * 1000), options.limit, options.max_size
        keys = [self.key("session:", name), self.key("sessions"), self.key("logins"), self.key("session:", new)]
        response: list[Any] | None = None
        failure = f"no response in {REDIS_TIME:.1f} s"
        if self.is_away and monotonic() < self.retry_at:
            raise _error_503("the sessions cannot be reached")
        self.retry_at = monotonic() + 2 * REDIS_TIME  # while Redis is away, one request a time tries
        try:
            with gevent.Timeout(REDIS_TIME, False):
                response = self._request(*keys, op, *limits, f":{key}", text)
        except Exception as error:
            failure = str(error)
        if self.is_away != (response is None):
            self.is_away = response is None
            refusing = f"requests that need them are refused: {failure}"
            log.warning("sessions: %s", refusing if self.is_away else "Redis responds again")
        self.retry_at = monotonic() + REDIS_TIME
        if response is None:
            raise _error_503("the sessions cannot be reached")
        return response

    def _request(self, *arguments: Any) -> Any:
        connection = self.connections.get()
        try:
            with suppress(Exception):  # Redis may have closed the connection, as it does when it restarts
                return self._evaluate(connection, arguments)
            connection.disconnect()
            return self._evaluate(connection, arguments)
        except BaseException:
            connection.disconnect()  # a late response must not be taken for the next one
            raise
        finally:
            self.connections.put(connection)

    def _evaluate(self, connection: Any, arguments: Any) -> Any:
        connection.send_command("EVAL", _SESSION_SCRIPT, 4, *arguments)
        return connection.read_response()


session = Session()
__all__ += ["session"]
rooms["sessions"] = SimpleNamespace(set_cookie=set_cookie, get_cookie=_get_cookie, send_cookies=_send_cookies)


# ----- cut here: without logs ----------------------------------------------------------------------------------------
# Lost: the access log, with the reasons of refusals; log_format="json".


# ---------------------------------------------------------------------------------------------------------------------
# Logs: the access log, and lines that programs read.
# Invariant: a record is one line, whatever a client has sent.
#
# A record's arguments may be one dict: its items are the fields of the line in JSON. One that mentions a connection's
# process has the fields `process`, `path` and `peer`.
# ---------------------------------------------------------------------------------------------------------------------

_ACCESS = '%(peer)s "%(request)s" %(status)03d %(bytes)d %(milliseconds).1f ms'
_RECORD_KEYS = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def _log_request(handler: Any) -> None:
    """Logs a response. A refusal that an operator may want to change is a warning, with its reason."""
    environ = handler.environ
    reason = environ.get(REFUSAL_KEY)
    level = logging.WARNING if reason else logging.INFO
    if log.isEnabledFor(level):
        fields = {
            "peer": f"{environ.get('REMOTE_ADDR')}:{environ.get('REMOTE_PORT')}",
            "request": printable(handler.requestline or ""),
            "status": int((handler._orig_status or "000").split()[0]),
            "bytes": handler.response_length,
            "milliseconds": round((handler.time_finish - handler.time_start) * 1000, 3),
        }
        if reason:
            fields["reason"] = reason
        log.log(level, f"{_ACCESS}: %(reason)s" if reason else _ACCESS, fields)


class JSONFormatter(logging.Formatter):
    """Formats a record as one JSON object: time (UTC), level, logger, pid, message; fields; traceback.

    The fields are those of an event of this module (peer, path, method, status, milliseconds, reason, ... as far as
    there are any), and what a program passes to the logger as `extra`.
    """

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        for name, value in {**_list_fields(record), **_list_extra(record)}.items():
            line.setdefault(str(name), _simplify(value))
        trace = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            trace.append(record.stack_info)
        if trace:
            line["traceback"] = "\n".join(trace)
        return json.dumps(line)


def _list_fields(record: logging.LogRecord) -> dict[str, Any]:
    if isinstance(record.args, Mapping):
        fields = dict(record.args)
        method, _, rest = str(fields.pop("request", "")).partition(" ")
        return {"method": method, "path": rest.partition(" ")[0], **fields} if rest else fields
    for process in record.args or ():
        if isinstance(process, Stream):
            peer = "{}:{}".format(*process.req["peer"])
            return {"process": process, "path": process.req["path"], "peer": peer}
    return {}


def _list_extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _RECORD_KEYS}


def _simplify(value: Any) -> Any:
    """Returns what JSON has for a value: numbers, strings and None as they are, anything else as text."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and abs(value) < inf):
        return value
    return str(value)


def log_handler(log_format: str = "plain", shows_process: bool = False) -> logging.Handler:
    """Returns a handler that writes to the standard error, for `logging.basicConfig(handlers=[...])`.

    The format is "plain" (the id of the OS process is shown if asked for) or "json". Raises ValueError for others.
    """
    process = "%(process)d " if shows_process else ""
    plain = logging.Formatter(f"%(asctime)s {process}%(levelname)s %(message)s")
    formatters = {"plain": plain, "json": JSONFormatter()}
    if log_format not in formatters:
        raise ValueError(f"log_format is 'plain' or 'json', not {log_format!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(formatters[log_format])
    return handler


__all__ += ["JSONFormatter", "log_handler"]
rooms["logs"] = SimpleNamespace(log_request=_log_request, log_handler=log_handler)


# ----- cut here: without stats ---------------------------------------------------------------------------------------
# Lost: app.stats, and with it app.board.


# ---------------------------------------------------------------------------------------------------------------------
# Stats: figures of this node, and of all nodes of the cluster.
# Invariant: reads the state of other rooms and never changes it.
# ---------------------------------------------------------------------------------------------------------------------

from heapq import nlargest

BOARD_SIZE = 500  # processes in `stats` at most
ID_LENGTH = 200  # characters of a child's id in `stats` at most: a client may have chosen it
SHARE_TIME = 0.5  # seconds in which callers of `cluster_stats` share what the other nodes have answered
_started = monotonic()


def stats() -> dict[str, Any]:
    """Returns figures of this node, as a dict of JSON values; also `app.stats()`.

    node, version; uptime_seconds, cpu_seconds, memory_bytes (resident; on systems without /proc the maximum);
    connections (WebSockets and event streams) and max_connections, draining; since the start slow_closed (connections
    closed for not reading) and messages_dropped (for such connections, see `on_slow`); process_count, and processes:
    the BOARD_SIZE with the longest mailboxes, each with pid, name, handler, peer, mailbox and handled (messages),
    age_seconds, channels (five at most), state (idle, ready, running, waiting, slow); channels: channel, members (of
    all nodes), local_members, messages (sent to members here, since the channel has some); cluster: None, or up, nodes
    (name, id, members, silent_seconds) and dropped (messages that could not be read); supervisors: pid, name, strategy,
    restarts (in the last period, seconds, of at most intensity), count (of children), children (100 at most: id, pid,
    "restarting" or None, type, restart); leases, the children in the cluster: id, node and pid, None while no node runs
    it. Both are None if this copy has no such room.
    """
    busiest = nlargest(BOARD_SIZE, processes.values(), key=lambda process: (len(process.mailbox), process.handled))
    ready = set(scheduler.ready)
    return {
        **_summary(),
        "processes": [_process_info(process, process in ready) for process in busiest],
        "channels": [_channel_info(channel) for channel in sorted(pubsub.which_channels())],
        "supervisors": _list_supervisors(),
        "leases": _leases(),
    }


def _summary() -> dict[str, Any]:
    """Returns the figures of `stats` that take no time."""
    return {
        "node": scheduler.node,
        "version": __version__,
        "uptime_seconds": round(monotonic() - _started, 3),
        "cpu_seconds": round(time.process_time(), 3),
        "memory_bytes": _memory(),
        "connections": sum(len(registry.connections) for registry in registries),
        "max_connections": sum(registry.limit for registry in registries),
        "draining": any(registry.leaving or registry.draining for registry in registries),
        "slow_closed": sum(registry.slow_closed for registry in registries),
        "messages_dropped": sum(registry.dropped for registry in registries),
        "process_count": len(processes),
        "cluster": pubsub.adapter.info(),
    }


def _list_supervisors() -> list[dict[str, Any]] | None:
    if "gen_server" not in rooms:
        return None
    return [
        {
            "pid": str(pid),
            "name": pid.name,
            **{key: entry[key] for key in ("strategy", "intensity", "period", "count")},
            "restarts": sum(monotonic() - at <= entry["period"] for at in entry["restarts"]),
            "children": [
                {"id": str(key)[:ID_LENGTH], "pid": child and str(child), "type": kind, "restart": restart}
                for key, child, kind, restart in entry["children"]
            ],
        }
        for pid, entry in islice(rooms["gen_server"].supervisors().items(), BOARD_SIZE)
    ]


def _leases() -> list[dict[str, Any]] | None:
    return rooms["leases"].list_leases() if "leases" in rooms else None


def _process_info(process: Process, is_ready: bool) -> dict[str, Any]:
    return {
        "pid": repr(process),
        "name": process.name,
        "handler": process.role(),
        "peer": "{}:{}".format(*process.req["peer"]) if isinstance(process, Stream) else None,
        "mailbox": len(process.mailbox),
        "handled": process.handled,
        "age_seconds": round(monotonic() - process.started_at, 1),
        "channels": sorted(islice(process.channels, 5)),
        "state": _state_of(process, is_ready),
    }


def _state_of(process: Process, is_ready: bool) -> str:
    if getattr(process, "write_buffer", b""):
        return "slow"
    if process.wake is None:
        return "ready" if is_ready else "running"
    return "idle" if process.wake is enqueue else "waiting"


def _channel_info(channel: str) -> dict[str, Any]:
    local, remote = len(pubsub.channels.get(channel, ())), pubsub.adapter.count_members(channel)
    messages = pubsub.message_counts.get(channel, 0)
    return {"channel": channel, "members": local + remote, "local_members": local, "messages": messages}


def _memory() -> int:
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # for systems without /proc

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Answers(Alias):
    """The address that other nodes send their figures to."""

    __slots__ = ("expected", "figures", "is_complete")

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected  # nodes
        self.figures: list[dict[str, Any]] = []
        self.is_complete = gevent.event.Event()

    def send(self, message: Any) -> None:
        if isinstance(message, dict) and len(self.figures) < self.expected:
            self.figures.append(message)
        if len(self.figures) == self.expected:
            self.is_complete.set()


class _Gathering:
    """The figures of the other nodes. Callers within SHARE_TIME share them, so that nodes are not asked more often."""

    def __init__(self) -> None:
        self.answers: _Answers | None = None
        self.asked_at = 0.0

    def gather(self, timeout: float) -> list[dict[str, Any]]:
        nodes = len((pubsub.adapter.info() or {"nodes": ()})["nodes"])
        if nodes == 0:
            return []
        answers = self.answers
        if answers is None or answers.expected != nodes or monotonic() - self.asked_at > SHARE_TIME:
            answers, self.asked_at = _Answers(nodes), monotonic()
            self.answers = answers
            rooms["cluster"].ask("stats", answers)
        answers.is_complete.wait(timeout)
        return sorted(answers.figures, key=lambda figures: str(figures.get("node")))


_gathering = _Gathering()


def cluster_stats(timeout: float = 1.0) -> list[dict[str, Any]]:
    """Returns the `stats` of each node of the cluster (workers are nodes), with those of this node first.

    A node that does not answer within `timeout` seconds is missing. Others are asked only here, and at most every
    SHARE_TIME: calls in between share the answers. An answer has at most BOARD_SIZE channels, those with the most
    members, and `channel_count`, the number of all. Without a cluster, the list has one entry.
    """
    return [_figures_to_share(), *_gathering.gather(timeout)]


def _figures_to_share() -> dict[str, Any]:
    figures = stats()
    channels = figures["channels"]
    figures["channels"] = nlargest(BOARD_SIZE, channels, key=itemgetter("members", "messages"))
    return {**figures, "channel_count": len(channels)}


def _answer(caller: Pid) -> None:
    caller.send(_figures_to_share())


__all__ += ["cluster_stats"]
rooms["stats"] = SimpleNamespace(
    stats=stats, cluster_stats=cluster_stats, answer=_answer,
    summary=_summary, process_info=_process_info, channel_info=_channel_info, state_of=_state_of,
    list_supervisors=_list_supervisors, list_leases=_leases,  # these six for the board, which shows a part
)  # fmt: skip


# ----- cut here: without metrics -------------------------------------------------------------------------------------
# Lost: app.metrics.
# Needs: the room stats.


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: figures of all nodes in Prometheus' text format, 0.0.4.
# Invariant: the number of series depends on the number of nodes alone. So no label is a process, a channel or a path:
# clients name channels, and Prometheus would keep each name for weeks. The board and `stats` have them.
# ---------------------------------------------------------------------------------------------------------------------

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL_LENGTH = 200  # characters of a node's name


def _longest_mailbox(figures: Mapping[str, Any]) -> int:
    return max((process["mailbox"] for process in figures["processes"]), default=0)


_METRICS: tuple[tuple[str, str, str, Any], ...] = (  # name, type, help; the figure in `stats`, or a function of them
    ("uptime_seconds", "gauge", "Seconds since the node was started.", "uptime_seconds"),
    ("cpu_seconds_total", "counter", "CPU time of the OS process.", "cpu_seconds"),
    ("memory_bytes", "gauge", "Resident memory of the OS process.", "memory_bytes"),
    ("connections", "gauge", "WebSockets and event streams.", "connections"),
    ("max_connections", "gauge", "Connections that the node accepts at most.", "max_connections"),
    ("draining", "gauge", "1 while the node is stopping, else 0.", "draining"),
    ("slow_closed_total", "counter", "Connections closed since their clients did not read.", "slow_closed"),
    ("messages_dropped_total", "counter", "Messages dropped for clients that did not read.", "messages_dropped"),
    ("processes", "gauge", "Processes, connections included.", "process_count"),
    ("longest_mailbox_messages", "gauge", "Messages in the longest mailbox.", _longest_mailbox),
    ("channels", "gauge", "Channels that have members on any node.", "channel_count"),
    ("cluster_up", "gauge", "1 while connected to the cluster, else 0.", lambda it: it["cluster"]["up"]),
    ("cluster_nodes", "gauge", "Nodes known here, with this one.", lambda it: len(it["cluster"]["nodes"]) + 1),
    ("cluster_dropped_total", "counter", "Messages that were unreadable.", lambda it: it["cluster"]["dropped"]),
)


def metrics(app: Nova, path: str = "/metrics", security: Any = False) -> None:
    """Adds figures of all nodes, workers included, to an application, for Prometheus; `security` as in a group.

    Each has the label `node`. They are numbers only, without a name that a client has chosen: unlike the board, they
    may be served without security, since few scrapers log in. A node that does not answer within a second is missing.
    """
    room("stats")  # raises here, and not at the first client, if it was cut off
    app.add({"security": security, "routes": [(path, _show_metrics, {"methods": ["get"]})]})


def _show_metrics(_req: Request) -> Any:
    text = format_metrics(room("stats").cluster_stats())
    return "status", 200, {"Content-Type": METRICS_TYPE, "Cache-Control": "no-store"}, text.encode("utf-8", "replace")


def format_metrics(nodes: Iterable[Mapping[str, Any]]) -> str:
    """Returns the `stats` of nodes in Prometheus' text format."""
    named = _name_nodes(nodes)
    info = [f'{{node="{name}",version="{_escape(figures.get("version"))}"}} 1' for name, figures in named.items()]
    lines = _family("info", "gauge", "The version of nova_lite.", info)
    for metric, kind, text, figure in _METRICS:
        values = {name: _read_figure(figure, figures) for name, figures in named.items()}
        samples = [f'{{node="{name}"}} {value}' for name, value in values.items() if value is not None]
        lines += _family(metric, kind, text, samples)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, kind: str, text: str, samples: list[str]) -> list[str]:
    head = [f"# HELP nova_lite_{name} {text}", f"# TYPE nova_lite_{name} {kind}"] if samples else []
    return head + [f"nova_lite_{name}{sample}" for sample in samples]


def _name_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the nodes by their labels. Of nodes with one name, those that started later get a number."""
    named: dict[str, Mapping[str, Any]] = {}
    for figures in sorted(nodes, key=lambda figures: -(_read_figure("uptime_seconds", figures) or 0)):
        label, numbers = _escape(figures.get("node")), count(2)
        name = label
        while name in named:
            name = f"{label} {next(numbers)}"
        named[name] = figures
    return named


def _read_figure(figure: Any, figures: Mapping[str, Any]) -> Any:
    """Returns a number, or None if the node has none: it is alone, or of another version."""
    try:
        value = figure(figures) if callable(figure) else figures[figure]
    except (KeyError, TypeError):
        return None
    return value + 0 if isinstance(value, int | float) and abs(value) < inf else None


def _escape(value: Any) -> str:
    return str(value)[:LABEL_LENGTH].replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


rooms["metrics"] = SimpleNamespace(metrics=metrics)


# ----- cut here: without inspect -------------------------------------------------------------------------------------
# Lost: app.board, which shows what this room finds.
# Needs: the room stats.


# ---------------------------------------------------------------------------------------------------------------------
# Inspect: finds processes and channels by their words, orders them, and describes one process closely.
# Invariant: reads the state of other rooms; of a message or a state it returns the type, never the content. What takes
# longer than a time slice lets others have their turns, so a process may end meanwhile.
# ---------------------------------------------------------------------------------------------------------------------

from itertools import groupby

ROWS = 100  # that a search returns; processes with a name come on top of that, as many
DETAILS = 20  # links, monitors, channels and kinds of messages in a description
LENGTH = 200  # characters of a text that a client may have chosen
WORDS = 8  # of a search that count
SLICE = 1000  # processes, between which others may get their turns
_TAG = re.compile(r"[$\w][\w.-]{0,39}")
_ORDERS: dict[str, Callable[[Any], Any]] = {  # of processes, besides "rate"
    "title": lambda process: _natural(process.name) if process.name else [],
    "mailbox": lambda process: len(process.mailbox),
    "state": lambda process: rooms["stats"].state_of(process, False),
    "handled": attrgetter("handled"),
    "age_seconds": lambda process: -process.started_at,
    "handler": lambda process: _role_of(process),
    "channels": lambda process: sorted(islice(process.channels, 5)),
    "peer": lambda process: process.req["peer"] if isinstance(process, Stream) else ("", 0),
}
_CHANNEL_ORDERS: dict[str, Callable[[str], Any]] = {  # besides "rate"
    "channel": lambda channel: _natural(channel),
    "members": lambda channel: _channel_members(channel) + pubsub.adapter.count_members(channel),
    "local_members": lambda channel: _channel_members(channel),
}


def _find_processes(search: Any, rates: Mapping[Any, float], texts: dict[int, str], also: Any) -> dict[str, Any]:
    """Returns the processes that have all words, and how many: the first ROWS, then the named, as many, and `also`.

    `search` is (words, order, descending), `rates` are the messages a second of all processes, and `texts` keeps from
    one search to the next what the words are looked for in.
    """
    words, order, is_descending = search
    found: list[Any] = list(processes.values())
    if words.strip():
        found = _filter(found, _split(words), texts)
    key = _ORDERS.get(order) or (lambda process: rates.get(process, 0))
    rows = _first(found, key, is_descending)
    named = {*islice(registered.values(), ROWS)} - {*rows}
    rows += sorted(named.intersection(found), key=key, reverse=is_descending)
    rows += [also] if also is not None and also not in rows else []
    ready = set(scheduler.ready)
    return {
        "total": len(processes),
        "count": len(found),
        "rows": [_describe_row(process, process in ready, rates.get(process, 0)) for process in rows],
    }


def _describe_row(process: Process, is_ready: bool, rate: float) -> dict[str, Any]:
    info = rooms["stats"].process_info(process, is_ready)
    channels = [channel[:LENGTH] for channel in info["channels"]]
    return {**info, "id": process.serial, "handler": _role_of(process), "rate": round(rate, 1), "channels": channels}


def _find_channels(search: Any, rates: Mapping[str, float]) -> dict[str, Any]:
    """Returns the first ROWS channels with all words, as `_find_processes` does."""
    words, order, is_descending = search
    names = sorted(name for name in pubsub.which_channels() if not name.startswith("$"))  # those are this file's own
    wanted = _split(words)
    found = [name for name in names if all(word in name.lower() for word in wanted)] if wanted else names
    first = _first(found, _CHANNEL_ORDERS.get(order) or (lambda name: rates.get(name[:LENGTH], 0)), is_descending)
    rows = [{**rooms["stats"].channel_info(name), "channel": name[:LENGTH]} for name in first]
    rows = [{**row, "rate": rates.get(row["channel"], 0)} for row in rows]
    return {"total": len(names), "count": len(found), "rows": rows}


def _split(words: str) -> list[str]:
    """Returns the different words, WORDS at most: each is looked for everywhere."""
    return list(dict.fromkeys(words[:LENGTH].lower().split()))[:WORDS]


def _channel_members(channel: str) -> int:
    return len(pubsub.channels.get(channel, ()))


def _natural(text: str) -> list[Any]:
    """Returns a key by which "b2" precedes "b10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,9})", text.lower())]


def _role_of(process: Process) -> str:
    """Returns the name of the handler; of a greenlet that became a process, what it is."""
    if isinstance(process, GreenletProcess):
        is_main = process.runner is not None and process.runner.parent is None
        return "main program" if is_main else "greenlet"
    return process.role()


def _first(items: list[Any], key: Callable[[Any], Any], is_descending: bool) -> list[Any]:
    """Returns the first ROWS by `key`."""
    first: list[Any] = []
    for at in range(0, len(items), SLICE):
        first = sorted(first + items[at : at + SLICE], key=key, reverse=is_descending)[:ROWS]
        scheduler.yield_after_slice()
    return first


def _map_in_slices(fn: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    results: list[Any] = []
    for at in range(0, len(items), SLICE):
        results += map(fn, items[at : at + SLICE])
        scheduler.yield_after_slice()
    return results


def _filter(found: list[Process], words: list[str], texts: dict[int, str]) -> list[Process]:
    """Returns the processes that have all words in their pid, name, handler, peer, state or channels."""
    if len(texts) > 2 * len(processes) + ROWS:  # most of them are of processes that have ended
        texts.clear()
    new = [process for process in found if process.serial not in texts]
    texts.update(zip([process.serial for process in new], _map_in_slices(_searchable, new), strict=True))
    for word in words:
        others = _having(word, found)
        found = [process for process in found if word in texts.get(process.serial, "") or process in others]
        scheduler.yield_after_slice()
    return found


def _searchable(process: Process) -> str:
    peer = process.req["peer"] if isinstance(process, Stream) else ()
    return f"{process!r} {_role_of(process)} {':'.join(map(str, peer))}".lower()


def _having(word: str, found: list[Process]) -> set[Process]:
    """Returns the processes that have a word in what may change: name, channels and state."""
    named = [process for name, process in registered.items() if word in name.lower()]
    members = [pubsub.channels[channel] for channel in pubsub.channels if word in channel.lower()]
    if any(state.startswith(word) for state in ("idle", "running", "waiting", "slow")):
        states = _map_in_slices(lambda process: rooms["stats"].state_of(process, False), found)
        named += [process for process, state in zip(found, states, strict=True) if state.startswith(word)]
    return set(named).union(*members)


def _describe(process: Process) -> dict[str, Any]:
    """Returns what a process holds and whom it knows, of everything a bounded number."""
    newest = [_kind_of(message) for message in islice(reversed(process.mailbox), ROWS)]
    runs = [(kind, sum(1 for _ in run)) for kind, run in groupby(newest)]
    state = getattr(process, "state", None)
    size = f" of {len(state)}" if isinstance(state, dict | list | tuple | set) else ""
    return {
        "id": process.serial,
        "client": isinstance(process, Stream),
        "state": "none" if state is None else type(state).__name__ + size,
        "links": _name_all(process.links),
        "monitors": _name_all([thing for thing in (process.owned or {}).values() if isinstance(thing, Pid)]),
        "monitored by": _name_all((process.monitored_by or {}).values()),
        "channels": _name_all(process.channels),
        "newest messages": _name_all([f"{number} {kind}" if number > 1 else kind for kind, number in runs]),
    }


def _name_all(things: Any) -> list[str]:
    names, more = [_name_of(thing) for thing in islice(things, DETAILS)], len(things) - DETAILS
    return [*names, f"and {more} more"] if more > 0 else names


def _name_of(thing: Any) -> str:
    if isinstance(thing, str):
        return thing[:LENGTH]
    if not isinstance(thing, Pid) or isinstance(thing, Alias):
        return "a call" if isinstance(thing, Alias) else type(thing).__name__.lower()
    return f"{getattr(thing, 'name', None) or ''} {thing!r}".strip()


def _kind_of(message: Any) -> str:
    """Returns the channel and the topic of a broadcast, else the tag of a tuple, else the type."""
    if type(message) is Message:
        _, channel, _, topic, _ = message
        topic = topic[: LENGTH // 4]
        return f"nova_pubsub/{channel[: LENGTH // 2]}/{topic if isinstance(topic, str) else repr(topic)}"
    tag = _tag_of(message)
    return f"{tag} {_tag_of(message[-1])}" if tag in ("$gen_call", "$gen_cast") else tag


def _tag_of(value: Any) -> str:
    is_tagged = type(value) is tuple and value and type(value[0]) is str and _TAG.fullmatch(value[0])
    return value[0] if is_tagged else type(value).__name__


rooms["inspect"] = SimpleNamespace(
    find_processes=_find_processes, find_channels=_find_channels, describe_process=_describe
)


# ----- cut here: without board ---------------------------------------------------------------------------------------
# Lost: app.board.
# Needs: the rooms stats and inspect.


# ---------------------------------------------------------------------------------------------------------------------
# Board: a page that shows what this node does, beside the figures of the other nodes.
# Invariant: reads the state of other rooms. It changes one thing, if it is told to: it disconnects a client.
#
# Each second a timer of the hub takes a sample: a few numbers, for the charts and for the boards of other nodes. It
# runs from `run` on, else from the first open board on. Tables are made only while a board is open here, and only with
# the rows that its view selects. Boards with the same view share them.
# ---------------------------------------------------------------------------------------------------------------------

BOARD_TIME = 1.0  # seconds between samples, and between updates of a board
SAMPLES, EVENTS = 60, 100  # that a node keeps
BUSIEST, NAME_LENGTH = 100, 200  # channels in a sample, and characters of their names
BOARD_CHANNEL = "$board"  # of the boards, on all nodes
CPU_SHARE, MAX_TABLE_INTERVAL = 0.005, 10.0  # of a core; seconds: the longer tables take, the less often they are made
NODE_KEYS = "node", "version", "uptime_seconds", "cpu", "memory_bytes", "connections", "max_connections", "rate"
DEFAULT_VIEW = ("", "rate", True), ("", "rate", True), None  # words, order, descending; the same of channels; open row
BY_OPERATOR = Close(1008, "disconnected by an operator", ("error", "disconnected"))

_events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
_event_numbers = count(1)
_NOTABLE = re.compile("refused|^cluster: node ")  # lines of the log below WARNING that are events


def _record_event(record: logging.LogRecord) -> bool:
    """Keeps a line of the log that is an event. It is a filter: with a handler, logging would drop its default one."""
    with suppress(Exception):  # of a value's own __repr__: logging itself reports it
        if record.levelno >= logging.WARNING or _NOTABLE.search(str(record.msg)):
            error = f": {record.exc_info[1]!r}" if record.exc_info and record.exc_info[1] else ""
            event = {"number": next(_event_numbers), "time": record.created, "level": record.levelname.lower()}
            _events.append({**event, "text": f"{record.getMessage()}{error}"[:500]})
    return True


class Sampler:
    """Takes the samples of this node, and holds what its open boards share."""

    def __init__(self) -> None:
        self.timer: Any = None  # None before `start`
        self.figures: dict[str, Any] = {}  # of the last sample
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self.counts: dict[str, int] = {}  # channel -> messages at the last sample
        self._reset()

    def _reset(self) -> None:
        self.handled: dict[Process, int] = {}  # process -> messages when they were last counted
        self.counted_at: float | None = None  # when that was; None while no board is open
        self.rates: dict[Process, float] = {}  # process -> messages a second
        self.texts: dict[int, str] = {}  # serial -> what a search looks in
        self.nodes: dict[str, dict[str, Any]] = {}  # id of another node -> its latest figures
        self.updates: dict[Any, Any] = {}  # what boards get until the next sample, by what it depends on
        self.next_tables = 0.0  # time when the tables may be made again, see CPU_SHARE

    def start(self, _stop: Any = None) -> None:
        if self.timer is None:
            scheduler.bind_thread()
            self._tick()

    def _tick(self) -> None:
        """Takes a sample and wakes the boards, here and on other nodes. The hub calls it."""
        if self.timer is not None:
            self.timer.close()
        self.timer = scheduler.hub.loop.timer(BOARD_TIME, ref=False)
        self.timer.start(self._tick)
        self._take_sample()
        self.updates = {}
        if not pubsub.get_local_members(BOARD_CHANNEL):
            self._reset()
        if pubsub.get_members(BOARD_CHANNEL):
            figures = {**self.figures, **self.samples[-1]}
            pubsub.broadcast(BOARD_CHANNEL, "figures", {key: figures[key] for key in NODE_KEYS})

    def _take_sample(self) -> None:
        figures, before = rooms["stats"].summary(), self.figures
        counts, old, self.counts = pubsub.message_counts, self.counts, dict(pubsub.message_counts)
        seconds = (figures["uptime_seconds"] - before["uptime_seconds"] if before else 0) or inf
        sent = {channel: more for channel, number in counts.items() if (more := number - old.get(channel, 0)) > 0}
        sent.pop(BOARD_CHANNEL, None)
        busiest = sorted(sent, key=sent.__getitem__, reverse=True)[:BUSIEST]

        def rate(key: str) -> float:
            return round(max(0, figures[key] - before.get(key, 0)) / seconds, 3)

        sample = {key: figures[key] for key in ("uptime_seconds", "memory_bytes", "connections")}
        sample |= {"cpu": 100 * rate("cpu_seconds"), "closed": rate("slow_closed"), "dropped": rate("messages_dropped")}
        sample["rate"] = round(sum(sent.values()) / seconds, 1)
        sample["channels"] = {channel[:NAME_LENGTH]: round(sent[channel] / seconds, 1) for channel in busiest}
        self.figures = figures
        self.samples.append(sample)

    def may_make_tables(self) -> bool:
        return monotonic() >= self.next_tables - BOARD_TIME / 2  # at the sample that is nearest to it

    def spend(self, seconds: float) -> None:
        """Counts the CPU time that tables took, and sets when the next ones may be made."""
        now = monotonic()
        self.next_tables = min(max(self.next_tables, now) + seconds / CPU_SHARE, now + MAX_TABLE_INTERVAL)

    def count_handled(self) -> None:
        """Computes the rates since the last count, in slices."""
        now, before = monotonic(), self.counted_at
        if before is not None and now - before < BOARD_TIME / 2:
            return
        self.counted_at, seconds, old = now, inf if before is None else now - before, self.handled.get
        handled, rates = {}, {}
        for number, process in enumerate(list(processes.values())):
            handled[process] = messages = process.handled
            rates[process] = (messages - old(process, 0)) / seconds
            if not number % 500:
                scheduler.yield_after_slice()
        self.handled, self.rates = handled, rates


sampler = Sampler()


class BoardHandler(WebSocketHandler):
    """A board's WebSocket: sends an update each second, and immediately when the board asks for another view."""

    __name__ = "board"  # in lists of processes
    security: Any = None

    def init(self, state: Any) -> Any:
        sampler.start()
        pubsub.join(BOARD_CHANNEL)
        self.view: Any = DEFAULT_VIEW
        self.since = -1.0, 0  # the newest sample and event that the board has
        return "ok", state

    def websocket_init(self, state: Any) -> Any:
        return self.update(state, False)

    def websocket_handle(self, frame: Any, state: Any) -> Any:
        request: Any = None
        with suppress(ValueError, RecursionError):
            request = json.loads(frame[1])
        match request:
            case {"processes": [str(), str(), bool()] as one, "channels": [str(), str(), bool()] as two, "open": row}:
                self.view = tuple(one), tuple(two), row if isinstance(row, int) else None
                return self.update(state, True)
            case {"disconnect": int(serial)}:
                self.disconnect(processes.get(serial), state["req"])
        return "ok", state

    def websocket_info(self, info: Any, state: Any) -> Any:
        match info:
            case ("nova_pubsub", "$board", Process(), "figures", _):
                return self.update(state, False)
            case ("nova_pubsub", "$board", sender, "figures", dict() as figures):
                known = {key: figures[key] for key in NODE_KEYS if isinstance(figures.get(key), int | float | str)}
                sampler.nodes[sender.node.hex()] = known
        return "ok", state

    def update(self, state: Any, is_answer: bool) -> Any:
        updates, is_own = sampler.updates, is_answer or self.since[0] < 0  # a sample may replace `updates` meanwhile
        key = self.view, self.since, is_answer, is_own or sampler.may_make_tables()
        if is_own or key not in updates:
            start, last_event = time.thread_time(), _events[-1]["number"] if _events else 0
            since = sampler.samples[-1]["uptime_seconds"], last_event
            updates[key] = since, json.dumps(_make_update(*key))
            sampler.spend(time.thread_time() - start)
        self.since, text = updates[key]
        return "reply", ("text", text), state

    def disconnect(self, process: Any, req: Request) -> None:
        """Disconnects a client, if `security` still accepts the board: its login may have ended meanwhile."""
        answer = self.security is None or self.security(req)
        is_accepted = answer is True or (isinstance(answer, tuple) and answer[:1] == (True,))
        if isinstance(process, Stream) and is_accepted:
            log.warning("a board, opened by %s:%d, disconnects %r%s", *req["peer"], process, process.title())
            process.interrupt(BY_OPERATOR)


def _make_update(view: Any, since: tuple[float, int], is_answer: bool, has_tables: bool) -> dict[str, Any]:
    """Returns what a board with this view gets, if it has the samples and events up to `since`."""
    own, finder, opened = rooms["stats"], rooms["inspect"], processes.get(view[2])
    update = {
        **own.summary(),
        "answer": is_answer,
        "samples": [sample for sample in sampler.samples if sample["uptime_seconds"] > since[0]],
        "events": [event for event in _events if event["number"] > since[1]],
        "nodes": _list_nodes(),
        "row": opened and finder.describe_process(opened),
    }
    if has_tables:
        sampler.count_handled()
        buffers = map(attrgetter("write_buffer"), chain(*[registry.connections for registry in registries]))
        update["slow"] = sum(map(bool, buffers))
        update["supervisors"], update["leases"] = own.list_supervisors() or [], own.list_leases() or []
        update["channels"] = finder.find_channels(view[1], sampler.samples[-1]["channels"])
        update["processes"] = finder.find_processes(view[0], sampler.rates, sampler.texts, opened)
    return update


def _list_nodes() -> list[dict[str, Any]]:
    """Returns the figures of all nodes of the cluster, this one's first."""
    cluster = sampler.figures["cluster"]
    own = {**sampler.figures, **sampler.samples[-1], "id": "", "channels": None}
    return [own, *({**node, **sampler.nodes.get(node["id"], {})} for node in cluster["nodes"])] if cluster else []


def board(app: Nova, path: str = "/board", security: Any = False, logout: str = "") -> None:
    """Adds the board, a page and its WebSocket, to an application; `security` as in a group of routes.

    With `logout`, a path for POST, the page has a button for it. Events are lines of the log: those of WARNING and
    above and, if the level is INFO, as `run` sets it, requests that are refused, and nodes that join and leave. A
    client that is disconnected here gets the close code 1008.
    """
    room("stats"), room("inspect")  # raise here, and not at the first client, if they were cut off
    log.addFilter(_record_event)
    if sampler.start not in while_serving:
        while_serving.append(sampler.start)
    action = f'action="{bottle.html_escape(logout)}"' if logout else "hidden"
    text = rooms["views"].HEAD if "views" in rooms else PLAIN_HEAD
    text += BOARD_PAGE.replace('action="" hidden', action)

    def show(req: Request) -> Any:
        home = f'href="{bottle.html_escape(req.environ["SCRIPT_NAME"])}/"' if _has_home(app) else ""
        return "status", 200, PAGE_HEADERS, text.replace('href="HOME"', home)

    handler = type("BoardHandler", (BoardHandler,), {"security": staticmethod(security) if security else None})
    live = {"protocol": "ws", "max_message_size": 4096}
    if app.settings.origins == "*":  # for what the application offers to all sites, not for the board
        live["origins"] = None
    if "rate" in rooms:
        live["rate"] = 10, 1  # each view that a board asks for is an update of its own
    base = path.strip("/") and "/" + path.strip("/")
    pages = [(page, show, {"methods": ["get"]}) for page in {base or "/", base + "/"}]
    app.add({"security": security, "routes": [*pages, (base + "/live", handler, live)]})


def _has_home(app: Nova) -> bool:
    with suppress(HTTPError):
        return bool(app.router.match({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}))
    return False


rooms["board"] = SimpleNamespace(board=board)

PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self' ws: wss:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}
PLAIN_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root { color-scheme: light dark; --paper: Canvas; --card: Canvas; --ink: CanvasText; --dim: CanvasText; --on: Canvas;
    --accent: LinkText; --line: #8886; --edge: #888; --tint: #8882; --good: #484 }
  * { box-sizing: border-box } [hidden] { display: none !important } h1, h2, p, ul, dl, dd { margin: 0; padding: 0 }
</style>
"""
BOARD_PAGE = """<title>Board - nova_lite</title><meta name="description" content="What this node does">
<style>
  body { max-width: none; min-height: 100dvh; display: flex; flex-direction: column; gap: .75rem; padding: .75rem
  1rem; font-size: .9375rem; font-variant-numeric: tabular-nums } header, .bar { display: flex; flex-wrap: wrap; gap:
  .25rem .75rem; align-items: center } #node { font-weight: 600 } #about { margin-right: auto } .dim, dt, th, #about {
  color: var(--dim) } button, input { min-height: 2rem; padding: .1rem .7rem } .bad { border-color: var(--bad); color:
  var(--bad) } .plain { border: 0; padding: 0; min-height: 0; background: none; color: var(--accent); text-align:
  left; font-size: inherit } .plain:hover { background: none; text-decoration: underline } [aria-pressed=true] {
  background: var(--accent); border-color: var(--accent); color: var(--on) } #state::before { content: ""; display:
  inline-block; width: 10px; height: 10px; border: 2px solid var(--good); border-radius: 50%; margin-right: .4rem;
  background: var(--good) } #state.away::before { border-color: var(--warn); background: none } .away { color:
  var(--warn) } main, #columns, #side { display: flex; flex-direction: column; gap: .75rem; min-height: 0 } main,
  #columns { flex: 1 } #tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(10rem,
  1fr)) } section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; min-width: 0
  } section { display: flex; flex-direction: column; overflow: hidden; min-height: 0 } .bar { padding: .6rem 1rem }
  .bar input { margin-left: auto; width: 14rem; max-width: 100% } .tile { overflow: hidden } .tile dt { padding: .5rem
  .9rem 0 } .tile dd { padding: 0 .9rem } .tile dd:last-child { padding: .25rem 0 0 } .figure { font-size: 1.5rem;
  font-weight: 600; line-height: 1.25 } .hot .figure, .slow .state { color: var(--warn) } dt, .note, table, .scroll {
  font-size: .875rem } svg { display: block; width: 100%; height: 1.25rem } .tile svg { height: 2.5rem } polyline {
  fill: none; stroke: var(--accent); stroke-width: 1.5px; vector-effect: non-scaling-stroke } polygon { fill:
  var(--accent); opacity: .16 } .scroll { overflow: auto; overflow-anchor: none; max-height: 24rem; container-type:
  inline-size; flex: 1 } .scroll:focus-visible { outline-offset: -2px } table { border-spacing: 0; width: 100% } th,
  td { text-align: left; font-weight: inherit; padding: .25rem .75rem; border-top: 1px solid var(--line); white-space:
  nowrap; max-width: 18rem; overflow: hidden; text-overflow: ellipsis } tbody th { color: inherit } tr > :first-child
  { position: sticky; left: 0; padding-left: 1rem; background: var(--card) } thead th { position: sticky; top: 0;
  z-index: 1; background: var(--card); border-top: 0 } thead th:first-child { z-index: 2 } thead .plain { color:
  inherit } th[aria-sort] { color: var(--ink); font-weight: 600 } thead .plain::after { content: "▼"; content: "▼" /
  ""; font-size: .6em; display: inline-block; width: 1.4em; text-align: right; opacity: 0 } [aria-sort] .plain::after
  { opacity: 1 } [aria-sort=ascending] .plain::after { content: "▲"; content: "▲" / "" } .right { text-align: right }
  .chart { min-width: 6rem; width: 30% } #processes tbody tr { cursor: pointer } tr:hover > :not([colspan]), .open >
  tr > *, .here > * { background: var(--tint) !important } .more > td { max-width: none; white-space: normal; padding:
  0; border: 0; cursor: auto } .gone { color: var(--dim) } .more div { position: sticky; left: 0; width: 100cqw;
  padding: .25rem 1rem .75rem; max-width: 60rem } .more dl { display: grid; grid-template-columns: auto minmax(0,
  1fr); gap: .1rem 1rem; margin-bottom: .5rem } .empty { padding: .5rem 1rem 1rem } .empty:empty { display: none } ul,
  ol { list-style: none; margin: 0; padding: 0 } #supervisors .scroll { padding: 0 1rem .75rem } li ul { padding-left:
  1.25rem } summary { border: 0; background: none; min-height: 0; padding: .1rem 0 } li { padding-block: .1rem }
  #events li { padding: .3rem 1rem; border-top: 1px solid var(--line) } #events time { margin-right: .75rem } .warning
  { color: var(--warn) } .error { color: var(--bad) } dialog { background: var(--card); color: inherit; border: 1px
  solid var(--edge); border-radius: .75rem; max-width: min(28rem, 90vw) } dialog p { margin-bottom: 1rem } dialog form
  { display: flex; gap: .75rem; justify-content: end } ::backdrop { background: #0006 } @media (min-width: 64rem) {
  #tiles { grid-template-columns: repeat(6, 1fr) } #columns { display: grid; grid-template: minmax(0, 1fr) / minmax(0,
  5fr) minmax(0, 3fr); align-items: start } } @media (min-width: 64rem) and (min-height: 40rem) { body { height:
  100dvh } #processes, #side { max-height: 100% } #processes .scroll, #side .scroll { max-height: none } #side {
  overflow: auto } #side section { min-height: 9rem } #side #leases { min-height: auto; flex-shrink: 0 } } @media
  (max-width: 40rem) { body { padding: .5rem } #tiles { grid-template-columns: 1fr 1fr; gap: .5rem } .bar input {
  width: 100%; font-size: 1rem; min-height: 2.5rem } h1 { margin-right: auto } #about, #state, #login { order: 1 }
  .scroll { max-height: 70vh } tr > :first-child { max-width: 9rem } }
</style>
<header><h1><a class="home" href="HOME">nova_lite</a></h1>
  <p id="about"><span id="node"></span> <span id="facts"></span></p>
  <span id="state" class="away" role="status">connecting</span><a id="login" href="" hidden>Log in again</a>
  <button id="pause" aria-pressed="false">Pause</button>
  <form method="post" action="" hidden><button>Log out</button></form></header>
<main id="main"><dl id="tiles"></dl><div id="columns"><div id="side"></div></div></main>
<dialog aria-labelledby="question"><p id="question"></p><form method="dialog"><button>Cancel</button>
  <button class="bad" value="yes">Disconnect</button></form></dialog>
<template id="chart"><svg viewBox="0 -1 60 22" preserveAspectRatio="none" aria-hidden="true"><polygon/><polyline/></svg>
</template>
<template id="table"><section><div class="bar"><h2></h2><span class="note dim"></span></div>
  <div class="scroll" tabindex="0" role="region"></div></section></template>
<script>
"use strict";
const $ = id => document.getElementById(id), made = id => $(id).content.firstElementChild.cloneNode(true);
const english = new Intl.NumberFormat("en", { maximumFractionDigits: 1 }), SPAN = 60;  // seconds of a chart
const number = value => value === undefined ? "" : english.format(value < 10 ? value : Math.round(value));
const size = bytes => bytes < 1e9 ? `${number(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
const age = time => [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].filter(([length]) => time >= length).map(
  ([length, unit]) => `${Math.floor(time / length)} ${unit}`)[0] || "0 s";
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const view = { open: null };  // what the server selects the rows by: [filter, order, descending] of a table
let now = null, samples = [], frame = 0, paused = false, tries = 0, timer = 0, socket, wanted = null, typing = 0;

function element(tag, properties, ...children) {  // strings from the server are inserted as text, never as HTML
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function write(node, text, property = "textContent") {  // changes the DOM only if the text differs
  if (node["last " + property] !== text) node[property] = node["last " + property] = text;
}
function send(message) { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); }
function plot(svg, values, least) {  // from the lowest to the highest value, which it returns, or `least` above
  const low = Math.min(...values), high = Math.max(...values), times = samples.map(sample => sample.uptime_seconds);
  const span = Math.max(5, times.at(-1) - times[0]), x = at => SPAN - SPAN * (times.at(-1) - times[at]) / span;
  const y = value => 20 - 20 * (value - low) / Math.max(high - low, least);
  const line = values.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
  if (svg.line !== (svg.line = line.join(" "))) {
    svg.lastChild.setAttribute("points", svg.line);
    svg.firstChild.setAttribute("points", `${line[0].split(",")[0]},21 ${svg.line} ${SPAN},21`);
  }
  return [low, high];
}
const tiles = [  // title, value of a sample, figure, note (of the last minute's range), least range, whether an alarm
  ["CPU of one core", "cpu", () => `${number(now.sample.cpu)} %`, (low, high) => `${number(low)} to ${number(high)} %`,
    5],
  ["Memory", "memory_bytes", () => size(now.memory_bytes), (low, high) => `${size(low)} to ${size(high)}`, 1e6],
  ["Connections", "connections", () => number(now.connections), () => `of ${number(now.max_connections)}`, 5],
  ["Messages/s", "rate", () => number(now.sample.rate), (low, high) => `${number(low)} to ${number(high)}`, 5],
  ["Slow clients", "closed", () => number(now.slow_closed), () => `closed, ${number(now.slow)} slow now`, 1, true],
  ["Messages dropped", "dropped", () => number(now.messages_dropped), () => "for slow clients", 1, true],
].map(([title, name, figure, note, least, alarm]) => {
  const nodes = ["figure", "note dim"].map(className => element("dd", { className })), chart = made("chart");
  const box = element("div", {}, element("dt", { textContent: title }), ...nodes, element("dd", {}, chart));
  $("tiles").append(box);
  return () => {
    const [low, high] = plot(chart, samples.map(sample => sample[name]), least);
    write(nodes[0], figure());
    write(nodes[1], note(low, high));
    write(box, alarm && high > 0 ? "tile hot" : "tile", "className");
  };
});
function section(id, title, place = $("side")) {
  const node = made("table");
  node.id = id;
  node.querySelector(".scroll").ariaLabel = node.querySelector("h2").textContent = title;
  place.append(node);
  return node;
}
function table(name, title, place, key, columns, order) {  // columns: title, property (none: a chart), number's format
  const node = section(name, title, place), find = selector => node.querySelector(selector);
  const isLive = order !== undefined, opens = name === "processes";  // selected by the server; rows that open
  const kind = ([, property, format]) => format ? "right" : property || "chart";
  const heads = columns.map((column, at) => element("th", { scope: "col", className: kind(column) }, isLive && column[1]
    ? element("button", { className: "plain", textContent: column[0], onclick: () => sort(at) }) : column[0]));
  const body = element("table", {}, element("thead", {}, element("tr", {}, ...heads)));
  const filter = element("input", { type: "search", placeholder: "Filter", ariaLabel: `Filter ${name}`, oninput() {
    clearTimeout(typing);
    typing = setTimeout(ask, 150);
  } });
  let rows = new Map(), isAsked = false;
  find(".scroll").append(body, element("p", { className: "empty dim" }));
  if (isLive) find(".bar").append(filter);
  function ask() {
    view[name][0] = filter.value;
    isAsked = true;
    send(view);
  }
  function show([, property, isDown]) {
    const order = isDown ? "descending" : "ascending";
    heads.forEach((head, at) => head.ariaSort = columns[at][1] === property ? order : null);
  }
  function sort(at) {
    const [, property, format] = columns[at], [words, old, isDown] = view[name];
    show(view[name] = [words, property, old === property ? !isDown : Boolean(format)]);
    ask();
  }
  if (isLive) show(view[name] = ["", columns[order][1], true]);
  function newRow(item) {
    const cells = columns.map((column, at) => element(at ? "td" : "th", { className: kind(column) },
      ...(column[1] ? [] : [made("chart")])));
    if (opens) cells[0].append(element("button", { className: "plain", id: "p" + item.id }));
    return element("tbody", {}, element("tr", { onclick() {
      if (opens && !String(getSelection())) open(view.open === item.id ? null : item.id);
    } }, ...cells));
  }
  return (items, count = items.length, total = count) => {  // reuses rows, so that focus and selection stay
    const isHeld = isLive && !(now.answer && isAsked) && (opens && view.open !== null ||
      body.querySelector("tbody:is(:hover, :focus-within)"));  // a row that moves cannot be clicked
    const places = new Map([...rows.keys()].map((id, at) => [id, at])), place = item => places.get(item[key]) ?? 1e9;
    const old = rows;
    rows = new Map();
    for (const item of isHeld ? [...items].sort((a, b) => place(a) - place(b)) : items) {
      const row = old.get(item[key]) || newRow(item), cells = row.firstChild.children;
      rows.set(item[key], row);
      columns.forEach(([, property, format = text => text ?? ""], at) => property
        ? write(cells[at].firstElementChild || cells[at], format(item[property]))
        : plot(cells[at].firstChild, samples.map(sample => sample.channels[item[key]] || 0), 1));
      write(row.firstChild, `${item.state || ""} ${item.isHere ? "here" : ""}`, "className");
      if (opens) unfold(row, item);
    }
    for (const [id, row] of old) if (!rows.has(id)) row.remove();
    let next = body.tHead.nextSibling;
    for (const row of rows.values()) if (row === next) next = next.nextSibling; else body.insertBefore(row, next);
    const some = [filter.value ? `${number(count)} match, ` : "", items.length < total ? ` of ${number(total)}` : ""];
    write(find(".note"), some.join(number(items.length)) + (isHeld ? ", order held" : ""));
    write(find(".empty"), items.length ? "" : filter.value ? "Nothing matches the filter." : "There are none.");
    if (now.answer) isAsked = false;
  };
}
function shorten(text) { return text.replaceAll(`<${now.node}.`, "<0."); }  // as in Erlang
function linked(text) {  // the pid in it is a button that opens the row, if it is of this node
  const textContent = shorten(text), [, serial] = textContent.match(/<0[.]([0-9]+)>/) || [];
  const onclick = () => open(Number(serial), true);
  return serial ? element("button", { className: "plain", textContent, onclick }) : textContent;
}
function open(id, isFar) {
  view.open = id;
  if (isFar) wanted = id;
  send(view);
  redraw();
}
function unfold(row, item) {
  const isOpen = view.open === item.id;
  write(row, isOpen ? "open" : "", "className");
  row.querySelector("button").ariaExpanded = isOpen;
  if (!isOpen) return void row.children[1]?.remove();
  const more = row.children[1] || element("tr", { className: "more" }, element("td", { colSpan: 9 }, element("div", {},
    element("dl"), element("button", { className: "bad", textContent: "Disconnect", hidden: true, onclick() {
      const dialog = document.querySelector("dialog");
      $("question").textContent = `Disconnect ${item.peer}, ${item.handler}? Its close code is 1008.`;
      dialog.returnValue = "";
      dialog.onclose = () => dialog.returnValue === "yes" && send({ disconnect: item.id });
      dialog.showModal();
    } }))));
  const list = more.querySelector("dl"), { id, client, ...facts } = now.row || {};
  row.append(more);
  more.querySelector("button.bad").hidden = !client;
  if (id !== item.id || list.last === (list.last = JSON.stringify(facts))) return;
  const all = value => value.length ? [].concat(value).flatMap(text => [", ", linked(text)]).slice(1) : ["none"];
  list.replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, ...all(value))]));
}
const drawNodes = table("nodes", "Nodes", $("main"), "id", [["Node", "node"], ["Connections", "connections", number],
  ["Messages/s", "rate", number], ["CPU, %", "cpu", number], ["Memory", "memory_bytes", size],
  ["Up", "uptime_seconds", age], ["Silent, s", "silent_seconds", number], ["Version", "version"]]);
$("main").append($("columns"));
const drawProcesses = table("processes", "Processes", $("columns"), "id", [["Process", "title"],
  ["Handled/s", "rate", number], ["Mailbox", "mailbox", number], ["State", "state"], ["Handler", "handler"],
  ["Peer", "peer"], ["Channels", "channels"], ["Handled", "handled", number], ["Age", "age_seconds", age]], 1);
$("columns").append($("side"));
const drawChannels = table("channels", "Channels", $("side"), "channel", [["Channel", "channel"], ["Last minute"],
  ["Messages/s", "rate", number], ["Members", "members", number], ["Here", "local_members", number]], 2);
const log = element("ol"), quiet = element("p", { className: "empty dim" });
section("events", "Events").querySelector(".scroll").append(log, quiet);
const tree = section("supervisors", "Supervisors").querySelector(".scroll"), folds = new Map();
function drawTree(all) {
  if (tree.last === (tree.last = JSON.stringify(all))) return;
  const found = new Map(all.map(item => [item.pid, item]));
  const inner = new Set(all.flatMap(item => item.children.map(child => child.pid)));
  const leaf = ({ id, pid, restart }) => element("li", {}, ...(found.has(pid) ? [branch(found.get(pid), id, restart)]
    : [`${id} `, linked(pid || "does not run"), element("small", {}, ` ${restart}`)]));
  function branch(item, id, restart) {
    const limit = `${item.restarts} of ${item.intensity} restarts in ${number(item.period)} s`;
    const more = item.count - item.children.length, note = [restart, item.strategy, limit].filter(Boolean).join(", ");
    const title = element("summary", {}, `${id || item.name || shorten(item.pid)} `, element("small", {}, note));
    const node = element("details", { open: folds.get(item.pid) ?? item.count <= 20 }, title, element("ul", {},
      ...item.children.map(leaf), ...(more > 0 ? [element("li", {}, `and ${number(more)} more`)] : [])));
    node.ontoggle = () => folds.set(item.pid, node.open);
    return node;
  }
  tree.replaceChildren(...all.filter(item => !inner.has(item.pid)).map(item => branch(item)));
}
const drawLeases = table("leases", "Once in the cluster", $("side"), "id",
  [["Child", "id"], ["Node", "node"], ["Process", "pid"]]);
function addEvents(events) {
  for (const event of events) {
    const at = new Date(event.time * 1000), dateTime = at.toISOString();
    const time = element("time", { dateTime, title: day.format(at) }, clock.format(at));
    log.prepend(element("li", { className: event.level }, time, shorten(event.text)));
  }
  while (log.children.length > 100) log.lastChild.remove();
  write(quiet, log.children.length ? "" : "Nothing has happened: no crash, restart, slow callback or slow client.");
}
function redraw() { frame = frame || requestAnimationFrame(draw); }  // a hidden page gets no animation frames
let opened = null;  // the item of the open row, which stays when its process has ended
function draw() {
  frame = 0;
  if (!now) return;
  const { node, version, cluster, processes, channels } = now;
  const lost = cluster && cluster.dropped ? `, ${number(cluster.dropped)} messages dropped` : "";
  const state = cluster ? `, cluster ${cluster.up ? "up" : "disconnected"}${lost}` : "";
  write($("node"), node);
  write($("facts"), `up ${age(now.uptime_seconds)}, version ${version}${state}`);
  for (const drawTile of tiles) drawTile();
  for (const name of ["nodes", "supervisors", "leases"]) $(name).hidden = !now[name].length;
  drawNodes(now.nodes.map((item, at) => ({ ...item, node: item.node || item.name, isHere: !at })));
  drawChannels(channels.rows, channels.count, channels.total);
  const items = processes.rows.map(item => ({ ...item, channels: item.channels.join(", "),
    title: `${item.name || ""} ${shorten(item.pid)}`.trim() }));
  opened = view.open === null ? null : items.find(item => item.id === view.open) || opened;
  if (opened && !items.some(item => item.id === opened.id)) items.push({ ...opened, state: "ended", rate: 0 });
  drawProcesses(items, processes.count, processes.total);
  drawTree(now.supervisors);
  drawLeases(now.leases.map(item => ({ ...item, node: item.node || "none", pid: shorten(item.pid || "") })));
  if (wanted !== null && $("p" + wanted)) wanted = $("p" + wanted).focus() ?? null;
}
function showState(text, isGood, wait, fn) {  // calls `fn` if there is no other state within `wait` seconds
  write($("state"), text);
  $("state").className = isGood ? "" : "away";
  clearTimeout(timer);
  timer = setTimeout(fn, wait * 1000);
}
function connect() {
  let isFirst = true;
  socket = new WebSocket(location.origin.replace(/^http/, "ws") + location.pathname.replace(/[/]+$/, "") + "/live");
  function lost() {  // 0.5 s, doubled up to 15 s, with jitter
    const delay = Math.min(15, 0.5 * 2 ** tries++) * (0.5 + Math.random() / 2);
    socket.onclose = socket.onmessage = null;
    socket.close();
    view.open = null;
    document.body.className = "old";
    showState(`reconnecting in ${Math.ceil(delay)} s`, false, delay, connect);
    const show = answer => { $("login").hidden = answer.type !== "opaqueredirect" && answer.status !== 401; };
    fetch(location.pathname, { method: "HEAD", redirect: "manual" }).then(show, () => {});
  }
  socket.onopen = () => JSON.stringify(view) === initial || send(view);
  socket.onclose = lost;
  socket.onmessage = event => {
    const data = JSON.parse(event.data);
    if (isFirst) samples = log.replaceChildren() ?? [];
    if (!paused || data.answer) now = { ...now, ...data };
    samples = [...samples, ...data.samples].filter(sample => sample.uptime_seconds > data.uptime_seconds - SPAN - 1);
    now.sample = samples.at(-1);
    addEvents(data.events);
    if (!paused || data.answer) redraw();
    showState(paused ? "paused" : now.draining ? "draining" : "live", !paused && !now.draining, 10, lost);
    document.body.className = "";
    $("login").hidden = true;
    isFirst = false;
    tries = 0;
  };
  showState($("state").textContent, false, 10, lost);
}
const initial = JSON.stringify(view);
connect();
$("pause").onclick = event => event.target.ariaPressed = paused = !paused;
$("processes").onkeydown = event => {
  if (event.key === "Escape" && view.open !== null && event.target.type !== "search")
    open($("p" + view.open)?.focus() ?? null);
};
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
import secrets
import sqlite3
from contextlib import closing
from itertools import pairwise, takewhile
from socket import AF_INET, AF_INET6, SOCK_DGRAM, socket

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
    return all(field.strip() and "\0" not in field for field in fields)  # PostgreSQL stores no NUL


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
    def websocket_handle(self, frame: ClientFrame, state: Any) -> HandlerResult:
        match frame:
            case ("text", text):
                return "reply", ("text", "Echo: " + text), state
        return "ok", state


class CommentsHandler(WebSocketHandler):
    def init(self, state: Any) -> Any:
        pubsub.join("comments")
        return "ok", state

    def websocket_handle(self, frame: ClientFrame, state: Any) -> HandlerResult:
        match frame:
            case ("text", text):
                pubsub.broadcast("comments", "new_comment", text)
            case ("binary", b""):  # the heartbeat of NovaSocket
                return "reply", frame, state
        return "ok", state

    def websocket_info(self, info: Message, state: Any) -> HandlerResult:
        match info:
            # A pattern str(text) would cost 1 µs a delivery: Python looks for `str.__match_args__`, in vain.
            case ("nova_pubsub", "comments", _sender, "new_comment", text) if isinstance(text, str):
                return "reply", ("text", text), state
            case ("nova_pubsub", "comments", _sender, "new_comment", _):  # of the page
                return "reply", info.once(format_comment), state
        return "ok", state


def format_comment(message: Message) -> ClientFrame:
    """Returns the frame, at /comments, of a comment that the page has sent."""
    return "text", "{name}: {text}".format(**message[4])


class ChatHandler(WebSocketHandler):
    """Serves the page: sends who is here, the comments that are kept, "live", then comments, visitors and notes.

    It receives "say ID TEXT", "here NAME" and "typing NAME". The ID is the client's: a comment that it sends again, as
    the connection broke before it came back, is not said twice.
    """

    said: deque[str] = deque(maxlen=1000)  # the ids of comments, of all clients
    name = last = ""  # the visitor's name, and the message that set it

    def websocket_init(self, state: Any) -> Any:
        pubsub.join("notes")
        pubsub.join("comments", since="first")
        self_pid().send("live")  # after what is kept
        return "reply", ("text", json.dumps({"event": "here", "data": presence.list("comments")})), state

    def websocket_handle(self, frame: ClientFrame, state: Any) -> HandlerResult:
        match frame:
            case ("binary", b""):
                return "reply", frame, state
            case ("text", text) if text.startswith("say "):
                comment_id, _, said = text[4:].partition(" ")
                return self.say(comment_id[:100], said, state)
            case ("text", text) if len(text) <= 100 and text != self.last:  # each key that is pressed repeats it
                doing, _, name = re.sub("[\0-\x1f\u202a-\u202e\u2066-\u2069]", "", text).partition(" ")  # reversal
                presence.untrack("comments", self.name)
                self.name, self.last = name.strip() or "Someone", text
                presence.track("comments", self.name, {"typing": doing == "typing"})  # both changes are one event
        return "ok", state

    def say(self, comment_id: str, text: str, state: Any) -> Any:
        comment = {"id": comment_id, "name": self.name, "text": text, "at": time.time()}
        if comment_id in self.said:  # the client may have missed it
            return "reply", ("text", json.dumps({"event": "new_comment", "data": comment})), state
        self.said.append(comment_id)
        pubsub.broadcast("comments", "new_comment", comment)
        return "ok", state

    def websocket_info(self, info: Message, state: Any) -> HandlerResult:
        match info:
            case ("nova_pubsub", "comments", _, "new_comment", str() | {"id": str(), "name": str(), "text": str()}):
                return "reply", ("text", info.once(as_json)), state
            case ("nova_pubsub", "notes", _, _, _):
                return "reply", ("text", info.once(as_json)), state
            case ("nova_presence", "comments", _joins, _leaves):
                return "reply", ("text", info.once(lambda it: json.dumps({"event": "moved", "data": it[2:]}))), state
            case ("nova_resync", "comments"):  # some may be missing; the page skips those that it has
                pubsub.leave("comments")
                return self.websocket_init(state)
            case ("nova_resync", "notes"):  # the page loads all notes again
                return "reply", ("text", '{"event": "nova_resync", "data": null}'), state
            case "live":
                return "reply", ("text", '{"event": "live"}'), state
        return "ok", state


class NotificationsHandler(WebSocketHandler):
    """Sends each change of a note with its position; with `?since=` and one of these, first what came after it."""

    def init(self, state: Any) -> Any:
        pubsub.join("notes", since=state["req"]["since"] or None)
        return "ok", state

    def websocket_handle(self, frame: ClientFrame, state: Any) -> HandlerResult:
        match frame:
            case ("text", "ping"):
                return "reply", ("text", "pong"), state
            case ("binary", b""):
                return "reply", frame, state
        return "ok", state

    def websocket_info(self, info: Message, state: Any) -> HandlerResult:
        match info:
            case ("nova_pubsub", "notes", _sender, _topic, _payload):
                return "reply", ("text", info.once(as_json)), state
            case ("nova_resync", "notes"):  # messages may be missing: the page loads all notes again
                return "reply", ("text", '{"event": "nova_resync", "data": null}'), state
        return "ok", state


def as_json(message: Message) -> str:
    return json.dumps({"event": message[3], "data": message[4], "position": message.position})


class NoteIndexer(GenServer):
    """Finds notes by their words. Its state is {id: words}, kept up to date by what the controllers broadcast."""

    def init(self, notes: Notes) -> Any:
        self.notes = notes
        pubsub.join("notes")  # before reading: a change that comes meanwhile is then a message
        return "ok", self.index()

    def index(self) -> dict[int, str]:
        return {note["id"]: tokenize(note) for note in self.notes.all()}

    def handle_call(self, request: Any, from_: Any, state: Any) -> Any:
        match request:
            case ("search", str(text)):
                words = tokenize({"title": text, "body": ""}).split()
                found = [key for key, known in state.items() if words and all(f" {word}" in known for word in words)]
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


def tokenize(note: Mapping[str, Any]) -> str:
    """Returns the words, each after a space: a search is for their beginnings, as the user may still be typing."""
    return "".join(f" {word}" for word in re.findall(r"\w+", f"{note['title']} {note['body']}".lower()))


def children_of(notes: Notes) -> list[ChildSpec]:
    """Returns the children of the application: the indexer."""
    return [{"id": "note_indexer", "start": (start_link, NoteIndexer, notes, "note_indexer")}]


class Login:
    """Protects pages by one password: `routes` is the group with /login and /logout, `security` is for other groups.

    A session that is logged in holds what proves its password. So it ends when the password changes, on any node.
    """

    TRIES, TRIES_OF_ALL = 5, 30  # wrong passwords a minute, from one address and from all

    def __init__(self, password: str, home: str = "/board") -> None:
        self.home, self.password = home, password
        # Slow by intention: what is stored must not help to guess passwords by the million.
        self.proof = hashlib.scrypt(password.encode(), salt=b"nova_lite login", n=2**14, r=8, p=1).hex()
        self.wrong: deque[tuple[float, str]] = deque()  # time, address; at most TRIES_OF_ALL
        post = {"methods": ["post"], "max_body": 4096}
        show = ("/login", self.show, {"methods": ["get"]})
        self.routes = {"routes": [show, ("/login", self.log_in, post), ("/logout", self.log_out, post)]}

    def is_logged_in(self, req: Request) -> bool:
        return session.get(req, "login") == self.proof

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
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            self.wrong.append((monotonic(), address))
            log.warning("wrong password at /login from %s", address)
            return self.page(401, "That is not the password.")
        session.renew(req)
        session.set(req, "login", self.proof)
        return "status", 303, {"Location": self.home}

    def log_out(self, req: Request) -> Any:
        if not req.is_own_origin():
            return "status", 403
        session.delete(req)
        return "status", 303, {"Location": "/login"}

    def wait(self, address: str) -> int:
        """Returns the seconds until this address may try again."""
        now = monotonic()
        while self.wrong and self.wrong[0][0] <= now - 60:
            self.wrong.popleft()
        of_all, own = [at for at, _ in self.wrong], [at for at, other in self.wrong if other == address]
        ends = [*own[-self.TRIES :][: len(own) >= self.TRIES], *of_all[: len(of_all) >= self.TRIES_OF_ALL]]
        return int(max(ends) + 60 - now) + 1 if ends else 0

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


LOGIN_PAGE = (
    room("views").HEAD
    + """<title>Log in - nova_lite</title>
<style>
  body { padding-top: 15vh } main { max-width: 22rem; margin: auto } p:empty { display: none }
  form { display: grid; gap: .5rem; margin-top: 1.5rem } input { width: 100% } .dim { margin-bottom: .5rem }
</style>
<main><h1><a class="home" href="/">nova_lite</a></h1>
<form method="post" action="/login">
  <p class="dim">The board shows what this node does. Its password was printed when the program started.</p>
  <label for="password">Password</label>
  <input name="username" value="board" autocomplete="username" hidden>
  <input type="password" id="password" name="password" autocomplete="current-password" required autofocus
    aria-invalid="INVALID" aria-describedby="error">
  <p id="error" class="error" role="alert">ERROR</p><button class="main">Log in</button></form></main>
</html>
"""
)


def demo(notes: Notes, password: str | None = None) -> Nova:
    """Returns the tutorial's application; with a password, the board too."""
    pubsub.keep("notes")
    pubsub.keep("comments", seconds=24 * 3600)
    small = {"protocol": "ws", "max_message_size": 65_536}  # bytes of a comment that is kept
    api = NotesController(notes)
    page = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache"}
    text = PAGE if password else PAGE.replace('<nav><a href="/board">Board</a></nav>', "")
    script = {"Content-Type": "text/javascript; charset=utf-8", "Cache-Control": "no-cache"}
    app = Nova([
        {"routes": [
            ("/", lambda _req: ("status", 200, page, text), {"methods": ["get"]}),
            ("/nova.js", lambda _req: ("status", 200, script, room("views").CLIENT), {"methods": ["get"]}),
            ("/heartbeat", heartbeat, {"methods": ["get"]}),
            ("/ws", EchoHandler, {"protocol": "ws"}),
            ("/comments", CommentsHandler, small),
            ("/chat", ChatHandler, {**small, "rate": (50, 1)}),
            ("/notifications", NotificationsHandler, {"protocol": "ws"}),
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
        app.add({"routes": [("/login/", redirect_to("/login"), {"methods": ["get"]})]})
        app.add(login.routes)
        app.board(login.home, security=login.security, logout="/logout")
    return app


def redirect_to(path: str) -> Callable[[Request], Any]:
    return lambda _req: ("redirect", path)


PAGE = (
    room("views").HEAD
    + """<title>nova_lite</title>
<meta name="description" content="Live comments and notes: what one window does, every window shows.">
<style>
  body { min-height: 100dvh } body, section, form, #comments { display: flex; flex-direction: column; gap: .75rem }
  header, .row, #line { display: flex; flex-flow: row wrap; gap: .25rem .75rem; align-items: center }
  header { min-height: 2.25rem; column-gap: 1.25rem } h3 { font-size: 1.0625rem; line-height: 1.35 }
  #line { margin-left: auto; gap: .3rem } .dim:empty { display: none } form { margin: 0 }
  #line, nav, small, label, .error, .plain, .row p, #typing, #news { font-size: .875rem } #line { color: var(--dim) }
  #line::before { content: ""; border: 5px solid var(--good); border-radius: 50%; margin-right: .25rem }
  #line.away::before { padding: 3px; border: 2px solid var(--warn) }
  #here { visibility: hidden } #wait { font-variant-numeric: tabular-nums } #wait:empty { display: none }
  main { flex: 1; display: grid; gap: 1rem; min-height: 0 }
  section { min-width: 0; min-height: 0; max-height: 60rem; padding: 1rem; background: var(--card);
            border: 1px solid var(--line); border-radius: .75rem; position: relative }
  section > .row { min-height: 2.5rem; justify-content: space-between }
  .list { flex: 1; list-style: none; overflow: auto; min-height: 6rem; margin: 0 -.5rem; padding: .25rem .5rem;
          scrollbar-width: thin } .new { position: relative; isolation: isolate }
  .new::after { content: ""; position: absolute; inset: 0; z-index: -1; border-radius: inherit; opacity: 0;
          background: var(--flare) } #comments { align-items: flex-start; gap: .4rem; margin: 0 }
  #chat { flex: none; height: 45dvh; min-height: 11rem; display: grid; grid: minmax(0, 1fr) / minmax(0, 1fr);
          margin: 0 -.5rem } #chat > * { grid-area: 1 / 1 } #first { align-self: end; margin: 0 .5rem }
  #comments > :first-child { margin-top: auto }
  #comments p { max-width: 88%; padding: .35rem .8rem; border: 1px solid var(--line); border-radius: .3rem 1rem 1rem }
  #comments .mine { align-self: flex-end; background: var(--tint); border-radius: 1rem .3rem 1rem 1rem }
  #comments .pending { background: none; border: 1px dashed var(--edge) } #comments .failed { border-color: var(--bad) }
  #comments .name { display: block; font-size: .8125rem; font-weight: 600; color: var(--accent) }
  time { margin-left: .6rem; font-size: .75rem; white-space: nowrap } .seen { position: absolute; opacity: 0 }
  #typing { display: block; min-height: 1.3125rem; margin: -.4rem 0 } #more { align-self: center; margin-top: -3.25rem;
          border-radius: 2rem } .hint { padding: 1.25rem 1rem; border: 1px dashed var(--edge); border-radius: .75rem;
          display: grid; gap: .75rem; justify-items: center; text-align: center; text-wrap: balance;
          color: var(--dim) } .hint button { color: var(--accent); font-weight: 600 }
  #say { display: grid; grid: auto / minmax(7rem, 27%) 1fr auto }
  #notes { padding: 0 } li:first-child { border: 0 !important } li { padding: .75rem .5rem .5rem;
          border-top: 1px solid var(--line) } li .row { margin-top: .2rem } li .erase { padding-right: 0 }
  li small { flex: 1 } label { font-weight: 600 }
  li p { white-space: pre-wrap; max-height: 18rem; overflow: auto; font-size: .9375rem } h3 + p { margin-top: .15rem }
  li.editing { background: var(--tint); box-shadow: inset 3px 0 var(--accent) }
  li.draft small::after { content: " · not saved yet"; color: var(--warn) }
  #search { flex: 0 1 15rem } input, textarea { display: block; width: 100%; min-width: 0; font-size: 1rem;
          font-weight: 400 } textarea { resize: none; max-height: 45dvh } label > * { margin-block: .2rem }
  .plain, summary { color: var(--accent) } .plain { min-height: 1.75rem; padding: 0 .3rem; border: 0;
          background: none; text-decoration: underline } .plain:hover { background: none }
  @media (hover: hover) { li .plain:not(:hover, :focus-visible) { color: var(--dim); text-decoration: none } }
  .erase:is(:hover, :focus-visible) { color: var(--bad) } #form .row { gap: .5rem }
  details:not([open]) > summary::before { content: "+"; margin-right: .4em }
  summary { display: flex; align-items: center; justify-content: center; border-style: dashed; font-weight: 600 }
  [open] > summary { border-color: transparent; padding: .4rem 0; justify-content: start; background: none }
  [open] ~ #none { display: none }
  @media (min-width: 40rem) { main { grid-template: minmax(0, 1fr) / 1fr 1fr; align-items: start }
    #chat { height: 60dvh } }
  @media (min-width: 40rem) and (min-height: 30rem) { body { height: 100dvh } #chat { flex: 1; height: auto }
    main { align-items: stretch } section { overflow: auto } }
  @media (max-width: 56rem) { #search { flex: 1 0 100% } #say { grid: auto auto / 1fr auto } #say > :first-child {
    grid-column: 1 / -1 } }
  @media (pointer: coarse) { main :is(input, textarea, button, summary) { min-height: 2.75rem } }
  @media (prefers-reduced-motion: no-preference) { .new { animation: arrive .3s ease-out }
    .new::after { animation: flare 1.5s ease-out } .home.new, .home.new::after { animation: none }
    .home.new::before { animation: star .8s ease-out } @keyframes flare { from { opacity: 1 } }
    @keyframes arrive { from { opacity: 0; translate: 0 .6rem } }
    @keyframes star { 30% { scale: 1.4; rotate: 45deg } } }
</style>
<header>
  <h1><a class="home" href="/">nova_lite</a></h1><nav><a href="/board">Board</a></nav>
  <div id="line" class="away"><span id="state" role="status">connecting</span><span id="wait" aria-hidden="true"></span
    ><button id="now" class="plain" aria-label="Reconnect now" hidden>now</button></div>
</header>
<main>
  <section aria-labelledby="comments-title">
    <div class="row"><h2 id="comments-title">Live comments</h2>
      <p id="here"><span id="count">Only you are here.</span>
        <a id="second" href="/" target="_blank">Open a second window</a></p></div>
    <div id="chat">
      <div id="comments" class="list" role="log" aria-live="polite" aria-labelledby="comments-title" tabindex="0"></div>
      <div id="first" class="hint" hidden><p>Nothing has been said yet. What you say appears in every window.</p>
        <button>Say “Hello, world!”</button></div></div>
    <button id="more" hidden>New comments below</button>
    <p id="typing" class="dim"></p>
    <form id="say">
      <input name="nick" dir="auto" aria-label="Your name" placeholder="Your name" autocomplete="nickname"
        maxlength="40"><input name="text" dir="auto" aria-label="Your comment" placeholder="Say something"
        autocomplete="off" maxlength="2000"><button class="main">Send</button></form>
  </section>
  <section aria-labelledby="notes-title">
    <div class="row"><h2 id="notes-title">Notes</h2>
      <form id="search" role="search"><input type="search" aria-label="Search" placeholder="Search notes"></form></div>
    <details id="add"><summary>New note</summary><form id="form" autocomplete="off" novalidate>
      <div><label>Title <input name="title" dir="auto" aria-describedby="e1" required></label>
        <p id="e1" class="error"></p></div>
      <div><label>Text <textarea name="body" dir="auto" aria-describedby="e2" rows="3" required></textarea></label>
        <p id="e2" class="error"></p></div>
      <div><label>Author <input name="author" dir="auto" aria-describedby="e3" required></label>
        <p id="e3" class="error"></p></div>
      <p id="error" class="error" role="alert"></p>
      <div class="row"><button class="main" title="Ctrl+Enter">Save</button
        ><button type="button" name="cancel">Cancel</button></div>
    </form></details>
    <p id="news" class="dim" role="status"></p>
    <p id="found" class="dim" role="status"></p>
    <div id="none" class="hint" hidden><p>There are no notes yet. What you write appears in every window.</p>
      <button>Write “Groceries”</button></div>
    <ul id="notes" class="list" role="list" aria-labelledby="notes-title"></ul>
  </section>
</main>
<template id="card"><li><div><h3 dir="auto"></h3><p dir="auto"></p><div class="row"><small><bdi></bdi></small>
  <button class="plain">Edit</button><button class="plain erase">Delete</button></div></div></li></template>
<script src="/nova.js"></script>
<script>
"use strict";
const $ = id => document.getElementById(id);

function element(tag, className, ...children) {  // children are text: user input cannot become markup
  const node = Object.assign(document.createElement(tag), { className });
  node.append(...children);
  return node;
}

function button(text, fn) { return Object.assign(element("button", "plain", text), { type: "button", onclick: fn }); }

let latest = -1000;  // when something arrived
function arrived(node) {  // highlights the node and the star, except in a stream of them: to animate costs CPU
  const before = latest;
  if ((latest = performance.now()) - before < 1000) return;
  for (const it of [node, document.querySelector(".home")]) {
    it.classList.remove("new");
    void it.clientTop;  // restarts the animation
    it.classList.add("new");
  }
}

function join(names) { return names.flatMap((name, at) => [at ? ", " : "", element("bdi", "", name)]); }

// The connection.
const line = new NovaSocket("/chat");
let word = "connecting", ticking;
function report() {
  const isOpen = line.state === "open", wait = line.state === "waiting" ? line.retryAt - Date.now() : 0;
  if (isOpen) word = "connected";
  else if (line.state === "refused") word = `refused: ${line.refusal}`;
  else if (word !== "connecting" || wait) word = navigator.onLine ? "reconnecting" : "offline";
  if ($("state").textContent !== word) $("state").textContent = word;  // a screen reader reads changes only
  $("wait").textContent = word !== "offline" && wait ? `in ${Math.max(1, Math.ceil(wait / 1000))} s` : "";
  $("now").hidden = isOpen || word === "connecting";
  $("here").style.visibility = isOpen ? "visible" : "hidden";  // what is hidden keeps its space: nothing moves
  $("line").className = isOpen ? "" : "away";
  $("first").hidden = past || $("comments").childElementCount > 0;
  clearTimeout(ticking);
  if (!isOpen) ticking = setTimeout(report, 250);
}
$("now").onclick = () => line.now();

// Visitors: who is here, and who is typing.
const store = kind => { try { return window[kind]; } catch { return {}; } };  // the browser may refuse it
const storage = store("localStorage"), { nick, text } = $("say").elements;
const here = new Map();  // JSON of [name, typing] -> how many windows
let typing = false, quiet;
nick.value = storage.nova_name ?? "";
nick.onchange = () => { storage.nova_name = nick.value; tell(false); };
text.oninput = () => tell(text.value !== "");
function tell(now) {  // the others; until nothing has been typed for some seconds
  quiet = clearTimeout(quiet);
  typing = now;
  if (typing) quiet = setTimeout(() => tell(false), 4000);
  if (line.state === "open") line.send(`${typing ? "typing" : "here"} ${nick.value}`);
}
line.on("open", () => tell(false)).on("here", people => { here.clear(); count(people, 1); });
line.on("moved", ([joins, leaves]) => { count(leaves, -1); count(joins, 1); });

function count(people, step) {
  for (const [name, metas] of Object.entries(people)) for (const { typing } of metas) {
    const who = JSON.stringify([name, typing]), windows = (here.get(who) ?? 0) + step;
    if (windows) here.set(who, windows); else here.delete(who);
  }
  const names = new Set(), typers = new Set(), own = nick.value.trim() || "Someone";
  let total = 0;
  for (const [who, windows] of here) {
    const [name, busy] = JSON.parse(who);
    total += windows;
    if (name !== "Someone") names.add(name);
    if (busy && windows > (typing && name === own)) typers.add(name);
  }
  const some = join([...names].sort().slice(0, 12)), more = names.size > 12 ? ", …" : "";
  $("count").replaceChildren(total > 1 ? `${total} are here${some.length ? ": " : ""}` : "Only you are here.",
    ...total > 1 ? [...some, more] : []);
  $("second").hidden = total > 1;
  $("typing").replaceChildren(...typers.size > 3 ? ["Several people are typing…"] : join([...typers].sort()),
    typers.size > 3 || !typers.size ? "" : typers.size > 1 ? " are typing…" : " is typing…");
}

// Comments. One of this window is shown as pending until it comes back; its id tells it from others with the same text.
const session = store("sessionStorage"), own = new Set(JSON.parse(session.nova_comments ?? "[]"));
const list = $("comments"), bubbles = new Map(), pending = new Map();  // id -> <p>; of those not confirmed
let past = true;  // until "live", comments are replayed
line.on("here", () => { past = true; });
line.on("live", () => { past = false; pending.forEach(deliver); report(); });
line.on("closed", () => { past = true; pending.forEach(deliver); report(); });
line.on("state", ({ state }) => { if (state === "refused") pending.forEach(deliver); report(); });

function bubble({ id, name, text, at }) {
  const isMine = own.has(id), who = isMine ? element("span", "seen", "You: ") : element("bdi", "name", name);
  const shown = at ? new Date(at * 1000).toLocaleTimeString([], { timeStyle: "short" }) : "earlier";
  const node = element("p", isMine ? "mine" : "", name && name !== "Someone" || isMine ? who : "",
    element("bdi", "said", text), element("time", "", shown));
  bubbles.set(id, Object.assign(node, { key: id }));
  return node;
}

function show(node, before = null) {
  const isLast = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.insertBefore(node, before);
  if (list.childElementCount > 200) bubbles.delete(list.firstChild.key), list.firstChild.remove();
  if (isLast || !before && own.has(node.key)) list.scrollTop = list.scrollHeight;
  $("more").hidden = isLast || past || own.has(node.key);
  report();
}
$("more").onclick = () => { list.scrollTop = list.scrollHeight; };
list.onscroll = () => { if (list.scrollHeight - list.scrollTop - list.clientHeight < 50) $("more").hidden = true; };

line.on("new_comment", said => {
  const now = past ? 0 : Date.now() / 1000;  // a client of /comments sends text: its position is its id
  const comment = typeof said === "string" ? { id: line.position, text: said, at: now } : said, { id } = comment;
  if (bubbles.has(id) && !pending.has(id)) return;
  bubbles.get(id)?.remove();
  pending.delete(id);
  const node = bubble(comment);
  show(node, pending.values().next().value);
  if (!past) arrived(node);
});

function mark(node, className, ...label) {
  node.className = `mine pending ${className}`;
  node.querySelector("time").replaceChildren(...label);
}
function deliver(node, id) {  // again after a reconnect; not for ever: it may be the reason why the line breaks
  if (line.state === "refused" || node.tries === 2) fail(node, id);
  else if (past) mark(node, "", "waiting for the line");
  else if (line.send(`say ${id} ${node.text}`)) mark(node, "", "sending…"), node.tries++;
}
function fail(node, id) {
  mark(node, "failed", "not sent · ", button("Retry", () => { node.tries = 0; line.now(); deliver(node, id); }));
}
function speak(said) {
  const id = crypto.getRandomValues(new Uint32Array(4)).join("-");
  session.nova_comments = JSON.stringify([...own.add(id)].slice(-200));
  const node = Object.assign(bubble({ id, text: said }), { text: said, tries: 0 });
  pending.set(id, node);
  show(node);
  deliver(node, id);
  report();
}
$("say").onsubmit = event => {
  event.preventDefault();
  if (text.value.trim()) speak(text.value.trim());
  text.value = "";
  if (typing) tell(false);
};
$("first").querySelector("button").onclick = () => { speak("Hello, world!"); text.focus(); };

// Notes: the page changes when the event arrives, in this window as in all others.
const items = new Map(), query = $("search").elements[0];  // id -> its <li>
const erased = new Set();  // ids of notes that this window deletes
let loading = null, searching, passing, passes = 6000;  // ms

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
line.on("open", load).on("nova_resync", load);

for (const [change, word] of [[put, "created"], [put, "updated"], [drop, "deleted"]])
  line.on("note_" + word, event => {
    const note = event.title ? event : items.get(event.id)?.note;
    loading?.push(() => change(event));
    change(event, true);
    const undo = erased.delete(event.id) ? button("Undo", () => restore(note)) : "";
    if (note) say("“", element("bdi", "", note.title), `” was ${word}. `, undo);
    search();
  });
async function restore(note) {
  const [ok, { error }] = await api("POST", "", note);
  if (!ok) say(error, " ", button("Undo", () => restore(note)));
}
function say(...parts) {  // until it passes
  $("news").replaceChildren(...parts);
  clearTimeout(passing);
  passing = setTimeout(() => $("news").querySelector(":is(:hover, :focus)") ? say(...parts) : say(), passes);
}

function search() {  // shows what the indexer finds, or all
  const q = encodeURIComponent(query.value.trim());
  searching = clearTimeout(searching);
  if (!q) return filter(null);
  const mine = searching = setTimeout(async () => {
    const [ok, { notes, error }] = await api("GET", `/search?q=${q}`);
    if (searching === mine) ok ? filter(notes.map(note => note.id)) : say(error);
  }, 150);
}
query.oninput = () => { say(); search(); };
$("search").onsubmit = event => event.preventDefault();

function filter(ids) {
  for (const [id, item] of items) item.hidden = ids !== null && !ids.includes(id);
  const count = ids ? ids.length : items.size;
  $("found").textContent = ids ? `${count || "No"} note${count === 1 ? "" : "s"} found.` : "";
  $("none").hidden = ids !== null || count > 0;
}

function put(note, glow) {
  const item = items.get(note.id) ?? card(note);
  if (JSON.stringify(item.note) === JSON.stringify(note)) return;
  item.note = note;
  for (const [tag, key] of [["h3", "title"], ["p", "body"], ["bdi", "author"]])
    item.querySelector(tag).textContent = note[key];
  for (const it of item.querySelectorAll("button")) it.setAttribute("aria-label", `${it.textContent} ${note.title}`);
  if (item === editing && !busy) $("error").textContent = CHANGED;
  if (glow) arrived(item);
}

function card({ id }) {
  const item = $("card").content.firstElementChild.cloneNode(true), [edit, erase] = item.querySelectorAll("button");
  item.hidden = query.value.trim() !== "";  // until the search has found it
  edit.onclick = () => fill(item);
  erase.onclick = async () => {
    erased.add(id);
    const [ok, { error }] = await api("DELETE", `/${id}`);
    if (!ok && erased.delete(id)) say(error);
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
const add = $("add"), form = $("form"), { title, body, author, cancel } = form.elements, drafts = new Map();
const CHANGED = "It has been changed elsewhere. Saving replaces that.";
let editing = null, busy = false;  // a draft: of an id, or of null for a new note, what is not saved, and its base

function fill(item) {
  keep();
  editing?.classList.remove("editing");
  item?.classList.add("editing");
  const draft = drafts.get((editing = item)?.note.id ?? null), { note } = item ?? { note: { title: "", body: "" } };
  [title.value, body.value] = draft ?? [note.title, note.body];
  author.closest("div").hidden = item !== null;  // the author cannot be changed
  add.firstElementChild.replaceChildren(...item ? ["Edit “", element("bdi", "", note.title), "”"] : ["New note"]);
  for (const field of [title, body, author]) fault(field);
  $("error").textContent = draft && item && draft[2] !== JSON.stringify(note) ? CHANGED : "";
  add.open = item !== null;
  if (item) grow(), title.focus();
}

function keep() {  // what is in the form, until it is saved or cancelled
  const { note } = editing ?? { note: { id: null, title: "", body: "" } };
  const differs = title.value !== note.title || body.value !== note.body;
  if (differs) drafts.set(note.id, [title.value, body.value, JSON.stringify(note)]); else drafts.delete(note.id);
  editing?.classList.toggle("draft", differs);
}

function leave() {
  const item = editing;
  fill(null);
  add.open = false;
  (item?.isConnected ? item : add).querySelector("button, summary").focus();
}

function discard() {
  [title.value, body.value] = editing ? [editing.note.title, editing.note.body] : ["", ""];
  leave();
}

function grow() {
  body.style.height = "auto";
  body.style.height = `${body.scrollHeight + 2}px`;
}

form.onsubmit = async event => {
  event.preventDefault();
  if (busy) return;
  const item = editing, note = { author: author.value.trim(), ...item?.note }, save = form.querySelector(".main");
  [note.title, note.body, busy, save.textContent] = [title.value.trim(), body.value.trim(), true, "Saving…"];
  const [ok, { fields, error }] = await (items.has(note.id) ? api("PUT", `/${note.id}`, note) : api("POST", "", note));
  [busy, save.textContent] = [false, "Save"];
  if (editing !== item) return void (ok && drafts.delete(item?.note.id ?? null));  // another one was opened meanwhile
  if (ok) return discard();
  for (const field of [title, body, author]) fault(field, fields?.[field.name]);
  $("error").textContent = fields ? "" : error;
  form.querySelector("[aria-invalid=true]")?.focus();
};
form.oninput = event => { fault(event.target); grow(); };
form.onkeydown = event => {
  if (event.key === "Escape") leave();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
};
cancel.onclick = discard;
add.ontoggle = () => {
  if (!add.open) return void (editing && fill(null));
  author.value ||= nick.value;
  title.focus();
};
$("none").querySelector("button").onclick = () => {
  [title.value, body.value, author.value] = ["Groceries", "milk, bread, coffee", author.value || nick.value || "Ada"];
  add.open = true;
};

function fault(field, text) {
  field.setAttribute("aria-invalid", !!text);
  $(field.getAttribute("aria-describedby")).textContent = text ? `${field.labels[0].textContent.trim()} ${text}.` : "";
}
</script>
</html>
"""
)


# ---------------------------------------------------------------------------------------------------------------------
# Main: the command line: the demo, broadcast, vendor.
# ---------------------------------------------------------------------------------------------------------------------


GENERATED_PASSWORD = "NOVA_LITE_PASSWORD"  # in the environment of workers and reloads, unless the user has set one
HELP = """\
your own program:
  nova_lite.py vendor -o FILE     write the copy for your project, without the demo (vendor --help: which rooms)
  The top of nova_lite.py has a live application in 15 lines. The demo, near its end, is one in full.

a running cluster:
  nova_lite.py broadcast --help   send a message into it, from a shell or a cron job

environment:
  HOST and PORT are the defaults of --host and --port. NOVA_PASSWORD is the password of /board; if it is not set, one
  is made up and printed. NO_COLOR prints without colours.
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nova_lite.py",
        description="Serves the demo: live comments, notes and their notifications. Open the URL in two windows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
    )
    env, add = os.environ, parser.add_argument
    add("--host", default=env.get("HOST", "127.0.0.1"), help="address to listen on (%(default)s)")
    port = between(int, 0, 65535, "a port, a number")
    add("--port", type=port, default=env.get("PORT", "8080"), help="TCP port; 0: any that is free (%(default)s)")
    add("--db", default="notes.db", help='the notes: a SQLite file, ":memory:", or postgresql://... (%(default)s)')
    add("--cluster", metavar="URL", help="redis://...: broadcasts reach all nodes that share this Redis")
    add("--name", metavar="NODE", help="this node's name in the cluster and in pids")
    add("--workers", type=between(int, 1, 256), default=1, metavar="N", help="processes; needs --cluster (%(default)s)")
    delay = "time between SIGTERM and draining, in which /heartbeat returns 503 (%(default)s)"
    add("--shutdown-delay", type=between(float, 0, 10**9), default=0.0, metavar="SECONDS", help=delay)
    add("--certfile", metavar="FILE", help="certificate (PEM): serve https and wss")
    add("--keyfile", metavar="FILE", help="private key of the certificate, if it is in another file")
    add("--reload", action="store_true", help="restart whenever a file of the program changes")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="lowest level (%(default)s)")
    add("--log-format", choices=["plain", "json"], default="plain", help="json: each line is an object (%(default)s)")
    add("--version", action="version", version=f"nova_lite {__version__}")
    args = parser.parse_args()
    if args.workers > 1 and args.cluster is None:
        parser.error("--workers needs --cluster, or a broadcast would reach the clients of one worker only")
    if args.workers > 1 and args.db == ":memory:":
        parser.error("--workers needs a --db that workers can share, not :memory:")
    return args


def between(kind: type, low: int, high: int, what: str = "a number") -> Callable[[str], Any]:
    """Returns a function that parses a number from `low` to `high`, for argparse."""

    def number(text: str) -> Any:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {what} from {low} to {high}, got {text!r}")

    return number


def print_welcome(server: Server) -> None:
    """Says where the demo is: on a terminal for people, in colour unless NO_COLOR is set; else whom it is open to."""
    host, is_terminal = server.address[0], sys.stdout.isatty()
    mark, plain = ("\033[1;36m", "\033[0m") if is_terminal and not os.environ.get("NO_COLOR") else ("", "")
    scheme = "https" if server.ssl_enabled else "http"
    home, *others = [f"{scheme}://{f'[{it}]' if ':' in it else it}:{server.port}/" for it in find_addresses(host)]
    password = os.environ.get(GENERATED_PASSWORD) or "as in NOVA_PASSWORD"
    lines = [
        f"nova_lite {__version__}",
        "",
        f"  Page   {mark}{home}{plain}   (open it in two windows)",
        f"  Board  {mark}{home}board{plain}   (password: {password})",
        *[f"  Also   {mark}{other}{plain}" for other in others],
        "",
        "Ctrl-C stops.",
    ]
    if not ip_address(host).is_loopback:
        open_to = f"Whoever reaches {' or '.join(others) or home} can read and write comments and notes."
        lines[-1:-1] = [open_to]
        if not is_terminal:
            log.warning(open_to)
    if is_terminal:
        print("", *lines, "", sep="\n", flush=True)


def find_addresses(host: str) -> list[str]:
    """Returns addresses that a browser can open: `host`, or for all addresses this machine's, the loopback first."""
    if not ip_address(host).is_unspecified:
        return [host]
    found = ["127.0.0.1"]
    for family, other in [(AF_INET, "192.0.2.1"), (AF_INET6, "2001:db8::1")][: 1 + (":" in host)]:
        with suppress(OSError), socket(family, SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing: it only chooses the address to send from
            found.append(probe.getsockname()[0])
    return found


def main() -> int:
    """Runs a subcommand or the demo, and returns the exit code."""
    for name, subcommand in (("broadcast", broadcast_main), ("vendor", vendor_main)):
        if sys.argv[1:2] == [name]:
            return subcommand(sys.argv[2:])
    args = parse_options()
    handler = log_handler(args.log_format, args.workers > 1)
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler])
    if sys.stdout.isatty() and not os.environ.get("NOVA_PASSWORD"):  # printed once the demo is served
        os.environ["NOVA_PASSWORD"] = os.environ[GENERATED_PASSWORD] = secrets.token_urlsafe(12)
    choose_password()  # before workers or a child are started: they must share it
    try:
        number = 1  # of this worker
        if args.reload:
            reload_on_change()  # before the database is opened, which only the child needs
        if args.workers > 1:
            number, _ = run_workers(args.workers, args.host, args.port, 5.0 + args.shutdown_delay)  # 5.0: of the drain
        return serve(ready=print_welcome if number == 1 else None, **vars(args))
    except OSError as error:  # ssl.SSLError is one
        what = str(error.strerror).partition(":")[0]
        what += " (--port 0 takes one that is free)" if error.errno == errno.EADDRINUSE else ""
        print(f"nova_lite: cannot serve {error.filename or f'{args.host}:{args.port}'}: {what}", file=sys.stderr)
    except (ImportError, RuntimeError, ValueError) as error:  # of pubsub.connect, and of a child that does not start
        print(f"nova_lite: {error}", file=sys.stderr)
    return 1


def serve(db: str, **options: Any) -> int:
    try:
        notes = open_notes(db)
    except Exception as error:  # sqlite3.Error, psycopg.Error; below, the URL has no password
        print(f"nova_lite: the database {db.rpartition('@')[2]} cannot be used: {error}", file=sys.stderr)
        return 1
    with closing(notes):
        demo(notes, choose_password()).run(children=children_of(notes), **options)
    return 0


def broadcast_main(arguments: list[str]) -> int:
    """Runs `nova_lite.py broadcast` and returns the exit code."""
    what = "Sends a message to all members of a channel, on all nodes of a cluster."
    parser = argparse.ArgumentParser("nova_lite.py broadcast", description=what)
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
        nodes = publish(args.cluster, args.channel, args.topic, payload)
    except Exception as error:  # redis and msgpack raise their own
        print(f"nova_lite: nothing was sent: {error}", file=sys.stderr)
        return 1
    print(f"{args.channel} {args.topic}: {nodes} node{'' if nodes == 1 else 's'} reached")
    return 0


def vendor_main(arguments: list[str]) -> int:
    """Runs `nova_lite.py vendor` and returns the exit code."""
    what = "Writes the copy of nova_lite for your project: without the demo, and without the rooms you name."
    parser = argparse.ArgumentParser("nova_lite.py vendor", description=what)
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
    lines, parts = source.splitlines(), find_rooms(source)
    table = f"{'core':12}{min(part.start for part in parts.values()):5} lines\n"
    for name, part in parts.items():
        notes = " ".join(line.strip("# ") for line in takewhile(bool, lines[part][1:]))
        table += f"{name:12}{part.stop - part.start:5} lines  {notes}\n"
    return table


def vendor(source: str, without: Iterable[str] = ()) -> str:
    """Returns the copy to vendor: `source` without the demo, the rooms `without`, and the imports used only there."""
    lines, parts = source.splitlines(keepends=True), find_rooms(source)
    kept = [name for name in parts if name not in without]
    core = lines[: min(part.start for part in parts.values())]
    text = "".join(core + [line for name in kept for line in lines[parts[name]]])
    besides = ", ".join(kept) or "none"
    head = f"# nova_lite {__version__}, written by `nova_lite.py vendor`. Rooms besides the core: {besides}.\n"
    # Type checkers then report nothing of the copy, and apply its types to the program. If the comment began with
    # "type:", mypy would skip the file.
    head += "# mypy: ignore-errors\n# For pyright: # type: ignore\n"
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
