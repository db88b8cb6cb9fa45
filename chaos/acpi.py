"""The ACPI tables of a PVH guest: which processors it has, and what a PC has that it lacks.  Pure.

::

    RSDP ---> XSDT ---> FADT ---> DSDT (empty)
                |
                '-----> MADT: a local APIC for each vCPU

Layouts are those of the ACPI specification, 5.0. The hardware is the reduced one (its chapter
4.1): without device model nobody answers at the ports of a power-management block.
"""

from __future__ import annotations

from struct import Struct, pack, pack_into

RSDP = Struct("<8sB6sBIIQB3x")
HEADER = Struct("<4sIBB6s8sI4sI")
CHECKSUM_AT = 9  # in HEADER
OEM, TABLE, CREATOR, REVISION = b"chaos ", b"PVH     ", b"CHAO", 1
ALIGNMENT = 16
LAPIC_ADDRESS = 0xFEE00000
LAPIC_ENABLED = 1
FADT_SIZE = 268
FADT_DSDT, FADT_BOOT_ARCH, FADT_FLAGS, FADT_X_DSDT = 40, 109, 112, 140
NO_VGA, NO_CMOS_RTC = 1 << 2, 1 << 5  # of IAPC_BOOT_ARCH
WBINVD, PROC_C1, NO_POWER_BUTTON, NO_SLEEP_BUTTON = 1 << 0, 1 << 2, 1 << 4, 1 << 5
NO_RTC_WAKE, HW_REDUCED = 1 << 6, 1 << 20
EMPTY_SB = bytes((0x10, 6)) + b"\\_SB_"  # Scope (\_SB) {}


def tables(address: int, vcpus: int) -> bytes:
    """The tables of a guest with ``vcpus`` vCPUs, to be placed at ``address``: the RSDP first."""
    area = bytearray(RSDP.size)

    def place(table: bytes) -> int:
        area.extend(bytes(-len(area) % ALIGNMENT))
        area.extend(table)
        return address + len(area) - len(table)

    dsdt = place(_table(b"DSDT", 2, EMPTY_SB))
    pointed = [place(_fadt(dsdt)), place(_madt(vcpus))]
    xsdt = place(_table(b"XSDT", 1, pack(f"<{len(pointed)}Q", *pointed)))
    RSDP.pack_into(area, 0, b"RSD PTR ", 0, OEM, 2, 0, RSDP.size, xsdt, 0)
    area[8] = _checksum(area[:20])  # what ACPI 1.0 had of it
    area[32] = _checksum(area[: RSDP.size])
    return bytes(area)


def lapic_id(vcpu: int) -> int:
    """The local APIC's identity of a vCPU, which Xen's emulation and CPUID agree on."""
    return 2 * vcpu


def _madt(vcpus: int) -> bytes:
    lapics = (pack("<BBBBI", 0, 8, vcpu, lapic_id(vcpu), LAPIC_ENABLED) for vcpu in range(vcpus))
    return _table(b"APIC", 3, pack("<II", LAPIC_ADDRESS, 0) + b"".join(lapics))


def _fadt(dsdt: int) -> bytes:
    fadt = bytearray(FADT_SIZE)
    pack_into("<I", fadt, FADT_DSDT, dsdt)
    pack_into("<H", fadt, FADT_BOOT_ARCH, NO_VGA | NO_CMOS_RTC)
    flags = WBINVD | PROC_C1 | NO_POWER_BUTTON | NO_SLEEP_BUTTON | NO_RTC_WAKE | HW_REDUCED
    pack_into("<I", fadt, FADT_FLAGS, flags)
    pack_into("<Q", fadt, FADT_X_DSDT, dsdt)
    return _table(b"FACP", 5, bytes(fadt[HEADER.size :]))


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = HEADER.size + len(body)
    header = HEADER.pack(signature, size, revision, 0, OEM, TABLE, REVISION, CREATOR, REVISION)
    table = bytearray(header + body)
    table[CHECKSUM_AT] = _checksum(table)
    return bytes(table)


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes all of them add up to 0."""
    return -sum(data) & 0xFF
