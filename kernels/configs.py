"""Which tile, warps and pipeline stages each kernel gets: a table, read and never searched at run time, and
what was measured to be better on the GPU at hand (metattn.tune), where there is such.

Chosen against the compiler's report (registers, spills, shared memory) in benchmarks/results/aot.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Config(NamedTuple):
    """A block of queries × a block of keys."""

    rows: int
    keys: int
    warps: int
    stages: int


WIDTHS = (32, 64, 96, 128, 256)  # a head dimension takes the first that holds it
SMALLEST = 16  # of a tile's sides: what a tensor-core product takes
LARGEST = 256
MOST_STAGES = 4

# kernel → (two-byte dtypes, float32) → one (rows, keys, warps, stages) for each of WIDTHS
_AMPERE = {
    "forward_rows": (
        ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 1)),
        ((64, 32, 4, 2), (64, 16, 4, 2), (64, 16, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
    ),
    "vjp_rows": (
        ((64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 8, 1)),
        ((64, 32, 4, 2), (64, 16, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    ),
    "vjp_keys": (
        ((64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (16, 64, 8, 1)),
        ((32, 64, 4, 2), (16, 64, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    ),
    "jvp_rows": (
        ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        ((64, 16, 4, 1), (64, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
    ),
    "vjp_jvp_rows": (
        ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        ((64, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    ),
    "vjp_jvp_keys": (
        ((16, 64, 4, 2), (16, 64, 4, 2), (16, 64, 4, 1), (32, 32, 8, 2), (16, 32, 8, 1)),
        ((16, 64, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1), (32, 16, 4, 1), (16, 16, 8, 1)),
    ),
    "double_rows": (
        ((64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2), (16, 16, 8, 1)),
        ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ),
    "bias_sums": (
        ((64, 64, 8, 1), (64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    ),
}
# The warp-group products of Hopper and later read operands from shared memory: larger tiles fit.
_HOPPER_TWO_BYTES = {
    "forward_rows": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 1)),
    "vjp_rows": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    "vjp_keys": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 1)),
    "jvp_rows": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 8, 1)),
    "vjp_jvp_rows": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 1), (32, 16, 8, 1)),
    "double_rows": ((128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 8, 1)),
    "vjp_jvp_keys": ((32, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 2), (16, 128, 8, 2), (16, 32, 8, 1)),
}
# In float32 too, where a side of 64 has all of a warp group: wider tiles than an Ampere's fit.
_HOPPER_FLOAT32 = {kernel: float32 for kernel, (_, float32) in _AMPERE.items()} | {
    "forward_rows": ((64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 8, 1)),
    "vjp_rows": ((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 8, 1)),
    "vjp_keys": ((32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1), (16, 16, 8, 1)),
    "jvp_rows": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (16, 16, 8, 1)),
    "vjp_jvp_rows": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (16, 16, 8, 1)),
    "vjp_jvp_keys": ((32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (32, 16, 4, 1), (16, 16, 8, 1)),
}
_HOPPER = {
    kernel: (_HOPPER_TWO_BYTES.get(kernel, two_bytes), _HOPPER_FLOAT32[kernel])
    for kernel, (two_bytes, _) in _AMPERE.items()
}
# Blackwell's compiler gives up on some of them.
_BLACKWELL = _HOPPER | {
    "double_rows": (
        ((128, 32, 8, 1), (128, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (16, 16, 8, 1)),
        _HOPPER_FLOAT32["double_rows"],
    ),
    "jvp_rows": (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 1), (64, 16, 8, 1)),
        _HOPPER_FLOAT32["jvp_rows"],
    ),
    "vjp_jvp_rows": (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 1), (64, 32, 4, 1), (32, 16, 8, 1)),
        _HOPPER_FLOAT32["vjp_jvp_rows"],
    ),
}
# 64 KiB of shared memory, and loads that are not pipelined through it.
_CDNA_TILES = ((64, 32, 4, 1),) * 2 + ((32, 32, 4, 1),) * 2 + ((16, 16, 4, 1),)
_CDNA = {kernel: (_CDNA_TILES, ((32, 32, 4, 1),) * 2 + ((16, 16, 4, 1),) * 3) for kernel in _AMPERE}
# its compiler gives up on rows of 64 there
_CDNA["double_rows"] = (((32, 32, 4, 1),) * 2 + ((16, 16, 4, 1),) * 3, _CDNA["double_rows"][1])
# the interpreter minds neither registers nor warps
_INTERPRETER = {kernel: (((64, 64, 1, 1),) * len(WIDTHS),) * 2 for kernel in _AMPERE}
TABLE = {
    "sm80": _AMPERE,
    "sm86": _AMPERE,
    "sm90": _HOPPER,
    "sm100": _BLACKWELL,
    "gfx9": _CDNA,
    "interpreter": _INTERPRETER,
}
# bytes of shared memory that one program may have
SHARED_MEMORY = {
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx9": 64 * 1024,
}

# architecture → widest head dimension, in two-byte dtypes and in float32, whose tiles fit shared memory
MOST_FEATURES = 256
WIDEST = {
    "sm80": (256, 256),
    "sm86": (256, 128),
    "sm90": (256, 256),
    "sm100": (256, 256),
    "gfx9": (256, 256),
    "interpreter": (256, 256),
}

# The few-sample regime: problems so short and narrow that one program of a column pass holds all keys.
# architecture → how long, in two-byte dtypes and in float32: what shared memory holds
WHOLE_LENGTH = {
    "sm80": (128, 32),
    "sm86": (128, 16),
    "sm90": (128, 64),
    "sm100": (128, 64),
    "gfx9": (64, 16),
    "interpreter": (64, 64),
}
WHOLE_FEATURES = 64
# architecture → widest head dimension, in two-byte dtypes and in float32, for which the tiles and three
# accumulators of double_rows fit into registers; where they do not, jvp and vjp_jvp serve
ONE_SWEEP_FEATURES = {
    "sm80": (64, 0),
    "sm86": (64, 0),
    "sm90": (32, 0),
    "sm100": (64, 0),
    "gfx9": (64, 0),
    "interpreter": (256, 256),
}
# kernel → (two-byte dtypes, float32) → tile side that holds all keys → (rows, warps, stages)
WHOLE = {
    "vjp_keys": (
        {16: (16, 1, 1), 32: (32, 2, 1), 64: (64, 4, 1), 128: (32, 8, 1)},
        {16: (16, 1, 1), 32: (32, 2, 1), 64: (32, 4, 1), 128: (32, 8, 1)},
    ),
    "vjp_jvp_keys": (
        {16: (16, 1, 1), 32: (32, 2, 1), 64: (32, 4, 1), 128: (32, 8, 1)},
        {16: (16, 1, 1), 32: (16, 2, 1), 64: (32, 4, 1), 128: (16, 8, 1)},
    ),
}


def choose(
    architecture: str,
    kernel: str,
    features: int,
    itemsize: int,
    n: int,
    m: int,
    tuned: Mapping[tuple[str, int, int], Config] | None = None,
) -> Config:
    """The configuration for a head dimension and dtype, its tile no larger than n × m needs.

    tuned: by slot, what goes before the table.
    """
    place = slot(kernel, features, itemsize)
    rows, keys, warps, stages = (tuned or {}).get(place) or shipped(architecture, *place)
    fitted_rows, fitted_keys = min(rows, tile_side(n)), min(keys, tile_side(m))
    fewer = rows * keys // (fitted_rows * fitted_keys)  # a smaller tile has work for fewer warps
    return Config(fitted_rows, fitted_keys, max(1, warps // fewer), stages)


# Widest heads of which sm_100 has tensor memory for that.
TWICE_FEATURES = {"vjp_keys": 128, "vjp_jvp_keys": 32}


def slot(kernel: str, features: int, itemsize: int) -> tuple[str, int, int]:
    """(kernel, width, bytes of an element): what has a configuration of its own."""
    return kernel, next(width for width in WIDTHS if features <= width), 2 if itemsize == 2 else 4


def shipped(architecture: str, kernel: str, width: int, itemsize: int) -> Config:
    """The table's entry for a slot."""
    return Config(*TABLE[architecture][kernel][0 if itemsize == 2 else 1][WIDTHS.index(width)])


