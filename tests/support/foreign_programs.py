"""XLA programs that were not made by the lowering: StableHLO whose custom calls are those of the
operators, with any operands, results and attributes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
from tensorflow.compiler.mlir.stablehlo import stablehlo
from tensorflow.compiler.tf2xla.python import xla

ATTRIBUTES = {
    "feature_map": '"softmax"',
    "scale": "0.0 : f64",
    "feature_epsilon": "1.0e-3 : f64",
    "packed": "false",
    "key_norm": "true",
    "exact_window": "64 : i64",
    "causal": "false",
    "query_norm": "true",
    "projection_gradient": "true",
}
_MLIR = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
}


@dataclass(frozen=True)
class Buffer:
    """Shape and type of an operand or a result."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self):
        return f"tensor<{''.join(f'{size}x' for size in self.shape)}{_MLIR[self.dtype]}>"


@dataclass
class Program:
    """A program that is one custom call.

    Attributes:
        op: operator.
        operands, results: what the call is given.
        attributes: the text of each in MLIR.
    """

    op: str
    operands: list[Buffer]
    results: list[Buffer]
    attributes: dict[str, str] = field(default_factory=lambda: dict(ATTRIBUTES))

    def text(self) -> str:
        """The program as StableHLO."""
        names = [f"%arg{i}" for i in range(len(self.operands))]
        count = len(self.results)
        given = ", ".join(
            f"{name}: {operand}" for name, operand in zip(names, self.operands, strict=True)
        )
        types = ", ".join(map(str, self.results))
        config = ", ".join(f"{name} = {value}" for name, value in self.attributes.items())
        made, parts = "%made", ["%made"]
        if count > 1:
            made, parts = f"%made:{count}", [f"%made#{i}" for i in range(count)]
        call = f'stablehlo.custom_call @"Performer>{self.op}"({", ".join(names)})'
        return f"""module {{
  func.func public @main({given}) -> ({types}) {{
    {made} = {call} {{
      api_version = 4 : i32, backend_config = {{{config}}}
    }} : ({", ".join(map(str, self.operands))}) -> ({types})
    return {", ".join(parts)} : {types}
  }}
}}"""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compiles and runs it."""
        version = stablehlo.get_current_version()
        module = stablehlo.serialize_portable_artifact_str(self.text(), version)

        @tf.function(jit_compile=True, autograph=False)
        def call(*arguments):
            return xla.call_module(
                arguments,
                version=5,
                module=module,
                Tout=[result.dtype for result in self.results],
                Sout=[result.shape for result in self.results],
                platforms=["CPU"],
            )

        return [result.numpy() for result in call(*map(tf.constant, inputs))]
