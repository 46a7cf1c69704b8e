"""A Llama of Hugging Face transformers learns to learn ciphers, by MAML through metattn's attention.

    python examples/scenarios/sequence_copy.py

Sources: Finn, Abbeel and Levine 2017 (arXiv 1703.03400) for MAML, Li et al. 2017 (arXiv 1707.09835,
Meta-SGD) for step sizes that are learned with the weights, one for each element. The model is a small
LlamaForCausalLM with random weights; metattn.integrations.transformers.register() and one option make its
attention differentiable twice, which transformers' default is not.

Protocol: a task is a cipher, a permutation of the alphabet that the model has never seen. A text is some
different letters, a mark, and their ciphers in the same order. From a few texts, a few gradient steps must
teach the model the cipher: judged by the letters of new texts that it then deciphers right, which no model
can without adapting. Beside it stand the same steps from random weights, at the best of several step sizes,
and hundreds of steps of Adam from there. No figures are published for this task.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from metattn.meta import SGD, Adam, InnerOptimizer, MetaSGD, adapt, maml_loss

RATES = (0.03, 0.1, 0.3, 1.0)  # tried from random weights


@dataclass(frozen=True)
class Size:
    letters: int
    length: int  # letters of a text
    meta_steps: int
    tasks: int
    steps: int  # of adaptation
    test_tasks: int
    long_steps: int  # of Adam from random weights
    width: int = 48
    layers: int = 2
    heads: int = 2
    shots: int = 8  # texts to adapt on, and as many to be judged by
    inner_rate: float = 0.3  # at the beginning of meta-training
    rate: float = 3e-3


SIZES = {
    "tiny": Size(4, 2, meta_steps=8, tasks=4, steps=1, test_tasks=4, long_steps=5, width=16, layers=1,
                 shots=4),
    "short": Size(8, 4, meta_steps=300, tasks=8, steps=2, test_tasks=64, long_steps=200),
    "full": Size(26, 8, meta_steps=20_000, tasks=16, steps=3, test_tasks=500, long_steps=1000,
                 width=128, layers=4, heads=4, shots=16),
}  # fmt: skip


class Speller(nn.Module):
    """Texts [shots, 2·length + 1] → logits [shots, length, letters] of the ciphers at their end."""

    def __init__(self, size: Size, attention: str = "metattn") -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        from metattn.integrations.transformers import register

        register()
        self.length, self.letters = size.length, size.letters
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2 * size.letters + 1,  # letters, ciphers, the mark between them
                hidden_size=size.width,
                intermediate_size=2 * size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads,
                max_position_embeddings=2 * size.length + 1,
                attn_implementation=attention,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def forward(self, texts: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=texts, use_cache=False).logits
        return logits[:, self.length : -1, self.letters : 2 * self.letters]


def spelled(logits: Tensor, texts: Tensor) -> Tensor:
    """Cross-entropy of the ciphers at the end of the texts."""
    letters = logits.shape[-1]
    wanted = texts[:, -logits.shape[1] :] - letters
    return cross_entropy(logits.flatten(0, 1), wanted.flatten())


def ciphers(
    tasks: int, size: Size, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Support and query, each texts [tasks, shots, 2·length + 1] twice: they are input and target in one."""
    rule = torch.rand(tasks, size.letters, generator=generator).argsort(1)
    chance = torch.rand(tasks, 2 * size.shots, size.letters, generator=generator)
    plain = chance.argsort(2)[..., : size.length]
    secret = rule.gather(1, plain.flatten(1)).view_as(plain) + size.letters
    mark = torch.full((tasks, 2 * size.shots, 1), 2 * size.letters)
    support, query = torch.cat([plain, mark, secret], 2).split(size.shots, dim=1)
    return (support, support), (query, query)