def is_tile(config: Config) -> bool:
    """Whether kernels can be compiled for a configuration, as far as numbers tell."""
    if not all(type(number) is int and number > 0 for number in config):
        return False
    sides = (SMALLEST <= side <= LARGEST and side & (side - 1) == 0 for side in (config.rows, config.keys))
    return all(sides) and config.warps in (1, 2, 4, 8) and config.stages <= MOST_STAGES


def is_whole(architecture: str, features: int, itemsize: int, n: int, m: int) -> bool:
    """Whether one program shall hold a whole (sequence, key head)."""
    longest = WHOLE_LENGTH[architecture][0 if itemsize == 2 else 1]
    return 0 < max(n, m) <= longest and features <= WHOLE_FEATURES


def in_one_sweep(architecture: str, features: int, itemsize: int) -> bool:
    """Whether the row pass that does all of a double backward in one sweep has registers for it."""
    return features <= ONE_SWEEP_FEATURES[architecture][0 if itemsize == 2 else 1]


def multiplies_twice(architecture: str, kernel: str, features: int) -> bool:
    """Whether a column pass multiplies two-byte weights of queries in two parts.

    On sm_100 each product of a chain has accumulators of its own in tensor memory, of 512 columns: a kernel
    that needs more compiles to a trap.
    """
    return architecture != "sm100" or features <= TWICE_FEATURES[kernel]


def choose_whole(kernel: str, itemsize: int, n: int, m: int) -> Config:
    """The configuration of a column pass whose one block holds all m keys."""
    keys = tile_side(m)
    rows, warps, stages = WHOLE[kernel][0 if itemsize == 2 else 1][keys]
    return Config(min(rows, tile_side(n)), keys, warps, stages)


def tile_side(length: int) -> int:
    """The smallest tile side that holds `length`."""
    return max(SMALLEST, 1 << max(length - 1, 0).bit_length())


def parts(features: int) -> tuple[int, int, int]:
    """(features, MAIN, REST): the power-of-two tiles that hold a head dimension, REST 0 where one does."""
    whole = tile_side(features)
    main = whole // 2
    rest = tile_side(features - main)
    if main < SMALLEST or main + rest >= whole:
        return features, whole, 0
    return features, main, rest
