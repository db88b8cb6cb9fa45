import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos import xlcfg
from chaos.config import NOT_YET, UNDERSTOOD, from_document, load, supported
from chaos.configjson import from_dict
from chaos.cpuspec import CpuSet, parse_cpus
from chaos.diskspec import parse_disk
from chaos.domconfig import ACTIONS, CMDLINE_MAX, METADATA_MAX, DomainConfig, check_name
from chaos.vifspec import VifConfig, parse_vif
from chaos.xlkeys import IGNORED, REFUSED
from xenctypes.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
LEAST = 'name = "a"\nkernel = "/k"\n'


def read(text: str, *overrides: str) -> DomainConfig:
    config, warnings = from_document(xlcfg.parse(LEAST + text, "t", overrides))
    assert not warnings
    return config


def warnings_of(text: str, *overrides: str) -> list[str]:
    return from_document(xlcfg.parse(LEAST + text, "t", overrides))[1]


def refusal(text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_document(xlcfg.parse(text, "t", overrides))
    assert str(caught.value).isprintable()
    return caught.value


def test_defaults() -> None:
    config = read("")
    assert config == DomainConfig(name="a", kernel="/k")
    assert (config.type, config.uuid, config.ramdisk, config.cmdline) == ("pv", None, "", "")
    assert (config.memory, config.maxmem, config.vcpus, config.maxvcpus) == (32, 32, 1, 1)
    assert (config.affinity, config.vifs, config.disks, config.metadata) == ((), (), (), b"")
    assert config.on_poweroff == config.on_crash == config.on_watchdog == "destroy"
    assert (config.on_reboot, config.on_soft_reset) == ("restart", "soft-reset")


def test_everything() -> None:
    config = read(
        """
        uuid = "12345678-9ABC-def0-1234-56789abcdef0"
        type = "pv"; builder = 'generic'
        ramdisk = "/r"; cmdline = "quiet"
        memory = 64; maxmem = "0x80"
        vcpus = 010; maxvcpus = 16
        cpus = [ "0-3,^1", 2, "all" ]
        on_poweroff = "preserve"; on_reboot = "destroy"; on_watchdog = "restart"
        on_crash = "coredump-destroy"; on_soft_reset = "rename-restart"
        tsc_mode = "always_emulate"
        vif = [ 'bridge=br0,ip=10.77.0.2/24', '', ]
        disk = [ '/dev/vg/a,raw,xvda,w' ]
        noxs_metadata = "answer=42"
        """
    )
    assert config == DomainConfig(
        name="a",
        kernel="/k",
        uuid=bytes.fromhex("123456789abcdef0123456789abcdef0"),
        ramdisk="/r",
        cmdline="quiet",
        memory=64,
        maxmem=128,
        vcpus=8,
        maxvcpus=16,
        affinity=(CpuSet((0, 2, 3)), CpuSet((2,)), CpuSet((), complement=True)),
        on_poweroff="preserve",
        on_reboot="destroy",
        on_watchdog="restart",
        on_crash="coredump-destroy",
        on_soft_reset="rename-restart",
        tsc_mode="always_emulate",
        vifs=(parse_vif("bridge=br0,ip=10.77.0.2/24")[0], VifConfig(devid=1)),
        disks=(parse_disk("/dev/vg/a,raw,xvda,w")[0],),
        metadata=b"answer=42",
    )
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory = 8", {"memory": 8, "maxmem": 8}),
        ("maxmem = 8", {"memory": 8, "maxmem": 8}),
        ("tsc_mode = 0", {"tsc_mode": "default"}),
        ("tsc_mode = ''", {"tsc_mode": "native"}),
        ("memory = 4; maxmem = 8", {"memory": 4, "maxmem": 8}),
        ("vcpus = 2", {"vcpus": 2, "maxvcpus": 2}),
        ("maxvcpus = 2", {"vcpus": 1, "maxvcpus": 2}),
        ("root = '/dev/xvda'", {"cmdline": "root=/dev/xvda"}),
        ("extra = 'quiet'", {"cmdline": "quiet"}),
        ("root = '/dev/xvda ro'; extra = 'quiet'", {"cmdline": "root=/dev/xvda ro quiet"}),
        ("extra = 'a'; extra += ' b'", {"cmdline": "a b"}),
        ("cmdline = ''", {"cmdline": ""}),
        ("type = 'pvh'", {"type": "pvh"}),
        ("vcpus = 3; cpus = '1'", {"affinity": (CpuSet((1,)),) * 3}),
        ("vcpus = 3; cpus = 1", {"affinity": (CpuSet((1,)),) * 3}),
        ("vcpus = 3; maxvcpus = 4; cpus = ['1']", {"affinity": (CpuSet((1,)),)}),
        ("cpus = ['1', '2', 'beyond']", {"affinity": (CpuSet((1,)),)}),
        ("cpus = []", {"affinity": ()}),
        ("noxs_metadata = 'é'", {"metadata": "é".encode()}),
        ("name = 8; name += 'x'", {"name": "8x"}),
    ],
)
def test_what_settings_make(text: str, expected: dict[str, object]) -> None:
    if "name" in text and "metadata" not in text:
        config = from_document(xlcfg.parse(text + "; kernel = '/k'", "t"))[0]
    else:
        config = read(text)
    assert {key: getattr(config, key) for key in expected} == expected


