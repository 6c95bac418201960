"""Calls that must be refused, in one table, for every way to make them.

A row is what is wrong and what the message must say: the argument, the rule, the value. All else is
the good call: B 2, L = S 5, H 4, G 2, D 3, E 2, M 6 (packed: D 16, E 5, M 10).
"""

import numpy as np

from support.bad_call import Bad


def _row(op, argument, shape, *says):
    text = "[" + ", ".join(str(size) for size in shape) + "]"
    return Bad(op, {argument: shape}, (argument, *says, text))


def _shapes():
    """One argument of a wrong shape: operator, argument, shape, rule."""
    return [
        _row("Summarize", "key", (), "rank 4", "rank 0"),
        _row("Summarize", "key", (2, 5, 2), "rank 4", "rank 3"),
        _row("Summarize", "key", (2, 5, 2, 3, 1), "rank 4", "rank 5"),
        _row("Summarize", "value", (2, 5, 2), "rank 4", "rank 3"),
        _row("Summarize", "value", (2, 5, 2, 2, 1), "rank 4", "rank 5"),
        _row("Summarize", "value", (1, 5, 2, 2), "B = 2 as in key"),
        _row("Summarize", "value", (3, 5, 2, 2), "B = 2 as in key"),
        _row("Summarize", "value", (2, 4, 2, 2), "S = 5 as in key"),
        _row("Summarize", "value", (2, 5, 4, 2), "G = 2 as in key"),
        _row("Summarize", "key_projection", (6,), "rank 3", "rank 1"),
        _row("Summarize", "key_projection", (6, 3), "rank 3", "rank 2"),
        _row("Summarize", "key_projection", (1, 2, 6, 3), "rank 3", "rank 4"),
        _row("Summarize", "key_projection", (3, 6, 3), "1|G", "1 or G = 2"),
        _row("Summarize", "key_projection", (0, 6, 3), "1|G", "1 or G = 2"),
        _row("Summarize", "key_projection", (2, 6, 4), "D = 3 as in key"),
        _row("Summarize", "key_bias", (), "rank 3", "rank 0"),
        _row("Summarize", "key_bias", (2, 5), "rank 3", "rank 2"),
        _row("Summarize", "key_bias", (2, 2, 1, 5), "rank 3", "rank 4"),
        _row("Summarize", "key_bias", (3, 1, 5), "1|B", "1 or B = 2"),
        _row("Summarize", "key_bias", (2, 4, 5), "1|G", "1 or G = 2"),
        _row("Summarize", "key_bias", (2, 2, 4), "1|S", "1 or S = 5"),
        _row("Summarize", "key_bias", (2, 2, 0), "1|S", "1 or S = 5"),
        _row("Read", "query", (), "rank 4", "rank 0"),
        _row("Read", "query", (2, 5, 12), "rank 4", "rank 3"),
        _row("Read", "query", (2, 5, 4, 3, 1), "rank 4", "rank 5"),
        _row("Read", "query_projection", (3,), "rank 3", "rank 1"),
        _row("Read", "query_projection", (4, 6, 2), "D = 3 as in query"),
        _row("Read", "query_projection", (3, 6, 3), "1|G|H", "H = 4"),
        _row("Read", "feature_bias", (6,), "rank 2", "rank 1"),
        _row("Read", "feature_bias", (1, 1, 6), "rank 2", "rank 3"),
        _row("Read", "feature_bias", (2, 5), "M = 6 as in query_projection"),
        _row("Read", "feature_bias", (3, 6), "1|G|H", "H = 4"),
        _row("Read", "log_mass", (2, 6), "rank 3", "rank 2"),
        _row("Read", "log_mass", (2, 2, 5), "M = 6 as in query_projection"),
        _row("Read", "log_mass", (1, 2, 6), "N = 2 as in the batch size"),
        _row("Read", "log_mass", (3, 2, 6), "N = 2 as in the batch size"),
        _row("Read", "mean", (2, 2, 6), "rank 4", "rank 3"),
        _row("Read", "mean", (2, 2, 5, 2), "M = 6 as in query_projection"),
        _row("Read", "mean", (2, 1, 6, 2), "G = 2 as in log_mass"),
        _row("Read", "mean", (1, 2, 6, 2), "N = 2 as in the batch size"),
        _row("Causal", "query", (2, 5, 3), "rank 4", "rank 3"),
        _row("Causal", "key", (2, 5, 2), "rank 4", "rank 3"),
        _row("Causal", "key", (1, 5, 2, 3), "B = 2 as in query"),
        _row("Causal", "key", (2, 6, 2, 3), "L = 5 as in query"),
        _row("Causal", "key", (2, 5, 2, 4), "D = 3 as in query"),
        _row("Causal", "value", (2, 6, 2, 2), "L = 5 as in query"),
        _row("Causal", "value", (2, 5, 1, 2), "G = 2 as in key"),
        Bad(
            "Causal", {"query_projection": (4, 7, 3)}, ("M = 7 as in query_projection", "[2, 6, 3]")
        ),
        _row("Causal", "key_projection", (2, 7, 3), "M = 6 as in query_projection"),
        _row("Causal", "key_projection", (4, 6, 3), "1|G", "1 or G = 2"),
        _row("Causal", "feature_bias", (4, 7), "M = 6 as in query_projection"),
        _row("Causal", "key_bias", (2, 2, 6), "1|L", "1 or L = 5"),
        _row("Causal", "initial_log_mass", (3, 2, 6), "1|N", "1 or N = 2"),
        _row("Causal", "initial_log_mass", (2, 4, 6), "G = 2 as in key"),
        _row("Causal", "initial_mean", (3, 2, 6, 2), "1|N", "1 or N = 2"),
        _row("Causal", "initial_mean", (2, 2, 6, 3), "E = 2 as in value"),
        _row("Causal", "initial_mean", (2, 2, 6), "rank 4", "rank 3"),
        _row("SummarizeGrad", "log_mass", (2, 2, 7), "M = 6 as in key_projection"),
        _row("SummarizeGrad", "mean", (2, 2, 6, 3), "E = 2 as in value"),
        _row("SummarizeGrad", "mean", (0, 2, 6, 2), "N = 2 as in the batch size"),
        _row("SummarizeGrad", "grad_log_mass", (2, 2), "rank 3", "rank 2"),
        _row("SummarizeGrad", "grad_log_mass", (1, 2, 6), "N = 2 as in the batch size"),
        _row("SummarizeGrad", "grad_mean", (2, 2, 6, 0), "E = 2 as in value"),
        _row("ReadGrad", "out", (2, 4, 4, 2), "L = 5 as in query"),
        _row("ReadGrad", "grad_out", (2, 5, 4), "rank 4", "rank 3"),
        _row("ReadGrad", "grad_out", (2, 5, 2, 2), "H = 4 as in query"),
        _row("ReadGrad", "grad_out", (2, 5, 4, 1), "E = 2 as in mean"),
        _row("ReadGrad", "log_mass", (2, 2, 1), "M = 6 as in query_projection"),
        _row("CausalGrad", "out", (1, 5, 4, 2), "B = 2 as in query"),
        _row("CausalGrad", "grad_out", (2, 1, 4, 2), "L = 5 as in query"),
        _row("CausalGrad", "grad_out", (), "rank 4", "rank 0"),
        _row("CausalGrad", "log_mass", (1, 2, 6), "N = 2 as in the batch size"),
        _row("CausalGrad", "mean", (2, 2, 6, 1), "E = 2 as in value"),
        _row("CausalGrad", "grad_log_mass", (2, 2, 7), "M = 6 as in query_projection"),
        _row("CausalGrad", "grad_mean", (2, 1, 6, 2), "G = 2 as in key"),
        _row("CausalGrad", "initial_log_mass", (0, 2, 6), "1|N", "1 or N = 2"),
    ]


def _sizes():
    """Sizes that no call may have, or that do not go together."""
    keys = {"key": (2, 5, 2, 3), "value": (2, 5, 2, 2)}
    return [
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
            ("mean", "fewer than 2**63 elements", "[2147483648, 1, 65536, 65536]"),
        ),
    ]


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
        Bad("Causal", {}, ("initial_log_mass", "1|N", "N = 3", "[2, 2, 10]"), packed, (0, 2, 2, 5)),
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


TABLE = [*_shapes(), *_sizes(), *_offsets(), *_attributes()]
