"""Where this package lies, what became of its extension when it was built, and the commands that mend it."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLDER = Path(__file__).resolve().parent


def record() -> dict[str, str | None]:
    """What setup.py left: cause, why there is no extension, and mend, what helps; or nothing."""
    try:
        found = json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_source_tree() -> bool:
    """Whether this is a clone or an editable installation, in which the extension is built in place."""
    return (FOLDER.parent / "setup.py").is_file() and (FOLDER.parent / "csrc").is_dir()


@functools.cache
def digest() -> str:
    """Of this package's code and libraries: another release, and another state of a clone, has another."""
    found = hashlib.blake2b(digest_size=8)
    folders = [FOLDER, FOLDER.parent / "kernels"] if is_source_tree() else [FOLDER]
    files = [file for folder in folders for kind in ("*.py", "*.so") for file in folder.rglob(kind)]
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()


def why_not_built() -> str:
    """Why there is no extension, in a few words."""
    left = record()
    if left.get("cause"):
        return str(left["cause"])
    if left:
        return f"it was, and is no longer in {FOLDER}"
    if is_source_tree():
        return f"nothing was built in the source tree {FOLDER.parent}"
    return f"nothing in {FOLDER} says why"


def how_to_mend() -> list[str]:
    """What to do to have the extension, the last a command."""
    first = record().get("mend")
    python = shlex.quote(sys.executable)
    if is_source_tree():
        folder = shlex.quote(str(FOLDER.parent))
        command = f"cd {folder} && METATTN_BUILD_EXT=1 {python} setup.py build_ext --inplace"
        needs = f"{python} -m pip install torch 'setuptools>=77' ninja pybind11"
        return [*([first] if first else []), needs, command]
    # pip keeps the wheel without the extension, and would install it again
    command = f"METATTN_BUILD_EXT=1 {python} -m pip install --no-deps --force-reinstall --no-cache-dir"
    installed = distribution()
    origin = _origin(installed) if installed else None
    if origin is None or origin.endswith(
        ".whl"
    ):  # a mere copy; a wheel has none, however often it is installed
        return [*([first] if first else []), f"cd FOLDER_OF_THE_SOURCES && {command} ."]
    return [*([first] if first else []), f"{command} {shlex.quote(origin or 'metattn')}"]


def distribution() -> metadata.Distribution | None:
    """The metadata of this package, not of another one that is installed besides; None for a mere clone."""
    for each in metadata.distributions(name="metattn"):
        if _folder(each) == FOLDER or (is_source_tree() and _origin(each) == str(FOLDER.parent)):
            return each
    return None


def hidden() -> list[Path]:
    """Other installations of metattn, which this one stands before on the path."""
    places = {_folder(each) for each in metadata.distributions(name="metattn")}
    return sorted(place for place in places - {FOLDER} if (place / "__init__.py").is_file())


def _folder(distribution: metadata.Distribution) -> Path:
    return Path(str(distribution.locate_file("metattn"))).resolve()


def _origin(distribution: metadata.Distribution) -> str:
    """The folder, file or address that it was installed from, as pip takes it, if pip has noted one."""
    noted = json.loads(distribution.read_text("direct_url.json") or "{}")
    url, version_control = str(noted.get("url", "")), noted.get("vcs_info")
    if version_control:
        inside = f"#subdirectory={noted['subdirectory']}" if noted.get("subdirectory") else ""
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}{inside}"
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme == "file" else url
