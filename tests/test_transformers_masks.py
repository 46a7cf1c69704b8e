"""Masks of transformers as descriptions: what they are to attention, to a graph, and to whoever writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from transformers import masking_utils
from transformers_cases import Layer, N, packed, padding, textbook

import metattn
from benchmarks.transformers_models import make
from metattn.integrations.transformers import BandMask, attend, mask, masks
from metattn.integrations.transformers.band_mask import is_changed


def patterns() -> dict[str, Any]:
    u = masking_utils
    positions = (torch.arange(80) * 3 % 11).view(2, 40)
    blocks = torch.arange(40) // 4
    return {
        "causal": u.causal_mask_function,
        "full": u.bidirectional_mask_function,
        "window": u.sliding_window_causal_mask_function(3),
        "window 1": u.sliding_window_causal_mask_function(1),
        "window 0": u.sliding_window_causal_mask_function(0),
        "window 99": u.sliding_window_causal_mask_function(99),
        "both sides": u.sliding_window_bidirectional_mask_function(2),
        "chunks": u.chunked_causal_mask_function(3, torch.tensor([0, 2])),
        "by positions": lambda b, h, q, k: positions[b, k] <= positions[b, q],
        "causal or some": u.or_masks(u.causal_mask_function, lambda b, h, q, k: (q + k) % 3 == 0),
        "blocks": u.or_masks(u.causal_mask_function, lambda b, h, q, k: blocks[k] == blocks[q]),
    }


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(patterns())),
    n=st.integers(1, 7),
    past=st.integers(0, 6),
    tail=st.integers(0, 4),
    dropped=st.integers(0, 4),
    hidden=st.lists(st.booleans(), min_size=20, max_size=20) | st.none(),
    biased=st.booleans(),
)
def test_every_mask_is_transformers_own(
    name: str, n: int, past: int, tail: int, dropped: int, hidden: list[bool] | None, biased: bool
) -> None:
    """Entries and attention, for queries behind `past` keys, of which a cache has dropped the first ones, or
    which a static cache's unused tail follows."""
    dropped = min(dropped, past)
    m = past - dropped + n + tail
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": n,
        "kv_length": m,
        "q_offset": past,
        "kv_offset": dropped,
        "mask_function": patterns()[name],
        "dtype": torch.float64,
    }
    if hidden is not None:
        keep = ~torch.tensor(hidden).view(2, 10)
        arguments["attention_mask"] = keep.repeat(1, 2)[:, : past + n]
    expected = masking_utils.eager_mask(**arguments)
    found = mask(**arguments)
    assert isinstance(found, BandMask)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found + 0.0, expected)
    assert torch.equal(found.alive(), expected == 0)
    generator = torch.Generator().manual_seed(n + 10 * m)
    q, k, v = (
        torch.randn(2, h, length, d, generator=generator, dtype=torch.float64)
        for h, length, d in ((4, n, 3), (2, m, 3), (2, m, 5))
    )
    bias = torch.randn(1, 4, n, m, generator=generator, dtype=torch.float64) if biased else None
    o, _ = attend(Layer(is_causal=name != "full"), q, k, v, found, position_bias=bias)
    numbers = expected if bias is None else expected + bias
    torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, numbers), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.GptOssConfig])
