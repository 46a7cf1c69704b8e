"""The demo's tasks: sinusoids as in the MAML paper, and few-shot classes of handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


def handwritten_digits() -> tuple[Characters, Characters]:
    """scikit-learn's digits: 0-5, turned and mirrored into 48 classes, to meta-train; and 6-9 as they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    targets = torch.from_numpy(data.target)
    training = []
    for digit in range(6):
        for turns in range(4):
            turned = torch.rot90(images[targets == digit], turns, (1, 2))
            training += [turned, turned.flip(2)]
    return Characters(tuple(training)), Characters(tuple(images[targets == digit] for digit in range(6, 10)))


def rows(images: Tensor) -> Tensor:
    """Each image [8, 8] as a set of 8 points: its rows, centred, with a unit vector for their place."""
    place = torch.eye(8).expand(*images.shape[:-2], 8, 8)
    return torch.cat([(images - 0.3) / 0.37, place], dim=-1)  # the data's mean and standard deviation


def nearest_centroid(support: Samples, query: Samples) -> float:
    """The accuracy of the class whose mean support image is nearest, pixel by pixel."""
    images, labels = support
    ways = int(labels.max()) + 1
    means = images.view(len(images), ways, -1, 64).mean(2)  # the support comes sorted by class
    nearest = torch.cdist(query[0].flatten(2), means).argmin(-1)
    return (nearest == query[1]).float().mean().item()
