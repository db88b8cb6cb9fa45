"""Builder processes: libxenguest parses other people's images, so it does so elsewhere.

A builder is forked ahead of need and serves one request at a time over a socket
pair: populate a domain's memory, load an image into it, or both. An image that
crashes the parser kills a builder and fails one create; the domain itself is
made and destroyed by the parent.

::

    parent                              builder
      | populate(domid, pages...)  --->  xc_dom_allocate .. xc_dom_boot_mem_init
      | <--- done
      | load(image fds, ports...)  --->  xc_dom_kernel_file .. xc_dom_gnttab_init
      | <--- frames of the console ring, the store page and start_info
      | drop(domid)                --->  xc_dom_release
      | end of file                --->  exit

Requests and replies are one msgpack value in one SOCK_SEQPACKET message; file
descriptors travel beside it (SCM_RIGHTS). A reply is {"ok": values} or
{"error": [class, message, hint]}.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from chaos import acpi, pvh
from chaos.image import RAMDISK_MAX, adopt_image, inspect, refusal
from chaos.xldoc import printable
from xenctypes.errors import CallFailed, ChaosError, ImageError, XenError
from xenctypes.public import XC_DOM_HVM_CONTAINER, XC_DOM_PV_CONTAINER, XC_PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from xenctypes.ctrl import Xenctrl
    from xenctypes.guest import DomBuilder

MESSAGE_MAX = 16384
TEXT_MAX = 400  # characters of an error that are shown
KERNEL_MAX = 512 << 20  # bytes, after decompression
KERNEL_FLOOR = 128 << 20  # what any kernel may unpack to, symbols and all
WORKSPACE = 128 << 20  # bytes beside the kernel: a decompressor's dictionary above all
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
GUEST_TYPES = {"pv": b"xen-3.0-x86_64", "pvh": b"hvm-3.0-x86_32"}
"""What libxenguest calls them; a PVH guest starts in 32-bit mode, whatever it is."""
SIF_MOD_START_PFN = 1 << 3  # public/xen.h: mod_start is a pfn
STATM_MAX = 256  # bytes of seven numbers
PATIENCE = 120.0  # seconds for one request, after which a builder counts as hung


class Loaded(NamedTuple):
    """Where libxenguest put things: machine frames of a PV domain, guest frames of a PVH one.

    A PVH guest has no start_info of this kind: its frame is 0.
    """

    console_frame: int
    store_frame: int
    start_info_frame: int


class Builder:
    """The parent's end of a builder process. One request at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_builder(theirs, parent)
        theirs.close()
        self._socket = ours
        self.pid = pid
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process has not been closed; it may still have died unnoticed."""
        return self.pid > 0

    def populate(self, domid: int, *, kind: str, mib: int, reserved: int = 0) -> list[int]:
        """Give a fresh domain of type ``kind`` ``mib`` MiB of memory.

        The last ``reserved`` pages of it, below 4 GiB if it is PVH, are the toolstack's: their
        frames are returned, and an image that would reach into them is refused.
        """
        request = {"do": "populate", "domid": domid, "kind": kind, "mib": mib, "reserved": reserved}
        return _frames(self._call(request), reserved)

    def load(
        self,
        domid: int,
        *,
        kernel: int,
        ramdisk: int | None,
        cmdline: bytes,
        vcpus: int,
        console_port: int,
        store_port: int,
        reserved: int = 0,
    ) -> Loaded:
        """Build the image behind the descriptors into a populated domain.

        Raises ImageError when libxenguest refuses the image or dies of it.
        """
        fds = [kernel] if ramdisk is None else [kernel, ramdisk]
        request = {
            "do": "load",
            "domid": domid,
            "ramdisk": ramdisk is not None,
            "reserved": reserved,
            "cmdline": cmdline,
            "vcpus": vcpus,
            "console_port": console_port,
            "store_port": store_port,
        }
        return Loaded(*_frames(self._call(request, fds), len(Loaded._fields)))

    def drop(self, domid: int) -> None:
        """Forget a domain: release what the builder holds for it. A dead builder is fine."""
        if self.alive:
            self._call({"do": "drop", "domid": domid})

    def close(self) -> None:
        """End the process and reap it. Idempotent."""
        if self.pid > 0:
            self._socket.close()
            self._reap(force=True)

    def _call(self, request: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        if not self.alive:
            raise XenError("the domain builder is gone", hint="try again")
        try:
            reply = self._exchange(msgpack.packb(request), fds)
        except (BrokenPipeError, ConnectionResetError):
            reply = b""
        except BaseException:
            self.close()  # a reply may be under way: this builder cannot be asked again
            raise
        if not reply:
            raise self._died(request["do"])
        try:
            answer, failure = _read_reply(reply)
        except (ValueError, TypeError, msgpack.UnpackException):
            self.close()  # taken over by an image, perhaps
            raise XenError("the domain builder sent a reply that makes no sense") from None
        if failure is not None:
            raise failure
        return answer

    def _exchange(self, request: bytes, fds: Sequence[int]) -> bytes:
        socket.send_fds(self._socket, [request], fds)
        if not self._poll.poll(PATIENCE * 1000):
            raise XenError(f"the domain builder gave no answer for {PATIENCE:.0f} s")
        return self._socket.recv(MESSAGE_MAX)

    def _died(self, what: str) -> ChaosError:
        status = self._reap(force=False)
        self._socket.close()
        if os.WIFSIGNALED(status):
            reason = f"it died of {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            reason = f"it exited with {os.waitstatus_to_exitcode(status)}"
        if what == "load":
            return ImageError(
                f"not a bootable image: the domain builder could not digest it, {reason}"
            )
        return XenError(f"the domain builder failed: {reason}")

    def _reap(self, *, force: bool) -> int:
        pid, self.pid = self.pid, -1
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            fd = os.pidfd_open(pid)
            try:
                if force:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                exited = _readable(fd, 1.0)
            finally:
                os.close(fd)
            if exited:
                break
            force = True
        return os.waitpid(pid, 0)[1]


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _read_reply(reply: bytes) -> tuple[Any, ChaosError | None]:
    """What a builder answered: its values, or the error. ValueError if it is neither."""
    answer = msgpack.unpackb(reply, strict_map_key=True)
    if not isinstance(answer, dict):
        raise TypeError
    if "error" not in answer:
        return answer.get("ok"), None
    kind, message, hint = answer["error"]
    error = ImageError if kind == "image" else XenError
    return None, error(_text(message), hint=_text(hint))


def _text(value: Any) -> str:
    return printable(str(value)[:TEXT_MAX])


def _frames(value: Any, count: int) -> list[int]:
    """``count`` frame numbers from a builder: a hostile image may have taken it over."""
    if not (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(frame, int) and 0 <= frame < 1 << 52 for frame in value)
    ):
        raise XenError("the domain builder sent a reply that makes no sense")
    return value


def _become_builder(channel: socket.socket, parent: int) -> None:
    """The rest of a builder's life, in the forked child: never returns."""
    status = 1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.getppid() != parent:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _leave_the_terminal()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _close_others(channel.fileno())
        _serve(channel)
        status = 0
    finally:
        os._exit(status)


