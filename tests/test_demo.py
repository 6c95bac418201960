"""The parts of the demo, at small sizes; how it ends."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

from performer.cli import main
from performer.demo import baselines, corpus, model, report, train


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"a\0b" * 100000), "is binary"),
        (lambda path: path.write_bytes(b"short"), "at least 200000 bytes"),
        (os.mkfifo, "is a device or a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["missing", "directory", "empty", "binary", "short", "fifo", "endless", "circle"],
)
def test_bad_text_is_refused_by_name_and_rule(make, rule, tmp_path, capsys):
    path = tmp_path / "given"
    make(path)
    assert main(["demo", "--text", str(path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "--text" in message
    assert rule in message
    assert not (tmp_path / "out").exists()


def test_text_below_a_file_or_with_a_name_too_long_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300), tmp_path / ("x/" * 5000)):
        assert main(["demo", "--text", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("performer: --text must name ") and len(message) < 300


def test_a_long_file_is_read_only_as_far_as_it_is_used(tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.write(b"text" * 2_500_000)
        file.truncate(1 << 38)  # sparse; the zeros are never reached
    assert len(corpus.load([tmp_path / "long"])) == 8_000_000


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: path.write_text("a file"), "File exists"),
        (lambda path: path.symlink_to("/proc/self"), "No such file"),
        (lambda path: path.symlink_to("/dev/null/below"), "File exists"),
    ],
    ids=["file", "read-only", "below a device"],
)
def test_an_output_that_cannot_be_written_is_refused_before_training(
    make, rule, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "_train", lambda *args, **task: pytest.fail("it trains"))
    make(tmp_path / "out")
    for output in (tmp_path / "out", tmp_path / ("x" * 300)):
        assert main(["demo", "--output", str(output)]) == 2
        message = capsys.readouterr().err
        assert "--output must name a folder that can be written to" in message
        assert rule in message or "File name too long" in message


def test_bad_numbers_are_refused(capsys):
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps must be at least 1; got 0" in capsys.readouterr().err


def test_a_missing_plotting_library_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "tensorflow-performer[demo]" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info"], ["demo"], ["bench", "--quick"]])
def test_an_unknown_instruction_set_is_refused(command, monkeypatch, capsys):
    pytest.importorskip("performer._core")
    monkeypatch.setenv("PERFORMER_ISA", "v9")
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "performer: the environment variable PERFORMER_ISA must be one of" in message
    assert "got 'v9'" in message


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


@pytest.mark.parametrize("kind", ["near_far", "linear", "window"])
def test_the_future_does_not_change_a_prediction(kind):
    network = model.build(kind)
    text = np.random.default_rng(0).integers(0, 256, (1, 230), np.int32)
    other = text.copy()
    other[:, 200:] = 7
    assert np.array_equal(network(text)[:, :200], network(other)[:, :200])


@pytest.mark.parametrize(("kind", "reaches"), [("near_far", True), ("window", False)])
def test_only_features_reach_beyond_the_window(kind, reaches):
    network = model.build(kind)
    text = np.random.default_rng(0).integers(0, 256, (1, 350), np.int32)
    other = text.copy()
    other[:, :50] = 7
    assert np.array_equal(network(text)[:, 320:], network(other)[:, 320:]) is not reaches


@pytest.mark.parametrize("kind", ["near_far", "linear", "window", "exact"])
def test_equal_representations_attend_to_each_other_from_the_start(kind):
    block = model.block(kind)
    block(np.zeros((1, 8, model.WIDTH), "float32"))
    layer = block._self_attention_layer
    np.testing.assert_array_equal(layer.query_dense.kernel, layer.key_dense.kernel)
    glorot = (6 / (2 * model.WIDTH)) ** 0.5
    assert np.abs(layer.query_dense.kernel).max() == pytest.approx(1.5 * glorot, rel=1e-3)
    assert block.delay_keys


def test_what_is_attended_to_is_predicted_from_the_start():
    network = model.build("near_far")
    text = np.tile(np.random.default_rng(0).permutation(256)[:40], 3)[None]  # three times over
    predicted = np.argmax(network(text)[0, 40:-1], -1)
    assert np.mean(predicted == text[0, 41:]) > 0.75


def test_streaming_predicts_what_the_whole_pass_does():
    network = model.build("near_far")
    text = np.random.default_rng(0).integers(0, 256, (1, model.WINDOW + 9))
    state, steps = network.get_initial_state(1), []
    for part in np.split(text, range(model.WINDOW - 9, text.shape[1]), axis=1):
        step, state = network(part, initial_state=state, return_state=True)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, 1), network(text), atol=1e-4)


def test_training_measures_and_saves_what_it_trained(tmp_path):
    text = corpus.load([])[:40000]
    saved = tmp_path / "model.keras"
    result = train.train("near_far", text, length=512, steps=12, seconds=0, save=str(saved))
    assert result["steps"] == len(result["losses"]) == 12
    assert result["losses"][-1] < result["losses"][0]
    assert len(result["bands"]) == 2
    assert len(result["positions"]) == 8
    assert np.mean(result["positions"]) == pytest.approx(result["held_out"])
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
    assert rates[11] == pytest.approx(budget.HIGHEST, rel=1e-3)
    assert rates[50] < 1.1 * budget.LOWEST
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert budget.spent() == pytest.approx(1)


@pytest.mark.slow
def test_training_stops_when_its_time_is_over_and_says_after_how_many_steps(capsys):
    text = corpus.load([])[:40000]
    assert train.train("none", text, length=256, steps=50, seconds=1e-6)["steps"] == 2
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("  2 steps: ")


def test_progress_is_shown_in_lines_with_the_steps_that_were_made(capsys, monkeypatch):
    monkeypatch.setattr(train.Progress, "EVERY", 0)
    budget = train.Budget(steps=50, seconds=9)
    progress = train.Progress(budget)
    progress.on_train_begin()
    budget.times, budget.losses = [1.0] * 41, [3.0, *[2.0] * 40]
    progress.on_train_batch_end(40)
    progress.on_train_end()
    assert capsys.readouterr().out == (
        "  step 41 of at most 50: 2.000 bits per byte, 0 s\n  41 steps: 2.000 bits per byte, 0 s\n"
    )


def train_by(code, monkeypatch, save=None):
    """Runs a training whose process runs `code` instead."""
    monkeypatch.setattr(report, "TRAINING", "import json, os, sys\n" + code)
    return report._train(np.zeros(1_000_000, np.uint8), kind="none", save=save)


def test_what_a_training_returns_is_handed_over_whatever_its_size(monkeypatch):
    code = """
