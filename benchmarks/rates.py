"""The kernels' rate as a fraction of TensorFlow's matrix product, one thread, on a busy machine.

    python benchmarks/rates.py [--length L]

Times are processor times, which other work on the machine disturbs less than the clock on the wall;
product and kernel take turns, and the least of each counts. Results are checked first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.progress import track
from rich.table import Table

from performer import _core
from performer.bench import checking
from performer.bench.cases import Case
from performer.bench.implementations import tensorflow_calls

SETTINGS = [  # M, D, type, window
    (256, 64, "float32", None),
    (128, 64, "float32", None),
    (64, 64, "float32", None),
    (256, 128, "float32", None),
    (256, 64, "bfloat16", None),
    (256, 64, "float32", 64),
    (64, 64, "float32", 64),
]
MODES = list(itertools.product((False, True), repeat=2))  # causal, backward
ROUNDS = 7
PRODUCT_SIZE = 2048


def seconds(call) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def fraction(case: Case, product) -> float:
    """Operations of a case a second over those of the product."""
    short = case.at(checking.LENGTH)
    results = tensorflow_calls.call("performer", short, tensorflow_calls.tensors(short.inputs()))()
    checking.check("performer", short, tensorflow_calls.arrays(results))
    call = tensorflow_calls.call("performer", case, tensorflow_calls.tensors(case.inputs()))
    call()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(seconds(product))
        ours.append(seconds(call))
    return case.operations() / min(ours) * min(theirs) / (2 * PRODUCT_SIZE**3)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, metavar="L")
    length = parser.parse_args().length
    tensorflow_calls.prepare(1)
    product = tensorflow_calls.matrix_product(PRODUCT_SIZE)
    product()
    cases = {
        (setting, mode): Case(*mode, length, *setting[:3], window=setting[3])
        for setting in SETTINGS
        for mode in MODES
    }
    found = {at: fraction(case, product) for at, case in track(list(cases.items()), "measuring")}
    table = Table(title=f"fraction of the matrix product, L = {length}, {_core.isa()}, one thread")
    table.add_column("")
    for mode in MODES:
        table.add_column(Case(*mode, length).mode, justify="right", overflow="fold")
    for setting in SETTINGS:
        rates = [f"{found[setting, mode]:.2f}" for mode in MODES]
        window = f" window {setting[3]}" if setting[3] else ""
        table.add_row("M={} D={} {}".format(*setting) + window, *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