def test_cmdline_wins_over_root_and_extra() -> None:
    text = "cmdline = 'a'\nroot = 'b'\nextra = 'c'"
    assert warnings_of(text) == [
        "t:4:1: root is ignored in favour of cmdline",
        "t:5:1: extra is ignored in favour of cmdline",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory = 0", "t:3:10: memory is 0"),
        ("memory = '-1'", "t:3:10: memory -1 is not within 1 to 16777215 MiB"),
        ("memory = 0x1000000", "t:3:10: memory 16777216 is not within"),
        ("memory = '4G'", 't:3:10: memory "4G" is not a number'),
        ("memory = [4]", "t:3:10: memory is a list, expected one value"),
        ("memory = 4; maxmem = 2", "t:3:22: maxmem 2 is less than memory 4"),
        ("vcpus = 0", "t:3:9: vcpus 0 is not within 1 to 8192"),
        ("vcpus = 129; type = 'pvh'", "t:3:9: vcpus 129 is not within 1 to 128"),
        ("vcpus = 2; maxvcpus = 1", "t:3:23: maxvcpus 1 is less than vcpus 2"),
        ("cpus = '1,x'", 't:3:8: "x" is no CPU or range'),
        ("vcpus = 2; cpus = ['1', ['2']]", "t:3:25: a list within cpus"),
        ("vcpus = 2; cpus = ['1', 'x']", 't:3:25: "x" is no CPU or range'),
        ("uuid = '12345678-1234-1234-1234-12345678901'", "t:3:8: .* is no UUID"),
        ("uuid = '123456781234123412341234567890ab'", "t:3:8: .* is no UUID"),
        (
            "uuid = '00000000-0000-0000-0000-000000000000'",
            "t:3:8: a uuid has 16 bytes, not all zero",
        ),
        ("type = 'hvm'", "t:3:8: HVM domains are not supported"),
        ("builder = 'hvm'", "t:3:11: HVM domains are not supported"),
        ("builder = 'linux'", 't:3:11: unknown builder "linux"'),
        ("builder = 'generic'; type = 'pvh'", "t:3:11: builder and type contradict"),
        ("type = 'p'", 't:3:8: unknown type "p" .pv or pvh'),
        ("on_crash = 'reboot'", 't:3:12: unknown on_crash action "reboot" .known are destroy'),
        ("on_soft_reset = ''", 't:3:17: unknown on_soft_reset action ""'),
        ("tsc_mode = 'native_paravirt'", 't:3:12: unknown tsc_mode "native_paravirt" .known are'),
        (f"cmdline = '{'x' * 1024}'", "t:3:11: cmdline has 1024 bytes, more than 1023"),
        ("kernel = ''", "t:3:10: kernel is empty"),
        (f"kernel = '{'x' * 5000}'", "t:3:10: kernel has 5000 bytes"),
        ("name = 'a/b'", "t:3:8: name .* has / or characters"),
        ("vif = 'bridge=br0'", "t:3:7: vif is one value, expected a list .vif = "),
        ("vif = [ 'mac=x' ]", 't:3:10: "x" is no MAC address'),
        ("vif = [ 'bridge=b,\\tmtu=1' ]", "t:3:9: "),
        ("vif = [ [] ]", "t:3:9: a list within vif"),
        (f"vif = [ {'1,' * 17} ]", "t:3:41: more than 16 items in vif"),
        ("vif = [ 'vifname=a', 'vifname=a' ]", "t:3:7: two vifs have the vifname a"),
        ("vif = [ 'mac=2:0:0:0:0:1', 'mac=02:0:0:0:0:1' ]", "t:3:7: two vifs have the MAC"),
        ("vif = [ 'devid=1', '' ]", "t:3:7: two vifs have the devid 1"),
        ("vif = [ 'type=ioemu' ]", "t:3:7: a pv domain has no emulated network card"),
        ("disk = [ '/a,raw,xvda', '/b,raw,d0p0' ]", "t:3:8: two disks have the vdev 51712"),
        ("disk = [ '/a,raw,xvdä' ]", 't:3:18: "xvdä" is no virtual device'),
        ("pci = [ '01:00.0' ]", "t:3:7: pci is not supported: chaos passes no host hardware"),
        (
            "noxs_metadata = 'a'; noxs_metadata_file = '/b'",
            "t:3:43: noxs_metadata is given as well",
        ),
        (f"noxs_metadata = '{'x' * 65537}'", "t:3:17: the metadata has 65537 bytes"),
        ("cmdline = '\udc80'", "t:3:11: cmdline is not UTF-8"),
        ("ramdisk = '\udc80'", "t:3:11: ramdisk is not UTF-8"),
    ],
)
def test_errors(text: str, message: str) -> None:
    error = refusal(LEAST + text)
    assert re.match(message, str(error)), str(error)
    assert error.excerpt


