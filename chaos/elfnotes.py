"""What libelf reads in a kernel's ELF headers and notes, and whether it would boot it.

libelf (xen/common/libelf, part of libxenguest) is lenient: a field outside the
file reads as zero, a header count that is too large ends the loop. This module
answers as it does, so that an image is refused here only if libelf refuses it
too, or would silently build a guest with parts missing. Xen's notes are looked
for where elf_xen_parse does: in PT_NOTE segments, else in SHT_NOTE sections,
else, for PV, in the legacy ``__xen_guest`` section.

An image that speaks noxs says so in a note beside Xen's (docs/noxs-abi.md).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.decompress import BadImage, Blob
from noxs.abi import NOTE_OWNER, NOTE_TYPE

NOXS_OWNER = NOTE_OWNER.encode()

# xen/include/public/elfnote.h; how libelf takes each: elf_xen_parse_note
INTEGER_NOTES = {
    1: "ENTRY",
    2: "HYPERCALL_PAGE",
    3: "VIRT_BASE",
    4: "PADDR_OFFSET",
    12: "HV_START_LOW",
    14: "SUSPEND_CANCEL",
    15: "INIT_P2M",
    16: "MOD_START_PFN",
    17: "SUPPORTED_FEATURES",
    18: "PHYS32_ENTRY",
}
STRING_NOTES = {
    5: "XEN_VERSION",
    6: "GUEST_OS",
    7: "GUEST_VERSION",
    8: "LOADER",
    9: "PAE_MODE",
    10: "FEATURES",
    11: "BSD_SYMTAB",
}
RAW_NOTES = {13: "L1_MFN_VALID", 19: "PHYS32_RELOC"}

LEGACY_INTEGERS = {
    "VIRT_BASE": "VIRT_BASE",
    "VIRT_ENTRY": "ENTRY",
    "ELF_PADDR_OFFSET": "PADDR_OFFSET",
    "HYPERCALL_PAGE": "HYPERCALL_PAGE",
}
LEGACY_STRINGS = {
    "LOADER": "LOADER",
    "GUEST_OS": "GUEST_OS",
    "GUEST_VER": "GUEST_VERSION",
    "XEN_VER": "XEN_VERSION",
    "PAE": "PAE_MODE",
    "FEATURES": "FEATURES",
    "BSD_SYMTAB": "BSD_SYMTAB",
}

EM_386, EM_X86_64 = 3, 62
MACHINES = {
    0: "no machine at all",
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S390",
    40: "ARM",
    43: "SPARC64",
    50: "IA-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
PT_LOAD, PT_NOTE = 1, 4
SHT_NOTE = 7

STRING_MAX = 4096  # ELF_MAX_STRING_LENGTH of xen/libelf.h, in bytes
NOTES_MAX = 65536  # ELF_MAX_TOTAL_NOTE_COUNT of xen/libelf.h
LEGACY_MAX = 64 << 10  # no __xen_guest string comes near; libelf has no bound of its own
SPAN_MAX = 1 << 40  # bytes; more than any guest has
PAGE = 4096
WRAP = 1 << 64
UNSET = WRAP - 1

Note = int | str | bytes


@dataclass(slots=True)
class ElfImage:
    """What an ELF kernel says about itself.

    ``bits`` is 32 for an i386 kernel, else 64. ``notes`` maps the names of
    XEN_ELFNOTE_* without the prefix to an integer, a string, or for L1_MFN_VALID
    and PHYS32_RELOC the raw bytes. ``noxs_abi`` is (major, minor). ``refusals``
    says for "pv" and for "pvh" why the image is not one. ``entry`` is the PV entry
    point, or the 32-bit physical one of a PVH-only image. ``span`` is the guest
    memory from its first segment to the end of its last, in bytes.
    """

    bits: int
    entry: int
    span: int
    notes: dict[str, Note] = field(default_factory=dict)
    noxs_abi: tuple[int, int] | None = None
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A program header: p_type, p_flags, then bytes."""

    type: int
    flags: int
    offset: int
    paddr: int
    filesz: int
    memsz: int


@dataclass(frozen=True, slots=True)
class _Section:
    """A section header: an index into the name table, sh_type, then bytes."""

    name: int
    type: int
    offset: int
    size: int


