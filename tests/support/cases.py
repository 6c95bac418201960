"""The cases of the operators: every size, option and shape of an argument, in few rows by hand."""

from dataclasses import replace

from support.inputs import Case

RELU, ELU = ("feature_map", "relu"), ("feature_map", "elu")
ONE_HEAD = Case(batch=1, heads=1, groups=1)
CASES = {
    "one of everything": replace(ONE_HEAD, rows=1, dim=1, value_dim=1, features=1, bias="B1S"),
    "less than a chunk, holes, a projection for each head": Case(
        rows=31,
        heads=4,
        dim=3,
        query_projections=4,
        key_projections=2,
        feature_biases=4,
        bias="BGS",
        masked="holes",
    ),
    "a chunk, left padding": Case(
        rows=32, heads=4, groups=1, features=64, value_dim=64, bias="B1S", masked="left"
    ),
    "a chunk and a row, relu, a projection for each group": Case(
        heads=4,
        query_projections=2,
        key_projections=2,
        feature_biases=2,
        bias="BG1",
        attributes=(RELU,),
    ),
    "two causal chunks and 31 rows, entry std 3": Case(
        batch=1, rows=95, dim=64, features=64, value_dim=64, bias="11S", masked="holes", std=3.0
    ),
    "sizes that fill no vector, elu": Case(
        rows=97,
        heads=3,
        groups=1,
        dim=72,
        features=130,
        bias="B11",
        attributes=(ELU, ("scale", 0.02)),
    ),
    "an initial state for all, no norm": Case(
        batch=3,
        rows=70,
        dim=3,
        features=64,
        value_dim=3,
        state=1,
        attributes=(("key_norm", False), ("scale", 0.3)),
    ),
    "an initial state for each, 500 rows": Case(
        rows=500,
        heads=3,
        groups=3,
        dim=64,
        query_projections=3,
        state=2,
        bias="B1S",
        masked="left",
    ),
    "1000 rows": replace(ONE_HEAD, rows=1000, features=64, value_dim=16, std=0.5),
    "packed, with empty sequences": Case(
        batch=1,
        rows=131,
        heads=4,
        offsets=(0, 0, 40, 40, 41, 73, 131, 131),
        state=7,
        key_projections=2,
        bias="1GS",
        masked="holes",
    ),
    "packed, one state for all, relu": Case(
        batch=1, rows=97, offsets=(0, 96, 97), state=1, bias="11S", attributes=(RELU,)
    ),
    "packed, no sequence with rows": Case(batch=1, rows=0, offsets=(0, 0, 0), state=2),
    "no rows": Case(rows=0, state=2, bias="B1S"),
    "no batch": Case(batch=0, bias="B1S"),
    "no value dim": Case(value_dim=0, rows=40, state=1),
    "all keys of a batch row masked": Case(rows=40, bias="B1S", masked="row"),
    "relu without epsilon": Case(
        rows=50, dim=3, attributes=(RELU, ("feature_epsilon", 0.0), ("scale", 0.5))
    ),
}
BIDIRECTIONAL = {
    "several splits of keys": Case(
        batch=1, rows=2000, queries=50, groups=1, dim=3, value_dim=3, bias="11S"
    ),
    "no keys": Case(rows=0, queries=7),
    "no queries": Case(rows=40, queries=0),
    "more queries than keys": Case(rows=5, queries=100, bias="BGS", masked="holes"),
}
# Of a single key the gradient of the query is 0, which no relative bound can judge.
TOKENS = {
    "one token, grouped heads, a state for each, holes": Case(
        batch=4,
        rows=1,
        heads=6,
        dim=3,
        features=130,
        value_dim=72,
        query_projections=6,
        key_projections=2,
        feature_biases=6,
        state=4,
        bias="BGS",
        masked="holes",
    ),
    "one token, relu, no state": Case(
        batch=3, rows=1, groups=1, bias="B1S", masked="row", attributes=(RELU,)
    ),
    "one token, elu, one state for all": Case(
        batch=3, rows=1, dim=64, features=64, value_dim=64, state=1, attributes=(ELU,)
    ),
}
# The cases that 16-bit types run too.
NARROW = [
    "one token, grouped heads, a state for each, holes",
    "less than a chunk, holes, a projection for each head",
    "two causal chunks and 31 rows, entry std 3",
    "an initial state for all, no norm",
    "packed, with empty sequences",
]

