"""setuptools' build backend, which asks for torch, ninja and pybind11 only where the extension will be built.

An isolated build uses the torch of the environment that it installs into, if there is one: the extension's
interface to torch is stable, and nothing but headers and a library to link is needed of it. Otherwise the
installer brings one from the package index.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml; older ones take its licence for an error
OLDEST_TORCH = (2, 10)
TOOLS = ("ninja", "pybind11>=2.12")
CHOICES = ("auto", "0", "1")

if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"metattn: setuptools {setuptools.__version__} is installed; pip install 'setuptools>="
        f"{OLDEST_SETUPTOOLS}' first, or leave out --no-build-isolation"
    )


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools needs, and what the extension does."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable installation."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]


def requirements() -> list[str]:
    """Of the extension, beside a compiler."""
    choice = asked()
    if choice == "0" or obstacle() is not None:
        return []
    try:
        torch_root()
    except LookupError:
        return [*TOOLS, f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]
    return [*TOOLS]


def asked() -> str:
    """METATTN_BUILD_EXT: whether the extension shall be built, must be or must not."""
    choice = os.environ.get("METATTN_BUILD_EXT") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"metattn: METATTN_BUILD_EXT: expected one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def obstacle() -> tuple[str, str] | None:
    """What keeps this machine from building and no package of Python's mends, and what does; or None."""
    if sys.platform != "linux" and asked() == "auto":
        return f"the extension is built on Linux, this is {sys.platform}", "try METATTN_BUILD_EXT=1"
    command = compiler()
    if shutil.which(command[0]) is None:
        named = f"{command[0]} is" if os.environ.get("CXX") else "g++ and clang++ are"
        return f"no C++ compiler ({named} not on the PATH)", "install g++ or clang++"
    return None


def compiler() -> list[str]:
    """The C++ compiler's command, whether or not it is there."""
    found = next(filter(shutil.which, ("g++", "clang++")), "g++")
    return shlex.split(os.environ.get("CXX", "")) or [found]


def torch_root() -> Path:
    """The folder of a torch to build against. Raises LookupError where there is none."""
    # found, not imported: torch's import takes seconds, its folder is all the build needs
    spec = importlib.util.find_spec("torch")
    found = list(spec.submodule_search_locations or []) if spec is not None else []
    places = [sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()]
    candidates = [Path(place) for place in (*found, *(f"{place}/torch" for place in places))]
    old = None
    for root in candidates:
        if not (root / "version.py").is_file():
            continue
        version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (root / "version.py").read_text())
        if version is not None and (int(version[2]), int(version[3])) >= OLDEST_TORCH:
            return root
        old = f"{root} is {version[1] if version else 'of an unknown version'}"
    raise LookupError(old or "there is none")
