"""The tree against a model: a dictionary, and serializability."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from noxs.tree import Caller, Quota, Tree
from noxs.wire import StoreError, parent

ROOT = Caller(0, privileged=True)
GUEST = Caller(5, privileged=False)

names = st.sampled_from([b"a", b"b", b"c"])
paths = st.lists(names, min_size=1, max_size=4).map(lambda parts: b"/" + b"/".join(parts))
values = st.binary(max_size=4)


class Model:
    """What xenstore.txt says about nodes, for a privileged caller."""

    def __init__(self, nodes: dict[bytes, bytes]) -> None:
        self.nodes = nodes

    def read(self, path: Any) -> Any:
        return self.nodes.get(path, "ENOENT")

    def directory(self, path: Any) -> Any:
        if path not in self.nodes:
            return "ENOENT"
        return {p for p in self.nodes if p != b"/" and parent(p) == path}

    def write(self, path: Any, value: Any) -> None:
        self.mkdir(path)
        self.nodes[path] = value

    def mkdir(self, path: Any) -> None:
        while path not in self.nodes:
            self.nodes[path] = b""
            path = parent(path)

    def remove(self, path: Any) -> Any:
        if path not in self.nodes:
            return None if parent(path) in self.nodes else "ENOENT"
        for other in list(self.nodes):
            if other == path or other.startswith(path + b"/"):
                del self.nodes[other]
        return None

    def do(self, op: int, *args: str) -> Any:
        return getattr(self, op)(*args)


def do(tree: Any, tx: Any, op: int, *args: str) -> Any:
    try:
        if op == "read":
            return tree.lookup(ROOT, tx, args[0], 1).value
        if op == "directory":
            children = tree.lookup(ROOT, tx, args[0], 1).children or {}
            prefix = args[0].rstrip(b"/")
            return {prefix + b"/" + child for child in children}
        getattr(tree, op)(ROOT, tx, *args)  # commit, too
    except StoreError as error:
        return error.name.decode()
    return None


operations = st.one_of(
    st.tuples(st.just("read"), paths),
    st.tuples(st.just("directory"), st.one_of(paths, st.just(b"/"))),
    st.tuples(st.just("write"), paths, values),
    st.tuples(st.just("mkdir"), paths),
    st.tuples(st.just("remove"), paths),
)


class TreeMachine(RuleBasedStateMachine):
    """Transactions see a stable view, and commit only if that equals running them at the end."""

    transactions = Bundle("transactions")

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        self.model = Model({b"/": b""})
        self.changes = 0

    @rule(operation=operations)
    def outside(self, operation: Any) -> None:
        assert do(self.tree, None, *operation) == self.model.do(*operation)
        self.changes += operation[0] not in {"read", "directory"}

    @rule(target=transactions)
    def begin(self) -> Any:
        return [self.tree.begin(ROOT), [], self.changes]

    @rule(transaction=transactions, operation=operations)
    def inside(self, transaction: Any, operation: Any) -> None:
        tx, log, _ = transaction
        log.append((operation, do(self.tree, tx, *operation)))

    @rule(transaction=consumes(transactions), commit=st.booleans())
    def end(self, transaction: Any, commit: bool) -> None:
        tx, log, start = transaction
        if not commit:
            self.tree.abort(tx)
            return
        reply = do(self.tree, tx, "commit")
        if reply is not None:
            assert reply == "EAGAIN"
            assert self.changes > start, "a conflict with nobody"
            return
        for operation, reply in log:
            assert self.model.do(*operation) == reply
        self.changes += 1

    @invariant()
    def same(self) -> None:
        self.tree.check()
        nodes = {p: n.value for p, n in self.tree.nodes.items() if p[:1] == b"/"}
        assert nodes == self.model.nodes


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_reads_repeat_in_a_transaction_whatever_happens_outside() -> None:
    tree = Tree()
    tree.write(ROOT, None, b"/a/x", b"1")
    tx = tree.begin(ROOT)
    assert do(tree, tx, "read", b"/a/x") == b"1"
    assert do(tree, tx, "directory", b"/a") == {b"/a/x"}
    tree.write(ROOT, None, b"/a/x", b"2")
    tree.write(ROOT, None, b"/a/y", b"2")
    tree.remove(ROOT, None, b"/a/x")
    assert do(tree, tx, "read", b"/a/x") == b"1"
    assert do(tree, tx, "directory", b"/a") == {b"/a/x"}
    with pytest.raises(StoreError, match="EAGAIN"):
        tree.commit(ROOT, tx)


def test_transactions_on_different_nodes_both_commit() -> None:
    tree = Tree()
    tree.write(ROOT, None, b"/a/x", b"")
    tree.write(ROOT, None, b"/b/x", b"")
    one, two = tree.begin(ROOT), tree.begin(ROOT)
    tree.write(ROOT, one, b"/a/x", b"1")
    tree.write(ROOT, two, b"/b/x", b"2")
    tree.commit(ROOT, one)
    tree.commit(ROOT, two)
    assert tree.nodes[b"/a/x"].value == b"1"
    assert tree.nodes[b"/b/x"].value == b"2"


def guest_tree() -> Tree:
    tree = Tree()
    tree.mkdir(ROOT, None, b"/local/domain/5/data")
    tree.set_perms(ROOT, None, b"/local/domain/5", ((5, 0),))
    tree.set_perms(ROOT, None, b"/local/domain/5/data", ((5, 0),))
    tree.write(ROOT, None, b"/local/domain/6/secret", b"x")
    tree.write(ROOT, None, b"/shared", b"s")
    tree.set_perms(ROOT, None, b"/shared", ((0, 0), (5, 1)))
    return tree


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda t: t.lookup(GUEST, None, b"/local/domain/6/secret", 1), "EACCES"),
        (lambda t: t.lookup(GUEST, None, b"/local/domain/6/none", 1), "EACCES"),
        (lambda t: t.lookup(GUEST, None, b"/local/domain/5/none", 1), "ENOENT"),
        (lambda t: t.write(GUEST, None, b"/shared", b""), "EACCES"),
        (lambda t: t.write(GUEST, None, b"/shared/x", b""), "EACCES"),
        (lambda t: t.mkdir(GUEST, None, b"/x"), "EACCES"),
        (lambda t: t.remove(GUEST, None, b"/shared"), "EACCES"),
        (lambda t: t.remove(GUEST, None, b"/nothing/here"), "EACCES"),
        (lambda t: t.remove(ROOT, None, b"/nothing/here"), "ENOENT"),
        (lambda t: t.remove(ROOT, None, b"/"), "EINVAL"),
        (lambda t: t.set_perms(GUEST, None, b"/shared", ((5, 0),)), "EACCES"),
        (lambda t: t.set_perms(GUEST, None, b"/local/domain/5/data", ((0, 0),)), "EPERM"),
        (lambda t: t.set_perms(GUEST, None, b"/local/domain/5", ((5, 0),) * 6), "ENOSPC"),
        (lambda t: t.write(GUEST, None, b"/local/domain/5/data", b"v" * 2048), "ENOSPC"),
    ],
)
def test_what_a_guest_may_not_do(call: Callable[..., Any], error: str) -> None:
    tree = guest_tree()
    with pytest.raises(StoreError, match=error):
        call(tree)
    tree.check()


def test_what_a_guest_may_do() -> None:
    tree = guest_tree()
    assert tree.lookup(GUEST, None, b"/shared", 1).value == b"s"
    tree.write(GUEST, None, b"/local/domain/5/data/x/y", b"1")
    assert tree.nodes[b"/local/domain/5/data/x"].perms == ((5, 0),)
    assert tree.owned[5] == 4
    tree.set_perms(GUEST, None, b"/local/domain/5/data", ((5, 0), (0, 1)))
    tree.remove(GUEST, None, b"/local/domain/5/data")
    assert tree.owned[5] == 1
    tree.check()


def test_a_target_s_rights_are_the_caller_s_too() -> None:
    tree = guest_tree()
    stub = Caller(9, privileged=False)
    with pytest.raises(StoreError, match="EACCES"):
        tree.lookup(stub, None, b"/local/domain/5/data", 1)
    stub.target = 5
    tree.lookup(stub, None, b"/local/domain/5/data", 1)


@pytest.mark.parametrize("in_transaction", [False, True])
def test_the_node_quota_counts_what_a_domain_owns(in_transaction: bool) -> None:
    tree = guest_tree()
    guest = Caller(5, privileged=False, quota=Quota(nodes=10))
    tx = tree.begin(guest) if in_transaction else None
    for i in range(8):
        tree.write(guest, tx, b"/local/domain/5/data/%d" % i, b"")
    with pytest.raises(StoreError, match="ENOSPC"):
        tree.write(guest, tx, b"/local/domain/5/data/8", b"")
    tree.remove(guest, tx, b"/local/domain/5/data/3")
    tree.write(guest, tx, b"/local/domain/5/data/8", b"")
    if tx:
        tree.commit(guest, tx)
    assert tree.owned[5] == 10
    tree.check()


def test_the_node_quota_is_checked_again_at_commit() -> None:
    tree = guest_tree()
    guest = Caller(5, privileged=False, quota=Quota(nodes=4))
    tree.mkdir(guest, None, b"/local/domain/5/other")
    tx = tree.begin(guest)
    tree.mkdir(guest, tx, b"/local/domain/5/data/x")
    tree.mkdir(guest, None, b"/local/domain/5/other/y")
    with pytest.raises(StoreError, match="ENOSPC"):
        tree.commit(guest, tx)
    tree.check()


def test_the_transaction_s_node_quota_fails_the_transaction() -> None:
    tree = guest_tree()
    guest = Caller(5, privileged=False, quota=Quota(transaction_nodes=7))
    tx = tree.begin(guest)
    for i in range(5):
        tree.write(guest, tx, b"/local/domain/5/data/%d" % i, b"")
    with pytest.raises(StoreError, match="ENOSPC"):
        tree.write(guest, tx, b"/local/domain/5/data/9/9", b"")
    with pytest.raises(StoreError, match="ENOMEM"):
        tree.commit(guest, tx)
    tree.check()


def test_a_transaction_keeps_no_more_than_it_may() -> None:
    """Of nodes that are not there, too: their paths."""
    tree = guest_tree()
    guest = Caller(5, privileged=False, quota=Quota(transaction_size=10_000))
    tx = tree.begin(guest)
    path = b"/local/domain/5/data/%02d" + b"x" * 1000
    for number in range(9):
        assert tree.get(tx, path % number) is None
    with pytest.raises(StoreError, match="ENOSPC"):
        tree.get(tx, path % 9)
    with pytest.raises(StoreError, match="ENOMEM"):
        tree.commit(guest, tx)


def test_a_gone_domain_s_nodes_go_with_all_below_them() -> None:
    tree = guest_tree()
    tree.write(ROOT, None, b"/local/domain/5/data/x", b"")
    tree.set_perms(ROOT, None, b"/local/domain/5/data/x", ((0, 0),))
    gone = [change[0] for change in tree.drop_owner(5)]
    assert gone == [b"/local/domain/5/data/x", b"/local/domain/5/data", b"/local/domain/5"]
    assert 5 not in tree.owned
    tree.check()


def test_removal_reports_children_before_parents() -> None:
    tree = Tree()
    for path in (b"/a/b/c", b"/a/b/d", b"/a/e"):
        tree.mkdir(ROOT, None, path)
    changes = tree.remove(ROOT, None, b"/a")
    assert [(path, exact) for path, exact, _, _ in changes] == [
        (b"/a/b/c", True), (b"/a/b/d", True), (b"/a/b", True), (b"/a/e", True), (b"/a", False),
    ]  # fmt: skip


def test_a_deep_tree_is_removed_without_recursion() -> None:
    tree = Tree()
    path = b"/a" * 1500
    tree.mkdir(ROOT, None, path)
    assert len(tree.remove(ROOT, None, b"/a")) == 1500
    tree.check()
