"""Kernel and ramdisk files, before libxenguest sees them.

An image is untrusted. It is opened once; what is inspected here and what the
builder process loads are the same descriptor, so nothing can be swapped between.
Inspection reads what the verdict needs and no more: for an ELF file its headers
and notes, for a compressed one the stream up to them.

libxenguest takes (tools/libs/guest, xg_dom_*loader.c): an ELF file, a Linux
bzImage with a compressed ELF file inside, a raw binary with Xen's multiboot
table; each bare or in gzip. What cannot be decided here cheaply or at all (LZO,
LZ4 and zstd payloads, streams over UNPACK_MAX) is left to it: it runs in a child
process that may die.
"""

import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Self

from chaos.decompress import (
    DECOMPRESS_MAX,
    READABLE,
    BadImage,
    Blob,
    FileBlob,
    MemoryBlob,
    StreamBlob,
    Undecided,
    kind_of,
    trailer,
)
from chaos.elfnotes import Note, parse
from noxs.abi import ABI_MAJOR, ABI_MINOR
from xenctypes.errors import ImageError

KERNEL_MAX = 512 << 20
"""The largest kernel file that is opened, in bytes (libxenguest's own limit is 1 GiB)."""

RAMDISK_MAX = DECOMPRESS_MAX
"""The largest ramdisk, in bytes: libxenguest's limit for a module (xc_dom_allocate)."""

JUST_NS = 2_000_000_000
"""An age of a file's times below which they may stay the same when it is written once more.

Linux stamps files with a clock of a jiffy's grain, FAT and some servers with seconds.
"""

Opener = Callable[[str, int], int]

ELF_MAGIC = b"\x7fELF"
ELF_SIZE = 52  # the smallest that elf_is_elfbinary takes

# struct setup_header of xg_dom_bzimageloader.c; Documentation/arch/x86/boot.rst
SETUP_SIZE = 0x250
SETUP_MAGIC_AT = 0x202
SETUP_MAGIC = b"HdrS"
SETUP_VERSION_MIN = 0x0208  # the first with a payload that a loader can find

# struct xen_bin_image_table of xg_dom_binloader.c
TABLE_MAGIC = struct.pack("<I", 0x336EC578)
TABLE_SIZE = 32
TABLE_WITHIN = 8192
TABLE_X86_64 = 2  # of the two flag bits from 14 on

BOTH = frozenset({"pv", "pvh"})


