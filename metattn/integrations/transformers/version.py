"""Importing this refuses a version of transformers that is too old for what metattn imports of it."""

from __future__ import annotations

import re

import transformers

OLDEST = (5, 20)  # as the extra `transformers` asks for


def check(version: str) -> None:
    """Raises ImportError for a version that is too old."""
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ImportError(
            f"transformers: expected version {OLDEST[0]}.{OLDEST[1]} or later, got {version}: "
            f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
        )


check(transformers.__version__)
