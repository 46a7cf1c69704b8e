"""Few-shot classification of glyphs that a program draws: prototypes, MAML, and attention to the support.

    python examples/scenarios/glyphs.py

A class is a set of one to three random cubic Bézier strokes. An image of it, 28×28, is drawn with the control
points moved, turned, stretched, sheared and shifted, and with a pen of its own width. Classes for training,
for the choice of when to stop, and for the test are different ones. A task has 5 classes with 1 or 5 images
each, and 15 of each to be classified.

The glyphs are no published data set, so no published figure stands beside these. The methods are:

* ProtoNet, Snell et al. 2017 (arXiv 1703.05175): the nearest class mean of embeddings;
* MAML, Finn et al. 2017 (arXiv 1703.03400), with the inner loop of its Omniglot experiment: one step in
  training and three in the test, normalised over the batch; of size 0.4 in the full form, and 0.1 in the
  others, where after little training 0.4 steps too far;
* attention, after Doersch et al. 2020 (arXiv 2007.11498): every place of a query's feature map attends to all
  places of a class's support, and the logit is the distance to what it finds there, beside ProtoNet's.

All have the same convolutional network of four layers under them and see as many tasks. Then the same on
scikit-learn's handwritten digits, real images that come with it: trained and validated on 0 to 5, turned and
mirrored into 48 classes, and tested on 6 to 9, 4 ways.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, interpolate

import metattn
from metattn.cli.tasks import Samples, handwritten_digits
from metattn.meta import SGD, adapt, maml_loss

PIXELS, PLACES = 28, 16  # of an image along each side; of a feature map
STROKES = 3  # at most
SHOTS = (1, 5)
TRAINED_STEPS, TEST_STEPS = 1, 3  # of MAML
Classes = Sequence[Tensor]  # of each class its images [n, 28, 28], ink 1 on paper 0


@dataclass(frozen=True)
class Size:
    classes: tuple[int, int, int]  # to train, to validate, to test
    images: int  # of each class
    filters: int
    steps: int
    digit_steps: int
    tasks: int  # of a step
    queries: int  # of each class in training
    checks: int  # validations, of which the best counts
    validation: int  # tasks of one
    test: int  # tasks
    test_queries: int  # of each class
    inner_rate: float  # of MAML


SIZES = {
    "tiny": Size((20, 8, 12), 12, 8, 24, 4, 2, 3, 1, 4, 16, 5, 0.1),
    "short": Size((240, 40, 80), 20, 32, 400, 80, 4, 5, 4, 40, 300, 15, 0.1),
    "full": Size((1000, 100, 323), 20, 64, 20_000, 2000, 16, 5, 40, 200, 1000, 15, 0.4),
}


def draw_classes(count: int, generator: torch.Generator) -> Tensor:
    """Control points [count, strokes, 4, 2] in the square from −0.7 to 0.7; NaN where there is no stroke."""
    points = 1.4 * torch.rand(count, STROKES, 4, 2, generator=generator) - 0.7
    strokes = torch.randint(1, STROKES + 1, (count, 1, 1, 1), generator=generator)
    return torch.where(torch.arange(STROKES).view(1, -1, 1, 1) < strokes, points, torch.nan)


def vary(points: Tensor, generator: torch.Generator) -> Tensor:
    """The same glyphs [N, strokes, 4, 2] by another hand: moved points, then an affine map near 1."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(len(points), *shape, generator=generator) - 1

    points = points + 0.08 * torch.randn(points.shape, generator=generator)
    angle = math.pi / 6 * uniform()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    stretch = torch.diag_embed(1 + 0.3 * uniform(2))
    stretch[:, 0, 1] = 0.3 * uniform()
    mapped = torch.einsum("nij,nskj->nski", turn @ stretch, points)
    return mapped + 0.2 * uniform(1, 1, 2)


def render(points: Tensor, width: Tensor, pixels: int = PIXELS, parts: int = 8) -> Tensor:
    """Strokes [N, strokes, 4, 2] with pens of half a `width` [N] → ink [N, pixels, pixels] in [0, 1].

    Each stroke is drawn as `parts` lines; a pixel's ink falls from 1 to 0 over one pixel at the pen's edge.
    The picture is the square from −1 to 1, its first row at −1.
    """
    t = torch.linspace(0, 1, parts + 1)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    curve = bernstein @ points  # [N, strokes, parts + 1, 2]
    (x, y), (end_x, end_y) = (
        curve[:, :, part].flatten(1, 2).unsqueeze(1).unbind(-1) for part in (slice(-1), slice(1, None))
    )  # each [N, 1, lines]
    along_x, along_y = end_x - x, end_y - y
    axis = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    from_x = axis.repeat(pixels).view(1, -1, 1) - x  # [N, pixels², lines], row by row
    from_y = axis.repeat_interleave(pixels).view(1, -1, 1) - y
    length = (along_x.square() + along_y.square()).clamp_min(1e-9)
    nearest = ((from_x * along_x + from_y * along_y) / length).clamp(0, 1)
    squared = (from_x - nearest * along_x).square() + (from_y - nearest * along_y).square()
    distance = squared.nan_to_num(nan=torch.inf).amin(-1).sqrt()
    ink = (width.unsqueeze(-1) / 2 - distance) * pixels / 2 + 0.5
    return ink.clamp(0, 1).view(-1, pixels, pixels)


