"""The interpreter of PTX does what the PTX ISA says, and names what it does not know."""

import numpy as np
import performer_ptx
import pytest

LANES = np.arange(32, dtype=np.uint32)

# Addresses of what a thread is given and of what it writes, four words each: %rd1, %rd2. Its
# numbers: %r1 to %r4. The result is %r5.
KERNEL = """
.extern .shared .align 128 .b8 shared[];
.visible .entry k(
	.param .align 8 .b8 k_param_0[16]
)
.maxntid 128, 1, 1
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<9>;

	ld.param.u64 	%rd3, [k_param_0];
	ld.param.u64 	%rd4, [k_param_0+8];
	mov.u32 	%r6, %tid.x;
	mov.u32 	%r7, %ctaid.x;
	mov.u32 	%r8, %ntid.x;
	mad.lo.s32 	%r9, %r7, %r8, %r6;
	mul.wide.u32 	%rd5, %r9, 16;
	add.s64 	%rd1, %rd3, %rd5;
	add.s64 	%rd2, %rd4, %rd5;
	ld.global.v4.u32 	{{%r1, %r2, %r3, %r4}}, [%rd1];
	mov.u32 	%r5, 0;
{body}
	st.global.u32 	[%rd2], %r5;
	ret;
}}
"""


def interpret(body, given=None, *, blocks=1, threads=32, **options):
    """%r5 of each thread; it is given four words."""
    performer_ptx.load(KERNEL.format(body=body))
    words = np.zeros((blocks * threads, 4), np.uint32) if given is None else given
    result = performer_ptx.launch("k", words, words.size, blocks=blocks, threads=threads, **options)
    return result.reshape(blocks * threads, 4)[:, 0]


def random_words(threads=32, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (threads, 4), np.uint32)


def wrapped(x):
    return (x.astype(object) & 0xFFFFFFFF).astype(np.uint32)


def signed(x):
    return x.view(np.int32).astype(np.int64)


