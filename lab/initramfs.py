"""Initial RAM file systems: the newc archive and the modules in it.

The format is Documentation/driver-api/early-userspace/buffer-format.rst of Linux:
archives may follow one another, which is how each boot adds its own files to the image's.
"""

import lzma
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its mode with the type bits, its bytes, a device number."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(stat.S_IFREG | permissions, data)


def folder(permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(stat.S_IFDIR | permissions)


def symlink(target: str) -> Entry:
    """A symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def device(major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device."""
    return Entry(stat.S_IFCHR | permissions, device=(major, minor))


def archive(entries: Mapping[str, Entry]) -> bytes:
    """Return the newc archive of ``entries`` (relative paths), padded to 512 bytes.

    Parents must come before their children. Owner is root, times are 0: equal entries
    give equal bytes.
    """
    parts = []
    for number, (path, entry) in enumerate([*entries.items(), ("TRAILER!!!", Entry(0))], 1):
        name = path.encode() + b"\0"
        fields = (
            number,
            entry.mode,
            0,
            0,
            2 if stat.S_ISDIR(entry.mode) else 1,
            0,
            len(entry.data),
            0,
            0,
            *entry.device,
            len(name),
            0,
        )
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts += [_padded(header + name, 4), _padded(entry.data, 4)]
    return _padded(b"".join(parts), 512)


def _padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def module_order(depends: str, wanted: Iterable[str]) -> list[str]:
    """Return paths of modules in the order in which insmod can take them.

    ``depends`` is the text of modules.dep, ``wanted`` module names. A name that is not
    there is built into the kernel, or gone from this release, and is left out.
    """
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in depends.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        paths[path.rpartition("/")[2].partition(".")[0].replace("-", "_")] = path
    order: list[str] = []

    def add(path: str) -> None:
        if path in order:
            return
        # modules.dep lists all dependencies of a module, the deepest last.
        for need in reversed(needs.get(path, [])):
            add(need)
        order.append(path)

    for name in wanted:
        if found := paths.get(name.replace("-", "_")):
            add(found)
    return order


def module(path: Path) -> bytes:
    """Return a module's ELF bytes, decompressed (Debian 13 ships .ko.xz)."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