def _leave_the_terminal() -> None:
    """An image that took the process over could type into the terminal of whoever started it.

    Nor shall unpacking a hostile ramdisk cost anybody else his memory.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("1000")


def _close_others(keep: int) -> None:
    """Close all but the standard descriptors and ``keep``: a builder holds nobody's locks."""
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


def _serve(channel: socket.socket) -> None:
    from xenctypes.ctrl import Xenctrl

    builds: dict[int, DomBuilder] = {}
    with Xenctrl() as ctrl:
        while True:
            message, fds, _, _ = socket.recv_fds(channel, MESSAGE_MAX, 2)
            if not message:
                return
            try:
                reply = {"ok": _answer(ctrl, builds, msgpack.unpackb(message), fds)}
            except CallFailed as error:
                kind = "image" if error.function in IMAGE_CALLS else "xen"
                reply = {"error": [kind, *explain(error)]}
            except ChaosError as error:
                kind = "image" if isinstance(error, ImageError) else "xen"
                reply = {"error": [kind, error.message, error.hint]}
            except Exception as error:  # noqa: BLE001 - the parent must hear of it
                reply = {"error": ["xen", f"domain builder: {type(error).__name__}: {error}", ""]}
            finally:
                for fd in fds:
                    os.close(fd)
            channel.send(msgpack.packb(reply))


