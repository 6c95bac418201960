"""Calls that must be refused, in one table, for every way to make them.

A row is what is wrong and what the message must say: the argument, the rule, the value. All else is
the good call: B 2, L = S 5, H 4, G 2, D 3, E 2, M 6 (packed: D 16, E 5, M 10).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from support.core_calls import forward, run
from support.inputs import Case, cotangents, make

GOOD = Case(
    batch=2,
    rows=5,
    heads=4,
    groups=2,
    dim=3,
    value_dim=2,
    features=6,
    query_projections=4,
    key_projections=2,
    feature_biases=2,
    bias="BGS",
    state=2,
)
PACKED = Case(batch=1, rows=5, offsets=(0, 2, 5), state=2, bias="11S", masked="")


def good_inputs(case: Case = GOOD, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Inputs of all operators, float32 or another type."""
    x = make(case, dtype)
    results = run("NearFar", x, **case.options) | forward(x, causal=True, **case.options)
    return {**x, **cotangents(case, dtype), **results}


@dataclass(frozen=True)
class Bad:
    """A call to refuse.

    Attributes:
        op: operator.
        shapes: wrong shapes, by argument.
        says: parts of the message.
        attributes: of the operator.
        offsets: for packed calls.
        start: of near-and-far attention.
        late: only the values are wrong, so that tracing cannot know.
    """

    op: str
    shapes: dict = field(default_factory=dict)
    says: tuple[str, ...] = ()
    attributes: dict = field(default_factory=dict)
    offsets: tuple[int, ...] | None = None
    start: int = 0
    late: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        """All inputs of the call."""
        x = good_inputs(GOOD if self.offsets is None else PACKED)
        x.update({name: np.zeros(shape, x[name].dtype) for name, shape in self.shapes.items()})
        if self.offsets is not None:
            x["offsets"] = np.array(self.offsets, np.int64)
        if self.start:
            x["start"] = np.array(self.start, np.int64)
        return x


def name_of(bad: Bad) -> str:
    """For the test's name."""
    what = [f"{name}={list(shape)}" for name, shape in bad.shapes.items()]
    what += [f"{name}={value!r}" for name, value in bad.attributes.items() if name != "packed"]
    what += [] if bad.offsets is None else [f"offsets={list(bad.offsets)}"]
    what += [f"start={bad.start}"] if bad.start else []
    return f"{bad.op} {' '.join(what)}"


def _row(op, argument, shape, *says):
    text = "[" + ", ".join(str(size) for size in shape) + "]"
    return Bad(op, {argument: shape}, (argument, *says, text))