class _Elf:
    """The headers of one ELF file, read as libelf reads them."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        ident = blob.read(0, 6)
        self.wide = ident[4] == 2  # any other class counts as 32-bit, any other order as big
        self.order = "<" if ident[5] == 1 else ">"
        (self.machine, self.entry, self.phoff, self.shoff, self.phentsize, self.phnum) = (
            *self._fields(18, "H"),
            *(self._fields(24, "QQQ") if self.wide else self._fields(24, "III")),
            *self._fields(54 if self.wide else 42, "HH"),
        )
        shentsize, shnum, self.shstrndx = self._fields(58 if self.wide else 46, "HHH")
        self.shentsize, self.shnum = shentsize, min(shnum, blob.size // 40)

    def _fields(self, offset: int, form: str) -> tuple[int, ...]:
        """Consecutive unsigned fields, each zero if it is not wholly inside the file."""
        size = struct.calcsize(self.order + form)
        data = self.blob.read(offset, size) if 0 <= offset <= self.blob.size else b""
        if len(data) < size:
            known, at = 0, 0
            for code in form:
                at += struct.calcsize(self.order + code)
                known = at if at <= len(data) else known
            data = data[:known].ljust(size, b"\0")
        return struct.unpack(self.order + form, data)

    def string(self, offset: int) -> bytes | None:
        """The NUL-terminated string there, or None where elf_strval finds none."""
        if not 0 <= offset <= self.blob.size:
            return None
        data = self.blob.read(offset, STRING_MAX + 1)
        end = data.find(b"\0")
        return data[:end] if end >= 0 else None

    def segments(self) -> Iterator[_Segment]:
        for index in range(self.phnum):
            at = self.phoff + self.phentsize * index
            if at >= self.blob.size:
                return
            if self.wide:
                kind, flags, offset, _, paddr, filesz, memsz = self._fields(at, "IIQQQQQ")
            else:
                kind, offset, _, paddr, filesz, memsz, flags = self._fields(at, "IIIIIII")
            yield _Segment(kind, flags, offset, paddr, filesz, memsz)

    def sections(self) -> Iterator[_Section]:
        """All but the first, which ELF reserves."""
        for index in range(1, self.shnum):
            section = self.section(index)
            if section is None:
                return
            yield section

    def section(self, index: int) -> _Section | None:
        at = self.shoff + self.shentsize * index
        if index >= self.shnum or at >= self.blob.size:
            return None
        form = "IIQQQQ" if self.wide else "IIIIII"
        name, kind, _, _, offset, size = self._fields(at, form)
        return _Section(name, kind, offset, size)

    def notes(self, start: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """(offset, namesz, descsz, type) of each note; the last may run past the end."""
        start = _signed(start)
        end = start + size
        while start < end:
            namesz, descsz, kind = self._fields(start, "III")
            yield start, namesz, descsz, kind
            if not 0 <= start < self.blob.size:
                return
            start += 12 + _round4(namesz) + _round4(descsz)

    def number(self, offset: int, size: int) -> int:
        """A numeric note of 1, 2, 4 or 8 bytes; any other size reads as zero."""
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
        return self._fields(offset, code)[0] if code else 0


def parse(blob: Blob) -> ElfImage:
    """Read an ELF kernel (its magic has been seen).

    Raises BadImage if it cannot be booted in any way, Undecided if reading on
    would cost too much (see decompress).
    """
    elf = _Elf(blob)
    if elf.machine not in {EM_386, EM_X86_64}:
        name = MACHINES.get(elf.machine, f"machine {elf.machine}")
        raise BadImage(f"an ELF file for {name}, not for x86")
    for what, offset, size in (
        ("program", elf.phoff, elf.phentsize * elf.phnum),
        ("section", elf.shoff, elf.shentsize * elf.shnum),
    ):
        if (offset + size) % WRAP > blob.size:
            raise BadImage(
                f"the ELF file is cut short or corrupt: its {what} headers end at byte"
                f" {offset + size} of {blob.size}"
            )
    segments = list(elf.segments())
    start, end = _extent(blob, segments)
    found = _Notes(elf)
    found.search(segments)
    entry = found.number("ENTRY", elf.entry)
    image = ElfImage(32 if elf.machine == EM_386 else 64, entry, end - start)
    image.notes, image.noxs_abi = found.notes, found.noxs_abi
    if pv := _pv_refusal(elf, found, start, end):
        image.refusals["pv"] = pv
        image.entry = found.number("PHYS32_ENTRY", entry) & 0xFFFFFFFF
    if pvh := _pvh_refusal(found, start, end):
        image.refusals["pvh"] = pvh
    if pv and pvh:
        raise BadImage(pvh if "PHYS32_ENTRY" in found.notes else pv)
    return image


class _Notes:
    """Xen's notes and the noxs one."""

    def __init__(self, elf: _Elf) -> None:
        self.elf = elf
        self.notes: dict[str, Note] = {}
        self.noxs_abi: tuple[int, int] | None = None
        self.legacy = False
        self.count = 0

    def number(self, name: str, default: int) -> int:
        """The value of an integer note."""
        value = self.notes.get(name, default)
        return value if isinstance(value, int) else default

    def text(self, name: str) -> str:
        """The value of a string note, or ""; libelf keeps 15 characters."""
        value = self.notes.get(name, "")
        return value if isinstance(value, str) else ""

    def search(self, segments: list[_Segment]) -> None:
        """Look in each place in turn until one has notes of Xen's."""
        # Some linkers leave p_offset of an unplaced PT_NOTE zero (elf_xen_parse).
        places = [(s.offset, s.filesz) for s in segments if s.type == PT_NOTE and s.offset]
        if not self._collect(places):
            places = [(s.offset, s.size) for s in self.elf.sections() if s.type == SHT_NOTE]
            if not self._collect(places):
                self._guest_section()

    def _collect(self, places: list[tuple[int, int]]) -> bool:
        xen = False
        for offset, size in places:
            for at, namesz, descsz, kind in self.elf.notes(offset, size):
                if self.count >= NOTES_MAX:
                    break
                self.count += 1
                owner = self.elf.blob.read(at + 12, 8) if at + 12 >= 0 else b""
                desc = at + 12 + _round4(namesz)
                if owner.startswith(b"Xen\0"):
                    xen = True
                    self._xen(kind, desc, descsz)
                elif owner.startswith(NOXS_OWNER) and kind == NOTE_TYPE:
                    self._noxs(owner, namesz, desc, descsz)
        return xen

    def _xen(self, kind: int, desc: int, descsz: int) -> None:
        if kind in INTEGER_NOTES:
            self.notes[INTEGER_NOTES[kind]] = self.elf.number(desc, descsz)
        elif kind in STRING_NOTES:
            text = self.elf.string(desc)
            if text is not None:
                self.notes[STRING_NOTES[kind]] = text.decode("latin-1")
        elif kind in RAW_NOTES:
            self.notes[RAW_NOTES[kind]] = self.elf.blob.read(max(0, desc), min(descsz, STRING_MAX))

    def _noxs(self, owner: bytes, namesz: int, desc: int, descsz: int) -> None:
        if not owner.startswith(NOXS_OWNER + b"\0"):
            if namesz == len(NOXS_OWNER):
                raise BadImage("its noxs note is corrupt: the owner lacks its NUL")
            return
        if namesz != len(NOXS_OWNER) + 1 or descsz != 4 or desc + 4 > self.elf.blob.size:
            raise BadImage(
                f"its noxs note is corrupt: owner of {namesz} bytes, description of {descsz}"
                " (5 and 4 are wanted)"
            )
        value = int.from_bytes(self.elf.blob.read(desc, 4), "little")
        abi = (value >> 16, value & 0xFFFF)
        if abi[0] == 0:
            raise BadImage(f"its noxs note is corrupt: ABI version {abi[0]}.{abi[1]}")
        if self.noxs_abi not in {None, abi}:
            raise BadImage("it has two noxs notes that disagree")
        self.noxs_abi = abi

    def _guest_section(self) -> None:
        """The string that came before notes, NAME=value,NAME=value (elf_xen_parse_guest_info)."""
        elf = self.elf
        table = elf.section(elf.shstrndx) if elf.shstrndx else None
        if table is None:
            return
        for section in elf.sections():
            if elf.string(_signed(table.offset) + section.name) == b"__xen_guest":
                break
        else:
            return
        self.legacy = True
        start = section.offset
        data = elf.blob.read(start, LEGACY_MAX) if start < elf.blob.size else b""
        for item in data.split(b"\0")[0].decode("latin-1").split(","):
            name, _, value = item.partition("=")
            if name in LEGACY_INTEGERS:
                self.notes[LEGACY_INTEGERS[name]] = _strtoull(value)
            elif name in LEGACY_STRINGS:
                self.notes[LEGACY_STRINGS[name]] = value


