"""Importing this refuses a version of transformers that is too old for what metattn imports of it."""

from __future__ import annotations

import re

import transformers

OLDEST = (5, 20)  # as the extra metattn[transformers] asks for


def check(version: str) -> None:
    """Raises ImportError for a version that is too old."""
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ImportError(
            f"transformers: expected version {OLDEST[0]}.{OLDEST[1]} or later, got {version}: "
            "pip install 'metattn[transformers]'"
        )


check(transformers.__version__)
