"""Compiles the Triton kernels of the four maps for GPUs that are not there, and reads what came out.

    python -m benchmarks.aot [--targets sm_90 …] [--features 64 …] [--out benchmarks/results]

For each target, dtype, head dimension and kernel: registers, spilled bytes, shared memory, resident warps,
tensor-core instructions, and the time that one visit of an unmasked block takes at least, by the counts of
its instructions. A loop over unmasked blocks that spills on sm_80 or sm_90 for a head dimension up to 128,
shared memory past the limit, or a product of two-byte floats that is no tensor-core instruction, is a
failure; the table names them, and what spills elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine_code import read_amdgcn, read_cubin
from metattn.bench.files import json_text

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FEATURES = (32, 64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float32")
VARIANTS = ("plain", "causal", "everything", "few-shot")  # few-shot: one program holds all keys
KERNELS = {
    "forward": ("forward_rows",),
    "vjp": ("vjp_rows", "vjp_keys"),
    "jvp": ("jvp_rows",),
    "vjp_jvp": ("vjp_jvp_rows", "vjp_jvp_keys"),
    "double backward": ("double_rows",),  # for jvp_rows and vjp_jvp_rows, where it has registers for that
}
# N×M products that one visit executes (docs/math.md), all tangents there
PRODUCTS = {
    "forward_rows": 2, "vjp_rows": 3, "vjp_keys": 4, "jvp_rows": 5, "vjp_jvp_rows": 7, "vjp_jvp_keys": 8,
    "double_rows": 10,
}  # fmt: skip
# registers and warps of a multiprocessor; its tensor cores' FLOP a clock, dense: two-byte floats, TF32
REGISTERS, MOST_WARPS = 65536, 64
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx942": 64}  # KiB of a multiprocessor
TENSOR = {"sm_80": (2048, 1024), "sm_90": (4096, 2048), "sm_100": (8192, 4096)}
H200_SMS, H200_CLOCK = 132, 1.83e9  # the clock at which 132 × 4096 make the data sheet's 989 TFLOP/s
# bytes a clock and multiprocessor. L2: 5120 for all, as Nvidia says of an A100, of 108, 132 and 148 of them.
# HBM: an A100's 2.0 TB/s at 1.41 GHz, an H200's 4.8 at 1.83, a B200's 8 at 1.85.
SHARED_RATE = 128
L2_RATE = {"sm_80": 47.4, "sm_90": 38.8, "sm_100": 34.6}
HBM_RATE = {"sm_80": 13.1, "sm_90": 19.9, "sm_100": 29.2}
LENGTH = 4096  # queries, and keys, of the calls that are compiled
# tensors [N, d] or [M, d] that a kernel reads or writes, the second halves of rounded results among them
TENSORS = {
    "forward_rows": 5, "vjp_rows": 7, "vjp_keys": 6, "jvp_rows": 10, "vjp_jvp_rows": 12, "vjp_jvp_keys": 9,
    "double_rows": 13,
}  # fmt: skip
PIPES = ("tensor", "exp", "integer", "issue", "shared", "L2", "HBM")


@dataclass
class Row:
    """What the compiler made of one kernel."""

    target: str
    dtype: str
    features: int
    variant: str
    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int  # bytes a thread
    spill_instructions: int
    shared: int  # bytes a program
    shared_limit: int
    resident_warps: int
    tensor_instructions: int
    loop: dict[str, int]  # instructions of the unmasked loop, a warp
    bounds: dict[str, float]  # clocks of one visit, a multiprocessor, by what limits it
    tflops: float | None  # the bound that follows for an H200


def compile_all(target: str, dtype: str, features: int, map_: str, variant: str) -> list[dict[str, Any]]:
    """The rows of one map."""
    import triton
    from triton.backends.compiler import GPUTarget

    from metattn.backends import triton as backend
    from metattn.backends.triton import devices
    from metattn.backends.triton.plans import Launch
    from metattn.kernels import configs

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)

    class Driver:
        """Stands for the driver of a machine with that GPU."""

        def get_current_target(self) -> GPUTarget:
            return gpu

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    architecture = devices.architecture_of(gpu.arch) if nvidia else "gfx9"
    found: list[Row] = []

    def compile_only(launch: Launch, *arguments: Any) -> None:
        name, tile = launch.kernel.fn.__name__, launch.constants
        if name not in KERNELS[map_]:
            return
        launch.kernel.device_caches.clear()
        compiled = launch.kernel.warmup(*arguments, grid=(launch.programs,), **tile)
        config = configs.Config(tile["ROWS"], tile["KEYS"], tile["num_warps"], tile["num_stages"])
        found.append(row(compiled, target, dtype, features, variant, name, config, architecture))

    with (
        patch.object(backend, "run", compile_only),
        patch.object(devices, "architecture", lambda device: architecture),
    ):
        call_map(map_, getattr(torch, dtype), features, variant, architecture)
    return [asdict(each) for each in found]


def call_map(map_: str, dtype: torch.dtype, features: int, variant: str, architecture: str) -> None:
    """One call of a map on tensors without storage: every tangent, cotangent and gradient there."""
    from metattn.backends import triton as backend
    from metattn.kernels import configs
    from metattn.problem import NO_CONSTANTS, Constants, Primals, Problem, Results

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    b, h, n = 2, 16, LENGTH
    if variant == "few-shot":
        n = configs.WHOLE_LENGTH[architecture][0 if dtype.itemsize == 2 else 1]
    q, lse = empty(b, h, n, features), empty(b, h, n, 2, dtype=torch.float64)
    primals, constants = Primals(q, q, q, None, None, None), NO_CONSTANTS
    if variant == "everything":
        bias, sinks = empty(b, h, n, n, dtype=torch.float32), empty(1, h, dtype=torch.float32)
        primals = Primals(q, q, q, bias, sinks, sinks)
        mask = empty(b, 1, n, n, dtype=torch.bool)
        constants = Constants(mask, empty(b, 2, dtype=torch.int64), None, None)
    problem = Problem(
        scale=features**-0.5,
        softcap=30.0 if variant == "everything" else None,
        causal="bottom-right" if variant in ("causal", "everything") else None,
        window=(1024, -1) if variant == "everything" else (-1, -1),
        dropout_p=0.1 if variant == "everything" else 0.0,
        max_q=0,
        max_k=0,
        backend="triton",
    )
    low = empty(b, h, n, features, dtype=torch.bfloat16) if dtype in backend.ROUNDED else None
    results, results_t = Results(q, lse, low), Results(q, lse[..., 1], low)
    needs: Any = tuple(primal is not None for primal in primals)
    if map_ == "forward":
        backend.forward(problem, primals, constants)
    elif map_ == "vjp":
        backend.vjp(problem, primals, constants, results, q, None, needs)
    elif map_ == "jvp":
        backend.jvp(problem, primals, constants, results, primals)
    elif map_ == "double backward":
        backend.double_backward(problem, primals, constants, results, q, None, primals, needs, q)
    else:
        backend.vjp_jvp(problem, primals, constants, results, q, None, primals, results_t, needs)


def row(
    compiled: Any, target: str, dtype: str, features: int, variant: str, name: str, config: Any,
    architecture: str,
) -> Row:  # fmt: skip
    read = read_cubin if target.startswith("sm_") else read_amdgcn
    registers, spilled, spill_instructions, tensor, loop = read(compiled)
    bounds, tflops = {}, None
    if target.startswith("sm_") and loop:
        bounds = visit_bounds(target, dtype, features, name, config, loop)
        work = PRODUCTS[name] * 2 * config.rows * config.keys * features
        tflops = work / max(bounds.values()) * H200_SMS * H200_CLOCK * 1e-12 if target == "sm_90" else None
    return Row(
        target, dtype, features, variant, name, f"{config.rows}×{config.keys}", config.warps, config.stages,
        registers, spilled, spill_instructions, compiled.metadata.shared,
        shared_limit(architecture, dtype, features, variant),
        resident_warps(target, registers, config.warps, compiled.metadata.shared),
        tensor, loop, bounds, tflops,
    )  # fmt: skip


def shared_limit(architecture: str, dtype: str, features: int, variant: str) -> int:
    """Bytes that the kernel may have wherever it is used: sm_86 shares sm_80's table, and has fewer."""
    from metattn.kernels import configs

    size = 0 if dtype == "bfloat16" else 1
    if architecture != "sm80":
        return configs.SHARED_MEMORY[architecture]
    shared = features <= configs.WIDEST["sm86"][size] and (
        variant != "few-shot" or configs.WHOLE_LENGTH["sm80"][size] == configs.WHOLE_LENGTH["sm86"][size]
    )
    return configs.SHARED_MEMORY["sm86" if shared else "sm80"]


