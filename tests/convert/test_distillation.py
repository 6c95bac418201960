"""Distillation: a student's features come closer to the exact attention of its teacher."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import convert
from performer.convert import distillation

SHORT = {"steps": 40, "batch_size": 4, "verbose": 0}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sharp(length=96, batch=16, seed=0):
    """Inputs of a few directions and of a common mean, as trained models have them."""
    few = normal(4, 16, seed=1)
    x = normal(batch, length, 4, seed=seed) @ few + normal(16, seed=2)
    return (x + 0.3 * normal(batch, length, 16, seed=seed + 10)).astype("float32")


def two_layers(kind=keras.layers.MultiHeadAttention, sizes=(4, 8), **call):
    """A model of two attention layers and a dense one."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, 16))
    hidden = keras.layers.LayerNormalization()(
        inputs + kind(*sizes, name="one")(inputs, inputs, **call)
    )
    hidden = hidden + kind(*sizes, name="two")(hidden, hidden, **call)
    return keras.Model(inputs, keras.layers.Dense(8, name="last")(hidden))


def with_mask():
    keras.utils.set_random_seed(1)
    inputs, mask = keras.Input((96, 16)), keras.Input((96,), dtype="bool")
    attention = keras.layers.MultiHeadAttention(4, 8, name="one")
    return keras.Model(
        [inputs, mask], attention(inputs, inputs, attention_mask=mask[:, None], query_mask=mask)
    )


def with_memory():
    keras.utils.set_random_seed(1)
    inputs, memory = keras.Input((96, 16)), keras.Input((50, 16))
    hidden = inputs + keras.layers.MultiHeadAttention(4, 8, name="own")(inputs, inputs)
    hidden = hidden + keras.layers.MultiHeadAttention(4, 8, name="cross")(hidden, memory)
    return keras.Model([inputs, memory], hidden)


def mask():
    return np.arange(96) < np.arange(36, 100, 4)[:, None]


def student_of(teacher, **options):
    arguments = {"supports": 16, "feature_map": "learned", "seed": 1, **options}
    return convert.replace_attention(teacher, **arguments)


CASES = {
    "all keys": (two_layers, lambda: sharp(), {}),
    "causal": (lambda: two_layers(use_causal_mask=True), lambda: sharp(), {}),
    "grouped heads": (
        lambda: two_layers(keras.layers.GroupQueryAttention, (4, 8, 2)),
        lambda: sharp(),
        {},
    ),
    "window": (
        lambda: two_layers(use_causal_mask=True),
        lambda: sharp(256, 8),
        {"exact_window": 64, "far_bias": "learned"},
    ),
    "mask": (with_mask, lambda: [sharp(), mask()], {}),
    "cross attention": (with_memory, lambda: [sharp(), sharp(50, seed=5)], {}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "window" else pytest.mark.slow) for case in CASES],
)
def test_distilled_features_are_closer_to_exact_attention_than_calibrated_ones(case):
    make, data, options = CASES[case]
    teacher = make()
    student = student_of(teacher, **options)
    report = convert.distill(student, teacher, data(), **SHORT)
    assert report.outputs["layers"] < 0.9 * report.outputs["as it was"]
    for layer in report.layers:
        assert layer.after.shape == (8 if case == "grouped heads" else 4,)
        assert np.all(layer.after <= layer.before)
        distilled, calibrated = (np.mean(layer.candidates[k]) for k in ("distilled", "calibrated"))
        assert np.mean(layer.after) <= min(distilled, calibrated) + 1e-12
        assert distilled < 0.97 * calibrated


def test_the_reported_error_is_that_of_the_layers():
    """On every fifth batch; the errors of the layer's own attention on the teacher's inputs."""
    teacher, x = with_memory(), [sharp(), sharp(50, seed=5)]
    student = student_of(teacher)
    report = convert.distill(student, teacher, x, **{**SHORT, "steps": 5})
    layer, exact = student.get_layer("own"), teacher.get_layer("own")
    held_out = x[0][:4]
    q, k, v = (dense(held_out) for dense in (exact.query_dense, exact.key_dense, exact.value_dense))
    out = performer.favor_attention(q, k, v, **layer.random_features().for_attention())
    weights = tf.nn.softmax(tf.einsum("bthd,bshd->bhts", q, k) / 8**0.5)
    wanted = tf.einsum("bhts,bshe->bthe", weights, v)
    uniform = tf.reduce_mean(v, 1, keepdims=True)
    wrong, informative = (np.sum((a - wanted) ** 2, (0, 1, 3)) for a in (out, uniform))
    np.testing.assert_allclose(report.layers[0].after, np.sqrt(wrong / informative), rtol=1e-3)


def test_masked_positions_have_no_part_in_it():
    features = []
    for hidden in (0.0, 5.0):
        teacher = with_mask()
        student = student_of(teacher)
        x = np.where(mask()[..., None], sharp(), np.float32(hidden))
        convert.distill(student, teacher, [x, mask()], **{**SHORT, "steps": 3})
        features.append([w.numpy() for w in student.get_layer("one").learned_projection.weights])
    for one, other in zip(*features, strict=True):
        np.testing.assert_array_equal(one, other)


