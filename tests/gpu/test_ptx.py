"""Every wrapper of PTX does what the PTX ISA says: on the GPU, or its host twin on the emulator."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import performer_probes as probes
import pytest

from support.gpu_calls import why_not

ROOT = Path(__file__).parents[2]
LANES, IN, OUT = 32, 12, 4
INFINITY, NAN = np.float32(np.inf), np.float32(np.nan)
pytestmark = pytest.mark.skipif(
    not probes.EMULATED and bool(why_not()), reason=why_not() or "there is a GPU"
)


def words(x) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def floats(x) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.uint32).view(np.float32)


def bits16(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)


def elementwise(name: str, x: np.ndarray) -> np.ndarray:
    """Runs a probe that takes and returns four words a lane on any number of words."""
    warps = -(-len(x) // (LANES * OUT))
    given = np.zeros((warps, LANES, IN), np.uint32)
    filled = np.zeros(warps * LANES * OUT, np.uint32)
    filled[: len(x)] = x
    given[:, :, :OUT] = filled.reshape(warps, LANES, OUT)
    return probes.run(name, given).reshape(-1)[: len(x)]


def test_every_wrapper_has_a_probe():
    header = (ROOT / "cc" / "cuda" / "device" / "ptx.h").read_text()
    gpu = header[header.index("#if defined(__CUDACC__)\n\nPERFORMER") : header.index("#else  //")]
    functions = re.split(r"(?=^(?:template <|PERFORMER_DEVICE ))", gpu, flags=re.M)
    names = {
        re.search(r"PERFORMER_DEVICE [\w ]+?(\w+)(?:<\w+>)?\(", f).group(1)
        for f in functions
        if "asm" in f
    }
    assert {"LdMatrixX4", "Exp2", "CpAsync16"} <= names
    used = (ROOT / "tests" / "gpu" / "probes.cuh").read_text()
    used += (ROOT / "tests" / "gpu" / "probes.cu").read_text()
    assert [name for name in sorted(names) if f"cuda::{name}" not in used] == []


class Product:
    """D = A B + D of one mma, from matrices: fragments as the PTX ISA draws them."""

    def __init__(self, name, depth, dtype):
        self.name, self.depth, self.dtype = name, depth, dtype

    def __call__(self, a, b, d):
        """[warps, 16, K], [warps, K, 8], [warps, 16, 8], as float32."""
        given = np.zeros((len(a), LANES, IN), np.uint32)
        for lane in range(LANES):
            g, t = lane // 4, lane % 4
            if self.depth == 16:
                for i in range(4):
                    row, column = g + 8 * (i % 2), 2 * t + 8 * (i // 2)
                    given[:, lane, i] = self._pair(a[:, row, column], a[:, row, column + 1])
                for i in range(2):
                    row = 2 * t + 8 * i
                    given[:, lane, 4 + i] = self._pair(b[:, row, g], b[:, row + 1, g])
            else:
                for i in range(4):
                    given[:, lane, i] = words(a[:, g + 8 * (i % 2), t + 4 * (i // 2)])
                for i in range(2):
                    given[:, lane, 4 + i] = words(b[:, t + 4 * i, g])
            for i in range(4):
                given[:, lane, 6 + i] = words(d[:, g + 8 * (i // 2), 2 * t + i % 2])
        out = floats(probes.run(self.name, given))
        result = np.empty((len(a), 16, 8), np.float32)
        for lane in range(LANES):
            for i in range(4):
                result[:, lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[:, lane, i]
        return result

    def _pair(self, low, high):
        return bits16(low.astype(self.dtype)) | bits16(high.astype(self.dtype)) << 16

    def random(self, rng, shape):
        """Normal numbers that the operand's type holds exactly."""
        x = rng.normal(size=shape).astype(np.float32)
        return (
            floats(words(x) & ~np.uint32(0x1FFF))
            if self.depth == 8
            else x.astype(self.dtype).astype(np.float32)
        )


PRODUCTS = [
    Product("MmaM16N8K16<BFloat16>", 16, ml_dtypes.bfloat16),
    Product("MmaM16N8K16<Half>", 16, np.float16),
    Product("MmaTf32M16N8K8", 8, np.float32),
]
products = pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)


@pytest.fixture(params=["H100", "A100"] if probes.EMULATED else ["H100"])
def tensor_cores(request):
    """Both that the emulator has; a GPU has its own."""
    probes.set_tensor_cores(request.param)
    yield request.param
    probes.set_tensor_cores("H100")


@products
def test_products_of_small_integers_are_exact(product):
    rng = np.random.default_rng(0)
    a, b, d = (
        rng.integers(-8, 9, (20, *shape)).astype(np.float32)
        for shape in ((16, product.depth), (product.depth, 8), (16, 8))
    )
    assert np.array_equal(product(a, b, d), a @ b + d)


