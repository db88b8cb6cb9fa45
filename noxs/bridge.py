"""Between guests' private stores and Dom0's bus, in a thread of its own.

The bus may be slow, or away while noxsd is restarted: nobody but this thread waits for it. What is
to be told to a back end is kept as the last value of each key, and what a back end says is read
again as a whole when it changes, so that neither side can make the other keep more than that.
"""

from __future__ import annotations

import os
import select
import threading
from time import monotonic

from noxs.handshake import VALUE_MAX, back_key, front_key, in_order
from noxs.nodes import decode, encode
from xenctypes.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from noxs.bus import Bus, Transaction

    Changes = dict[bytes, bytes | None]
    Key = tuple[int, bytes]

RETRY = 1.0
JOBS = 16
"""Back ends that are told something before it is looked at once more what others say."""
_COMPLAIN_EVERY = 10.0


class Link:
    """A device's two directories on the bus, which are also those of the guest's view.

    ``there`` are the keys of the front end's in the view, if the bus may have others still: None
    once it has not.
    """

    def __init__(self, front: bytes, back: bytes, there: set[bytes] | None) -> None:
        self.front = decode(front)
        self.back = decode(back)
        self.there = there


class Bridge:
    """Links by ``key``: the guest's serial number and the device's token.

    ``connect`` opens the bus. ``fileno`` is readable when ``found`` has something.
    """

    def __init__(self, connect: Callable[[], Bus], log: Callable[[str], None]) -> None:
        self._connect = connect
        self._log = log
        self._complained = -_COMPLAIN_EVERY
        self._lock = threading.Lock()
        self._links: dict[Key, Link] = {}
        self._watched: dict[Key, Link] = {}
        self._todo: dict[Key, Changes] = {}
        self._found: dict[Key, dict[bytes, bytes]] = {}
        self._flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._wake_fd = os.eventfd(0, self._flags)
        self._found_fd = os.eventfd(0, self._flags)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="bridge", daemon=True)

    # The main thread's side

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Stop working; what is not done is left."""
        self._stopping = True
        self._wake()

    def fileno(self) -> int:
        """See the class."""
        return self._found_fd

    def attach(self, key: Key, front: bytes, back: bytes, there: set[bytes] | None = None) -> None:
        """Link a device; what its back end says comes by ``found``, at first all of it.

        ``there``: the front end has these keys, and is to be told of: others that it told its back
        end before a kill, and has removed, are taken off the bus with that.
        """
        with self._lock:
            self._links[key] = Link(front, back, there)
        self._wake()

    def detach(self, key: Key) -> None:
        """End a link; what was still to be told is dropped."""
        with self._lock:
            self._links.pop(key, None)
            self._todo.pop(key, None)
        self._wake()

    def tell(self, key: Key, changes: Changes) -> None:
        """Have a back end told its front end's changes: None for a key that is gone."""
        with self._lock:
            self._todo.setdefault(key, {}).update(changes)
        self._wake()

    def found(self) -> dict[Key, dict[bytes, bytes]]:
        """What back ends say now, each as a whole: the values of its directory."""
        try:
            os.eventfd_read(self._found_fd)
        except BlockingIOError:
            return {}
        with self._lock:
            found, self._found = self._found, {}
        return found

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # The thread's side

    def _run(self) -> None:
        while not self._stopping:
            try:
                with self._connect() as bus:
                    self._watched.clear()
                    while not self._stopping:
                        self._work(bus)
            except BusError as error:
                if monotonic() > self._complained + _COMPLAIN_EVERY:
                    self._complained = monotonic()
                    self._log(f"Dom0's bus: {error}")
                self._sleep(RETRY)

    def _sleep(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        deadline = monotonic() + seconds
        while not self._stopping and (left := deadline - monotonic()) > 0:
            if poll.poll(left * 1000):
                os.eventfd_read(self._wake_fd)

    def _work(self, bus: Bus) -> None:
        self._keep_watches(bus)
        jobs = 0
        while jobs < JOBS and (job := self._next()) is not None:
            self._tell(bus, *job)
            jobs += 1
        changed = {token for _, token in bus.events(0)}
        for key in [key for key in self._watched if _token(key) in changed]:
            self._look(bus, key, self._watched[key])
        if changed or jobs == JOBS:
            return
        poll = select.poll()
        poll.register(bus.fileno(), select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        if any(fd == self._wake_fd for fd, _ in poll.poll()):
            os.eventfd_read(self._wake_fd)

    def _keep_watches(self, bus: Bus) -> None:
        with self._lock:
            links = dict(self._links)
        for key in [key for key in self._watched if links.get(key) is not self._watched[key]]:
            bus.unwatch(self._watched[key].back, _token(key))
            del self._watched[key]
        for key in [key for key in links if key not in self._watched]:
            bus.watch(links[key].back, _token(key))
            self._watched[key] = links[key]

    def _linked(self, key: Key, link: Link) -> bool:
        with self._lock:
            return self._links.get(key) is link

    def _next(self) -> tuple[Key, Link, Changes] | None:
        with self._lock:
            while self._todo:
                key = next(iter(self._todo))
                changes = self._todo.pop(key)
                link = self._links.get(key)
                if link is not None:
                    return key, link, changes
        return None

    def _tell(self, bus: Bus, key: Key, link: Link, changes: Changes) -> None:
        pairs = {decode(name): changes[name] for name in in_order([*changes])}

        def write(tx: Transaction) -> None:
            # What the toolstack has not made, or has removed, must not be made here; nor does a
            # guest have a say in a device that is being taken from it.
            if tx.get(f"{link.front}/backend") != link.back or not self._linked(key, link):
                return
            paths = [f"{link.front}/{name}" for name in pairs]
            there = tx.read_many(paths)
            wanted = [None if value is None else decode(value) for value in pairs.values()]
            each = list(zip(paths, there, wanted, strict=True))
            gone = [path for path, old, new in each if new is None and old is not None]
            left = [path for path in _left(tx, key, link) if path not in paths]
            tx.rm_many([*gone, *left])
            tx.write_many([(path, new) for path, old, new in each if new not in {None, old}])

        try:
            bus.transact(write, repeatable=True)
        except BusError:
            with self._lock:
                if key in self._links:
                    self._todo[key] = {**changes, **self._todo.get(key, {})}
            raise
        link.there = None

    def _look(self, bus: Bus, key: Key, link: Link) -> None:
        names = bus.children(link.back) or []  # none, once the toolstack has removed it
        known = [name for name in names if back_key(encode(name))]
        values = bus.read_many(f"{link.back}/{name}" for name in known)
        found = {
            encode(name): encode(value)
            for name, value in zip(known, values, strict=True)
            if value is not None and len(value) <= VALUE_MAX
        }
        with self._lock:
            self._found[key] = found
        os.eventfd_write(self._found_fd, 1)


def _left(tx: Transaction, key: Key, link: Link) -> list[str]:
    """What is on the bus of a front end that has removed it."""
    if link.there is None:
        return []
    names: list[str] = []
    for name in tx.directory(link.front):
        below = tx.directory(f"{link.front}/{name}") if name.startswith("queue-") else None
        names += [name] if below is None else [f"{name}/{leaf}" for leaf in below]
    kind = key[1].partition(b"/")[0]
    gone = [name for name in names if encode(name) not in link.there]
    return [f"{link.front}/{name}" for name in gone if front_key(kind, encode(name))]


def _token(key: Key) -> str:
    return f"{key[0]} {decode(key[1])}"
