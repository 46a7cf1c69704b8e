"""What one bench.json does faster or slower than another, beyond the spread."""

from __future__ import annotations

from typing import Any

from metattn.bench.tables import Results, milliseconds

Key = tuple[str, str, str, str, str]
MEMORY_SPREAD = 0.02  # a peak is measured once
SAME = ("cpu", "architecture", "cores", "threads", "torch_cpu_capability")


def text(before: Results, after: Results) -> str:
    """The report, line by line: machines, what got faster or slower, what is in one of them alone."""
    lines = [f"warning: {said}" for said in differences(before["machine"], after["machine"])]
    for kind, change in (("rows", _time_change), ("memory", _memory_change)):
        old, new = (_by_key(results[kind]) for results in (before, after))
        both = [key for key in old if key in new]
        changed = [
            (factor, said)
            for key in both
            if (found := change(old[key], new[key]))
            for factor, said in [found]
        ]
        lines += [said for _, said in sorted(changed, reverse=True)]
        counted = f"{len(changed)} of {len(both)} differ by more than"
        timed = kind == "rows"
        lines.append(
            f"times: {counted} both spreads" if timed else f"peaks of memory: {counted} {MEMORY_SPREAD:.0%}"
        )
        lines += [f"only in the first: {_said(key)}" for key in old if key not in new]
        lines += [f"only in the second: {_said(key)}" for key in new if key not in old]
    return "\n".join(lines)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In what the machines and versions differ, the commit and metattn's own version apart."""
    pairs = [(name, before.get(name), after.get(name)) for name in SAME]
    versions = before["versions"], after["versions"]
    pairs += [(name, *(v.get(name) for v in versions)) for name in ("torch", "python", "jax")]
    return [f"{name} differs: {old}, then {new}" for name, old, new in pairs if old != new]


def _by_key(rows: list[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Shape and options are in the key: a case that was changed under its old name is another."""
    return {
        (row["case"]["name"], row["shape"], row["case"]["dtype"], row["step"], row["contestant"]): row
        for row in rows
    }


def _said(key: Key) -> str:
    case, shape, dtype, step, contestant = key
    return f"{case} ({shape}, {dtype}), {step}, {contestant}"


def _changed(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str] | None:
    """A row that is wrong in one of them alone."""
    if bool(old["wrong"]) == bool(new["wrong"]):
        return None
    name = _said(next(iter(_by_key([new]))))
    return (
        (float("inf"), f"wrong now: {name}: {new['wrong']}") if new["wrong"] else (0.0, f"right now: {name}")
    )


def _time_change(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str] | None:
    if old["wrong"] or new["wrong"]:
        return _changed(old, new)
    spread = sum((row["quartiles"][1] - row["quartiles"][0]) / 2 for row in (old, new))
    if abs(new["median"] - old["median"]) <= spread:
        return None
    factor = new["median"] / old["median"]
    how = f"{factor:.2f}× slower" if factor > 1 else f"{1 / factor:.2f}× faster"
    name = _said(next(iter(_by_key([new]))))
    return factor, f"{how}: {name}: {milliseconds(old)} → {milliseconds(new)} ms"


def _memory_change(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str] | None:
    if old["wrong"] or new["wrong"]:
        return _changed(old, new)
    if old["bytes"] is None or new["bytes"] is None:
        return None
    factor = new["bytes"] / old["bytes"]
    if abs(factor - 1) <= MEMORY_SPREAD:
        return None
    how = f"{factor:.2f}× the memory"
    sizes = " → ".join(f"{row['bytes'] / 2**20:,.0f}" for row in (old, new))
    return factor, f"{how}: {_said(next(iter(_by_key([new]))))}: {sizes} MiB"