# A failure of these speaks of the image; of any other, of the host.
IMAGE_CALLS = frozenset(
    {"xc_dom_kernel_file", "xc_dom_module_file", "xc_dom_parse_image", "xc_dom_build_image"}
)


# The last page of what a PV guest starts with (count_pgtables in xg_dom_x86.c): at least 4 MiB.
TOO_SMALL = re.compile(r"not enough memory for initial mapping \(0x([0-9a-f]{1,9}) >")
# Its pages, and those laid out before it (xc_dom_chk_alloc_pages in xg_dom_core.c).
TOO_LARGE = re.compile(
    r"segment ([\w ]{1,32}) too large"
    r" \(0x([0-9a-f]{1,9}) > 0x[0-9a-f]{1,9} - 0x([0-9a-f]{1,9}) pages"
)
SEGMENTS = {"kernel": "its kernel", "module0": "its ramdisk"}


def explain(error: CallFailed) -> tuple[str, str]:
    """What to tell of a failed call of libxenguest's: the message and the hint."""
    if error.function not in IMAGE_CALLS:
        return error.message, error.hint
    small = TOO_SMALL.search(error.detail)
    if small:
        mib = (int(small[1], 16) >> 8) + 1
        return f"its first mapping needs {mib} MiB", f"raise memory= to {mib} or more"
    large = TOO_LARGE.search(error.detail)
    if large:
        mib = (int(large[2], 16) + int(large[3], 16) >> 8) + 1
        what = SEGMENTS.get(large[1], "it")
        return f"{what} does not fit into its memory", f"raise memory= to more than {mib}"
    return f"not a bootable image: {error.detail or error.message}", error.hint


def _answer(
    ctrl: Xenctrl, builds: dict[int, DomBuilder], request: dict[str, Any], fds: list[int]
) -> Any:
    domid = request["domid"]
    if request["do"] == "populate":
        build = builds[domid] = populate(ctrl, domid, request["kind"], request["mib"])
        return last_frames(build, request["reserved"])
    if request["do"] == "load":
        build = builds.pop(domid)
        try:
            return list(load(build, request, fds))
        finally:
            build.release()
    dropped = builds.pop(domid, None)
    if dropped is not None:
        dropped.release()
    return None


def _kernel_max(size: int, pages: int) -> int:
    """How large an unpacked kernel may be: its file has ``size`` bytes, the guest ``pages``.

    What is larger than the guest does not fit into it, but for symbols that are not loaded.
    """
    return min(KERNEL_MAX, max(KERNEL_FLOOR, pages << 12, size))


@contextlib.contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Let the process take ``room`` bytes more than it has, and no more: malloc fails then.

    RLIMIT_DATA counts private writable memory alone (setrlimit(2)), which is what Dom0 pays
    for: RLIMIT_AS would count the guest's own pages, mapped in chunks, and the image's file.
    """
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        taken = int(os.read(fd, STATM_MAX).split()[5]) * resource.getpagesize()  # data and stack
    finally:
        os.close(fd)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    hard = before[1]
    wanted = taken + room
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def populate(ctrl: Xenctrl, domid: int, kind: str, mib: int) -> DomBuilder:
    """Give a fresh domain of type ``kind`` its memory, in this process."""
    from xenctypes.guest import DomBuilder

    build = DomBuilder(ctrl)
    try:
        build.guest_type = GUEST_TYPES[kind]  # before the kernel says so: it picks the arch hooks
        if kind == "pvh":
            build.container_type = XC_DOM_HVM_CONTAINER
            build.target_pages = mib << 8
            build.mmio_start = pvh.HOLE
            build.mmio_size = pvh.GIB_4 - pvh.HOLE
            build.lowmem_end = pvh.low_pages(mib) << XC_PAGE_SHIFT
            build.highmem_end = pvh.high_end(mib)
        build.boot_xen_init(domid)
        build.rambase_init(0)
        build.mem_init(mib)
        build.boot_mem_init()
    except BaseException:
        build.release()
        raise
    return build


def last_frames(build: DomBuilder, count: int) -> list[int]:
    """The frames of the last pages of a domain that was populated: the toolstack's."""
    top = _top(build)
    return build.p2m(*range(top - count, top))


