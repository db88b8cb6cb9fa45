"""noxsd: the store of a host without xenstored, for Dom0's kernel and for the toolstack.

It opens its devices, its socket and its journal's directory as root, then runs as an ordinary user
that holds nothing but their file descriptors. The socket belongs to root: its directory may be
entered by all, its mode is 0600 (0660 with ``--group``), and the peer's credentials are checked.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys

# The socket module, written in Python, takes 10 ms to import.
from _socket import AF_UNIX, SOCK_STREAM, SOL_SOCKET, socket

from noxs import lockfile
from noxs.broker import Broker
from noxs.daemon import boot_id, listen, run
from noxs.journal import Journal
from noxs.ring import PAGE_SIZE, Ring
from noxs.xenbus import XenBus
from xenctypes.errors import BusError, PermissionDenied, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

SOCKET = "/run/noxs/socket"
STATE = "/run/noxs/journal"
BACKEND = "/dev/xen/xenbus_backend"
XENSTORED_SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")

IOCTL_XENBUS_BACKEND_EVTCHN = 0x4200
"""_IOC(_IOC_NONE, 'B', 0, 0) of Linux's xen/xenbus_dev.h: the port that a store binds."""
SO_PEERGROUPS = 59
EINVAL = 22


class Options:
    """The command line's values, and their defaults."""

    socket = SOCKET
    state = STATE
    user = "noxs"
    group = ""
    socket_only = False
    verbose = False


class BoundChannel:
    """The event channel of Dom0's XenBus page."""

    def __init__(self, remote_port: int) -> None:
        from xenctypes.errors import CallFailed
        from xenctypes.evtchn import Evtchn

        self._evtchn = Evtchn()
        try:
            self._port = self._evtchn.bind_interdomain(0, remote_port)
        except CallFailed as error:
            if error.errno != EINVAL:
                raise
            raise BusError(
                f"Dom0's XenBus port {remote_port} is taken: another store serves this host",
                hint="stop it, or use it: noxsd and xenstored exclude each other",
            ) from error

    def fileno(self) -> int:
        """Readable when the kernel has notified."""
        return self._evtchn.fd

    def take(self) -> None:
        """Take the waiting event."""
        self._evtchn.unmask(self._evtchn.pending())

    def notify(self) -> None:
        """Wake the kernel."""
        self._evtchn.notify(self._port)


def log(message: str) -> None:
    """One line on stderr, where the service manager collects it."""
    sys.stderr.write(f"noxsd: {message}\n")
    sys.stderr.flush()


def parser() -> ArgumentParser:
    """The parser of the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="noxsd",
        description="The store of a Xen host without xenstored. Runs in the foreground.",
    )
    parser.add_argument("--socket", default=SOCKET, help="where to listen (%(default)s)")
    parser.add_argument(
        "--state",
        default=STATE,
        metavar="DIR",
        help='the journal, on a tmpfs; "" for none (%(default)s)',
    )
    parser.add_argument(
        "--user",
        default=Options.user,
        help='run as this user, by name or number; "" to stay root (%(default)s, or nobody)',
    )
    parser.add_argument("--group", default="", help="let this group's members connect too")
    parser.add_argument(
        "--socket-only",
        action="store_true",
        help="leave Dom0's kernel alone: a store for clients of the socket only",
    )
    parser.add_argument("--foreground", action="store_true", help="the default, and only, mode")
    return parser


def parse(argv: list[str]) -> Options:
    """The options; without arguments argparse is not even imported."""
    options = Options()
    if argv:
        parser().parse_args(argv, namespace=options)
    return options


def refuse_beside_xenstored() -> None:
    """Raise BusError if another store answers on xenstored's socket."""
    for path in XENSTORED_SOCKETS:
        probe = socket(AF_UNIX, SOCK_STREAM)
        try:
            probe.connect(path)
        except OSError:
            continue
        finally:
            probe.close()
        raise BusError(
            f"xenstored serves this host ({path} answers)",
            hint="use it, or disable xenstored and reboot; noxsd cannot take over from it",
        )


def open_page() -> tuple[memoryview, int]:
    """Dom0's XenBus page, mapped, and the event channel port to bind. NoXen, PermissionDenied."""
    from xenctypes.errors import NoXen

    try:
        fd = os.open(BACKEND, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise PermissionDenied(f"{BACKEND}: {error.strerror}", hint="run noxsd as root") from error
    except OSError as error:
        raise NoXen(
            f"{BACKEND}: {error.strerror}", hint="noxsd runs in Dom0, or with --socket-only"
        ) from error
    try:
        port = fcntl.ioctl(fd, IOCTL_XENBUS_BACKEND_EVTCHN)
        page = mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    return memoryview(page), port


def user_ids(name: str) -> tuple[int, int]:
    """A user's uid and gid; ``nobody``'s if the default user does not exist."""
    import pwd

    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError as error:
        if name.isdigit():
            return int(name), int(name)
        if name != Options.user:
            raise UsageError(f"--user {name}: no such user") from error
        return 65534, 65534
    return entry.pw_uid, entry.pw_gid


def group_id(name: str) -> int:
    """A group's gid; -1 for the empty name."""
    if not name:
        return -1
    import grp

    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise UsageError(f"--group {name}: no such group") from error


def state_directory(path: str, uid: int, gid: int) -> Journal | None:
    """The journal in its directory, which only the daemon's user can enter."""
    if not path:
        return None
    os.makedirs(path, mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.fchown(fd, uid, gid)
    os.fchmod(fd, 0o700)
    for name in os.listdir(fd):
        os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
    os.close(fd)
    return Journal(path)


def drop_privileges(uid: int, gid: int) -> None:
    """Become the user for good."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def admission(group: int) -> Callable[[socket, int, int], bool]:
    """Who may connect: root, the user who started noxsd, and the members of the group."""
    users = {0, os.getuid()}

    def admit(sock: socket, uid: int, gid: int) -> bool:
        if uid in users or gid == group:
            return True
        if group < 0:
            return False
        try:
            groups = sock.getsockopt(SOL_SOCKET, SO_PEERGROUPS, 1024)
        except OSError as error:
            log(f"the groups of a process of user {uid}: {error.strerror}")
            return False
        return group in memoryview(groups).cast("I")

    return admit


def start(options: Options) -> Broker:
    """Everything before the first request, as root and then as the user."""
    root = os.geteuid() == 0
    group = group_id(options.group)
    admit = admission(group)
    directory = os.path.dirname(options.socket) or "."
    os.makedirs(directory, mode=0o755, exist_ok=True)
    lockfile.take(options.socket + ".lock", "noxsd")
    page = None
    if not options.socket_only:
        refuse_beside_xenstored()
        page, port = open_page()
        channel = BoundChannel(port)
    listener = listen(options.socket, group)
    drop = root and options.user
    uid, gid = user_ids(options.user) if drop else (os.geteuid(), os.getegid())
    journal = state_directory(options.state, uid, gid)
    if drop:
        drop_privileges(uid, gid)
    broker = Broker(listener, journal=journal, boot=boot_id(), admit=admit, log=log)
    if page is not None:
        broker.xenbus = XenBus(Ring(page), channel, broker.store)
    broker.restore()
    return broker


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(lambda: start(parse(arguments)), log)


if __name__ == "__main__":
    sys.exit(main())
