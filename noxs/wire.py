"""The XenStore wire format: bytes in, values out, no I/O.

A message is a header of four little-endian u32 (type, req_id, tx_id, len) and ``len`` bytes of
payload (xen/include/public/io/xs_wire.h; docs/misc/xenstore.txt has the payloads). Paths, values
and tokens are ``bytes``: the protocol promises no encoding.
"""

import struct

CONTROL = 0
DIRECTORY = 1
READ = 2
GET_PERMS = 3
WATCH = 4
UNWATCH = 5
TRANSACTION_START = 6
TRANSACTION_END = 7
INTRODUCE = 8
RELEASE = 9
GET_DOMAIN_PATH = 10
WRITE = 11
MKDIR = 12
RM = 13
SET_PERMS = 14
WATCH_EVENT = 15
ERROR = 16
IS_DOMAIN_INTRODUCED = 17
RESUME = 18
SET_TARGET = 19
RESET_WATCHES = 21
DIRECTORY_PART = 22
NAMES = {
    value: name for name, value in dict(globals()).items() if name.isupper() and type(value) is int
}
"""Of the types above: as xenstored's log has them."""

HEADER = struct.Struct("<IIII")
HEADER_SIZE = 16
PAYLOAD_MAX = 4096
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048

DOMID_SELF = 0x7FF0
DOMID_MAX = 0xFFFF

PERM_NONE = 0
PERM_READ = 1
PERM_WRITE = 2
PERM_OWNER = 4
"""The owner's and the privileged callers' extra right; never stored in a node."""

Perms = tuple[tuple[int, int], ...]
"""A node's permissions: (domid, PERM_* bits); the first entry is the owner and the default."""

Message = tuple[int, int, int, bytes]
"""A decoded message: type, req_id, tx_id, payload."""

_PATH_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-/_@"
_LETTERS = {b"n": PERM_NONE, b"r": PERM_READ, b"w": PERM_WRITE, b"b": PERM_READ | PERM_WRITE}
_LETTER_OF = {mask: letter for letter, mask in _LETTERS.items()}


class StoreError(Exception):
    """A request that is answered with ERROR; ``name`` is the errno's name as it is sent."""

    def __init__(self, name: bytes) -> None:
        super().__init__(name)
        self.name = name


def pack(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """One message, header and payload, whatever the payload's length."""
    return HEADER.pack(op, req_id, tx_id, len(payload)) + payload


class Decoder:
    """Cuts a byte stream into messages.

    ``pending`` holds the bytes of a message that is not complete. A header that announces more
    than PAYLOAD_MAX ends the stream: it is kept in ``bad`` and nothing after it is decoded.
    """

    __slots__ = ("bad", "pending")

    def __init__(self, pending: bytes = b"") -> None:
        self.pending = pending
        self.bad: tuple[int, int, int, int] | None = None

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes of the stream, give the messages that they complete."""
        messages: list[Message] = []
        if self.bad is not None:
            return messages
        if self.pending:
            data = self.pending + data
        offset, size = 0, len(data)
        unpack = HEADER.unpack_from
        while size - offset >= HEADER_SIZE:
            op, req_id, tx_id, length = unpack(data, offset)
            if length > PAYLOAD_MAX:
                self.bad = (op, req_id, tx_id, length)
                break
            start = offset + HEADER_SIZE
            end = start + length
            if end > size:
                break
            messages.append((op, req_id, tx_id, data[start:end]))
            offset = end
        self.pending = data[offset:] if offset else data
        return messages


def strings(payload: bytes) -> list[bytes]:
    """The nul-terminated strings of a payload; what follows the last nul is left out."""
    return payload.split(b"\0")[:-1]


def one_string(payload: bytes) -> bytes:
    """The single string of a payload with exactly one nul, at its end. EINVAL otherwise."""
    if not payload or payload.find(b"\0") != len(payload) - 1:
        raise StoreError(b"EINVAL")
    return payload[:-1]


def parent(path: bytes) -> bytes:
    """The path of the node above; "/" for itself and for the special nodes."""
    return path[: path.rfind(b"/")] if path.rfind(b"/") > 0 else b"/"


def canonical(path: bytes, base: bytes, *, special: bool = False) -> bytes:
    """The absolute form of a path that a caller with the implicit path ``base`` sent.

    EINVAL for what the specification forbids: other characters, doubled or trailing slashes, the
    empty path, excessive length, and names starting with "@" unless ``special``. As in
    canonicalize() of tools/xenstored/core.c, REL_PATH_MAX bounds what follows
    "/local/domain/<domid>/", in an absolute path too.
    """
    if not path or path.translate(None, _PATH_BYTES):
        raise StoreError(b"EINVAL")
    if path[0] == 0x40:
        if not special:
            raise StoreError(b"EINVAL")
    elif path[0] != 0x2F:
        path = base + b"/" + path
    if (path[-1] == 0x2F and len(path) > 1) or b"//" in path:
        raise StoreError(b"EINVAL")
    if len(path) > REL_PATH_MAX and (
        len(path) > ABS_PATH_MAX or len(path) - _domain_prefix(path) > REL_PATH_MAX
    ):
        raise StoreError(b"EINVAL")
    return path


def _domain_prefix(path: bytes) -> int:
    head = b"/local/domain/"
    end = path.find(b"/", len(head))
    return end + 1 if path.startswith(head) and path[len(head) : end].isdigit() else 0


def parse_domid(text: bytes) -> int:
    """A decimal domain id, 0..65535. EINVAL otherwise."""
    if not text.isdigit() or len(text) > 5 or int(text) > DOMID_MAX:
        raise StoreError(b"EINVAL")
    return int(text)


def parse_perms(entries: list[bytes]) -> Perms:
    """Permissions from their wire form, such as ``[b"n0", b"r5"]``. EINVAL when malformed."""
    perms = []
    for entry in entries:
        mask = _LETTERS.get(entry[:1])
        if mask is None:
            raise StoreError(b"EINVAL")
        perms.append((parse_domid(entry[1:]), mask))
    return tuple(perms)


def format_perms(perms: Perms) -> bytes:
    """The reply to GET_PERMS: one nul-terminated string for each entry."""
    return b"".join(b"%s%d\0" % (_LETTER_OF[mask], domid) for domid, mask in perms)