def glyphs(classes: int, images: int, generator: torch.Generator) -> Classes:
    drawn = draw_classes(classes, generator)
    found = []
    for _ in range(images):
        width = 0.09 + 0.07 * torch.rand(classes, generator=generator)
        found.append(render(vary(drawn, generator), width))
    return tuple(torch.stack(found, 1))


def digits() -> tuple[Classes, Classes]:
    """scikit-learn's digits, 8×8 made 28×28: 0-5, turned and mirrored into 48 classes; 6-9 as they are."""
    classes = handwritten_digits().classes
    turned = [torch.rot90(images, turns, (1, 2)) for images in classes[:6] for turns in range(4)]
    training = [image for images in turned for image in (images, images.flip(2))]
    return enlarged(training), enlarged(classes[6:])


def enlarged(classes: Classes) -> Classes:
    return tuple(
        interpolate(images.unsqueeze(1), size=PIXELS, mode="bilinear", align_corners=False)[:, 0]
        for images in classes
    )


def episodes(
    classes: Classes, tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> tuple[Samples, Samples]:
    """Support and query: images [tasks, ways·each, 28, 28] sorted by label, labels [tasks, ways·each]."""
    support, query = [], []
    for _ in range(tasks):
        for index in torch.randperm(len(classes), generator=generator)[:ways].tolist():
            images = classes[index]
            chosen = images[torch.randperm(len(images), generator=generator)[: shots + queries]]
            support.append(chosen[:shots])
            query.append(chosen[shots:])

    def labelled(images: list[Tensor], each: int) -> Samples:
        labels = torch.arange(ways).repeat_interleave(each).expand(tasks, -1)
        return torch.stack(images).view(tasks, ways * each, PIXELS, PIXELS), labels

    return labelled(support, shots), labelled(query, queries)


class Encoder(nn.Sequential):
    """Images [N, 28, 28] → feature maps [N, filters, 4, 4]: four convolutions 3×3, three of stride 2."""

    def __init__(self, filters: int, running: bool) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, PIXELS))]
        for inputs, stride in ((1, 2), (filters, 2), (filters, 2), (filters, 1)):
            layers += [
                nn.Conv2d(inputs, filters, 3, stride=stride, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=running),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class Pixels(nn.Module):
    """The nearest mean image; nothing is learned."""

    def logits(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return prototype_logits(support.flatten(2), query.flatten(2), ways)


class ProtoNet(nn.Module):
    def __init__(self, filters: int) -> None:
        super().__init__()
        self.encoder = Encoder(filters, running=True)

    def logits(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Images [T, ways·shots, 28, 28] sorted by class, and [T, Q, 28, 28] → [T, Q, ways]."""
        return prototype_logits(*(x.flatten(2) for x in embedded(self.encoder, support, query)), ways)


class CrossAttention(nn.Module):
    """ProtoNet whose queries also look for their parts in each class's support."""

    def __init__(self, filters: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.encoder = Encoder(filters, running=True)
        self.places = nn.Parameter(0.3 * torch.randn(PLACES, filters))  # where in the map
        self.query, self.key = (
            nn.Linear(filters, filters, bias=False),
            nn.Linear(filters, filters, bias=False),
        )
        self.value = nn.Linear(filters, filters, bias=False)
        self.temperature = nn.Parameter(torch.zeros(2))  # logarithms

    def logits(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """As ProtoNet's."""
        known, asked = embedded(self.encoder, support, query)
        plain = prototype_logits(known.flatten(2), asked.flatten(2), ways)
        # [T, N, filters, 4, 4] → [T·ways, heads, points, filters / heads], a point for every place
        known, asked = (x.flatten(3).transpose(2, 3) for x in (known, asked))
        tasks, count = asked.shape[:2]

        def by_class(x: Tensor) -> Tensor:
            return self._split(x.unflatten(1, (ways, -1)).flatten(2, 3).flatten(0, 1))

        k, v = by_class(self.key(known + self.places)), by_class(self.value(known))
        q, wanted = (
            self._split(x.flatten(1, 2).repeat_interleave(ways, 0))
            for x in (self.query(asked + self.places), self.value(asked))
        )
        apart = (wanted - metattn.attention(q, k, v)).square().sum((1, 3))  # [T·ways, Q·places]
        attended = -apart.view(tasks, ways, count, PLACES).mean(-1).transpose(1, 2)
        scale = self.temperature.exp()
        return scale[0] * plain + scale[1] * attended

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def embedded(encoder: nn.Module, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps [T, N, filters, 4, 4] of both, made as one batch."""
    shots = support.shape[1]
    maps = encoder(torch.cat([support, query], 1).flatten(0, 1)).unflatten(0, (len(support), -1))
    return maps[:, :shots], maps[:, shots:]


def prototype_logits(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """[T, ways·shots, F], [T, Q, F] → minus squared distances to the class means, [T, Q, ways].

    Squares are added over features and averaged over the map's 16 places.
    """
    means = support.unflatten(1, (ways, -1)).mean(2)
    return -(query.unsqueeze(2) - means.unsqueeze(1)).square().sum(-1) / PLACES


@dataclass(frozen=True)
class Method:
    name: str
    model: Callable[[Size, int], nn.Module]  # of a size and so many ways
    adapts: bool
    colour: str


def for_maml(size: Size, ways: int) -> nn.Module:
    return nn.Sequential(
        Encoder(size.filters, running=False), nn.Flatten(), nn.Linear(PLACES * size.filters, ways)
    )


UNTRAINED = Method("pixels", lambda size, ways: Pixels(), False, PALE)
METHODS = (
    UNTRAINED,
    Method("MAML", for_maml, True, THEIRS),
    Method("ProtoNet", lambda size, ways: ProtoNet(size.filters), False, THIRD),
    Method("attention", lambda size, ways: CrossAttention(size.filters), False, OURS),
)


def accuracies(
    method: Method, model: nn.Module, tasks: tuple[Samples, Samples], ways: int, inner: SGD
) -> Tensor:
    """The share of the queries that is right, of each task: [tasks]."""
    start = {name: value.detach() for name, value in model.named_parameters()}

    def adapted_logits(images: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        params = adapt(model, start, cross_entropy, (images, labels), optimizer=inner, steps=TEST_STEPS)
        logits: Tensor = functional_call(model, params, (query,))
        return logits

    (images, labels), (query, answers) = tasks
    model.eval()
    with torch.no_grad():
        if method.adapts:
            logits = vmap(adapted_logits, chunk_size=20)(images, labels, query)
        else:
            parts = zip(images.split(20), query.split(20), strict=True)
            logits = torch.cat([model.logits(*part, ways) for part in parts])
    model.train()
    return (logits.argmax(-1) == answers).float().mean(1)


def train(
    method: Method,
    size: Size,
    steps: int,
    ways: int,
    classes: Classes,
    validation: Classes,
    seed: int,
    report: Report,
) -> tuple[nn.Module, list[tuple[int, float]]]:
    """The model that validated best, and (step, accuracy) of all validations; Ctrl-C ends it early."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = method.model(size, ways)
    params, inner = dict(model.named_parameters()), SGD(size.inner_rate)
    if not params:
        return model, []
    held = torch.Generator().manual_seed(seed + 10**6)
    judged = [episodes(validation, size.validation, ways, shots, 5, held) for shots in SHOTS]
    optimizer = torch.optim.Adam(params.values(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, curve, remark = copy.deepcopy(model), [], ""
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(steps):
            shots = SHOTS[step % len(SHOTS)]
            support, query = episodes(classes, size.tasks, ways, shots, size.queries, generator)
            if method.adapts:
                loss = maml_loss(
                    model, params, cross_entropy, support, query, optimizer=inner, steps=TRAINED_STEPS
                )
            else:
                logits = model.logits(support[0], query[0], ways)
                loss = cross_entropy(logits.flatten(0, 1), query[1].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, steps // size.checks) == 0:
                each = [accuracies(method, model, tasks, ways, inner) for tasks in judged]
                right = torch.cat(each).mean().item()
                if right >= max((known for _, known in curve), default=0.0):
                    best = copy.deepcopy(model)
                curve.append((step + 1, right))
                remark = f", validation {right:.3f}"
            if step % 10 == 0:
                report(step / steps, f"{method.name}: loss {loss.item():.3f}{remark}")
    return best, curve


@dataclass(frozen=True)
class Trial:
    """One set of classes."""

    name: str
    ways: int
    steps: int
    training: Classes
    validation: Classes
    test: Classes


def trials(size: Size, seed: int) -> tuple[Trial, Trial]:
    generator = torch.Generator().manual_seed(seed)
    drawn = tuple(glyphs(count, size.images, generator) for count in size.classes)
    known, new = digits()
    # whole digits are for validation, in all their eight positions
    return (
        Trial("glyphs", 5, size.steps, *drawn),
        Trial("digits", 4, size.digit_steps, known[:40], known[40:], new),
    )


def rows(found: dict[str, dict[str, list[list[float]]]], ways: dict[str, int], size: Size) -> list[Row]:
    return [
        mean_row(
            f"{trial}, {ways[trial]}-way {shots}-shot: {name}",
            of_method[place],
            f"accuracy, mean over {size.test} tasks",
            better="higher",
        )
        for trial, of_trial in found.items()
        for place, shots in enumerate(SHOTS)
        for name, of_method in of_trial.items()
    ]


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    details = results.details
    figure, panels = plt.subplots(
        1, 4, figsize=(15, 4), layout="constrained", width_ratios=(1.25, 1.1, 0.9, 0.9)
    )
    sheet = torch.tensor([list(bytes.fromhex(line)) for line in details["sheet"]]) / 255
    panels[0].imshow((1 - sheet).numpy(), cmap="gray", vmin=0, vmax=1)
    panels[0].set_axis_off()
    panels[0].set_title("Eight test classes (rows), drawn ten times")
    for method in METHODS:
        curve = details["validation"]["glyphs"].get(method.name)
        if curve:
            panels[1].plot(
                *zip(*curve, strict=True), color=method.colour, lw=2, marker="o", ms=3, label=method.name
            )
    panels[1].set(xlabel="step", ylabel="accuracy on validation classes")
    panels[1].set_title("Training")
    for panel, trial in zip(panels[2:], ("glyphs", "digits"), strict=True):
        of_trial = [row for row in results.rows if row.quantity.startswith(trial)]
        ways = details["ways"][trial]
        for place, shots in enumerate(SHOTS):
            for other, method in enumerate(METHODS):
                row = next(row for row in of_trial if row.quantity.endswith(f" {shots}-shot: {method.name}"))
                panel.bar(
                    place + 0.2 * (other - 1.5),
                    row.ours,
                    0.18,
                    yerr=row.error,
                    color=method.colour,
                    ecolor="#222222",
                    label=method.name if place == 0 else None,
                )
        panel.axhline(1 / ways, color="#222222", lw=0.8, ls=":")
        panel.set_xticks(range(len(SHOTS)), [f"{shots}-shot" for shots in SHOTS])
        panel.set(ylim=(0, 1), ylabel="accuracy")
        panel.set_title(f"New {trial}, {ways} ways (dotted: chance)")
    figure.legend(*panels[2].get_legend_handles_labels(), frameon=False, ncol=4, loc="outside lower center")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    both = trials(size, options.seed)
    found: dict[str, dict[str, list[list[float]]]] = {}
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    seconds: dict[str, float] = {}
    parts = len(both) * len(METHODS)
    with common.progress("glyphs") as report:
        for trial in both:
            found[trial.name], curves[trial.name] = {}, {}
            for method in METHODS:
                place = len(seconds)

                def part(done: float, remark: str, place: int = place, name: str = trial.name) -> None:
                    report((place + done) / parts, f"{name}, {remark}")

                begun = time.process_time()
                model, curve = train(
                    method,
                    size,
                    trial.steps,
                    trial.ways,
                    trial.training,
                    trial.validation,
                    options.seed,
                    part,
                )
                generator = torch.Generator().manual_seed(options.seed + 10**7)
                found[trial.name][method.name] = [
                    accuracies(
                        method,
                        model,
                        episodes(trial.test, size.test, trial.ways, shots, size.test_queries, generator),
                        trial.ways,
                        SGD(size.inner_rate),
                    ).tolist()
                    for shots in SHOTS
                ]
                curves[trial.name][method.name] = curve
                seconds[f"{trial.name}, {method.name}"] = time.process_time() - begun
    sheet = torch.cat([torch.cat(list(images[:10]), 1) for images in both[0].test[:8]])
    training, validation, test = size.classes
    differs = "" if options.form == "full" else (
        "fewer classes, filters, steps and tasks than in the full form, and inner steps of "
        f"{size.inner_rate:g} in place of {SIZES['full'].inner_rate:g}."
    )  # fmt: skip
    results = Results(
        "glyphs",
        options.form,
        f"{training} classes to train, {validation} to validate, {test} to test, {size.images} images each; "
        f"{size.filters} filters; {size.steps} steps of Adam ({size.digit_steps} on the digits) on "
        f"{size.tasks} "
        f"tasks, of 1 and of 5 shots in turn; the best of {size.checks} validations is tested on "
        f"{size.test} tasks.",
        differs,
        rows(found, {trial.name: trial.ways for trial in both}, size),
        {
            "size": asdict(size),
            "ways": {trial.name: trial.ways for trial in both},
            "validation": curves,
            "CPU seconds": seconds,
            "sheet": [bytes(line).hex() for line in (255 * sheet).round().int().tolist()],
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