INTEGERS = {
    "add.s32 %r5, %r1, %r2;": lambda a, b, c: a + b,
    "sub.s32 %r5, %r1, %r2;": lambda a, b, c: a - b,
    "mul.lo.s32 %r5, %r1, %r2;": lambda a, b, c: a * b,
    "mad.lo.s32 %r5, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
    "mul.hi.u32 %r5, %r1, %r2;": lambda a, b, c: wrapped(
        a.astype(object) * b.astype(object) // 2**32
    ),
    "div.u32 %r5, %r1, %r2;": lambda a, b, c: a // b,
    "rem.u32 %r5, %r1, %r2;": lambda a, b, c: a % b,
    "div.s32 %r5, %r1, 7;": lambda a, b, c: wrapped(np.trunc(signed(a) / 7).astype(np.int64)),
    "rem.s32 %r5, %r1, 7;": lambda a, b, c: wrapped(np.fmod(signed(a), 7)),
    "min.s32 %r5, %r1, %r2;": lambda a, b, c: wrapped(np.minimum(signed(a), signed(b))),
    "max.u32 %r5, %r1, %r2;": lambda a, b, c: np.maximum(a, b),
    "and.b32 %r5, %r1, -16;": lambda a, b, c: a & 0xFFFFFFF0,
    "xor.b32 %r5, %r1, %r2;": lambda a, b, c: a ^ b,
    "not.b32 %r5, %r1;": lambda a, b, c: ~a,
    "neg.s32 %r5, %r1;": lambda a, b, c: wrapped(-a.astype(np.int64)),
    "shl.b32 %r5, %r1, 5;": lambda a, b, c: a << 5,
    "shl.b32 %r5, %r1, 32;": lambda a, b, c: a * 0,
    "shr.u32 %r5, %r1, 31;": lambda a, b, c: a >> 31,
    "shr.s32 %r5, %r1, 40;": lambda a, b, c: wrapped(signed(a) >> 31),
    "bfi.b32 %r5, %r1, %r2, 8, 4;": lambda a, b, c: (b & 0xFFFFF0FF) | (a & 15) << 8,
    "bfe.u32 %r5, %r1, 8, 4;": lambda a, b, c: a >> 8 & 15,
    "prmt.b32 %r5, %r1, %r2, 0x5410;": lambda a, b, c: (a & 0xFFFF) | b << 16,
    "prmt.b32 %r5, %r1, %r2, 0x9180;": lambda a, b, c: wrapped(
        (signed(a) >> 31 & 0)
        | (a & 0xFF)
        | ((a & 0x80) // 0x80 * 0xFF) << 8
        | (a >> 8 & 0xFF) << 16
        | ((a >> 15 & 1) * 0xFF) << 24
    ),
    "mul.wide.s32 %rd6, %r1, %r2; shr.s64 %rd6, %rd6, 32; cvt.u32.u64 %r5, %rd6;": (
        lambda a, b, c: wrapped(signed(a) * signed(b) >> 32)
    ),
    "cvt.s64.s32 %rd6, %r1; max.s64 %rd6, %rd6, 0; cvt.u32.u64 %r5, %rd6;": (
        lambda a, b, c: np.where(signed(a) > 0, a, 0)
    ),
    "cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r5, %rs1;": lambda a, b, c: a & 0xFFFF,
    "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r5, %rs1;": lambda a, b, c: wrapped(
        a.astype(np.uint16).view(np.int16).astype(np.int64)
    ),
    "mov.b64 %rd6, {%r1, %r2}; shr.u64 %rd6, %rd6, 16; mov.b64 {%r5, %r6}, %rd6;": (
        lambda a, b, c: a >> 16 | b << 16
    ),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r5, {%rs2, %rs1};": lambda a, b, c: a >> 16 | a << 16,
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r5, %r1, %r2, %p1;": lambda a, b, c: np.where(
        signed(a) < signed(b), a, b
    ),
    "setp.lt.u32 %p1, %r1, %r2; @!%p1 mov.u32 %r5, %r3;": lambda a, b, c: np.where(a < b, 0, c),
    "setp.eq.s32 %p1, %r1, %r2; setp.ne.s32 %p2, %r1, %r2; or.pred %p3, %p1, %p2; "
    "and.pred %p4, %p3, %p2; selp.u32 %r5, 1, 0, %p4;": lambda a, b, c: (a != b) * 1,
}


def statements(text):
    return "\n".join(f"\t{part.strip()};" for part in text.split(";") if part.strip())


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text):
    given = random_words()
    given[0, :2], given[1, :2] = (5, 5), (2**31, 1)
    wanted = INTEGERS[text](*given[:, :3].T.copy())
    np.testing.assert_array_equal(interpret(statements(text), given), wanted.astype(np.uint32))


def floats_of(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


SPECIAL = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1, -1], np.float32)
FLOATS = {
    "add.f32 %f4, %f1, %f2;": lambda a, b, c: a + b,
    "sub.f32 %f4, %f1, %f2;": lambda a, b, c: a - b,
    "mul.f32 %f4, %f1, %f2;": lambda a, b, c: a * b,
    "div.rn.f32 %f4, %f1, %f2;": lambda a, b, c: a / b,
    "rcp.rn.f32 %f4, %f1;": lambda a, b, c: 1 / a,
    "neg.f32 %f4, %f1;": lambda a, b, c: -a,
    "abs.f32 %f4, %f1;": lambda a, b, c: np.abs(a),
    "max.f32 %f4, %f1, %f2;": lambda a, b, c: np.fmax(a, b),
    "min.f32 %f4, %f1, %f2;": lambda a, b, c: np.fmin(a, b),
    "fma.rn.f32 %f4, %f1, %f2, %f3;": lambda a, b, c: (a.astype(np.float64) * b + c).astype(
        np.float32
    ),
    "setp.leu.f32 %p1, %f1, %f2; selp.f32 %f4, %f1, %f2, %p1;": lambda a, b, c: np.where(
        a > b, b, a
    ),
    "setp.gt.f32 %p1, %f1, %f2; selp.f32 %f4, %f1, %f2, %p1;": lambda a, b, c: np.where(
        a > b, a, b
    ),
    "setp.neu.f32 %p1, %f1, %f2; selp.f32 %f4, %f1, %f3, %p1;": lambda a, b, c: np.where(
        a != b, a, c
    ),
    "cvt.sat.f32.f32 %f4, %f1;": lambda a, b, c: np.where(np.isnan(a), 0, np.clip(a, 0, 1)),
    "cvt.rzi.s32.f32 %r6, %f1; cvt.rn.f32.s32 %f4, %r6;": lambda a, b, c: np.where(
        np.isnan(a), 0, np.clip(np.trunc(a), -(2.0**31), 2.0**31)
    ),
}


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text):
    x = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32) * 10
    x[:64, 0], x[:64, 1] = np.repeat(SPECIAL, 8), np.tile(SPECIAL, 8)
    take = "mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3;"
    with np.errstate(all="ignore"):
        wanted = FLOATS[text](*x[:, :3].T.copy()).astype(np.float32)
    body = statements(take + text + "mov.b32 %r5, %f4;")
    result = interpret(body, floats_of(x), threads=96).view(np.float32)
    np.testing.assert_array_equal(result, wanted)


