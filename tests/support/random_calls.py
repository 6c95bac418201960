"""Random calls of the operators, good and bad, and the judgement of what came back.

A call is drawn from a `random.Random`, be it one of a seed (fuzzing) or one of hypothesis (which
can then make a call that fails smaller). `validity` says whether it must be refused; the reference
says what a good one gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import numpy as np

from support import core_calls  # before anything else of performer: it keeps TensorFlow out
from support.compare import assert_close
from support.inputs import DTYPES, OPS, known_attributes
from support.validity import FIRST, INPUTS, NARROW, Call, faults, result_shapes

ROWS = (0, 1, 1, 2, 3, 5, 24, 47, 48, 49, 97)  # around the chunks of the kernels
WIDTHS = (1, 2, 3, 4, 8, 15, 16, 17)
HUGE = (2**16, 2**16 + 1, 2**20 + 1, 2**31, 2**32 + 1, 2**40, 2**57, 2**58 - 1)
MOST_NUMBERS = 2**18  # in one input
_MANY_BLOCKS = (
    16  # below this exact_window the reference in blocks takes longer than the direct one
)


@dataclass(frozen=True)
class Drawn:
    """A call, and the numbers in it.

    Attributes:
        call: shapes, types and attributes.
        values: "plain" (normal), "masked" (keys and features that -inf masks), or "wild" (NaN,
            infinities, denormals, large numbers anywhere).
        layout: how the arrays lie in memory: "plain", "strided", "misaligned".
        seed: of the numbers.
    """

    call: Call
    values: str = "plain"
    layout: str = "plain"
    seed: int = 0

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        rng = np.random.default_rng(self.seed)
        with np.errstate(all="ignore"):
            x = {name: self._array(name, rng) for name in self.call.shapes}
        if self.values == "masked":  # the mean of nothing is 0
            for mass, mean in (("log_mass", "mean"), ("initial_log_mass", "initial_mean")):
                if mass in x and x[mean].shape[:-1] == x[mass].shape and x[mass].dtype.kind == "f":
                    x[mean] = np.where(np.isneginf(x[mass])[..., None], 0, x[mean]).astype(
                        x[mean].dtype
                    )
        if self.call.op == "NearFarGrad" and self.values != "wild" and not faults(self.call):
            # Weights are exp(logit - log_weight): of another log_weight than the call's they may
            # be too large for float32.
            x |= core_calls.run("NearFar", x, **self.call.attributes)
        return {name: _laid_out(array, self.layout) for name, array in x.items()}

    def _array(self, name, rng):
        shape, dtype = self.call.shapes[name], self.call.dtypes[name]
        if name == "offsets" and len(shape) == 1:
            x = np.array(self.call.offsets, np.int64)
        elif name == "start" and shape == ():
            x = np.array(self.call.start, np.int64)
        else:
            x = rng.normal(size=shape)
        if name in ("key_bias", "log_mass", "initial_log_mass") and self.values != "plain":
            x[rng.random(shape) < 0.3] = -np.inf
        if self.values == "wild" and name not in ("offsets", "start"):
            wild = [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-40, 60000.0, 0.0]
            hit = rng.random(shape) < 0.1
            x = np.where(hit, rng.choice(wild, size=shape), x)
        return x.astype(DTYPES.get(dtype, dtype))


def _laid_out(x, layout):
    if layout == "strided" and x.ndim and x.size:
        return np.repeat(x, 2, -1)[..., ::2]
    if layout == "misaligned":
        room = np.zeros(x.nbytes + 1, np.uint8)
        room[1:] = np.frombuffer(x.tobytes(), np.uint8)
        return np.ndarray(x.shape, x.dtype, room.data, 1)
    return x


def _good(random: Random, op: str) -> Call:
    """A valid call."""
    groups = random.choice((1, 1, 2, 3))
    packed = random.random() < 0.3
    rows = random.choice(ROWS)
    cuts = sorted(random.randint(0, rows) for _ in range(random.randint(0, 3)))
    offsets = (0, *cuts, rows) if packed else (0,)
    batch = 1 if packed else random.choice((0, 1, 1, 2, 3))
    sequences = len(offsets) - 1 if packed else batch
    attributes = {"packed": True} if packed else {}
    queries, start = random.choice(ROWS), 0
    if packed or op.startswith("Causal"):
        queries = rows
    if op.startswith("NearFar"):
        attributes["exact_window"] = random.choice((1, 2, 3, 8, 16, 17, 48, 64, 65536))
        attributes["causal"] = random.choice((True, True, False))
        queries = min(queries, rows) if attributes["causal"] else rows
        start = 0 if packed else random.choice((0, 0, 1, 7, 63, 64, 2**63 - 1))
    size = {
        "batch": batch,
        "groups": groups,
        "heads": groups * random.choice((1, 1, 2, 3)),
        "keys": rows,
        "queries": queries,
        "sequences": sequences,
        "states": random.choice((1, sequences)),
        "key_dim": random.choice(WIDTHS),
        "value_dim": random.choice((0, *WIDTHS)),
        "features": random.choice((*WIDTHS, 65)),
        "offsets": len(offsets),
    }
    shapes = {}
    for name, axes in INPUTS[op].items():
        shapes[name] = tuple(
            size[axis] if isinstance(axis, str) else random.choice([1, *(size[a] for a in axis)])
            for axis in axes
        )
    first = random.choice(NARROW)
    rows_of = ("query", "key", "value", "out", "grad_out")
    wide = "float64" if first == "float64" else "float32"
    dtypes = {name: first if name in rows_of else wide for name in shapes}
    dtypes |= dict.fromkeys({"offsets", "start"} & shapes.keys(), "int64")
    if random.random() < 0.4:
        attributes["feature_map"] = random.choice(("softmax", "relu", "elu"))
    if random.random() < 0.2:
        attributes["scale"] = random.choice((0.0, 0.125, 1.0, 3.0))
    if random.random() < 0.2:
        attributes["feature_epsilon"] = random.choice((0.0, 1e-3, 0.5))
    for norm in ("key_norm", "query_norm"):
        if random.random() < 0.2:
            attributes[norm] = random.choice((True, False))
    return Call(op, shapes, dtypes, known_attributes(op, attributes), offsets, start)


def _other_size(random: Random, size: int) -> int:
    return random.choice((0, 1, 2, max(size - 1, 0), size + 1, 2 * size, random.choice(HUGE)))


def _spoilt(random: Random, call: Call) -> Call:
    """The call with one thing changed; it may still be valid."""
    shapes, dtypes, attributes = dict(call.shapes), dict(call.dtypes), dict(call.attributes)
    offsets, name = call.offsets, random.choice(list(shapes))
    shape = shapes[name]
    kinds = ("size", "size", "size", "all", "rank", "type", "attribute", "offsets")
    kind, start = random.choice((*kinds, *(("start",) if call.windowed else ()))), call.start
    if kind == "size" and shape:
        axis = random.randrange(len(shape))
        shapes[name] = (*shape[:axis], _other_size(random, shape[axis]), *shape[axis + 1 :])
    elif kind == "all":  # one size wherever it occurs
        axes = [axis for given in INPUTS[call.op].values() for axis in given]
        chosen = random.choice([axis for axis in axes if isinstance(axis, str)])
        found = [
            shapes[given][i]
            for given, names in INPUTS[call.op].items()
            for i, axis in enumerate(names)
            if axis == chosen and len(shapes[given]) == len(names)
        ]
        other = _other_size(random, found[0] if found else 1)
        for given, names in INPUTS[call.op].items():
            if len(shapes[given]) == len(names):
                shapes[given] = tuple(
                    other if axis == chosen else size
                    for axis, size in zip(names, shapes[given], strict=True)
                )
    elif kind == "rank":
        shapes[name] = random.choice(((), shape[1:], (*shape, 1), (1, *shape), shape[:-1]))
    elif kind == "type":
        dtypes[name] = random.choice((*NARROW, "int32", "int64", "bool", "complex64"))
    elif kind == "attribute":
        attribute, value = random.choice(
            (
                ("scale", float("nan")),
                ("scale", float("inf")),
                ("scale", -1.0),
                ("scale", 1e300),
                ("scale", 1e-300),
                ("feature_epsilon", float("nan")),
                ("feature_epsilon", -1e-3),
                ("feature_map", "cosh"),
                ("feature_map", ""),
                ("packed", True),
                ("exact_window", random.choice((0, -1, 65537, 2**62))),
                ("causal", random.choice((True, False))),
            )
        )
        attributes = known_attributes(call.op, {**attributes, attribute: value})
    elif kind == "start":
        start = random.choice((-1, 1, 2**62, -(2**63)))
    elif kind == "offsets" and offsets:
        numbers = list(offsets)
        where = random.randrange(len(numbers))
        numbers[where] += random.choice((-1, 1, 2**31, 2**62, -(2**63), -numbers[where]))
        numbers[where] = max(min(numbers[where], 2**63 - 1), -(2**63))
        offsets = tuple(numbers)
    if len(shapes["offsets"]) == 1:
        size = shapes["offsets"][0]
        offsets = (offsets + (offsets[-1] if offsets else 0,) * min(size, 8))[:size]
        shapes["offsets"] = (len(offsets),)
    changed = {"attributes": attributes, "offsets": offsets, "start": start}
    return replace(call, shapes=shapes, dtypes=dtypes, **changed)


def _fits(call: Call) -> bool:
    """Whether arrays of these shapes can be made, and what a valid call makes of them."""
    shapes = list(call.shapes.values())
    if not faults(call):
        shapes += result_shapes(call).values()
        found = dict(zip(INPUTS[call.op], shapes, strict=False))
        features = found.get("key_projection", found.get("query_projection"))
        shapes.append((features[1] * (features[2] + 64), *features[:1]))
    for shape in shapes:
        most = 1
        for size in shape:
            most *= max(size, 1)
        if most * 8 >= 2**63 or (0 not in shape and most > MOST_NUMBERS):
            return False
    return True


def draw(random: Random, ops=OPS) -> Drawn:
    """A call, valid or not."""
    while True:
        call = _good(random, random.choice(ops))
        for _ in range(random.choice((0, 1, 1, 2))):
            call = _spoilt(random, call)
        if _fits(call):
            values = random.choice(("plain", "plain", "masked", "wild"))
            layout = random.choice(("plain",) * 5 + ("strided", "misaligned"))
            return Drawn(call, values, layout, random.randrange(2**16))


def assert_refused(drawn: Drawn, error: Exception) -> None:
    """The message of a call that was refused names an argument, an attribute or a size.

    Of a wrong type TensorFlow names the operator or the types, before the operator is asked.
    """
    names = [*drawn.call.shapes, *drawn.call.attributes, "the number of", "dimension"]
    names += [f"Performer>{drawn.call.op}", "requested dtype"]
    assert any(name in str(error) for name in names), f"{drawn}: {error!r}"


def assert_right(drawn: Drawn, x: dict, results: dict) -> None:
    """Shapes and types of the results of a valid call; for plain numbers, also the results."""
    shapes = result_shapes(drawn.call)
    assert {name: a.shape for name, a in results.items()} == shapes, drawn
    narrow = drawn.call.dtypes[FIRST[drawn.call.op.removesuffix("Grad")]]
    if drawn.values == "wild":
        return
    for name, result in results.items():
        assert not np.isnan(result.astype(np.float64)).any(), f"{name} of {drawn} has NaN"
    if drawn.call.op.endswith("Grad"):
        return
    check_numbers(drawn, x, results, narrow)


def check_numbers(drawn: Drawn, x: dict, results: dict, dtype: str) -> None:
    """Forward results are those of the reference."""
    call = drawn.call
    options = {name: value for name, value in call.attributes.items() if name != "packed"}
    offsets = call.offsets if call.packed else None
    if call.op == "Summarize":
        log_mass, mean = core_calls.reference.heads.summarize_heads(
            x["key"], x["value"], x["key_projection"], x["key_bias"], offsets, **options
        )
        exact = {"log_mass": log_mass, "mean": mean}
    elif call.op == "Read":
        exact = {
            "out": core_calls.reference.heads.read_heads(
                x["query"],
                x["query_projection"],
                x["log_mass"],
                x["mean"],
                x["feature_bias"],
                offsets,
                **options,
            )
        }
    elif call.op == "NearFar":
        window = call.attributes.get("exact_window", 64)
        name = "near_far_direct" if window < _MANY_BLOCKS else "near_far_in_blocks"
        form = getattr(core_calls.reference, name)
        exact = core_calls.expected_near_far(x, form=form, **call.attributes)
    else:
        exact = core_calls.expected(x, True, **call.attributes)
    bound = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 3e-2, "float16": 3e-2}[dtype]
    for name, wanted in exact.items():
        try:
            assert_close(results[name], wanted, relative=bound, what=name)
        except AssertionError as error:
            raise AssertionError(f"{error}, by {drawn}") from None
