"""Where Triton's kernels run: on which device, of which architecture, or in the interpreter."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from metattn.backends.triton import tuned


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@functools.cache
def architecture(device: torch.device) -> str | None:
    """The row of the configuration table for a device; None where there is none."""
    if interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx9"
    capability = torch.cuda.get_device_capability(device)
    return architecture_of(10 * capability[0] + capability[1])


def architecture_of(capability: int) -> str | None:
    """The same for an NVIDIA compute capability, as 90."""
    if capability < 80:
        return None
    if capability in (80, 87):
        return "sm80"
    if capability < 90 or capability >= 120:
        return "sm86"  # 99 KiB of shared memory a program
    return "sm90" if capability < 100 else "sm100"


def device_at_hand() -> torch.device:
    """Where kernels run: the current GPU, in the interpreter the CPU."""
    return torch.device("cpu") if interpreted() else torch.device("cuda", torch.cuda.current_device())


@functools.cache
def gpu(device: torch.device) -> tuned.Gpu:
    """What a table of tuned tiles is made for."""
    if interpreted():
        return tuned.Gpu("interpreter", "interpreter")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return tuned.Gpu(properties.name, properties.gcnArchName.partition(":")[0])
    return tuned.Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