def test_a_sum_is_rounded_downward_where_it_says_so():
    x = np.array([[1, 1, 2.0**-30, 0], [1, -1, 2.0**-30, 0], [1, 1, -(2.0**-30), 0]], np.float32)
    given = floats_of(np.resize(x, (32, 4)))
    take = "mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3;"
    body = statements(take + "fma.rm.f32 %f4, %f1, %f2, %f3; mov.b32 %r5, %f4;")
    result = interpret(body, given).view(np.float32)[:3]
    np.testing.assert_array_equal(result, np.float32([1, -1, 1 - 2.0**-24]))


# ---- Control flow

LOOP = """
	setp.eq.s32 	%p1, %r1, 0;
	@%p1 bra 	$L_end;
	mov.u32 	%r10, %r1;
$L_loop:
	add.s32 	%r5, %r5, %r10;
	and.b32 	%r11, %r10, 1;
	setp.eq.s32 	%p2, %r11, 0;
	@%p2 bra 	$L_even;
	add.s32 	%r5, %r5, 100;
	bra.uni 	$L_next;
$L_even:
	add.s32 	%r5, %r5, 1000;
$L_next:
	sub.s32 	%r10, %r10, 1;
	setp.ne.s32 	%p3, %r10, 0;
	@%p3 bra 	$L_loop;
$L_end:
	vote.sync.any.pred 	%p4, %p1, -1;
	@%p4 add.s32 	%r5, %r5, 1;
"""


def test_lanes_part_in_branches_and_loops_and_join_again():
    given = random_words() % 20
    given[3, 0] = 0
    n = given[:, 0]
    wanted = [sum(k + (100 if k % 2 else 1000) for k in range(1, x + 1)) + 1 for x in n]
    np.testing.assert_array_equal(interpret(LOOP, given), wanted)


def test_threads_may_end_early():
    body = "\tsetp.lt.u32 \t%p1, %r6, 5;\n\t@%p1 ret;\n\tmov.u32 \t%r5, 7;\n"
    result = interpret(body)
    np.testing.assert_array_equal(result, np.where(LANES < 5, 0xFFFFFFFF, 7))


def test_each_block_and_thread_knows_its_place():
    result = interpret("\tmov.u32 \t%r5, %r9;\n", blocks=3, threads=64)
    np.testing.assert_array_equal(result, np.arange(192))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_barriers_order_the_warps_of_a_block(order, seed):
    body = """
	shl.b32 	%r10, %r6, 2;
	mov.u32 	%r11, shared;
	add.s32 	%r12, %r11, %r10;
	st.shared.u32 	[%r12], %r1;
	bar.sync 	0;
	xor.b32 	%r13, %r10, 508;
	add.s32 	%r13, %r11, %r13;
	ld.shared.u32 	%r5, [%r13];
"""
    given = random_words(128)
    options = {"threads": 128, "shared_bytes": 512}
    result = interpret(body, given, order=order, seed=seed, **options)
    np.testing.assert_array_equal(result, given[::-1, 0])
    without = interpret(body.replace("bar.sync 	0;", ""), given, order="reverse", **options)
    assert not np.array_equal(without, given[::-1, 0])