@pytest.mark.parametrize("name", sorted(patterns()))
def test_masks_in_a_traced_graph(name: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries; or none, for what a model that knows torch's attention says itself."""
    make("llama"), make("gpt_oss")  # their code is imported
    monkeypatch.setattr(masks, "is_tracing", lambda tensor: True)
    keep = padding("left", 6).bool()
    for n, past, keys, seen in (
        (6, 0, 6, None),
        (6, 0, 6, keep),
        (2, 4, 6, None),
        (1, 5, 6, None),
        (3, 0, 6, None),
    ):
        arguments: dict[str, Any] = {
            "batch_size": 2,
            "q_length": n,
            "kv_length": keys,
            "q_offset": past,
            "mask_function": patterns()[name],
            "attention_mask": seen,
            "dtype": torch.float64,
        }
        found, expected = mask(config=config(), **arguments), masking_utils.eager_mask(**arguments)
        plain = seen is None and past == 0 and (name == "full" or (name == "causal" and n == keys))
        assert (found is None) == (plain and config is transformers.LlamaConfig)
        if found is not None:
            assert torch.equal(found if found.dtype == torch.bool else found == 0, expected == 0)


@pytest.mark.parametrize(
    "function", [masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function]
)
@pytest.mark.parametrize("offset", [0, 3, 5, 7])
def test_rows_of_plain_masks_are_not_looked_at(
    function: Any, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "batch_size": 1,
        "q_length": 6,
        "kv_length": 6,
        "q_offset": offset,
        "mask_function": function,
    }
    entries = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "kv_offset": 0}
    looked_at = masks.patterns.find(masks._rows({**arguments, **entries}), 1, 6, 6)
    monkeypatch.setattr(masks.patterns, "find", None)
    found = mask(**arguments, kv_offset=0)
    assert isinstance(found, BandMask)
    assert looked_at is not None
    assert (found.low, found.high) == (looked_at.low, looked_at.high)
    assert torch.equal(found.dense(), masking_utils.eager_mask(**arguments, dtype=torch.float32))


def test_what_is_described() -> None:
    """Bands, of whatever functions they are made; and no other masks."""
    u = masking_utils
    ids, first = torch.arange(N).expand(2, N) // 5, torch.tensor([0, 2])
    chunks = u.chunked_causal_mask_function(8, first)
    images = torch.where(ids == 1, 1, -1)
    for is_band, function, (n, past) in (
        (True, chunks, (N, 0)),
        (False, chunks, (1, N - 1)),  # another one in each row
        (True, u.chunked_causal_mask_function(8, 0 * first), (1, N - 1)),
        (False, chunks, (4, N - 4)),
        (True, u.and_masks(chunks, u.packed_sequence_mask_function(ids)), (N, 0)),
        (True, packed(chunks), (N, 0)),
        (True, u.and_masks(u.causal_mask_function, lambda b, h, q, k: ids[b, q] == ids[b, k]), (N, 0)),
        (True, u.and_masks(u.causal_mask_function, lambda b, h, q, k: q - k < 7), (4, N - 4)),
        (True, u.or_masks(u.causal_mask_function, u.blockwise_overlay(torch.full_like(ids, -1))), (N, 0)),
        (False, u.or_masks(u.causal_mask_function, u.blockwise_overlay(images)), (N, 0)),
        (False, u.or_masks(u.causal_mask_function, lambda b, h, q, k: k < 5), (N, 0)),
    ):
        for use_vmap in (False, True):
            arguments = {"batch_size": 2, "q_length": n, "kv_length": N, "q_offset": past}
            arguments |= {"mask_function": function, "use_vmap": use_vmap, "dtype": torch.float64}
            found = mask(**arguments)
            assert isinstance(found, BandMask)
            assert (found.entries is None) == is_band
            assert torch.equal(found.dense(), masking_utils.eager_mask(**arguments))


@pytest.mark.parametrize("window", [None, 3, 0])
@pytest.mark.parametrize("extra", ["nothing", "bias", "sinks", "sinks of queries", "padding"])
def test_sequences_of_a_row(window: int | None, extra: str) -> None:
    """Packed by positions, with what does and what does not go to varlen_attention."""
    u = masking_utils
    inner = u.causal_mask_function if window is None else u.sliding_window_causal_mask_function(window)
    keep = padding("holes").bool() if extra == "padding" else None
    arguments = {"batch_size": 2, "q_length": N, "kv_length": N, "mask_function": packed(inner)}
    arguments |= {"dtype": torch.float64, "attention_mask": keep}
    found, expected = mask(**arguments), masking_utils.eager_mask(**arguments)
    assert isinstance(found, BandMask)
    starts = None if found.starts is None else found.starts.tolist()
    assert starts == (None if window == 0 else [0, 5, 13, 16, 18, 32])  # of no keys there is no band
    assert torch.equal(found.dense(), expected)
    q, k, v = (torch.randn(2, h, N, 4, dtype=torch.float64) for h in (4, 2, 2))
    bias = torch.randn(2, 4, N, N, dtype=torch.float64) if extra == "bias" else None
    shape = {"sinks": (4,), "sinks of queries": (2, 4, N, 1)}.get(extra)
    sinks = None if shape is None else torch.randn(shape, dtype=torch.float64)
    o, _ = attend(Layer(is_causal=True), q, k, v, found, position_bias=bias, sinks=sinks)
    of_row = sinks.view(1, 4, 1, 1) if extra == "sinks" and sinks is not None else sinks
    numbers = expected if bias is None else expected + bias
    torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, numbers, of_row), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [True, False])
