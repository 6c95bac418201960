"""The operand layouts of the emulated tensor-core instructions, against another source than the one
they were written from: the layout functions of CuTe's MMA_Traits (CUTLASS, mma_traits_sm80.hpp).

A layout is shape:stride over (lane, register), giving the place in a column-major matrix.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

from support.emulated_calls import emulated

# (shape of the lane, shape of the register), (their strides)
M16N8K16 = {
    "a": (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    "b": (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    "c": (((4, 8), (2, 2)), ((32, 1), (16, 8))),
}
M16N8K8 = {
    "a": (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    "b": (((4, 8), (2,)), ((8, 1), (32,))),
    "c": (((4, 8), (2, 2)), ((32, 1), (16, 8))),
}
KINDS = {
    "MmaBFloat16": (M16N8K16, 16, ml_dtypes.bfloat16),
    "MmaHalf": (M16N8K16, 16, np.float16),
    "MmaTf32": (M16N8K8, 8, np.float32),
}


def places(layout):
    """Place of every register of every lane: [32, registers]."""
    (lanes, registers), (lane_strides, register_strides) = layout

    def offsets(shape, strides):
        # The first mode runs fastest.
        order = itertools.product(*(range(n) for n in reversed(shape)))
        return [sum(i * s for i, s in zip(reversed(x), strides, strict=True)) for x in order]

    return np.add.outer(offsets(lanes, lane_strides), offsets(registers, register_strides))


@pytest.mark.parametrize("kind", KINDS)
def test_operands_lie_where_cute_says(kind):
    layouts, depth, dtype = KINDS[kind]
    rng = np.random.default_rng(0)
    # Small integers: exact in every type.
    a, b, c = (
        rng.integers(-8, 9, s).astype(np.float32) for s in ((16, depth), (8, depth), (16, 8))
    )
    lanes = {}
    for name, matrix in (("a", a), ("b", b), ("c", c)):
        lanes[name] = matrix.flatten("F")[places(layouts[name])]
    x = np.concatenate(
        [np.ascontiguousarray(lanes[n].astype(dtype)).view(np.float32) for n in "ab"]
        + [lanes["c"]],
        axis=1,
    )
    out = emulated.planted(kind, x.ravel(), False, blocks=1, threads=32).reshape(32, 4)
    result = np.zeros(16 * 8, np.float32)
    result[places(layouts["c"])] = out
    assert np.array_equal(result.reshape(16, 8, order="F"), a @ b.T + c)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_pair(transposed):
    numbers = np.arange(4 * 8 * 8, dtype=np.uint16)
    x = np.concatenate([numbers.view(np.float32), np.zeros(192, np.float32)])
    kernel = "LdMatrixTrans" if transposed else "LdMatrix"
    out = emulated.planted(kernel, x, False, blocks=1, threads=32)
    pairs = out.view(np.uint16).reshape(32, 4, 2)
    matrices = numbers.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    for lane, i in np.ndindex(32, 4):
        row, column = lane // 4, 2 * (lane % 4)
        assert np.array_equal(pairs[lane, i], matrices[i, row, column : column + 2])