# ---- Among lanes

SHUFFLES = {
    "shfl.sync.bfly.b32 %r5|%p1, %r1, 4, 31, -1;": LANES ^ 4,
    "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;": LANES ^ 1,
    "shfl.sync.idx.b32 %r5|%p1, %r1, 9, 31, -1;": LANES * 0 + 9,
    "shfl.sync.down.b32 %r5|%p1, %r1, 3, 31, -1;": np.where(LANES + 3 < 32, LANES + 3, LANES),
    "shfl.sync.up.b32 %r5|%p1, %r1, 3, 0, -1;": np.where(LANES >= 3, LANES - 3, LANES),
    "shfl.sync.idx.b32 %r5|%p1, %r1, 2, 6175, -1;": LANES // 8 * 8 + 2,  # in parts of 8 lanes
}


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text):
    given = random_words()
    np.testing.assert_array_equal(interpret(statements(text), given), given[SHUFFLES[text], 0])


def test_votes():
    given = np.zeros((32, 4), np.uint32)
    given[5, 0] = 1
    for kind, wanted in (("any", 1), ("all", 0)):
        text = f"setp.ne.s32 %p1, %r1, 0; vote.sync.{kind}.pred %p2, %p1, -1;"
        result = interpret(statements(text + "selp.u32 %r5, 1, 0, %p2;"), given)
        assert set(result) == {wanted}


def test_atomics_return_what_was_there_before():
    given = random_words() >> 1
    body = """
	setp.eq.s32 	%p1, %r6, 0;
	@%p1 st.shared.u32 	[shared], 2147483647;
	bar.warp.sync 	-1;
	atom.shared.min.s32 	%r10, [shared], %r1;
	bar.warp.sync 	-1;
	ld.shared.u32 	%r5, [shared];
"""
    body = body.replace("[shared], 2147483647", "[shared], %r11").replace(
        "\tsetp.eq", "\tmov.u32 \t%r11, 2147483647;\n\tsetp.eq", 1
    )
    assert set(interpret(body, given, shared_bytes=4)) == {given[:, 0].min()}
    before = interpret(
        body.replace("%r5, [shared]", "%r12, [shared]").replace("%r10,", "%r5,"),
        given,
        shared_bytes=4,
    )
    assert before[0] == 2147483647
    np.testing.assert_array_equal(before[1:], np.minimum.accumulate(given[:, 0])[:-1])


COPY = """
	shl.b32 	%r10, %r6, 4;
	mov.u32 	%r11, shared;
	add.s32 	%r12, %r11, %r10;
	st.shared.u32 	[%r12], %r6;
	cp.async.cg.shared.global 	[%r12], [%rd1], 16, 16;
	cp.async.commit_group;
	{wait}
	ld.shared.u32 	%r5, [%r12];
	cp.async.wait_group 	0;
"""


def test_copies_arrive_as_late_as_they_may():
    given = random_words()
    options = {"shared_bytes": 512, "order": "forward"}
    early = interpret(COPY.format(wait=""), given, **options)
    np.testing.assert_array_equal(early, LANES)
    waited = interpret(COPY.format(wait="cp.async.wait_group 0;"), given, **options)
    np.testing.assert_array_equal(waited, given[:, 0])
    some = interpret(COPY.format(wait=""), given, shared_bytes=512, order="random")
    assert 0 < np.sum(some == given[:, 0]) < 32


# ---- Errors