def test_sequences_whose_queries_do_not_see_themselves(before: bool) -> None:
    """varlen_attention has no window that leaves them out."""
    function = packed(lambda b, h, q, k: (k < q) if before else (k > q))
    found = mask(2, N, N, mask_function=function, dtype=torch.float64)
    expected = masking_utils.eager_mask(2, N, N, mask_function=function, dtype=torch.float64)
    assert isinstance(found, BandMask)
    assert found.starts is not None
    assert (found.low, found.high) == ((None, -1) if before else (1, None))
    q, k, v = (torch.randn(2, h, N, 4, dtype=torch.float64) for h in (4, 2, 2))
    o, _ = attend(Layer(is_causal=True), q, k, v, found)
    torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, expected), rtol=1e-12, atol=1e-12)


def test_one_sequence_a_row_is_no_packing() -> None:
    u = masking_utils
    for first, starts in (((0, 0), None), ((0, 5), [0, 8, 13, 16])):
        function = u.chunked_causal_mask_function(8, torch.tensor(first))
        found = mask(2, 8, 8, mask_function=function)
        assert isinstance(found, BandMask)
        assert (None if found.starts is None else found.starts.tolist()) == starts
        assert found.high == 0


def test_a_static_cache_gives_entries_for_steps_and_a_description_for_the_prompt() -> None:
    for n, past, described in ((4, 0, True), (1, 0, False), (1, 3, False), (2, 3, False)):
        offset = torch.tensor(past)
        found = mask(2, n, 9, q_offset=offset, dtype=torch.float64)
        assert isinstance(found, BandMask) == described
        expected = masking_utils.eager_mask(2, n, 9, q_offset=past, dtype=torch.float64)
        assert torch.equal(found + 0.0, expected)
        offset += 5  # as a cache does in place: a mask that was made stays what it is
        assert torch.equal(found + 0.0, expected)


def test_keys_that_no_query_sees_are_left_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unused tail of a static cache, and what a step's window has passed; with their bias and padding."""
    calls: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append((k.shape[2], options))
        return metattn.attention(q, k, v, **options)

    monkeypatch.setattr("metattn.integrations.transformers.attention.attention", spy)
    window = masking_utils.sliding_window_causal_mask_function(3)
    layer = Layer(is_causal=True)
    q, k, bias = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 9, 4), torch.randn(1, 2, 4, 9)
    attend(layer, q, k, k, mask(2, 4, 9), position_bias=bias)
    attend(
        layer, q, k, k, mask(2, 4, 9, q_offset=5, mask_function=window, attention_mask=padding("right", 9))
    )
    attend(layer, q[:, :, :1], k, k, mask(2, 1, 9, q_offset=8, mask_function=window))
    (first, options), (second, others), (third, least) = calls
    assert (first, second, third) == (4, 6, 3)
    assert options["causal"] == others["causal"] == "bottom-right"
    assert options["bias"].shape == (1, 2, 4, 4)
    assert "mask" not in options
    assert others["window"] == (2, -1)
    assert others["mask"].shape == (2, 1, 1, 6)
    assert not {"mask", "window"} & least.keys()


