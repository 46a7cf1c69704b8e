"""The extension build; metadata is in pyproject.toml, so that reading it needs neither torch nor a compiler.

All linked by one ninja file: `metattn/libmetattn_cpu.so`, the operators against LibTorch's stable ABI (any
torch >= 2.10, any Python), `metattn/libmetattn_cuda.so`, the same operators on NVIDIA GPUs, and
`metattn._host`, the pybind11 module that tells about them. That is for the Python that builds; under others
metattn.host asks the first library, so that one wheel serves all.

Environment: METATTN_BUILD_EXT=0 builds none (pure Python); unset or auto, none is built where there is no
compiler, and =1 makes that an error. Whatever else goes wrong is an error. Why something was not built is
kept in metattn/_build.json, for `metattn doctor` and for the reasons of backends that are not there.
METATTN_CUDA=1 builds the CUDA library, whatever torch is installed, =0 does not; unset, it is built where
torch was built with CUDA and nvcc is found. METATTN_CUDA_VERSION refuses another nvcc. METATTN_EMULATION=1
builds, for tests alone, build/libmetattn_emulated.so: the CUDA kernels on CPU tensors; =thread one that
ThreadSanitizer watches.
CUDA_HOME, NVCC, TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"), CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are honoured.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

import build_backend

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY = "metattn.libmetattn_cpu"
CUDA_LIBRARY = "metattn.libmetattn_cuda"
HOST_MODULE = "metattn._host"
# One translation unit each: they compile side by side.
CUDA_DTYPES = ("bf16", "f16", "f32", "tf32", "f64")
CUDA_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
# METATTN_EMULATION → stem of names, flags
EMULATIONS: dict[str, tuple[str, list[str]]] = {
    "0": ("", []),
    "1": ("emulated", []),
    "thread": ("watched", ["-fsanitize=thread", "-g"]),
}
# Compiled once for each ISA: the four maps, and the micro-kernels they stand on.
MAPS = ("forward", "vjp", "jvp", "vjp_jvp", "double_backward")
# The oldest libtorch whose stable ABI the operators use.
TORCH_TARGET = build_backend.OLDEST_TORCH
WITHOUT = (
    "METATTN_BUILD_EXT=0 installs without it: fused on GPUs, by Triton; on CPUs right, but slow and with N×M "
    "matrices in memory"
)
ASKED_FOR_NONE = "METATTN_BUILD_EXT=0 was set"

AVX512 = [
    "-DMETATTN_VECTOR_BYTES=64",
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
    *(
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ),  # of intrinsics that start from an undefined register: gcc's bug 105593
]
X86_ISAS = {
    "baseline": ["-DMETATTN_VECTOR_BYTES=16"],
    "avx2": ["-DMETATTN_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    # bfloat16 alone: their other dtypes are avx512's
    "avx512_bf16": [*AVX512, "-DMETATTN_PAIRS", "-mavx512bf16"],
    "amx": [*AVX512, "-DMETATTN_PAIRS", "-DMETATTN_TILES", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
BFLOAT16_ISAS = ("avx512_bf16", "amx")
OTHER_ISAS = {"baseline": ["-DMETATTN_VECTOR_BYTES=16"]}


class BuildError(Exception):
    """Why the extension cannot be built here."""


def isas(compiler: list[str]) -> dict[str, list[str]]:
    """Those that the compiler has the flags of: gcc 10, for one, knows no AMX."""
    known = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_ISAS

    def compiles(flags: list[str]) -> bool:
        command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    missing = [isa for isa, flags in known.items() if isa != "baseline" and not compiles(flags)]
    if missing:
        print(f"{compiler[0]} does not compile for {', '.join(missing)}: they are left out")
    return {isa: flags for isa, flags in known.items() if isa not in missing}


def torch_root() -> Path:
    try:
        root = build_backend.torch_root()
    except LookupError as error:
        needed = ".".join(map(str, TORCH_TARGET))
        raise BuildError(
            f"torch {needed} or later is needed, and {error}; pip install 'torch>={needed}' first"
        ) from error
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{root} has no stable-ABI headers; pip install --force-reinstall torch first")
    return root


def record(folder: Path, **reasons: str | None) -> None:
    """Keep with the package why it has no extension (cause) and what helps (mend), or why it has no CUDA."""
    path = folder / "metattn" / "_build.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(reasons, indent=1) + "\n")


def torch_has_cuda() -> bool:
    found = re.search(r"^cuda\b.*=\s*['\"]", (torch_root() / "version.py").read_text(), re.MULTILINE)
    return found is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC") or (str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    return shutil.which(named)


def why_no_cuda() -> str | None:
    """Why the CUDA library shall not be built, or None. Raises BuildError where it must be and cannot."""
    asked = os.environ.get("METATTN_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise BuildError(f"METATTN_CUDA: expected auto, 0 or 1, got {asked!r}")
    if asked == "1" and find_nvcc() is None:
        raise BuildError("METATTN_CUDA=1, and nvcc is not found: set CUDA_HOME, or put it on the PATH")
    if asked == "0":
        return "METATTN_CUDA=0 was set"
    if asked == "auto" and not torch_has_cuda():
        return "the torch that it was built with has none"
    if asked == "auto" and find_nvcc() is None:
        return "nvcc was not found (CUDA_HOME, PATH)"
    version = os.environ.get("METATTN_CUDA_VERSION", "")
    if version and version != cuda_version():
        raise BuildError(f"METATTN_CUDA_VERSION is {version}, nvcc's is {cuda_version()}")
    return None


def cuda_home() -> Path:
    """Where nvcc's headers and libraries are: what is on the PATH may be a link or a script."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as source:
        command = [str(find_nvcc()), "--dryrun", "-c", source.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    if found is None:
        raise BuildError("nvcc --dryrun does not say where CUDA is")
    return Path(found[1]).resolve()


def answer(question: str) -> str:
    """What nvcc says."""
    return subprocess.run([str(find_nvcc()), question], capture_output=True, text=True, check=True).stdout


def known_architectures() -> str:
    """Those of CUDA_ARCHITECTURES that nvcc knows, PTX for the last."""
    known = answer("--list-gpu-code")
    entries = [entry.removesuffix("+PTX") for entry in CUDA_ARCHITECTURES.split()]
    served = [entry for entry in entries if f"sm_{entry.replace('.', '')}" in known.split()]
    if not served:
        raise BuildError(f"nvcc knows none of {CUDA_ARCHITECTURES}")
    return " ".join(served) + "+PTX"


def cuda_version() -> str:
    """Of nvcc, as 13.0."""
    text = answer("--version")
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise BuildError(f"nvcc says no version: {text}")
    return found[1]


def code_generation(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0 9.0+PTX".

    Compiling to PTX is half the time, and done once for all GPUs of a major version.
    """
    flags: list[str] = []
    entries = re.split(r"[\s,;]+", architectures.strip())
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if found is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got {entry!r}")
        number = found[1] + found[2] + found[3]
        if int(found[1] + found[2]) < 75:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: compute capability 7.5 is the lowest served, got {entry}"
            )
        minors = [int(other[1]) for other in (re.match(rf"{found[1]}\.(\d)", e) for e in entries) if other]
        base = number if found[3] else f"{found[1]}{min(minors)}"
        flags.append(f"-gencode=arch=compute_{base},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{base},code=compute_{base}")
    return flags


def failed(why: object) -> SystemExit:
    if isinstance(why, subprocess.CalledProcessError):
        why = f"{Path(why.cmd[0]).name} ended with {why.returncode}, the reason is above"
    return SystemExit(f"metattn: the extension did not build: {why}. {WITHOUT}")


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for all objects (each ISA has flags of its own) and runs it."""

    def get_ext_filename(self, fullname: str) -> str:
        if any(fullname.endswith(name.rpartition(".")[2]) for name in (CPU_LIBRARY, CUDA_LIBRARY)):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        choice, obstacle = build_backend.asked(), build_backend.obstacle()
        if choice == "0":  # here by `setup.py build_ext` alone; otherwise BuildPy records it
            record(self._folder(), cause=ASKED_FOR_NONE)
            return
        if obstacle is not None:
            cause, mend = obstacle
            if choice == "1":
                raise SystemExit(f"metattn: the extension did not build: {cause}; {mend}")
            print(f"metattn: WARNING: built without the extension: {cause}. {WITHOUT}", file=sys.stderr)
            for name in (CPU_LIBRARY, CUDA_LIBRARY, HOST_MODULE):  # those of an earlier build
                for path in (self._place(name), Path(self.get_ext_fullpath(name))):
                    path.unlink(missing_ok=True)
            self.extensions = []
            record(self._folder(), cause=cause, mend=mend)
            return
        try:
            no_cuda = why_no_cuda()
            self._build(no_cuda is None)
        except subprocess.CalledProcessError as error:
            if no_cuda is not None or os.environ.get("METATTN_CUDA") == "1":
                raise failed(error) from error
            print("metattn: WARNING: the CUDA library did not build; without it:", file=sys.stderr)
            no_cuda = "its CUDA library did not compile; METATTN_CUDA=1 makes that an error"
            try:
                self._build(False)
            except subprocess.CalledProcessError as again:
                raise failed(again) from again
        except ModuleNotFoundError as error:
            tools = shlex.join(build_backend.TOOLS)
            needed = f"{error.name} is missing; pip install {tools} first, or leave out --no-build-isolation"
            raise failed(needed) from error
        except (BuildError, OSError) as error:
            raise failed(error) from error
        record(self._folder(), cause=None, cuda=no_cuda)
        if self.inplace:
            for extension in self.extensions:  # a running process keeps the file it has mapped
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.copy_extensions_to_source()

    def _build(self, with_cuda: bool) -> None:
        self.with_cuda = with_cuda
        if not with_cuda:
            self._drop_cuda()
        self._ninja()

    def _ninja(self) -> None:
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        compiler = build_backend.compiler()
        built_isas = isas(compiler)
        torch = torch_root()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library, cuda_library, host = map(self._place, (CPU_LIBRARY, CUDA_LIBRARY, HOST_MODULE))

        major, minor = TORCH_TARGET
        flags = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        flags += [f"-ffile-prefix-map={ROOT}=.", f"-I{ROOT / 'csrc'}"]
        # wherever the environment is, the library comes out the same
        places = {"torch": torch, "pybind11": Path(pybind11.get_include())}
        flags += [f"-ffile-prefix-map={place}={name}" for name, place in places.items()]
        if platform.machine() == "x86_64" and not sysconfig.get_platform().startswith("macosx"):
            flags.append("-Wno-psabi")
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        torch_flags = [
            f"-DTORCH_TARGET_VERSION=0x{(major << 56) | (minor << 48):016x}",
            f"-isystem{torch / 'include'}",
        ]
        host_flags = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
        facts = [f'-DMETATTN_TORCH_TARGET="{major}.{minor}"']
        if self.with_cuda:
            facts.append(f'-DMETATTN_CUDA="{cuda_version()}"')
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

            isa_macros = [f"-DMETATTN_HAS_{isa.upper()}" for isa in built_isas]
            objects = [
                compile_object("ops.cpp", "ops", torch_flags),
                compile_object("facts.cpp", "facts", facts),
                compile_object("cpu/dispatch.cpp", "dispatch", isa_macros),
                compile_object(
                    "cpu/finish.cpp", "finish", ["-DMETATTN_ISA=baseline", *built_isas["baseline"]]
                ),
            ]
            for isa, isa_flags in built_isas.items():
                for name in ("pairs" if isa in BFLOAT16_ISAS else "gemm", *MAPS):
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
            emulation = os.environ.get("METATTN_EMULATION", "0")
            if emulation not in EMULATIONS:
                raise BuildError(
                    f"METATTN_EMULATION: expected one of {', '.join(EMULATIONS)}, got {emulation!r}"
                )
            if emulation != "0":
                stem, checks = EMULATIONS[emulation]
                objects = [
                    compile_object(f"cuda/{dtype}.cu", f"{stem}_{dtype}", ["-O1", *checks, "-x", "c++"])
                    for dtype in CUDA_DTYPES
                ]
                extra = [*torch_flags, "-DMETATTN_EMULATED", *checks]
                objects.append(compile_object("cuda/ops.cpp", f"{stem}_ops", extra))
                ninja.build(
                    [str(ROOT / "build" / f"libmetattn_{stem}.so")],
                    "link",
                    objects,
                    variables={"flags": shlex.join([*checks, f"-L{libdir}", "-ltorch_cpu", "-lpthread"])},
                )
            if self.with_cuda:
                self._cuda(ninja, build, cuda_library, compiler, flags, torch_flags, libdir)
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS")
        options = [*(["-j", jobs] if jobs else []), *(["-v"] if self.verbose > 1 else [])]
        subprocess.run([str(Path(BIN_DIR) / "ninja"), *options], cwd=build, check=True)

    def _drop_cuda(self) -> None:
        self.extensions = [each for each in self.extensions if each.name != CUDA_LIBRARY]
        if self.inplace:  # one of an earlier build may not fit the operators of this one
            Path(self.get_ext_fullpath(CUDA_LIBRARY)).unlink(missing_ok=True)

    def _folder(self) -> Path:
        return ROOT if self.inplace else Path(self.build_lib)

    def _place(self, name: str) -> Path:
        if self.inplace:  # setuptools copies from build_lib to the source tree afterwards
            return (Path(self.build_lib) / self.get_ext_filename(name)).resolve()
        return Path(self.get_ext_fullpath(name)).resolve()

    def _cuda(
        self,
        ninja: Any,
        build: Path,
        library: Path,
        compiler: list[str],
        flags: list[str],
        torch_flags: list[str],
        libdir: Path,
    ) -> None:
        """What makes the CUDA library: cudart is in it, libcuda and libtorch_cuda come with torch."""
        nvcc = str(find_nvcc())
        home = cuda_home()
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures()
        nvcc_flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
        if "--compress-mode" in answer("--help"):
            nvcc_flags.append("--compress-mode=size")
        nvcc_flags += ["-Xptxas=-v", "-ccbin", compiler[0], f"-I{ROOT / 'csrc'}"]
        nvcc_flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *code_generation(architectures)]
        # ptxas says registers and spills of every kernel: benchmarks/cuda_build.py reads them
        ninja.rule(
            "nvcc",
            f"{shlex.join([nvcc, *nvcc_flags])} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 "
            "|| (cat $out.log; false)",
            deps="gcc",
            depfile="$out.d",
            description="NVCC $out",
        )
        objects = []
        for dtype in CUDA_DTYPES:
            source = str(ROOT / "csrc/cuda" / f"{dtype}.cu")
            ninja.build([f"cuda_{dtype}.o"], "nvcc", [source])
            objects.append(f"cuda_{dtype}.o")
        more = [*torch_flags, f"-isystem{home / 'include'}", "-DUSE_CUDA"]
        ninja.build(
            ["cuda_ops.o"],
            "cxx",
            [str(ROOT / "csrc/cuda/ops.cpp")],
            variables={"flags": shlex.join(more)},
        )
        # a CPU build of torch has no libtorch_cuda to link: one of that name with the one symbol stands in
        (build / "torch_cuda.c").write_text("int aoti_torch_get_current_cuda_stream(void) { return 1; }\n")
        ninja.rule(
            "stand_in",
            f"{shlex.join(compiler)} -x c -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out",
            description="LINK $out",
        )
        ninja.build(["libtorch_cuda.so"], "stand_in", ["torch_cuda.c"])
        runtime = next(
            (str(path) for path in home.glob("**/libcudart_static.a")), str(home / "lib64/libcudart_static.a")
        )
        link_flags = [f"-L{libdir}", "-L.", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch_cuda"]
        link_flags += [runtime, "-ldl", "-lrt", "-lpthread", f"-Wl,-soname,{library.name}"]
        ninja.build(
            [str(library)],
            "link",
            [*objects, "cuda_ops.o"],
            implicit=["libtorch_cuda.so"],
            variables={"flags": shlex.join(link_flags)},
        )


class BuildPy(build_py):
    """Records that no extension was asked for, where no build_ext runs."""

    def run(self) -> None:
        super().run()
        if build_backend.asked() == "0":
            record(ROOT if self.editable_mode else Path(self.build_lib), cause=ASKED_FOR_NONE)


class WheelForEveryPython(bdist_wheel):
    """The libraries need no Python, and `metattn._host` is looked for only by the one that built it."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    package_dir={"metattn.kernels": "kernels"},
    packages=[
        "metattn",
        "metattn.backends",
        "metattn.backends.triton",
        "metattn.bench",
        "metattn.cli",
        "metattn.integrations",
        "metattn.integrations.transformers",
        "metattn.kernels",
        "metattn.meta",
        "metattn.nn",
    ],
    package_data={"metattn": ["py.typed", "*.pyi"]},
    ext_modules=[]
    if build_backend.asked() == "0"
    else [Extension(name, [], optional=True) for name in (CPU_LIBRARY, CUDA_LIBRARY, HOST_MODULE)],
    cmdclass={"bdist_wheel": WheelForEveryPython, "build_ext": NinjaBuildExt, "build_py": BuildPy},
)
