"""Sizes that only a running graph knows, checked for the plain composition.

The compiled operators check all sizes when they run. TensorFlow's operations broadcast a size of 1
instead, and give a result of wrong numbers.
"""

from __future__ import annotations

import tensorflow as tf

from performer import checks
from performer.shapes import dims

# As the core declares them, P being 1 or N; the dense form is no operator of its.
LAYOUTS = {
    "summarize": {
        "key": "B S G D",
        "value": "B S G E",
        "key_projection": "1|G M D",
        "key_bias": "1|B 1|G 1|S",
    },
    "read": {
        "query": "B L H D",
        "query_projection": "1|G|H M D",
        "feature_bias": "1|G|H M",
        "log_mass": "N G M",
        "mean": "N G M E",
    },
    "causal": {
        "query": "B L H D",
        "key": "B L G D",
        "value": "B L G E",
        "query_projection": "1|G|H M D",
        "key_projection": "1|G M D",
        "feature_bias": "1|G|H M",
        "key_bias": "1|B 1|G 1|L",
        "initial_log_mass": "P G M",
        "initial_mean": "P G M E",
    },
    "near_far": {
        "query": "B L H D",
        "key": "B S G D",
        "value": "B S G E",
        "query_projection": "1|G|H M D",
        "key_projection": "1|G M D",
        "feature_bias": "1|G|H M",
        "key_bias": "1|B 1|G 1|S",
        "initial_log_mass": "P G M",
        "initial_mean": "P G M E",
    },
    "dense": {
        "query": "B L H D",
        "key": "B S G D",
        "value": "B S G E",
        "query_projection": "1|G|H M D",
        "key_projection": "1|G M D",
        "feature_bias": "1|G|H M",
        "key_bias": "1|B 1|G 1|S",
    },
}


def wait_for_sizes(operator: str, inputs: dict, packed: bool = False) -> dict:
    """The inputs, which wait for checks of the sizes that are not known yet.

    So no operation can meet a wrong size, and fail in its own words, before its check does.

    Args:
        operator: "summarize", "read", "causal", "near_far" or "dense".
        inputs: the tensors, by name; others stay as they are.
        packed: whether N counts packed sequences; otherwise N = B.

    Returns:
        All inputs, by name.
    """
    found = _sizes_when_run(operator, inputs, packed)
    if not found:
        return inputs
    with tf.control_dependencies(found):
        return {k: tf.identity(x) if k in LAYOUTS[operator] else x for k, x in inputs.items()}


def _sizes_when_run(operator, inputs, packed):
    """Checks of the sizes that are not known; the known ones were checked before."""
    places = [
        (name, axis, letters if packed else letters.replace("N", "B"))
        for name, layout in LAYOUTS[operator].items()
        for axis, letters in enumerate(layout.split())
    ]
    first: dict = {}
    for name, axis, letters in places:
        if "|" not in letters:
            first.setdefault(letters, (name, axis))
    found = []
    for name, axis, letters in places:
        if "|" not in letters:
            other, other_axis = first[letters]
            if (other, other_axis) != (name, axis):
                found += checks.same_when_run(
                    name, axis, inputs[name], other, other_axis, inputs[other], letters
                )
        else:
            allowed = {
                letter: 1 if letter == "1" else dims(inputs[first[letter][0]])[first[letter][1]]
                for letter in letters.split("|")
            }
            found += checks.one_of_when_run(name, axis, inputs[name], allowed)
    if "P" in first and not packed:
        name, axis = first["P"]
        allowed = {"1": 1, "N": dims(inputs[first["B"][0]])[first["B"][1]]}
        found += checks.one_of_when_run(name, axis, inputs[name], allowed)
    return found
