"""Other libraries' second derivatives, checkpoints, autocast, Lightning: with metattn's attention inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import metattn
from metattn.backends import available_backends
from metattn.meta import SGD, AttentionMetaLearner, adapt, maml_loss

TASKS, STEPS, LR = 3, 2, 0.1


def transformer(dtype: torch.dtype = torch.float64, *, ours: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=dtype)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(3, 8, dtype=dtype), encoder, nn.Linear(8, 2, dtype=dtype))
    if ours:
        assert metattn.replace_attention(model) == 1
    return model


def tasks(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, ...]]:
    """Support inputs and targets, query inputs and targets of each."""
    generator = torch.Generator().manual_seed(1)
    drawn = (
        torch.randn(TASKS, 2, 5, size, generator=generator, dtype=torch.float64) for size in (3, 2, 3, 2)
    )
    return list(zip(*(x.to(dtype) for x in drawn), strict=True))


def unrolled(model: nn.Module) -> list[Tensor]:
    """MAML's meta-gradient by autograd alone, through torch's formula for attention."""
    plain = transformer(ours=False)
    plain.load_state_dict(model.state_dict())
    own = dict(plain.named_parameters())
    losses = []
    with sdpa_kernel(SDPBackend.MATH):
        for x, y, query_x, query_y in tasks():
            params = dict(own)
            for _ in range(STEPS):
                loss = mse_loss(functional_call(plain, params, (x,)), y)
                gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {name: p - LR * g for (name, p), g in zip(params.items(), gradients, strict=True)}
            losses.append(mse_loss(functional_call(plain, params, (query_x,)), query_y))
        return list(torch.autograd.grad(torch.stack(losses).mean(), list(own.values())))


def agree(found: Any, expected: list[Tensor]) -> None:
    found = [x.detach() for x in found]
    assert len(found) == len(expected)
    error = torch.cat([(x - y).flatten() for x, y in zip(found, expected, strict=True)])
    assert error.norm() < 1e-9 * torch.cat([y.flatten() for y in expected]).norm()


class TestMeta:
    def test_metattn(self) -> None:
        model = transformer()
        stacked = [torch.stack(x) for x in zip(*tasks(), strict=True)]
        params = dict(model.named_parameters())
        loss = maml_loss(
            model,
            params,
            mse_loss,
            tuple(stacked[:2]),
            tuple(stacked[2:]),
            optimizer=SGD(LR),
            steps=STEPS,
        )
        agree(torch.autograd.grad(loss, list(params.values())), unrolled(model))

    def test_torch_func(self) -> None:
        """Task by task: under vmap the higher derivatives of torch's LayerNorm are wrong."""
        model = transformer()

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return mse_loss(functional_call(model, params, (x,)), y)

        def of_task(params: dict[str, Tensor], x: Tensor, y: Tensor, *query: Tensor) -> Tensor:
            for _ in range(STEPS):
                gradients = torch.func.grad(loss)(params, x, y)
                params = {name: p - LR * gradients[name] for name, p in params.items()}
            return loss(params, *query)

        def meta_loss(params: dict[str, Tensor]) -> Tensor:
            return torch.stack([of_task(params, *task) for task in tasks()]).mean()

        params = {name: p.detach() for name, p in model.named_parameters()}
        agree(torch.func.grad(meta_loss)(params).values(), unrolled(model))

    def test_torchopt_by_reference(self) -> None:
        torchopt = pytest.importorskip("torchopt")
        model = transformer()
        params, expected = list(model.parameters()), unrolled(model)
        inner = torchopt.MetaSGD(model, lr=LR)
        start, inner_start = (torchopt.extract_state_dict(x, by="reference") for x in (model, inner))
        for x, y, query_x, query_y in tasks():
            for _ in range(STEPS):
                inner.step(mse_loss(model(x), y))
            (mse_loss(model(query_x), query_y) / TASKS).backward()
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(inner, inner_start)
        agree([p.grad for p in params], expected)

    def test_torchopt_functional(self) -> None:
        torchopt = pytest.importorskip("torchopt")
        model = transformer()
        own, losses = dict(model.named_parameters()), []
        optimizer = torchopt.sgd(lr=LR)
        for x, y, query_x, query_y in tasks():
            params, state = dict(own), optimizer.init(own)
            for _ in range(STEPS):
                loss = mse_loss(functional_call(model, params, (x,)), y)
                found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                updates, state = optimizer.update(dict(zip(params, found, strict=True)), state, inplace=False)
                params = torchopt.apply_updates(params, updates, inplace=False)
            losses.append(mse_loss(functional_call(model, params, (query_x,)), query_y))
        found = torch.autograd.grad(torch.stack(losses).mean(), list(own.values()))
        agree(found, unrolled(model))

    def test_higher(self) -> None:
        higher = pytest.importorskip("higher")
        model = transformer()
        inner = torch.optim.SGD(model.parameters(), lr=LR)
        for x, y, query_x, query_y in tasks():
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (copy_, steps):
                for _ in range(STEPS):
                    steps.step(mse_loss(copy_(x), y))
                (mse_loss(copy_(query_x), query_y) / TASKS).backward()
        agree([p.grad for p in model.parameters()], unrolled(model))

    def test_learn2learn(self) -> None:
        l2l = pytest.importorskip("learn2learn")
        model = transformer()
        maml = l2l.algorithms.MAML(model, lr=LR, first_order=False)
        for x, y, query_x, query_y in tasks():
            learner = maml.clone()
            for _ in range(STEPS):
                learner.adapt(mse_loss(learner(x), y))
            (mse_loss(learner(query_x), query_y) / TASKS).backward()
        agree([p.grad for p in model.parameters()], unrolled(model))


