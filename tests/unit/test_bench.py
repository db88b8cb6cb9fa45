"""What the benchmarks compute by themselves."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos import image

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))
import density  # noqa: E402
import figures  # noqa: E402
import sizes  # noqa: E402

EI_CLASS64_LSB = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
NOTE = struct.pack("<III4sQ", 4, 8, 1, b"Xen\0", 0x1000)  # XEN_ELFNOTE_ENTRY
NOTE += struct.pack("<III4s8s", 4, 8, 6, b"Xen\0", b"linux\0\0\0")  # XEN_ELFNOTE_GUEST_OS
NOTE += struct.pack("<III4s8s", 4, 8, 5, b"Xen\0", b"xen-3.0\0")  # XEN_ELFNOTE_XEN_VERSION


def guest() -> bytes:
    """A kernel of two segments and a note, its second segment without bytes in the file."""
    headers = b"".join(
        struct.pack("<IIQQQQQQ", *header)
        for header in (
            (1, 5, 0x1000, 0x1000, 0x1000, 0x800, 0x800, 0x1000),
            (1, 6, 0, 0x2000, 0x2000, 0, 0x1234, 0x1000),
            (4, 4, 0x1000, 0x1000, 0x1000, len(NOTE), len(NOTE), 4),
        )
    )
    head = EI_CLASS64_LSB + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0x1000, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    return (head + headers).ljust(0x1000, b"\0") + NOTE.ljust(0x800, b"\x90")


@pytest.mark.parametrize("size", sizes.SIZES[:4])
def test_a_padded_image_is_loaded_as_a_whole(size: int) -> None:
    before, padded = guest(), sizes.padded(guest(), size)
    assert len(padded) == size
    (offset,), (count,) = struct.unpack_from("<Q", padded, 32), struct.unpack_from("<H", padded, 56)
    table = list(struct.iter_unpack("<IIQQQQQQ", padded[offset : offset + count * 56]))
    assert table[:3] == list(struct.iter_unpack("<IIQQQQQQ", before[64 : 64 + 3 * 56]))
    kind, _, at, virtual, physical, in_file, in_memory, align = table[3]
    assert (kind, virtual, physical) == (1, 0x4000, 0x4000)  # behind 0x2000 + 0x1234
    assert at % align == 0
    assert in_file == in_memory > size - 3 * 4096
    assert len(set(padded[at : at + 4096])) > 100  # no page of zeros
    info, plain = image.inspect_memory(padded, "padded"), image.inspect_memory(before, "plain")
    assert (info.notes, info.entry, info.types) == (plain.notes, plain.entry, plain.types)
    assert info.span == 0x3000 + in_memory


def test_an_image_is_not_made_smaller() -> None:
    with pytest.raises(SystemExit, match="has 6144 bytes already"):
        sizes.padded(guest(), 6000)


def test_fit() -> None:
    line = figures.fit([(0.0, 3.0), (1.0, 5.0), (10.0, 23.0)])
    assert line == pytest.approx({"ms_per_mib": 2.0, "base_ms": 3.0, "r2": 1.0})
    assert figures.fit([(0.0, 1.0), (1.0, 3.0), (2.0, 1.0)])["r2"] == pytest.approx(0.0)
    assert figures.fit([(1.0, 4.0)])["base_ms"] == 4.0


def test_memory_is_split_among_those_who_have_it() -> None:
    names = ("domains", "xen_free", "guest_pages", "chaosd", "makers", *density.MEMINFO)
    before = dict.fromkeys(names, 0) | {"xen_free": 5000, "MemAvailable": 9000}
    after = before | {
        "domains": 10, "xen_free": 1000, "guest_pages": 3000, "MemAvailable": 8000,
        "Shmem": 200, "chaosd": 300, "makers": 100, "Slab": 150,
    }  # fmt: skip
    found = density.per_guest(before, after)
    assert (found["guest"], found["xen"]) == (300.0, 100.0)
    assert found["dom0_kernel"] == 40.0
    assert (found["run_files"], found["chaosd"], found["makers"]) == (20.0, 30.0, 10.0)
    assert found["dom0_kernel_slab"] == 15.0


def test_an_echo_request_has_the_checksum_of_rfc_1071() -> None:
    for number in (0, 1, 0xFFFF):
        words = struct.unpack("!4H", density.echo(number))
        total = sum(words)
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert (words[0], words[3], total) == (0x0800, number, 0xFFFF)


def test_a_thousand_guests_have_as_many_addresses() -> None:
    found = {density.address(number) for number in range(1000)}
    assert len(found) == 1000
    assert all(not each.endswith((".0", ".255")) for each in found)


def test_timed_passes_everything_on() -> None:
    class Target:
        value = 1

        def call(self, more: int) -> Any:
            return self.value + more

    target = Target()
    timed = sizes.Timed(target)
    timed.value = 5
    assert (target.value, timed.call(2), timed.call(3), timed.value) == (5, 7, 8, 5)
    assert list(timed.times) == ["call"]
