"""Our structures, constants and prototypes against the C headers.

For the release whose libxen-dev is installed a compiler decides. For the others
a table does, which was made by the same probe from their headers::

    git clone https://xenbits.xen.org/git-http/xen.git
    .venv/bin/python -m tests.unit.test_xenctypes_structs xen/.git
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from xenctypes import ctrl, guest, pages, public, releases, signatures, structs, toollog
from xenctypes.releases import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xenctypes.releases import Release

LAYOUTS = Path(__file__).with_name("xenctypes_layouts.json")
HEADERS = (
    "xenctrl.h",
    "xenguest.h",
    "xencall.h",
    "xendevicemodel.h",
    "xenevtchn.h",
    "xenforeignmemory.h",
    "xengnttab.h",
    "xentoolcore.h",
    "xentoollog.h",
    "xen/io/console.h",
    "xen/io/netif.h",
    "xen/io/xs_wire.h",
    "xen/arch-x86/hvm/start_info.h",
)
# Fields that only later headers have, and one that they name otherwise.
SINCE = {
    ("xencons_interface", "connection"): (4, 21),
    ("xenstore_domain_interface", "evtchn_port"): (4, 21),
    ("xc_dom_image", "memflags"): (4, 22),
}
CONSTANTS_SINCE = {
    "DOMID_ANY": (4, 22),
    "XEN_DOMCTL_CDF_trap_unmapped_accesses": (4, 21),
}


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(dotted name, offset, size) of every field, those of nested structures too."""
    for name, field, *_ in kind._fields_:
        descriptor = getattr(kind, name)
        yield prefix + name, descriptor.offset, descriptor.size
        if issubclass(field, ctypes.Structure | ctypes.Union):
            for inner, offset, size in leaves(field, f"{prefix}{name}."):
                yield inner, descriptor.offset + offset, size


def ours(release: Release) -> dict[str, Any]:
    """{C name: {"size": bytes, "fields": {name: [offset, size]}}} of a release."""
    table: dict[str, Any] = {}
    for module in (structs, pages):
        for class_name, kind in vars(module).items():
            name = class_name
            if not (isinstance(kind, type) and issubclass(kind, ctypes.Structure)):
                continue
            if name in ("Structure", "sring") or name.startswith(("evtchn_status_", "start_info_")):
                continue
            if name.startswith("xen_domctl_createdomain"):
                if kind is not release.createdomain:
                    continue
                name = "xen_domctl_createdomain"
            fields = {
                field: [offset, size]
                for field, offset, size in leaves(kind)
                if release.version >= SINCE.get((name, field), (0, 0))
            }
            if release.version >= (4, 21) and "altp2m_opts" in fields:
                fields["altp2m"] = fields.pop("altp2m_opts")
            whole = not any(
                struct == name and release.version < since for (struct, _), since in SINCE.items()
            )
            table[name] = {"size": ctypes.sizeof(kind) if whole else None, "fields": fields}
    table["xc_dom_image"] = {
        "size": guest.DOM_IMAGE_SIZE,
        "fields": {
            name: [offset, ctypes.sizeof(kind)]
            for name, (offset, kind) in guest.dom_image(release).items()
        },
    }
    # The C type is a macro's; one instance of it stands for all.
    table["netif_tx_sring"] = {
        "size": None,
        "fields": {name: [offset, 4] for name, offset, _ in leaves(pages.sring) if name != "pad"}
        | {"ring[0]": [ctypes.sizeof(pages.sring), ctypes.sizeof(pages.netif_tx_request)]},
    }
    return table


def constants(release: Release) -> dict[str, int]:
    """{C name: value} of what the headers define."""
    found = {}
    for module, pattern in ((public, "[A-Z]"), (toollog, "XTL_")):
        for name, value in vars(module).items():
            if not isinstance(value, int) or not re.match(pattern, name):
                continue
            if release.version < CONSTANTS_SINCE.get(name, (0, 0)):
                continue
            if not name.startswith("TSC_MODE_"):  # in no public header
                found[f"__{name}" if name.startswith("HYPERVISOR_") else name] = value
    return found