class Learner:
    """learn2learn's algorithm in plain torch: a clone whose parameters are functions of the model's.

    https://github.com/learnables/learn2learn/issues/429 is it on a transformer, in torch's fused kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)
        self.put(dict(model.named_parameters()))

    def put(self, params: dict[str, Tensor]) -> None:
        """Plain tensors where a module has its parameters."""
        self.params = {name: p.clone() for name, p in params.items()}
        for name, value in self.params.items():
            path, _, own = name.rpartition(".")
            owner = self.module.get_submodule(path)
            owner._parameters[own] = value  # type: ignore[assignment]

    def adapt(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.params.values()), create_graph=True)
        self.put({name: p - LR * g for (name, p), g in zip(self.params.items(), gradients, strict=True)})

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def learn2learn_step(model: nn.Module) -> list[Tensor]:
    for x, y, query_x, query_y in tasks():
        learner = Learner(model)
        for _ in range(STEPS):
            learner.adapt(mse_loss(learner(x), y))
        (mse_loss(learner(query_x), query_y) / TASKS).backward()
    return [p.grad for p in model.parameters()]


class TestIssue429:
    def test_raises_in_torchs_fused_kernel(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"derivative for aten::_scaled_dot_product_\w+_backward is not"
        ):
            learn2learn_step(transformer(ours=False))

    def test_works_with_replaced_attention(self) -> None:
        model = transformer()
        agree(learn2learn_step(model), unrolled(model))

    def test_works_under_the_override(self) -> None:
        model = transformer(ours=False)
        with metattn.sdpa_override() as override:
            found = learn2learn_step(model)
        assert override.calls == TASKS * (STEPS + 1)
        agree(found, unrolled(model))


def orders(function: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both orders in a function's first leaf and the others, by autograd.grad."""
    first = torch.autograd.grad(function(leaves[0]).sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [g.detach() for g in first], list(second)


class TestCheckpoint:
    def leaves(self) -> tuple[nn.Module, list[Tensor]]:
        model = transformer()
        x = torch.stack([task[0] for task in tasks()]).flatten(0, 1).requires_grad_()
        return model, [x, *model.parameters()]

    def test_non_reentrant_both_orders(self) -> None:
        model, leaves = self.leaves()
        found = orders(lambda x: checkpoint(model, x, use_reentrant=False), leaves)
        for ours, expected in zip(found, orders(model, leaves), strict=True):
            agree(ours, expected)

    def test_reentrant_first_order(self) -> None:
        model, leaves = self.leaves()
        checkpoint(model, leaves[0], use_reentrant=True).sin().sum().backward()
        agree([x.grad for x in leaves], orders(model, leaves)[0])

    def test_reentrant_has_no_second_order(self) -> None:
        """Its backward runs without a graph: autograd.grad is refused, and .grad has none."""
        model, leaves = self.leaves()
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            orders(lambda x: checkpoint(model, x, use_reentrant=True), leaves)
        loss = checkpoint(model, leaves[0], use_reentrant=True).sin().sum()
        with pytest.warns(UserWarning, match="create_graph=True"):
            loss.backward(create_graph=True)
        assert not any(x.grad.requires_grad for x in leaves)

    @pytest.mark.skipif(available_backends()["cpu"] is not None, reason="of the compiled operators")
    def test_selective(self) -> None:
        """What the forward operator gave is kept, the rest computed again; torch allows one backward."""
        model, leaves = self.leaves()
        called: list[bool] = []

        def policy(context: Any, operator: Any, *_: Any, **__: Any) -> Any:
            kept = operator is torch.ops.metattn.forward.default
            if kept:
                called.append(context.is_recompute)
            return torch.utils.checkpoint.CheckpointPolicy(
                torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
                if kept
                else torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
            )

        def selective(x: Tensor) -> Tensor:
            contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
            return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

        found = torch.autograd.grad(selective(leaves[0]).sin().sum(), leaves)
        agree(found, orders(model, leaves)[0])
        assert called[0] is False
        with pytest.raises(RuntimeError, match="backward an extra time"):
            orders(selective, leaves)


class TestAutocast:
    def test_both_orders(self) -> None:
        """As good as torch's own modules under the same autocast."""
        found, leaves = {}, {}
        for ours in (True, False):
            model = transformer(torch.float32, ours=ours)
            x = torch.stack([task[0] for task in tasks(torch.float32)]).flatten(0, 1).requires_grad_()
            leaves[ours] = [x, *model.parameters()]

            def cast(x: Tensor, model: nn.Module = model) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return model(x).float()

            with sdpa_kernel(SDPBackend.MATH):
                found[ours] = orders(cast, leaves[ours])
        exact = transformer().double()
        truth = orders(exact, [leaves[True][0].detach().double().requires_grad_(), *exact.parameters()])
        for order in (0, 1):
            for x, baseline, expected in zip(
                found[True][order], found[False][order], truth[order], strict=True
            ):
                assert x.dtype == torch.float32
                if expected.norm() > 1e-9:
                    error, allowed = (relative_error(t, expected)[0] for t in (x, baseline))
                    assert error <= max(1.5 * allowed, 4e-3)


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


def sines(count: int, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], ...]:
    amplitude, phase = 0.5 + 2 * torch.rand(count, 1, 1, 1), 3 * torch.rand(count, 1, 1, 1)
    x = 6 * torch.rand(2, count, 1, 10, 1) - 3
    x, y = x.to(dtype), (amplitude * torch.sin(x + phase)).to(dtype)
    return (x[0], y[0]), (x[1], y[1])


