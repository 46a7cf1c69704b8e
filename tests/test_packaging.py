"""Every way to install, each into an environment of its own, imported from outside the source tree.

The environments hold nothing but what is installed into them; torch and the build tools are found through a
path file, so that no gigabytes are copied and no network is needed. Extensions are compiled unoptimised.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import build_backend
from metattn import cli

ROOT = Path(__file__).resolve().parents[1]
RECORD = "metattn/_build.json"
BUILD_TOOLS = ("torch", "setuptools", "wheel", "ninja", "pybind11")
# What a user of an installed package gets to see; run by the environment's interpreter, outside the tree.
SHOW = """
import json, sys, warnings
import metattn, metattn.kernels, torch
q = torch.randn(1, 2, 5, 4, requires_grad=True)
o = metattn.attention(q, q, q)
(g,) = torch.autograd.grad(o.sin().sum(), q, create_graph=True)
(h,) = torch.autograd.grad(g.square().sum(), q)
x = q.detach().clone().requires_grad_()
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
    w = torch.nn.functional.scaled_dot_product_attention(x.double(), x.double(), x.double())
(g,) = torch.autograd.grad(w.sin().sum(), x, create_graph=True)
(r,) = torch.autograd.grad(g.square().sum(), x)
long = torch.randn(1, 1, 1000, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        metattn.attention(long, long, long)
print(json.dumps({
    "version": metattn.__version__,
    "warnings": [str(warning.message) for warning in caught],
    "package": metattn.__file__,
    "kernels": metattn.kernels.__path__[0],
    "backends": metattn.available_backends(),
    "error": float((h - r).norm() / r.norm()),
}))
"""


def environment_without(**changes: str) -> dict[str, str]:
    """This process's environment, in which no source tree is importable."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def run(
    *command: str | Path, cwd: Path, check: bool = True, **changes: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment_without(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def copy_tree(target: Path) -> Path:
    """The source tree without what was built or installed in it."""
    ignored = (
        ".git",
        ".venv",
        "build",
        "dist",
        "*.so",
        "*.egg-info",
        "_build.json",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
    )
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*ignored))
    return target


