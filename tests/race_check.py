"""Runs the emulated CUDA kernels under ThreadSanitizer, which ends the process with 66 where it saw a race.

    make race-check

Blocks that visit several others, with and without options, packed or not, one stage of tiles or two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from metattn.backends import cuda  # noqa: E402
from tests import emulation  # noqa: E402
from tests.four_maps import LENGTHS, LONG, MAP_OPTIONS, SHORT, MapCall, four_maps  # noqa: E402

NAMES = ("plain", "bottom-right", "mask", "bias", "everything")
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    torch.set_num_threads(1)  # the kernels' own threads are watched, torch's are not
    emulation.LIBRARY = ROOT / "build" / "libmetattn_watched.so"
    emulation.install()
    library = emulation.library()
    # float32's products in TF32, for which tiles are rounded in place; with one stage, as before 8.0, in full
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for stages in (2, 1):
        library.metattn_emulate_from_80(stages - 1)
        for name in NAMES:
            for dtype in DTYPES:
                for sizes in (SHORT, LONG):
                    four_maps(cuda, MapCall(sizes, dtype, **MAP_OPTIONS[name]))
                four_maps(cuda, MapCall(SHORT, dtype, lengths=LENGTHS, **MAP_OPTIONS[name]))
            print(f"{name}, stages {stages}", flush=True)


if __name__ == "__main__":
    main()
