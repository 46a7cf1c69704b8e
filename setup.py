"""The extension build; metadata is in pyproject.toml, so that reading it needs neither torch nor a compiler.

Two artefacts, both linked by one ninja file: `metattn/libmetattn_cpu.so`, the operators against LibTorch's
stable ABI (any torch >= 2.10, any Python), and `metattn._host`, the pybind11 module that tells about them.

Environment: METATTN_BUILD_EXT=0 builds none (pure Python), =1 makes a failed build an error; unset, a failed
build warns and leaves the pure-Python package. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are honoured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY = "metattn.libmetattn_cpu"
HOST_MODULE = "metattn._host"
# Compiled once for each ISA: the micro-kernels, and the four maps on them.
PER_ISA = ("gemm", "forward", "vjp", "jvp", "vjp_jvp")
# The oldest libtorch whose stable ABI the operators use.
TORCH_TARGET = (2, 10)

X86_ISAS = {
    "baseline": ["-DMETATTN_VECTOR_BYTES=16"],
    "avx2": ["-DMETATTN_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DMETATTN_VECTOR_BYTES=64",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
OTHER_ISAS = {"baseline": ["-DMETATTN_VECTOR_BYTES=16"]}


class BuildError(Exception):
    """Why the extension cannot be built here."""


def isas() -> dict[str, list[str]]:
    return X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_ISAS


def torch_root() -> Path:
    # found, not imported: torch's import takes seconds, its folder is all the build needs
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not importable by the building interpreter; install it first and build with "
            "--no-build-isolation"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{root} has no stable-ABI headers; torch >= 2.10 is needed")
    return root


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for all objects (each ISA has flags of its own) and runs it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(CPU_LIBRARY.rpartition(".")[2]):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        try:
            self._ninja()
        except (BuildError, OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("METATTN_BUILD_EXT") == "1":
                raise SystemExit(f"metattn: the extension did not build: {error}") from error
            print(f"metattn: WARNING: built without the extension: {error}", file=sys.stderr)
            self.extensions = []
            return
        if self.inplace:
            for extension in self.extensions:  # a running process keeps the file it has mapped
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.copy_extensions_to_source()

    def _ninja(self) -> None:
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        found = next(filter(shutil.which, ("g++", "clang++")), "")
        compiler = shlex.split(os.environ.get("CXX", "")) or [found]
        if not compiler[0] or shutil.which(compiler[0]) is None:
            raise BuildError(f"no C++ compiler ({compiler[0] or 'g++, clang++'} is not on the PATH)")
        torch = torch_root()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(CPU_LIBRARY)).resolve()
        host = Path(self.get_ext_fullpath(HOST_MODULE)).resolve()
        if self.inplace:  # setuptools copies from build_lib to the source tree afterwards
            library = (Path(self.build_lib) / self.get_ext_filename(CPU_LIBRARY)).resolve()
            host = (Path(self.build_lib) / self.get_ext_filename(HOST_MODULE)).resolve()

        major, minor = TORCH_TARGET
        flags = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        flags += [f"-ffile-prefix-map={ROOT}=.", f"-I{ROOT / 'csrc'}"]
        if platform.machine() == "x86_64" and not sysconfig.get_platform().startswith("macosx"):
            flags.append("-Wno-psabi")
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        torch_flags = [
            f"-DTORCH_TARGET_VERSION=0x{(major << 56) | (minor << 48):016x}",
            f"-isystem{torch / 'include'}",
        ]
        host_flags = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
        host_flags += [f'-DMETATTN_TORCH_TARGET="{major}.{minor}"', f'-DMETATTN_ISAS="{",".join(isas())}"']
        link = [*shlex.split(os.environ.get("LDFLAGS", "")), "-shared"]
        if sys.platform == "linux":
            link.append("-Wl,-z,defs")

        with (build / "build.ninja").open("w") as handle:
            ninja = ninja_syntax.Writer(handle)
            ninja.rule(
                "cxx",
                f"{shlex.join(compiler)} -MMD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out",
                deps="gcc",
                depfile="$out.d",
                description="CXX $out",
            )
            ninja.rule(
                "link", f"{shlex.join([*compiler, *link])} $in -o $out $flags", description="LINK $out"
            )

            def compile_object(source: str, name: str, extra: list[str]) -> str:
                path = str(ROOT / "csrc" / source)
                ninja.build([f"{name}.o"], "cxx", [path], variables={"flags": shlex.join(extra)})
                return f"{name}.o"

            isa_macros = [f"-DMETATTN_HAS_{isa.upper()}" for isa in isas()]
            objects = [
                compile_object("ops.cpp", "ops", torch_flags),
                compile_object("cpu/dispatch.cpp", "dispatch", isa_macros),
                compile_object("cpu/finish.cpp", "finish", ["-DMETATTN_ISA=baseline", *isas()["baseline"]]),
            ]
            for isa, isa_flags in isas().items():
                for name in PER_ISA:
                    extra = [f"-DMETATTN_ISA={isa}", *isa_flags]
                    objects.append(compile_object(f"cpu/{name}.cpp", f"{name}_{isa}", extra))
            libdir = torch / "lib"
            library_flags = [f"-L{libdir}", "-ltorch_cpu", f"-Wl,-soname,{library.name}"]
            host_link = f"-Wl,-rpath,'$$ORIGIN' {shlex.quote(f'-Wl,-rpath-link,{libdir}')} -Wl,-z,undefs"
            ninja.build(
                [str(library)],
                "link",
                objects,
                variables={"flags": shlex.join(library_flags)},
            )
            ninja.build(
                [str(host)],
                "link",
                [compile_object("host.cpp", "host", host_flags), str(library)],
                variables={"flags": host_link},
            )
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS")
        options = [*(["-j", jobs] if jobs else []), *(["-v"] if self.verbose > 1 else [])]
        subprocess.run([str(Path(BIN_DIR) / "ninja"), *options], cwd=build, check=True)


setup(
    package_dir={"metattn.kernels": "kernels"},
    packages=[
        "metattn",
        "metattn.backends",
        "metattn.cli",
        "metattn.integrations",
        "metattn.kernels",
        "metattn.meta",
        "metattn.nn",
    ],
    package_data={"metattn": ["py.typed", "*.pyi"]},
    ext_modules=[]
    if os.environ.get("METATTN_BUILD_EXT") == "0"
    else [Extension(CPU_LIBRARY, [], optional=True), Extension(HOST_MODULE, [], optional=True)],
    cmdclass={"build_ext": NinjaBuildExt},
)
