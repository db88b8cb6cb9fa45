"""Requests to running guests, such as power off, and their answers.

A noxs guest finds them in its device page (docs/noxs-abi.md, "Requests"), a stock guest in its
store, where it takes the word at control/shutdown away (docs/misc/xenstore-paths.pandoc). One
event channel handle serves all guests that are asked::

    asked --ack--> answered --shutdown--> dead
      |               |
      +---------------+---> dead at any moment; out of time: as it is

A request stays in the guest's page: one that nobody answered in time is obeyed later, if the
guest comes to look.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import TYPE_CHECKING

from chaos import store
from chaos.death import POLL_SECONDS, Death, remaining
from chaos.devicepage import DevicePage
from chaos.invocation import unreported
from noxs.abi import ACK_OK, ACK_UNSUPPORTED, REQUEST_POWEROFF, REQUEST_REBOOT
from xenctypes.errors import CallFailed, StateError
from xenctypes.evtchn import VIRQ_DOM_EXC, Evtchn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from chaos.host import Host
    from chaos.invocation import Report
    from chaos.registry import Record
    from xenctypes.ctrl import DomainInfo

NAMES = {REQUEST_POWEROFF: "shut down", REQUEST_REBOOT: "reboot"}
WORDS = {REQUEST_POWEROFF: "poweroff", REQUEST_REBOOT: "reboot"}
"""The same in a store."""


class Request:
    """One request to one guest.

    ``result`` is its ACK_*, ``death`` how it died; None: not yet. ``rung``: it was told to look.
    ``page`` is its device page; a stock guest, which has none, is asked through its store.
    """

    def __init__(self, record: Record, code: int, page: DevicePage | None) -> None:
        self.record = record
        self.code = code
        self.page = page
        self.uuid = bytes.fromhex(record.uuid.replace("-", ""))
        self.port = 0
        self.rung = page is None
        self.result: int | None = None
        self.death: Death | None = None
        self.seq = sequence(page.words().ack) if page is not None else 0

    def close(self) -> None:
        """Unmap its page, which would keep a dead domain from going away. Idempotent."""
        if self.page is not None:
            self.page.close()

    def problem(self) -> str:
        """Why the guest does not do as asked, "" if it does."""
        if self.result is None:
            return "" if self.death is not None else "has not answered"
        if self.result == ACK_OK:
            return ""
        verb = NAMES.get(self.code, f"request {self.code}")
        return f"cannot {verb}" if self.result == ACK_UNSUPPORTED else f"refuses to {verb}"


def sequence(last: int) -> int:
    """A number for a request: not 0, nor ``last``, the one that the guest took last.

    The guest compares it with the last it took for inequality alone, so whoever asks needs no
    memory of earlier requests, another command's above all: a random number does.
    """
    while (number := int.from_bytes(os.urandom(4), "little")) in {0, last}:
        pass
    return number


class Control:
    """Asks guests and collects their answers.

    ``cancel`` is a descriptor that ends a wait with KeyboardInterrupt when it becomes readable, or
    -1. ``ring`` notifies a guest by its UUID and says whether it could: for a process that
    holds the guests' channels already, and hears their answers elsewhere.
    """

    def __init__(
        self, host: Host, *, cancel: int = -1, ring: Callable[[str], bool] | None = None
    ) -> None:
        self.requests: list[Request] = []
        self._host = host
        self._cancel = cancel
        self._ring = ring
        self._evtchn = Evtchn()
        self._by_port: dict[int, Request] = {}
        self._deaths = 0
        try:
            self._deaths = self._evtchn.bind_virq(VIRQ_DOM_EXC)
        except CallFailed as error:
            if error.errno != errno.EEXIST:
                self._evtchn.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for request in self.requests:
            request.close()
        self._evtchn.close()

    def ask(self, record: Record, code: int) -> Request:
        """Send a request (REQUEST_*). Raises StateError where the guest cannot be asked."""
        verb = NAMES.get(code, f"take request {code}")
        if record.store:
            store.request(self._host, record, WORDS[code])
            request = Request(record, code, None)
            self.requests.append(request)
            return request
        if not record.noxs:
            raise StateError(
                f'domain "{record.name}" does not speak noxs and has no store: it cannot be asked'
                f" to {verb}",
                hint="stop it from within, or chaos destroy; with storesd, guests get a store",
            )
        try:
            page = DevicePage(self._host, record.domid, [record.store_frame])
        except CallFailed as error:
            raise StateError(
                f'domain "{record.name}" is dying', hint="chaos list shows what becomes of it"
            ) from error
        words = page.words()
        if words.accepts and not words.accepts >> code & 1:
            page.close()
            raise StateError(
                f'the guest of domain "{record.name}" says that it cannot {verb}',
                hint="chaos destroy ends it at once",
            )
        request = Request(record, code, page)
        self.requests.append(request)
        page.request(request.seq, code)
        self._notify(request)
        return request

    def _notify(self, request: Request) -> None:
        """Ring, unless another process holds the guest's channel: then ``wait`` tries again."""
        record = request.record
        if self._ring is not None and self._ring(record.uuid):
            request.rung = True
            return
        try:
            request.port = self._evtchn.bind_interdomain(record.domid, record.store_port)
        except CallFailed as error:
            if error.errno not in {errno.EINVAL, errno.ESRCH}:
                raise
            return
        request.rung = True
        self._by_port[request.port] = request
        self._evtchn.notify(request.port)

    def wait(
        self, timeout: float | None, *, dead: bool = False, report: Report = unreported
    ) -> None:
        """Wait until every guest has answered; with ``dead``, until those that agreed are dead.

        Returns after ``timeout`` seconds (None: never) at the latest. ``report`` hears of each.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._evtchn.fd, select.POLLIN)
        if self._cancel >= 0:
            poll.register(self._cancel, select.POLLIN)
        for request in self.requests:
            self._look(request)
        self._look_for_deaths()
        open_requests, done = self.requests, 0
        while True:
            waiting = []
            for request in open_requests:
                if _is_open(request, dead=dead):
                    waiting.append(request)
                else:
                    done += 1
                    report(request.record.name, done, len(self.requests))
            open_requests = waiting
            if not open_requests:
                return
            if deadline is not None and time.monotonic() >= deadline:
                return
            deaf = any(not request.port for request in open_requests)
            look = POLL_SECONDS if deaf or not self._deaths else None
            left = remaining(deadline, look)
            ready = poll.poll(None if left is None else int(left * 1000 + 0.999))
            if any(fd == self._cancel for fd, _ in ready):
                raise KeyboardInterrupt
            self._take(open_requests)

    def _take(self, open_requests: list[Request]) -> None:
        ports = self._evtchn.drain()
        for port in ports:
            if port in self._by_port:
                self._look(self._by_port[port])
        for request in open_requests:
            if not request.port:
                self._look(request)
                if request.result is None and not request.rung:
                    self._notify(request)
        if self._deaths in ports or not self._deaths:
            self._look_for_deaths()

    def _look_for_deaths(self) -> None:
        alive = {(info.domid, info.uuid): info for info in self._host.ctrl.domain_list()}
        for request in self.requests:
            if request.death is None and (death := death_of(request, alive)) is not None:
                self._look(request)
                request.death = death
                request.close()

    def _look(self, request: Request) -> None:
        """Take the guest's answer, if it is there."""
        if request.death is not None or request.result is not None:
            return
        if request.page is None:
            if store.requested(self._host, request.record) == "":
                request.result = ACK_OK
            return
        words = request.page.words()
        if words.ack == request.seq:
            request.result = words.ack_result


def _is_open(request: Request, *, dead: bool) -> bool:
    if request.death is not None:
        return False
    return request.result is None or (dead and request.result == ACK_OK)


def death_of(request: Request, infos: dict[tuple[int, bytes], DomainInfo]) -> Death | None:
    """How the request's domain died, by a list of all domains; None while it lives."""
    info = infos.get((request.record.domid, request.uuid))
    if info is None:
        return Death(None)
    return Death(info) if info.shutdown or info.dying else None