class Identity(NamedTuple):
    """What tells one version of a file from another."""

    dev: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def just_written(self) -> bool:
        """Whether the file was written so lately that another write may leave it the same times."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) < JUST_NS


class OpenImage:
    """An open kernel or ramdisk file, a context manager.

    ``fd`` is readable and close-on-exec; ``fd_path`` opens the same file again,
    whatever has become of ``path``.
    """

    def __init__(self, path: str, fd: int, identity: Identity) -> None:
        self.path = path
        self.fd = fd
        self.identity = identity

    @property
    def size(self) -> int:
        """In bytes, when it was opened."""
        return self.identity.size

    @property
    def fd_path(self) -> str:
        """A path for xc_dom_kernel_file and the like, within this process."""
        return f"/proc/self/fd/{self.fd}"

    def changed(self) -> bool:
        """Whether the file, or what its path names now, is not what was opened."""
        try:
            named = identity(os.stat(self.path))
        except OSError:
            return True
        return not self.identity == named == identity(os.fstat(self.fd))

    def just_written(self) -> bool:
        """Whether another write may leave it the same times."""
        return self.identity.just_written

    def close(self) -> None:
        """Close the descriptor; twice does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What inspection found.

    ``format`` is how the file is packed, outermost first: "elf", "gzip", "bzimage" or
    "multiboot"; ``payload`` the compression inside a bzImage or "". ``types`` are
    the guest types ("pv", "pvh") that are not excluded; ``refusals`` says why for
    the others. ``notes`` maps the names of XEN_ELFNOTE_* without the prefix to their
    values, ``noxs_abi`` is (major, minor) or None for a stock guest; ``bits`` is 32
    or 64, ``entry`` an address and ``span`` the guest memory that the loaded image
    takes, in bytes. When ``notes`` is None these are unknown (``noxs_abi`` None,
    the numbers 0): ask ``inspect_memory`` once libxenguest has unpacked the kernel.
    ``uncompressed_size`` is what a compressed image claims, in bytes.
    """

    path: str
    format: str
    types: frozenset[str]
    payload: str = ""
    notes: Mapping[str, Note] | None = None
    noxs_abi: tuple[int, int] | None = None
    bits: int = 0
    entry: int = 0
    span: int = 0
    uncompressed_size: int | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)


def open_image(path: str, opener: Opener = os.open) -> OpenImage:
    """Open a kernel; ImageError unless it is a readable, regular file of a sane size."""
    return _open(path, "kernel", KERNEL_MAX, opener)


def open_ramdisk(path: str, opener: Opener = os.open) -> OpenImage:
    """Open a ramdisk; ImageError unless it is a readable, regular file of a sane size."""
    return _open(path, "ramdisk", RAMDISK_MAX, opener)


def adopt_image(fd: int, path: str, *, ramdisk: bool = False) -> OpenImage:
    """Take over a descriptor that somebody else opened (and close it if it will not do)."""
    what, limit = ("ramdisk", RAMDISK_MAX) if ramdisk else ("kernel", KERNEL_MAX)
    try:
        return _check(fd, path, what, limit)
    except BaseException:
        os.close(fd)
        raise


def digest(images: Iterable[OpenImage]) -> bytes:
    """SHA-256 of the contents of images, one after the other, with their sizes. Raises OSError.

    What a file has grown by since it was opened is not read.
    """
    import hashlib

    found = hashlib.sha256()
    for each in images:
        found.update(each.size.to_bytes(8, "little"))
        offset = 0
        while chunk := os.pread(each.fd, min(1 << 20, each.size - offset), offset):
            found.update(chunk)
            offset += len(chunk)
    return found.digest()


def inspect(image: OpenImage, *, payload: bool = True) -> ImageInfo:
    """Say what ``image`` is; ImageError "not a bootable image: why".

    With ``payload`` false a bzImage is judged by its header alone, which costs
    microseconds instead of an unpacked kernel: for a caller that looks at
    libxenguest's unpacked copy afterwards (``inspect_memory``).
    """
    return _judge(FileBlob(image.fd, image.size), image.path, payload=payload)


def inspect_memory(data: bytes | bytearray | memoryview, path: str) -> ImageInfo:
    """The same for an image in memory."""
    return _judge(MemoryBlob(data), path, payload=True)


def check_type(info: ImageInfo, wanted: str, *, path: str = "") -> None:
    """ImageError if the image cannot boot as a guest of type ``wanted`` ("pv" or "pvh").

    ``path`` is the image's name in messages, if not the one that it was opened by.
    """
    refused = refusal(info, wanted)
    if refused is not None:
        why, hint = refused
        raise _error(path or info.path, why, hint)


def refusal(info: ImageInfo, wanted: str) -> tuple[str, str] | None:
    """Why the image cannot boot as a guest of type ``wanted``, and the way out; None if it can."""
    if wanted not in info.types:
        why = info.refusals.get(wanted, f"it boots as {' or '.join(sorted(info.types))} only")
        other = next(iter(info.types), "")
        return why, f'type = "{other}" boots it' if other else ""
    if wanted == "pv" and info.bits == 32:
        # Xen switches a PV domain to 32 bits only while it has no memory (switch_compat in
        # xen/arch/x86/pv/domain.c), and a shell has its memory before its kernel is known.
        return "a 32-bit PV kernel; PV guests here are 64-bit", ""
    return None


def check_abi(info: ImageInfo) -> None:
    """ImageError if the image asks for a noxs ABI that is newer than ours in its major version."""
    if info.noxs_abi is not None and info.noxs_abi[0] > ABI_MAJOR:
        major, minor = info.noxs_abi
        raise ImageError(
            f"{info.path}: asks for noxs ABI {major}.{minor}, this is {ABI_MAJOR}.{ABI_MINOR}",
            hint="update chaos, or build the image with this release's noxs.h",
        )


def _open(path: str, what: str, limit: int, opener: Opener) -> OpenImage:
    try:
        # O_NONBLOCK: a FIFO must not hold us up, and a terminal must not become ours.
        fd = opener(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{what} {path!r} cannot be opened: {reason}") from error
    try:
        return _check(fd, path, what, limit)
    except BaseException:
        os.close(fd)
        raise


def _check(fd: int, path: str, what: str, limit: int) -> OpenImage:
    import fcntl

    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{what} {path!r} is {_kind_of_file(status.st_mode)}, not a file")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
        raise ImageError(f"{what} {path!r} is not open for reading")
    if status.st_size == 0:
        raise ImageError(f"{what} {path!r} is empty")
    if status.st_size > limit:
        raise ImageError(
            f"{what} {path!r} has {status.st_size} bytes, more than the {limit} that are accepted"
        )
    return OpenImage(path, fd, identity(status))


def _kind_of_file(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def identity(status: os.stat_result) -> Identity:
    """Which version of which file ``status`` is of."""
    return Identity(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def _error(path: str, why: object, hint: str = "") -> ImageError:
    return ImageError(f"{path}: not a bootable image: {why}", hint=hint)


def _judge(blob: Blob, path: str, *, payload: bool) -> ImageInfo:
    try:
        if blob.read(0, 2) != b"\x1f\x8b":
            return _unwrapped(blob, path, payload=payload)
        stream = StreamBlob(blob, 0, blob.size, "gzip")
        try:
            inner = _unwrapped(stream, path, payload=payload)
        except Undecided:
            inner = ImageInfo(path, "gzip", BOTH)
        return replace(inner, format="gzip", uncompressed_size=stream.claimed)
    except (BadImage, OSError) as error:
        raise _error(path, error) from error


def _unwrapped(blob: Blob, path: str, *, payload: bool) -> ImageInfo:
    """Judge what gzip left, in the order of libxenguest's loaders."""
    head = blob.read(0, TABLE_WITHIN + TABLE_SIZE)
    table = _find_table(head)
    if table is not None:
        return _multiboot(table, path)
    refused = ""
    if head[SETUP_MAGIC_AT : SETUP_MAGIC_AT + 4] == SETUP_MAGIC and len(head) >= SETUP_SIZE:
        try:
            start, length = _payload(head, blob.size)
        except BadImage as error:
            refused = str(error)
        else:
            return _bzimage(blob, start, length, path, payload=payload)
    if head.startswith(ELF_MAGIC):
        if blob.size < ELF_SIZE:
            raise BadImage(f"an ELF file cut short: {blob.size} bytes")
        return _elf(blob, path)
    raise BadImage(refused or _describe(head, blob))


