import errno
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xlutil import Answers, Tree, needs_xlutil, read

from chaos.xlcfg import MAX_BYTES, MAX_DEPTH, parse
from chaos.xldoc import Atom, Document, Value
from xenctypes.errors import ConfigError

NAMES = ("a", "memory", "vif", "x.y_1")

# ---- generated texts ----

blank = st.text(" \t", max_size=2)
gap = st.lists(st.sampled_from([" ", "\n", "\t", "# 'c\n", "#\n"]), max_size=3).map("".join)
number = st.builds("{}{}".format, st.sampled_from("0129"), st.text("0189afx", max_size=20))
piece = st.sampled_from(
    [*"abn0159 \t#;,=[]{}+-é%", "\\n", "\\\\", "\\'", '\\"', "\\t", "\\v", "\\0123", "\\055", "0x"]
)
body = st.lists(piece, max_size=8).map("".join)
string = st.one_of(
    body.map(lambda text: f'"{text}"'),
    body.map(lambda text: f"'{text}'"),
    st.integers(-(2**65), 2**65).map(lambda n: f"'{n}'"),
    st.sampled_from(["'0x7fffffffffffffff'", "'-0x8000000000000000'", "' +010'", "'0x'", "'08'"]),
)


def listed(value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    item = st.builds("{}{}{}".format, gap, value, gap)
    comma = st.sampled_from(["", ",", ", \n"])
    return st.builds(
        lambda items, start, last: f"[{start}{','.join(items)}{last if items else ''}]",
        st.lists(item, max_size=4),
        gap,
        comma,
    )


atom = number | string
value = atom | listed(atom) | listed(atom | listed(atom | listed(atom)))
setting = st.builds(
    "{}{}{}{}{}{}".format,
    *(blank, st.sampled_from(NAMES), blank, st.sampled_from(["=", "=", "+="]), blank, value),
)
ending = st.sampled_from(["\n", ";", " # c\n", "\n\n", ";\n", "\n;"])
config = st.lists(st.builds("{}{}".format, setting, ending), max_size=6).map("".join)
scrap = st.sampled_from(
    [
        *("a", "memory", "=", "+=", "+", "[", "]", ",", ";", "\n", " ", "\t", "'", '"', "\\", "#"),
        *("'b'", '"c"', "1", "0x1f", "0", "A", "-", ".", "(", "\r", "é", "x1", "# c", "'\\x41'"),
    ]
)


@st.composite
def broken(draw: st.DrawFn) -> str:
    """A good text with a few characters taken out, put in or moved."""
    text = draw(config)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 2))
        text = text[:at] + draw(st.just("") | scrap) + text[at + cut :]
    return text


def tree(value: Value) -> Tree:
    if isinstance(value, Atom):
        return value.text.encode("utf-8", "surrogateescape")
    return [tree(item) for item in value.items]


def answers(document: Document, name: str) -> Answers:
    """What our accessors say, in the oracle's terms."""
    found = document.get(name)
    if found is None:
        return errno.ESRCH, errno.ESRCH, errno.ESRCH
    try:
        long = document.integer(name)
        assert long is not None
    except ConfigError as error:
        code = errno.ERANGE if "out of range" in error.cause else errno.EINVAL
        return tree(found.value), code, code
    return tree(found.value), (long,), 0


def attempt(data: bytes) -> Document | ConfigError:
    try:
        return parse(data, "t.cfg")
    except ConfigError as error:
        return error


def compare(data: bytes) -> None:
    document = attempt(data)
    if isinstance(document, ConfigError):
        assert read(data, set()) is None, document
        assert min(document.line, document.column) >= 1
        return
    names = {*NAMES, *document.last}
    theirs = read(data, names)
    assert theirs is not None, "libxlutil refuses it"
    assert {name: answers(document, name) for name in names} == theirs


@needs_xlutil
@settings(max_examples=150, deadline=None)
@given(config)
def test_reads_what_libxlutil_reads(text: str) -> None:
    compare(text.encode())


