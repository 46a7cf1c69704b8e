"""The plain training loop of an attention meta-learner: encoder, attention, decoder, MSE, Adam.

    python examples/training_loop.py --epochs 300

It is the loop that tutorials on attention in meta-learning show, made to run. A task is a set of points
with 64 features each. A point's ten targets depend on its partner, the one point of the set that has the
same key, so that no network that looks at points one by one can find them. Beside AttentionMetaLearner a
network is trained whose attention weights are softmax(Linear(h), dim=1) of single points [points, 1], as
such tutorials have it: a softmax over one number is 1, and nothing is attended to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout need not be installed

from metattn.meta import AttentionMetaLearner

FEATURES, KEY, TARGETS, POINTS = 64, 8, 10, 16


class PointByPoint(nn.Module):
    """weights = softmax(Linear(h), dim=1) with h [points, hidden]: each weight is 1."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(input_size, hidden_size)
        self.attention = nn.Linear(hidden_size, 1)
        self.decoder = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.encoder(x.flatten(0, 1)))
        weights = torch.softmax(self.attention(hidden), dim=1)
        output: Tensor = self.decoder(weights * hidden)
        return output.unflatten(0, x.shape[:2])


def make_data(sets: int, generator: torch.Generator, rule: Tensor) -> tuple[Tensor, Tensor]:
    """Points [sets, POINTS, FEATURES] in pairs with the same key; what a rule makes of each one's partner."""
    keys = 2 * torch.randn(sets, POINTS // 2, 1, KEY, generator=generator).expand(-1, -1, 2, -1)
    contents = torch.randn(sets, POINTS // 2, 2, FEATURES - KEY, generator=generator)
    data = torch.cat([keys, contents], dim=-1).flatten(1, 2)
    labels = (contents.flip(2) @ rule).flatten(1, 2)
    order = torch.rand(sets, POINTS, generator=generator).argsort(1)
    rows = torch.arange(sets)[:, None]
    return data[rows, order], labels[rows, order]


def train(
    model: nn.Module, epochs: int, every: int, sets: int, say: Callable[[str], None] = print
) -> tuple[list[float], list[float]]:
    """Losses on the training and the validation sets, epoch by epoch."""
    generator = torch.Generator().manual_seed(0)
    contents = FEATURES - KEY
    rule = torch.randn(contents, TARGETS, generator=generator) / contents**0.5
    train_data, train_labels = make_data(sets, generator, rule)
    val_data, val_labels = make_data(max(1, sets // 8), generator, rule)
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    train_losses, val_losses = [], []
    for epoch in range(epochs):
        model.train()
        train_loss = criterion(model(train_data), train_labels)
        optimizer.zero_grad()
        train_loss.backward()
        optimizer.step()

        model.eval()
        with torch.no_grad():
            val_loss = criterion(model(val_data), val_labels)
        train_losses.append(train_loss.item())
        val_losses.append(val_loss.item())
        if epoch % every == 0 or epoch == epochs - 1:
            say(f"Epoch {epoch}: Train Loss = {train_loss.item():.4f}, Val Loss = {val_loss.item():.4f}")
    return train_losses, val_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--sets", type=int, default=1024, help="in the training data")
    parser.add_argument("--every", type=int, default=25, help="epochs between lines")
    arguments = parser.parse_args()
    for kind in (PointByPoint, AttentionMetaLearner):
        torch.manual_seed(0)
        print(kind.__name__)
        train(kind(FEATURES, 128, TARGETS), arguments.epochs, arguments.every, arguments.sets)


if __name__ == "__main__":
    main()
