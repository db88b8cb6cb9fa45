"""What of vifs needs no hypervisor."""

from __future__ import annotations

from typing import Any

from chaos.vif import taken_macs

BASE = "/local/domain/0/backend/vif"


MACS = {3: ["00:16:3E:00:00:03"], 4: ["00:16:3e:00:00:04", "00:16:3e:00:00:05"], 5: [None]}


class Store:
    """The part of xenstored's tree that is asked for."""

    path = "/run/xenstored/socket"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def children(self, path: str) -> list[str] | None:
        self.asked.append(path)
        if path == BASE:
            return [*map(str, MACS), "6"]
        macs = MACS.get(int(path.rpartition("/")[2]))  # none of 6, which has gone since
        return None if macs is None else [str(devid) for devid in range(len(macs))]

    def read_many(self, paths: list[str]) -> list[str | None]:
        keys = [path.removeprefix(BASE).split("/") for path in paths]
        return [MACS[int(domid)][int(devid)] for _, domid, devid, _ in keys]


def test_addresses_of_other_toolstacks_alone_are_asked_for() -> None:
    store: Any = Store()
    taken = taken_macs(store, {4, 9})
    assert store.asked == [BASE, f"{BASE}/3", f"{BASE}/5", f"{BASE}/6"]
    assert {mac for mac in taken if mac.startswith("00:16:3e")} == {"00:16:3e:00:00:03"}
