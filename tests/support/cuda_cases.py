"""Cases for what only the CUDA kernels can get wrong: their tile, chunk and split sizes."""

from support.core_calls import Case

SPLIT = 1024  # rows, as the kernels are built for a GPU (cc/cuda/host/schedule.h)
CASES = {
    "narrow, 256 features": Case(
        batch=1, rows=130, heads=1, groups=1, dim=64, value_dim=64, features=256
    ),
    "narrow, 128 features, entry std 3": Case(
        batch=1,
        rows=100,
        heads=1,
        groups=1,
        dim=64,
        value_dim=64,
        features=128,
        bias="11S",
        masked="holes",
        std=3.0,
    ),
    "wide, two groups of features": Case(
        batch=1, rows=70, heads=1, groups=1, dim=128, value_dim=128, features=200
    ),
    "keys wider than values": Case(
        batch=1, rows=70, heads=2, groups=1, dim=80, value_dim=24, features=80, bias="11S"
    ),
    "values wider than keys, rows that are not aligned": Case(
        rows=40, heads=2, groups=2, dim=20, value_dim=67, features=33, bias="BGS", masked="holes"
    ),
    "520 features": Case(
        batch=1, rows=40, heads=1, groups=1, dim=16, value_dim=16, features=520, state=1
    ),
    "three heads a group, 300 features": Case(
        batch=1, rows=70, heads=3, groups=1, dim=64, value_dim=64, features=300, bias="11S"
    ),
}

# Keys that exceed all before by more than a chunk takes at once. Beyond what accuracy is promised
# for.
SUB_CHUNKS = Case(batch=1, rows=70, heads=1, groups=1, dim=64, value_dim=64, features=72, std=8.0)


def split_cases(split: int = SPLIT) -> dict[str, Case]:
    """Cases that are divided into splits of that many rows."""
    return {
        "two splits, the first one ends in masked keys": Case(
            batch=2,
            rows=split + 76,
            heads=2,
            groups=1,
            dim=16,
            value_dim=16,
            bias="B1S",
            masked="left",
        ),
        "packed, splits of some sequences": Case(
            batch=1,
            rows=2 * split + 152,
            heads=3,
            groups=1,
            dim=16,
            value_dim=8,
            offsets=(0, 3, split + 76, split + 76, 2 * split + 152),
            state=4,
            bias="11S",
        ),
    }


CASES.update(split_cases())
