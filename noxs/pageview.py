"""A device page as a guest reads it: for tests, and for a person who looks at one."""

from binascii import crc32
from struct import Struct

from noxs.abi import (
    ABI_MAJOR,
    ABI_MINOR,
    EXTENT,
    EXTENTS_OFFSET,
    HALF,
    HEADER,
    MAGIC,
    MAX_DEVICES,
    MAX_EXTENTS,
    MAX_METADATA,
    MAX_NAME,
    MAX_PAGES,
    MAX_POSTED,
    MAX_QUEUES,
    MORE_PAGES_OFFSET,
    PAGE_SIZE,
    QUEUE_SIZE,
    REQUEST_OFFSET,
    SLOT_SIZE,
    SLOTS_OFFSET,
    VBD,
    VBD_QUEUE,
    VBD_SLOT,
    VIF,
    VIF_QUEUE,
    VIF_SLOT,
)
from noxs.page import Buffer, Device, Page, Vbd, VbdQueue, Vif, VifQueue, check_vif
from xenctypes.errors import PageError


def _decode_vif(area: Buffer, at: int) -> Vif:
    raw = VIF_SLOT.unpack_from(area, at)
    _, _, handle, backend, count, features, more = raw[:7]
    mtu, mac, ipv4, gateway4, prefix4, prefix6, _, ipv6, gateway6 = raw[7:16]
    queues = [VifQueue(*raw[16:25])]
    queues.extend(
        VifQueue(*VIF_QUEUE.unpack_from(area, spot)[:9]) for spot in _queues(area, at, count, more)
    )
    vif = Vif(
        handle,
        mac,
        tuple(queues),
        backend=backend,
        features=features,
        mtu=mtu,
        ipv4=ipv4 if any(ipv4) else b"",
        ipv4_prefix=prefix4,
        ipv4_gateway=gateway4 if any(gateway4) else b"",
        ipv6=ipv6 if any(ipv6) else b"",
        ipv6_prefix=prefix6,
        ipv6_gateway=gateway6 if any(gateway6) else b"",
    )
    check_vif(vif)
    for queue in queues:
        if queue.posted_count > MAX_POSTED:
            raise PageError(f"vif {handle}: {queue.posted_count} posted buffers")
    return vif


def _decode_vbd(area: Buffer, at: int) -> Vbd:
    raw = VBD_SLOT.unpack_from(area, at)
    _, _, handle, backend, count, features, more = raw[:7]
    queues = [_decode_vbd_queue(raw[15:26])]
    queues.extend(
        _decode_vbd_queue(VBD_QUEUE.unpack_from(area, spot))
        for spot in _queues(area, at, count, more)
    )
    return Vbd(
        handle,
        tuple(queues),
        sector_size=raw[7],
        sectors=raw[8],
        info=raw[9],
        physical_sector_size=raw[10],
        max_segments=raw[11],
        discard_granularity=raw[12],
        discard_alignment=raw[13],
        features=features,
        backend=backend,
    )


def _decode_vbd_queue(raw: tuple[int, ...]) -> VbdQueue:
    if raw[0] > 2:
        raise PageError(f"vbd queue: ring order {raw[0]}, at most 2")
    count = 1 << raw[0]
    return VbdQueue(raw[1], raw[2 : 2 + count], raw[6 : 6 + count])


def _queues(area: Buffer, at: int, count: int, more: int) -> range:
    """Offsets of the queues after the first, checked to be inside the area."""
    if not 1 <= count <= MAX_QUEUES:
        raise PageError(f"slot at {at:#x}: {count} queues, not within 1..{MAX_QUEUES}")
    end = more + (count - 1) * QUEUE_SIZE
    if count > 1 and not SLOTS_OFFSET <= more < end <= len(area):
        raise PageError(f"slot at {at:#x}: its queues lie outside the page")
    return range(more, end, QUEUE_SIZE)


def _check(true: bool, what: str) -> None:
    if not true:
        raise PageError(f"device page: {what}")


def decode(area: Buffer) -> Page:
    """Read an area as a guest would, with every bound checked; PageError says what is off.

    The toolstack decides nothing from it. Slots of an unknown type come out as None.
    """
    _check(
        len(area) >= PAGE_SIZE and len(area) % PAGE_SIZE == 0,
        f"{len(area)} bytes is no number of pages",
    )
    (
        magic,
        major,
        minor,
        generation,
        pages,
        header_size,
        devices_offset,
        device_count,
        slot_size,
        metadata_offset,
        metadata_length,
        metadata_crc,
        first_free_gref,
        domid,
        extent_count,
        _,
        uuid,
        _,
        raw_name,
    ) = HEADER.unpack_from(area, 0)
    _check(magic == MAGIC, "no magic")
    _check(major == ABI_MAJOR, f"ABI {major}.{minor}, this is {ABI_MAJOR}.{ABI_MINOR}")
    _check(not generation & 1, "a change is under way")
    _check(header_size == REQUEST_OFFSET, f"a header of {header_size} bytes")
    _check(
        pages <= MAX_PAGES and pages * PAGE_SIZE == len(area),
        f"{pages} pages announced, {len(area) // PAGE_SIZE} given",
    )
    _check(device_count <= MAX_DEVICES, f"{device_count} devices, at most {MAX_DEVICES}")
    _check(
        slot_size >= SLOT_SIZE and not PAGE_SIZE % slot_size and not devices_offset % slot_size,
        f"slots of {slot_size} bytes at {devices_offset:#x}",
    )
    _check(
        SLOTS_OFFSET <= devices_offset <= len(area) - device_count * slot_size,
        "the device slots lie outside the page",
    )
    _check(extent_count <= MAX_EXTENTS, f"{extent_count} reserved extents, at most {MAX_EXTENTS}")
    _check(
        metadata_length <= MAX_METADATA
        and SLOTS_OFFSET <= metadata_offset <= len(area) - metadata_length,
        "the metadata lies outside the page",
    )
    metadata = bytes(area[metadata_offset : metadata_offset + metadata_length])
    _check(crc32(metadata) == metadata_crc, "the metadata's checksum is wrong")
    devices = (
        _decode_slot(area, devices_offset + index * slot_size) for index in range(device_count)
    )
    return Page(
        _decode_name(raw_name),
        domid,
        uuid,
        devices=tuple(devices),
        metadata=metadata,
        first_free_gref=first_free_gref,
        more_pages=Struct(f"<{pages - 1}I").unpack_from(area, MORE_PAGES_OFFSET),
        reserved=tuple(
            EXTENT.unpack_from(area, EXTENTS_OFFSET + 8 * index) for index in range(extent_count)
        ),
        generation=generation,
    )


def _decode_slot(area: Buffer, at: int) -> Device | None:
    (kind,) = HALF.unpack_from(area, at)
    if kind == VIF:
        return _decode_vif(area, at)
    if kind == VBD:
        return _decode_vbd(area, at)
    return None


def _decode_name(raw: bytes) -> str:
    text = raw.partition(b"\0")[0]
    _check(0 < len(text) <= MAX_NAME, "the domain has no name")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise PageError("device page: the domain's name is not UTF-8") from error
