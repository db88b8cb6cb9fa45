"""The noxs ABI as data: numbers, and the fields of every struct of noxs/guest/noxs.h.

docs/noxs-abi.md is the contract; a test compiles the header and compares it with this.
Little-endian, every field on its natural boundary, reserved fields zero.
"""

from struct import Struct, calcsize

MAGIC = 0x53584F4E  # "NOXS"
ABI_MAJOR = 1
ABI_MINOR = 0
ABI_VERSION = ABI_MAJOR << 16 | ABI_MINOR

NOTE_OWNER = "noxs"
NOTE_TYPE = 1

PAGE_SIZE = 4096
MAX_PAGES = 64
MAX_DEVICES = 128
MAX_QUEUES = 64
MAX_METADATA = 65536
MAX_NAME = 127
MAX_MESSAGE = 128
MAX_EXTENTS = 16
MAX_POSTED = 256

# Device types. A guest skips those that it does not know.
EMPTY = 0
VIF = 1
VBD = 2

# Request codes.
REQUEST_NONE = 0
REQUEST_POWEROFF = 1
REQUEST_REBOOT = 2
REQUEST_SUSPEND = 3
REQUEST_RESUME = 4
REQUEST_SYSRQ = 5
REQUEST_REREAD = 6

# Acknowledge results.
ACK_OK = 0
ACK_UNSUPPORTED = 1
ACK_REFUSED = 2

# The guest's state word.
STATE_BOOTING = 0
STATE_READY = 1
STATE_POWEROFF = 2
STATE_REBOOT = 3
STATE_SUSPENDED = 4
STATE_FAILED = 5

# Features of a vif: what the backend was told that it may send ...
VIF_RX_SG = 1 << 0
VIF_RX_GSO_TCPV4 = 1 << 1
VIF_RX_GSO_TCPV6 = 1 << 2
VIF_RX_CSUM_BLANK = 1 << 3
VIF_RX_CSUM_BLANK_V6 = 1 << 4
VIF_RX_NOTIFY = 1 << 5
# ... what the guest may send ...
VIF_TX_SG = 1 << 8
VIF_TX_GSO_TCPV4 = 1 << 9
VIF_TX_GSO_TCPV6 = 1 << 10
VIF_TX_CSUM_BLANK = 1 << 11
VIF_TX_CSUM_BLANK_V6 = 1 << 12
# ... and how the two are connected.
VIF_SPLIT_EVTCHN = 1 << 16
VIF_CTRL_RING = 1 << 17
VIF_MULTICAST_CONTROL = 1 << 18

# Features of a vbd, after the backend's feature-* keys (public/io/blkif.h).
VBD_FLUSH = 1 << 0
VBD_BARRIER = 1 << 1
VBD_DISCARD = 1 << 2
VBD_DISCARD_SECURE = 1 << 3
VBD_PERSISTENT = 1 << 4
VBD_INDIRECT = 1 << 5

# Info bits of a vbd: VDISK_* in public/io/blkif.h.
VBD_CDROM = 1
VBD_REMOVABLE = 2
VBD_READONLY = 4

_Fields = tuple[tuple[str, str], ...]

