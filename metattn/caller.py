"""The caller's line, for warnings."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

# What lies between it and a warning: this package, torch, and code that torch generates.
_BETWEEN = (
    *(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__)),
    "<eval_with_key>",
)


def level_of_caller() -> int:
    """warnings' stacklevel of the first line outside this package and torch, from the function that asks.

    That function's own line where there is none, as in autograd's own thread on a GPU.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    return level if frame is not None else 1