STAGES = {**SHORT, "steps": 12, "end_to_end": 12, "lora_rank": 2, "lora_steps": 12}
STAGES["learning_rate"] = 0.05


@pytest.fixture(scope="module")
def uninterrupted():
    """The report of all stages, the student, and its weights before."""
    teacher = two_layers()
    student = student_of(teacher)
    before = {w.path: w.numpy() for w in student.weights}
    return convert.distill(student, teacher, sharp(), **STAGES), student, before


def test_later_stages_bring_the_outputs_closer_and_change_what_they_say(uninterrupted):
    report, student, before = uninterrupted
    assert list(report.outputs) == ["as it was", "layers", "end to end", "lora"]
    assert report.outputs["end to end"] < report.outputs["layers"]
    assert report.outputs["lora"] < report.outputs["layers"]
    changed = {w.path for w in student.weights if not np.array_equal(before.get(w.path), w)}
    assert all("learned_projection" in path or "lora_kernel" in path for path in changed)
    assert any("last/lora_kernel_b" in path for path in changed)


def test_a_stage_that_does_not_help_leaves_the_model_as_it_was():
    teacher = two_layers()
    student = student_of(teacher)
    steps = {**SHORT, "steps": 3, "learning_rate": 1e3, "end_to_end": 3}
    report = convert.distill(student, teacher, sharp(), **steps, lora_rank=2, lora_steps=3)
    assert report.outputs["layers"] <= report.outputs["as it was"]
    assert report.outputs["layers"] == report.outputs["end to end"] == report.outputs["lora"]
    again = student_of(teacher)
    convert.distill(again, teacher, sharp(), **{**SHORT, "steps": 3, "learning_rate": 1e3})
    np.testing.assert_array_equal(student(sharp()[:2]), again(sharp()[:2]))


def test_a_later_stage_alone_begins_with_the_model_as_it_is(tmp_path):
    teacher, x = two_layers(), sharp()
    student = student_of(teacher)
    convert.calibrate(student, x)
    only = {**SHORT, "steps": 0, "end_to_end": 20, "learning_rate": 0.05}
    report = convert.distill(student, teacher, x, **only, checkpoint=tmp_path)
    assert not report.layers
    assert not list(tmp_path.glob("layer_*"))
    assert report.outputs["layers"] == report.outputs["as it was"]
    assert report.outputs["end to end"] < 0.99 * report.outputs["layers"]


def test_without_lora_only_features_change_be_it_for_arrays_or_a_dataset():
    x, students = sharp(), []
    for data in (x, tf.data.Dataset.from_tensor_slices(x).batch(4)):
        teacher = two_layers()
        student = student_of(teacher)
        before = [(w.path, w.numpy()) for w in student.weights]
        convert.distill(student, teacher, data, **{**SHORT, "steps": 3}, end_to_end=3)
        students.append(student)
    for (path, old), one, other in zip(before, *(s.weights for s in students), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.array_equal(old, one) != ("learned_projection" in path)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8, 20, 33, 43], ids=lambda n: f"at step {n}")
def test_after_an_interruption_it_ends_with_the_same_bits(
    step, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setattr(distillation, "_SAVED_EVERY", 5)
    teacher, updates = two_layers(), []

    class Interrupted(Exception):
        pass

    def update(bar, current, values=None, finalize=None):
        updates.append(current)
        if len(updates) == step:
            raise Interrupted

    monkeypatch.setattr(keras.utils.Progbar, "update", update)
    student = student_of(teacher)
    with pytest.raises(Interrupted):
        convert.distill(student, teacher, sharp(), **STAGES, checkpoint=tmp_path)
    student = student_of(teacher)
    report = convert.distill(student, teacher, sharp(), **STAGES, checkpoint=tmp_path)
    assert len(updates) < 48 + 5 + 1  # no more than what was not written is done again
    wanted, other_student, _ = uninterrupted
    assert report.outputs == wanted.outputs
    for one, other in zip(student.weights, other_student.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(report.layers, wanted.layers, strict=True):
        np.testing.assert_array_equal(one.after, other.after)


def test_refusals(tmp_path):
    teacher, x = two_layers(), sharp()
    with pytest.raises(ValueError, match="`student` must have a Performer layer"):
        convert.distill(convert.replace_attention(teacher, supports=8), teacher, x)
    student = student_of(teacher)
    with pytest.raises(ValueError, match="`teacher` must have the attention layers of `student`"):
        convert.distill(student, with_mask(), x)
    with pytest.raises(ValueError, match="linear in the teacher: one, two"):
        convert.distill(student, student_of(teacher), x)
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer.*steps=-1"):
        convert.distill(student, teacher, x, steps=-1)
    with pytest.raises(ValueError, match=r"`lora_rank` must be a positive integer.*None"):
        convert.distill(student, teacher, x, lora_steps=1)
    with pytest.raises(ValueError, match="`data` must hold at least one batch"):
        convert.distill(student, teacher, x[:0])
    short = {**SHORT, "steps": 1, "calibration_steps": None}
    convert.distill(student, teacher, x, **short, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"`checkpoint` must be .* begun with other seed"):
        convert.distill(student, teacher, x, **short, seed=2, checkpoint=tmp_path)
