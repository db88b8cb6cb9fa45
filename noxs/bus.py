"""The client of the bus: noxsd's or xenstored's socket, whichever serves this host.

If the server goes away, it is looked for again, the watches are made again (each fires once, as
when it was first made), and the requests are sent again: outside transactions all of them may be
repeated. A transaction is lost with its server and starts over, as if it had met a conflict; unless
the server went away during the commit: then whether to repeat is the caller's decision.
"""

from __future__ import annotations

import errno as errnos
import os
from time import monotonic

from noxs import wire
from noxs.nodes import Nodes, decode, result, result_or_none, string
from noxs.session import Session, lost_transaction
from xenctypes.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self, TypeVar

    from noxs.nodes import Request
    from noxs.wire import Message

    Result = TypeVar("Result")
    Event = tuple[str, str]

SOCKETS = ("/run/noxs/socket", "/run/xenstored/socket", "/var/run/xenstored/socket")
ATTEMPTS = 64
"""How often a transaction is tried that meets conflicts."""
PATIENCE = 30.0


def server_paths() -> tuple[str, ...]:
    """Where a server may be: $NOXS_BUS or $XENSTORED_PATH alone if set, else the usual places."""
    path = os.environ.get("NOXS_BUS") or os.environ.get("XENSTORED_PATH")
    return (path,) if path else SOCKETS


class Transaction(Nodes):
    """A transaction, as a context manager: committed at the end, aborted on an exception.

    Leaving it raises BusError with EAGAIN after a conflict: nothing was changed then. With
    ECONNABORTED or ETIMEDOUT, everything or nothing was.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        request = (wire.TRANSACTION_START, b"\0", "")
        reply = result(request, session.exchange([request], 0)[0])
        self.ident = int(reply.rstrip(b"\0"))
        self._count = session.count

    def exchange(self, requests: list[Request]) -> list[Message]:
        """See Nodes.exchange."""
        if self._count != self._session.count:
            raise lost_transaction()
        return self._session.exchange(requests, self.ident)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.ask(wire.TRANSACTION_END, b"T\0", "")
        elif self._count == self._session.count:
            self.exchange([(wire.TRANSACTION_END, b"F\0", "")])


class Bus(Nodes):
    """A connection to the store; a context manager. Not for several threads at once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tokens = 0

    @classmethod
    def connect(cls, path: str | None = None, *, patience: float = PATIENCE) -> Self:
        """Connect to the server at ``path``, or find it. BusError when none answers.

        ``patience``: seconds to wait for a reply, and for a server that went away to come back.
        """
        return cls(Session((path,) if path else server_paths(), patience))

    @property
    def path(self) -> str:
        """The server's socket."""
        return self._session.path

    def close(self) -> None:
        """Close the connection; watches and open transactions end with it."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def exchange(self, requests: list[Request]) -> list[Message]:
        """See Nodes.exchange."""
        return self._session.exchange(requests, 0)

    def control(self, *words: str) -> str:
        """What the server says to a command for itself, as `xenstore-control` sends them."""
        payload = b"".join(string(word) for word in words)
        return decode(self.ask(wire.CONTROL, payload, words[0]).rstrip(b"\0"))

    # Watches

    def fileno(self) -> int:
        """Readable when ``events`` has something to do.

        Requests put events aside too: call ``events`` after them, before polling this. The number
        stays the same when the server restarts, but an epoll has to be told about it again.
        """
        return self._session.fileno()

    def watch(self, path: str, token: str) -> None:
        """Have changes of a node, and of all below it, reported by ``events``; fires at once."""
        payload = string(path) + string(token)
        self.ask(wire.WATCH, payload, path)
        self._session.watches[path, token] = (wire.WATCH, payload, path)

    def unwatch(self, path: str, token: str) -> None:
        """End a watch. Its events that wait are dropped, unless another watch has its token."""
        session = self._session
        ours = session.watches.pop((path, token), None)
        request = (wire.UNWATCH, string(path) + string(token), path)
        # A server that restarted meanwhile does not know a watch of ours: that is as well.
        (result_or_none if ours else result)(request, self.exchange([request])[0])
        if not any(other == token for _, other in session.watches):
            session.events = [event for event in session.events if event[1] != token]

    def events(self, timeout: float | None = 0) -> list[Event]:
        """The watch events that wait, as (path that changed, token of the watch).

        Without any, waits for one for ``timeout`` seconds, None: for ever.
        """
        session = self._session
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            readable = session.wait(0 if session.events else left)
            if readable:
                try:
                    session.receive()
                except ConnectionError:
                    session.reopen()
            if session.events or not readable:
                events, session.events = session.events, []
                return events

    def wait_for(
        self, path: str, predicate: Callable[[str | None], bool], timeout: float
    ) -> str | None:
        """Wait until a node's value (None: no node) satisfies the predicate; that value.

        Sleeps on a watch between reads. BusError with ETIMEDOUT after ``timeout`` seconds.
        """
        deadline = monotonic() + timeout
        self._tokens += 1
        token = f"wait_for {self._tokens}"
        others: list[Event] = []
        self.watch(path, token)
        try:
            while not predicate(value := self.get(path)):
                if not self._await(token, others, deadline):
                    raise BusError(
                        f"{path}: still {value!r} after {timeout:g} s",
                        path=path,
                        errno=errnos.ETIMEDOUT,
                    )
            return value
        finally:
            self._session.events[:0] = others
            self.unwatch(path, token)

    def _await(self, token: str, others: list[Event], deadline: float) -> bool:
        """Wait for an event with the token, keeping the others; False: it did not come in time."""
        while (left := deadline - monotonic()) > 0:
            events = self.events(left)
            others += [event for event in events if event[1] != token]
            if any(event[1] == token for event in events):
                return True
        return False

    # Transactions

    def transaction(self) -> Transaction:
        """One attempt at a transaction, for ``with``; ``transact`` tries again."""
        return Transaction(self._session)

    def transact(
        self,
        function: Callable[[Transaction], Result],
        attempts: int = ATTEMPTS,
        *,
        repeatable: bool = False,
    ) -> Result:
        """Call ``function`` in a transaction, again after a conflict; its result.

        BusError with EAGAIN when all attempts met conflicts, and with ECONNABORTED when the server
        went away during a commit, which may have been done. ``repeatable`` says that the function
        does no harm after itself, because it looks first or sets the same again: then that is
        one more reason to call it again.
        """
        reasons = {errnos.EAGAIN, errnos.ECONNABORTED} if repeatable else {errnos.EAGAIN}
        for _ in range(attempts - 1):
            try:
                with self.transaction() as tx:
                    value = function(tx)
            except BusError as error:
                if error.errno not in reasons:
                    raise
            else:
                return value
        with self.transaction() as tx:
            return function(tx)

    # Domains

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Have the store serve a domain's ring: its page, its unbound event channel port."""
        self.ask(wire.INTRODUCE, string(domid) + string(gfn) + string(port), "")

    def release(self, domid: int) -> None:
        """End ``introduce``; the nodes that the domain owns are removed."""
        self.ask(wire.RELEASE, string(domid), "")

    def is_introduced(self, domid: int) -> bool:
        """Whether the store serves a domain."""
        return self.ask(wire.IS_DOMAIN_INTRODUCED, string(domid), "") == b"T\0"
