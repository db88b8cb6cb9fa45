"""Names and records of domains, kept by the UUID that the hypervisor stores.

::

    /run/chaos/                     0700
        lock                        flock: held to rewrite a record or to reap, never for a create
        chaosd.lock                 flock: held by the daemon for as long as it runs
        names/=<name>  -> <uuid>    symlink: made atomically, so one of two racing creates wins
        macs/<mac>     -> <uuid>    the same for MAC addresses
        domains/<uuid>/             flock: held by whoever builds or destroys the domain
            domain.json             the record, written to a temporary name and renamed
            console.log, .log.1     what the console said (chaos.consolelog)
            console.lock            flock: held by a command that is attached to it

A domain whose UUID changes has one of two, the one that its directory is named by or the one in
its record, until both are the same again (``move_shell``, ``begin_rekey``).

A record whose directory nobody locks and whose domain the hypervisor does not
know, or whose state is "building" or "ending", was left by a process that died: the
next command reaps it. A record in the state "shell" is the daemon's: a domain that
waits in its pool, has no name yet, and is reaped like the others once no daemon runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from dataclasses import dataclass, field, fields
from threading import get_ident
from typing import TYPE_CHECKING, Any

from noxs import lockfile
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from types import TracebackType
    from typing import Self

RUN_DIR = "/run/chaos"
DAEMON_LOCK = "chaosd.lock"
BUILDING = "building"
SHELL = "shell"
RUNNING = "running"
ENDING = "ending"
FORMAT = 1
STAGED = ".new-"
DIRECTORIES = ("names", "domains", "macs")
MAC_PREFIX = b"\x00\x16\x3e"  # Xen's OUI
MAC_ATTEMPTS = 1000


@dataclass(slots=True)
class Record:
    """What the toolstack remembers of a domain; the hypervisor's own truth is never copied.

    ``console_frame`` and ``store_frame`` are the machine frames of the console ring and the
    device page (or XenStore ring), -1 before they are known. ``console_port`` and
    ``store_port`` are event channels on the guest's side; 0 means none. ``store`` is who serves its
    XenStore (chaos.store), "" for nobody and for noxs guests.
    ``macs`` are the addresses of its vifs, in their order, ``disks`` its disks (chaos.disk.entry).
    ``paused`` is whether it was created to stay paused. ``owner`` is with whose rights its image is
    opened again, "uid", "gid" and "groups", None for root's.
    ``created`` is seconds since the epoch; ``ready_ms`` the time from unpause to the guest's
    ready event, None until it was seen.
    """

    uuid: str
    name: str
    state: str = BUILDING
    domid: int = -1
    noxs: bool = False
    paused: bool = False
    console_frame: int = -1
    console_port: int = 0
    store_frame: int = -1
    store_port: int = 0
    store: str = ""
    macs: list[str] = field(default_factory=list)
    disks: list[dict[str, Any]] = field(default_factory=list)
    created: float = 0.0
    ready_ms: float | None = None
    owner: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self, config: str = "") -> str:
        """The record as the text of domain.json; ``config`` is the configuration's, if known."""
        values = {name: getattr(self, name) for name in _FIELDS}
        text = json.dumps({"format": FORMAT, **values})
        return f'{text[:-1]}, "config": {config or json.dumps(self.config)}}}'

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Read domain.json; StateError if it is not one of ours."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise StateError("domain record of another version", hint="restart the domain")
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"damaged domain record: {error}") from error


_FIELDS = tuple(field.name for field in fields(Record) if field.name != "config")


class Entry:
    """One domain's directory, opened; hold the lock while the domain is built or destroyed."""

    def __init__(self, registry: Registry, uuid: str) -> None:
        self.uuid = uuid
        self.path = f"{registry.path}/domains/{uuid}"
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def lock(self, *, wait: bool) -> bool:
        """Take the domain's lock; False if another process holds it and ``wait`` is False.

        Raises StateError if the directory is gone.
        """
        while True:
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                raise StateError(f"domain {self.uuid} is gone") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(fd)
                return False
            except BaseException:
                os.close(fd)
                raise
            if self._is_at_path(fd):  # neither removed nor renamed while we waited
                self._fd = fd
                return True
            os.close(fd)

    def _is_at_path(self, fd: int) -> bool:
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False
        then = os.fstat(fd)
        return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)

    def close(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, record: Record) -> None:
        """Store the record atomically."""
        _write_atomically(f"{self.path}/domain.json", record.to_json())