def test_a_description_is_a_tensor_to_others() -> None:
    keep = padding("left", 6).bool()
    found = mask(2, 6, 6, attention_mask=keep, dtype=torch.bfloat16)
    expected = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.bfloat16)
    assert isinstance(found, BandMask)
    assert found.ndim == 4
    assert found.device == expected.device
    assert torch.equal(found[:, :, -2:], expected[:, :, -2:])
    assert torch.equal(torch.cat([found, found], -1), torch.cat([expected, expected], -1))
    assert torch.equal(found.bool(), expected.bool())
    for same in (found.to("cpu"), found.detach(), found.contiguous(), copy.deepcopy(found)):
        assert isinstance(same, BandMask)
        assert torch.equal(same.dense(), expected)
    wider = found.to(torch.float32)
    assert isinstance(wider, BandMask)
    assert torch.equal(wider + 0.0, masking_utils.eager_mask(2, 6, 6, attention_mask=keep))
    assert found.to("meta").keys.device.type == "meta"
    assert repr(found) == "BandMask([2, 1, 6, 6], None ≤ j − i ≤ 0, padded=True)"


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "masked_fill_": lambda its, x: its.masked_fill_(x > 0, -2.5),
    "add_": lambda its, x: its.add_(x.clamp(max=0)),
    "all of it": lambda its, x: its.__setitem__(..., x),
    "a part": lambda its, x: its.__setitem__((slice(None), 0, 2), x[:, 0, 2]),
    "by indices": lambda its, x: its.__setitem__((..., [1, 3], [0, 2]), 0.5),
    "through a view": lambda its, x: its[:, :, 1:].transpose(2, 3).diagonal(dim1=2, dim2=3).fill_(-1.0),
    "through an alias": lambda its, x: its.detach().copy_(x),
    "out": lambda its, x: torch.mul(x, 2, out=its),
    "twice": lambda its, x: its.mul_(0).add_(x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_description_can_be_written_to(write: Callable[..., object], inference: bool) -> None:
    with torch.inference_mode(inference):
        keep = padding("right", 6).bool()
        q, k, v, x = (
            torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6))
        )
        found = mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        expected = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        assert isinstance(found, BandMask)
        before = copy.deepcopy(found)
        write(found, x)
        write(expected, x)
        assert torch.equal(found + 0, expected)
        for same in (found.clone(), found.to(torch.float64, copy=True), copy.deepcopy(found)):
            assert isinstance(same, BandMask)
            assert torch.equal(same.dense(), expected)
        assert repr(found) == "BandMask([2, 1, 6, 6], numbers)"
        o, _ = attend(Layer(is_causal=False), q, k, v, found)
        torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, expected), rtol=1e-12, atol=1e-12)
        untouched = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        assert not is_changed(before)
        assert torch.equal(before.dense(), untouched)


def test_what_was_written_to_a_description_has_gradients() -> None:
    q, k, v, x = (torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6)))
    x = x.mul(0).requires_grad_()  # no other values than those that stood there
    gradients = []
    for its in (mask(2, 6, 6, dtype=torch.float64), masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)):
        assert its is not None
        its[:, :, :, 0] = x[:, :, :, 0]
        o = attend(Layer(is_causal=False), q, k, v, its)[0]
        (first,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        gradients += [first, *torch.autograd.grad(first.square().sum(), x)]
    for ours, theirs in zip(gradients[:2], gradients[2:], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_descriptions_in_compiled_code(backend: str) -> None:
    """They may be looked at there, and written to before and between calls, but not within."""
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))

    def looks(q: Tensor, its: Tensor) -> Tensor:
        return attend(Layer(is_causal=False), q, k, v, its)[0] + 0 * its[:, 0].clamp(min=-1).sum()

    torch._dynamo.reset()
    compiled = torch.compile(looks, backend=backend, fullgraph=True)
    found = mask(2, 6, 6)
    assert found is not None
    for step in range(3):
        torch.testing.assert_close(compiled(q, found), looks(q, found))
        found[..., step] = -3.0
    torch.testing.assert_close(compiled(q, mask(2, 6, 6)), looks(q, mask(2, 6, 6)))

    def doubled(its: Tensor) -> None:
        its.mul_(2)

    def assigned(its: Tensor) -> None:
        its[..., 0] = -1.0

    for write in (doubled, assigned):
        with pytest.raises(Exception, match="a BandMask cannot be written to in compiled code"):
            torch.compile(write, backend=backend, fullgraph=True)(mask(2, 6, 6))


