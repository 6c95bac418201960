"""Whether the part of the library for XLA is there."""

import pytest

from performer import library

needs_xla = pytest.mark.skipif(
    library.xla_status().state != "loaded",
    reason=library.xla_status().message or "the part for XLA is loaded",
)
