"""Reports of conversions: what they recommend, and that files hold all of them."""

import keras
import numpy as np
import pytest

from performer import convert
from performer.convert import LayerReport, Report, Trial


def trial(layer, supports, window, keys, *errors):
    return Trial(layer, supports, window, keys, np.array(errors))


TRIALS = [
    trial("one", 256, None, None, 0.1, 0.2, 0.9),
    trial("one", 64, None, None, 0.4, 0.5, 0.9),
    trial("one", 64, 64, None, 0.2, 0.3, 0.8),
    trial("one", 64, None, 32, 0.3, 0.3, 0.7),
    trial("two", 64, None, None, 0.6, 0.6, 0.6),
    trial("two", 64, 64, 32, 0.5, 0.2, 0.6),
]
LAYERS = [
    LayerReport("one", ["dense"], np.array([1.5]), np.array([0.25]), {"dense": np.array([0.25])}),
    LayerReport("two", ["x", "y"], np.array([1.0, 2.0]), np.array([0.1, 0.9]), {}),
]


def test_the_cheapest_sizes_for_an_error_are_recommended():
    report = Report([], trials=TRIALS)
    assert report.recommend(0.3)["one"].sizes == (64, None, 32)
    assert report.recommend(0.2)["one"].sizes == (256, None, None)
    assert report.recommend(0.6)["two"].sizes == (64, None, None)
    assert "two" not in report.recommend(0.4)


def test_heads_that_fit_at_no_sizes_are_named():
    assert Report([], trials=TRIALS).misfits(0.55) == [("one", 2, 0.7), ("two", 2, 0.6)]
    assert Report(LAYERS).misfits(0.5) == [("two", 1, 0.9)]


def test_a_file_holds_all_of_it(tmp_path):
    report = Report(LAYERS, {"as it was": 0.5, "layers": 0.1}, TRIALS)
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert str(again) == str(report)
    assert again.outputs == report.outputs
    for one, other in zip(again.layers, LAYERS, strict=True):
        assert one.as_dict() == other.as_dict()
        np.testing.assert_array_equal(one.after, other.after)
    for one, other in zip(again.trials, TRIALS, strict=True):
        assert (one.layer, one.sizes) == (other.layer, other.sizes)
        np.testing.assert_array_equal(one.errors, other.errors)


def test_the_table_has_a_line_for_each_layer_choice_and_stage():
    lines = str(Report(LAYERS, {"layers": 0.1}, TRIALS)).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert lines[0].startswith("one: error 1.500 -> 0.250")
    assert lines[-1] == "outputs, layers: error 0.100"


@pytest.mark.parametrize(
    "parts", [(LAYERS, {}, TRIALS), (LAYERS,), ([], {}, TRIALS)], ids=["both", "layers", "trials"]
)
def test_the_picture_has_a_map_before_and_after_and_curves(parts, tmp_path, monkeypatch):
    figures = []
    from matplotlib.figure import Figure

    save = Figure.savefig

    def kept(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", kept)
    Report(*parts).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    titles = [panel.get_title() for panel in figures[0].axes if panel.get_title()]
    maps = ["error before", "error after"] if parts[0] else []
    assert titles == maps + (["error, calibrated"] if len(parts) > 1 else [])
    if parts[0]:
        image = figures[0].axes[1].images[0].get_array()
        assert image.shape == (2, 2) and image[1, 1] == 0.9 and image.mask[0, 1]


@pytest.mark.slow
def test_a_survey_measures_what_calibration_gives_and_changes_nothing():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((128, 16))
    layer = keras.layers.MultiHeadAttention(2, 8, name="own")
    hidden = inputs + layer(inputs, inputs)
    causal = keras.layers.MultiHeadAttention(2, 8, name="causal")
    model = keras.Model(inputs, causal(hidden, hidden, use_causal_mask=True))
    x = np.random.default_rng(0).normal(size=[8, 128, 16]).astype("float32")
    before = [w.numpy() for w in model.weights]
    report = convert.survey(
        model, 2 * x, supports=(8, 16), exact_window=(None, 64), exact_keys=(None, 4), steps=2
    )
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, weight)
    tried = {layer: [t for t in report.trials if t.layer == layer] for layer in ("own", "causal")}
    assert len(tried["own"]) == 8 and len(tried["causal"]) == 4
    by_sizes = {t.sizes: np.mean(t.errors) for t in tried["own"]}
    assert by_sizes[16, 64, 4] < by_sizes[8, None, None]
    linear = convert.replace_attention(
        model, supports=16, feature_map="learned", seed=0, where=lambda name: name == "own"
    )
    (found,) = convert.calibrate(linear, 2 * x, steps=2).layers
    assert abs(np.mean(found.after) - by_sizes[16, None, None]) < 0.1