def test_a_description_that_was_made_in_inference_mode_or_before() -> None:
    """Reading it there leaves no inference tensor behind."""
    found = mask(2, 6, 6)
    assert isinstance(found, BandMask)
    with torch.inference_mode():
        assert found[0, 0].shape == (6, 6)
    found[0, 0, 5] = -1.0
    assert found[0, 0, 5].eq(-1).all()


def test_forward_mode_of_what_was_written_to_a_description() -> None:
    q, k, v, x = (torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6)))
    tangents = []
    for its in (mask(2, 6, 6, dtype=torch.float64), masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)):
        assert its is not None
        with forward_ad.dual_level():
            # no other values than those that stood there
            its[:, :, :, 0] = forward_ad.make_dual(torch.zeros(2, 1, 6, dtype=torch.float64), x[..., 0])
            tangents.append(forward_ad.unpack_dual(attend(Layer(is_causal=False), q, k, v, its)[0]).tangent)
    with forward_ad.dual_level():  # the same of a mask that is dual itself, and of its copies
        direction = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
        direction[..., 0] = x[..., 0]
        for looked_at in (False, True):
            found = mask(2, 6, 6, dtype=torch.float64)
            assert isinstance(found, BandMask)
            if looked_at:
                assert found[0, 0, 0, 0] == 0
            its = forward_ad.make_dual(found, direction)
            for same in (its, its.clone(), its.to(torch.float64, copy=True)):
                o = attend(Layer(is_causal=False), q, k, v, same)[0]
                tangents.append(forward_ad.unpack_dual(o).tangent)
    assert tangents[1].abs().max() > 0
    for tangent in tangents:
        torch.testing.assert_close(tangent, tangents[1], rtol=1e-12, atol=1e-12)


def test_a_description_is_none_of_the_callers_tensors() -> None:
    keep = padding("right", 6).bool()
    found = mask(2, 6, 6, attention_mask=keep)
    assert found is not None
    before = found + 0
    keep[:] = True
    assert torch.equal(found + 0, before)


def test_a_description_that_was_looked_at_is_still_one() -> None:
    found = mask(2, 6, 6)
    assert isinstance(found, BandMask)
    assert found[0, 0].shape == (6, 6)
    assert not is_changed(found)
    assert repr(found) == "BandMask([2, 1, 6, 6], None ≤ j − i ≤ 0, padded=False)"
    with pytest.raises(RuntimeError, match="cannot change its shape in place"):
        found.squeeze_(1)


def test_keys_of_an_indexer() -> None:
    q, k, v = (torch.randn(2, h, 6, 4, dtype=torch.float64) for h in (4, 2, 2))
    indices = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(6)]) for _ in range(2)])
    chosen = torch.zeros(2, 1, 6, 6, dtype=torch.bool).scatter(-1, indices[:, None], True)
    numbers = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(
        ~chosen, torch.finfo(torch.float64).min
    )
    causal = masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)
    full = torch.zeros(1, dtype=torch.float64)
    cases = ((None, full), (mask(2, 6, 6), causal), (causal == 0, causal), (causal, causal))
    for its, meant in cases:
        o, _ = attend(Layer(is_causal=False), q, k, v, its, indices=indices)
        dead = ((numbers == 0) & (meant == 0)).any(-1)[..., None].logical_not()
        expected = textbook(q, k, v, numbers + meant).masked_fill(dead, 0.0)
        torch.testing.assert_close(o.transpose(1, 2).masked_fill(dead, 0.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [(4,), (2, 4, 5, 1)], ids=["of heads", "of queries"])
def test_two_orders_in_everything(sinks: tuple[int, ...]) -> None:
    q, k, v = (
        torch.randn(2, h, 5, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 3), (2, 3), (2, 2))
    )
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(sinks, dtype=torch.float64, requires_grad=True)
    found = mask(2, 5, 5, attention_mask=padding("left", 5), dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        layer = Layer(is_causal=True)
        return attend(layer, q, k, v, found, scaling=0.7, softcap=2.0, sinks=sink, position_bias=bias)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sink))
    assert torch.autograd.gradgradcheck(run, (q, k, v, bias, sink))
