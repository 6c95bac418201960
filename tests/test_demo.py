"""The parts of the demo, at small sizes."""

import importlib.util

import keras
import numpy as np
import pytest

from performer.cli import main
from performer.demo import baselines, corpus, model, train


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"a\0b" * 100000), "is binary"),
        (lambda path: path.write_bytes(b"short"), "at least 200000 bytes"),
    ],
    ids=["missing", "directory", "empty", "binary", "short"],
)
def test_bad_text_is_refused_by_name_and_rule(make, rule, tmp_path, capsys):
    path = tmp_path / "given"
    make(path)
    assert main(["demo", "--text", str(path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "--text" in message
    assert rule in message
    assert not (tmp_path / "out").exists()


def test_bad_numbers_are_refused(capsys):
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps must be at least 1; got 0" in capsys.readouterr().err


def test_a_missing_plotting_library_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "tensorflow-performer[demo]" in capsys.readouterr().err


def test_info_names_versions_and_instruction_set(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("performer", "tensorflow", "keras", "compiled ops: loaded", "instruction set"):
        assert word in text


def test_baselines_are_those_computed_by_hand():
    text = np.frombuffer(b"abac" * 2000, np.uint8)
    assert baselines.markov(text, text, 0) == pytest.approx(1.5, abs=1e-2)
    assert baselines.markov(text, text, 1) == pytest.approx(0.5, abs=1e-2)
    assert baselines.markov(text, text, 2) == pytest.approx(0.0, abs=1e-2)


def test_the_future_does_not_change_a_prediction():
    network = model.build("linear")
    text = np.random.default_rng(0).integers(0, 256, (1, 80), np.int32)
    other = text.copy()
    other[:, 50:] = 7
    assert np.array_equal(network(text)[:, :50], network(other)[:, :50])


@pytest.mark.parametrize("kind", ["linear", "exact"])
def test_equal_representations_attend_to_each_other_from_the_start(kind):
    block = model.block(kind)
    block(np.zeros((1, 8, model.WIDTH), "float32"))
    layer = block._self_attention_layer
    np.testing.assert_array_equal(layer.query_dense.kernel, layer.key_dense.kernel)
    glorot = (6 / (2 * model.WIDTH)) ** 0.5
    assert np.abs(layer.query_dense.kernel).max() == pytest.approx(2 * glorot, rel=1e-3)
    assert block.delay_keys


def test_streaming_predicts_what_the_whole_pass_does():
    network = model.build("linear")
    text = np.random.default_rng(0).integers(0, 256, (1, 70))
    state, steps = network.get_initial_state(1), []
    for i in range(70):
        step, state = network(text[:, i : i + 1], initial_state=state, return_state=True)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, 1), network(text), atol=1e-4)


def test_training_measures_and_saves_what_it_trained(tmp_path):
    text = corpus.load([])[:40000]
    saved = tmp_path / "model.keras"
    result = train.train("linear", text, length=512, steps=12, seconds=0, save=str(saved))
    assert result["steps"] == len(result["losses"]) == 12
    assert result["losses"][-1] < result["losses"][0]
    assert len(result["bands"]) == 2
    assert 0 < result["held_out"] < 8.5
    assert isinstance(keras.models.load_model(saved), keras.Model)


def test_the_learning_rate_follows_the_budget_that_is_spent_first():
    budget = train.Budget(steps=100, seconds=10)
    budget.set_model(model.build("none"))
    budget.model.compile("adam", "mse")
    rates = []
    for _ in range(51):
        budget.on_train_batch_begin(0)
        rates.append(float(budget.model.optimizer.learning_rate))
        budget.times.append(0.2)  # 50 steps after the first spend all of the time
    assert rates[0] == pytest.approx(budget.LOWEST, rel=1e-3)
    assert rates[6] == pytest.approx(budget.HIGHEST, rel=1e-3)
    assert rates[50] < 1.1 * budget.LOWEST
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert budget.spent() == pytest.approx(1)


def test_training_stops_when_its_time_is_over():
    text = corpus.load([])[:40000]
    assert train.train("none", text, length=256, steps=50, seconds=1e-6)["steps"] == 2
