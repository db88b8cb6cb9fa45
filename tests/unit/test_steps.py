"""The step list: order, timing, rollback."""

import pytest

from chaos.steps import EXECUTE, HYPERVISOR, PREPARE, Step, Timing, perform, roll_back
from xenctypes.errors import ConfigError, StepError


def plan(log: list[str], *, fail: str = "", error: BaseException | None = None) -> list[Step[None]]:
    def step(name: str, phase: str) -> Step[None]:
        def do(_: None) -> None:
            log.append(f"do {name}")
            if name == fail:
                raise error or RuntimeError("broken")

        return Step(name, phase, HYPERVISOR, do, lambda _: log.append(f"undo {name}"))

    return [step("one", PREPARE), step("two", PREPARE), step("three", EXECUTE)]


def test_steps_run_in_order_and_are_timed() -> None:
    log: list[str] = []
    timings: list[Timing] = []
    perform(plan(log), None, timings, subject="x")
    assert log == ["do one", "do two", "do three"]
    assert [(t.name, t.phase) for t in timings] == [
        ("one", PREPARE),
        ("two", PREPARE),
        ("three", EXECUTE),
    ]
    assert all(t.ns >= 0 for t in timings)
    assert timings[0].start + timings[0].ns <= timings[1].start


@pytest.mark.parametrize("fail", ["one", "two", "three"])
def test_a_failure_undoes_all_that_were_begun_in_reverse(fail: str) -> None:
    log: list[str] = []
    with pytest.raises(StepError) as caught:
        perform(plan(log, fail=fail), None, [], subject='cannot create "x"')
    begun = ["one", "two", "three"][: ["one", "two", "three"].index(fail) + 1]
    assert log == [f"do {name}" for name in begun] + [f"undo {name}" for name in reversed(begun)]
    assert caught.value.step == fail
    assert str(caught.value) == f'cannot create "x": {fail}: RuntimeError: broken'
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_the_tree_keeps_its_hint_and_exit_code() -> None:
    error = ConfigError("memory is odd", hint="make it even")
    with pytest.raises(StepError) as caught:
        perform(plan([], fail="two", error=error), None, [], subject="s")
    assert caught.value.hint == "make it even"
    assert caught.value.exit_code == ConfigError.exit_code


def test_an_interrupt_undoes_and_passes_through() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        perform(plan(log, fail="two", error=KeyboardInterrupt()), None, [], subject="s")
    assert log[-2:] == ["undo two", "undo one"]


def test_a_failed_undo_is_told_and_does_not_stop_the_others() -> None:
    log: list[str] = []
    steps = plan(log)

    def refuse(_: None) -> None:
        raise OSError("busy")

    steps[1] = steps[1]._replace(undo=refuse)
    assert roll_back(steps, None) == ["undoing two failed: busy"]
    assert log == ["undo three", "undo one"]
