"""Random calls of the core or of the TensorFlow operators, in a child process.

    python tests/building/fuzz.py core --seconds 20
    python tests/building/fuzz.py operators --count 100000 --seed 1

`core` calls performer._core, `operators` the TensorFlow operators, eagerly, in a graph of unknown
shapes, and under XLA. A call that the model (tests/support/validity.py) calls invalid must be
refused, any other must be right. A call that fails, or that ends the process, is printed: it
belongs into tests/cpu/test_random_calls.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
KINDS = ("core", "operators")


def callers(kind):
    """Functions of (op, inputs, attributes) to results, each with how often it is taken; and the
    errors by which they refuse."""
    if kind == "core":
        from support.core_calls import _core

        return [(1.0, lambda op, x, attributes: _core.run(op, x, **attributes))], (ValueError,)
    import tensorflow as tf

    from support.operator_calls import call, traced

    def arrays(results):
        return {name: result.numpy() for name, result in results.items()}

    return [
        (0.950, lambda op, x, attributes: arrays(call(op, x, **attributes))),
        (0.045, lambda op, x, attributes: arrays(traced(op, "unknown", x, **attributes))),
        (0.005, lambda op, x, attributes: arrays(traced(op, "compiled", x, **attributes))),
    ], (tf.errors.OpError, ValueError, TypeError)


def child(kind, first, count, seconds, place):
    """Runs calls; writes the seed of each to the file `place` before it begins."""
    from support import random_calls
    from support.validity import faults

    ways, refusals = callers(kind)
    end, done = time.monotonic() + seconds, 0
    while done < count and time.monotonic() < end:
        seed = first + done
        place.seek(0)
        place.write(f"{seed:20d}")
        place.flush()
        random = Random(seed)
        drawn = random_calls.draw(random)
        way = random.choices([way for _, way in ways], [share for share, _ in ways])[0]
        wrong = faults(drawn.call)
        x = drawn.inputs()
        try:
            results = way(drawn.call.op, x, drawn.call.attributes)
        except refusals as error:
            assert wrong, f"a valid call was refused: {error}"
            random_calls.assert_refused(drawn, error)
        else:
            # XLA leaves out a call whose results are all empty, and the check of its offsets, too.
            left_out = kind == "operators" and way is ways[-1][1]
            left_out &= all(result.size == 0 for result in results.values())
            assert not wrong or (left_out and wrong == ["offsets"]), f"{wrong} was not refused"
            if not wrong:
                random_calls.assert_right(drawn, x, results)
        done += 1
    print(f"{kind}: {done} calls from seed {first} on", flush=True)


def main():
    """Starts the child and says which call was its last, if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=None, help="of the first call; default: random")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        with open(given.child, "w") as place:
            try:
                child(given.kind, given.seed, given.count, given.seconds, place)
            except BaseException:
                traceback.print_exc()
                sys.exit(1)
        return
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "big")
    with tempfile.NamedTemporaryFile("r") as place:
        command = [sys.executable, __file__, given.kind, f"--count={given.count}"]
        command += [f"--seconds={given.seconds}", f"--seed={seed}", f"--child={place.name}"]
        status = subprocess.run(command, check=False).returncode
        if status:
            last = int(place.read() or seed)
            from support import random_calls

            print(f"status {status}, seed {last}:\n{random_calls.draw(Random(last))}")
            sys.exit(1)


if __name__ == "__main__":
    main()
