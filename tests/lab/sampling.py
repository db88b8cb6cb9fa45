"""What is tried of many steps by tests that are not to take long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = "thorough"
EVERY = 6


def sample(steps: Sequence[str]) -> Sequence[str]:
    """Every sixth, the first and the last among them."""
    return [step for at, step in enumerate(steps) if at % EVERY == 0 or at == len(steps) - 1]


def sampled(steps: Sequence[str]) -> list[object]:
    """Values for ``parametrize``: what is not in the sample is for the thorough."""
    chosen = set(sample(steps))
    return [
        step if step in chosen else pytest.param(step, marks=getattr(pytest.mark, MARK))
        for step in steps
    ]