def _top(build: DomBuilder) -> int:
    hvm = build.container_type == XC_DOM_HVM_CONTAINER
    return build.lowmem_end >> XC_PAGE_SHIFT if hvm else build.total_pages


def _check_reserved(build: DomBuilder, reserved: int) -> None:
    """Refuse an image that was laid out over the pages at the top that are the toolstack's.

    The boot stack is the last page that libxenguest uses, but for a ramdisk that wants no
    mapping (xg_dom_core.c, xc_dom_build_image); what follows it is padding. A PVH guest has
    neither stack nor padding.
    """
    pv = build.container_type == XC_DOM_PV_CONTAINER
    end = build.bootstack_pfn + 1
    if not pv or build.flags & SIF_MOD_START_PFN:
        end = build.pfn_alloc_end
    if reserved and end > _top(build) - reserved:
        mib = _mib_for(end + reserved) if pv else -(-(end + reserved) >> 8)
        raise XenError(
            f"its devices and metadata need {reserved << 2} KiB beside the image",
            hint=f"raise memory= to {mib} or more",
        )


def load(build: DomBuilder, request: dict[str, Any], fds: list[int]) -> Loaded:
    """Build the image behind the descriptors, in this process; ``request`` as for a builder.

    The image does not get this process to take much more memory than a kernel has.
    """
    kernel_max = _kernel_max(os.fstat(fds[0]).st_size, build.total_pages)
    build.kernel_max_size(kernel_max)
    try:
        # Mapping the guest's pages takes Xen's interface 16 bytes for each of them.
        with memory_limit(kernel_max + WORKSPACE + (build.total_pages << 4)):
            return _load(build, request, fds)
    except MemoryError:
        cause = "it takes more memory to unpack than a kernel may"
        raise CallFailed("xc_dom_build_image", 0, cause) from None


def _refuse(kernel: int, kind: str) -> None:
    """Raise ImageError if the reason why an image was not understood is its type.

    What is inside a compressed kernel is looked at for that alone, since it takes seconds.
    """
    try:
        with adopt_image(os.dup(kernel), "the kernel") as opened:
            found = refusal(inspect(opened), kind)
    except ImageError:
        return
    if found is not None:
        why, hint = found
        raise ImageError(f"not a bootable image: {why}", hint=hint)


def _mib_for(pages: int) -> int:
    """MiB of a PV guest in which so many pages have room, counted at its present size.

    A MiB more makes its p2m list (8 bytes for each page) and page tables longer by a page at most.
    """
    return -(-(pages + 2) // 255)


def _load(build: DomBuilder, request: dict[str, Any], fds: list[int]) -> Loaded:
    build.cmdline = request["cmdline"]
    build.kernel_file(f"/proc/self/fd/{fds[0]}")
    if request["ramdisk"]:
        build.ramdisk_max_size(RAMDISK_MAX)
        build.ramdisk_file(f"/proc/self/fd/{fds[1]}")
    kind = "pvh" if build.container_type == XC_DOM_HVM_CONTAINER else "pv"
    try:
        build.parse_image()
    except CallFailed:
        _refuse(fds[0], kind)
        raise
    if build.guest_type != GUEST_TYPES[kind]:
        raise CallFailed(
            "xc_dom_parse_image", 0, f"a {build.guest_type.decode()} kernel, not a 64-bit PV one"
        )
    if kind == "pvh":
        mib = build.total_pages >> 8
        build.memory_map(pvh.memory_map(mib))
        build.acpi(pvh.ACPI_ADDRESS, acpi.tables(pvh.ACPI_ADDRESS, request["vcpus"]))
    build.max_vcpus = request["vcpus"]
    build.console_evtchn = request["console_port"]
    build.xenstore_evtchn = request["store_port"]
    build.console_domid = 0
    build.xenstore_domid = 0
    build.build_image()
    _check_reserved(build, request["reserved"])
    build.boot_image()
    build.gnttab_init()
    return Loaded(*build.p2m(build.console_pfn, build.xenstore_pfn, build.start_info_pfn))