def test_what_is_needed() -> None:
    assert str(refusal("kernel = '/k'")) == "t: name is not set"
    assert str(refusal("name = 'a'")) == "t: kernel is not set"
    assert str(refusal("", "memory=1")) == "t: name is not set"


def test_errors_on_the_command_line() -> None:
    assert (
        str(refusal(LEAST, "vcpus=1", "memory=0"))
        == "command line:2:8: memory is 0 (it counts MiB)"
    )
    error = refusal(LEAST, "vif=['brigde=x']")
    assert str(error).startswith(
        'command line:1:7: "brigde=" is no key of a vif (did you mean bridge=?)'
    )
    assert error.excerpt == "vif=['brigde=x']\n      ^"


def test_unknown_settings_warn() -> None:
    assert warnings_of("kernal = 1\nzzzz = 2") == [
        't:3:1: unknown setting "kernal", ignored (did you mean kernel?)',
        't:4:1: unknown setting "zzzz", ignored',
    ]


def test_warnings_are_bounded() -> None:
    many = warnings_of("".join(f"zz{n} = 1\n" for n in range(20_000)))
    assert len(many) == 21
    assert many[-1].endswith("and 19980 more like it")
    assert len(warnings_of("memory = 1\n" * 20_000)) == 21


def test_repeated_settings_warn_but_on_the_command_line() -> None:
    assert warnings_of("vcpus = 1\nvcpus = 2", "vcpus=3", "vcpus=4") == [
        "t:4:1: vcpus is set again, the last one counts"
    ]
    assert not warnings_of("extra = 'a'\nextra += 'b'")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name: str) -> None:
    reason, harmless = REFUSED[name]
    for value in ("0", "''", "[]", *(f"'{value}'" for value in harmless)):
        assert not warnings_of(f"{name} = {value}")
    for value in ("1", "'x'", "[ 'x' ]"):
        error = refusal(f"{LEAST}{name} = {value}")
        assert error.cause == f"{name} is not supported: {reason}"


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored(name: str) -> None:
    assert not warnings_of(f"{name} = 0")
    (warning,) = warnings_of(f"{name} = 'x'")
    assert warning == f"t:3:1: {name} is not supported by chaos, ignored: {IGNORED[name]}"


def test_a_setting_is_of_one_kind() -> None:
    assert not set(UNDERSTOOD) & set(REFUSED)
    assert not set(UNDERSTOOD) & set(IGNORED)
    assert not set(REFUSED) & set(IGNORED)


# ---- names ----