@needs_xlutil
@settings(max_examples=250, deadline=None)
@given(broken())
@example("a=1\nA")
@example("a=1 #")
@example("a=1 #c")
@example("a=[1]]")
@example("a='\\x41'")
@example("a='\\07'")
@example("a='\\0 12'\n")
@example("a='b'\na+=[1]")
@example("a=[]\na+=[[]]\na+=['1']\n")
@example("a+=1")
@example("a=1\r\n")
@example("a=1\na+=2\na=3")
def test_accepts_what_libxlutil_accepts(text: str) -> None:
    compare(text.encode())


@needs_xlutil
@settings(max_examples=250, deadline=None)
@given(st.lists(scrap, max_size=12).map("".join))
def test_scraps(text: str) -> None:
    compare(text.encode())


@needs_xlutil
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=30).filter(lambda data: b"\0" not in data))
@example(b"a='\xff\xfe'")
@example(b"a='\\\xff'")
@example(b"# \xff\na=1")
@example(b"a=1 \xff")
@example(b"# \0 in a comment\na=1")
def test_bytes(data: bytes) -> None:
    compare(data)


@needs_xlutil
@settings(max_examples=80, deadline=None)
@given(config, st.lists(setting, max_size=3))
def test_overrides_are_appended(text: str, overrides: list[str]) -> None:
    extra = "".join(f"{override}\n" for override in overrides)
    whole = f"{text}\n{extra}\n" if overrides else text  # xl_vmcontrol.c, create_domain
    try:
        document = parse(text, "t.cfg", overrides)
    except ConfigError:
        assert read(whole.encode(), set()) is None
        return
    names = set(NAMES)
    assert {name: answers(document, name) for name in names} == read(whole.encode(), names)


# ---- what libxlutil cannot show ----


def test_places() -> None:
    document = parse('a = "é"; b = [\n  1,\n\t"x"]\n', "t.cfg")
    a, b = document.get("a"), document.get("b")
    assert a is not None
    assert b is not None
    assert str(document.source.place(a.value.offset)) == "t.cfg:1:5"
    assert str(document.source.place(b.offset)) == "t.cfg:1:10"
    items = document.items("b")
    assert items is not None
    assert [str(document.source.place(item.offset)) for item in items] == ["t.cfg:2:3", "t.cfg:3:2"]


@pytest.mark.parametrize(
    ("text", "message", "excerpt"),
    [
        ("name = hello", 't:1:8: expected a value: .* found "hello" .strings need quotes.', 7),
        ("memory = -1", 't:1:10: unexpected character "-" .write a signed number in quotes.', 9),
        ("a = 'b\n", "t:1:5: the string has no end", 4),
        ("a = 1 b = 2", 't:1:7: expected the end of the line, found "b"', 6),
        ("a = 1\n\tBig = 2", 't:2:2: unexpected character "B" .names are lower case', 1),
        ("a = [ 1\nb = 2", 't:2:1: expected "," or "]" in the list that starts in line 1', 0),
        ("a = 'x\\qy'", r't:1:7: "\\q" is no escape', 6),
        ("a =\n1", "t:1:4: expected a value: .*, found the end of the line", 3),
        ("a", 't:1:2: expected "=" after "a", found the end of the text', 1),
        ("# c", "t:1:1: the comment has no line end", 0),
        ("a=1\r\n", "t:1:4: unexpected carriage return .the file has DOS line ends.", 3),
        ("def f():\n", 't:1:5: expected "=" after "def", found "f"', 4),
        ("a='b\0c'", "t:1:5: a string holds a NUL", 4),
        ("a='1'\na+=[2]", "t:2:1: [+]= cannot join a list and a string", 0),
    ],
)
def test_errors_point_at_the_place(text: str, message: str, excerpt: int) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text, "t")
    line, caret = caught.value.excerpt.split("\n")
    assert line == text.split("\n")[caught.value.line - 1].translate(
        {9: " ", 13: "\ufffd", 0: "\ufffd"}
    )
    assert caret == " " * excerpt + "^"


