"""How much memory the CUDA kernels move, in the build whose accesses are seen."""

from dataclasses import replace

import numpy as np
import pytest

from support.core_calls import forward
from support.emulated_calls import GPU_CASES, SPLIT, emulated, needs_race_detector, run
from support.inputs import cotangents, make

pytestmark = needs_race_detector
WINDOW = {"exact_window": 64, "causal": True}
HEADLINE = {"rows": 16384, "split": 1024}  # as on a GPU (cc/cuda/host/schedule.h)


def planted(kernel, bug):
    """What two blocks of 64 threads moved."""
    emulated.reset_counters()
    emulated.planted(kernel, np.ones(640, np.float32), bug)
    emulated.reset_races()
    return emulated.traffic()[kernel]


def test_copies_and_ldmatrix_are_counted():
    tile = 64 * 16
    assert planted("Misaligned", False) == {
        "read": tile,
        "block_read": 2 * tile,
        "written": 512,
        "block_written": 512,
        "shared_read": 2 * tile,
        "shared_written": 2 * tile,
    }


@pytest.mark.parametrize("bug", [False, True])
def test_a_sector_counts_once_for_a_launch_and_once_for_each_block(bug):
    traffic = planted("BlocksRace", bug)
    assert (traffic["read"], traffic["block_read"]) == (256, 512)
    # The blocks write the same numbers, or their own.
    assert (traffic["written"], traffic["block_written"]) == (256 if bug else 512, 512)
    assert traffic["shared_read"] == traffic["shared_written"] == 0


def moved(op, rows, options):
    """The traffic of all launches of a call with one head, D = E = 64, M = 256, in bfloat16."""
    case = replace(GPU_CASES["narrow, 256 features"], rows=rows)
    x = {**make(case, "bfloat16"), **cotangents(case, "bfloat16")}
    x["key"], x["value"], x["query"] = (x[name] * 0 for name in ("key", "value", "query"))
    if op == "NearFarGrad":
        window = {name: options[name] for name in WINDOW}
        x.update(run("NearFar", x, order="forward", **window))
    elif op not in ("Summarize", "Causal", "NearFar"):
        x.update(forward(x, op.startswith("Causal"), run, order="forward"))
    emulated.reset_counters()
    run(op, x, order="forward", **options)
    launches = emulated.traffic().values()
    return {name: sum(of[name] for of in launches) for name in next(iter(launches))}


def bytes_a_token(op, options):
    """(global, shared) bytes a token of a sequence as long as that of the headline.

    A call takes so much for a row, for a split and for a sequence. Here splits are shorter than on
    a GPU, so the three are told apart by calls of two splits, two and a half, and three.
    """
    calls = [moved(op, parts * SPLIT // 2, options) for parts in (4, 5, 6)]
    short, middle, long = (call["read"] + call["written"] for call in calls)
    row = (long - middle) / (SPLIT // 2)
    split = middle - short - row * (SPLIT // 2)
    sequence = short - row * 2 * SPLIT - 2 * split
    shared = calls[-1]["shared_read"] + calls[-1]["shared_written"]
    of_all = row + split / HEADLINE["split"] + sequence / HEADLINE["rows"]
    return of_all, shared / (3 * SPLIT)


# What must be moved at least is 128 bytes for each of a token's rows (of q, k, v, out, and their
# gradients).
@pytest.mark.parametrize(
    ("op", "options", "of_memory", "of_shared_memory"),
    [
        ("Summarize", {}, 398, 3400),
        ("Read", {}, 272, 3300),
        ("Causal", {}, 1982, 18700),
        ("SummarizeGrad", {}, 664, 14100),
        ("SummarizeGrad", {"projection_gradient": False}, 536, 13100),
        ("ReadGrad", {}, 671, 12400),
        ("ReadGrad", {"projection_gradient": False}, 543, 11400),
        ("CausalGrad", {}, 5369, 133000),
        ("CausalGrad", {"projection_gradient": False}, 3466, 61500),
        ("NearFar", WINDOW, 2100, 15700),
        ("NearFarGrad", WINDOW, 6557, 84500),
        ("NearFarGrad", {**WINDOW, "projection_gradient": False}, 4657, 52500),
    ],
)
def test_a_token_moves_no_more_than_counted(op, options, of_memory, of_shared_memory):
    counted, shared = bytes_a_token(op, options)
    assert counted == pytest.approx(of_memory, rel=0.01)
    # How often a number is loaded is the compiler's choice, too.
    assert 0.9 * of_shared_memory < shared < of_shared_memory
