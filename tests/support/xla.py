"""Whether the part of the library for XLA is there."""

import pytest

from performer import loader

needs_xla = pytest.mark.skipif(
    loader.xla_status().state != "loaded",
    reason=loader.xla_status().message or "the part for XLA is loaded",
)
