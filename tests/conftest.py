"""For every test: poisoned memory, a fixed seed, the caller's thread count back; and the backends to test."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the Triton kernels are tested in Triton's interpreter. It is asked for before Triton is
# imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["METATTN_TUNED"] = "0"  # the shipped tiles, whatever somebody has tuned here

import emulation

from metattn.backends import available_backends
from metattn.backends.triton import devices

if emulation.installed():
    emulation.install()
TESTED = [
    name for name, reason in available_backends().items() if name in ("reference", "cpu") or reason is None
]


# In the interpreter these take minutes, and emulated CUDA kernels take theirs too; their like are tested
# anyway. `pytest --exhaustive` runs them.
EXHAUSTIVE = (
    "test_layouts[triton-torch.bfloat16-*",
    "test_windows_wider_than_any_sequence[triton-*",
    "test_windows[triton-*",
    "test_broadcast_masks_and_biases[triton-*",
    "test_head_dimensions[triton-*",
    "test_grouped_heads[triton-*-65-5]",
    "test_option[triton-*-float16]",
    "test_option[triton-*-float32]",  # in test_triton.py, to a narrower bound
    "test_together[triton-*-float16]",
    "test_shape[triton-*-float16]",
    "test_many_heads_of_one_group[triton-*float*16]",
    "test_lengths[triton-*127*",
    "test_lengths[triton-*129-257]",
    "test_lengths[triton-257-*",
    "test_scale[triton-plain-200-2.0-*",
    "test_scale[triton-*-200-*-float16]",
)

# Seconds each in the interpreter, and not in the emulation.
SLOW_IN_TRITON = (
    "test_offset[triton-*-float16]",
    *(
        f"test_offset[triton-{name}*"
        for name in ("keys-", "keys a little", "values", "cotangents", "tangents")
    ),
    *(f"test_offset[triton-keys {name}*" for name in ("window", "softcap", "dropout", "sinks")),
    "test_masked_keys_stay_out_of_it[triton]",
)

# The files that take longest begin, so that no worker is left with one of them when the others are done.
FIRST = (
    "test_triton.py",
    "test_precision.py",
    "test_compiled_programs.py",
    "test_docs.py",
    "test_compiled_steps.py",
    "test_packaging.py",
    "test_meta_compile.py",
    "test_doors.py",
    "test_compile.py",
    "test_faults_processes.py",
    "test_faults_layouts.py",
    "test_faults_masks.py",
    "test_demo.py",
    "test_transforms.py",
    "test_tuning.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="all tests of Triton and CUDA kernels on a CPU"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))
    names = EXHAUSTIVE + SLOW_IN_TRITON if devices.interpreted() else ()
    if emulation.installed():
        names += tuple(name.replace("[triton-", "[cuda-") for name in EXHAUSTIVE)
        names += ("test_many_heads[cuda-*",)  # of a grid's limits, which the emulation has not
    if names and not config.getoption("--exhaustive"):
        left_out = [item for item in items if any(_matches(item.name, name) for name in names)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]", 1))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is each backend that can run on this machine; in a module with FLOAT64, each that takes
    float64.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    if "backend" in metafunc.fixturenames and not any("backend" in mark.args[0] for mark in marks):
        wide = getattr(metafunc.module, "FLOAT64", False)
        names = [name for name in TESTED if not (wide and name == "triton")]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, limit of it or count from another test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = available_backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and all its kin give NaN, and the largest integers: what is read unwritten shows.

    torch fills memory so in its deterministic mode, below Python: new_empty, empty_like, compiled code too.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test may set the number of threads: the next one finds it as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