class Environment:
    """A fresh virtual environment that sees this one's torch and build tools, and no package of its own."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / "bin/python"
        packages = next(folder.glob("lib/python*/site-packages"))
        places = {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in BUILD_TOOLS}  # type: ignore[union-attr, arg-type]
        (packages / "development.pth").write_text("\n".join(sorted(places)) + "\n")

    def install(self, *what: str | Path, cwd: Path, check: bool = True, **changes: str) -> str:
        offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", *offline)
        done = run(*pip, *what, cwd=cwd, check=check, **changes)
        return done.stdout + done.stderr

    def show(self) -> dict[str, object]:
        done = run(self.python, "-c", SHOW, cwd=self.folder)
        shown = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(shown, dict)
        return shown


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the record of a build in place, which is no archive's."""
    source = copy_tree(tmp_path_factory.mktemp("source") / "metattn-source")
    (source / RECORD).write_text('{"cause": "of another build"}')
    return source


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built in the tree, which keeps the objects for the build in place below."""
    target = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    run(sys.executable, "-c", code, cwd=tree, CXXFLAGS="-O0", METATTN_BUILD_EXT="1")
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})",
        cwd=tree,
    )
    return next(target.glob("*.tar.gz"))


def old_compiler(folder: Path, unknown: str, otherwise: str) -> str:
    """A compiler to which flags are unknown; with others it is another one."""
    compiler = folder / "old-c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{unknown}*) exit 1;; esac\nexec {otherwise} "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path / "environment")
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install(kind: str, fresh: Environment, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The wheel has every instruction set; the others are built for the least one, in half the time."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")))
    least = old_compiler(tmp_path, "-mavx", compiler)
    settings = {"CXX": least, "CXXFLAGS": "-O0", "METATTN_BUILD_EXT": "1"}
    if kind == "editable":
        source = copy_tree(tmp_path / "editable-source")
        fresh.install("--editable", source, cwd=tmp_path, **settings)
        home, kernels = source / "metattn", source / "kernels"
    else:
        archive: Path = request.getfixturevalue(kind)
        fresh.install(archive, cwd=tmp_path, **settings)
        home = next(fresh.folder.glob("lib/python*/site-packages")) / "metattn"
        kernels = home / "kernels"
    shown = fresh.show()
    assert Path(str(shown["package"])).parent == home
    assert Path(str(shown["kernels"])) == kernels
    assert shown["backends"]["cpu"] is None  # type: ignore[index]
    assert shown["error"] < 1e-5  # type: ignore[operator]
    assert shown["version"] == declared_version()
    assert not shown["warnings"]
    assert (home / "py.typed").is_file()
    assert json.loads((home / "_build.json").read_text())["cause"] is None
    script = run(fresh.folder / "bin/metattn", "doctor", "--json", cwd=fresh.folder)
    report = json.loads(script.stdout)
    assert report["ok"]
    assert (report["package"], report["hidden"], report["mend"]) == (str(home), [], [])
    assert report["machine"]["versions"]["metattn"] == declared_version()
    assert report["build"]["torch_target"] == "2.10"


def declared_version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_release_is_one_everywhere() -> None:
    """The version and its date, or that it is not released."""
    changes, readme, citation = (
        (ROOT / name).read_text() for name in ("CHANGELOG.md", "README.md", "CITATION.cff")
    )
    heading = re.search(r"^## (\S+), (not released|\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert heading is not None
    version, date = heading[1], heading[2]
    assert version == declared_version()
    assert f"\nversion: {version}\n" in citation
    status = re.search(r"^Status: (\d+\.\d+\.\d+)(, not released)?\.", readme, re.MULTILINE)
    assert status is not None
    assert status[1] == version
    assert (status[2] is not None) == (date == "not released")
    released = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert (released and released[1]) == (None if date == "not released" else date)


@pytest.mark.parametrize("command", cli.EXTRAS)
def test_commands_ask_for_what_the_extras_do(command: str) -> None:
    found = re.search(rf"^{command} = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert found is not None
    assert json.loads(found[1]) == list(cli.EXTRAS[command])


def test_archives_hold_what_they_should(wheel: Path, sdist: Path) -> None:
    in_wheel = zipfile.ZipFile(wheel).namelist()
    assert "metattn/kernels/__init__.py" in in_wheel
    assert "metattn/py.typed" in in_wheel
    assert "metattn/libmetattn_cpu.so" in in_wheel
    assert f"metattn/_host{sysconfig.get_config_var('EXT_SUFFIX')}" in in_wheel
    platform_tag = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.name == f"metattn-{declared_version()}-py3-none-{platform_tag}.whl"  # for every Python
    assert RECORD in in_wheel
    tops = {name.split("/")[0] for name in in_wheel}
    assert tops == {"metattn", f"metattn-{declared_version()}.dist-info"}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {"csrc/cpu/pairs.cpp", "csrc/cuda/bf16.cu"} <= sources  # which the installation above leaves out
    assert {
        *sources,
        "kernels/__init__.py",
        "setup.py",
        "build_backend.py",
        "LICENSE",
        "README.md",
    } <= in_sdist
    assert not [name for name in in_sdist if name.endswith((".so", ".o", ".pyc", "_build.json"))]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"METATTN_BUILD_EXT": "0"}, "METATTN_BUILD_EXT=0 was set"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler (/nowhere/c++ is not on the PATH)"),
        ({"PATH": "/nowhere"}, "no C++ compiler (g++ and clang++ are not on the PATH)"),
    ],
    ids=["asked for", "CXX names nothing", "nothing on the PATH"],
)
def test_pure_python_install(changes: dict[str, str], cause: str, fresh: Environment, tmp_path: Path) -> None:
    """It works, slowly; a large call, the backend's reason and doctor say why, doctor what helps."""
    source = copy_tree(tmp_path / "source")
    fresh.install(source, cwd=tmp_path, **changes)
    shown = fresh.show()
    assert str(fresh.folder) in str(shown["package"])
    assert str(fresh.folder) in str(shown["kernels"])
    assert f"not built: {cause}" in shown["backends"]["cpu"]  # type: ignore[index]
    assert shown["backends"]["cuda"] == shown["backends"]["cpu"]  # type: ignore[index]
    assert shown["backends"]["reference"] is None  # type: ignore[index]
    assert shown["error"] < 1e-5  # type: ignore[operator]
    assert len(shown["warnings"]) == 1  # type: ignore[arg-type]
    assert re.search(
        rf"1000×1000 scores goes to the reference.*cpu: .*{re.escape(cause)}",
        shown["warnings"][0],  # type: ignore[index]
    )
    doctor = run(fresh.folder / "bin/metattn", "doctor", cwd=fresh.folder, check=False)
    assert doctor.returncode == 1
    home = next(fresh.folder.glob("lib/python*/site-packages")) / "metattn"
    assert f"folder       {home}\n" in doctor.stdout
    assert f"not built: {cause}\n" in doctor.stdout
    assert ("to have it: install g++ or clang++\n" in doctor.stdout) == ("compiler" in cause)
    command = f"{fresh.python} -m pip install --no-deps --force-reinstall --no-cache-dir {source}\n"
    assert f"to have it: METATTN_BUILD_EXT=1 {command}" in doctor.stdout
    assert "problem: no fused backend works here" in doctor.stdout
    if "PATH" in changes:  # once: a clone before the installation on the path
        doctor = run(fresh.python, "-m", "metattn", "doctor", cwd=source, check=False)
        assert f"folder       {source / 'metattn'}\n  hides        {home}\n" in doctor.stdout
        assert f"not built: nothing was built in the source tree {source}\n" in doctor.stdout
        build = f"METATTN_BUILD_EXT=1 {fresh.python} setup.py build_ext --inplace\n"
        assert f"to have it: cd {source} && {build}" in doctor.stdout
        assert f"problem: this is {source / 'metattn'}, and hides the installation in {home}" in doctor.stdout


