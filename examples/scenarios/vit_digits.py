"""A vision transformer of torch's own modules, made twice differentiable in a line, learns not to be fooled.

    python examples/scenarios/vit_digits.py

Source: Drucker and LeCun 1992 (double backpropagation, IEEE Transactions on Neural Networks 3(6)) and Ross
and Doshi-Velez 2018 (arXiv 1711.09404): beside the loss E its gradient in the *input* is made small, E +
λ·‖∂E/∂x‖², so that small changes of an image change little. Training differentiates that gradient in the
parameters: a second derivative of every attention in the model, which torch's fused kernels refuse.

Protocol: scikit-learn's 1,797 digits of 8×8 pixels in [0, 1], a third of them for testing; a small ViT made
of torch.nn.TransformerEncoder, trained plainly and with the penalty from the same weights and the same
batches, and tested on clean images, on Gaussian noise, and against the fast gradient sign method (arXiv
1412.6572) and ten projected steps of it (arXiv 1706.06083). λ was chosen beforehand on a split of one
seed's training images; other seeds split anew, so that it has seen some of their test images. Then the time
of a step with the penalty: torch as it comes, torch's math path, and metattn.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metattn.nn import replace_attention

Images = tuple[Tensor, Tensor]  # [count, 8, 8] in [0, 1], labels [count]


@dataclass(frozen=True)
class Size:
    epochs: int
    seeds: int
    width: int = 48
    layers: int = 2
    heads: int = 4
    patch: int = 2
    batch: int = 64
    rate: float = 2e-3
    penalty: float = 0.4  # λ
    noise: float = 0.3
    reach: float = 0.1  # of an attack, in every pixel
    rounds: int = 7  # of the clock
    train: int = 1198


SIZES = {
    "tiny": Size(epochs=8, seeds=1, width=16, layers=1, heads=2, batch=32, rate=5e-3, rounds=2, train=384),
    "short": Size(epochs=30, seeds=3),
    "full": Size(epochs=100, seeds=10),
}


class VisionTransformer(nn.Module):
    """Images [B, 8, 8] → logits [B, 10]: patches as tokens, and one that is read out. torch.nn throughout."""

    def __init__(self, width: int, layers: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.reader = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn((8 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.classify = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        tokens = self.embed(patches.flatten(3).flatten(1, 2)) + self.places  # [B, tokens, width]
        tokens = torch.cat([self.reader.expand(len(images), -1, -1), tokens], dim=1)
        logits: Tensor = self.classify(self.encoder(tokens)[:, 0])
        return logits


def make_model(size: Size, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(size.width, size.layers, size.heads, size.patch)


def digits(train: int, seed: int) -> tuple[Images, Images]:
    """Training and test images, split anew by the seed; the test images are a third of all."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(images) // 3], order[len(images) // 3 :][:train]
    return (images[kept], labels[kept]), (images[held], labels[held])


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Mean of E + λ·‖∂E/∂x‖² over the images; with λ = 0 nothing is differentiated twice."""
    if penalty == 0:
        return cross_entropy(model(images), labels)
    images = images.clone().requires_grad_()
    losses = cross_entropy(model(images), labels, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), images, create_graph=True)
    return losses.mean() + penalty * slopes.square().sum((1, 2)).mean()


def train(
    model: nn.Module, images: Images, size: Size, penalty: float, seed: int, report: Callable[[float], None]
) -> bool:
    """Adam with a rate that decays to 0; False if Ctrl-C ended it early."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.rate, fused=True)
    steps = size.epochs * (len(images[0]) // size.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        for _ in range(size.epochs):
            order = torch.randperm(len(images[0]), generator=generator)
            for batch in order.split(size.batch)[: len(order) // size.batch]:
                loss = loss_of(model, images[0][batch], images[1][batch], penalty)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
                report(done / steps)
    return done == steps


def attacked(model: nn.Module, images: Tensor, labels: Tensor, reach: float, steps: int) -> Tensor:
    """Images moved against the model within ±reach a pixel and [0, 1]: FGSM if steps is 1, else PGD."""
    moved = images
    stride = reach if steps == 1 else 2.5 * reach / steps
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(cross_entropy(model(moved), labels, reduction="sum"), moved)
        moved = moved + stride * slopes.sign()
        moved = torch.minimum(torch.maximum(moved, images - reach), images + reach).clamp(0, 1)
    return moved.detach()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def judge(model: nn.Module, test: Images, size: Size, seed: int) -> dict[str, float]:
    """Accuracies in %, and the length of ∂E/∂x."""
    images, labels = test
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 10**6))
    found = {
        "clean": accuracy(model, images, labels),
        f"noise σ = {size.noise}": accuracy(model, images + size.noise * noise, labels),
    }
    for name, steps in (("FGSM", 1), ("PGD, 10 steps", 10)):
        found[name] = accuracy(model, attacked(model, images, labels, size.reach, steps), labels)
    moved = images.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(cross_entropy(model(moved), labels, reduction="sum"), moved)
    found["‖∂E/∂x‖"] = slopes.flatten(1).norm(dim=1).mean().item()
    return found


