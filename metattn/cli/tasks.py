"""The demo's tasks: sinusoids as in the MAML paper; few-shot classes of scribbles and handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Samples = tuple[Tensor, Tensor]  # (inputs, targets), tasks in front


@dataclass(frozen=True)
class Sinusoids:
    """y = amplitude·sin(x − phase), both of each task's own (Finn et al. 2017, arXiv 1703.03400, 5.1)."""

    amplitude: Tensor  # [tasks], from U[0.1, 5]
    phase: Tensor  # [tasks], from U[0, π]

    @classmethod
    def draw(cls, tasks: int, generator: torch.Generator) -> Sinusoids:
        return cls(
            0.1 + 4.9 * torch.rand(tasks, generator=generator),
            math.pi * torch.rand(tasks, generator=generator),
        )

    def at(self, x: Tensor) -> Samples:
        """(x, y) for x of any shape [tasks, …]."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        return x, self.amplitude.view(shape) * torch.sin(x - self.phase.view(shape))

    def points(self, count: int, generator: torch.Generator) -> Samples:
        """One set of `count` points with x from U[−5, 5] for every task: [tasks, 1 set, count, 1]."""
        return self.at(10 * torch.rand(len(self.phase), 1, count, 1, generator=generator) - 5)


@dataclass(frozen=True)
class Characters:
    """Classes of 8×8 images, of which tasks are made."""

    classes: tuple[Tensor, ...]  # each [images, 8, 8], in [0, 1]

    def draw(
        self, tasks: int, generator: torch.Generator, *, ways: int, shots: int, queries: int
    ) -> tuple[Samples, Samples]:
        """Support and query (images [tasks, ways·each, 8, 8], labels), of classes drawn for each task."""
        support, query = [], []
        for _ in range(tasks):
            for index in torch.randperm(len(self.classes), generator=generator)[:ways].tolist():
                images = self.classes[index]
                chosen = images[torch.randperm(len(images), generator=generator)[: shots + queries]]
                support.append(chosen[:shots])
                query.append(chosen[shots:])

        def labelled(images: list[Tensor], each: int) -> Samples:
            labels = torch.arange(ways).repeat_interleave(each).expand(tasks, -1)
            return torch.stack(images).view(tasks, ways * each, 8, 8), labels

        return labelled(support, shots), labelled(query, queries)


def handwritten_digits() -> Characters:
    """scikit-learn's handwritten digits: the ten classes in order, some 180 images each."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    targets = torch.from_numpy(data.target)
    return Characters(tuple(images[targets == digit] for digit in range(10)))


def scribbles(classes: int, images: int, generator: torch.Generator) -> Characters:
    """Characters that nobody writes: of each class one random pen line, drawn anew for every image.

    The line is a sum of cosines, Σ_k c_k/k · cos(πkt) for t from 0 to 1, with c_k ∈ R² normal for each class.
    Each image adds noise to the c_k, a slant, a pen of its own width and a shift. As in the data set of
    digits the line fills the image's height, and at most 3/4 of its width.
    """
    count = classes * images
    k = torch.arange(1, 6)
    basis = torch.cos(math.pi * k * torch.linspace(0, 1, 40).unsqueeze(-1)) / k  # [points, terms]
    terms = torch.randn(classes, 1, len(k), 2, generator=generator)
    noise = torch.randn(classes, images, len(k), 2, generator=generator)
    line = basis @ (terms + 0.3 * noise).flatten(0, 1)  # [count, points, (x, y)]
    slant = 0.2 * torch.randn(count, 1, 1, generator=generator)
    line = torch.cat([line[..., :1] + slant * line[..., 1:], line[..., 1:]], -1)
    width = 0.25 + 0.25 * torch.rand(count, 1, 1, generator=generator)
    low, high = line.amin(1, keepdim=True), line.amax(1, keepdim=True)
    fit = (2 - width) / (high - low)  # the image is the square from −1 to 1
    scale = torch.cat([torch.minimum(0.75 * fit[..., :1], fit[..., 1:]), fit[..., 1:]], -1)
    shift = 0.06 * torch.randn(count, 1, 2, generator=generator)
    line = (line - (low + high) / 2) * scale + shift
    axis = (torch.arange(8) + 0.5) / 4 - 1
    pixels = torch.cartesian_prod(axis, axis).flip(-1)  # (x, y) of each, row by row
    # in parts, for all distances at once are [count, 64, points]
    distance = torch.cat([torch.cdist(pixels, part).amin(-1) for part in line.split(1000)])
    ink = (4 * (width[..., 0] / 2 - distance) + 0.5).clamp(0, 1)  # falls to 0 over one pixel
    return Characters(tuple(ink.view(classes, images, 8, 8)))


def windows(images: Tensor) -> Tensor:
    """Images [..., 8, 8] as sets of 16 windows of 4×4 pixels, overlapping by half: [..., 16, 16]."""
    paper = (0.0 - 0.3) / 0.38  # the digits' mean and standard deviation
    scaled = pad((images - 0.3) / 0.38, (1, 1, 1, 1), value=paper)
    return scaled.unfold(-2, 4, 2).unfold(-2, 4, 2).flatten(-4, -3).flatten(-2)


def nearest_centroid(support: Samples, query: Samples) -> float:
    """The accuracy of the class whose mean support image is nearest, pixel by pixel."""
    images, labels = support
    ways = int(labels.max()) + 1
    means = images.view(len(images), ways, -1, 64).mean(2)  # the support comes sorted by class
    nearest = torch.cdist(query[0].flatten(2), means).argmin(-1)
    return (nearest == query[1]).float().mean().item()