@pytest.mark.parametrize(
    "name", ["a", "web-1", "my guest", "Ünit", "1a", "x" * 127, "a.b_c@d:e", "0x1"]
)
def test_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "7",
            "007",
            "a/b",
            ".",
            "..",
            "-a",
            " a",
            "a ",
            "Domain-0",
            "a\nb",
            "a\0",
            "a\x1b[2J",
        ),
        *("x" * 128, "é" * 64, "\udc80", "\u202eabc"),
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert str(caught.value).isprintable()


# ---- files ----


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta").write_bytes(b"\0\xff")
    (tmp_path / "a.cfg").write_text(
        'name = "a"; kernel = "k"; ramdisk = "/r"; noxs_metadata_file = "meta"\nzz = 1'
    )
    config, warnings = load("a.cfg", ["memory=16"])
    assert config.kernel == str(tmp_path / "k")
    assert config.ramdisk == "/r"
    assert config.metadata == b"\0\xff"
    assert config.metadata_file == str(tmp_path / "meta")
    assert config.memory == 16
    assert warnings == ['a.cfg:2:1: unknown setting "zz", ignored']
    assert from_dict(config.as_dict()) == config


def test_load_reads_pipes_and_nothing(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, LEAST.encode())
    os.close(write_end)
    assert load(f"/dev/fd/{read_end}")[0] == read("")
    os.close(read_end)
    assert load("/dev/null", ["name='a'", "kernel='/k'"])[0] == read("")  # as with xl


