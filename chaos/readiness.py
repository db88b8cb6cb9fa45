"""Waiting for a domain that another command made: ready, dead, or out of time."""

from __future__ import annotations

import errno
import select
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from chaos.death import POLL_SECONDS, Death, DeathWatch, remaining
from chaos.devicepage import DevicePage
from noxs.abi import STATE_READY
from xenctypes.errors import CallFailed, StateError
from xenctypes.evtchn import Evtchn

if TYPE_CHECKING:
    from chaos.host import Host
    from chaos.registry import Record
    from noxs.page import GuestWords

READY = "ready"
DEAD = "dead"
TIMEOUT = "timeout"


class Outcome(NamedTuple):
    """How a wait ended: READY, DEAD or TIMEOUT, with the guest's last words where it has any."""

    kind: str
    death: Death | None = None
    words: GuestWords | None = None


def await_ready_or_dead(
    host: Host, record: Record, *, until_dead: bool = False, timeout: float | None = None
) -> Outcome:
    """Wait for the domain; ``until_dead`` waits on when it is ready. ``timeout`` in seconds.

    Raises StateError when readiness is asked of a guest that has no way to tell it.
    """
    if not until_dead and not record.noxs:
        raise never_ready(record.name)
    deadline = None if timeout is None else time.monotonic() + timeout
    with ExitStack() as stack:
        uuid = bytes.fromhex(record.uuid.replace("-", ""))
        death_watch = stack.enter_context(DeathWatch(host, record.domid, uuid))
        page = _page(stack, host, record)
        channel = _channel(stack, record) if page is not None and not until_dead else None
        poll = select.poll()
        for fd in (death_watch.fd, -1 if channel is None else channel.fd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        # Where another process holds the channel, the state word is looked at instead.
        look = POLL_SECONDS if channel is None and not until_dead else None
        while True:
            words = page.words() if page is not None else None
            if not until_dead and words is not None and words.state == STATE_READY:
                return Outcome(READY, words=words)
            death = death_watch.check()
            if death is not None:
                return Outcome(DEAD, death, page.words() if page is not None else None)
            if deadline is not None and time.monotonic() >= deadline:
                return Outcome(TIMEOUT, words=words)
            left = remaining(deadline, death_watch.timeout, look)
            _take_events(poll, left, death_watch, channel)


def _take_events(
    poll: select.poll, timeout: float | None, death_watch: DeathWatch, channel: Evtchn | None
) -> None:
    for fd, _ in poll.poll(None if timeout is None else timeout * 1000):
        if fd == death_watch.fd:
            death_watch.drain()
        elif channel is not None:
            channel.unmask(channel.pending())


def _page(stack: ExitStack, host: Host, record: Record) -> DevicePage | None:
    if not record.noxs:
        return None
    try:
        page = DevicePage(host, record.domid, [record.store_frame])
    except CallFailed:
        return None  # dying: there is nothing left to read
    stack.callback(page.close)
    return page


def _channel(stack: ExitStack, record: Record) -> Evtchn | None:
    channel = stack.enter_context(Evtchn())
    try:
        channel.bind_interdomain(record.domid, record.store_port)
    except CallFailed as error:
        if error.errno not in {errno.EINVAL, errno.ESRCH}:
            raise
        return None
    return channel


def never_ready(name: str) -> StateError:
    """The error for a guest that has no way to say that it is ready."""
    return StateError(
        f'domain "{name}" does not speak noxs and never says that it is ready',
        hint="chaos wait --dead waits for its end",
    )
