"""For every test: poisoned memory, a fixed seed, the caller's thread count back; and the backends to test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from metattn.backends import available_backends

TESTED = [
    name for name, reason in available_backends().items() if name in ("reference", "cpu") or reason is None
]


@pytest.fixture(params=TESTED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run on this machine."""
    name: str = request.param
    reason = available_backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and all its kin give NaN, and the largest integers: what is read unwritten shows.

    torch fills memory so in its deterministic mode, below Python: new_empty, empty_like, compiled code too.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test may set the number of threads: the next one finds it as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