# One argument of a wrong shape: operator, argument, shape, rule.
_SHAPES = [
    ("Summarize", "key", (), "rank 4", "rank 0"),
    ("Summarize", "key", (2, 5, 2), "rank 4", "rank 3"),
    ("Summarize", "key", (2, 5, 2, 3, 1), "rank 4", "rank 5"),
    ("Summarize", "value", (2, 5, 2), "rank 4", "rank 3"),
    ("Summarize", "value", (2, 5, 2, 2, 1), "rank 4", "rank 5"),
    ("Summarize", "value", (1, 5, 2, 2), "B = 2 as in key"),
    ("Summarize", "value", (3, 5, 2, 2), "B = 2 as in key"),
    ("Summarize", "value", (2, 4, 2, 2), "S = 5 as in key"),
    ("Summarize", "value", (2, 5, 4, 2), "G = 2 as in key"),
    ("Summarize", "key_projection", (6,), "rank 3", "rank 1"),
    ("Summarize", "key_projection", (6, 3), "rank 3", "rank 2"),
    ("Summarize", "key_projection", (1, 2, 6, 3), "rank 3", "rank 4"),
    ("Summarize", "key_projection", (3, 6, 3), "1|G", "1 or G = 2"),
    ("Summarize", "key_projection", (0, 6, 3), "1|G", "1 or G = 2"),
    ("Summarize", "key_projection", (2, 6, 4), "D = 3 as in key"),
    ("Summarize", "key_bias", (), "rank 3", "rank 0"),
    ("Summarize", "key_bias", (2, 5), "rank 3", "rank 2"),
    ("Summarize", "key_bias", (2, 2, 1, 5), "rank 3", "rank 4"),
    ("Summarize", "key_bias", (3, 1, 5), "1|B", "1 or B = 2"),
    ("Summarize", "key_bias", (2, 4, 5), "1|G", "1 or G = 2"),
    ("Summarize", "key_bias", (2, 2, 4), "1|S", "1 or S = 5"),
    ("Summarize", "key_bias", (2, 2, 0), "1|S", "1 or S = 5"),
    ("Read", "query", (), "rank 4", "rank 0"),
    ("Read", "query", (2, 5, 12), "rank 4", "rank 3"),
    ("Read", "query", (2, 5, 4, 3, 1), "rank 4", "rank 5"),
    ("Read", "query_projection", (3,), "rank 3", "rank 1"),
    ("Read", "query_projection", (4, 6, 2), "D = 3 as in query"),
    ("Read", "query_projection", (3, 6, 3), "1|G|H", "H = 4"),
    ("Read", "feature_bias", (6,), "rank 2", "rank 1"),
    ("Read", "feature_bias", (1, 1, 6), "rank 2", "rank 3"),
    ("Read", "feature_bias", (2, 5), "M = 6 as in query_projection"),
    ("Read", "feature_bias", (3, 6), "1|G|H", "H = 4"),
    ("Read", "log_mass", (2, 6), "rank 3", "rank 2"),
    ("Read", "log_mass", (2, 2, 5), "M = 6 as in query_projection"),
    ("Read", "log_mass", (1, 2, 6), "N = 2 as in the batch size"),
    ("Read", "log_mass", (3, 2, 6), "N = 2 as in the batch size"),
    ("Read", "mean", (2, 2, 6), "rank 4", "rank 3"),
    ("Read", "mean", (2, 2, 5, 2), "M = 6 as in query_projection"),
    ("Read", "mean", (2, 1, 6, 2), "G = 2 as in log_mass"),
    ("Read", "mean", (1, 2, 6, 2), "N = 2 as in the batch size"),
    ("Causal", "query", (2, 5, 3), "rank 4", "rank 3"),
    ("Causal", "key", (2, 5, 2), "rank 4", "rank 3"),
    ("Causal", "key", (1, 5, 2, 3), "B = 2 as in query"),
    ("Causal", "key", (2, 6, 2, 3), "L = 5 as in query"),
    ("Causal", "key", (2, 5, 2, 4), "D = 3 as in query"),
    ("Causal", "value", (2, 6, 2, 2), "L = 5 as in query"),
    ("Causal", "value", (2, 5, 1, 2), "G = 2 as in key"),
    ("Causal", "key_projection", (2, 7, 3), "M = 6 as in query_projection"),
    ("Causal", "key_projection", (4, 6, 3), "1|G", "1 or G = 2"),
    ("Causal", "feature_bias", (4, 7), "M = 6 as in query_projection"),
    ("Causal", "key_bias", (2, 2, 6), "1|L", "1 or L = 5"),
    ("Causal", "initial_log_mass", (3, 2, 6), "P being 1 or N = 2"),
    ("Causal", "initial_log_mass", (2, 4, 6), "G = 2 as in key"),
    ("Causal", "initial_mean", (3, 2, 6, 2), "P being 1 or N = 2"),
    ("Causal", "initial_mean", (1, 2, 6, 2), "P = 2 as in initial_log_mass"),
    ("CausalGrad", "initial_mean", (1, 2, 6, 2), "P = 2 as in initial_log_mass"),
    ("Causal", "initial_mean", (2, 2, 6, 3), "E = 2 as in value"),
    ("Causal", "initial_mean", (2, 2, 6), "rank 4", "rank 3"),
    ("SummarizeGrad", "log_mass", (2, 2, 7), "M = 6 as in key_projection"),
    ("SummarizeGrad", "mean", (2, 2, 6, 3), "E = 2 as in value"),
    ("SummarizeGrad", "mean", (0, 2, 6, 2), "N = 2 as in the batch size"),
    ("SummarizeGrad", "grad_log_mass", (2, 2), "rank 3", "rank 2"),
    ("SummarizeGrad", "grad_log_mass", (1, 2, 6), "N = 2 as in the batch size"),
    ("SummarizeGrad", "grad_mean", (2, 2, 6, 0), "E = 2 as in value"),
    ("ReadGrad", "out", (2, 4, 4, 2), "L = 5 as in query"),
    ("ReadGrad", "grad_out", (2, 5, 4), "rank 4", "rank 3"),
    ("ReadGrad", "grad_out", (2, 5, 2, 2), "H = 4 as in query"),
    ("ReadGrad", "grad_out", (2, 5, 4, 1), "E = 2 as in mean"),
    ("ReadGrad", "log_mass", (2, 2, 1), "M = 6 as in query_projection"),
    ("CausalGrad", "out", (1, 5, 4, 2), "B = 2 as in query"),
    ("CausalGrad", "grad_out", (2, 1, 4, 2), "L = 5 as in query"),
    ("CausalGrad", "grad_out", (), "rank 4", "rank 0"),
    ("CausalGrad", "log_mass", (1, 2, 6), "N = 2 as in the batch size"),
    ("CausalGrad", "mean", (2, 2, 6, 1), "E = 2 as in value"),
    ("CausalGrad", "grad_log_mass", (2, 2, 7), "M = 6 as in query_projection"),
    ("CausalGrad", "grad_mean", (2, 1, 6, 2), "G = 2 as in key"),
    ("CausalGrad", "initial_log_mass", (0, 2, 6), "P being 1 or N = 2"),
]


