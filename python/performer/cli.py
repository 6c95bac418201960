"""The command `performer` (`python -m performer`)."""

import argparse
import contextlib
import importlib
import importlib.util
import platform
import signal
import sys
import threading

from performer import launch
from performer.bench import command as bench


def main(argv=None):
    """Runs a subcommand; returns the exit status (1: it failed, 2: a wrong argument, 130: Ctrl-C).

    SIGTERM and SIGHUP end it as an exception does: with its child processes.

    Example:
        >>> main(["info"])  # doctest: +ELLIPSIS
        performer ...
        0
    """
    parser = argparse.ArgumentParser(prog="performer", description="Linear attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a byte-level language model on long real text")
    demo.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text to train on")
    demo.add_argument("--output", default="performer-demo", metavar="FOLDER")
    demo.add_argument("--length", type=int, default=4096, help="of a sequence (default 4096)")
    demo.add_argument("--steps", type=int, default=200, help="of training (default 200)")
    bench.add_arguments(
        commands.add_parser("bench", help="time linear attention beside its peers, checked first")
    )
    launch.add_arguments(
        commands.add_parser("launch", help="run a script in several workers on this machine")
    )
    commands.add_parser("info", help="versions and devices: what a bug report needs")
    arguments = parser.parse_args(argv)
    if fault := _instruction_set_fault():
        print(f"performer: {fault}", file=sys.stderr)
        return 2
    known = {"bench": bench.main, "demo": _demo, "info": _info, "launch": launch.main}
    command = known[arguments.command]
    with _unwound_by(signal.SIGTERM, signal.SIGHUP):
        try:
            return command(arguments)
        except KeyboardInterrupt:
            print("performer: interrupted", file=sys.stderr)
            return 130


@contextlib.contextmanager
def _unwound_by(*signals):
    """Signals that would end the process at once end it by an exception, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return

    def unwind(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _instruction_set_fault():
    """What is wrong with PERFORMER_ISA, or ""."""
    try:
        importlib.import_module("performer._core").isa()
    except ImportError:
        pass  # without a compiled core there is nothing to choose
    except ValueError as error:
        return str(error)
    return ""


def _demo(arguments):
    if importlib.util.find_spec("matplotlib") is None:
        extra = "python -m pip install 'tensorflow-performer[demo]'"
        print(
            f"performer: the demo draws with matplotlib, which is missing: {extra}", file=sys.stderr
        )
        return 2
    if _tensorflow_is_missing():
        return 2
    from performer.demo import corpus, report

    for name, least in (("length", 64), ("steps", 1)):
        value = getattr(arguments, name)
        if value < least:
            print(f"performer: --{name} must be at least {least}; got {value}", file=sys.stderr)
            return 2
    try:
        report.run(arguments.text, arguments.output, length=arguments.length, steps=arguments.steps)
    except (corpus.CorpusError, report.OutputError, report.TrainingError) as error:
        print(f"performer: {error}", file=sys.stderr)
        return 1 if isinstance(error, report.TrainingError) else 2
    return 0


def _tensorflow_is_missing():
    """Whether it is; says so, and how to get it."""
    from performer.loader import WITHOUT_TENSORFLOW

    if importlib.util.find_spec("tensorflow") is not None:
        return False
    print(f"performer: {WITHOUT_TENSORFLOW}", file=sys.stderr)
    return True


def _info(arguments):
    if _tensorflow_is_missing():
        return 2
    import keras
    import numpy
    import tensorflow as tf

    import performer
    from performer import loader
    from performer.ops import gpus

    found = loader.status()
    print(f"performer {performer.__version__}")
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(f"tensorflow {tf.__version__}, keras {keras.__version__}, numpy {numpy.__version__}")
    print(f"compiled ops: {found.state}, built for TensorFlow {found.built_for or '-'}")
    if found.message:
        print(f"  {found.message}")
    elif loader.xla_status().message:
        print(f"compiled part for XLA: {loader.xla_status().message}")
    try:
        build = importlib.import_module("performer._build_info")  # written by the build
    except ImportError:
        build = None
    try:
        core = importlib.import_module("performer._core")
    except ImportError:  # a wheel for every Python does without
        core = None
    if core:
        print(f"instruction set: {core.isa()} of {', '.join(core.isas())}")
    elif build:
        print(f"instruction sets: {', '.join(build.ISAS)}")
    if build:
        print(f"GPU kernels: {_gpu_kernels(build, core)}")
    for device in tf.config.list_physical_devices():
        print(f"device: {device.name}")
    for card in gpus.cards():
        reason = gpus.fault(gpus.Call("causal", tf.float32, (), ()), card, gpus.build())
        print(f"GPU kernels on {card.name}: {f'no; {reason}' if reason else 'yes'}")
    return 0


def _gpu_kernels(build, core):
    if not build.CUDA_COMPILER:
        return f"left out; {build.CUDA_LEFT_OUT}"
    built = f"{build.CUDA_COMPILER}, for {', '.join(build.CUDA_TARGETS)}"
    if core is None:
        return built
    try:
        found = ", ".join(gpu["name"] for gpu in core.gpus())
    except RuntimeError as error:
        found = str(error)
    return f"{built}; {found}"