def _extent(blob: Blob, segments: list[_Segment]) -> tuple[int, int]:
    """(first, last + 1) physical address of what is loaded (elf_parse_binary)."""
    loaded = [s for s in segments if s.type == PT_LOAD and s.flags & 7]
    if not loaded:
        raise BadImage("an ELF file without a loadable segment")
    start = min(s.paddr for s in loaded)
    end = max((s.paddr + s.memsz) % WRAP for s in loaded)
    if not 0 < end - start <= SPAN_MAX:
        raise BadImage(f"its segments make no sense: they span {start:#x} to {end:#x}")
    # elf_load_binary stops copying there, and elf_memcpy_safe leaves out what the file lacks:
    # without a word, either builds a guest with parts missing.
    if sum(s.memsz for s in loaded) > 2 * (-(-end // PAGE) - start // PAGE) * PAGE:
        raise BadImage("its segments overlap: together they are over twice the memory they span")
    for segment in loaded:
        if segment.filesz and segment.offset + segment.filesz > blob.size:
            raise BadImage(
                f"the ELF file is cut short: a segment ends at byte"
                f" {segment.offset + segment.filesz} of {blob.size}"
            )
    return start, end


def _pv_refusal(elf: _Elf, found: _Notes, start: int, end: int) -> str:
    """Why libelf would not boot it as PV, or ""."""
    if not found.notes:
        return "an ELF file without Xen notes (and without a __xen_guest section)"
    # elf_xen_note_check
    if not (
        found.text("LOADER").startswith("generic") or found.text("GUEST_OS").startswith("linux")
    ):
        if "PHYS32_ENTRY" in found.notes:
            return "a PVH-only kernel: it has no PV entry"
        return (
            "its Xen notes ask neither for the generic loader nor for linux"
            f" (LOADER {found.text('LOADER')!r}, GUEST_OS {found.text('GUEST_OS')!r})"
        )
    if not found.text("XEN_VERSION").startswith("xen-3.0"):
        return f"its Xen notes ask for Xen {found.text('XEN_VERSION')!r}, not xen-3.0"
    if needs_dom0(found.text("FEATURES")):
        return "it runs as Dom0 only"
    pae = found.text("PAE_MODE")
    if elf.machine == EM_386 and not (pae.startswith("yes") or "bimodal" in pae):
        return "a 32-bit kernel without PAE"  # no Xen since 4.0 runs one
    return _pv_addresses(elf, found, start, end)


def _pv_addresses(elf: _Elf, found: _Notes, start: int, end: int) -> str:
    """The addresses of a PV kernel, or what is wrong with them (elf_xen_addr_calc_check)."""
    base = found.number("VIRT_BASE", UNSET)
    offset = found.number("PADDR_OFFSET", UNSET)
    if base == UNSET:
        if offset != UNSET:
            return "its Xen notes have PADDR_OFFSET without VIRT_BASE"
        base = 0
    if offset == UNSET:
        offset = base if found.legacy else 0
    entry = found.number("ENTRY", UNSET)
    if entry == UNSET:
        entry = elf.entry
    shift = base - offset
    return _bounds((start + shift) % WRAP, (end + shift) % WRAP, base, entry, found)


def _pvh_refusal(found: _Notes, start: int, end: int) -> str:
    """Why libelf would not boot it as PVH, or ""."""
    entry = found.number("PHYS32_ENTRY", UNSET) & 0xFFFFFFFF
    if entry == 0xFFFFFFFF:
        return "a PV-only kernel: its Xen notes have no PHYS32_ENTRY"
    if needs_dom0(found.text("FEATURES")):
        return "it runs as Dom0 only"
    return _bounds(start, end, 0, entry, found)


def _bounds(start: int, end: int, base: int, entry: int, found: _Notes) -> str:
    # With a BSD symbol table libelf moves the end up: leave that bound to it.
    last = UNSET if "BSD_SYMTAB" in found.notes else end
    if not (base <= start <= end and start <= entry <= last):
        return f"its entry point {entry:#x} lies outside what it loads, {start:#x} to {end:#x}"
    p2m = found.number("INIT_P2M", UNSET)
    if p2m != UNSET and start <= p2m < end:
        return f"it wants its P2M table at {p2m:#x}, inside itself"
    return ""


def needs_dom0(features: str) -> bool:
    """Whether the FEATURES note requires ``dom0`` (elf_xen_parse_features)."""
    return "!dom0" in features.split("|")


def _round4(size: int) -> int:
    """Padding as libelf has it, in 32 bits."""
    return (size + 3) & 0xFFFFFFFC


def _signed(offset: int) -> int:
    """An offset so large that libelf's pointer wraps to before the image."""
    return offset - WRAP if offset >= WRAP - (1 << 46) else offset


def _strtoull(text: str) -> int:
    """strtoull(text, NULL, 0): 0 where there is no number."""
    text = text.strip()
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").lower()
    base, digits = 10, "0123456789"
    if text.startswith("0x"):
        base, digits, text = 16, "0123456789abcdef", text[2:]
    elif text.startswith("0"):
        base, digits = 8, "01234567"
    stop = next((i for i, c in enumerate(text) if c not in digits), len(text))
    return sign * min(int(text[:stop] or "0", base), UNSET) % WRAP