def compile_and_run(
    source: str, directory: Path, flags: tuple[str, ...] = (), *, run: bool = True
) -> str:
    path = directory / "probe.c"
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    path.write_text(f"#define __XEN_TOOLS__ 1\n#include <stdio.h>\n{includes}\n{source}")
    command = ["gcc", "-std=gnu11", *flags, "-o", str(directory / "probe"), str(path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if not run:
        return built.stderr
    assert built.returncode == 0, built.stderr
    return subprocess.run(
        [str(directory / "probe")], capture_output=True, text=True, check=True
    ).stdout


def probe(release: Release, directory: Path, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the compiler says: the layouts and constants of ``ours``, from C."""
    lines = []
    for name, layout in ours(release).items():
        lines.append(f'printf("size {name} %zu\\n", sizeof(struct {name}));')
        lines += (
            f'printf("field {name} {field} %zu %zu\\n", offsetof(struct {name}, {field}), '
            f"sizeof(((struct {name} *)0)->{field}));"
            for field in layout["fields"]
        )
    lines += (
        f'printf("constant {name} %llu\\n", (unsigned long long)({name}));'
        for name in constants(release)
    )
    source = "int main(void)\n{\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    table: dict[str, Any] = {}
    values: dict[str, int] = {}
    for line in compile_and_run(source, directory, flags).splitlines():
        kind, name, *rest = line.split()
        if kind == "size":
            table[name] = {"size": int(rest[0]), "fields": {}}
        elif kind == "field":
            table[name]["fields"][rest[0]] = [int(rest[1]), int(rest[2])]
        else:
            values[name] = int(rest[0])
    return {"structs": table, "constants": values}


def compare(release: Release, theirs: Any) -> None:
    for name, layout in ours(release).items():
        actual = theirs["structs"][name]
        assert layout["fields"] == actual["fields"], f"struct {name} of Xen {release}"
        if layout["size"] is not None:
            assert layout["size"] == actual["size"], f"struct {name} of Xen {release}"
    mask = (1 << 64) - 1
    for name, value in constants(release).items():
        assert value & mask == theirs["constants"][name] & mask, f"{name} of Xen {release}"


@cache
def golden() -> Any:
    return json.loads(LAYOUTS.read_text())


@pytest.fixture(scope="module")
def installed() -> Release:
    """The release of libxen-dev."""
    missing = "libxen-dev is not installed: scripts/test does that"
    try:
        version = subprocess.run(
            ["gcc", "-print-file-name=libxenctrl.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("gcc is not installed: scripts/test does that")
    match = re.search(r"\.so\.(\d+)\.(\d+)", str(Path(version).resolve()))
    if match is None or not Path("/usr/include/xenctrl.h").exists():
        pytest.skip(missing)
    return RELEASES[int(match[1]), int(match[2])]


def test_installed_release(installed: Release, tmp_path: Path) -> None:
    compare(installed, probe(installed, tmp_path))


@pytest.mark.parametrize("release", RELEASES.values(), ids=str)
def test_golden(release: Release) -> None:
    compare(release, golden()[str(release)])


def test_golden_table_agrees_with_the_installed_headers(installed: Release, tmp_path: Path) -> None:
    theirs = probe(installed, tmp_path)
    assert theirs == {key: golden()[str(installed)][key] for key in theirs}


@pytest.mark.parametrize("release", RELEASES.values(), ids=str)
def test_domctl_version(release: Release) -> None:
    assert golden()[str(release)]["domctl"] == release.domctl


def test_every_known_release_has_a_record() -> None:
    assert set(golden()) == {str(release) for release in RELEASES.values()}
    assert all(release.version == version for version, release in RELEASES.items())


def test_createdomain_is_what_the_design_says() -> None:
    sizes = {
        str(release): (ctypes.sizeof(release.createdomain), release.createdomain.arch.offset)
        for release in releases.RELEASES.values()
    }
    old, new = (64, 56), (68, 60)
    assert sizes == {"4.17": old, "4.18": old} | {f"4.{minor}": new for minor in range(19, 23)}


# Prototypes

C_TYPES = {
    ctypes.c_int: "int",
    ctypes.c_int32: "int32_t",
    ctypes.c_uint: "unsigned int",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_long: "long",
    ctypes.c_ulong: "unsigned long",
    ctypes.c_size_t: "size_t",
    ctypes.c_bool: "bool",
    ctypes.c_char_p: "char *",
    ctypes.c_void_p: "void *",
    ctypes.POINTER(ctypes.c_int): "int *",
    ctypes.POINTER(ctypes.c_uint): "unsigned int *",
    ctypes.POINTER(ctypes.c_uint32): "uint32_t *",
    ctypes.POINTER(ctypes.c_uint64): "uint64_t *",
    ctypes.POINTER(ctypes.c_ulong): "unsigned long *",
    ctypes.POINTER(ctypes.c_size_t): "size_t *",
    ctypes.POINTER(ctypes.c_void_p): "void **",
}
HANDLES = ("xc_dom_image",)  # those without a typedef


def c_type(kind: Any) -> str:
    if kind is signatures.domid_t:
        return "domid_t"
    if issubclass(kind, signatures.Opaque):
        return f"{'struct ' if kind.__name__ in HANDLES else ''}{kind.__name__} *"
    return C_TYPES[kind]


def check_prototypes(directory: Path, flags: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """{function: [complaints]} of the compiler about calls with our argument types.

    -Wtraditional-conversion complains of an argument whose width or sign the
    prototype changes. Of those that are narrower than int it always does: a bool,
    and a domid, which is 16 bits here and 32 there, and fits both.
    """
    calls = {}
    for library, table in signatures.SIGNATURES.items():
        if library == "c":
            continue
        for name, ((result, _), *arguments) in table.items():
            declared = " ".join(f"{c_type(kind)} a{i};" for i, kind in enumerate(arguments))
            passed = ", ".join(f"a{index}" for index in range(len(arguments)))
            check = ""
            if result is None:
                check = f"_Static_assert(SAME(void, {name}({passed})));"
            elif not issubclass(result, ctypes.c_void_p | ctypes.c_char_p):
                check = f"_Static_assert(SAME({C_TYPES[result]}, {name}({passed})));"
            calls[name] = f"void try_{name}(void) {{ {declared} (void){name}({passed}); {check} }}"
    text = (
        "#include <stdbool.h>\n"
        "#define SAME(type, call) __builtin_types_compatible_p(type, typeof(call))\n"
        + "\n".join(calls.values())
    )
    complaints = compile_and_run(
        text,
        directory,
        (*flags, "-c", "-Wtraditional-conversion", "-Wno-pointer-sign"),
        run=False,
    )
    lines = (directory / "probe.c").read_text().splitlines()
    names = {lines.index(call) + 1: name for name, call in calls.items()}
    narrow = (signatures.domid_t, ctypes.c_bool)
    bad: dict[str, list[str]] = {}
    for line in complaints.splitlines():
        match = re.search(r"probe\.c:(\d+):\d+: (?:warning|error): (.*)", line)
        if not match or int(match[1]) not in names:
            assert "error" not in line, complaints
            continue
        name, complaint = names[int(match[1])], match[2]
        argument = re.match(r"passing argument (\d+) .* due to prototype", complaint)
        table = next(table for table in signatures.SIGNATURES.values() if name in table)
        if not (argument and table[name][int(argument[1])] in narrow):
            bad.setdefault(name, []).append(complaint)
    return bad


def test_prototypes_of_the_installed_release(installed: Release, tmp_path: Path) -> None:
    assert check_prototypes(tmp_path) == {}


def test_a_wrong_prototype_is_noticed(
    installed: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(*kinds: Any) -> tuple[Any, ...]:
        return (signatures.ZERO, signatures.xc_interface, *kinds)

    wrong = {
        "xc_domain_setmaxmem": row(signatures.domid_t, ctypes.c_uint32),
        "xc_domain_pause": row(signatures.domid_t, ctypes.c_uint32),
        "xc_domain_shutdown": row(signatures.domid_t, ctypes.c_uint),
        "xc_domain_unpause": (signatures.ZERO, signatures.xengnttab_handle, signatures.domid_t),
        "xc_domain_destroy": (signatures.LONG_COUNT, signatures.xc_interface, signatures.domid_t),
    }
    monkeypatch.setattr(signatures, "SIGNATURES", {"xenctrl": wrong})
    assert set(check_prototypes(tmp_path)) == set(wrong)


def checkout(git_dir: str, release: Release, directory: Path) -> tuple[str, ...]:
    """The headers of a release's stable branch, as an include path."""
    archive = subprocess.run(
        [
            *("git", f"--git-dir={git_dir}", "archive", f"stable-{release}"),
            *("xen/include/public", "tools/include"),
        ],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    subprocess.run(["tar", "x", "-C", str(directory)], input=archive, check=True)
    headers = directory / "tools/include"
    (headers / "xen").symlink_to(directory / "xen/include/public")
    # Generated in a build; they hold the registers of vcpu contexts only.
    (headers / "xen/foreign").symlink_to("/usr/include/xen/foreign")
    return ("-I", str(headers))


def regenerate(git_dir: str) -> None:
    table = {}
    for release in RELEASES.values():
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            flags = checkout(git_dir, release, directory)
            complaints = check_prototypes(directory, flags)
            if complaints:
                sys.exit(f"Xen {release}: {complaints}")
            version = compile_and_run(
                'int main(void) { printf("%d", XEN_DOMCTL_INTERFACE_VERSION); return 0; }',
                directory,
                flags,
            )
            table[str(release)] = {"domctl": int(version)} | probe(release, directory, flags)
    LAYOUTS.write_text(f"{dump(table, 3)}\n")


def dump(value: Any, depth: int) -> str:
    """JSON with a line for each structure, so that a change of one shows in a diff."""
    if not (depth and isinstance(value, dict)):
        return json.dumps(value, sort_keys=True)
    lines = ",\n".join(f"{json.dumps(key)}: {dump(value[key], depth - 1)}" for key in sorted(value))
    return f"{{\n{lines}\n}}"


if __name__ == "__main__":
    regenerate(sys.argv[1])


def test_states_are_read_from_where_the_structure_has_them() -> None:
    raw = (structs.xen_domctl_getdomaininfo * 2)()
    ctypes.memset(raw, 0xFF, ctypes.sizeof(raw))
    for domid, each in enumerate(raw, 7):
        each.domain, each.flags = domid, 0x01020304 + domid
        each.handle = structs.xen_domain_handle_t(*range(domid, domid + 16))
    assert list(ctrl.STATE.iter_unpack(memoryview(raw).cast("B"))) == [
        (domid, 0x01020304 + domid, bytes(range(domid, domid + 16))) for domid in (7, 8)
    ]