class Registry:
    """The directory of names and records."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path or os.environ.get("CHAOS_RUN_DIR") or RUN_DIR
        self._locked = False

    def prepare(self) -> None:
        """Make the directories; StateError if that is not allowed."""
        try:
            for directory in (self.path, *(f"{self.path}/{name}" for name in DIRECTORIES)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
        except OSError as error:
            raise StateError(
                f"cannot use {self.path}: {error.strerror}", hint="run as root"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the registry's lock, for renames and reaps; again by the same holder is fine."""
        if self._locked:
            yield
            return
        fd = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._locked = True
            yield
        finally:
            self._locked = False
            os.close(fd)

    @contextlib.contextmanager
    def owning(self, uuid: str) -> Iterator[Entry]:
        """Hold the registry's lock and a domain's; StateError if that is gone.

        While somebody else has the domain's, which may take a while, the registry is free.
        """
        with self.entry(uuid) as entry:
            while True:
                with self.locked():
                    if entry.lock(wait=False):
                        yield entry
                        return
                entry.lock(wait=True)
                entry.close()

    def daemon_runs(self) -> bool:
        """Whether a chaosd holds its lock on this registry."""
        return lockfile.held(f"{self.path}/{DAEMON_LOCK}")

    def add_shell(self, record: Record) -> Entry:
        """Make the directory of a domain that has no name yet; not locked. StateError if it exists.

        For the daemon, whose lock stands for the locks of all its shells.
        """
        staged, directory = self._staging(record), f"{self.path}/domains/{record.uuid}"
        os.mkdir(staged, 0o700)
        try:
            _write_new(f"{staged}/domain.json", record.to_json())
            os.rename(staged, directory)
        except OSError as error:
            _remove_directory(staged)
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            raise self._uuid_taken(record.uuid) from None
        return Entry(self, record.uuid)

    def replace_record(self, uuid: str, text: str) -> int:
        """Have a shell's record in a new file; that one, open for writing. OSError."""
        path = f"{self.path}/domains/{uuid}/domain.json"
        temporary = f"{path}.new-{os.getpid()}-{get_ident()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, text, path)
            os.rename(temporary, path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        return fd

    def move_shell(self, old: str, new: str) -> None:
        """Give a shell's directory another UUID. StateError if that is taken."""
        try:
            os.rename(f"{self.path}/domains/{old}", f"{self.path}/domains/{new}")
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            raise self._uuid_taken(new) from None

    def link_name(self, name: str, uuid: str) -> None:
        """Give a name to a UUID. StateError if another domain has it."""
        self._link(name, uuid)

    def unlink_name(self, name: str, uuid: str) -> None:
        """Take a name away from a UUID; not from another one."""
        self._unlink(name, uuid)

    def _uuid_taken(self, uuid: str) -> StateError:
        return StateError(
            f"a domain with UUID {uuid} exists already",
            hint="remove uuid= from the configuration to have one generated",
        )

    def reserve(self, record: Record) -> Entry:
        """Take the record's name and UUID for a domain about to be built.

        Returns its entry, locked. Raises StateError if the name or the UUID is taken.
        """
        self.prepare()
        directory = f"{self.path}/domains/{record.uuid}"
        entry = self._stage(record)
        try:
            try:
                os.rename(entry.path, directory)
            except OSError as error:
                if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                    raise
                raise self._uuid_taken(record.uuid) from None
            entry.path = directory
            self._link(record.name, record.uuid)
        except BaseException:
            if entry.path == directory:  # interrupted when the link was made, perhaps
                self._unlink(record.name, record.uuid)
            self._discard(entry)
            entry.close()
            raise
        return entry

    def _stage(self, record: Record) -> Entry:
        """A locked directory with the record in it, under a name that no reader looks at."""
        entry = Entry(self, record.uuid)
        entry.path = self._staging(record)
        os.mkdir(entry.path, 0o700)
        try:
            entry.lock(wait=True)
            _write_new(f"{entry.path}/domain.json", record.to_json())
        except BaseException:
            _remove_directory(entry.path)
            entry.close()
            raise
        return entry

    def _staging(self, record: Record) -> str:
        return f"{self.path}/domains/{STAGED}{os.getpid()}-{record.uuid}"

    def rename(self, entry: Entry, record: Record, name: str) -> None:
        """Give a domain another name; StateError if that is taken. The caller holds its lock."""
        old = record.name
        self._link(name, record.uuid)
        record.name = name
        try:
            entry.write(record)
        except BaseException:
            record.name = old
            self._unlink(name, record.uuid)
            raise
        self._unlink(old, record.uuid)

    def begin_rekey(self, entry: Entry, record: Record, uuid: str, name: str) -> None:
        """Say in its record which UUID and name a domain is to have, before it gets them.

        The caller holds the registry's lock and the domain's, gives the domain the UUID next, and
        calls ``finish_rekey`` then. StateError if the name is taken.
        """
        self._link(name, uuid)
        record.uuid, record.name = uuid, name
        entry.write(record)

    def finish_rekey(self, entry: Entry, record: Record) -> None:
        """Let another domain have the UUID and name that this one had: it has those of its record.

        Also what another process had begun: the link of the new name may have been swept away.
        """
        try:
            self._link(record.name, record.uuid)
        except StateError:
            record.name = self.free_name(record.name)
            self._link(record.name, record.uuid)
            entry.write(record)
        before, entry.uuid = entry.uuid, record.uuid
        path = f"{self.path}/domains/{record.uuid}"
        os.rename(entry.path, path)
        entry.path = path
        self._unlink_all(before)

    def _unlink_all(self, uuid: str) -> None:
        for name in os.listdir(f"{self.path}/names"):
            self._drop_link(f"{self.path}/names/{name}", uuid)

    def free_name(self, name: str) -> str:
        """``name-1``, or with the first higher number that is free."""
        number = 1
        while self.uuid_of(f"{name}-{number}") is not None:
            number += 1
        return f"{name}-{number}"

    def forget(self, entry: Entry, record: Record) -> None:
        """Drop a domain's name and record; the caller holds its lock. Idempotent.

        Of one that was to get another UUID and name: both of its names.
        """
        self._unlink(record.name, record.uuid)
        if entry.uuid != record.uuid:
            self._unlink_all(entry.uuid)
        for mac in record.macs:
            self.release_mac(mac, record.uuid)
        self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        """Remove a domain's directory; a missing one is fine.

        Under a name of our own: where it was, another's may be as soon as it is empty.
        """
        gone = f"{self.path}/domains/{STAGED}{os.getpid()}-{get_ident()}-gone-{entry.uuid}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry.path, gone)
        _remove_directory(gone)

    def reserve_mac(
        self, mac: bytes | None, uuid: str, taken: Container[str] = frozenset()
    ) -> bytes:
        """Take a MAC address for a domain, a random one of Xen's if ``mac`` is None.

        Raises StateError if another domain of ours has it, or if it is in ``taken``.
        """
        for _ in range(MAC_ATTEMPTS):
            wanted = mac or MAC_PREFIX + os.urandom(3)
            text = wanted.hex(":")
            if text in taken:
                if mac is not None:
                    raise self._mac_taken(mac, "")
                continue
            path = f"{self.path}/macs/{text}"
            try:
                os.symlink(uuid, path)
            except FileExistsError:
                owner = _read_link(path)
                if owner == uuid:
                    return wanted
                if owner is None or self._drop_if_stale(path, owner):
                    continue
                if mac is not None:
                    raise self._mac_taken(mac, owner) from None
            else:
                return wanted
        raise StateError("no free MAC address found", hint="give one with mac=")

    def release_mac(self, mac: str, uuid: str) -> None:
        """Give back a MAC address, in the usual notation; not if another domain has it now."""
        self._drop_link(f"{self.path}/macs/{mac}", uuid)

    def move_mac(self, mac: bytes, old: str, new: str) -> None:
        """Give the address of a shell whose UUID changes to the new one."""
        path = f"{self.path}/macs/{mac.hex(':')}"
        self._drop_link(path, old)
        os.symlink(new, path)

    def _drop_if_stale(self, path: str, owner: str) -> bool:
        """Drop the link of a domain that was killed half made; whether that was so."""
        if os.path.exists(f"{self.path}/domains/{owner}"):
            return False  # the commonest case, which waits for nobody's lock
        with self.locked():
            stale = not os.path.exists(f"{self.path}/domains/{owner}")
            if stale:
                self._drop_link(path, owner)
            return stale

    def _mac_taken(self, mac: bytes, owner: str) -> StateError:
        record = self.read(owner)
        named = f' by "{record.name}"' if record else ""
        return StateError(
            f"the MAC address {mac.hex(':')} is in use{named}",
            hint="leave mac= out to have one generated",
        )

    def uuid_of(self, name: str) -> str | None:
        """The UUID that owns ``name``, or None."""
        return _read_link(self._name_path(name))

    def read(self, uuid: str) -> Record | None:
        """The record of a UUID, or None if we have none."""
        try:
            with open(f"{self.path}/domains/{uuid}/domain.json", "rb") as file:
                return Record.from_json(file.read())
        except FileNotFoundError:
            return None

    def has(self, uuid: str) -> bool:
        """Whether there is a directory of that UUID."""
        return os.path.exists(f"{self.path}/domains/{uuid}")

    def uuids(self) -> list[str]:
        """All UUIDs that have a directory."""
        return [name for name in self._listing() if not name.startswith(STAGED)]

    def has_stale_staging(self) -> bool:
        """Whether ``sweep`` would find something."""
        return any(True for _ in self._stale_staging())

    def sweep(self) -> None:
        """Remove what makers that died left; the caller holds the registry's lock."""
        for name in self._stale_staging():
            _remove_directory(f"{self.path}/domains/{name}")
        for kind in ("names", "macs"):
            for name in os.listdir(f"{self.path}/{kind}"):
                path = f"{self.path}/{kind}/{name}"
                owner = _read_link(path)
                if owner is not None and not os.path.exists(f"{self.path}/domains/{owner}"):
                    self._drop_link(path, owner)

    def _stale_staging(self) -> Iterator[str]:
        for name in self._listing():
            if name.startswith(STAGED):
                pid = name.removeprefix(STAGED).partition("-")[0]
                if not os.path.exists(f"/proc/{pid}"):
                    yield name

    def _listing(self) -> list[str]:
        try:
            return os.listdir(f"{self.path}/domains")
        except FileNotFoundError:
            return []

    def entry(self, uuid: str) -> Entry:
        """The entry of a UUID, not locked."""
        return Entry(self, uuid)

    def _link(self, name: str, uuid: str) -> None:
        try:
            os.symlink(uuid, self._name_path(name))
        except FileExistsError:
            path = self._name_path(name)
            owner = self.uuid_of(name)
            if owner == uuid:
                return
            if owner is None or self._drop_if_stale(path, owner):
                self._link(name, uuid)
                return
            raise name_taken(name) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise StateError(f'the name "{name[:32]}..." is too long') from None

    def _unlink(self, name: str, uuid: str) -> None:
        self._drop_link(self._name_path(name), uuid)

    def _drop_link(self, path: str, uuid: str) -> None:
        if _read_link(path) == uuid:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _name_path(self, name: str) -> str:
        # A name holds no slash (chaos.config); a leading dot is kept from meaning a directory.
        return f"{self.path}/names/={name}"


def name_taken(name: str) -> StateError:
    """The error that says so."""
    return StateError(
        f'a domain named "{name}" exists already',
        hint=f"choose another name, or chaos destroy {name}",
    )


def _read_link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except (OSError, ValueError):  # the latter: what is no path, such as a name with a NUL
        return None


def _write_new(path: str, text: str) -> None:
    """Write a file where nobody looks yet. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(fd, text, path)
    finally:
        os.close(fd)


def _write_all(fd: int, text: str, path: str) -> None:
    data = text.encode()
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _write_atomically(path: str, text: str) -> None:
    temporary = f"{path}.new-{os.getpid()}-{get_ident()}"  # of this writer alone
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _remove_directory(path: str) -> None:
    """Remove a domain's directory and the files in it; a missing one is fine."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}/{name}")
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        _remove_directory(path)  # somebody attached to the console meanwhile
