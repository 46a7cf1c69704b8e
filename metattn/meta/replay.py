"""What a computation depends on beside its tensors, so that it can be repeated in a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack

from metattn.backends import named, use_backend


class Replay:
    """Generators' states by what was computed next; autocast, the named backend, torch's choice of attention
    kernels and function modes, and the modules' training flags once.

    Of generators torch's default ones are meant, not Python's and not those that somebody made.
    """

    def __init__(self, tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        kinds = sorted({x.device.type for x in tensors})
        self._accelerator = next((kind for kind in kinds if kind not in ("cpu", "meta")), "cuda")
        self._devices = sorted({x.device.index or 0 for x in tensors if x.device.type == self._accelerator})
        self._states: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._backend = named()
        self._kernels = _kernels()
        self._modes = list(_get_current_function_mode_stack())
        self._training = [(module, module.training) for each in modules for module in each.modules()]
        self._autocast = [
            (
                kind,
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]

    def remember(self, what: Any) -> None:
        """Called before it is computed for the first time."""
        module = torch.get_device_module(self._accelerator) if self._devices else None
        states = [module.get_rng_state(device) for device in self._devices] if module is not None else []
        self._states[what] = torch.get_rng_state(), states

    @contextmanager
    def again(self, what: Any) -> Iterator[None]:
        """Its surroundings as they were; those of now come back at the end."""
        processor, others = self._states[what]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices, device_type=self._accelerator))
            torch.set_rng_state(processor)
            for device, state in zip(self._devices, others, strict=True):
                torch.get_device_module(self._accelerator).set_rng_state(state, device)
            stack.enter_context(use_backend(self._backend))
            if self._kernels != _kernels():
                stack.enter_context(sdpa_kernel(self._kernels))
            for settings in self._autocast:
                stack.enter_context(torch.autocast(*settings))
            active: list[Any] = list(_get_current_function_mode_stack())
            for mode in self._modes:
                if mode not in active:
                    stack.enter_context(mode)
            for module, training in self._training:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            yield


def _kernels() -> list[SDPBackend]:
    """Those of torch's attention that are enabled."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, on in enabled.items() if on]
