"""Learn forces from an energy: the loss contains a gradient, so training takes the second derivative.

    python examples/forces.py --steps 300

An energy model attends over the atoms of small clusters, with a bias made of their distances. Its forces are
−dE/dx, and they are fitted to those of a Morse potential. The positions enter through queries, keys, values
and the bias, and each of these paths is differentiated twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout need not be installed

import metattn


class EnergyModel(nn.Module):
    """Positions [clusters, atoms, 3] → energies [clusters], unchanged by shifts and rotations."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.centres = nn.Parameter(torch.linspace(0.5, 4.0, width))
        self.embed = nn.Linear(width, width)
        self.project = nn.Linear(width, 3 * width)
        self.steepness = nn.Parameter(torch.ones(heads))
        self.energy = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, positions: Tensor) -> Tensor:
        offsets = positions.unsqueeze(1) - positions.unsqueeze(2)
        distances = (offsets.square().sum(-1) + 1e-6).sqrt()  # [clusters, atoms, atoms]
        shells = torch.exp(-4 * (distances.unsqueeze(-1) - self.centres).square()).sum(2)
        hidden = nn.functional.silu(self.embed(shells))
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.project(hidden).chunk(3, -1)
        )
        bias = -self.steepness[:, None, None] * distances.unsqueeze(1)  # [clusters, heads, atoms, atoms]
        mixed = metattn.attention(q, k, v, bias=bias).transpose(1, 2).flatten(2)
        energies: Tensor = self.energy(hidden + mixed).sum((1, 2))
        return energies


def morse_energy(positions: Tensor) -> Tensor:
    """Σ over pairs of (1 − exp(−(r − 1.5)))²."""
    distances = torch.stack([torch.pdist(cluster) for cluster in positions])
    return (1 - torch.exp(1.5 - distances)).square().sum(1)


def forces_of(energies: Tensor, positions: Tensor, *, create_graph: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=create_graph)
    return -gradient


def train(steps: int, atoms: int = 6, clusters: int = 64) -> tuple[float, float]:
    """The mean squared error of the forces before and after."""
    torch.manual_seed(0)
    positions = (torch.randn(clusters, atoms, 3) * 1.2).requires_grad_()
    wanted = forces_of(morse_energy(positions), positions, create_graph=False).clamp(-5, 5)
    model = EnergyModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = (forces_of(model(positions), positions, create_graph=True) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    before, after = train(parser.parse_args().steps)
    print(f"mean squared error of the forces: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
