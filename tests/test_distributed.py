"""DDP, FSDP2 and DTensor on two processes (gloo): both orders are those of one process on the whole batch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import metattn
from metattn.meta import SGD, maml_loss

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
PROCESSES, TASKS, SETS, POINTS = 2, 4, 4, 5
Scenario = Callable[[], list[Tensor]]


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    metattn.replace_attention(layer)
    first, last = nn.Linear(3, 8, dtype=torch.float64), nn.Linear(8, 2, dtype=torch.float64)
    return nn.Sequential(first, layer, last)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (SETS, POINTS, 3), (SETS, POINTS, 2)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y


def tasks() -> tuple[Tensor, ...]:
    """Support inputs and targets, query inputs and targets, tasks in front."""
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(TASKS, 2, POINTS, size, generator=generator, dtype=torch.float64) for size in (3, 2, 3, 2)
    )


def mine(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's share of what is in front."""
    return tuple(tensor.chunk(PROCESSES)[dist.get_rank()] for tensor in tensors)


def penalised(function: Callable[[Tensor], Tensor], samples: tuple[Tensor, ...]) -> Tensor:
    """A loss with a gradient in it."""
    x = samples[0].clone().requires_grad_()
    outputs = function(x)
    (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return mse_loss(outputs, samples[1]) + slope.square().mean()


def meta_loss(model: nn.Module, params: dict[str, Tensor], samples: tuple[Tensor, ...]) -> Tensor:
    support, query = samples[:2], samples[2:]
    return maml_loss(model, params, mse_loss, support, query, optimizer=SGD(0.1), steps=2)


class MetaStep(nn.Module):
    """A model whose forward is its meta-loss: what DDP wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *samples: Tensor) -> Tensor:
        return meta_loss(self.model, dict(self.model.named_parameters()), samples)


def trained(
    model: nn.Module, loss: Callable[[], Tensor], rule: type[torch.optim.Optimizer] = torch.optim.SGD
) -> list[Tensor]:
    """The parameters after three steps."""
    optimizer = rule(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return whole(model.parameters())


def whole(tensors: Any) -> list[Tensor]:
    return [x.full_tensor() if hasattr(x, "full_tensor") else x.detach() for x in tensors]


def expected(name: str) -> list[Tensor]:
    """In one process, of everything."""
    model, samples, all_tasks = model_of(), batch(), tasks()
    params = dict(model.named_parameters())
    if name == "training":
        return trained(model, lambda: mse_loss(model(samples[0]), samples[1]))
    if name == "meta-training":
        return trained(model, lambda: meta_loss(model, params, all_tasks), torch.optim.Adam)
    if name == "penalty":
        return list(torch.autograd.grad(penalised(model, samples), list(params.values())))
    return list(torch.autograd.grad(meta_loss(model, params, all_tasks), list(params.values())))


# In each of the processes.


def parallel(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model[1])
    return fully_shard(model)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters of a sharded model, whose gradients are summed over the processes and sharded again."""
    from torch.distributed.tensor import Partial

    return {name: x.full_tensor(grad_placements=[Partial()]) for name, x in model.named_parameters()}


def skeleton() -> nn.Module:
    """The model without data: functional_call brings its parameters."""
    with torch.device("meta"):
        return model_of()


def ddp_training() -> list[Tensor]:
    x, y = mine(batch())
    model = parallel(model_of())
    return trained(model, lambda: mse_loss(model(x), y))


def ddp_penalty() -> list[Tensor]:
    model = parallel(model_of())
    penalised(model, mine(batch())).backward()
    return [p.grad for p in model.parameters()]


def ddp_meta_by_hand() -> list[Tensor]:
    """functional_call goes past DDP: nothing is reduced until we do."""
    model = parallel(model_of()).module
    meta_loss(model, dict(model.named_parameters()), mine(tasks())).backward()
    gradients = [p.grad for p in model.parameters()]
    local = gradients[0].clone()
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient.div_(PROCESSES)
    assert not torch.allclose(local, gradients[0])
    return gradients


def ddp_meta_step() -> list[Tensor]:
    model = parallel(MetaStep(model_of()))
    return trained(model, lambda: model(*mine(tasks())), torch.optim.Adam)


def fsdp_training() -> list[Tensor]:
    x, y = mine(batch())
    model = sharded()
    return trained(model, lambda: mse_loss(model(x), y))


def fsdp_penalty() -> list[Tensor]:
    model, template = sharded(), skeleton()
    params = gathered(model)
    loss = penalised(lambda x: functional_call(template, params, (x,)), mine(batch()))
    (loss / PROCESSES).backward()
    assert all(type(p.grad) is type(p) and p.grad.placements == p.placements for p in model.parameters())
    return whole(p.grad for p in model.parameters())


def fsdp_meta() -> list[Tensor]:
    model, template = sharded(), skeleton()
    return trained(
        model,
        lambda: meta_loss(template, gathered(model), mine(tasks())) / PROCESSES,
        torch.optim.Adam,
    )


def heads() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)


def attention_orders(attend: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    (first,) = torch.autograd.grad(attend(x, x, x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [first, second]


def heads_sharded() -> list[Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.experimental import local_map

    mesh = init_device_mesh("cpu", (PROCESSES,))
    place = [Shard(1)]
    attend = local_map(metattn.attention, place, (place, place, place), device_mesh=mesh)
    x = distribute_tensor(heads(), mesh, place).requires_grad_()
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        metattn.attention(x, x, x)
    return whole(x.detach() for x in attention_orders(attend, x))


def fsdp_module_twice() -> list[Tensor]:
    """torch frees the unsharded parameters after a backward; a second one finds nothing."""
    model = sharded()
    with pytest.raises(RuntimeError, match="storage"):
        penalised(model, mine(batch())).backward()
    return []


SCENARIOS: dict[str, tuple[Scenario, str | None]] = {
    "DDP, training": (ddp_training, "training"),
    "DDP, gradient penalty": (ddp_penalty, "penalty"),
    "DDP, meta-gradient reduced by hand": (ddp_meta_by_hand, "meta"),
    "DDP, meta-training in its forward": (ddp_meta_step, "meta-training"),
    "FSDP2, training": (fsdp_training, "training"),
    "FSDP2, gradient penalty of gathered parameters": (fsdp_penalty, "penalty"),
    "FSDP2, meta-training of gathered parameters": (fsdp_meta, "meta-training"),
    "DTensor, sharded heads": (heads_sharded, "heads"),
    "FSDP2, second order through the module": (fsdp_module_twice, None),
}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name, (scenario, _) in SCENARIOS.items():
        try:
            results[name] = scenario()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        torch.multiprocessing.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_in_one_process(name: str, results: list[dict[str, Any]]) -> None:
    what = SCENARIOS[name][1]
    for of_process in results:
        found = of_process[name]
        assert not isinstance(found, str), found
        if what is None:
            continue
        if what == "heads":
            wanted = attention_orders(metattn.attention, heads().requires_grad_())
        else:
            wanted = expected(what)
        assert len(found) == len(wanted)
        for ours, truth in zip(found, wanted, strict=True):
            assert truth.norm() > 0
            assert relative_error(ours.detach(), truth.detach())[0] < 1e-9
