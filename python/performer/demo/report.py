"""Runs the whole demo and reports it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from performer.demo import baselines, corpus
from performer.demo.model import KINDS
from performer.demo.train import BANDS

PROMPT, WRITTEN = 2000, 300  # bytes of held-out text that the sample continues, and its length
MOST_STEPS = 5  # times those of the first training, that the time of the others may allow
# Ctrl-C goes to all processes of a terminal; this one ends the other.
TRAINING = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from performer.demo import train
train.main()
"""


class OutputError(ValueError):
    """A folder that the demo cannot write to; the message names it and the reason."""


class TrainingError(RuntimeError):
    """A training that ended before its time; the message says how."""


def run(files, output, *, length, steps):
    """Trains the model with every kind of attention for the same time; prints and draws the rest.

    Args:
        files: Paths of text files; none: the Python standard library.
        output: Folder for the model, the results and the plots; made if it does not exist.
        length: Length of the sequences.
        steps: Number of steps of the first, linear attention with a window; the others get the
            time that these took.

    Raises:
        CorpusError: A text that cannot be used.
        OutputError: A folder that cannot be written to.
        TrainingError: The process of a training failed.
    """
    text = corpus.load(files)
    rows, held_out = corpus.split(text, length)
    output = Path(output)
    with _writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:  # better now than after the training
            probe.write(bytes(1 << 20))
    print(f"{len(text):,} bytes of text, {len(rows)} sequences of {length} to train on")
    simple = {
        name: baselines.markov(rows.ravel(), held_out.ravel(), order)
        for order, name in enumerate(("unigram", "order-1", "order-2"))
    }
    simple["bz2"] = baselines.bz2_bits(held_out.ravel())

    results: dict[str, dict] = {}
    seconds = 0.0
    model = output / "model.keras"
    for kind in KINDS:
        print(f"\nTraining with {KINDS[kind]}", flush=True)
        start = time.perf_counter()
        first = not results
        results[kind] = _train(
            text,
            kind=kind,
            length=length,
            steps=steps if first else MOST_STEPS * steps,
            seconds=seconds,
            save=str(model) if first else None,
        )
        if first:
            seconds = results[kind]["step_seconds"] * steps
        results[kind]["wall_seconds"] = time.perf_counter() - start
    _finish(output, model, held_out, simple, results)


@contextlib.contextmanager
def _writing_to(output):
    try:
        yield
    except OSError as error:
        raise _unwritable(output, error.strerror or error) from error


def _unwritable(output, reason):
    return OutputError(
        f"--output must name a folder that can be written to; {corpus.shown(output)}: {reason}"
    )


def _train(text, **task):
    """Runs `train` in another process, which does not outlive this one and leaves no file."""
    read, write = os.pipe()
    with os.fdopen(read) as results:
        task.update(text_bytes=text.nbytes, result=write)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", TRAINING, json.dumps(task)],
                stdin=subprocess.PIPE,
                pass_fds=[write],
            )
        finally:
            os.close(write)
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died: its status says so below
                process.stdin.write(text.tobytes())
                process.stdin.flush()
            answer = results.read()  # up to its end; its standard input stays open until then
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    if status != 0 or not answer:
        raise TrainingError(
            f"training with {KINDS[task['kind']]} ended with status {status}; see above"
        )
    result = json.loads(answer)
    if "error" in result:
        raise _unwritable(Path(task["save"]).parent, result["error"])
    return result


def _finish(output, model, held_out, simple, results):
    import keras

    from performer import generate
    from performer.demo import plots, scaling

    print("\nMeasuring time against length", flush=True)
    times = scaling.measure()
    network = keras.models.load_model(model)
    prompt = held_out[0, :PROMPT]
    for _ in range(2):  # the first call compiles
        start = time.perf_counter()
        written = generate(network, prompt, WRITTEN, temperature=0.8, seed=0)
        speed = len(written) / (time.perf_counter() - start)
    with _writing_to(output):
        (output / "results.json").write_text(
            json.dumps({"baselines": simple, "models": results, "milliseconds": times}, indent=1)
        )
        plots.losses(results, simple, output / "loss.png")
        plots.positions(results, output / "positions.png")
        plots.times(times, output / "time.png")

    print("\nBits per byte on held-out text")
    for name, bits in simple.items():
        print(f"  {name:30} {bits:6.3f}")
    for name, result in results.items():
        print(
            f"  {KINDS[name]:30} {result['held_out']:6.3f}   {result['steps']} steps, "
            f"{1e3 * result['step_seconds']:.0f} ms each, {result['peak_mib']:.0f} MiB at most"
        )
    print("\nBits per byte by position")
    bands = BANDS[: len(results["linear"]["bands"])]
    names = (f"{a}-{'' if b > held_out.shape[1] else b - 1}" for a, b in bands)
    print(f"  {'':30}" + "".join(f"{name:>11}" for name in names))
    for name, result in results.items():
        print(f"  {KINDS[name]:30}" + "".join(f"{bits:11.3f}" for bits in result["bands"]))
    print("\nMilliseconds of one causal layer, forward, by length")
    print(f"  {'':30}" + "".join(f"{length:9}" for length in scaling.LENGTHS))
    for name, row in times.items():
        print(f"  {KINDS[name]:30}" + "".join(f"{milliseconds:9.1f}" for milliseconds in row))
    print(
        f"\n{len(prompt)} bytes of held-out text (their end is shown), and {WRITTEN} written after"
    )
    print(f"them (from | on), {speed:.0f} a second with a state of constant size:\n")
    for part, end in ((prompt[-200:], "|"), (written, "\n")):
        print(bytes(part.tolist()).decode("utf-8", "replace"), end=end)
    print(f"\nSaved, reloaded, equal: {model}; plots in {output}: loss, positions and time.png")
