"""Projections are block-orthogonal, have E|w|^2 = D, and are the same for the same seed."""

import numpy as np
import pytest
import tensorflow as tf

from performer.features.projections import orthogonal_projection
from support.compare import assert_close, assert_same_bits

SHAPES = [(1, 1), (5, 1), (3, 8), (8, 8), (9, 8), (25, 8), (64, 16), (200, 64)]
shapes = pytest.mark.parametrize(("rows", "dim"), SHAPES, ids=[f"M={m}, D={d}" for m, d in SHAPES])


@shapes
@pytest.mark.parametrize("scaling", [0, 1])
def test_rows_of_a_block_are_orthogonal(rows, dim, scaling):
    w = orthogonal_projection(rows, dim, scaling=scaling, seed=3, dtype=tf.float64).numpy()
    assert w.shape == (rows, dim)
    for start in range(0, rows, dim):
        block = w[start : start + dim]
        direction = block / np.linalg.norm(block, axis=1, keepdims=True)
        assert_close(direction @ direction.T, np.eye(len(block)), worst=1e-12)


@shapes
def test_scaling_1_gives_every_row_the_norm_sqrt_D(rows, dim):
    w = orthogonal_projection(rows, dim, scaling=1, seed=3, heads=2, dtype=tf.float64).numpy()
    assert_close(np.sum(w**2, -1), np.full((2, rows), float(dim)), relative=1e-12)


@shapes
def test_drawn_norms_have_the_mean_and_variance_of_chi_squared(rows, dim):
    heads = -(-20_000 // (rows * dim)) * 2
    heads = max(heads, -(-4000 // rows))
    w = orthogonal_projection(rows, dim, seed=11, heads=heads).numpy().astype(np.float64)
    squares = np.sum(w**2, -1).reshape(-1)
    count = squares.size
    deviation = np.sqrt(2 * dim / count)  # of the mean of chi-squared with D degrees
    assert abs(squares.mean() - dim) < 5 * deviation, (squares.mean(), dim)
    assert abs(squares.var() / (2 * dim) - 1) < 5 * np.sqrt((2 + 12 / dim) / count), squares.var()


def test_norms_are_drawn_independently_of_each_other():
    squares = np.sum(orthogonal_projection(4, 4, seed=5, heads=4000).numpy() ** 2, -1)
    correlation = np.corrcoef(squares.T)
    assert_close(correlation, np.eye(4), worst=5 / np.sqrt(4000))


def test_directions_favour_none():
    w = orthogonal_projection(3, 3, scaling=1, seed=2, heads=4000).numpy()
    assert_close(w.mean(0), np.zeros((3, 3)), worst=5 / np.sqrt(4000))
    for row in range(3):  # E[w w'] = I
        second = np.einsum("hi,hj->ij", w[:, row], w[:, row]) / len(w)
        assert_close(second, np.eye(3), worst=0.08, what=f"row {row}")


def test_blocks_and_heads_are_different_draws():
    w = orthogonal_projection(8, 4, seed=2, heads=2).numpy()
    assert np.abs(w[0] - w[1]).max() > 0.1
    assert np.abs(w[0, :4] - w[0, 4:]).max() > 0.1


def test_one_seed_gives_one_projection_in_eager_mode_in_graphs_and_under_xla():
    first = orthogonal_projection(20, 8, seed=7)
    assert_same_bits(orthogonal_projection(20, 8, seed=7), first)
    assert_same_bits(orthogonal_projection(20, 8, seed=[7, 0]), first)
    for jit_compile in (False, True):
        traced = tf.function(
            lambda seed: orthogonal_projection(20, 8, seed=seed), jit_compile=jit_compile
        )
        assert_close(traced(tf.constant([7, 0])), first, worst=5e-7)  # one unit in the last place
        assert np.abs(traced(tf.constant([8, 0])) - first).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_result_has_the_type_and_shape_asked_for(dtype):
    w = orthogonal_projection(6, 4, seed=1, dtype=dtype, heads=3)
    assert (w.dtype.name, w.shape) == (dtype, (3, 6, 4))


@pytest.mark.parametrize(
    ("error", "word", "changes"),
    [
        (ValueError, "rows", {"rows": 0}),
        (ValueError, "rows", {"rows": 2.0}),
        (ValueError, "dim", {"dim": -1}),
        (ValueError, "heads", {"heads": 0}),
        (ValueError, "scaling", {"scaling": 2}),
        (ValueError, "seed", {"seed": [1, 2, 3]}),
        (ValueError, "seed", {"seed": 0.5}),
        (TypeError, "dtype", {"dtype": tf.int32}),
    ],
)
def test_bad_arguments_are_named(error, word, changes):
    with pytest.raises(error, match=f"{word} must"):
        orthogonal_projection(**{"rows": 4, "dim": 4, "seed": 0, **changes})
