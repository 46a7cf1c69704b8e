"""What nvcc made of csrc/cuda: registers, spills, tensor-core instructions of every kernel and architecture.

    METATTN_CUDA=1 python setup.py build_ext --inplace
    python -m benchmarks.cuda_build [--build build] [--out benchmarks/results]

Reads what the build left behind (`--build build/wheel-cu130`: that of a wheel): no GPU takes part. A kernel
that spills on sm_80 or sm_90, and one of two-byte floats or TF32 without a tensor-core instruction,
is named, and ends this with 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine_code import MMA, tool
from metattn.bench.files import json_text

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
NAME = re.compile(r"pass_kernel<(?:\w+::|\(anonymous namespace\)::)*(\w+)<(.*)> >")
DTYPES = {
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
    "float": "float32",
    "metattn::cuda::Tf32": "tf32",
    "double": "float64",
}
CHECKED = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    target: str
    dtype: str
    name: str
    features: int  # of results that a block has in registers; heads that are wider take several
    partners: int  # queries, or keys, that a block visits at a time
    options: bool  # whether it knows masks, biases, softcap, ALiBi and dropout
    registers: int
    spilled: int  # bytes a thread stores
    tensor_instructions: int


def parsed(symbol: str) -> tuple[str, str, int, int, bool] | None:
    """(dtype, kernel, features, partners, options) of a pass; None: a sum, which has no tiles."""
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = NAME.search(plain)
    if found is None:
        return None
    dtype, *rest = (part.strip() for part in found[2].split(","))
    numbers = [int(part) for part in rest if part.isdigit()]
    flags = [part == "true" for part in rest if part in ("true", "false")]
    kernel = found[1]
    if kernel == "BiasSums":
        kernel, features, tiles, options = f"BiasSums{order(flags[0])}", 0, numbers[0], True
    else:
        features, tiles, options = 8 * numbers[0], numbers[1], flags[0]
        if kernel.startswith("Gradient"):
            kernel += order(flags[1])
    return DTYPES[dtype], kernel, features, (16 if kernel == "ForwardRows" else 8) * tiles, options


def order(second: bool) -> str:
    return ", second order" if second else ", first order"


def is_empty(target: str, dtype: str, name: str, features: int, partners: int, options: bool) -> bool:
    """sm_75 has no TF32; of bfloat16, which has no tensor cores there, only the kernels with options."""
    return target == "sm_75" and (dtype == "tf32" or (dtype == "bfloat16" and not options))


def seconds(folder: Path) -> dict[str, float]:
    """Source → how long nvcc took for it."""
    lines = [line.split("\t") for line in (folder / ".ninja_log").read_text().splitlines()[1:]]
    latest = {line[3]: (int(line[1]) - int(line[0])) / 1000 for line in lines if line[3].startswith("cuda_")}
    return {name.removeprefix("cuda_").removesuffix(".o"): took for name, took in latest.items()}


def tensor_counts(obj: Path) -> dict[tuple[str, str], int]:
    """(target, symbol) → tensor-core instructions."""
    sass = subprocess.run(
        [tool("cuobjdump"), "-sass", obj], capture_output=True, text=True, check=True
    ).stdout
    counts: dict[tuple[str, str], int] = {}
    target = symbol = ""
    for line in sass.splitlines():
        if line.strip().startswith("code for "):
            target = line.split()[2]
        elif (at := line.find("Function : ")) >= 0:
            symbol = line[at + 11 :].strip()
            counts[target, symbol] = 0
        elif symbol and "MMA" in line and MMA.search(line):
            counts[target, symbol] += 1
    return counts


def kernels(folder: Path) -> Iterator[Kernel]:
    for log in sorted(folder.glob("cuda_*.o.log")):
        counts = tensor_counts(log.with_suffix(""))
        for entry in ENTRY.finditer(log.read_text()):
            tile = parsed(entry["symbol"])
            if tile is not None and not is_empty(entry["target"], *tile):
                tensor = counts.get((entry["target"], entry["symbol"]), 0)
                yield Kernel(entry["target"], *tile, int(entry["registers"]), int(entry["stores"]), tensor)


def complaints(each: Kernel) -> list[str]:
    found = []
    if each.spilled and each.target in CHECKED:
        found.append(f"spills {each.spilled} bytes")
    tensor = each.dtype in ("float16", "tf32") or (each.dtype == "bfloat16" and each.target != "sm_75")
    if tensor and each.tensor_instructions == 0:
        found.append("no tensor-core instruction")
    return found


def markdown(rows: list[Kernel], size: int, took: dict[str, float], targets: list[str]) -> str:
    sources = ", ".join(f"{name} {each / 60:.1f}" for name, each in sorted(took.items()))
    lines = [
        "# What nvcc makes of the CUDA kernels",
        "",
        "Written by `make cuda-report`; no GPU took part. Registers a thread, and in brackets spilled bytes.",
        f"{len(rows)} kernels for {len(targets)} architectures, compiled in {sum(took.values()) / 60:.1f} "
        f"minutes of a processor ({sources}). The library has {size / 1e6:.1f} MB.",
        "",
        "| dtype | kernel | features | partners | options | " + " | ".join(targets) + " | HMMA, sm_80 |",
        "|---|---|---:|---:|---|" + "---:|" * (len(targets) + 1),
    ]
    shapes = list(dict.fromkeys((r.dtype, r.name, r.features, r.partners, r.options) for r in rows))
    by = {(r.dtype, r.name, r.features, r.partners, r.options, r.target): r for r in rows}
    for shape in shapes:
        dtype, name, features, partners, options = shape
        cells = []
        for target in targets:
            r = by.get((*shape, target))
            spilled = f" ({r.spilled})" if r is not None and r.spilled else ""
            cells.append("–" if r is None else f"{r.registers}{spilled}")
        tensor = by[(*shape, "sm_80")].tensor_instructions if "sm_80" in targets else 0
        lines.append(
            f"| {dtype} | {name} | {features or '–'} | {partners} | {'all' if options else 'none'} | "
            + " | ".join(cells)
            + f" | {tensor} |"
        )
    said = [
        f"{r.target} {r.dtype} {r.name} {r.features} features: {text}" for r in rows for text in complaints(r)
    ]
    lines += ["", "## Exceptions", "", *(f"* {text}" for text in said)]
    if not said:
        lines.append(
            "None: nothing spills on sm_80 and sm_90, every product of two-byte floats or TF32 is on tensor "
            "cores."
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where setup.py built")
    parser.add_argument("--out", type=Path, help="folder for cuda-build.json and cuda-build.md")
    args = parser.parse_args()
    folders = sorted(args.build.glob("temp.*"))
    rows = [each for folder in folders for each in kernels(folder)]
    library = next(args.build.glob("lib.*/metattn/libmetattn_cuda.so"), None)
    if not rows or library is None:
        print("nothing to read: METATTN_CUDA=1 python setup.py build_ext --inplace", file=sys.stderr)
        return 2
    targets = sorted({each.target for each in rows}, key=lambda target: int(target[3:]))
    took = seconds(folders[-1])
    text = markdown(rows, library.stat().st_size, took, targets)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        held = {
            "library_bytes": library.stat().st_size,
            "seconds": took,
            "kernels": [asdict(each) for each in rows],
        }
        (args.out / "cuda-build.json").write_text(json_text(held))
        (args.out / "cuda-build.md").write_text(text)
    else:
        print(text)
    failures = [f"{each}: {reason}" for each in rows for reason in complaints(each)]
    print("\n".join(failures) or "no complaint", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
