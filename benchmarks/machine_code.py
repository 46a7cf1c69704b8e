"""Reads what Triton's compiler made: a cubin by NVIDIA's disassembler, AMD's assembly as it is."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MMA = re.compile(r"\b(HMMA|HGMMA|QGMMA|IMMA|DMMA|UTCHMMA|UTCQMMA|UTCMMA)")
HALF_RATE = re.compile(r"^(IADD|ISETP|LOP|SHF|LEA|SEL|FSEL|FMNMX|FSETP|PRMT|F2FP|VIMNMX|PLOP|IMNMX|IABS|MOV)")


def tool(name: str) -> str:
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def read_cubin(compiled: Any) -> tuple[int, int, int, int, dict[str, int]]:
    """Registers, spilled bytes, spill instructions, tensor-core instructions, and the main loop's counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(
            [tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    code = instructions(sass)
    spills = sum(op.startswith(("LDL", "STL")) for _, op, _ in code)
    stack = int(found[2]) + int(found[3])
    return (
        int(found[1]),
        stack if spills else 0,
        spills,
        sum(bool(MMA.match(op)) for _, op, _ in code),
        main_loop(code),
    )


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, operation, the whole) of each instruction; labels resolve to the address that follows."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str]] = []
    pending: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*\.?(L_x_\d+):", line)
        if label:
            pending.append(label[1])
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if code:
            address = int(code[1], 16)
            for name in pending:
                labels[name] = address
            pending = []
            text = code[2].strip()
            operation = re.sub(r"^@!?U?P\w+\s+", "", text)
            found.append((address, operation, text))
    resolved = []
    for address, operation, text in found:
        target = re.search(r"L_x_\d+", operation)
        branch = operation.startswith("BRA") and target is not None
        resolved.append((address, f"BRA {labels.get(target[0], address)}" if branch else operation, text))
    return resolved


def main_loop(code: list[tuple[int, str, str]]) -> dict[str, int]:
    """Counts by pipe of the shortest innermost loop with tensor-core instructions: the unmasked one.

    And spills of any innermost one.
    """
    spans = set()
    for address, operation, _ in code:
        target = re.match(r"BRA (\d+)", operation)
        if target and int(target[1]) < address:
            spans.add((int(target[1]), address))
    loops = []
    for start, end in spans:
        if any((s, e) != (start, end) and start <= s and e <= end for s, e in spans):
            continue
        body = [op for at, op, _ in code if start <= at <= end]
        tensor = sum(bool(MMA.match(op)) for op in body)
        if tensor:
            loops.append((len(body), tensor, body))
    if not loops:
        return {}
    _, tensor, body = min(loops)
    everywhere = max(sum(op.startswith(("LDL", "STL")) for op in each) for _, _, each in loops)
    return {
        "all": len(body),
        "tensor": tensor,
        "mufu": sum(op.startswith("MUFU") for op in body),
        "half_rate": sum(bool(HALF_RATE.match(op)) for op in body),
        "shared_bytes": sum(shared_bytes(op) for op in body),
        "global_bytes": sum(lane_bytes(op) for op in body if op.startswith(("LDG.", "LDGSTS", "STG"))),
        "spill": sum(op.startswith(("LDL", "STL")) for op in body),
        "spill_of_any": everywhere,
    }


def lane_bytes(operation: str) -> int:
    """Bytes that a warp's 32 lanes move."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", operation.split(maxsplit=1)[0])
    return 32 * int(width[1] if width else 32) // 8


def shared_bytes(operation: str) -> int:
    """Bytes of shared memory that one warp's instruction moves; not those that sm_100's tensor cores read."""
    name, *rest = operation.split()
    product = re.match(r"HGMMA\.64x(\d+)x", name)
    if product:  # four warps read [32 bytes of k, n], and where the other operand is in no registers that too
        rows = 64 if rest[1].startswith("gdesc") else 0
        return (int(product[1]) + rows) * 32 // 4
    matrices = re.match(r"(?:LDSM|STSM)\.16\.M[T]?88(?:\.(\d))?$", name)
    if matrices:
        return 128 * int(matrices[1] or 1)
    return lane_bytes(operation) if name.startswith(("LDS", "STS", "LDGSTS")) else 0


def read_amdgcn(compiled: Any) -> tuple[int, int, int, int, dict[str, int]]:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"{field}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    spilled = number(r"\.vgpr_spill_count")
    tensor = len(re.findall(r"^\s*v_mfma", text, re.MULTILINE))
    return number(r"\.vgpr_count"), 4 * spilled, spilled, tensor, {}