@products
def test_products_have_the_accuracy_of_float32(product):
    rng = np.random.default_rng(1)
    a = product.random(rng, (50, 16, product.depth))
    b = product.random(rng, (50, product.depth, 8))
    d = rng.normal(size=(50, 16, 8)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64) + d
    size = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(d)
    # Tensor cores align the products to the largest and cut off what is below its last bit.
    assert np.max(np.abs(product(a, b, d) - exact) / size) < (product.depth + 1) * 2.0**-23


@pytest.mark.skipif(not probes.EMULATED, reason="a GPU does what it does")
@pytest.mark.parametrize("sign", [1, -1])
@products
def test_the_emulated_tensor_cores_cut_off_what_they_are_known_to(product, tensor_cores, sign):
    """An accumulator of 1 or -1, and products that are small beside it."""
    kept, steps = {"H100": (25, 1), "A100": (24, 2)}[tensor_cores]  # bits below 1
    in_a_step = product.depth // steps
    a = np.zeros((1, 16, product.depth), np.float32)
    b = np.zeros((1, product.depth, 8), np.float32)
    d = np.full((1, 16, 8), sign, np.float32)
    b[0] = 2.0**-11
    last, ulp = 2.0 ** (11 - kept), 2.0**-23
    a[0, 0] = sign * 2.0**-12  # each product an ulp of the accumulator
    a[0, 1] = sign * 1.5 * last  # each 1.5 of the last bit that is kept
    a[0, 2] = sign * 0.5 * last
    a[0, 3, 0] = sign * last  # kept, and lost when the sum becomes float32
    result = product(a, b, d)[0, :, 0] * sign
    assert result[0] == 1 + product.depth * ulp
    assert result[1] == 1 + steps * (in_a_step >> (kept - 23)) * ulp
    assert result[2] == 1
    assert result[3] == 1


# The kernels rely on these three: bits of past rows must not depend on later ones, which meet them
# as products with a zero; masked keys begin as -inf; a NaN must show.
@products
@pytest.mark.parametrize("swapped", [False, True], ids=["zeros in a", "zeros in b"])
def test_products_with_zero_change_no_bit_of_a_sum(product, swapped, tensor_cores):
    """Sums so small that the exponents of the factors would push them out: a zero's exponent field
    is that of the smallest numbers, so that with the largest factor it stands for about 2."""
    rng = np.random.default_rng(2)
    half = product.depth // 2
    largest, small = (2.0**15, 2.0**-12) if product.dtype == np.float16 else (2.0**127, 2.0**-30)
    a = (product.random(rng, (50, 16, product.depth)) * small).astype(product.dtype)
    b = (product.random(rng, (50, product.depth, 8)) * small).astype(product.dtype)
    a, b = a.astype(np.float32), b.astype(np.float32)
    d = (rng.normal(size=(50, 16, 8)) * small**2).astype(np.float32)
    zeros, others = (b.transpose(0, 2, 1), a) if swapped else (a, b.transpose(0, 2, 1))
    zeros[..., half:] = 0
    results = []
    for factor in (0, largest, -largest):
        others[..., half:] = factor
        results.append(words(product(a, b, d)))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    zeros[:] = 0
    assert np.array_equal(words(product(a, b, d)), words(d))


@products
def test_an_accumulator_of_minus_infinity_stays(product):
    rng = np.random.default_rng(3)
    a = product.random(rng, (4, 16, product.depth))
    b = product.random(rng, (4, product.depth, 8))
    d = np.zeros((4, 16, 8), np.float32)
    d[:, :, 3] = -INFINITY
    result = product(a, b, d)
    assert np.all(np.isneginf(result[:, :, 3]))
    assert np.all(np.isfinite(np.delete(result, 3, axis=2)))


@products
def test_a_nan_shows_in_its_row_only(product):
    rng = np.random.default_rng(4)
    a = product.random(rng, (4, 16, product.depth))
    b = product.random(rng, (4, product.depth, 8))
    a[:, 5, 2] = NAN
    result = product(a, b, np.zeros((4, 16, 8), np.float32))
    assert np.all(np.isnan(result[:, 5]))
    assert np.all(np.isfinite(np.delete(result, 5, axis=1)))


@pytest.mark.parametrize("name", ["LdMatrixX4", "LdMatrixX4Trans"])
def test_ldmatrix_gives_each_lane_its_pairs(name):
    matrices = np.random.default_rng(5).integers(0, 2**16, (3, 4, 8, 8), np.uint16)
    given = np.zeros((3, LANES, IN), np.uint32)
    given[:, :, :4] = matrices.reshape(3, LANES, 8).view(np.uint32)
    seen = matrices.transpose(0, 1, 3, 2) if name.endswith("Trans") else matrices
    out = probes.run(name, given)
    for lane in range(LANES):
        row, column = lane // 4, 2 * (lane % 4)
        low, high = (seen[:, :, row, column + i].astype(np.uint32) for i in range(2))
        assert np.array_equal(out[:, lane], low | high << 16)