def step_times(size: Size, patch: int) -> dict[str, Any]:
    """CPU milliseconds of a step with the penalty, in turns; and what torch's own attention says to it."""
    (images, labels), _ = digits(size.batch, 0)
    models = {}
    for name in ("torch", "metattn"):
        torch.manual_seed(0)
        models[name] = VisionTransformer(size.width, size.layers, size.heads, patch)
    replace_attention(models["metattn"], norms=False)  # attention alone is compared

    def step(name: str) -> float:
        model = models[name]
        model.zero_grad()
        begin = time.process_time()
        with sdpa_kernel(SDPBackend.MATH) if name == "torch" else contextlib.nullcontext():
            loss_of(model, images, labels, size.penalty).backward()
        return 1000 * (time.process_time() - begin)

    times: dict[str, list[float]] = {"torch": [], "metattn": []}
    for turn in range(size.rounds + 1):
        for name, taken in times.items():
            found = step(name)
            if turn:  # the first warms up
                taken.append(found)
    try:
        loss_of(models["torch"], images, labels, size.penalty).backward()
        refusal = ""
    except RuntimeError as error:
        refusal = str(error).partition("\n")[0]
    ratios = [theirs / ours for theirs, ours in zip(times["torch"], times["metattn"], strict=True)]
    return {
        "tokens": (8 // patch) ** 2 + 1,
        "torch's math path": statistics.median(times["torch"]),
        "metattn": statistics.median(times["metattn"]),
        "ratio": statistics.median(ratios),
        "torch as it comes": refusal,
    }


def run(size: Size, first_seed: int, report: Report) -> tuple[dict[str, list[dict[str, float]]], Any, bool]:
    """Judgements by kind of training and seed, images with slopes for the picture, and whether all ran."""
    judged: dict[str, list[dict[str, float]]] = {"plain": [], "penalty": []}
    shown: dict[str, Any] = {}
    complete = True
    for number in range(size.seeds):
        seed = first_seed + number
        training, test = digits(size.train, seed)
        for kind, strength in (("plain", 0.0), ("penalty", size.penalty)):
            if not complete:
                continue
            model = make_model(size, seed)
            replace_attention(model, norms=False)
            before = (number + (kind == "penalty") * 0.3) / size.seeds
            part = (0.7 if kind == "penalty" else 0.3) / size.seeds

            def told(done: float, kind: str = kind, before: float = before, part: float = part) -> None:
                report(before + part * done, kind)

            complete = train(model, training, size, strength, seed, told)
            model.eval()
            judged[kind].append(judge(model, test, size, seed))
            if number == 0:
                images = test[0][:6].clone().requires_grad_()
                (slopes,) = torch.autograd.grad(
                    cross_entropy(model(images), test[1][:6], reduction="sum"), images
                )
                shown["images"] = test[0][:6].tolist()
                shown[kind] = slopes.tolist()
    return judged, shown, complete


def rows(judged: dict[str, list[dict[str, float]]], times: list[dict[str, Any]]) -> list[Row]:
    found = []
    for quantity in judged["plain"][0]:
        for kind, name in (("plain", "plainly trained"), ("penalty", "with the penalty")):
            values = [one[quantity] for one in judged[kind]]
            if values:
                unit = "" if quantity.startswith("‖") else ", % right"
                of = f"mean of {len(values)} seeds" if len(values) > 1 else "one seed"
                found.append(mean_row(f"{quantity}{unit}, {name}", values, of))
    for entry in times:
        found.append(
            Row(
                f"step with the penalty, {entry['tokens']} tokens: torch's math path / metattn",
                entry["ratio"],
                of="median of the rounds' ratios of CPU time; torch as it comes raises",
                better="higher",
            )
        )
    return found


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    details = results.details
    figure = plt.figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = left.subplots()
    names = [name for name in details["judged"]["plain"][0] if not name.startswith("‖")]
    for offset, (kind, colour, label) in enumerate(
        (("plain", THEIRS, "trained plainly"), ("penalty", OURS, "with the penalty on ∂E/∂x"))
    ):
        runs = details["judged"][kind]
        if not runs:
            continue
        heights = [statistics.fmean(one[name] for one in runs) for name in names]
        places = [i + 0.4 * offset - 0.2 for i in range(len(names))]
        axes.bar(places, heights, 0.38, color=colour, label=label)
        for place, name, height in zip(places, names, heights, strict=True):
            axes.plot([place] * len(runs), [one[name] for one in runs], ".", color=TRUTH, ms=4)
            axes.annotate(f"{height:.0f}", (place, 2), ha="center", color="white", fontsize=9)
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set(ylabel="test images classified right, %", ylim=(0, 118))
    axes.axhline(10, color=PALE, lw=1, ls=":", label="chance")
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize=8.5)
    axes.set_title(f"Attacks reach ±{details['size']['reach']} a pixel; dots are seeds")
    kinds = [("images", "image", "gray_r"), ("plain", "∂E/∂x\nplainly", "RdBu"),
             ("penalty", "∂E/∂x\npenalised", "RdBu")]  # fmt: skip
    kinds = [entry for entry in kinds if entry[0] in details["shown"]]
    columns = len(details["shown"]["images"])
    grid = right.subplots(len(kinds), columns, squeeze=False)
    for row, (kind, label, colours) in zip(grid, kinds, strict=True):
        values = torch.tensor(details["shown"][kind])
        for axis, picture in zip(row, values, strict=True):
            limit = picture.abs().max().item() or 1.0
            axis.imshow(picture.numpy(), cmap=colours, vmin=0 if kind == "images" else -limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    right.suptitle("What changes the loss, each scaled to itself", fontsize=11)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    with common.progress("ViT on digits") as report:
        judged, shown, complete = run(size, options.seed, report)
    times = [step_times(size, patch) for patch in (size.patch, 1)]
    differs = "other images and networks: the sources have no figures for these digits."
    if not complete:
        differs += " Stopped before all seeds were trained."
    results = Results(
        "vit_digits",
        options.form,
        f"A ViT of {size.layers} layers, {size.heads} heads and width {size.width} on patches of "
        f"{size.patch}×{size.patch} pixels; {size.train} training images, {size.epochs} epochs, "
        f"λ = {size.penalty:g}; attacks of ±{size.reach} a pixel.",
        differs,
        rows(judged, times),
        {"size": asdict(size), "judged": judged, "times": times, "shown": shown},
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