def resident_warps(target: str, registers: int, warps: int, shared: int) -> int:
    """Warps that a multiprocessor's registers and shared memory hold at once."""
    by_registers = REGISTERS // (max(1, registers) * 32 * warps)
    by_shared = SHARED[target] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, MOST_WARPS // warps) * warps


def visit_bounds(
    target: str, dtype: str, features: int, name: str, config: Any, loop: dict[str, int]
) -> dict[str, float]:
    """Clocks a multiprocessor needs at least for one visit of a block: by pipe, each with the others free.

    A multiprocessor issues four warp instructions a clock, takes 16 lanes of special functions, 64 of
    integer and select operations. Its program's warps share that. Of HBM a visit has its share of what the
    kernel reads and writes once.
    """
    work = PRODUCTS[name] * 2 * config.rows * config.keys * features
    itemsize = 2 if dtype == "bfloat16" else 4
    two_byte, tf32 = TENSOR[target]
    tensor = work / two_byte if dtype == "bfloat16" else 3 * work / tf32  # three TF32 products each
    warps = config.warps
    # a loop that Triton unrolled over k counts its tensor instructions, not its visits: one visit is assumed
    return {
        "tensor": tensor,
        "exp": warps * loop["mufu"] * 32 / 16,
        "integer": warps * loop["half_rate"] * 32 / 64,
        "issue": warps * loop["all"] / 4,
        "shared": warps * loop["shared_bytes"] / SHARED_RATE,
        "L2": warps * loop["global_bytes"] / L2_RATE[target],
        "HBM": TENSORS[name] * features * itemsize * config.rows * config.keys / LENGTH / HBM_RATE[target],
    }