def test_errors_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match='command line:2:8: unexpected character "-"'):
        parse("a = 1", "t", ["b = 2", "memory=-1"])


def test_errors_cannot_upset_a_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a = '\x1b[2J\u202e' b\n", "evil\x1b]0;name")
    assert "".join(caught.value.excerpt.split("\n")).isprintable()
    assert str(caught.value).isprintable()


def test_long_lines_are_cut_around_the_caret() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a = '" + "x" * 5000 + "' ! " + "y" * 5000 + "\n", "t")
    line, caret = caught.value.excerpt.split("\n")
    assert len(line) <= 120
    assert line[len(caret) - 1] == "!"
    assert caught.value.column == 5008


def test_nesting_is_bounded() -> None:
    parse("a=" + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "t")
    with pytest.raises(ConfigError, match=f"deeper than {MAX_DEPTH}"):
        parse("a=" + "[" * 100_000 + "]" * 100_000, "t")


@pytest.mark.parametrize(
    "text",
    [
        b"#" * (MAX_BYTES - 1) + b"\n",
        b"a+=[1]\n" * (MAX_BYTES // 7),
        b"a+='b'\n" * (MAX_BYTES // 7),
        b"a='" + rb"\\" * (MAX_BYTES // 2 - 4) + b"'\n",
        b"a=[" + b"1," * (MAX_BYTES // 2 - 2) + b"]",
        b"a='" + b"\\055\\" * (MAX_BYTES // 5 - 4) + b"n'",
        b";" * MAX_BYTES,
    ],
    ids=["comment", "lists", "strings", "escapes", "items", "octal", "statements"],
)
def test_the_largest_texts(text: bytes) -> None:
    parse(text, "t")


def test_size_is_bounded() -> None:
    with pytest.raises(ConfigError, match="t: longer than 1048576 bytes"):
        parse(b"#" * MAX_BYTES + b"\n", "t")
    with pytest.raises(ConfigError, match="longer"):
        parse(b"", "t", ["a=1"] * (MAX_BYTES // 4))


@pytest.mark.parametrize(
    "text", ["a='" + "\\n" * 1000, "a=" + '"' * 1001, "a=[" * 1000, "a='" + "'b" * 999]
)
def test_broken_texts_fail_fast(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, "t")


def test_habits_of_libxlutil_are_warned_about() -> None:
    assert parse("a = 1 #", "t").warnings == ('t:1:7: "#" at the very end is ignored, as xl does',)
    octal = parse("a = '\\055-'", "t")
    assert octal.string("a") == "-"
    assert octal.warnings == ("t:1:6: xl reads an octal escape as nothing, and so do we",)


def test_accessors_refuse_the_wrong_kind() -> None:
    document = parse("a = [1]; b = 1; c += 1; d = 'x'; e = '99999999999999999999'", "t")
    assert document.integer("nope") is document.string("nope") is document.items("nope") is None
    for accessor, name, cause in (
        (document.string, "a", "t:1:5: a is a list"),
        (document.items, "b", "t:1:14: b is one value"),
        (document.integer, "c", "t:1:17: .= does not add numbers"),
        (document.integer, "d", 't:1:29: d "x" is not a number'),
        (document.integer, "e", "t:1:38: e .* is out of range"),
    ):
        with pytest.raises(ConfigError, match=cause):
            accessor(name)


def test_positions_in_a_value_are_positions_in_the_file() -> None:
    document = parse("a = 'é,b' # c\nb = '\\t,b'", "t")
    a, b = document.get("a"), document.get("b")
    assert a is not None
    assert isinstance(a.value, Atom)
    assert document.source.place(a.value.at(2)).column == 8
    assert b is not None
    assert isinstance(b.value, Atom)
    assert document.source.place(b.value.at(2)).column == 5  # escapes: only the start is known


def test_settings_keep_their_order() -> None:
    document = parse("b = 1\na = 2\nb += 3", "t")
    assert [setting.name for setting in document.settings] == ["b", "a", "b"]
    offsets = [setting.offset for setting in document.settings]
    assert all(first < second for first, second in pairwise(offsets))
