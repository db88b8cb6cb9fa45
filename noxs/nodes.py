"""What a client can ask of a store about nodes, whatever carries the requests.

Paths and values are str; bytes that are not UTF-8 survive as surrogate escapes. A path that does
not start with "/" is relative to /local/domain/0.
"""

from __future__ import annotations

import errno as errnos

from noxs import wire
from xenctypes.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from noxs.wire import Message

    Value = str | int
    Request = tuple[int, bytes, str]

NAMES = {
    wire.CONTROL: "control",
    wire.DIRECTORY: "directory",
    wire.DIRECTORY_PART: "directory",
    wire.GET_PERMS: "get perms",
    wire.INTRODUCE: "introduce",
    wire.IS_DOMAIN_INTRODUCED: "is domain introduced",
    wire.MKDIR: "mkdir",
    wire.READ: "read",
    wire.RELEASE: "release",
    wire.RM: "rm",
    wire.SET_PERMS: "set perms",
    wire.TRANSACTION_END: "transaction end",
    wire.TRANSACTION_START: "transaction start",
    wire.UNWATCH: "unwatch",
    wire.WATCH: "watch",
    wire.WRITE: "write",
}


def encode(text: Value) -> bytes:
    """A value as it is sent."""
    return str(text).encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """A value as it was received."""
    return data.decode("utf-8", "surrogateescape")


def string(text: Value) -> bytes:
    """A path, token or number as it is sent: with a nul."""
    data = encode(text)
    if b"\0" in data:
        raise BusError(f"{text!r}: contains a nul byte", path=str(text), errno=errnos.EINVAL)
    return data + b"\0"


class Nodes:
    """The requests about nodes, the same inside a transaction and outside.

    All raise BusError with ``path`` and ``errno``: ENOENT, EACCES, EINVAL (not a path), and
    in a transaction EAGAIN when it was lost together with its server.
    """

    def exchange(self, requests: list[Request]) -> list[Message]:
        """Send the requests without waiting in between; their replies, in order."""
        raise NotImplementedError

    def ask(self, op: int, payload: bytes, path: str) -> bytes:
        """Send one request; the payload of its reply, or BusError."""
        request = (op, payload, path)
        return result(request, self.exchange([request])[0])

    def read(self, path: str) -> str:
        """A node's value."""
        return decode(self.ask(wire.READ, string(path), path))

    def get(self, path: str, default: str | None = None) -> str | None:
        """A node's value, or the default if there is no such node."""
        value = self.read_many([path])[0]
        return default if value is None else value

    def read_many(self, paths: Iterable[str]) -> list[str | None]:
        """Many values for one round trip; None where there is no node."""
        requests = [(wire.READ, string(path), path) for path in paths]
        values = (
            result_or_none(*pair) for pair in zip(requests, self.exchange(requests), strict=True)
        )
        return [None if value is None else decode(value) for value in values]

    def exists(self, path: str) -> bool:
        """Whether there is such a node."""
        return self.get(path) is not None

    def write(self, path: str, value: Value) -> None:
        """Set a node's value; creates it and those above it as needed."""
        self.ask(wire.WRITE, string(path) + encode(value), path)

    def write_many(self, pairs: Iterable[tuple[str, Value]]) -> None:
        """Set many values, in this order, for one round trip; raises the first error, late."""
        requests = [(wire.WRITE, string(path) + encode(value), path) for path, value in pairs]
        for pair in zip(requests, self.exchange(requests), strict=True):
            result(*pair)

    def mkdir(self, path: str) -> None:
        """Make sure that a node exists; creates it with an empty value."""
        self.ask(wire.MKDIR, string(path), path)

    def rm(self, path: str) -> None:
        """Remove a node and all below it. Not an error if it does not exist."""
        self.rm_many([path])

    def rm_many(self, paths: Iterable[str]) -> None:
        """Remove many nodes with all below them, for one round trip."""
        requests = [(wire.RM, string(path), path) for path in paths]
        for pair in zip(requests, self.exchange(requests), strict=True):
            result_or_none(*pair)

    def directory(self, path: str) -> list[str]:
        """The names of the nodes right below a node."""
        try:
            names = self.ask(wire.DIRECTORY, string(path), path)
        except BusError as error:
            if error.errno != errnos.E2BIG:
                raise
            names = self._directory_in_parts(path)
        return decode(names).split("\0")[:-1]

    def children(self, path: str) -> list[str] | None:
        """As ``directory``, but None where there is no node."""
        try:
            return self.directory(path)
        except BusError as error:
            if error.errno != errnos.ENOENT:
                raise
            return None

    def _directory_in_parts(self, path: str) -> bytes:
        while True:
            names, generation = b"", None
            while not names.endswith(b"\0\0"):
                payload = string(path) + string(len(names))
                part = self.ask(wire.DIRECTORY_PART, payload, path)
                current, _, rest = part.partition(b"\0")
                if generation not in {None, current}:
                    break
                generation = current
                names += rest
            else:
                return names[:-1]

    def perms(self, path: str) -> list[str]:
        """A node's permissions, such as ["n0", "r5"]; the owner's entry first."""
        return decode(self.ask(wire.GET_PERMS, string(path), path)).split("\0")[:-1]

    def set_perms(self, path: str, perms: Iterable[str]) -> None:
        """Replace a node's permissions."""
        payload = string(path) + b"".join(map(string, perms))
        self.ask(wire.SET_PERMS, payload, path)


def result(request: Request, reply: Message) -> bytes:
    """A reply's payload; BusError if it is an error."""
    op, _, path = request
    if reply[0] == op:
        return reply[3]
    name = reply[3].rstrip(b"\0").decode("latin-1")
    subject = f"{NAMES[op]} {path}" if path else NAMES[op]
    raise BusError(f"{subject}: {name}", path=path, errno=getattr(errnos, name, errnos.EIO))


def result_or_none(request: Request, reply: Message) -> bytes | None:
    """As ``result``, but None for ENOENT."""
    if reply[0] == wire.ERROR and reply[3] == b"ENOENT\0":
        return None
    return result(request, reply)
