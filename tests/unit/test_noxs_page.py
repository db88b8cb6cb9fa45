"""The device page: what is encoded is what a guest reads, and nothing a guest writes harms."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path
from struct import calcsize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noxs import abi, page
from noxs.pageview import decode
from xenctypes.errors import PageError

GUEST = Path(__file__).parents[2] / "noxs" / "guest"

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1).filter(
    lambda text: len(text.encode()) <= abi.MAX_NAME
)
vif_queues = st.builds(page.VifQueue, *[u32] * 8, posted_count=st.integers(0, abi.MAX_POSTED))


def networks(size: int) -> st.SearchStrategy[tuple[bytes, int, bytes]]:
    address = st.binary(min_size=size, max_size=size).filter(any)
    return st.one_of(
        st.just((b"", 0, b"")),
        st.tuples(address, st.integers(0, size * 8), st.one_of(st.just(b""), address)),
    )


@st.composite
def vifs(draw: st.DrawFn) -> page.Vif:
    ipv4, ipv6 = draw(networks(4)), draw(networks(16))
    return page.Vif(
        draw(u32),
        draw(st.binary(min_size=6, max_size=6)),
        tuple(draw(st.lists(vif_queues, min_size=1, max_size=4))),
        backend=draw(u16),
        features=draw(u32),
        mtu=draw(u16),
        ipv4=ipv4[0],
        ipv4_prefix=ipv4[1],
        ipv4_gateway=ipv4[2],
        ipv6=ipv6[0],
        ipv6_prefix=ipv6[1],
        ipv6_gateway=ipv6[2],
    )


@st.composite
def vbd_queues(draw: st.DrawFn) -> page.VbdQueue:
    count = draw(st.sampled_from((1, 2, 4)))
    numbers = st.lists(u32, min_size=count, max_size=count).map(tuple)
    return page.VbdQueue(draw(u32), draw(numbers), draw(numbers))


vbds = st.builds(
    page.Vbd,
    u32,
    st.lists(vbd_queues(), min_size=1, max_size=3).map(tuple),
    sectors=st.integers(0, 2**64 - 1),
    sector_size=u32,
    physical_sector_size=u32,
    info=u32,
    features=u32,
    max_segments=u32,
    discard_granularity=u32,
    discard_alignment=u32,
    backend=u16,
)


@st.composite
def pages(draw: st.DrawFn) -> page.Page:
    devices = tuple(draw(st.lists(st.one_of(vifs(), vbds, st.none()), max_size=30)))
    metadata = draw(st.binary(max_size=200)) * draw(st.sampled_from((1, 20, 300)))
    needed = page.pages_needed(devices, len(metadata))
    more = st.lists(u32, min_size=needed - 1, max_size=needed + 1).map(tuple)
    extents = st.lists(st.tuples(u32, u32), max_size=abi.MAX_EXTENTS).map(tuple)
    return page.Page(
        draw(names),
        draw(u16),
        draw(st.binary(min_size=16, max_size=16)),
        devices=devices,
        metadata=metadata,
        first_free_gref=draw(u32),
        more_pages=draw(more),
        reserved=draw(extents),
        generation=draw(st.integers(0, 1000)) * 2,
    )


def plain(vif_count: int = 1, **changes: object) -> page.Page:
    queue = page.VifQueue(1000, 8, 1001, 9, 5, 5)
    vif = page.Vif(0, b"\x00\x16\x3e\x01\x02\x03", (queue,))
    values = {"name": "web", "domid": 7, "uuid": bytes(range(16)), "devices": (vif,) * vif_count}
    return page.Page(**{**values, **changes})  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(pages())
def test_a_guest_reads_what_was_encoded(given_page: page.Page) -> None:
    area = page.encode(given_page)
    assert len(area) == abi.PAGE_SIZE * (1 + len(given_page.more_pages))
    assert decode(area) == given_page


@settings(max_examples=300, deadline=None)
@given(pages(), st.data())
def test_a_damaged_page_is_read_or_refused(given_page: page.Page, data: st.DataObject) -> None:
    area = page.encode(given_page)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(0, 0x40), st.integers(0, len(area) - 1)))
        area[at] = data.draw(st.integers(0, 255))
    with suppress(PageError):
        decode(area)


@given(st.binary(max_size=9000))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(PageError):
        decode(raw)


def test_sixteen_vifs_fit_into_one_page() -> None:
    given_page = plain(16)
    assert page.pages_needed(given_page.devices, 1024) == 1
    assert decode(page.encode(given_page)) == given_page


def test_no_slot_straddles_a_page() -> None:
    given_page = plain(abi.MAX_DEVICES, more_pages=(1, 2, 3, 4))
    assert decode(page.encode(given_page)) == given_page
    assert abi.PAGE_SIZE % abi.SLOT_SIZE == abi.SLOTS_OFFSET % abi.SLOT_SIZE == 0


def test_64_kib_of_metadata() -> None:
    blob = bytes(range(256)) * 256
    count = page.pages_needed(plain().devices, len(blob))
    given_page = plain(metadata=blob, more_pages=tuple(range(count - 1)))
    assert decode(page.encode(given_page)).metadata == blob


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metadata": b"x" * 4096}, "needs 2 pages"),
        ({"metadata": b"x" * 65537, "more_pages": tuple(range(20))}, "65537 bytes of metadata"),
        ({"vif_count": 129, "more_pages": (1, 2, 3, 4)}, "129 devices"),
        ({"more_pages": tuple(range(64))}, "65 pages"),
        ({"reserved": ((1, 1),) * 17}, "17 reserved extents"),
        ({"name": ""}, "domain name"),
        ({"name": "x" * 128}, "domain name"),
        ({"name": "a\0b"}, "domain name"),
        ({"name": "a\nb"}, "domain name"),
        ({"name": "\ud800"}, "domain name"),
        ({"uuid": b"short"}, "uuid: 5 bytes"),
        ({"domid": 65536}, "out of range"),
        ({"first_free_gref": -1}, "out of range"),
        ({"more_pages": (1 << 32,)}, "out of range"),
        ({"generation": 3}, "odd generation"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(PageError, match=says):
        page.encode(plain(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mac": b"12345"}, "mac: 5 bytes"),
        ({"ipv4": b"123"}, "ipv4: 3 bytes"),
        ({"ipv4": b"1234", "ipv4_prefix": 33}, "prefix length 33"),
        ({"ipv6_gateway": b"x" * 16}, "without an address"),
        ({"ipv6": b"x" * 16, "ipv6_gateway": b"x"}, "gateway: 1 bytes"),
        ({"queues": ()}, "0 queues"),
        ({"mtu": 65536}, "out of range"),
    ],
)
def test_a_bad_vif_is_refused(changes: dict[str, object], says: str) -> None:
    vif = plain().devices[0]
    assert isinstance(vif, page.Vif)
    with pytest.raises(PageError, match=says):
        page.encode(plain()._replace(devices=(vif._replace(**changes),)))


def test_a_warm_template_becomes_another_guest() -> None:
    template = page.encode(plain(2, more_pages=(50,), metadata=b"old" * 1000))
    page.patch_identity(template, name="db", domid=9, uuid=b"u" * 16)
    page.patch_vif(
        template,
        1,
        mac=b"\x00\x16\x3e\xff\xff\xff",
        mtu=9000,
        ipv4=(bytes((10, 77, 0, 2)), 24, bytes((10, 77, 0, 1))),
        ipv6=(b"\xfd" * 16, 64, b""),
    )
    page.patch_metadata(template, b"new")
    first, second = plain(2).devices
    assert isinstance(second, page.Vif)
    assert decode(template) == page.Page(
        "db",
        9,
        b"u" * 16,
        devices=(
            first,
            second._replace(
                mac=b"\x00\x16\x3e\xff\xff\xff",
                mtu=9000,
                ipv4=bytes((10, 77, 0, 2)),
                ipv4_prefix=24,
                ipv4_gateway=bytes((10, 77, 0, 1)),
                ipv6=b"\xfd" * 16,
                ipv6_prefix=64,
            ),
        ),
        metadata=b"new",
        more_pages=(50,),
    )
    assert template.count(b"old") == 0
    page.patch_vif(template, 1, ipv4=(b"", 0, b""))
    patched = decode(template).devices[1]
    assert isinstance(patched, page.Vif)
    assert patched.ipv4 == patched.ipv4_gateway == b""


def test_patches_that_do_not_fit_are_refused() -> None:
    template = page.encode(plain())
    before = bytes(template)
    room = page.metadata_capacity(template)
    assert room == abi.PAGE_SIZE - abi.SLOTS_OFFSET - abi.SLOT_SIZE
    with pytest.raises(PageError, match="there is room for"):
        page.patch_metadata(template, b"x" * (room + 1))
    for index in (-1, 1):
        with pytest.raises(PageError, match="holds no vif"):
            page.patch_vif(template, index, mac=b"123456")
    with pytest.raises(PageError, match="domain id"):
        page.patch_identity(template, domid=-1)
    with pytest.raises(PageError, match="domain name"):
        page.patch_identity(template, name="x" * 200)
    with pytest.raises(PageError, match="mtu"):
        page.patch_vif(template, 0, mtu=70000)
    assert template == before
    page.patch_metadata(template, b"x" * room)
    assert decode(template).metadata == b"x" * room


def test_publish_leaves_the_control_words_and_moves_the_generation() -> None:
    template = page.encode(plain(metadata=b"one"))
    live = bytearray(template)
    control = slice(abi.REQUEST_OFFSET, abi.MORE_PAGES_OFFSET)
    live[control] = b"\xaa" * (abi.MORE_PAGES_OFFSET - abi.REQUEST_OFFSET)
    page.patch_metadata(template, b"two")
    page.publish(live, template)
    assert live[control] == b"\xaa" * (abi.MORE_PAGES_OFFSET - abi.REQUEST_OFFSET)
    assert decode(live) == decode(template) == plain(metadata=b"two", generation=4)


def test_requests_are_where_the_header_says() -> None:
    live = page.encode(plain())
    page.write_request(live, 3, abi.REQUEST_SYSRQ, ord("h"))
    assert live[0x100:0x10C] == bytes((3, 0, 0, 0, 5, 0, 0, 0, ord("h"), 0, 0, 0))


def test_guest_words() -> None:
    live = page.encode(plain())
    assert page.read_guest_words(live) == page.GuestWords()
    text = "grüße\x1b[2J".encode()
    live[0x140:0x15C] = abi.Struct("<IIIiIII").pack(1, 2, 3, -4, 5, len(text), 7)
    live[0x180 : 0x180 + len(text)] = text
    assert page.read_guest_words(live) == page.GuestWords(1, 2, 3, -4, 5, "grüße?[2J", 7)


@given(st.binary(min_size=192, max_size=192))
def test_hostile_guest_words(raw: bytes) -> None:
    words = page.read_guest_words(bytes(abi.GUEST_OFFSET) + raw)
    assert len(words.message) <= abi.MAX_MESSAGE
    assert words.message.isprintable()
    assert -(2**31) <= words.exit_code < 2**31


def test_abi_check() -> None:
    page.check_abi(page.ABI_VERSION)
    for version in (page.ABI_VERSION + 1, 2 << 16, 0, 0xFFFFFFFF):
        with pytest.raises(PageError, match="the image wants noxs ABI"):
            page.check_abi(version)


def test_the_header_and_the_codec_agree(tmp_path: Path) -> None:
    lines = []
    expected = {}
    for struct, fields in abi.LAYOUT.items():
        lines.append(f'P("{struct}", sizeof(struct {struct}), 0);')
        expected[struct] = (calcsize("<" + "".join(fmt for _, fmt in fields)), 0)
        for field, at in abi.offsets(struct).items():
            lines.append(
                f'P("{struct}.{field}", sizeof(((struct {struct} *)0)->{field}), '
                f"offsetof(struct {struct}, {field}));"
            )
            expected[f"{struct}.{field}"] = (calcsize("<" + dict(fields)[field]), at)
    header = (GUEST / "noxs.h").read_text()
    numbers = {}
    for name in re.findall(r"^#define NOXS_([A-Z0-9_]+)\s+\S", header, re.MULTILINE):
        if isinstance(value := getattr(abi, name, None), int):
            lines.append(f'P("{name}", NOXS_{name}, -1);')
            numbers[name] = (value, -1)
    source = tmp_path / "probe.c"
    body = "\n".join(lines)
    source.write_text(
        '#include <stdio.h>\n#include "noxs.h"\n'
        '#define P(n, s, o) printf("%s %ld %ld\\n", n, (long)(s), (long)(o))\n'
        f"int main(void) {{\n{body}\nreturn 0;\n}}\n"
    )
    probe = tmp_path / "probe"
    subprocess.run(["gcc", "-std=c11", "-I", GUEST, "-o", probe, source], check=True)
    output = subprocess.run([probe], check=True, capture_output=True, text=True).stdout
    found = {name: (int(size), int(at)) for name, size, at in map(str.split, output.splitlines())}
    assert found == expected | numbers
    missing = {
        name
        for name, value in vars(abi).items()
        if name.isupper() and isinstance(value, int) and name not in numbers
    }
    # VBD_CDROM and its like are blkif.h's own VDISK_*; NOTE_* may be spelled in the macro.
    assert missing <= {"VBD_CDROM", "VBD_REMOVABLE", "VBD_READONLY"}


def test_struct_fields_are_naturally_aligned() -> None:
    for struct, fields in abi.LAYOUT.items():
        at = abi.offsets(struct)
        for field, fmt in fields:
            unit = calcsize("<" + fmt[-1])
            assert at[field] % unit == 0, f"{struct}.{field}"


def test_the_note_macro(tmp_path: Path) -> None:
    source = tmp_path / "note.c"
    source.write_text('#include "noxs.h"\nNOXS_ELF_NOTE();\n')
    subprocess.run(["gcc", "-I", GUEST, "-c", "-o", tmp_path / "note.o", source], check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".note.noxs", tmp_path / "note.o", tmp_path / "note"],
        check=True,
    )
    owner = page.NOTE_OWNER.encode() + b"\0"
    expected = abi.Struct("<III").pack(len(owner), 4, page.NOTE_TYPE)
    expected += owner.ljust(8, b"\0") + abi.Struct("<I").pack(page.ABI_VERSION)
    assert (tmp_path / "note").read_bytes() == expected
