"""Arguments of `favor_attention`."""

import numpy as np

from performer.ops.state import AttentionState

B, L, H, G, D, E, M = 2, 9, 4, 2, 4, 3, 6


def random_tensors(seed=0, **sizes):
    """query, key, value, projection in float64."""
    rng = np.random.default_rng(seed)
    size = {"B": B, "L": L, "S": sizes.get("L", L), "H": H, "G": G, "D": D, "E": E, "M": M, **sizes}
    layouts = {"query": "BLHD", "key": "BSGD", "value": "BSGE", "projection": "MD"}
    return {
        name: rng.normal(size=[size[letter] for letter in layout])
        for name, layout in layouts.items()
    }


def random_state(draw=0, sequences=B):
    rng = np.random.default_rng(3)
    sizes = (sequences, G, M)
    return AttentionState(rng.normal(size=sizes), rng.normal(size=(*sizes, E)), draw)
