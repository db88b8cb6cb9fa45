"""The ACPI tables of PVH guests, read as an operating system does."""

import struct

import pytest

from chaos import acpi, pvh
from chaos.domconfig import VCPUS_MAX

ADDRESS = pvh.ACPI_ADDRESS


class Reader:
    """Follows the tables from the RSDP on, and adds up what has a checksum."""

    def __init__(self, area: bytes) -> None:
        self.area = area
        assert area[:8] == b"RSD PTR "
        assert sum(area[:20]) & 0xFF == 0
        revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", area, 15)
        assert (revision, rsdt, length) == (2, 0, 36)
        assert sum(area[:length]) & 0xFF == 0
        _, body = self.table(xsdt)
        self.tables = dict(map(self.table, struct.unpack(f"<{len(body) // 8}Q", body)))

    def table(self, address: int) -> tuple[bytes, bytes]:
        """The signature of the table at an address, and what follows its header."""
        at = address - ADDRESS
        assert at % 4 == 0
        signature, length = struct.unpack_from("<4sI", self.area, at)
        table = self.area[at : at + length]
        assert len(table) == length > 36
        assert sum(table) & 0xFF == 0
        return signature, table[36:]


@pytest.mark.parametrize("vcpus", [1, 2, 7, VCPUS_MAX["pvh"]])
def test_an_operating_system_finds_its_processors(vcpus: int) -> None:
    area = acpi.tables(ADDRESS, vcpus)
    assert len(area) <= pvh.ACPI_SIZE
    tables = Reader(area).tables
    assert tables.keys() == {b"FACP", b"APIC"}
    madt = tables[b"APIC"]
    assert struct.unpack_from("<II", madt) == (0xFEE00000, 0)
    lapics = list(struct.iter_unpack("<BBBBI", madt[8:]))
    assert lapics == [(0, 8, vcpu, 2 * vcpu, 1) for vcpu in range(vcpus)]
    assert all(lapic[3] < 255 for lapic in lapics)  # that one means all


def test_there_is_no_hardware_of_a_pc() -> None:
    reader = Reader(acpi.tables(ADDRESS, 1))
    fadt = bytes(36) + reader.tables[b"FACP"]
    assert len(fadt) == 268  # ACPI 5.0
    dsdt, x_dsdt = (struct.unpack_from(f, fadt, at)[0] for f, at in (("<I", 40), ("<Q", 140)))
    assert dsdt == x_dsdt
    assert reader.table(dsdt) == (b"DSDT", b"\x10\x06\\_SB_")
    boot_arch, flags = (struct.unpack_from(f, fadt, at)[0] for f, at in (("<H", 109), ("<I", 112)))
    assert boot_arch == 1 << 2 | 1 << 5  # no VGA, no CMOS clock
    assert flags & 1 << 20  # the reduced hardware
    assert not any(fadt[46:109])  # whose ports are nowhere