def _sizes():
    """Sizes that no call may have, or that do not go together."""
    keys = {"key": (2, 5, 2, 3), "value": (2, 5, 2, 2)}
    return [
        Bad(
            "Causal", {"query_projection": (4, 7, 3)}, ("M = 7 as in query_projection", "[2, 6, 3]")
        ),
        Bad("Summarize", {"key": keys["value"], "value": keys["key"]}, ("key_projection", "D = 2")),
        Bad(
            "Summarize",
            {"key": (2, 5, 2, 0), "key_projection": (2, 6, 0)},
            ("key dimension D", "at least 1", "got 0"),
        ),
        Bad("Summarize", {"key_projection": (2, 0, 3)}, ("features M", "at least 1", "got 0")),
        Bad(
            "Summarize",
            {"key": (2, 5, 0, 3), "value": (2, 5, 0, 2), "key_bias": (1, 1, 1)}
            | {"key_projection": (1, 6, 3)},
            ("heads G", "at least 1", "got 0"),
        ),
        Bad(
            "Read",
            {"query": (2, 5, 0, 3), "query_projection": (1, 6, 3), "feature_bias": (1, 6)},
            ("query heads H", "at least 1", "got 0"),
        ),
        Bad(
            "Read",
            {"query": (2, 5, 3, 3), "query_projection": (1, 6, 3), "feature_bias": (1, 6)},
            ("H must be a multiple", "H = 3, G = 2"),
        ),
        Bad(
            "Causal",
            {"query": (2, 5, 1, 3), "query_projection": (1, 6, 3), "feature_bias": (1, 6)},
            ("H must be a multiple", "H = 1, G = 2"),
        ),
        Bad(
            "Summarize",
            {"key_projection": (1, 65537, 3)},
            ("features M", "at most 65536", "got 65537"),
        ),
        Bad(
            "Summarize",
            {"key": (2, 0, 2, 65537), "value": (2, 0, 2, 2), "key_bias": (1, 1, 1)}
            | {"key_projection": (1, 1, 65537)},
            ("key dimension D", "at most 65536", "got 65537"),
        ),
        Bad(
            "Summarize",
            {"value": (2, 5, 2, 65537)},
            ("value dimension E", "at most 65536", "got 65537"),
        ),
        Bad(
            "Summarize",
            {"key": (2**31, 0, 1, 1), "value": (2**31, 0, 1, 65536), "key_bias": (1, 1, 1)}
            | {"key_projection": (1, 65536, 1)},
            ("mean", "at most 2**56 elements", "[2147483648, 1, 65536, 65536]"),
        ),
        *(
            Bad(
                op,
                {"initial_log_mass": (1, 2, 6)},
                ("initial_mean", "P = 1 as in initial_log_mass", "[2, 2, 6, 2]"),
            )
            for op in ("Causal", "CausalGrad")
        ),
        *_many_heads(),
    ]


def _many_heads():
    """Numbers of heads whose workspaces would overflow; no row, so that the inputs are small."""
    for heads, says in [
        (2**20 + 1, ("query heads H", "at most 1048576", "got 1048577")),
        (2**54, ("query", "at most 2**56 elements", "[2, 0, 18014398509481984, 3]")),
        (2**58 - 1, ("query", "at most 2**56 elements", "[2, 0, 288230376151711743, 3]")),
    ]:
        query = {"query": (2, 0, heads, 3), "query_projection": (1, 6, 3), "feature_bias": (1, 6)}
        out = {"out": (2, 0, heads, 2), "grad_out": (2, 0, heads, 2)}
        keys = {"key": (2, 0, 2, 3), "value": (2, 0, 2, 2), "key_bias": (1, 1, 1)}
        for op in ("Read", "Causal", "ReadGrad", "CausalGrad"):
            yield Bad(op, {**query, **out, **keys}, says)
    groups = 2**20 + 1
    keys = {"key": (1, 0, groups, 1), "value": (1, 0, groups, 0), "key_bias": (1, 1, 1)}
    yield Bad(
        "Summarize",
        {**keys, "key_projection": (1, 1, 1)},
        ("key and value heads G", "at most 1048576", "got 1048577"),
    )


def _packed(op, offsets, *says):
    return Bad(op, {}, ("offsets", *says), {"packed": True}, offsets, late=True)


