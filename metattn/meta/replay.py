"""What a computation depends on beside its tensors, so that it can be repeated in a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from metattn.backends import named, use_backend


class Replay:
    """Generators' states by step; autocast, the backend that was named and torch's function modes once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._devices = sorted({x.device.index or 0 for x in tensors if x.device.type != "cpu"})
        types = sorted({x.device.type for x in tensors})
        self._accelerator = next((kind for kind in types if kind != "cpu"), "cuda")
        self._states: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._backend = named()
        self._modes = list(_get_current_function_mode_stack())
        self._autocast = [
            (
                kind,
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in types
            if torch.amp.is_autocast_available(kind)
        ]

    def remember(self, step: int) -> None:
        """Called before the step is computed for the first time."""
        module = torch.get_device_module(self._accelerator) if self._devices else None
        states = [module.get_rng_state(device) for device in self._devices] if module is not None else []
        self._states[step] = torch.get_rng_state(), states

    @contextmanager
    def again(self, step: int) -> Iterator[None]:
        """The step's surroundings as they were; those of now come back at the end."""
        processor, others = self._states[step]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices, device_type=self._accelerator))
            torch.set_rng_state(processor)
            for device, state in zip(self._devices, others, strict=True):
                torch.get_device_module(self._accelerator).set_rng_state(state, device)
            stack.enter_context(use_backend(self._backend))
            for settings in self._autocast:
                stack.enter_context(torch.autocast(*settings))
            active: list[Any] = list(_get_current_function_mode_stack())
            for mode in self._modes:
                if mode not in active:
                    stack.enter_context(mode)
            yield