def meta_module(pl: Any, *, automatic: bool, dtype: torch.dtype = torch.float64) -> Any:
    class Meta(pl.LightningModule):
        """MAML: with a backward of our own, or Lightning's."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            torch.manual_seed(0)
            self.model = AttentionMetaLearner(1, 8, 1, num_heads=2, dtype=dtype)
            self.seen: list[Tensor] = []
            self.validated: list[float] = []

        def loss(self, batch: Any) -> Tensor:
            support, query = map(tuple, batch)  # a DataLoader makes lists of tuples
            params = dict(self.model.named_parameters())
            return maml_loss(self.model, params, mse_loss, support, query, optimizer=SGD(LR), steps=1)

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            loss = self.loss(batch)
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            return None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen = [p.grad.clone() for p in self.model.parameters()]

        def validation_step(self, batch: Any, index: int) -> None:
            self.validated.append(float(self.loss(batch)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Meta()


def trainer(pl: Any, **options: Any) -> Any:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet, **options)


def loader(*batches: Any) -> Any:
    return torch.utils.data.DataLoader(list(batches), batch_size=None)


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    @pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
    def test_maml(self, lightning: Any, automatic: bool) -> None:
        """One clipped step of gradient descent, as by hand."""
        batch = sines(4)
        module = meta_module(lightning, automatic=automatic)
        own = list(copy.deepcopy(module.model).parameters())
        gradients = torch.autograd.grad(module.loss(batch), list(module.model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 1
        clip = {"gradient_clip_val": 1.0} if automatic else {}
        trainer(lightning, limit_val_batches=0, **clip).fit(module, loader(batch))
        expected = [p.detach() - 0.01 * g / (norm + 1e-6) for p, g in zip(own, gradients, strict=True)]
        agree(module.model.parameters(), expected)

    @pytest.mark.parametrize("inference_mode", [True, False])
    def test_validation_adapts(self, lightning: Any, inference_mode: bool) -> None:
        """metattn.meta's inner steps need no graph; torch.autograd.grad has none to go through there."""
        batch = sines(4)
        module = meta_module(lightning, automatic=True)
        expected = float(module.loss(batch))
        trainer(lightning, inference_mode=inference_mode).validate(module, loader(batch), verbose=False)
        assert module.validated == [pytest.approx(expected, rel=1e-12)]

        def by_autograd(batch: Any) -> Tensor:
            (x, y), _ = map(tuple, batch)
            with torch.set_grad_enabled(True):
                loss = mse_loss(module.model(x.flatten(0, 1)), y.flatten(0, 1))
                return torch.autograd.grad(loss, list(module.model.parameters()))[0].sum()

        module.loss = by_autograd
        run = trainer(lightning, inference_mode=inference_mode)
        if inference_mode:
            with pytest.raises(RuntimeError, match="does not require grad"):
                run.validate(module, loader(batch), verbose=False)
        else:
            run.validate(module, loader(batch), verbose=False)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_precision(self, lightning: Any, precision: str) -> None:
        batch = sines(4, torch.float32)
        module = meta_module(lightning, automatic=True, dtype=torch.float32)
        exact = copy.deepcopy(module.model).double()
        doubled = [tuple(x.double() for x in pair) for pair in batch]
        truth = torch.autograd.grad(
            maml_loss(exact, dict(exact.named_parameters()), mse_loss, *doubled, optimizer=SGD(LR), steps=1),
            list(exact.parameters()),
        )
        trainer(lightning, limit_val_batches=0, precision=precision).fit(module, loader(batch))
        error = torch.cat([(g - t).flatten() for g, t in zip(module.seen, truth, strict=True)]).norm()
        bound = 1e-6 if precision == "64-true" else 0.1  # a whole model's, in eight bits
        assert error < bound * torch.cat([t.flatten() for t in truth]).norm()

    def test_gradient_penalty(self, lightning: Any) -> None:
        class Critic(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = transformer()
                self.seen: list[Tensor] = []

            def training_step(self, batch: Any, index: int) -> Tensor:
                return penalty(self.model, batch)

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                self.seen = [p.grad.clone() for p in self.model.parameters()]

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        def penalty(model: nn.Module, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            outputs = model(x)
            (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            return slope.square().mean() + outputs.square().mean()

        x = tasks()[0][0]
        critic = Critic()
        expected = torch.autograd.grad(penalty(critic.model, x), list(critic.model.parameters()))
        trainer(lightning, limit_val_batches=0).fit(critic, loader(x))
        agree(critic.seen, list(expected))


def test_adapt_in_inference_mode() -> None:
    """The steps of torch.func.grad are taken there as anywhere."""
    model, (x, y, *_) = transformer(), tasks()[0]
    params = dict(model.named_parameters())
    expected = adapt(model, params, mse_loss, (x, y), optimizer=SGD(LR), steps=STEPS)
    with torch.inference_mode():
        found = adapt(model, params, mse_loss, (x, y), optimizer=SGD(LR), steps=STEPS)
    agree(found.values(), [x.detach() for x in expected.values()])