def test_asked_for_extension_without_compiler_is_an_error(fresh: Environment, tmp_path: Path) -> None:
    said = fresh.install(
        copy_tree(tmp_path / "source"), cwd=tmp_path, check=False, METATTN_BUILD_EXT="1", CXX="/nowhere/c++"
    )
    assert "the extension did not build: no C++ compiler (/nowhere/c++" in said


@pytest.mark.usefixtures(
    "wheel"
)  # its objects are used again, which also shows that ninja finds them up to date
def test_build_in_place_and_again(tree: Path) -> None:
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    run(*build, cwd=tree, CXXFLAGS="-O0", METATTN_BUILD_EXT="1")
    assert (tree / "metattn/libmetattn_cpu.so").is_file()
    shown = json.loads(run(sys.executable, "-c", SHOW, cwd=tree).stdout.splitlines()[-1])
    assert Path(shown["package"]).parent == tree / "metattn"
    assert Path(shown["kernels"]) == tree / "kernels"
    assert shown["backends"]["cpu"] is None
    make = ("make", "build", f"PYTHON={sys.executable}")
    run(*make, cwd=tree, CXXFLAGS="-O0", METATTN_EMULATION="0")
    start = time.perf_counter()
    again = run(*make, cwd=tree, CXXFLAGS="-O0", METATTN_EMULATION="0")
    assert time.perf_counter() - start < 5
    assert "setup.py" not in again.stdout


# A build in the tree whose modules named here are missing.
MISSING = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
sys.argv = ["setup.py", "build_ext", "--build-temp", sys.argv[2], "--build-lib", sys.argv[2]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("missing", "changes", "said"),
    [
        ("ninja", {}, "ninja is missing; pip install ninja 'pybind11>=2.12' first"),
        ("pybind11", {}, "pybind11 is missing; pip install ninja"),
        ("nothing", {"CXX": "/bin/false"}, "ninja ended with 1, the reason is above"),
        ("nothing", {"METATTN_BUILD_EXT": "yes"}, "expected one of auto, 0, 1, got 'yes'"),
    ],
)
def test_what_keeps_from_building_is_an_error(
    missing: str, changes: dict[str, str], said: str, tree: Path, tmp_path: Path
) -> None:
    """Where there is a compiler, in the default setting; it says how to do without."""
    settings = {"METATTN_BUILD_EXT": "", "CXX": "", **changes}
    done = run(sys.executable, "-c", MISSING, missing, tmp_path, cwd=tree, check=False, **settings)
    assert done.returncode != 0
    assert f": {said}" in done.stderr
    assert "METATTN_BUILD_EXT=0 installs without it" in done.stderr or "METATTN_BUILD_EXT" in changes
    assert "Traceback" not in done.stderr