def spills(each: Row) -> str | None:
    """What is to be said of a kernel that shall not spill: those for head dimensions up to 128."""
    if not each.spilled or each.features > 128 or each.target not in ("sm_80", "sm_90"):
        return None
    inside, any_loop = each.loop.get("spill", 0), each.loop.get("spill_of_any", 0)
    where = f"{any_loop} instructions in a loop over masked blocks" if any_loop else "all outside the loops"
    if inside:
        where = f"{inside} instructions in the loop over unmasked blocks"
    return f"spills {each.spilled} bytes, {where}"


def complaints(each: Row) -> list[str]:
    """What fails the build: a loop that spills, too much shared memory, a product off the tensor cores."""
    found = []
    two_byte = each.dtype != "float32"
    if two_byte and spills(each) and each.loop.get("spill", 0) and each.variant != "everything":
        found.append(str(spills(each)))
    if each.shared > each.shared_limit:
        found.append(f"{each.shared} bytes of shared memory, limit {each.shared_limit}")
    if two_byte and each.tensor_instructions == 0:
        found.append("no tensor-core instruction")
    return found


COLUMNS = (
    "d", "kernel", "variant", "queries×keys", "warps", "stages", "registers", "spilled", "shared KiB",
    "resident warps", "tensor instructions", *PIPES, "TFLOP/s at most",
)  # fmt: skip


def cells(each: Row) -> list[str]:
    tflops = "–" if each.tflops is None else f"{each.tflops:.0f}"
    busiest = max(each.bounds.values(), default=0.0)
    clocks = []
    for pipe in PIPES:
        clock = each.bounds.get(pipe)
        text = "–" if clock is None else f"{clock:.0f}"
        clocks.append(f"**{text}**" if clock == busiest else text)
    numbers = (each.warps, each.stages, each.registers, each.spilled, round(each.shared / 1024))
    more = (each.resident_warps, each.tensor_instructions)
    return [
        str(x)
        for x in (each.features, each.kernel, each.variant, each.tile, *numbers, *more, *clocks, tflops)
    ]


