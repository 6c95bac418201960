"""Every GPU gets an answer: a kernel, or plain TensorFlow and a word why. None is needed here."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import performer
from performer.ops import gpus
from performer.ops.gpus import Build, Call, Card

ROOT = Path(__file__).parents[2]
WHEEL = Build(("sm_80", "sm_90", "compute_90"), cuda=12)
NEWER = Build(("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"), cuda=12)
CALL = Call("causal", tf.bfloat16, (64, 64), (16, 4))
CARDS = {  # capability, and whether the wheel's kernels take heads of 64, and of 128 and 256
    "Tesla V100": ((7, 0), False, False),
    "Tesla T4": ((7, 5), False, False),
    "A100": ((8, 0), True, True),
    "GeForce RTX 3090": ((8, 6), True, False),
    "Jetson AGX Orin": ((8, 7), True, True),
    "L4": ((8, 9), True, False),
    "H100": ((9, 0), True, True),
    "B200": ((10, 0), True, True),
    "GeForce RTX 5090": ((12, 0), True, False),
}


@pytest.mark.parametrize("operator", ["causal", "near_far", "near_far_grad"])
@pytest.mark.parametrize("name", CARDS)
def test_each_card_has_kernels_or_a_reason(name, operator):
    capability, narrow, wide = CARDS[name]
    card, call = Card(name, capability, driver=535), CALL._replace(operator=operator)
    for build in (WHEEL, NEWER):
        assert (gpus.fault(call, card, build) == "") == narrow
        for width in (128, 256):
            found = gpus.fault(call._replace(widths=(64, width)), card, build)
            assert (found == "") == wide
            assert wide or name in found


@pytest.mark.parametrize(
    ("call", "card", "build", "words"),
    [
        ({"dtype": tf.float64}, {}, {}, "they take float32, bfloat16, float16, not float64"),
        ({"widths": (64, 257)}, {}, {}, "heads of D and E up to 256, not 257"),
        (
            {"widths": (129, 64), "dtype": tf.float32},
            {},
            {},
            "heads of D and E up to 128 in float32, not 129",
        ),
        ({"heads": (65536, 1)}, {}, {}, "up to 65535 heads, not 65536"),
        ({"operator": "append_rows"}, {}, {}, "append_rows has no kernel for GPUs"),
        ({}, {"driver": 520}, {}, "CUDA 12, which needs driver 525, and this driver is 520"),
        ({}, {"driver": 570}, {"cuda": 13}, "needs driver 580"),
        ({}, {}, {"targets": (), "left_out": "switched off"}, "built without them (switched off)"),
        ({}, {"capability": (9, 0)}, {"targets": ("sm_80",)}, "compiled for sm_80, and A100 has 9"),
        ({}, {"capability": (9, 0)}, {"targets": ("sm_100a",)}, "compiled for sm_100a"),
    ],
)
def test_what_has_no_kernel_is_said(call, card, build, words):
    card = Card("A100", (8, 0), 535)._replace(**card)
    assert words in gpus.fault(CALL._replace(**call), card, WHEEL._replace(**build))


def test_what_is_not_known_stops_no_kernel():
    assert gpus.fault(CALL._replace(widths=(None, 64)), Card("GPU", None), WHEEL) == ""


def test_the_rules_are_those_of_the_kernels():
    run = (ROOT / "cc/cuda/run.h").read_text()
    for name, value in (
        ("kMaxHeadWidth", gpus._MAX_WIDTH),
        ("kMaxFloat32HeadWidth", gpus._MAX_FLOAT32_WIDTH),
        ("kMaxHeads", gpus._MAX_HEADS),
    ):
        assert int(re.search(rf"{name} = (\d+);", run)[1]) == value
    limits = (ROOT / "cc/cuda/host/schedule.h").read_text()
    (narrow,) = re.findall(r"return width <= (\d+) && warps", limits)
    assert int(narrow) == gpus._WIDTH_OF_SMALL_BLOCKS
    kernels = re.findall(r"X\((\w+)\)", (ROOT / "cc/core/op.h").read_text())
    assert {"Summarize", "Read", "Causal", "NearFar", "NearFarGrad"} <= set(kernels)
    assert not {name.lower() for name in kernels} & {
        name.replace("_", "") for name in gpus._CPU_ONLY
    }


@pytest.fixture
def t4(monkeypatch):
    """A process that has a GPU of an older kind."""
    monkeypatch.setattr(gpus, "cards", lambda: (Card("Tesla T4", (7, 5), 535),))
    monkeypatch.setattr(gpus, "build", lambda: WHEEL)
    monkeypatch.setattr(gpus, "_warned", set())


def operators_of(x, w, **options):
    graph = tf.function(lambda x: performer.favor_attention(x, x, x, w, **options))
    traced = graph.get_concrete_function(x).graph
    return {op.type for op in traced.get_operations() if "Performer" in op.type}, graph


@pytest.mark.usefixtures("t4")
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_without_kernels_runs_plain_tensorflow_with_one_warning(monkeypatch, causal):
    x, w = tf.random.normal([1, 50, 2, 8]), performer.orthogonal_projection(16, 8, seed=1)
    with pytest.warns(RuntimeWarning, match="not used on Tesla T4: .* capability 8.0") as found:
        kinds, graph = operators_of(x, w, causal=causal)
        operators_of(x, w, causal=causal, key_mask=tf.ones([1, 50], bool))
    assert kinds == set()
    assert len(found) == 1
    out = graph(x)
    monkeypatch.setattr(gpus, "cards", lambda: ())
    kinds, graph = operators_of(x, w, causal=causal)
    assert kinds
    np.testing.assert_allclose(out, graph(x), rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("t4")
def test_tensors_on_the_processor_keep_its_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpus.takes(CALL, "/job:localhost/replica:0/task:0/device:CPU:0")


@pytest.fixture
def h100(monkeypatch):
    """A process that has a GPU with kernels. (What it computes runs on the processor.)"""
    monkeypatch.setattr(gpus, "cards", lambda: (Card("H100", (9, 0), 535),))
    monkeypatch.setattr(gpus, "build", lambda: WHEEL)
    monkeypatch.setattr(gpus, "_warned", set())


@pytest.mark.usefixtures("h100")
def test_rows_of_a_stream_are_appended_on_a_gpu_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpus.takes(CALL._replace(operator="append_rows"), "")


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_has_kernels_for_results_and_gradients(causal):
    x, w = tf.random.normal([1, 210, 2, 8]), performer.orthogonal_projection(16, 8, seed=1)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = performer.favor_attention(x, x, x, w, causal=causal, exact_window=64)
            loss = tf.reduce_sum(out**2)
        return tape.gradient(loss, x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = tf.function(gradient).get_concrete_function(x).graph
    assert {"Performer>NearFar", "Performer>NearFarGrad"} <= {
        op.type for op in traced.get_operations()
    }


def test_each_of_several_gpus_has_its_own_answer(monkeypatch):
    monkeypatch.setattr(gpus, "cards", lambda: (Card("A100", (8, 0)), Card("Tesla T4", (7, 5))))
    monkeypatch.setattr(gpus, "build", lambda: WHEEL)
    monkeypatch.setattr(gpus, "_warned", set())
    assert gpus.takes(CALL, "/device:GPU:0")
    with pytest.warns(RuntimeWarning, match="Tesla T4"):
        assert not gpus.takes(CALL, "/device:GPU:1")
    assert not gpus.takes(CALL, "")  # placed later, on either
