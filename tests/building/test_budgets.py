"""The budgets of the GPU kernels are read rightly from machine code."""

import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).parent / "budgets" / "check.py"), run_name="budgets")
Kernel = CHECK["Kernel"]


def code(text):
    """Instructions as (address, guarded, opcode, operands), from lines as cuobjdump prints them."""
    matches = [CHECK["_INSTRUCTION"].match(line) for line in text.strip().splitlines()]
    return [
        (int(m.group(1), 16), bool(m.group(2)), m.group(3), m.group(4).strip()) for m in matches
    ]


LOOP = code("""
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @P0 BRA 0x0070 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/              @!P1 BRA 0x0020 ;
        /*0060*/                   EXIT ;
        /*0070*/                   LDL R2, [R1] ;
        /*0080*/                   BRA 0x0040 ;
        /*0090*/                   BRA 0x0090;
""")


def test_a_loop_holds_the_branches_that_return_to_it():
    (loop,) = CHECK["loops_of"](LOOP)
    assert sorted(LOOP[i][0] for i in loop) == [0x20, 0x30, 0x40, 0x50, 0x70, 0x80]


def test_a_jump_to_code_that_lies_behind_is_no_loop():
    straight = code("""
        /*0000*/              @P0 BRA 0x0030 ;
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/                   EXIT ;
        /*0030*/                   NOP ;
        /*0040*/                   BRA 0x0010 ;
    """)
    assert CHECK["loops_of"](straight) == []


@pytest.mark.parametrize("jump", ["BRA.DIV UR4, 0x0010", "BRA.U UP0, 0x0010", "CALL.REL 0x0010"])
def test_a_conditional_jump_without_a_guard_also_falls_through(jump):
    both = code(f"""
        /*0000*/                   NOP ;
        /*0010*/                   NOP ;
        /*0020*/                   {jump} ;
        /*0030*/              @P0 BRA 0x0000 ;
        /*0040*/                   EXIT ;
    """)
    (loop,) = CHECK["loops_of"](both)
    assert len(loop) == 4


def test_spills_count_where_a_loop_repeats_them():
    kernel = Kernel("K", "sm_90")
    CHECK["count"](kernel, LOOP)
    assert (kernel.spills, kernel.loop_spills) == (2, 1)
    assert (kernel.loop["HMMA"], kernel.loop["MUFU.EX2"]) == (1, 1)


# From the tables of the CUDA occupancy calculator.
@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 255, 256, 0, 1),
        ("sm_80", 128, 256, 0, 2),
        ("sm_80", 32, 1024, 0, 2),
        ("sm_90", 32, 256, 0, 8),
        ("sm_90", 240, 128, 48 * 1024, 2),
        ("sm_90", 64, 128, 100 * 1024, 2),
        ("sm_80", 64, 128, 100 * 1024, 1),
        ("sm_90", 16, 32, 0, 32),
    ],
)
def test_blocks_of_a_multiprocessor(architecture, registers, threads, shared, blocks):
    assert CHECK["occupancy"](architecture, registers, threads, shared) == blocks


def test_names_of_kernels_are_those_of_the_source():
    demangled = (
        "void performer::cuda::ReadKernel<performer::BFloat16, 64>"
        "(performer::cuda::ReadParams<performer::BFloat16>)"
    )
    assert CHECK["short"](demangled) == "ReadKernel<BFloat16, 64>"
    assert CHECK["short"]("performer::cuda::MergeKernel(performer::cuda::MergeParams)") == (
        "MergeKernel"
    )


TABLE = {
    "limits": [
        {"kernel": "Fast.*", "registers": 200, "blocks": 2, "loop_least": {"HMMA": 4}},
        {"kernel": ".*", "registers": 255, "blocks": 1, "stack": 64, "loop_spills": 9},
    ]
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"registers": 201}, "registers 201, at most 200"),
        ({"stack": 8}, "stack 8, at most 0"),
        ({"loop_spills": 1}, "loop_spills 1, at most 0"),
        ({"shared": 200 * 1024}, "1 blocks per multiprocessor, at least 2"),
        ({"loop": {"HMMA": 3}}, "3 HMMA in the main loop, at least 4"),
        ({"name": "Slow", "stack": 64, "loop_spills": 9, "registers": 255}, None),
        ({"threads": 0}, "no entry in limits.toml"),
    ],
)
def test_what_breaks_a_limit_is_named(changes, fault):
    fields = {"name": "Fast<1>", "registers": 128, "threads": 128, "loop": {"HMMA": 4}, **changes}
    fields["loop"] = CHECK["collections"].Counter(fields["loop"])
    found = CHECK["faults"](Kernel(architecture="sm_90", **fields), TABLE)
    assert found == ([] if fault is None else [fault])