task = json.loads(sys.argv[1])
assert sys.stdin.buffer.read(task["text_bytes"]) == bytes(1_000_000)
with os.fdopen(task["result"], "w") as result:
    json.dump({"losses": list(range(100_000))}, result)
"""
    assert train_by(code, monkeypatch) == {"losses": list(range(100_000))}


@pytest.mark.parametrize(
    ("code", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("", 0)]
)
def test_a_training_that_fails_is_an_error(code, status, monkeypatch):
    with pytest.raises(report.TrainingError, match=f"no attention ended with status {status}"):
        train_by(code, monkeypatch)


def test_a_disk_that_fills_up_is_an_error_and_keeps_the_model_that_was_there(tmp_path, monkeypatch):
    saved = tmp_path / "model.keras"
    saved.write_text("of an earlier run")
    (tmp_path / "model.partial.keras").symlink_to("/dev/full")
    network = model.build("none")
    with pytest.raises(OSError, match="No space left"):
        train.save_model(network, saved, np.zeros((1, 8), np.int32))
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    assert saved.read_text() == "of an earlier run"
    code = """
with os.fdopen(json.loads(sys.argv[1])["result"], "w") as result:
    json.dump({"error": "No space left on device"}, result)
"""
    with pytest.raises(report.OutputError, match=f"{tmp_path}: No space left on device"):
        train_by(code, monkeypatch, save=str(saved))


def test_a_training_ends_when_the_demo_is_gone():
    read, write = os.pipe()
    ended = threading.Event()
    threading.Thread(target=train.wait_for_end, args=(read, ended.set), daemon=True).start()
    os.write(write, b"text")
    assert not ended.wait(0.05)
    os.close(write)
    assert ended.wait(10)


DEMO = """
import sys
from performer import cli
from performer.demo import report
report.TRAINING = "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"
sys.exit(cli.main(["demo", "--output", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_signal_ends_the_training_too_and_leaves_nothing(tmp_path):
    (tmp_path / "tmp").mkdir()
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    with demo:
        child = next(int(line.split()[1]) for line in demo.stdout if line.startswith("child"))
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 143
    assert not Path(f"/proc/{child}").exists()
    assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_has_no_traceback_and_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **task):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_train", interrupted)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "performer: interrupted\n"
