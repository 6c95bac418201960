"""Packed sequences: many short texts in few long rows, none of which sees another.

The texts are docstrings of Python's standard library. Padded to the longest, most of a batch is
padding; packed, with an id for every sequence of a row, nearly none of it is.
"""

import ast
import sysconfig
from pathlib import Path

import keras
import numpy as np

from performer import PerformerDecoder

LENGTH = 1024  # of a packed row


def docstrings(count):
    """The first `count` docstrings of between 20 and `LENGTH` bytes, as arrays of bytes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            text = (isinstance(node, kinds) and ast.get_docstring(node)) or ""
            if 20 <= len(text.encode()) <= LENGTH:
                found.append(np.frombuffer(text.encode(), np.uint8).astype("int32"))
        if len(found) >= count:
            return found[:count]
    return found


def pack(texts):
    """Puts texts into rows, each into the first with room: tokens and ids `(B, LENGTH)`.

    Id 0 marks what is left over at the end of a row.
    """
    rows = []
    for text in sorted(texts, key=len, reverse=True):
        row = next((row for row in rows if sum(map(len, row)) + len(text) <= LENGTH), None)
        rows.append([text]) if row is None else row.append(text)
    tokens, ids = np.zeros((2, len(rows), LENGTH), "int32")
    for i, row in enumerate(rows):
        length = sum(map(len, row))
        tokens[i, :length] = np.concatenate(row)
        ids[i, :length] = np.repeat(np.arange(len(row)) + 1, [len(text) for text in row])
    return tokens, ids


def main(count=300):
    """Returns shares of padding, padded and packed, and the largest difference to single texts."""
    keras.utils.set_random_seed(0)
    texts = docstrings(count)
    tokens, ids = pack(texts)
    longest, total = max(map(len, texts)), sum(map(len, texts))
    padded, packed = 1 - total / (longest * len(texts)), 1 - total / tokens.size
    print(f"{len(texts)} texts: {padded:.0%} padding in {len(texts)} rows of {longest}, "
          f"{packed:.0%} in {len(tokens)} rows of {LENGTH}")  # fmt: skip

    embed, block = keras.layers.Embedding(256, 32), PerformerDecoder(64, num_heads=4, supports=32)
    output = np.asarray(block(embed(tokens), segment_ids=ids))
    row = 0
    difference = 0.0
    for sequence in range(1, ids[row].max() + 1):
        inside = ids[row] == sequence
        alone = block(embed(tokens[row : row + 1, inside]))[0]
        difference = max(difference, float(np.abs(output[row, inside] - alone).max()))
    print(f"packed and alone: the same within {difference:.1e}")
    return padded, packed, difference


if __name__ == "__main__":
    main()
