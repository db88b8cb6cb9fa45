import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from xlutil import disk as oracle
from xlutil import needs_xlutil

from chaos.diskspec import MAX_TEXT, DiskConfig, _Scan, parse_disk
from chaos.vdev import parse_vdev
from xenctypes.errors import ConfigError

# _libxl_types.h, from 1; 0 is "unknown".
FORMATS = (None, "qcow", "qcow2", "vhd", "raw", "empty", "qed")
BACKENDS = (None, "phy", "tap", "qdisk", "standalone")
SPECIFICATIONS = (None, "xen", "virtio")
DEFBOOL = {-1: False, 0: None, 1: True}


def theirs(text: str) -> dict[str, object] | None:
    disk = oracle(text.encode())
    if disk is None:
        return None
    return {
        "target": disk.pdev_path,
        "vdev": disk.vdev,
        "script": disk.script,
        "backend": disk.backend_domname,
        "format": FORMATS[disk.format],
        "backendtype": BACKENDS[disk.backend],
        "specification": SPECIFICATIONS[disk.specification],
        "writable": bool(disk.readwrite),
        "cdrom": bool(disk.is_cdrom),
        "removable": bool(disk.removable),
        "direct_io_safe": disk.direct_io_safe,
        "discard": DEFBOOL[disk.discard_enable],
        "trusted": DEFBOOL[disk.trusted],
    }


def ours(text: str) -> dict[str, object] | None:
    """What the scanner makes of it, before the checks that are ours."""
    scan = _Scan(text)
    try:
        scan.run()
        strings, chosen, flags = scan.settle()
    except ConfigError:
        return None
    named = {key: strings.get(key) for key in ("target", "vdev", "script", "backend")}
    return {
        **{key: value if value is None else value.encode() for key, value in named.items()},
        "format": chosen.get("format", "raw"),
        "backendtype": chosen.get("backendtype"),
        "specification": chosen.get("specification"),
        "writable": flags.get("writable", True),
        **{key: flags.get(key, False) for key in ("cdrom", "removable", "direct_io_safe")},
        **{key: flags.get(key) for key in ("discard", "trusted")},
    }


def trusted_words() -> list[str]:
    """Debian 12's libxlutil was built from a scanner without them."""
    return ["trusted", "untrusted"] if theirs("/a,raw,xvda,w,trusted") else []


WORDS = (
    *("/dev/vg/a", "xvda", "hdc:cdrom", "hdc:disk", "raw", "qcow2", "vhd", "r", "w", "rw", ""),
    *("format=raw", "format=", "format=qed", "format=x", "cdrom", "devtype=cdrom"),
    *("devtype=disk", "devtype=x", "access=ro", "access=", "backend=dom", "backend="),
    *("backendtype=phy", "backendtype=qdisk", "backendtype=", "specification=xen"),
    *("specification=virtio", "vdev=xvdb", "vdev=", "script=block-x", "direct-io-safe"),
    *("discard", "no-discard", "colo", "no-colo", "colo-host=a", "colo-port=0", "colo-port=7"),
    *("active-disk=a", "target=/x", "target=", "target=a=b:c"),
    *("unknown=1", "unknown=", "raw:/a", "qcow:", "phy:/dev/a", "tap:aio:/a", "iscsi:x"),
    *("file:/a", "foo:/a", "foo:bar", "a b", " ", "\t", "\n", "=", "a=", ":", "a:b"),
)
word = st.deferred(lambda: st.sampled_from([*WORDS, *trusted_words()]))
glue = st.sampled_from([",", ",", ",", ", ", "", " ", "\n", ",,"])
specs = st.lists(st.builds("{}{}".format, word, glue), max_size=6).map("".join)


@needs_xlutil
@settings(max_examples=500, deadline=None)
@given(specs | st.text("abcdefhkmnorstvwx=,: \n/0-2é", max_size=24))
@example("/dev/vg/a,raw,xvda,rw")
@example("phy:/dev/vg/a,xvda,w")
@example("format=qcow2, vdev=xvdb, access=ro, target=/a,b:c=d")
@example(",hdc:cdrom,r")
@example("tap:qcow2:/a,xvda,w")
@example("vdev=hdc,cdrom")
@example("target=/a,,")
@example("/a,raw,xvda,r=")
@example("/a,raw,xvda,=")
@example("nbd:x,xvda,w,script=y")
def test_disks_are_those_of_libxlutil(text: str) -> None:
    assume("=\n" not in text)  # "flex scanner jammed", and the process exits
    assert ours(text) == theirs(text)


def test_several_words_are_one_disk() -> None:
    whole = parse_disk("/a,raw,xvda,ro,discard")
    assert parse_disk("/a", "raw", "xvda", "ro", "discard") == whole
    assert parse_disk("target=/a,b", "vdev=xvda,access=ro", "raw")[0].target == "/a,b"


def test_defaults() -> None:
    disk, warnings = parse_disk("/dev/vg/a,,xvda")
    assert not warnings
    assert disk == DiskConfig(vdev="xvda", target="/dev/vg/a", format="raw", writable=True)
    assert disk.devid == 202 << 8


def test_every_key() -> None:
    disk, warnings = parse_disk(
        "vdev=xvdb,format=qcow2,access=ro,backend=stor,backendtype=qdisk,script=block-x,"
        "direct-io-safe,no-discard,specification=virtio,untrusted,target=/a,b=c:d"
    )
    assert not warnings
    assert disk == DiskConfig(
        vdev="xvdb",
        target="/a,b=c:d",
        format="qcow2",
        writable=False,
        backendtype="qdisk",
        backend="stor",
        script="block-x",
        discard=False,
        direct_io_safe=True,
        specification="virtio",
        trusted=False,
    )


