"""Patterns found in masks: every band is found, and what is found is the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils

from metattn.integrations.transformers import BandMask, mask, patterns

LIMITS = st.integers(-9, 9) | st.none()


def find(whole: Tensor) -> patterns.Pattern | None:
    return patterns.find(lambda start, count: whole[:, start : start + count], *whole.shape)


def entries(pattern: patterns.Pattern, shape: torch.Size) -> Tensor:
    """bool [B, N, M] of a pattern."""
    distance = torch.arange(shape[2]) - torch.arange(shape[1])[:, None]
    alive = torch.ones(shape, dtype=torch.bool)
    if pattern.low is not None:
        alive &= distance >= pattern.low
    if pattern.high is not None:
        alive &= distance <= pattern.high
    if pattern.sequences is not None:
        alive &= pattern.sequences[:, :, None] == pattern.sequences[:, None]
    return alive


@settings(max_examples=300, deadline=None)
@given(low=LIMITS, high=LIMITS, n=st.integers(1, 9), m=st.integers(1, 9))
def test_bands_are_found(low: int | None, high: int | None, n: int, m: int) -> None:
    whole = entries(patterns.Pattern(low, high), torch.Size((1, n, m)))
    pattern = find(whole)
    if pattern is None:
        assert not whole.any(2).all()  # of queries behind all keys a limit may not show
    else:
        assert torch.equal(entries(pattern, whole.shape), whole)
        assert pattern.sequences is None or not whole.any(2).all()


@settings(max_examples=300, deadline=None)
@given(
    low=st.integers(-9, 0) | st.none(),
    high=st.integers(0, 9) | st.none(),
    begins=st.lists(st.booleans(), min_size=18, max_size=18),
)
def test_bands_within_sequences_are_found(low: int | None, high: int | None, begins: list[bool]) -> None:
    ids = torch.tensor(begins).view(2, 9).cumsum(1)
    whole = entries(patterns.Pattern(low, high, ids), torch.Size((2, 9, 9)))
    pattern = find(whole)
    assert pattern is not None
    assert torch.equal(entries(pattern, whole.shape), whole)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), batch=st.integers(1, 2), n=st.integers(1, 5), m=st.integers(1, 5))
def test_nothing_else_is_taken_for_a_band(data: st.DataObject, batch: int, n: int, m: int) -> None:
    size = batch * n * m
    whole = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(batch, n, m)
    pattern = find(whole)
    assert pattern is None or torch.equal(entries(pattern, whole.shape), whole)


@pytest.mark.parametrize("low_and_high", [(None, 0), (-3, 0), (-2, 2)])
def test_one_entry_too_many_or_missing(low_and_high: tuple[int | None, int]) -> None:
    band = entries(patterns.Pattern(*low_and_high), torch.Size((1, 12, 12)))
    for i in range(12):
        for j in range(12):
            whole = band.clone()
            whole[0, i, j] = ~whole[0, i, j]
            pattern = find(whole)
            assert pattern is None or torch.equal(entries(pattern, whole.shape), whole)


def test_a_mask_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of transformers' own masks that are looked at is larger than a block, nor is any row left out."""
    sizes = []
    theirs = masking_utils.sdpa_mask

    def spy(*args: object, **kwargs: object) -> Tensor:
        filled: Tensor = theirs(*args, **kwargs)
        sizes.append(filled.numel())
        return filled

    monkeypatch.setattr(masking_utils, "sdpa_mask", spy)
    monkeypatch.setattr(patterns, "ENTRIES", 1000)
    window = masking_utils.sliding_window_causal_mask_function(9)
    for function in (window, masking_utils.or_masks(window, lambda b, h, q, k: (q == 99) & (k == 2))):
        found = mask(2, 100, 100, mask_function=function)
        assert isinstance(found, BandMask)
        assert (found.entries is None) == (function is window)
        assert torch.equal(found.dense(), masking_utils.eager_mask(2, 100, 100, mask_function=function))
    assert len(sizes) > 20
    assert all(size <= 1000 for size in sizes[:20])
