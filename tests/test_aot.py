"""What benchmarks/aot.py reads out of compiled kernels."""

from __future__ import annotations

import pytest

from benchmarks import aot, machine_code


@pytest.mark.parametrize(
    ("operation", "of_shared", "of_lanes"),
    [
        ("LDS R4, [R3+0x40]", 128, 128),
        ("LDS.U8 R4, [R3]", 32, 32),
        ("LDS.U16 R4, [R3]", 64, 64),
        ("STS.128 [R3], R4", 512, 512),
        ("LDS.64 R4, [R3]", 256, 256),
        ("LDSM.16.M88.4 R4, [R3]", 512, None),
        ("LDSM.16.MT88.2 R4, [R3]", 256, None),
        ("STSM.16.M88 [R3], R4", 128, None),
        ("LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64]", 512, 512),
        ("LDG.E.64 R4, desc[UR4][R6.64]", 0, 256),
        ("LDGDEPBAR", 0, None),
        ("FFMA R4, R3, R2, R1", 0, None),
        # 4 warps read B [16, 64] of two bytes, and A [64, 16] where it is not in registers
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT", (64 + 64) * 16 * 2 // 4, None),
        ("HGMMA.64x128x16.F32.BF16 R56, R100, gdesc[UR16].tnspB, R56", 128 * 16 * 2 // 4, None),
        ("HGMMA.64x32x8.F32.TF32 R56, R100, gdesc[UR16], R56", 32 * 8 * 4 // 4, None),
    ],
)
def test_bytes_of_an_instruction(operation: str, of_shared: int, of_lanes: int | None) -> None:
    assert machine_code.shared_bytes(operation) == of_shared
    if of_lanes is not None:
        assert machine_code.lane_bytes(operation) == of_lanes


def test_counts_are_those_of_the_shortest_loop_with_products() -> None:
    """Barriers move nothing; spills are told of any innermost loop."""
    code = """
    /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_1:
    /*0010*/ LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
    /*0020*/ LDGDEPBAR ;
    /*0030*/ LDSM.16.M88.4 R4, [R3] ;
    /*0040*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0050*/ MUFU.EX2 R4, R4 ;
    /*0060*/ @P0 BRA `(.L_x_1) ;
.L_x_2:
    /*0070*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0080*/ STL [R1], R4 ;
    /*0090*/ IADD3 R1, R1, R1, RZ ;
    /*00a0*/ FFMA R1, R1, R1, RZ ;
    /*00b0*/ FFMA R1, R1, R1, RZ ;
    /*00c0*/ FFMA R1, R1, R1, RZ ;
    /*00d0*/ @P0 BRA `(.L_x_2) ;
"""
    counts = machine_code.main_loop(machine_code.instructions(code))
    assert counts == {
        "all": 6, "tensor": 1, "mufu": 1, "half_rate": 0, "shared_bytes": 512 + 512, "global_bytes": 512,
        "spill": 0, "spill_of_any": 1,
    }  # fmt: skip


def test_bounds_of_a_visit() -> None:
    """A block of 128 × 64 with d = 64 in bfloat16: two products of 128·64·64, on an H200."""
    from metattn.kernels.configs import Config

    loop = {"all": 400, "mufu": 32, "half_rate": 64, "shared_bytes": 4096, "global_bytes": 2048}
    bounds = aot.visit_bounds("sm_90", "bfloat16", 64, "forward_rows", Config(128, 64, 8, 2), loop)
    assert tuple(bounds) == aot.PIPES
    assert bounds["tensor"] == 2 * 2 * 128 * 64 * 64 / 4096
    assert bounds["exp"] == 8 * 32 * 32 / 16
    assert bounds["integer"] == 8 * 64 * 32 / 64
    assert bounds["issue"] == 8 * 400 / 4
    assert bounds["shared"] == 8 * 4096 / 128
    assert bounds["L2"] == pytest.approx(8 * 2048 / (5120 / 132), rel=1e-3)
    # five tensors [4096, 64] of two bytes for all 32 × 64 visits of a head
    assert bounds["HBM"] == pytest.approx(5 * 4096 * 64 * 2 / (32 * 64) / (4.8e12 / 132 / 1.83e9), rel=5e-3)
