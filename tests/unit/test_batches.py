"""Work that is gathered."""

from __future__ import annotations

import asyncio

import pytest

from chaos.daemon import batches
from chaos.daemon.batches import Batches


def test_a_burst_is_worked_on_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST", 3)

    async def run() -> list[list[int]]:
        seen: list[list[int]] = []
        tasks: list[asyncio.Task[None]] = []
        done = asyncio.Event()

        async def work(items: list[int]) -> None:
            seen.append(items)
            if 5 in items:
                gathered.add(6)  # while it works
            if 6 in items:
                done.set()

        gathered = Batches[int](
            lambda coroutine: tasks.append(asyncio.create_task(coroutine)), work
        )
        for number in range(1, 6):
            gathered.add(number)
        await done.wait()
        await tasks[0]
        done.clear()
        gathered.add(6)
        await done.wait()
        assert len(tasks) == 2
        return seen

    assert asyncio.run(run()) == [[1, 2, 3], [4, 5], [6], [6]]


def test_after_a_failure_it_works_on() -> None:
    async def run() -> list[int]:
        seen: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def work(items: list[int]) -> None:
            if items == [1]:
                raise OSError("lost")
            seen.extend(items)

        gathered = Batches[int](
            lambda coroutine: tasks.append(asyncio.create_task(coroutine)), work
        )
        gathered.add(1)
        with pytest.raises(OSError, match="lost"):
            await tasks[0]
        gathered.add(2)
        await tasks[1]
        return seen

    assert asyncio.run(run()) == [2]


def test_a_failure_is_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST", 2)

    async def run() -> list[int]:
        seen: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def work(items: list[int]) -> None:
            seen.extend(items)
            if 1 in items:
                raise OSError("lost")

        gathered = Batches[int](
            lambda coroutine: tasks.append(asyncio.create_task(coroutine)), work
        )
        for number in range(1, 4):
            gathered.add(number)
        with pytest.raises(OSError, match="lost"):
            await tasks[0]
        await tasks[1]
        return seen

    assert asyncio.run(run()) == [1, 2, 3]


def test_at_the_end_nothing_waits_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST", 2)
    monkeypatch.setattr(batches, "DELAY", 3600.0)
    monkeypatch.setattr(batches, "LATEST", 3600.0)

    async def run() -> list[list[int]]:
        seen: list[list[int]] = []
        tasks: list[asyncio.Task[None]] = []
        begun, go = asyncio.Event(), asyncio.Event()

        async def work(items: list[int]) -> None:
            begun.set()
            await go.wait()
            seen.append(items)

        gathered = Batches[int](
            lambda coroutine: tasks.append(asyncio.create_task(coroutine)), work
        )
        for number in range(1, 6):
            gathered.add(number)
        await begun.wait()  # with the first
        finishing = asyncio.create_task(gathered.finish())
        await asyncio.sleep(0)
        assert not finishing.done()
        go.set()
        await finishing
        tasks[0].cancel()
        return seen

    assert asyncio.run(run()) == [[1, 2], [3, 4], [5]]


def test_what_comes_while_more_comes_waits_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds
        gathered.add(len(pauses))

    async def work(items: list[int]) -> None:
        worked.append((round(now, 3), items))

    monkeypatch.setattr(batches.time, "monotonic", lambda: now)
    monkeypatch.setattr(batches.asyncio, "sleep", sleep)
    worked: list[tuple[float, list[int]]] = []
    tasks: list[asyncio.Task[None]] = []

    async def run() -> None:
        gathered.add(0)
        await tasks[0]

    gathered = Batches[int](lambda coroutine: tasks.append(asyncio.create_task(coroutine)), work)
    asyncio.run(run())
    assert worked == [(0.5, [0, 1, 2, 3, 4, 5])]
