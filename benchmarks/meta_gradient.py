"""Time and memory of a meta-gradient by the number of inner steps, each way to take it beside the others.

    python -m benchmarks.meta_gradient [--steps 1 2 5 10 20 50] [--out benchmarks/results/meta-gradient]

A causal transformer with metattn's attention learns sequences in its inner loop; the outer loss is that of
other sequences. Beside it the same by reverse mode with torch's attention, which has second derivatives in
its math path alone. Times are taken in turn, in rounds; memory is the peak of a fresh process beyond its
parameters, with the allocator told to hand large blocks back (MALLOC_MMAP_THRESHOLD_), so that it is what is
needed and not what was kept. Every way's gradient is compared with reverse mode's before it is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import metattn
from metattn.bench.files import json_text
from metattn.bench.tables import ratio
from metattn.measure import in_fresh_process, interleave, machine, per_round
from metattn.meta import SGD, adapt

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 64, 4, 2, 256, 8
PEER = "torch"  # reverse mode with torch's attention
WAYS = (PEER, "reverse", "checkpointed", "first-order")
EXACT = WAYS[:4]
COMPARED = (("reverse", PEER), ("checkpointed", PEER), ("checkpointed", "reverse"))
COLOURS = {
    PEER: "#444444",
    "reverse": "#b04a3a",
    "checkpointed": "#1b6ca8",
    "first-order": "#9aa5ad",
}
TOLERANCE = 1e-4  # of the meta-gradient in float32, beside reverse mode's: sums in another order


class LanguageModel(nn.Module):
    """Tokens [batch, length] → logits [batch, vocabulary, length], causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layers(self.embed(tokens) + self.place[: tokens.shape[1]], mask=mask, is_causal=True)
        logits: Tensor = self.head(hidden).transpose(1, 2)
        return logits


class Task:
    """The model, with metattn's attention or torch's; sequences to adapt on and to be judged by."""

    def __init__(self, ours: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.model = LanguageModel()
        if ours:
            metattn.replace_attention(self.model, norms=False)  # inner loops compute norms exactly
        self.params = dict(self.model.named_parameters())
        tokens = torch.randint(VOCABULARY, (2, BATCH, LENGTH + 1), generator=generator)
        self.support, self.query = ((each[:, :-1], each[:, 1:]) for each in tokens)

    def step(self, way: str, steps: int) -> Callable[[], tuple[Tensor, ...]]:
        @sdpa_kernel(SDPBackend.MATH)  # of torch's, the one with second derivatives
        def meta_gradient() -> tuple[Tensor, ...]:
            adapted = adapt(
                self.model,
                self.params,
                cross_entropy,
                self.support,
                optimizer=SGD(0.05),
                steps=steps,
                meta_gradient="reverse" if way == PEER else way,
            )
            loss = cross_entropy(functional_call(self.model, adapted, (self.query[0],)), self.query[1])
            return torch.autograd.grad(loss, list(self.params.values()))

        return meta_gradient


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--rounds", type=int, default=5, help="of timing, at least")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/meta-gradient"))
    args = parser.parse_args()
    rows = measure(args.steps, args.rounds)
    results = {
        "machine": machine(),
        "parameters": sum(x.numel() for x in Task().params.values()),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meta_gradient.json").write_text(json_text(results))
    table = markdown(results)
    (args.out / "meta_gradient.md").write_text(table)
    draw(results, args.out / "meta_gradient.png")
    print(table)
    return 0


def measure(counts: list[int], rounds: int) -> list[dict[str, Any]]:
    from rich.progress import track

    task, peer = Task(), Task(ours=False)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the processes that measure memory
    rows = []
    for steps in track(counts, description="inner steps"):
        candidates = {way: (peer if way == PEER else task).step(way, steps) for way in WAYS}
        expected = candidates["reverse"]()
        for way in EXACT:
            error = relative_error(candidates[way](), expected)
            if error > TOLERANCE:
                raise AssertionError(f"{way}, {steps} steps: the meta-gradient is off by {error:.1e}")
        timings = interleave(candidates, seconds=10, least=rounds, most=30, warmup=1)
        for way in WAYS:
            request = {"way": way, "steps": steps, "threads": torch.get_num_threads()}
            rows.append(
                {
                    "way": way,
                    "steps": steps,
                    "samples": timings[way].samples,
                    **timings[way].summary(),
                    "bytes": in_fresh_process("benchmarks.meta_gradient_peak", request)["bytes"],
                }
            )
    return rows


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    whole, exact = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (found, expected))
    return float((whole - exact).norm() / exact.norm())


def cell(results: dict[str, Any], way: str, steps: int) -> dict[str, Any]:
    return next(row for row in results["rows"] if (row["way"], row["steps"]) == (way, steps))


def slower(over: dict[str, Any], under: dict[str, Any]) -> str:
    return ratio(per_round(over["samples"], under["samples"]).summary())


def markdown(results: dict[str, Any]) -> str:
    counts = sorted({row["steps"] for row in results["rows"]})

    def table(figures: list[tuple[str, Callable[[dict[str, dict[str, Any]]], str]]]) -> list[str]:
        rows = [["inner steps", *(title for title, _ in figures)], (1 + len(figures)) * ["---:"]]
        for steps in counts:
            cells = {way: cell(results, way, steps) for way in WAYS}
            rows.append([str(steps), *(figure(cells) for _, figure in figures)])
        return ["| " + " | ".join(row) + " |" for row in rows]

    lines = table(
        [(f"{way}, s", lambda cells, way=way: f"{cells[way]['median']:.3g}") for way in WAYS]
        + [(f"{a} / {b}", lambda cells, a=a, b=b: slower(cells[a], cells[b])) for a, b in COMPARED]
    )
    lines += ["", *table(
        [(f"{way}, MiB", lambda cells, way=way: f"{cells[way]['bytes'] / 2**20:,.0f}") for way in WAYS]
        + [(f"{b} / {a}", lambda cells, a=a, b=b: f"{cells[b]['bytes'] / cells[a]['bytes']:.1f}×")
           for a, b in COMPARED]
    )]  # fmt: skip
    what = results["machine"]
    lines += [
        "",
        f"* One meta-gradient of a transformer: {LAYERS} layers, width {WIDTH}, {HEADS} heads, {BATCH} "
        f"sequences of {LENGTH} tokens, {results['parameters']:,} parameters, float32, inner SGD, metattn's "
        f"attention; {PEER}: reverse mode with torch's.",
        "* Times: medians of rounds in turn, and of the ratios in each round, ± half the distance of their "
        "quartiles. Memory: peak beyond the parameters in a fresh process.",
        f"* {what['cpu']}, {what['threads']} threads, load {what['load']:.1f} at the end, torch "
        f"{what['versions']['torch']}, commit {what['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({row["steps"] for row in results["rows"]})
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}
    with mpl.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for way in WAYS:
            cells = [cell(results, way, steps) for steps in counts]
            name = "reverse, torch's attention" if way == PEER else way
            left.plot(counts, [each["bytes"] / 2**20 for each in cells], "o-", color=COLOURS[way], label=name)
            right.plot(counts, [each["median"] / n for each, n in zip(cells, counts, strict=True)], "o-",
                       color=COLOURS[way])  # fmt: skip
        left.set(xscale="log", yscale="log", title="peak memory, MiB", xlabel="inner steps")
        right.set(xscale="log", title="seconds a step", xlabel="inner steps")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xticks(counts, [str(n) for n in counts])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        left.legend(frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