def test_old_forms_warn() -> None:
    disk, warnings = parse_disk("iscsi:iqn/1,xvda,w,colo-host=x")
    assert (disk.script, disk.target) == ("block-iscsi", "iqn/1")
    assert warnings == [
        "disk: the prefix iscsi: is deprecated",
        "disk: colo-host is for COLO only, ignored",
    ]


@pytest.mark.parametrize(
    ("text", "cause", "column"),
    [
        ("", "no vdev is given", 1),
        ("/a,raw", "no vdev is given", 1),
        ("vdev=xvda", "no target is given", 1),
        ("/a,raw,xvda,x", 'unknown access "x"', 13),
        ("/a,rax,xvda", 'unknown format "rax"', 4),
        ("/a,raw,fda", '"fda" is no virtual device', 8),
        ("vdev=xvda,fromat=raw,target=/a", "no key of a disk .did you mean format=", 11),
        ("vdev=xvda,vdev=xvdb,target=/a", "vdev is given twice", 11),
        ("format=raw,format=vhd,target=/a", "format is given twice", 12),
        ("foo:/a,xvda", 'unknown prefix "foo:"', 1),
        ("/a,raw,xvda,w,x", "too many positional parameters", 15),
        ("/a,raw,hdc:floppy", 'unknown devtype "floppy"', 8),
        ("/a=b,raw,xvda", "bad disk syntax", 3),
        ("vdev=xvda,format=empty,target=", "no target, and the disk is not removable", 24),
        ("vdev=xvda,target=/\x1b", "do not print", 11),
        ("x" * (MAX_TEXT + 1), "longer than", 0),
    ],
)
def test_errors(text: str, cause: str, column: int) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        parse_disk(text)
    assert caught.value.column == column
    assert str(caught.value).isprintable()


# ---- device numbers: xen-vbd-interface(7) ----

NUMBERS = {
    "xvda": 202 << 8,
    "xvda1": 202 << 8 | 1,
    "xvdp15": 202 << 8 | 15 << 4 | 15,
    "xvda16": 1 << 28 | 16,
    "xvdq": 1 << 28 | 16 << 8,
    "xvdaa": 1 << 28 | 26 << 8,
    "xvdzz255": 1 << 28 | 701 << 8 | 255,
    "hda": 3 << 8,
    "hdb63": 3 << 8 | 64 | 63,
    "hdc": 22 << 8,
    "hdd1": 22 << 8 | 64 | 1,
    "sda": 8 << 8,
    "sdp15": 8 << 8 | 15 << 4 | 15,
    "d0p0": 202 << 8,
    "d16p1": 1 << 28 | 16 << 8 | 1,
    "d1048575p255": 1 << 28 | 1048575 << 8 | 255,
    "51712": 51712,
    "0xca00": 0xCA00,
    "0145000": 0xCA00,
    "0": 0,
    "2147483647": 2**31 - 1,
}
NO_NUMBERS = (
    *("", "xvd", "xvda0", "xvda01", "xvda256", "XVDA", "xvda 1", "xvdzzzzz", "hde", "hda64", "sdq"),
    *("sda16", "vda", "fd0", "d1048576p0", "d0p256", "d0", "d0p0x", "2147483648", "0x", "08", "-1"),
)


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_vdev(text: str, number: int) -> None:
    assert parse_vdev(text) == number


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_vdev(text: str) -> None:
    with pytest.raises(ConfigError, match="no virtual device"):
        parse_vdev(text)


PROBE = r"""
#include <stdio.h>
#include <string.h>
int libxl__device_disk_dev_number(const char *virtpath, int *disk, int *partition);
int main(void) {
    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        printf("%d\n", libxl__device_disk_dev_number(line, NULL, NULL));
    }
    return 0;
}
"""


def test_vdev_numbers_are_those_of_libxl(tmp_path: Path) -> None:
    """The function is not exported, but libxen-dev has it in a static library."""
    library = next(Path("/usr/lib").glob("*/libxenlight.a"), None)
    compiler = shutil.which("gcc")
    if library is None or compiler is None:
        pytest.skip("needs gcc and libxenlight.a (package libxen-dev)")
    (tmp_path / "probe.c").write_text(PROBE)
    command = [compiler, "-no-pie", "probe.c", str(library), "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([*command, "-o", "probe"], cwd=tmp_path, check=True, capture_output=True)
    names = [
        f"{kind}{disk}{part}"
        for kind in ("xvd", "hd", "sd")
        for disk in "abcdpqz"
        for part in ("", 0, 1, 15, 16, 63, 64, 255, 256)
    ]
    names += [*NUMBERS, *NO_NUMBERS, "xvdbzz3", "xvdbgqdn", "xvdbgqdo", "d15p15", "d15p16"]
    lines = "".join(f"{name}\n" for name in names)
    done = subprocess.run(
        ["./probe"], cwd=tmp_path, input=lines, text=True, capture_output=True, check=True
    )
    expected = dict(zip(names, map(int, done.stdout.split()), strict=True))
    # What C's readers of numbers let through: no number, blanks, half a hexadecimal one.
    expected |= dict.fromkeys(("", "xvd", "xvda 1", "d0p0x"), -1)
    found = {}
    for name in names:
        try:
            found[name] = parse_vdev(name)
        except ConfigError:
            found[name] = -1
    assert found == expected