def _offsets():
    """Packed sequences that do not cover the rows, 5."""
    two_rows = {"key": (2, 5, 2, 16), "value": (2, 5, 2, 5)}
    rows = [
        _packed(op, offsets, *says)
        for op in ("Summarize", "Read", "Causal")
        for offsets, says in [
            ((1, 2, 5), ("start at 0", "offsets[0] = 1")),
            ((0, 2, 4), ("end at the number of rows, 5", "offsets[2] = 4")),
            ((0, 2, 6), ("end at the number of rows, 5", "offsets[2] = 6")),
            ((0, 6, 5), ("never fall", "offsets[2] = 5")),
            ((0, -1, 5), ("never fall", "offsets[1] = -1")),
            ((0, 2**62, 5), ("never fall", "offsets[2] = 5")),
            ((-(2**63), 2, 5), ("start at 0", "offsets[0] = -9223372036854775808")),
        ]
        if op != "Read" or offsets[1] == 2
    ]
    rows += [
        _packed(op, (0, 2, 2**63 - 1), "end at the number of rows, 5", "9223372036854775807")
        for op in ("SummarizeGrad", "ReadGrad", "CausalGrad")
    ]
    packed = {"packed": True}
    return [
        *rows,
        Bad("Summarize", two_rows, ("key", "B = 1", "[2, 5, 2, 16]"), packed, (0, 2, 5)),
        Bad("Summarize", {"offsets": ()}, ("offsets", "rank 1", "rank 0"), packed),
        Bad("Summarize", {"offsets": (3, 1)}, ("offsets", "rank 1", "[3, 1]"), packed),
        Bad("Summarize", {"offsets": (0,)}, ("offsets", "at least one entry", "[0]"), packed),
        Bad("Read", {}, ("log_mass", "N = 1 as in offsets", "[2, 2, 10]"), packed, (0, 5)),
        Bad(
            "Causal",
            {},
            ("initial_log_mass", "P being 1 or N = 3", "[2, 2, 10]"),
            packed,
            (0, 2, 2, 5),
        ),
    ]


def _attributes():
    """Attributes out of their range."""
    return [
        Bad(op, {}, (name, rule, text), {name: value})
        for op in ("Summarize", "Read", "CausalGrad")
        for name, value, rule, text in [
            ("scale", np.nan, "finite and positive", "got nan"),
            ("scale", np.inf, "finite and positive", "got inf"),
            ("scale", -1.0, "finite and positive", "got -1"),
            ("feature_epsilon", np.nan, "finite and positive", "got nan"),
            ("feature_epsilon", -0.5, "finite and positive", "got -0.5"),
            ("feature_map", "cosh", "softmax", "cosh"),
            ("feature_map", "", "softmax", "feature_map"),
        ]
    ]


def _near_far():
    """What near-and-far attention asks for besides."""
    queries = {"query": (2, 4, 4, 3), "out": (2, 4, 4, 2), "grad_out": (2, 4, 4, 2)}
    queries |= dict.fromkeys(("log_weight", "grad_log_weight"), (2, 4, 4))
    more = {name: (shape[0], 6, *shape[2:]) for name, shape in queries.items()}
    packed = {"query": (1, 4, 2, 16)}
    rule, huge = "the number of queries L must", 2**62
    return [
        Bad("NearFar", queries, (rule, "equal", "unless causal", "L = 4, S = 5")),
        Bad("NearFarGrad", queries, (rule, "equal", "unless causal", "L = 4, S = 5")),
        Bad("NearFar", more, (rule, "at most", "L = 6, S = 5"), {"causal": True}),
        Bad("NearFarGrad", more, (rule, "at most", "L = 6, S = 5"), {"causal": True}),
        Bad(
            "NearFar",
            packed,
            (rule, "equal", "packed", "L = 4, S = 5"),
            {"packed": True, "causal": True},
            (0, 2, 5),
        ),
        *(
            Bad(op, {}, ("exact_window", "at most 65536", f"got {value}"), {"exact_window": value})
            for op in ("NearFar", "NearFarGrad")
            for value in (0, -1, 65537, huge)
        ),
        *(
            Bad(op, {}, ("start", "at least 0", f"got {value}"), start=value, late=True)
            for op in ("NearFar", "NearFarGrad")
            for value in (-1, -(2**63))
        ),
        Bad(
            "NearFar",
            {},
            ("start", "0 where sequences are packed", "got 64"),
            {"packed": True},
            (0, 2, 5),
            start=64,
            late=True,
        ),
        _row("NearFar", "start", (1,), "rank 0", "rank 1"),
        _row("NearFar", "key", (2, 5, 2), "rank 4", "rank 3"),
        _row("NearFar", "value", (2, 6, 2, 2), "S = 5 as in key"),
        _row("NearFar", "initial_log_mass", (3, 2, 6), "P being 1 or N = 2"),
        _row("NearFarGrad", "log_weight", (2, 5, 1), "H = 4 as in query"),
        _row("NearFarGrad", "grad_log_weight", (2, 5), "rank 3", "rank 2"),
    ]


TABLE = [
    *(_row(*shape) for shape in _SHAPES),
    *_sizes(),
    *_offsets(),
    *_attributes(),
    *_near_far(),
]