def markdown(rows: list[Row], broken: list[str], versions: dict[str, str]) -> str:
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Written by `make aot` with Triton {versions['triton']}; no GPU took part. Registers and spilled",
        "bytes are per thread, shared memory per program. The columns behind the instructions bound, and do",
        "not measure: the fewest clocks that one visit of an unmasked block takes on a multiprocessor, by",
        "what is busy (tensor cores, special functions, integer and select units, issue, shared memory, L2,",
        f"HBM at N = M = {LENGTH}), and what the busiest (in bold) leaves of an H200's speed.",
    ]
    for target, dtype in dict.fromkeys((each.target, each.dtype) for each in rows):
        lines += ["", f"## {target}, {dtype}", "", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|---:|---|---|---|" + "---:|" * (len(COLUMNS) - 4))
        some = [each for each in rows if (each.target, each.dtype) == (target, dtype)]
        lines += ["| " + " | ".join(cells(each)) + " |" for each in some]
    lines += ["", "## Exceptions", ""]
    said = [(r, text) for r in rows for text in dict.fromkeys([spills(r), *complaints(r)]) if text]
    for r, text in said:
        lines.append(f"* {r.target} {r.dtype} d={r.features} {r.kernel} {r.variant}: {text}")
    lines += [f"* {text}" for text in sorted(broken)]
    if not said and not broken:
        lines.append("None: no spill for d ≤ 128 on sm_80 and sm_90, shared memory within the limits, every")
        lines.append("product of two-byte floats on tensor cores.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--features", nargs="+", type=int, default=FEATURES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--variants", nargs="+", default=("plain", "causal"), choices=VARIANTS)
    parser.add_argument("--maps", nargs="+", default=tuple(KERNELS), choices=tuple(KERNELS))
    parser.add_argument("--out", type=Path, help="folder for aot.json and aot.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: nothing is compiled under it
    from metattn.kernels.configs import WHOLE_FEATURES
    from rich.progress import Progress

    work = [
        (target, dtype, features, map_, variant)
        for target in args.targets
        for dtype in args.dtypes
        for features in args.features
        for map_ in args.maps
        for variant in args.variants
        if variant != "few-shot" or (features <= WHOLE_FEATURES and map_ in ("vjp", "vjp_jvp"))
    ]
    rows: list[Row] = []
    broken: list[str] = []
    with ProcessPoolExecutor(args.jobs) as pool, Progress() as progress:
        bar = progress.add_task("compiling", total=len(work))
        jobs = {pool.submit(compile_all, *item): item for item in work}
        for job in as_completed(jobs):
            progress.advance(bar)
            try:
                rows += [Row(**each) for each in job.result()]
            except Exception as error:  # compilers fail in many ways, and each is a finding
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                broken.append(f"{' '.join(map(str, jobs[job]))}: does not compile: {reason}")
                continue
            for each in job.result():
                told = (
                    "target",
                    "dtype",
                    "features",
                    "variant",
                    "kernel",
                    "tile",
                    "warps",
                    "registers",
                    "spilled",
                )
                progress.console.print(*(each[name] for name in told), highlight=False)
    order = {name: index for index, name in enumerate(name for names in KERNELS.values() for name in names)}
    rows.sort(
        key=lambda r: (
            args.targets.index(r.target), args.dtypes.index(r.dtype), r.features, order[r.kernel],
            VARIANTS.index(r.variant),
        )
    )  # fmt: skip
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "aot.json").write_text(
            json_text(
                {"versions": versions, "rows": [asdict(each) for each in rows], "broken": sorted(broken)}
            )
        )
        (args.out / "aot.md").write_text(markdown(rows, broken, versions))
    else:
        print(markdown(rows, broken, versions))
    failures = broken + [
        f"{r.target} {r.dtype} d={r.features} {r.kernel}: {text}" for r in rows for text in complaints(r)
    ]
    print("\n".join(failures) or "no complaint", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