def test_requirements_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is brought where the environment has none that serves, tools where something is built."""
    tools = ["ninja", "pybind11>=2.12"]
    for variable in ("METATTN_BUILD_EXT", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build_backend, "obstacle", lambda: None)
    assert build_backend.requirements() == tools
    # an isolated build: nothing is importable, the environment's folders are known
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert build_backend.requirements() == [*tools, "torch>=2.10"]
    (tmp_path / "torch").mkdir()
    for version, served in (("2.9.1", False), ("2.10.0+cpu", True), ("3.0.0a0", True)):
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
        assert build_backend.requirements() == (tools if served else [*tools, "torch>=2.10"])
        if served:
            assert build_backend.torch_root() == tmp_path / "torch"
        else:
            with pytest.raises(LookupError, match=r"torch is 2\.9\.1"):
                build_backend.torch_root()
    monkeypatch.setenv("METATTN_BUILD_EXT", "0")
    assert build_backend.requirements() == []
    assert build_backend.get_requires_for_build_wheel() == []
    monkeypatch.undo()
    monkeypatch.delenv("METATTN_BUILD_EXT", raising=False)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert build_backend.requirements() == []
    monkeypatch.setenv("METATTN_BUILD_EXT", "1")  # the build says that there is no compiler
    assert build_backend.requirements() == []
    monkeypatch.delenv("METATTN_BUILD_EXT")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build_backend.obstacle() == (
        "the extension is built on Linux, this is darwin",
        "try METATTN_BUILD_EXT=1",
    )
    needed = (ROOT / "pyproject.toml").read_text()
    assert f'requires = ["setuptools>={build_backend.OLDEST_SETUPTOOLS}"]' in needed
    assert f"torch>={'.'.join(map(str, build_backend.OLDEST_TORCH))}" in needed


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"METATTN_CUDA": "1", "NVCC": "/nowhere/nvcc"}, "METATTN_CUDA=1, and nvcc is not found"),
        ({"METATTN_CUDA": "yes"}, "METATTN_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_is_an_error(tree: Path, changes: dict[str, str], said: str) -> None:
    done = run(
        sys.executable, "setup.py", "build_ext", cwd=tree, check=False, METATTN_BUILD_EXT="1", **changes
    )
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "9.0 ten"}, "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0"}, "compute capability 7.5 is the lowest served, got 7.0"),
        ({"METATTN_CUDA_VERSION": "1.0"}, "METATTN_CUDA_VERSION is 1.0, nvcc's is "),
    ],
)
def test_wrong_cuda_settings_are_errors(tree: Path, changes: dict[str, str], said: str) -> None:
    settings = {"METATTN_BUILD_EXT": "1", "METATTN_CUDA": "1", **changes}
    done = run(sys.executable, "setup.py", "build_ext", cwd=tree, check=False, **settings)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_compiler_without_an_instruction_sets_flags_leaves_it_out(tmp_path: Path) -> None:
    """gcc 10 knows no -mamx-tile: bfloat16 is then left to the next instruction set."""
    compiler = old_compiler(tmp_path, "-mamx-", "true")
    show = (
        "import runpy, sys\n"
        "sys.argv = ['setup.py', '--version']\n"
        "isas = runpy.run_path('setup.py')['isas']\n"
        "print(*isas([{!r}]), sep=',')"
    )
    listed = run(sys.executable, "-c", show.format(compiler), cwd=ROOT).stdout.splitlines()[-1].split(",")
    every = run(sys.executable, "-c", show.format("true"), cwd=ROOT).stdout.splitlines()[-1].split(",")
    assert listed == [isa for isa in every if isa != "amx"]
    assert "baseline" in listed