# What only the CUDA kernels can get wrong: their tile and chunk sizes.
TILES = {
    "narrow, 256 features": replace(ONE_HEAD, rows=130, dim=64, value_dim=64, features=256),
    "narrow, 128 features, entry std 3": replace(
        ONE_HEAD,
        rows=100,
        dim=64,
        value_dim=64,
        features=128,
        bias="11S",
        masked="holes",
        std=3.0,
    ),
    "narrow, five tiles, entry std 3": replace(
        ONE_HEAD, rows=300, dim=64, value_dim=64, features=128, bias="11S", std=3.0
    ),
    "wide, two blocks of features": replace(
        ONE_HEAD, rows=70, dim=128, value_dim=128, features=200
    ),
    "keys wider than values": Case(
        batch=1, rows=70, groups=1, dim=80, value_dim=24, features=80, bias="11S"
    ),
    "values wider than keys, rows that are not aligned": Case(
        rows=40, dim=20, value_dim=67, features=33, bias="BGS", masked="holes"
    ),
    "520 features": replace(ONE_HEAD, rows=40, value_dim=16, features=520, state=1),
    "two heads a group, a projection for each, several tiles": Case(
        batch=1,
        rows=200,
        heads=4,
        groups=2,
        dim=24,
        value_dim=20,
        features=70,
        query_projections=4,
        key_projections=2,
        feature_biases=4,
        bias="BGS",
        masked="holes",
        state=1,
    ),
    "three heads a group, 300 features": Case(
        batch=1, rows=70, heads=3, groups=1, dim=64, value_dim=64, features=300, bias="11S"
    ),
    # In 16 bits only: see gpu_dtypes.
    "of 256, two blocks of features": replace(
        ONE_HEAD, rows=70, dim=256, value_dim=256, features=72, state=1, bias="11S"
    ),
    "keys of 200, two heads a group, a projection for each": Case(
        batch=1,
        rows=80,
        heads=2,
        groups=1,
        dim=200,
        value_dim=24,
        features=40,
        query_projections=2,
        bias="11S",
        masked="holes",
    ),
    "values of 131, rows that are not aligned": Case(
        rows=40, dim=20, value_dim=131, features=33, bias="BGS", masked="holes"
    ),
    "of 256, five tiles, relu": replace(
        ONE_HEAD, rows=300, dim=256, value_dim=256, features=24, attributes=(RELU,)
    ),
}
# Keys that exceed all earlier ones by more than a chunk can take at once: it is cut into
# sub-chunks. Entries of this std lie beyond what accuracy is promised for.
SUB_CHUNKS = replace(ONE_HEAD, rows=70, dim=64, value_dim=64, features=72, std=8.0)
GPU_SPLIT = 1024  # rows, as the kernels are built for a GPU (cc/cuda/host/schedule.h)


def split_cases(split: int) -> dict[str, Case]:
    """Cases whose sequences are divided into splits of that many rows."""
    return {
        "two splits, the first one ends in masked keys": Case(
            rows=split + 76, groups=1, value_dim=16, bias="B1S", masked="left"
        ),
        "packed, splits of some sequences": Case(
            batch=1,
            rows=2 * split + 152,
            heads=3,
            groups=1,
            value_dim=8,
            offsets=(0, 3, split + 76, split + 76, 2 * split + 152),
            state=4,
            bias="11S",
        ),
    }


GPU_CASES = {**TILES, **split_cases(GPU_SPLIT)}


def cases(causal: bool) -> dict[str, Case]:
    """The cases of every backend, by name; each form has some of its own."""
    return {**CASES, **(TOKENS if causal else BIDIRECTIONAL)}


def core_dtypes(name: str) -> list[str]:
    """The types in which the compiled core runs a case."""
    return ["float32", "float64", *(["bfloat16", "float16"] if name in NARROW else [])]


def gpu_dtypes(case: Case) -> list[str]:
    """The types in which the GPU kernels take a case."""
    wide = max(case.dim, case.value_dim) > 128
    return [*([] if wide else ["float32"]), "bfloat16", "float16"]


def parameters(table=cases, dtypes=core_dtypes, leave_out=()) -> list[tuple]:
    """(causal, name, dtype) of every case of `table(causal)` in each of `dtypes(name)`."""
    return [
        (causal, name, dtype)
        for causal in (False, True)
        for name in table(causal)
        if name not in leave_out
        for dtype in dtypes(name)
    ]
