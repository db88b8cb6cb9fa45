"""The device page: what a noxs guest reads instead of asking a store.

docs/noxs-abi.md is the contract. This codec is pure: bytes in, values out.

The page and its continuation pages form one linear *area*; every offset counts from
the start of the area::

    0x000  header          the toolstack writes
    0x100  request         the toolstack writes, one cache line
    0x140  guest words     the guest writes, then 0x180 its message
    0x200  more_pages      pfns of the area's pages 1..63
    0x300  reserved pages  extents that the guest must leave alone
    0x400  device slots    128 bytes each, running on into the next page if need be,
                           then the descriptors of queues 1.., then the metadata

The guest can write all of it. The toolstack therefore never reads back what it wrote:
it keeps its own copy (the *template*), changes that with ``patch_*``, and reads from
the guest nothing but `read_guest_words`. Reading a whole page is for guests, tests and
the curious: noxs/pageview.py.
"""

from binascii import crc32
from struct import error as StructError
from typing import NamedTuple

from noxs.abi import (
    ABI_MAJOR,
    ABI_MINOR,
    ABI_VERSION,
    EXTENT,
    EXTENTS_OFFSET,
    GUEST,
    GUEST_OFFSET,
    HALF,
    HEADER,
    HEADER_AT,
    MAGIC,
    MAX_DEVICES,
    MAX_EXTENTS,
    MAX_MESSAGE,
    MAX_METADATA,
    MAX_NAME,
    MAX_PAGES,
    MAX_POSTED,
    MAX_QUEUES,
    MORE_PAGES_OFFSET,
    NOTE_OWNER,
    NOTE_TYPE,
    PAGE_SIZE,
    QUEUE_SIZE,
    REQUEST_OFFSET,
    SLOT_SIZE,
    SLOTS_OFFSET,
    VBD,
    VBD_QUEUE,
    VBD_SLOT,
    VIF,
    VIF_AT,
    VIF_QUEUE,
    VIF_SLOT,
    WORD,
)
from xenctypes.errors import PageError
from xenctypes.shared import store_u32

__all__ = [
    "ABI_VERSION",
    "NOTE_OWNER",
    "NOTE_TYPE",
    "Buffer",
    "Device",
    "GuestWords",
    "Page",
    "Vbd",
    "VbdQueue",
    "Vif",
    "VifQueue",
    "check_abi",
    "check_vif",
    "encode",
    "metadata_capacity",
    "pages_needed",
    "patch_identity",
    "patch_metadata",
    "patch_vif",
    "publish",
    "read_guest_words",
    "write_request",
]

Buffer = bytes | bytearray | memoryview


class VifQueue(NamedTuple):
    """One pair of rings.

    ``*_pfn`` are guest page numbers, ``*_gref`` the references seeded for them, ``*_evtchn``
    the guest's ports (equal when one channel serves both rings). ``posted_count`` receive
    requests are already in the ring: request k has id k, page ``posted_pfn + k`` and
    reference ``posted_gref + k``.
    """

    tx_pfn: int
    tx_gref: int
    rx_pfn: int
    rx_gref: int
    tx_evtchn: int
    rx_evtchn: int
    posted_pfn: int = 0
    posted_gref: int = 0
    posted_count: int = 0


class Vif(NamedTuple):
    """A network interface whose backend is already connected.

    ``mac`` has 6 bytes; ``ipv4``, ``ipv4_gateway`` 4 and ``ipv6``, ``ipv6_gateway`` 16 in
    network order, b"" when there is none. ``features`` are VIF_* bits, ``mtu`` is in bytes.
    """

    handle: int
    mac: bytes
    queues: tuple[VifQueue, ...]
    backend: int = 0
    features: int = 0
    mtu: int = 1500
    ipv4: bytes = b""
    ipv4_prefix: int = 0
    ipv4_gateway: bytes = b""
    ipv6: bytes = b""
    ipv6_prefix: int = 0
    ipv6_gateway: bytes = b""


class VbdQueue(NamedTuple):
    """One block ring of 1, 2 or 4 pages, as many grant references, and the guest's port."""

    evtchn: int
    ring_pfns: tuple[int, ...]
    ring_grefs: tuple[int, ...]


class Vbd(NamedTuple):
    """A block device whose backend is already connected.

    ``handle`` is its device number and ``sectors`` counts ``sector_size`` units, both as in
    public/io/blkif.h; other sizes are in bytes; ``info`` has VBD_READONLY and its like.
    """

    handle: int
    queues: tuple[VbdQueue, ...]
    sectors: int
    sector_size: int = 512
    physical_sector_size: int = 512
    info: int = 0
    features: int = 0
    max_segments: int = 0
    discard_granularity: int = 0
    discard_alignment: int = 0
    backend: int = 0