WRONG = {
    "mul.hi.u16 %r5, %r1, %r2;": "instruction mul.hi.u16 is not known|16",
    "bra.div $L;": "instruction bra.div is not known",
    "tanh.approx.f32 %f1, %f2;": "instruction tanh.approx.f32 is not known",
    "cp.async.ca.shared.global [%r1], [%rd1], 16, 16;": "cp.async.ca.shared.global is not known",
    "ld.volatile.global.u32 %r5, [%rd1];": "ld.volatile.global.u32 is not known",
    "mov.u32 %r5, %clock;": "register %clock is not known",
    "mov.u32 %r5, somewhere;": "operand somewhere is not known",
    "add.s32 %r5, %rs1, %r2;": "%rs1 has 16 bits, and not 32",
    "add.s32 %r5, %r1;": "add.s32 takes 3 operands",
    "bra $L_nowhere;": "no label",
    "bar.sync 1;": "only barrier 0",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_known_is_an_error_that_names_it(text):
    with pytest.raises(ValueError, match=WRONG[text]) as error:
        performer_ptx.load(KERNEL.format(body=f"\t{text}\n"))
    assert text.rstrip(";") in str(error.value)


FAILING = {
    "global memory before the buffer": ("ld.global.u32 %r5, [%rd3+-4];", "in no buffer"),
    "global memory behind the buffer": ("ld.global.u32 %r5, [%rd3+512];", "in no buffer"),
    "an input": ("st.global.u32 [%rd1], %r5;", "an input is written"),
    "shared memory": ("mov.u32 %r10, shared; ld.shared.u32 %r5, [%r10+64];", "outside of shared"),
    "before shared memory": ("mov.u32 %r10, 0; ld.shared.u32 %r5, [%r10];", "outside of shared"),
    "parameters": ("ld.param.u32 %r5, [k_param_0+16];", "outside of parameter"),
    "alignment": ("ld.global.u32 %r5, [%rd1+2];", "not aligned to 4 bytes"),
    "a vector's alignment": ("ld.global.v2.u32 {%r5, %r6}, [%rd1+4];", "not aligned to 8"),
    "a copy that nothing waits for": (
        "cp.async.cg.shared.global [shared], [%rd1], 16, 16; cp.async.commit_group;",
        "copies in flight",
    ),
    "a shuffle from a lane that takes no part": (
        "setp.lt.u32 %p1, %r6, 16; @!%p1 bra $L_end; shfl.sync.idx.b32 %r5, %r1, 20, 31, 65535; "
        "$L_end:",
        "takes no part",
    ),
    "a shuffle that some lanes do not reach": (
        "setp.lt.u32 %p1, %r6, 16; @%p1 bra $L_end; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; "
        "$L_end:",
        "waits for lanes that never come",
    ),
    "a barrier that some lanes do not reach": (
        "setp.lt.u32 %p1, %r6, 16; @%p1 bra $L_end; bar.sync 0; $L_end:",
        "waits for lanes that never come",
    ),
    "a barrier that a warp does not reach": (
        "setp.lt.u32 %p1, %r6, 32; @%p1 bra $L_end; bar.sync 0; $L_end:",
        "waits for warps that have ended",
    ),
    "a loop without an end": ("$L_loop: bra $L_loop;", "does not end"),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_a_kernel_does_wrong_is_an_error_that_names_the_instruction(name):
    text, message = FAILING[name]
    body = "".join(
        f"{part}\n" if part.endswith(":") else f"\t{part};\n"
        for part in (p.strip() for p in text.replace(": ", ":;").replace(":", ":;").split(";"))
        if part
    )
    threads = 64 if "warp" in name else 32
    with pytest.raises(RuntimeError, match=message) as error:
        interpret(body, threads=threads, shared_bytes=64, order="forward")
    assert "in k, block 0,0,0 warp" in str(error.value)


def test_blocks_are_not_larger_than_a_kernel_is_made_for():
    with pytest.raises(RuntimeError, match="160 threads; it is made for 128"):
        interpret("", threads=160)


def test_two_kernels_of_one_name_must_be_the_same():
    text = KERNEL.format(body="")
    performer_ptx.load(text + text)
    with pytest.raises(ValueError, match="two different kernels k"):
        performer_ptx.load(text + KERNEL.format(body="\tadd.s32 \t%r5, %r5, 1;\n"))