def test_load_fails_with_the_cause(tmp_path: Path) -> None:
    path = str(tmp_path / "a.cfg")
    for name, message in (
        (path, f"{path}: cannot read the configuration: No such file or directory"),
        (str(tmp_path), f"{tmp_path}: cannot read the configuration: Is a directory"),
        ("/dev/zero", "/dev/zero: the configuration is longer than 1048576 bytes"),
        ("a\0b", "a\ufffdb: cannot read the configuration: embedded null byte"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(name)
        assert str(caught.value) == message


def test_a_bad_metadata_file_is_blamed_on_its_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.cfg"
    for name, cause in (
        ("/nowhere", "/nowhere: cannot read the metadata: No such file"),
        (
            "/dev/zero",
            f"/dev/zero: the metadata is longer than {METADATA_MAX} bytes",
        ),
    ):
        path.write_text(f"{LEAST}noxs_metadata_file = '{name}'\n")
        with pytest.raises(ConfigError) as caught:
            load(str(path))
        assert str(caught.value).startswith(f"{path}:3:22: {cause}")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.cfg")), ids=lambda path: path.name)
def test_examples_have_no_warnings(path: Path) -> None:
    assert load(str(path))[1] == []


def test_hello() -> None:
    config, _ = load(str(EXAMPLES / "hello.cfg"))
    assert (config.name, config.type, config.memory) == ("hello", "pv", 4)
    assert config.kernel.endswith("/guests/build/hello.elf")
    supported(config)


# ---- what a create cannot do yet ----


@pytest.mark.parametrize(("key", "wanted", "cause"), NOT_YET)
def test_supported(key: str, wanted: Callable[[DomainConfig], bool], cause: str) -> None:
    text = {
        "type": "type = 'pvh'",
        "vif": "vif = [ 'backend=driver' ]",
        "disk": "disk = [ '/a,raw,xvda' ]",
    }[key]
    config = read(text)
    assert wanted(config)
    with pytest.raises(ConfigError, match=re.escape(cause)) as caught:
        supported(config)
    assert caught.value.line == 3


# ---- the tree by itself, and as JSON ----


def test_the_tree_checks_itself() -> None:
    for bad in (
        {"name": ""},
        {"uuid": b"short"},
        {"type": "hvm"},
        {"memory": -1},
        {"vcpus": -1},
        {"metadata": b"x" * (METADATA_MAX + 1)},
        {"cmdline": "x" * (CMDLINE_MAX + 1)},
        {"kernel": "a\0b"},
        {"on_crash": "x"},
        {"affinity": (CpuSet((1,)),) * 2},
        {"vifs": (VifConfig(),) * 2},
    ):
        values: dict[str, Any] = {"name": "a", **bad}
        with pytest.raises(ConfigError) as caught:
            DomainConfig(**values)
        assert caught.value.key


names = st.text(st.characters(codec="utf-8", categories=["L", "Nd"]), min_size=1, max_size=20).map(
    "n{}".format
)
vifs = st.lists(
    st.sampled_from(
        [
            *("", "bridge=br0", "rate=1MB/s", "vlan=10p/20", "untrusted", "mtu=1500"),
            *("ip=10.0.0.2/24 fd00::2/64,gateway=10.0.0.1 fd00::1", "backend=net"),
        ]
    ),
    max_size=3,
)
configs = st.builds(
    lambda vif_texts, disk_texts, **values: DomainConfig(
        vifs=tuple(parse_vif(text, n)[0] for n, text in enumerate(vif_texts)),
        disks=tuple(parse_disk(text)[0] for text in disk_texts),
        **values,
    ),
    vifs,
    st.sampled_from(
        [(), ("/a,raw,xvda",), ("vdev=hdc,cdrom", "/b,qcow2,xvdb,r,discard,untrusted")]
    ),
    name=names,
    uuid=st.none() | st.binary(min_size=16, max_size=16).filter(any),
    type=st.sampled_from(["pv", "pvh"]),
    kernel=st.just("/k") | names,
    cmdline=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    memory=st.integers(1, 64),
    maxmem=st.integers(64, 128),
    maxvcpus=st.integers(3, 128),
    affinity=st.sampled_from([(), (parse_cpus("0-3,^1"), parse_cpus("all,^2"))]),
    on_reboot=st.sampled_from(ACTIONS),
    metadata=st.binary(max_size=40),
)


@settings(max_examples=100)
@given(configs)
def test_json_and_back(config: DomainConfig) -> None:
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats()
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.data())
def test_junk_for_json_is_refused(data: st.DataObject) -> None:
    vif = parse_vif("rate=1MB/s,vlan=10p/20")[0].as_dict()
    disk = parse_disk("/a,raw,xvda")[0].as_dict()
    whole = DomainConfig(name="a").as_dict() | {"vif": [vif], "disk": [disk]}
    for part in data.draw(st.lists(st.sampled_from([whole, vif, disk, vif["rate"], vif["vlan"]]))):
        key = data.draw(st.sampled_from(sorted(part)) | st.text(max_size=5))
        part[key] = data.draw(junk)
    try:
        made = from_dict(whole)
    except ConfigError:
        return
    assert from_dict(made.as_dict()) == made


@pytest.mark.parametrize(
    "data",
    [
        *(None, 7, [], {}, {"name": 7}, {"name": "a", "memory": "4"}, {"name": "a", "vcpus": True}),
        *({"name": "a", "zz": 1}, {"name": "a", "places": {}}, {"name": "a", "vif": [7]}),
        *(
            {"name": "a", "disk": [{}]},
            {"name": "a", "vif": [{}] * 17},
            {"name": "a", "cpus": [""]},
        ),
        *({"name": "a", "noxs_metadata": "!"}, {"name": "a", "uuid": "xyz"}),
        *({"name": "a", "vif": [{"rate": {}}]}, {"name": "a", "vif": [{"vlan": {"pvid": 1}}]}),
    ],
    ids=repr,
)
def test_bad_json(data: object) -> None:
    with pytest.raises(ConfigError):
        from_dict(data)


# ---- hostile text ----

VALUES = ("1", "0", "'a'", "'1,all,^2'", "'\udc80'", "'mac=1:2'", "'bridge=x,ip=::1/64'")
MARKS = ("=", "+=", "[", "]", ",", ";", "\n", "\x1b", "'/a,raw,xvda'", "'\\033'")
SOUP = st.lists(st.sampled_from([*UNDERSTOOD, *REFUSED, "zz", *VALUES, *MARKS]), max_size=40).map(
    " ".join
)


@settings(max_examples=300)
@given(SOUP, st.booleans())
def test_any_text_is_read_or_refused(text: str, complete: bool) -> None:
    refused = None
    try:
        config, warnings = from_document(xlcfg.parse(f"{LEAST if complete else ''}{text}\n", "t"))
    except ConfigError as error:
        refused = error
    else:
        assert all(warning.isprintable() for warning in warnings)
        assert from_dict(config.as_dict()) == config
    if refused is not None:
        assert str(refused).isprintable()