Device = Vif | Vbd


class Page(NamedTuple):
    """Everything that a guest is told.

    ``uuid`` has 16 bytes. ``devices`` are in slot order, None for an empty slot.
    ``first_free_gref`` is the first grant reference that the guest may use. ``more_pages``
    are pfns for the area's pages after the first (`pages_needed`); ``reserved`` lists
    (pfn, count) extents that belong to the toolstack. ``generation`` is even.
    """

    name: str
    domid: int
    uuid: bytes
    devices: tuple[Device | None, ...] = ()
    metadata: bytes = b""
    first_free_gref: int = 2
    more_pages: tuple[int, ...] = ()
    reserved: tuple[tuple[int, int], ...] = ()
    generation: int = 2


class GuestWords(NamedTuple):
    """What the guest says of itself: untrusted numbers and a printable text.

    ``ack`` is the sequence number of the last request that it took, ``ack_result`` an ACK_*
    value, ``state`` a STATE_* value (any other number means nothing), ``accepts`` has bit n
    set for each request code n that it obeys, ``abi`` is the version that it was built for.
    """

    ack: int = 0
    ack_result: int = 0
    state: int = 0
    exit_code: int = 0
    accepts: int = 0
    message: str = ""
    abi: int = 0


def _exact(what: str, value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise PageError(f"{what}: {len(value)} bytes, needs {size}")
    return value


def _bounded(what: str, count: int, bound: int) -> None:
    if count > bound:
        raise PageError(f"device page: {count} {what}, at most {bound}")


def _network(what: str, address: bytes, prefix: int, gateway: bytes, size: int) -> None:
    if not 0 <= prefix <= size * 8:
        raise PageError(f"{what}: prefix length {prefix} is not within 0..{size * 8}")
    if address:
        _exact(what, address, size)
    elif prefix or gateway:
        raise PageError(f"{what}: a prefix or gateway without an address")
    if gateway:
        _exact(f"{what} gateway", gateway, size)


def check_vif(vif: Vif) -> None:
    """Raise PageError for a MAC or an address that is none."""
    what = f"vif {vif.handle}"
    _exact(f"{what}: mac", vif.mac, 6)
    _network(f"{what}: ipv4", vif.ipv4, vif.ipv4_prefix, vif.ipv4_gateway, 4)
    _network(f"{what}: ipv6", vif.ipv6, vif.ipv6_prefix, vif.ipv6_gateway, 16)


def _vif_queue(queue: VifQueue) -> tuple[int | bytes, ...]:
    if not 0 <= queue.posted_count <= MAX_POSTED:
        raise PageError(f"vif queue: {queue.posted_count} posted buffers, at most {MAX_POSTED}")
    return (*queue, b"")


def _vbd_queue(queue: VbdQueue) -> tuple[int | bytes, ...]:
    count = len(queue.ring_pfns)
    if count not in {1, 2, 4} or len(queue.ring_grefs) != count:
        raise PageError("vbd queue: a ring has 1, 2 or 4 pages and as many references")
    pad = (0,) * (4 - count)
    order = count.bit_length() - 1
    return (order, queue.evtchn, *queue.ring_pfns, *pad, *queue.ring_grefs, *pad, b"")


def _name(name: str) -> bytes:
    raw = name.encode() if name.isprintable() else b""
    if not 0 < len(raw) <= MAX_NAME:
        raise PageError(f"domain name: 1 to {MAX_NAME} printable bytes of UTF-8, got {name!r}")
    return raw


def pages_needed(devices: tuple[Device | None, ...], metadata_length: int) -> int:
    """How many pages an area with these devices and that much metadata has."""
    queues = sum(len(device.queues) - 1 for device in devices if device is not None)
    end = SLOTS_OFFSET + len(devices) * SLOT_SIZE + queues * QUEUE_SIZE + metadata_length
    return -(-end // PAGE_SIZE)


def more_pages(devices: int, metadata_length: int) -> int:
    """How many pages the area of a guest with so many devices needs beyond its first.

    Each has one queue.
    """
    return pages_needed((None,) * devices, metadata_length) - 1


def check_abi(version: int) -> None:
    """Raise PageError unless a guest whose note carries ``version`` can run on this ABI."""
    major, minor = version >> 16, version & 0xFFFF
    if major != ABI_MAJOR or minor > ABI_MINOR:
        raise PageError(
            f"the image wants noxs ABI {major}.{minor}, this toolstack speaks "
            f"{ABI_MAJOR}.{ABI_MINOR}",
            hint="build it against this release's noxs.h",
        )


def _slot(area: bytearray, at: int, device: Device, more: int) -> int:
    """Encode a device at ``at``, its further queues at ``more``; return where those end."""
    count = len(device.queues)
    if not 1 <= count <= MAX_QUEUES:
        raise PageError(f"device {device.handle}: {count} queues, not within 1..{MAX_QUEUES}")
    start = more if count > 1 else 0
    if isinstance(device, Vif):
        check_vif(device)
        VIF_SLOT.pack_into(
            area,
            at,
            VIF,
            0,
            device.handle,
            device.backend,
            count,
            device.features,
            start,
            device.mtu,
            device.mac,
            device.ipv4,
            device.ipv4_gateway,
            device.ipv4_prefix,
            device.ipv6_prefix,
            b"",
            device.ipv6,
            device.ipv6_gateway,
            *_vif_queue(device.queues[0]),
            b"",
        )
        for queue in device.queues[1:]:
            VIF_QUEUE.pack_into(area, more, *_vif_queue(queue))
            more += QUEUE_SIZE
    else:
        VBD_SLOT.pack_into(
            area,
            at,
            VBD,
            0,
            device.handle,
            device.backend,
            count,
            device.features,
            start,
            device.sector_size,
            device.sectors,
            device.info,
            device.physical_sector_size,
            device.max_segments,
            device.discard_granularity,
            device.discard_alignment,
            b"",
            *_vbd_queue(device.queues[0]),
            b"",
        )
        for ring in device.queues[1:]:
            VBD_QUEUE.pack_into(area, more, *_vbd_queue(ring))
            more += QUEUE_SIZE
    return more


def encode(page: Page) -> bytearray:
    """The whole area: a multiple of 4096 bytes, as many pages as ``1 + len(more_pages)``.

    The control words come out as zero: this is for a domain that has not run yet.
    """
    pages = 1 + len(page.more_pages)
    devices = page.devices
    _bounded("devices", len(devices), MAX_DEVICES)
    _bounded("reserved extents", len(page.reserved), MAX_EXTENTS)
    _bounded("bytes of metadata", len(page.metadata), MAX_METADATA)
    _bounded("pages", pages, MAX_PAGES)
    needed = pages_needed(devices, len(page.metadata))
    if needed > pages:
        raise PageError(f"the device page needs {needed} pages, it was given {pages}")
    if page.generation & 1:
        raise PageError("an odd generation means a change under way")
    more = SLOTS_OFFSET + len(devices) * SLOT_SIZE
    area = bytearray(pages * PAGE_SIZE)
    try:
        for index, device in enumerate(devices):
            if device is not None:
                more = _slot(area, SLOTS_OFFSET + index * SLOT_SIZE, device, more)
        HEADER.pack_into(
            area,
            0,
            MAGIC,
            ABI_MAJOR,
            ABI_MINOR,
            page.generation,
            pages,
            REQUEST_OFFSET,
            SLOTS_OFFSET,
            len(devices),
            SLOT_SIZE,
            more,
            len(page.metadata),
            crc32(page.metadata),
            page.first_free_gref,
            page.domid,
            len(page.reserved),
            0,
            _exact("uuid", page.uuid, 16),
            b"",
            _name(page.name),
        )
        for index, pfn in enumerate(page.more_pages):
            WORD.pack_into(area, MORE_PAGES_OFFSET + 4 * index, pfn)
        for index, (pfn, count) in enumerate(page.reserved):
            EXTENT.pack_into(area, EXTENTS_OFFSET + 8 * index, pfn, count)
    except StructError as error:
        raise PageError(f"device page: a number out of range: {error}") from error
    area[more : more + len(page.metadata)] = page.metadata
    return area


# Late changes. They work on the toolstack's own template (what `encode` returned), never
# on the guest's memory, so that no number read here comes from a guest.


def patch_identity(
    template: bytearray,
    *,
    name: str | None = None,
    domid: int | None = None,
    uuid: bytes | None = None,
) -> None:
    """Give the template another name, domain id or UUID (16 bytes)."""
    if name is not None:
        at = HEADER_AT["name"]
        template[at : at + MAX_NAME + 1] = _name(name).ljust(MAX_NAME + 1, b"\0")
    if domid is not None:
        if not 0 <= domid <= 0xFFFF:
            raise PageError(f"domain id {domid} does not fit")
        HALF.pack_into(template, HEADER_AT["domid"], domid)
    if uuid is not None:
        at = HEADER_AT["uuid"]
        template[at : at + 16] = _exact("uuid", uuid, 16)


def patch_vif(
    template: bytearray,
    index: int,
    *,
    mac: bytes | None = None,
    mtu: int | None = None,
    ipv4: tuple[bytes, int, bytes] | None = None,
    ipv6: tuple[bytes, int, bytes] | None = None,
) -> None:
    """Change what may change late in slot ``index``.

    ``ipv4`` and ``ipv6`` are (address, prefix length, gateway), b"" for none.
    """
    at = SLOTS_OFFSET + index * SLOT_SIZE
    (count,) = HALF.unpack_from(template, HEADER_AT["device_count"])
    if not 0 <= index < count or HALF.unpack_from(template, at)[0] != VIF:
        raise PageError(f"slot {index} holds no vif")
    if mac is not None:
        spot = at + VIF_AT["mac"]
        template[spot : spot + 6] = _exact(f"slot {index}: mac", mac, 6)
    if mtu is not None:
        if not 0 <= mtu <= 0xFFFF:
            raise PageError(f"slot {index}: mtu {mtu} does not fit")
        HALF.pack_into(template, at + VIF_AT["mtu"], mtu)
    for family, size, value in (("ipv4", 4, ipv4), ("ipv6", 16, ipv6)):
        if value is None:
            continue
        address, prefix, gateway = value
        _network(f"slot {index}: {family}", address, prefix, gateway, size)
        spot = at + VIF_AT[family]
        template[spot : spot + size] = address.ljust(size, b"\0")
        template[at + VIF_AT[f"{family}_prefix"]] = prefix
        spot = at + VIF_AT[f"{family}_gateway"]
        template[spot : spot + size] = gateway.ljust(size, b"\0")


def metadata_capacity(template: bytearray) -> int:
    """How many bytes of metadata fit into the template's pages."""
    (offset,) = WORD.unpack_from(template, HEADER_AT["metadata_offset"])
    return min(len(template) - int(offset), MAX_METADATA)


def patch_metadata(template: bytearray, metadata: bytes) -> None:
    """Replace the metadata; what does not fit into the template's pages is refused."""
    room = metadata_capacity(template)
    if len(metadata) > room:
        raise PageError(f"metadata: {len(metadata)} bytes, there is room for {room}")
    (offset,) = WORD.unpack_from(template, HEADER_AT["metadata_offset"])
    (old,) = WORD.unpack_from(template, HEADER_AT["metadata_length"])
    template[offset : offset + max(old, len(metadata))] = metadata.ljust(old, b"\0")
    WORD.pack_into(template, HEADER_AT["metadata_length"], len(metadata))
    WORD.pack_into(template, HEADER_AT["metadata_crc"], crc32(metadata))


def publish(live: bytearray | memoryview, template: bytearray) -> None:
    """Carry a changed template over to a guest that runs, so that it never reads half of it.

    ``live`` maps the guest's whole area and is only written. The generation goes odd, then
    to the next even number, in the template too; the control words stay as they are. The
    order of the stores is the program's, which is what x86 keeps.
    """
    at = HEADER_AT["generation"]
    generation = (WORD.unpack_from(template, at)[0] + 2) & 0xFFFFFFFF
    store_u32(live, at, generation - 1 & 0xFFFFFFFF)
    live[:at] = template[:at]
    live[at + 4 : REQUEST_OFFSET] = template[at + 4 : REQUEST_OFFSET]
    live[MORE_PAGES_OFFSET : len(template)] = template[MORE_PAGES_OFFSET:]
    WORD.pack_into(template, at, generation)
    store_u32(live, at, generation)


def write_request(live: bytearray | memoryview, seq: int, code: int, argument: int = 0) -> None:
    """Ask something of a running guest; the caller then rings the store event channel.

    ``seq`` is the caller's own count, never 0, one more than in the last request.
    """
    store_u32(live, REQUEST_OFFSET + 4, code)
    store_u32(live, REQUEST_OFFSET + 8, argument)
    store_u32(live, REQUEST_OFFSET, seq)


def read_guest_words(live: Buffer) -> GuestWords:
    """Copy the guest's words out of its page, once, and make them safe to show."""
    raw = bytes(memoryview(live)[GUEST_OFFSET : GUEST_OFFSET + GUEST.size])
    ack, result, state, exit_code, accepts, length, abi, _, message = GUEST.unpack(raw)
    text = message[: min(length, MAX_MESSAGE)].decode(errors="replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "?" for c in text)
    return GuestWords(ack, result, state, exit_code, accepts, text, abi)
