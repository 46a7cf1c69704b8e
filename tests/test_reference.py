"""The reference backend against textbook attention and autograd in float64; what its docstring promises."""

from __future__ import annotations

import pytest
import torch
from four_maps import MAP_OPTIONS, OF_QKV
from helpers import OPTIONS, Call, Shape, both_orders, finite, largest_difference, make_call, pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import metattn
from metattn.backends import reference
from metattn.higher_order import HigherOrderWarning
from metattn.problem import Options, Primals, Results

ALL = (True,) * len(Primals._fields)


def like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_no_option_is_left_out_of_the_tables() -> None:
    """What most tests of every backend are made from."""
    assert {name for option in OPTIONS.values() for name in option(Shape(), torch.randn)} == {
        *Options._fields
    }
    of_maps = {name for options in MAP_OPTIONS.values() for name in options}
    every_call_has = {"scale", "dropout_seed"}
    assert of_maps - {"slopes"} | {"alibi_slopes"} == {*Options._fields} - every_call_has


class TestAgainstMaths:
    @pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + list(pairs()), ids="+".join)
    def test_both_orders(self, names: tuple[str, ...]) -> None:
        call = make_call(names)
        ours = both_orders(call.function("reference"), call.inputs)
        truth = both_orders(call.math, call.inputs)
        assert largest_difference(ours.values(), truth.values()) < 1e-11

    @pytest.mark.parametrize("name", [name for name in OPTIONS if name != "packed"])
    def test_each_map(self, name: str) -> None:
        """forward, vjp, jvp and vjp_jvp as functions of their own, against torch.func on the maths."""
        call = make_call((name,))
        problem, primals, constants = call.canonical()
        names, x = tuple(call.inputs), call.tensors
        generator = torch.Generator().manual_seed(3)

        def maths(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            o, lse = call.math(*tensors)
            return o, finite(lse)

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(maths, *tensors)[1](cotangents)

        def to_primals(tensors: tuple[Tensor, ...]) -> Primals:
            by_name = dict(zip(names, tensors, strict=True))
            if "alibi_slopes" in by_name:
                by_name["slopes"] = by_name.pop("alibi_slopes")
            for each in ("sinks", "slopes"):
                if each in by_name and by_name[each].ndim == 1:
                    by_name[each] = by_name[each][None]
            return Primals(*(by_name.get(field) for field in Primals._fields))

        moves = tuple(like(t, generator) for t in x)
        o, lse = reference.forward(problem, primals, constants)[:2]
        cotangents = like(o, generator), like(lse[..., 1], generator)
        expected = maths(*x)
        assert largest_difference((o, finite(lse.sum(-1))), expected) < 1e-12
        ot, lt = reference.jvp(problem, primals, constants, Results(o, lse), to_primals(moves))[:2]
        assert largest_difference((ot, lt), torch.func.jvp(maths, x, moves)[1]) < 1e-12
        needs = tuple(t is not None for t in primals)
        arguments = (problem, primals, constants, Results(o, lse), *cotangents)
        first = reference.vjp(*arguments, needs)
        assert largest_difference(first, to_primals(gradients(*x))) < 1e-12
        second = reference.vjp_jvp(*arguments, to_primals(moves), Results(ot, lt), needs)
        assert largest_difference(second, to_primals(torch.func.jvp(gradients, x, moves)[1])) < 1e-12

    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_third_order(self, name: str) -> None:
        """Plain autograd through the reference's own forward: every map of it is an ordinary function."""
        call = make_call((name,), Shape(batch=1, n=3, m=2, d=2, dv=1, lengths=((2, 2), (1, 0))))

        def third(function: object) -> tuple[Tensor, ...]:
            x = [t.clone().requires_grad_() for t in call.tensors]
            o, lse = function(*x)
            value = (o.sin()).sum() + finite(lse).square().sum()
            for power in (2, 3):
                first = torch.autograd.grad(value, x, create_graph=True)
                value = sum((g**power).sum() for g in first)
            return torch.autograd.grad(value, x)

        with pytest.warns(HigherOrderWarning):
            ours = third(call.function("reference"))
        expected = third(call.math)
        assert largest_difference(ours, expected) < 1e-13 * max(float(x.abs().max()) for x in expected)


class TestAbsentTerms:
    """None for a cotangent or a tangent is zero; what is not needed is None."""

    @pytest.mark.parametrize("absent", [(True, False), (False, True)], ids=["no do", "no dlse"])
    def test_cotangents(self, absent: tuple[bool, bool]) -> None:
        problem, primals, constants = make_call(("bias", "sinks", "softcap")).canonical()
        o, lse = reference.forward(problem, primals, constants)[:2]
        ones = torch.ones_like(o), torch.ones_like(lse[..., 1])
        given = [None if missing else x for missing, x in zip(absent, ones, strict=True)]
        zeros = [torch.zeros_like(x) if missing else x for missing, x in zip(absent, ones, strict=True)]
        arguments = (problem, primals, constants, Results(o, lse))
        ours, expected = (reference.vjp(*arguments, *x, ALL) for x in (given, zeros))
        assert largest_difference(ours, expected) == 0
        ot, lt = reference.jvp(*arguments, primals)[:2]
        ours, expected = (
            reference.vjp_jvp(*arguments, *x, primals, Results(ot, lt), ALL) for x in (given, zeros)
        )
        assert largest_difference(ours, expected) == 0

    @pytest.mark.parametrize("field", Primals._fields)
    def test_tangents(self, field: str) -> None:
        problem, primals, constants = make_call(("bias", "sinks", "softcap", "alibi")).canonical()
        alone = Primals(None, None, None, None, None, None)._replace(**{field: getattr(primals, field)})
        filled = Primals(*(torch.zeros_like(x) for x in primals))._replace(**{field: getattr(primals, field)})
        arguments = (problem, primals, constants, reference.forward(problem, primals, constants))
        tangents = reference.jvp(*arguments, alone)
        assert largest_difference(tangents[:2], reference.jvp(*arguments, filled)[:2]) < 1e-15
        cotangents = torch.ones_like(tangents.o), torch.ones_like(tangents.lse)
        ours, expected = (
            reference.vjp_jvp(*arguments, *cotangents, x, tangents, ALL) for x in (alone, filled)
        )
        assert largest_difference(ours, expected) < 1e-14

    def test_what_is_not_needed(self) -> None:
        problem, primals, constants = make_call(("bias", "sinks", "alibi")).canonical()
        o, lse = reference.forward(problem, primals, constants)[:2]
        for wanted in range(len(primals)):
            needs = tuple(i == wanted for i in range(len(primals)))
            given = (problem, primals, constants, Results(o, lse), o, lse[..., 1])
            first = reference.vjp(*given, needs)
            second = reference.vjp_jvp(*given, primals, Results(o, lse[..., 1]), needs)
            assert tuple(x is not None for x in first) == tuple(x is not None for x in second) == needs


class TestMaskedAway:
    """NaN and infinity under a mask, and rows that attend to nothing, to the third order."""

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("options", [(), ("softcap",), ("sinks",), ("dropout",), ("bias",)], ids="+".join)
    def test_nothing_leaks(self, value: float, options: tuple[str, ...]) -> None:
        """A key that is masked for every query, and a query that attends to nothing, hold NaN."""
        call = make_call(options)
        mask = torch.ones(2, 1, 5, 4, dtype=torch.bool)
        mask[0, :, :, 2] = mask[1, :, 3] = False
        call.constants["mask"] = mask
        clean = both_orders(call.function("reference"), call.inputs)
        dirty_call = make_call(options)
        dirty_call.constants["mask"] = mask
        dirty_call.inputs["k"][0, :, 2] = dirty_call.inputs["v"][0, :, 2] = dirty_call.inputs["q"][
            1, :, 3
        ] = value
        dirty = both_orders(dirty_call.function("reference"), dirty_call.inputs)
        assert largest_difference(dirty.values(), clean.values()) == 0

    def test_cotangents_of_dead_rows_do_not_matter(self) -> None:
        problem, primals, constants = make_call(("mask",)).canonical()
        o, lse = reference.forward(problem, primals, constants)[:2]
        dead = lse[..., 1] == -torch.inf
        assert dead.any()
        do, dlse = torch.ones_like(o), torch.ones_like(lse[..., 1])
        clean = reference.vjp(problem, primals, constants, Results(o, lse), do, dlse, OF_QKV)
        do[dead], dlse[dead] = torch.nan, torch.inf
        dirty = reference.vjp(problem, primals, constants, Results(o, lse), do, dlse, OF_QKV)
        assert largest_difference(dirty, clean) == 0

    def test_every_row_dead(self) -> None:
        call = make_call(("bias",))
        call.inputs["bias"].fill_(-torch.inf)
        results = both_orders(call.function("reference"), call.inputs)
        assert all((x == 0).all() for x in results.values())
        assert (call.function("reference")(*call.tensors)[1] == -torch.inf).all()

    def test_float16_beyond_its_range(self) -> None:
        q = torch.full((1, 1, 3, 4), 256.0, dtype=torch.float16)
        o = metattn.attention(q, q, q, backend="reference")
        assert torch.equal(o, q)


class TestDropout:
    def test_known_answers(self) -> None:
        """The vectors of Random123's kat_vectors for philox4x32-10."""
        ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
        for words, expected in (
            ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((ones,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        ):
            tensors = [torch.tensor([word]) for word in words]
            assert tuple(int(word) for word in reference.philox(tensors[:4], tensors[4:])) == expected

    def test_mask_is_the_counters(self) -> None:
        """Entry (batch, head, query, key) is word key % 4 of counter (key // 4, query, head, batch index)."""
        seed, p = -(2**61) + 12345, 0.4
        rng = torch.tensor([[seed, 7], [seed, 2**32 - 1]])
        keep = reference.dropout_keep(rng, p, 3, 2, 6)
        assert keep.shape == (2, 3, 2, 6)
        for b, h, i, j in torch.cartesian_prod(*map(torch.arange, keep.shape)).tolist():
            words = _philox_in_python(
                (j // 4, i, h, (7, 2**32 - 1)[b]), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
            )
            assert keep[b, h, i, j] == (words[j % 4] >= round(p * 2**32))

    @pytest.mark.parametrize("p", [1.0, 1 - 2**-33])
    def test_all_dropped(self, p: float) -> None:
        """Where p·2³² rounds to 2³² every word is below the threshold; p = 1 has no factor 1/(1 − p)."""
        call = make_call()
        call.constants |= {"dropout_p": p, "dropout_seed": 1}
        results = both_orders(call.function("reference"), call.inputs)
        assert (results["o"] == 0).all()
        assert all(x.isfinite().all() for x in results.values())


def _philox_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c, k, word = list(counter), list(key), 2**32
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(y // word) ^ c[1] ^ k[0], y % word, (x // word) ^ c[3] ^ k[1], x % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return tuple(c)


class TestShapesAndTypes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        """Results in the inputs' dtypes, statistics in float64, whatever the bias's dtype."""
        problem, primals, constants = make_call(("bias", "sinks", "alibi"), dtype=dtype).canonical()
        primals = primals._replace(bias=primals.bias.to(torch.bfloat16))
        o, lse = reference.forward(problem, primals, constants)[:2]
        ot, lt = reference.jvp(problem, primals, constants, Results(o, lse), primals)[:2]
        given = (problem, primals, constants, Results(o, lse), o, lse[..., 1])
        first = reference.vjp(*given, ALL)
        second = reference.vjp_jvp(*given, primals, Results(ot, lt), ALL)
        assert (o.dtype, ot.dtype, lse.dtype, lt.dtype) == (dtype, dtype, torch.float64, torch.float64)
        for gradients in (first, second):
            for gradient, primal in zip(gradients, primals, strict=True):
                assert gradient is not None
                assert primal is not None
                assert (gradient.shape, gradient.dtype) == (primal.shape, primal.dtype)

    @pytest.mark.parametrize("name", list(OPTIONS))
    @pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
    def test_without_data(self, name: str, fake: bool) -> None:
        """The meta device and FakeTensorMode give the shapes and dtypes of both orders."""
        call = make_call((name,), dtype=torch.bfloat16)
        expected = both_orders(call.function("reference"), call.inputs)
        if fake:
            mode = FakeTensorMode()
            inputs = {key: mode.from_tensor(x) for key, x in call.inputs.items()}
            call.constants = {
                key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in call.constants.items()
            }
            with mode:
                results = _shapes_of_both_orders(call, inputs)
        else:
            inputs = {key: x.to("meta") for key, x in call.inputs.items()}
            call.constants = {
                key: x.to("meta") if isinstance(x, Tensor) else x for key, x in call.constants.items()
            }
            results = _shapes_of_both_orders(call, inputs)
        assert results == [(x.shape, x.dtype) for key, x in expected.items() if key not in ("d2do", "d2dlse")]

    @pytest.mark.parametrize("empty", ["batch", "n", "m", "d", "dv", "n m"])
    @pytest.mark.parametrize(
        "names", [("plain",), ("bias", "causal", "sinks", "dropout", "grouped")], ids="+".join
    )
    def test_empty_dimensions(self, empty: str, names: tuple[str, ...]) -> None:
        call = make_call(names, Shape(**dict.fromkeys(empty.split(), 0)))
        if empty == "d":
            call.constants["scale"] = 1.0
        results = both_orders(call.function("reference"), call.inputs)
        for name, x in call.inputs.items():
            assert results[f"d{name}"].shape == results[f"d2{name}"].shape == x.shape
        assert all(x.isfinite().all() for x in results.values())
        if empty == "m" and names == ("plain",):
            o, lse = call.function("reference")(*call.tensors)
            assert (o == 0).all()
            assert (lse == -torch.inf).all()

    def test_packed_without_tokens(self) -> None:
        for lengths in (((0, 0),), ((0, 0), (0, 0)), ((0, 3),), ((2, 0),)):
            call = make_call(("packed",), Shape(lengths=lengths))
            results = both_orders(call.function("reference"), call.inputs)
            assert all((x == 0).all() for name, x in results.items() if name not in ("dv", "d2v"))

    def test_autocast_does_not_touch_it(self) -> None:
        call = make_call(("bias",), dtype=torch.float32)
        problem, primals, constants = call.canonical()
        o, lse = reference.forward(problem, primals, constants)[:2]
        given = (problem, primals, constants, Results(o, lse), o, lse[..., 1])
        plain = reference.vjp(*given, ALL)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reference.forward(problem, primals, constants)[0], o)
            inside = reference.vjp(*given, ALL)
        assert largest_difference(inside, plain) == 0

    def test_large_scores_keep_their_probabilities(self) -> None:
        """Around finfo.min and at 5e5 a float32 log-sum-exp would lose the probabilities."""
        for offset in (torch.finfo(torch.float32).min, 5e5):
            call = make_call(("bias",), dtype=torch.float32)
            call.inputs["bias"].fill_(offset)
            o = call.function("reference")(*call.tensors)[0]
            o64 = call.to(torch.float64).math(*call.to(torch.float64).tensors)[0]
            flat = call.inputs["v"].double().mean(2, keepdim=True).expand_as(o)
            expected = flat if offset < 0 else o64
            assert (o - expected).abs().max() < 0.1


def _shapes_of_both_orders(call: Call, inputs: dict[str, Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    x = [t.requires_grad_() for t in inputs.values()]
    o, lse = call.function("reference")(*x)
    first = torch.autograd.grad((o, lse), x, (torch.ones_like(o), torch.ones_like(lse)), create_graph=True)
    second = torch.autograd.grad(first, x, [torch.ones_like(g) for g in first])
    return [(t.shape, t.dtype) for t in (o, lse, *first, *second)]