def meta_train(size: Size, seed: int, report: Report) -> tuple[Speller, MetaSGD, list[float]]:
    """Weights and step sizes by MAML, and the outer losses; Ctrl-C ends it early."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Speller(size).train()
    params = dict(model.named_parameters())
    rates = MetaSGD(params, size.inner_rate)
    optimizer = torch.optim.Adam(
        [{"params": [*params.values()], "lr": size.rate}, {"params": [*rates.parameters()], "lr": size.rate}],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.meta_steps)
    losses: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(size.meta_steps):
            support, query = ciphers(size.tasks, size, generator)
            loss = maml_loss(
                model, params, spelled, support, query, optimizer=rates.optimizer(), steps=size.steps
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*params.values(), *rates.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(0.9 * (step + 1) / size.meta_steps, f"loss after adapting {loss.item():.2f}")
    return model, rates, losses


@torch.no_grad()
def accuracies(model: Speller, size: Size, optimizer: InnerOptimizer, steps: int, seed: int) -> Tensor:
    """% of ciphers right in new texts of new tasks after steps on each, [test tasks]."""
    support, query = ciphers(size.test_tasks, size, torch.Generator().manual_seed(seed + 10**6))
    params = dict(model.named_parameters())

    def of_task(texts: Tensor, asked: Tensor) -> Tensor:
        adapted = adapt(model, params, spelled, (texts, texts), optimizer=optimizer, steps=steps)
        found = functional_call(model, adapted, (asked,)).argmax(-1)
        return (found == asked[:, -size.length :] - size.letters).float().mean()

    return 100 * vmap(of_task, chunk_size=16)(support[0], query[0])


def evaluate(model: Speller, rates: MetaSGD, size: Size, seed: int, report: Report) -> dict[str, Tensor]:
    """Accuracies [test tasks] by name."""
    found = {
        f"meta-learned, {steps}": accuracies(model, size, rates.optimizer(), steps, seed)
        for steps in range(size.steps + 1)
    }
    report(0.93, "from random weights")
    torch.manual_seed(seed)
    untrained = Speller(size)
    tried = [accuracies(untrained, size, SGD(rate), size.steps, seed) for rate in RATES]
    found[f"random weights, {size.steps}"] = max(tried, key=lambda values: values.mean().item())
    report(0.96, "from random weights, many steps")
    found[f"random weights, {size.long_steps}"] = accuracies(
        untrained, size, Adam(size.rate), size.long_steps, seed
    )
    return found


def rows(found: dict[str, Tensor], size: Size) -> list[Row]:
    of = f"mean over {size.test_tasks} new ciphers, % of letters right; chance {100 / size.letters:.3g}"
    names = {
        "meta-learned, 0": "meta-learned, before any step",
        f"meta-learned, {size.steps}": f"meta-learned, {size.steps} steps",
        f"random weights, {size.steps}": (
            f"random weights, {size.steps} steps of SGD at the best of {len(RATES)} rates"
        ),
        f"random weights, {size.long_steps}": f"random weights, {size.long_steps} steps of Adam",
    }
    return [
        mean_row(label, found[name].tolist(), of, better="higher")
        for name, label in names.items()
    ]  # fmt: skip


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    size, found = results.details["size"], results.details["accuracies"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(results.details["losses"], color=PALE, lw=0.8)
    smooth = torch.tensor(results.details["losses"])
    if len(smooth) > 40:
        mean = smooth.unfold(0, 21, 1).mean(1)
        left.plot(range(10, 10 + len(mean)), mean, color=OURS, lw=2)
    left.set(xlabel="meta-step", ylabel="loss on new texts after adapting", ylim=(0, None))
    left.set_title("MAML on ciphers, a new one each time")
    names = [f"meta-learned, {steps}" for steps in range(size["steps"] + 1)]
    names += [name for name in found if name not in names]
    colours = [THIRD] + [OURS] * size["steps"] + [THEIRS] * 2
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        values = torch.tensor(found[name])
        height = values.mean().item()
        right.bar(place, height, 0.62, color=colour)
        spread = 0.5 * (torch.rand(len(values), generator=torch.Generator().manual_seed(0)) - 0.5)
        right.plot(place + spread, values, ".", color=TRUTH, ms=2.5, alpha=0.45)
        right.annotate(
            f"{height:.0f}",
            (place, height),
            ha="center",
            xytext=(0, 3),
            textcoords="offset points",
            bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8},
            zorder=5,
        )
    labels = [
        name.replace(", ", "\n").replace("random ", "random\n")
        + (" step" if name.endswith(" 1") else " steps")
        for name in names
    ]
    right.set_xticks(range(len(names)), labels, fontsize=8)
    right.axhline(100 / size["letters"], color=PALE, lw=1, ls=":")
    right.set(ylabel="letters of new texts right, %", ylim=(0, 108))
    right.set_title("New ciphers; dots are tasks")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    with common.progress("MAML on ciphers") as report:
        model, rates, losses = meta_train(size, options.seed, report)
        found = evaluate(model, rates, size, options.seed, report)
    differs = (
        "" if len(losses) == size.meta_steps else f"stopped after {len(losses)} of {size.meta_steps} steps."
    )
    results = Results(
        "sequence_copy",
        options.form,
        f"Ciphers of {size.letters} letters, texts of {size.length}, {size.shots} texts and {size.steps} "
        f"steps to adapt; a Llama of {size.layers} layers and width {size.width}, {size.meta_steps} "
        f"meta-steps on {size.tasks} ciphers each.",
        differs,
        rows(found, size),
        {
            "size": asdict(size),
            "losses": losses,
            "accuracies": {name: values.tolist() for name, values in found.items()},
        },
    )  # fmt: skip
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