def _elf(blob: Blob, path: str) -> ImageInfo:
    elf = parse(blob)
    return ImageInfo(
        path,
        "elf",
        BOTH - elf.refusals.keys(),
        notes=elf.notes,
        noxs_abi=elf.noxs_abi,
        bits=elf.bits,
        entry=elf.entry,
        span=elf.span,
        refusals=elf.refusals,
    )


def _payload(head: bytes, size: int) -> tuple[int, int]:
    """(offset, length) of a bzImage's compressed kernel (xc_dom_probe_bzimage_kernel)."""
    (version,) = struct.unpack_from("<H", head, 0x206)
    if version < SETUP_VERSION_MIN:
        raise BadImage(f"a bzImage of boot protocol {version >> 8}.{version & 255:02}, before 2.08")
    start, length = struct.unpack_from("<II", head, 0x248)
    start += (head[0x1F1] + 1) * 512
    if start >= size or start + length > size:
        raise BadImage(f"a bzImage cut short: its payload ends at byte {start + length} of {size}")
    return start, length


def _bzimage(blob: Blob, start: int, length: int, path: str, *, payload: bool) -> ImageInfo:
    head = blob.read(start, min(length, 8))
    kind = kind_of(head)
    if kind is None:
        # libxenguest's ELF loader comes next and finds the payload in the image's place.
        if head.startswith(ELF_MAGIC) and length >= ELF_SIZE:
            return replace(_elf(_Part(blob, start, length), path), format="bzimage")
        raise BadImage("a bzImage whose payload is in no known compression")
    claimed = trailer(blob, start, length)
    unknown = ImageInfo(path, "bzimage", BOTH, payload=kind, uncompressed_size=claimed)
    if kind not in READABLE or not payload:
        if claimed > DECOMPRESS_MAX:
            raise BadImage(f"a bzImage that unpacks to {claimed} bytes, over {DECOMPRESS_MAX}")
        return unknown
    try:
        stream = StreamBlob(blob, start, length, kind)
        if stream.read(0, 4) != ELF_MAGIC or stream.size < ELF_SIZE:
            raise BadImage("a bzImage without an ELF kernel inside")
        inner = _elf(stream, path)
    except Undecided:
        return unknown
    return replace(inner, format="bzimage", payload=kind, uncompressed_size=claimed)


