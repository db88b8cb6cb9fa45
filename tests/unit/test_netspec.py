import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from xlutil import needs_xlutil, rate

from chaos.netspec import RateLimit, VlanConfig, check_mac, parse_mac, parse_rate, parse_vlan
from xenctypes.errors import ConfigError


def ours(text: str) -> tuple[int, int] | None:
    try:
        limit = parse_rate(text)
    except ConfigError as error:
        # Ours alone: less than a byte per interval stops the vif for good.
        return (0, 0) if "less than one byte" in error.cause else None
    return limit.bytes_per_interval, limit.interval_usecs


digits = st.text("0123456789", min_size=1, max_size=12) | st.sampled_from(
    ["4294967295", "4294967296", "0", "010", "09", "18446744073709551616", "4294"]
)
rates = st.builds(
    "{}{}{}/s".format, digits, st.sampled_from(["", "K", "M", "G"]), st.sampled_from("bB")
)
intervals = st.builds("@{}{}".format, digits, st.sampled_from(["", "s", "ms", "us", "m", "u"]))


@needs_xlutil
@settings(max_examples=300, deadline=None)
@given(
    st.builds("{}{}".format, rates, st.just("") | intervals)
    | st.text("019KMGbB/s@mu x", max_size=9)
)
@example("10Mb/s@20ms")
@example("1b/s")
@example("1MB/s@")
@example("@20ms")
@example("1MB/s@1@2")
@example("4294967295GB/s@4294s")
def test_rates_are_those_of_libxlutil(text: str) -> None:
    assume(re.search(r"(?<!\d)0[0-7]*[89]", text) is None)  # half a number to strtoull
    theirs = rate(text.encode())
    if theirs is not None and theirs[0] == 0:
        theirs = (0, 0)
    assert ours(text) == theirs


def test_rate() -> None:
    for text in ("08KB/s", "1KB/s@08ms", "018b/s"):
        with pytest.raises(ConfigError, match="out of range"):
            parse_rate(text)
    assert parse_rate("250KB/s@20ms") == RateLimit(5000, 20_000)
    assert parse_rate("10Mb/s") == RateLimit(62_500, 50_000)
    assert str(parse_rate("10Mb/s")) == "62500,50000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", VlanConfig(10, (10,))),
        ("10p", VlanConfig(10, (10,))),
        ("10p/20", VlanConfig(10, (10,), (20,))),
        ("10p/100+10x4", VlanConfig(10, (10,), (100, 110, 120, 130, 140))),
        ("10p/20-22u/30", VlanConfig(10, (10, 20, 21, 22), (30,))),
        ("4094p/1/1u", VlanConfig(4094, (1, 4094))),
    ],
)
def test_vlan(text: str, expected: VlanConfig) -> None:
    assert parse_vlan(text) == expected
    assert parse_vlan(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no VLAN"),
        ("0", "within 1 to 4094"),
        ("4095p", "within 1 to 4094"),
        ("10/20", "0 VLANs are marked"),
        ("10u", "0 VLANs are marked"),
        ("10p/20p", "2 VLANs are marked"),
        ("10-12p", "3 VLANs are marked"),
        ("12-10", "within"),
        ("1+0x5", "within"),
        ("1+9999x9999", "within"),
        ("10p/", "no VLAN"),
        ("x", "no VLAN"),
        ("\u0661", "no VLAN"),
    ],
)
def test_bad_vlan(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        parse_vlan(text)


def test_mac() -> None:
    assert parse_mac("00:16:3E:1:02:ff") == bytes.fromhex("00163e0102ff")
    for text in (
        "",
        "1:2:3:4:5",
        "1:2:3:4:5:6:7",
        "00-16-3e-00-00-00",
        "100:0:0:0:0:0",
        "g:0:0:0:0:0",
    ):
        with pytest.raises(ConfigError, match="no MAC address"):
            parse_mac(text)
    for mac in (bytes(6), b"\1\0\0\0\0\1", b"\xff" * 6, b"\0\1"):
        with pytest.raises(ConfigError):
            check_mac(mac)
