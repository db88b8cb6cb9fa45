"""An append-only journal with snapshots, for a process that may be killed at any instruction.

The directory holds numbered generations: ``snapshot.N`` is a complete state, ``log.N`` the records
appended since. ``rotate`` starts log N+1 at once and lets a child write snapshot N+1 of the same
moment, after which generation N is deleted; until then the state is snapshot N with both logs. A
record counts once it is wholly in its file: a torn one can only be the last of the last log, and is
cut off by ``recover``.

Files: a snapshot is b"noxs" + u32 version + u32 crc + the state; a log record is u32 length + u32
crc + the record. The crc is CRC-32. Nothing is synced: the journal outlives the process, not the
boot, and belongs on a tmpfs.
"""

from __future__ import annotations

import os
import struct
from binascii import crc32

from xenctypes.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAGIC = b"noxs"
VERSION = 1
NEW = ".new"
"""Behind the name of a snapshot that is being written."""
HINT = "the kernel's watches are lost with it: reboot the host"
"""What to do about noxsd's journal."""
_FRAME = struct.Struct("<II")
_HEAD = struct.Struct("<4sII")


class Journal:
    """The journal in one directory, which must exist and belong to one process at a time.

    ``length`` is the size in bytes of the current log, ``base`` that of the snapshot before it,
    ``hint`` the way out when the journal is damaged.
    """

    def __init__(self, directory: str, *, hint: str = HINT) -> None:
        self.directory = directory
        self.hint = hint
        self.number = -1
        self.length = 0
        self.base = 0
        self.child = 0
        self._fd = -1

    def recover(self) -> tuple[bytes | None, list[bytes]]:
        """The last complete snapshot and the records since; (None, []) for an empty directory."""
        snapshots, logs = self._numbers("snapshot."), self._numbers("log.")
        if not snapshots:
            if any(os.stat(self._path("log", number)).st_size for number in logs):
                raise StateError(f"{self.directory}: logs without a snapshot", hint=self.hint)
            return None, []
        first = max(snapshots)
        state = self._read_snapshot(first)
        records: list[bytes] = []
        last = max([n for n in logs if n >= first], default=first)
        for number in range(first, last + 1):
            good = self._read_log(number, records, last=number == last)
        self._open_log(last, good)
        self.base = len(state)
        self._clean(first)
        return state, records

    def append(self, record: bytes) -> None:
        """Add one record: wholly, or OSError and not at all."""
        data = _FRAME.pack(len(record), crc32(record)) + record
        try:
            written = os.write(self._fd, data)
        except OSError:
            written = 0
        if written != len(data):
            # A full file system; a second attempt gives the reason, or the rest.
            os.ftruncate(self._fd, self.length)
            written = os.write(self._fd, data)
            if written != len(data):
                os.ftruncate(self._fd, self.length)
                raise OSError(28, f"{self.directory}: no space for a journal record")
        self.length += written

    def rotate(self, state: Callable[[], bytes]) -> int:
        """Start the next log; a child process writes ``state()`` as its snapshot: its pid."""
        assert not self.child
        self._next_log()
        number = self.number
        self.child = os.fork()
        if not self.child:
            try:
                # Nothing of the daemon's may outlive it here: its lock, its port, its sockets.
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                self._write_snapshot(number, state())
            except BaseException as error:  # noqa: BLE001 - a forked child must not return
                os.write(2, f"noxsd: snapshot {number}: {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        return self.child

    def settle(self) -> bool:
        """Reap the child that ``rotate`` started; whether its snapshot is complete."""
        _, status = os.waitpid(self.child, 0)
        self.child = 0
        if status:
            return False
        self.base = os.stat(self._path("snapshot", self.number)).st_size
        self._clean(self.number)
        return True

    def replace(self, state: bytes) -> None:
        """Make ``state`` the only snapshot, with an empty log.

        OSError: the journal is as it was, or has an empty log more.
        """
        if self.child:
            self.settle()
        if self._fd < 0 or self.length:
            self._next_log()
        self._write_snapshot(self.number, state)
        self.base = len(state)
        self._clean(self.number)

    def close(self) -> None:
        """Close the log; the journal stays as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _path(self, kind: str, number: int) -> str:
        return f"{self.directory}/{kind}.{number}"

    def _numbers(self, prefix: str) -> list[int]:
        names = [n.removeprefix(prefix) for n in os.listdir(self.directory) if n.startswith(prefix)]
        return [int(name) for name in names if name.isdigit()]

    def _next_log(self) -> None:
        before = self._fd
        self._open_log(self.number + 1, 0)
        if before >= 0:
            os.close(before)

    def _open_log(self, number: int, length: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path("log", number), flags, 0o600)
        try:
            os.ftruncate(fd, length)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.number = number
        self.length = length

    def _read_snapshot(self, number: int) -> bytes:
        path = self._path("snapshot", number)
        data = _slurp(path)
        if len(data) >= _HEAD.size:
            magic, version, crc = _HEAD.unpack_from(data)
            state = data[_HEAD.size :]
            if magic == MAGIC and version != VERSION:
                raise StateError(
                    f"{path}: journal version {version}, not {VERSION}", hint=self.hint
                )
            if magic == MAGIC and crc == crc32(state):
                return state
        raise StateError(f"{path}: damaged", hint=self.hint)

    def _write_snapshot(self, number: int, state: bytes) -> None:
        path = self._path("snapshot", number)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path + NEW, flags, 0o600)
        try:
            with open(fd, "wb", buffering=0) as file:
                data = memoryview(_HEAD.pack(MAGIC, VERSION, crc32(state)) + state)
                while data:
                    data = data[file.write(data) :]
            os.rename(path + NEW, path)
        except OSError:
            os.unlink(path + NEW)  # its room is what others lack
            raise

    def _read_log(self, number: int, records: list[bytes], *, last: bool) -> int:
        """Append the log's records; the offset behind the last good one."""
        path = self._path("log", number)
        data = _slurp(path) if os.path.lexists(path) else b""
        offset = 0
        while len(data) - offset >= _FRAME.size:
            length, crc = _FRAME.unpack_from(data, offset)
            start = offset + _FRAME.size
            record = data[start : start + length]
            if len(record) != length or crc32(record) != crc:
                break
            records.append(record)
            offset = start + length
        if offset != len(data) and not last:
            raise StateError(f"{path}: damaged at byte {offset}", hint=self.hint)
        return offset

    def _clean(self, number: int) -> None:
        """Delete what lies before a complete snapshot, and what a killed writer left."""
        for name in os.listdir(self.directory):
            if name.startswith("snapshot.") and name.endswith(NEW):
                os.unlink(f"{self.directory}/{name}")
        for kind in ("snapshot", "log"):
            for old in self._numbers(kind + "."):
                if old < number:
                    os.unlink(self._path(kind, old))


def _slurp(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        return file.read()