_HEADER_FIELDS: _Fields = (
    ("magic", "I"),
    ("abi_major", "H"),
    ("abi_minor", "H"),
    ("generation", "I"),
    ("pages", "H"),
    ("header_size", "H"),
    ("devices_offset", "I"),
    ("device_count", "H"),
    ("slot_size", "H"),
    ("metadata_offset", "I"),
    ("metadata_length", "I"),
    ("metadata_crc", "I"),
    ("first_free_gref", "I"),
    ("domid", "H"),
    ("extent_count", "H"),
    ("flags", "I"),
    ("uuid", "16s"),
    ("reserved", "64s"),
    ("name", "128s"),
)
_REQUEST_FIELDS: _Fields = (("seq", "I"), ("code", "I"), ("argument", "I"), ("reserved", "52s"))
_GUEST_FIELDS: _Fields = (
    ("ack", "I"),
    ("ack_result", "I"),
    ("state", "I"),
    ("exit_code", "i"),
    ("accepts", "I"),
    ("message_length", "I"),
    ("abi", "I"),
    ("reserved", "36s"),
    ("message", "128s"),
)
_EXTENT_FIELDS: _Fields = (("pfn", "I"), ("count", "I"))
_DEVICE_FIELDS: _Fields = (
    ("type", "H"),
    ("flags", "H"),
    ("handle", "I"),
    ("backend", "H"),
    ("queues", "H"),
    ("features", "I"),
    ("more_queues", "I"),
)
_VIF_QUEUE_FIELDS: _Fields = (
    ("tx_pfn", "I"),
    ("tx_gref", "I"),
    ("rx_pfn", "I"),
    ("rx_gref", "I"),
    ("tx_evtchn", "I"),
    ("rx_evtchn", "I"),
    ("posted_pfn", "I"),
    ("posted_gref", "I"),
    ("posted_count", "I"),
    ("reserved", "12s"),
)
_VIF_FIELDS: _Fields = (
    ("mtu", "H"),
    ("mac", "6s"),
    ("ipv4", "4s"),
    ("ipv4_gateway", "4s"),
    ("ipv4_prefix", "B"),
    ("ipv6_prefix", "B"),
    ("reserved0", "2s"),
    ("ipv6", "16s"),
    ("ipv6_gateway", "16s"),
)
_VBD_QUEUE_FIELDS: _Fields = (
    ("ring_order", "I"),
    ("evtchn", "I"),
    ("ring_pfn", "4I"),
    ("ring_gref", "4I"),
    ("reserved", "8s"),
)
_VBD_FIELDS: _Fields = (
    ("sector_size", "I"),
    ("sectors", "Q"),
    ("info", "I"),
    ("physical_sector_size", "I"),
    ("max_segments", "I"),
    ("discard_granularity", "I"),
    ("discard_alignment", "I"),
    ("reserved0", "20s"),
)
_TAIL_FIELDS: _Fields = (("reserved", "8s"),)

# Struct name in noxs.h -> its own fields in order, as struct formats. Slots repeat the
# fields of the device head and of queue 0, prefixed as C members.
LAYOUT: dict[str, _Fields] = {
    "noxs_header": _HEADER_FIELDS,
    "noxs_request": _REQUEST_FIELDS,
    "noxs_guest": _GUEST_FIELDS,
    "noxs_extent": _EXTENT_FIELDS,
    "noxs_device": _DEVICE_FIELDS,
    "noxs_vif_queue": _VIF_QUEUE_FIELDS,
    "noxs_vif": (
        *(("dev." + name, fmt) for name, fmt in _DEVICE_FIELDS),
        *_VIF_FIELDS,
        *(("queue." + name, fmt) for name, fmt in _VIF_QUEUE_FIELDS),
        *_TAIL_FIELDS,
    ),
    "noxs_vbd_queue": _VBD_QUEUE_FIELDS,
    "noxs_vbd": (
        *(("dev." + name, fmt) for name, fmt in _DEVICE_FIELDS),
        *_VBD_FIELDS,
        *(("queue." + name, fmt) for name, fmt in _VBD_QUEUE_FIELDS),
        *_TAIL_FIELDS,
    ),
}


def _packer(name: str) -> Struct:
    return Struct("<" + "".join(fmt for _, fmt in LAYOUT[name]))


def offsets(name: str) -> dict[str, int]:
    """Offset in bytes of every field of a struct of LAYOUT."""
    table = {}
    at = 0
    for field, fmt in LAYOUT[name]:
        table[field] = at
        at += calcsize("<" + fmt)
    return table


HEADER = _packer("noxs_header")
GUEST = _packer("noxs_guest")
EXTENT = _packer("noxs_extent")
DEVICE = _packer("noxs_device")
VIF_SLOT = _packer("noxs_vif")
VIF_QUEUE = _packer("noxs_vif_queue")
VBD_SLOT = _packer("noxs_vbd")
VBD_QUEUE = _packer("noxs_vbd_queue")
# Native mode stores a word at once; "<I" stores it byte by byte (CPython's _struct.c).
WORD = Struct("@I")
HALF = Struct("@H")

HEADER_AT = offsets("noxs_header")
VIF_AT = offsets("noxs_vif")

REQUEST_OFFSET = 0x100
GUEST_OFFSET = 0x140
MORE_PAGES_OFFSET = 0x200
EXTENTS_OFFSET = 0x300
SLOTS_OFFSET = 0x400
SLOT_SIZE = 128
QUEUE_SIZE = 48
