"""The learner: sets, contexts and targets, and MAML of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from meta_learners import POINTS, TASKS, learner, meta_gradient
from torch import Tensor
from torch.nn.functional import mse_loss

from metattn.meta import SGD, AttentionMetaLearner, maml_loss


def test_shapes_and_order_of_points() -> None:
    x = torch.randn(4, POINTS, 2, dtype=torch.float64)
    order = torch.randperm(POINTS)
    model = learner()
    assert model(x).shape == (4, POINTS, 3)
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order])
    pooled = learner("attention")
    assert pooled(x).shape == (4, 3)
    torch.testing.assert_close(pooled(x[:, order]), pooled(x))


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_points_attend_to_each_other(pooling: str | None) -> None:
    model = learner(pooling)
    x = torch.randn(1, POINTS, 2, dtype=torch.float64, requires_grad=True)
    output = model(x)[..., 0].flatten()[0]
    (gradient,) = torch.autograd.grad(output, x)
    assert (gradient.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_sets_of_several_sizes(pooling: str | None) -> None:
    model = learner(pooling)
    x = torch.randn(2, POINTS, 2, dtype=torch.float64)
    mask = torch.arange(POINTS) < torch.tensor([[POINTS], [4]])
    x[1, 4:] = torch.nan  # what stands in the padding is of no consequence
    output = model(x, mask)
    gradients = torch.autograd.grad(output[:, :4].sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(output[:1], model(x[:1]))
    shorter = model(x[1:, :4])
    torch.testing.assert_close(output[1:] if pooling else output[1:, :4], shorter)


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_twice_differentiable(pooling: str | None) -> None:
    torch.manual_seed(0)
    model = AttentionMetaLearner(1, 4, 1, num_heads=2, pooling=pooling, dtype=torch.float64)
    x = torch.randn(1, 3, 1, dtype=torch.float64, requires_grad=True)
    names = ("in_proj_weight", "score.weight")
    weights = tuple(p for name, p in model.named_parameters() if name.endswith(names))
    run: Callable[..., Tensor] = lambda x, *_: model(x)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_matrix_is_refused_with_the_reason(pooling: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"got a 2-D tensor \[5, 2\].*every weight would be 1.*x\.unsqueeze\(0\)"
    ):
        learner(pooling)(torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pooling": "mean"}, "pooling: expected None or \"attention\", got 'mean'"),
        ({"head": "ranking"}, 'head: expected "regression" or "classification", got \'ranking\''),
        ({"layers": 0}, "layers: expected an integer of 1 or more, got 0"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AttentionMetaLearner(2, 8, 3, **options)


def with_context(
    pooling: str | None = None, layers: int = 2, head: str = "regression"
) -> AttentionMetaLearner:
    torch.manual_seed(0)
    return AttentionMetaLearner(
        2, 8, 3, 2, context_size=4, layers=layers, pooling=pooling, head=head, dtype=torch.float64
    )


def test_targets_see_the_context_and_not_each_other() -> None:
    model = with_context()
    x, context = (
        torch.randn(2, n, size, dtype=torch.float64, requires_grad=True) for n, size in ((3, 2), (5, 4))
    )
    output = model(x, context=context)
    assert output.shape == (2, 3, 3)
    of_x, of_context = torch.autograd.grad(output[0, 1].sum(), (x, context))
    assert (of_x.norm(dim=-1) > 0).tolist() == [[False, True, False], [False, False, False]]
    assert (of_context.norm(dim=-1) > 0).tolist() == [5 * [True], 5 * [False]]
    order = torch.randperm(5)
    torch.testing.assert_close(model(x, context=context[:, order]), output)
    torch.testing.assert_close(model(x[:, [2, 0, 1]], context=context), output[:, [2, 0, 1]])


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_contexts_of_several_sizes(pooling: str | None) -> None:
    """Padding is of no consequence, and an empty context leaves what is known of nothing."""
    model = with_context(pooling)
    x, context = (torch.randn(3, n, size, dtype=torch.float64) for n, size in ((4, 2), (5, 4)))
    counts = torch.tensor([5, 2, 0])
    mask = torch.arange(5) < counts[:, None]
    output = model(x, context=context.masked_fill(~mask[..., None], torch.nan), context_mask=mask)
    gradients = torch.autograd.grad(output.sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    for i, count in enumerate(counts.tolist()):
        alone = model(x[i : i + 1], context=context[i : i + 1, :count])
        torch.testing.assert_close(output[i : i + 1], alone)
    assert output.isfinite().all()
    wrong = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"context_mask: expected shape \[3, 5\], got \[3, 1\]"):
        model(x, context=context, context_mask=wrong)
    with pytest.raises(ValueError, match=r"mask: expected shape \[3, 4\], got \[3, 1\]"):
        model(x, wrong, context=context)
    with pytest.raises(
        ValueError, match=r"context: expected 4 features in the last dimension, got \[3, 5, 3\]"
    ):
        model(x, context=context[..., 1:])


@pytest.mark.parametrize("layers", [2, 3])
def test_layers_mix_the_set(layers: int) -> None:
    torch.manual_seed(0)
    model = AttentionMetaLearner(2, 8, 3, 2, layers=layers, dtype=torch.float64)
    assert len(model.mixing) == layers - 1
    x = torch.randn(2, POINTS, 2, dtype=torch.float64)
    order = torch.randperm(POINTS)
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order])
    mask = torch.arange(POINTS) < torch.tensor([[POINTS], [4]])
    padded = x.clone()
    padded[1, 4:] = 1e3
    torch.testing.assert_close(model(padded, mask)[1:, :4], model(x[1:, :4]))


@pytest.mark.parametrize("way", ["reverse", "checkpointed"])
def test_maml_of_a_learner_with_context(way: str) -> None:
    """Gradient steps on top of attending to a context; tasks together and one by one."""
    model = with_context()
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, context, targets = draw(TASKS, 1, 4, 2), draw(TASKS, 1, 5, 4), draw(TASKS, 1, 4, 3)
    samples = {"x": inputs, "context": context}, targets
    params = dict(model.named_parameters())
    found = [
        meta_gradient(
            maml_loss(
                model,
                params,
                mse_loss,
                samples,
                samples,
                optimizer=SGD(0.05),
                steps=2,
                meta_gradient=kind,
                tasks=tasks,
            ),
            model,
        )
        for kind, tasks in ((way, "vmap"), ("reverse", "loop"))
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)


def test_a_classifier_begins_without_preference() -> None:
    model = with_context("attention", head="classification")
    x, context = (torch.randn(2, n, size, dtype=torch.float64) for n, size in ((3, 2), (5, 4)))
    assert torch.equal(model(x, context=context), torch.zeros(2, 3, dtype=torch.float64))


def test_a_context_is_asked_for_or_refused() -> None:
    x, context = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="context: expected none, for the learner was made without"):
        learner()(x, context=context)
    with pytest.raises(
        ValueError, match=r"context: expected \[batch, context points, context_size\].*got None"
    ):
        with_context()(x)
    with pytest.raises(ValueError, match=r"context: expected a set .*got a 2-D tensor \[2, 4\]"):
        with_context()(x, context=context[0])