def test_cp_async_copies_or_writes_zeros_and_arrives_with_its_wait():
    given = np.random.default_rng(6).integers(0, 2**32, (8, LANES, IN), np.uint32)
    given[:, :, 8] = np.random.default_rng(7).integers(0, 2, (8, LANES))
    first = np.where(given[:, :, 8:9] != 0, given[:, :, 0:4], 0)
    second = given[:, :, 4:8]
    other = np.arange(LANES) ^ 1
    wanted = np.stack(
        [first[:, other, 0], first[:, other, 3], second[:, other, 0], second[:, other, 3]], axis=2
    )
    assert np.array_equal(probes.run("CpAsync", given), wanted)


def test_opaque_is_the_identity():
    x = np.random.default_rng(8).integers(0, 2**32, 1000, np.uint32)
    assert np.array_equal(elementwise("Opaque", x), x)


def test_exp2_has_its_stated_error_and_limits():
    x = np.random.default_rng(9).uniform(-125, 127, 20000).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    y = floats(elementwise("Exp2", words(x)))
    assert np.max(np.abs(y / exact - 1)) <= 2.0**-22
    special = np.array([0, -0.0, -INFINITY, INFINITY, -150, 200, NAN], np.float32)
    expected = np.array([1, 1, 0, INFINITY, 0, INFINITY, NAN], np.float32)
    np.testing.assert_array_equal(floats(elementwise("Exp2", words(special))), expected)


def test_log2_has_its_stated_error_and_limits():
    rng = np.random.default_rng(10)
    near = rng.uniform(0.5, 2, 20000).astype(np.float32)
    y = floats(elementwise("Log2", words(near)))
    assert np.max(np.abs(y - np.log2(near.astype(np.float64)))) <= 2.0**-22
    far = np.exp2(rng.uniform(-120, 120, 20000)).astype(np.float32)
    far = far[(far < 0.5) | (far > 2)]
    exact = np.log2(far.astype(np.float64))
    assert np.max(np.abs(floats(elementwise("Log2", words(far))) / exact - 1)) <= 2.0**-22
    special = np.array([1, 0, INFINITY, -1, NAN], np.float32)
    expected = np.array([0, -INFINITY, INFINITY, NAN, NAN], np.float32)
    np.testing.assert_array_equal(floats(elementwise("Log2", words(special))), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("Pack<BFloat16>", ml_dtypes.bfloat16), ("Pack<Half>", np.float16)]
)
def test_pairs_are_rounded_to_nearest_even(name, dtype):
    rng = np.random.default_rng(11)
    x = np.concatenate(
        [
            rng.normal(size=4000) * np.exp2(rng.uniform(-30, 15, 4000)),
            1 + np.arange(64) * 2.0**-12,  # ties of both types
            [0, -0.0, INFINITY, -INFINITY, 65519, 65520, 65536, 1e38, 2.0**-25, 2.0**-24],
        ]
    ).astype(np.float32)
    x = x[: len(x) // 64 * 64]
    given = np.zeros((len(x) // 64, LANES, IN), np.uint32)
    given[:, :, :2] = words(x).reshape(-1, LANES, 2)
    out = probes.run(name, given)
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype).reshape(-1, LANES, 2)
    low, high = bits16(rounded[..., 0]), bits16(rounded[..., 1])
    assert np.array_equal(out[..., 0], low | high << 16)
    assert np.array_equal(out[..., 1], words(rounded[..., 0].astype(np.float32)))
    assert np.array_equal(out[..., 2], words(rounded[..., 1].astype(np.float32)))
    assert np.array_equal(out[..., 3], low)
    given[:, :, 0] = words(NAN)
    assert np.all(np.isnan(floats(probes.run(name, given)[..., 1])))


def test_every_half_becomes_its_float32():
    halves = np.arange(2**16, dtype=np.uint32)
    exact = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    result = floats(elementwise("HalfToFloat", halves))
    assert np.array_equal(np.isnan(result), np.isnan(exact))
    finite = ~np.isnan(exact)
    assert np.array_equal(words(result[finite]), words(exact[finite]))


def test_tf32_is_rounded_to_nearest_ties_away_from_zero():
    x = np.concatenate(
        [
            np.random.default_rng(12).normal(size=5000),
            1 + np.arange(16) * 2.0**-11,  # every second one a tie
            -1 - np.arange(16) * 2.0**-11,
        ]
    ).astype(np.float32)
    # What lies below the 10 bits, the tensor cores ignore.
    result = floats(elementwise("ToTf32", words(x)) & ~np.uint32(0x1FFF))
    scaled = np.abs(np.frexp(x)[0].astype(np.float64)) * 2**11
    wanted = np.copysign(np.floor(scaled + 0.5) * np.exp2(np.frexp(x)[1] - 11.0), x)
    assert np.array_equal(result, wanted.astype(np.float32))