class _Part:
    """A stretch of a blob."""

    def __init__(self, blob: Blob, start: int, size: int) -> None:
        self._blob = blob
        self._start = start
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """See Blob."""
        return self._blob.read(self._start + offset, max(0, min(length, self.size - offset)))


def _find_table(head: bytes) -> tuple[int, ...] | None:
    """Xen's multiboot table, looked for as find_table of xg_dom_binloader.c does."""
    at = head.find(TABLE_MAGIC)
    while 0 <= at < min(TABLE_WITHIN, len(head) - TABLE_SIZE):
        if at % 4 == 0:
            table = struct.unpack_from("<8I", head, at)
            if sum(table[:3]) % (1 << 32) == 0:
                return (at, *table)
        at = head.find(TABLE_MAGIC, at + 1)
    return None


def _multiboot(table: tuple[int, ...], path: str) -> ImageInfo:
    _, _, flags, _, _, load, load_end, bss_end, entry = table
    if flags >> 14 & 3 != TABLE_X86_64:
        raise BadImage("a raw binary with Xen's multiboot table, not for 64-bit PV")
    span = max(0, max(load_end, bss_end) - load)
    return ImageInfo(
        path,
        "multiboot",
        frozenset({"pv"}),
        bits=64,
        entry=entry,
        span=span,
        refusals={"pvh": "a raw binary with Xen's multiboot table boots as PV only"},
    )


LOOKS_LIKE = (
    (0, b"#!", "a script"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"conectix", "a VHD disk image"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"070701", "a cpio archive (an initramfs?)"),
    (0, b"070702", "a cpio archive (an initramfs?)"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"!<arch>\n", "an ar archive"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O file"),
    (0, b"\xca\xfe\xba\xbe", "a Mach-O or Java class file"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file"),
    (0, b"BC\xc0\xde", "LLVM bitcode"),
    (0, b"<!DOCTYPE", "an HTML page"),
    (0, b"<html", "an HTML page"),
    (0x38, b"ARM\x64", "an ARM64 kernel"),
    (0x101, b"ustar", "a tar archive"),
    (0x438, b"\x53\xef", "an ext file system"),
    (0, b"MZ", "a PE (EFI) file"),
    (0x1FE, b"\x55\xaa", "a boot sector or disk image"),
)


def _describe(head: bytes, blob: Blob) -> str:
    """What a file looks like that no loader takes."""
    for offset, magic, name in LOOKS_LIKE:
        if head[offset : offset + len(magic)] == magic:
            return f"{name}, neither an ELF file nor a bzImage"
    kind = kind_of(head)
    if kind is not None:
        return f"looks like a file compressed with {kind}, which is unpacked only inside a bzImage"
    if blob.size < ELF_SIZE:
        return f"too short: {blob.size} bytes"
    if not head.strip(b"\0"):
        return "it begins with zeros only"
    if all(32 <= byte < 127 or byte in b"\t\n\r\f" for byte in head[:512]):
        return "a text file"
    return f"neither an ELF file nor a bzImage (it begins with {head[:4].hex(' ')})"
