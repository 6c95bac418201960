"""The analytic gradients of the reference are those of finite differences."""

import numpy as np
import pytest

from performer import reference
from performer.reference import NONE
from support.compare import assert_close, assert_finite
from support.reference_inputs import (
    INPUTS,
    STATE,
    E,
    L,
    M,
    arguments,
    differences,
    heads_inputs,
    random_state,
    smooth_maps,
)


@smooth_maps
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradients_are_those_of_finite_differences(options, causal):
    values = [*arguments(), *random_state()]
    values[6][[0, 4]] = NONE
    rng = np.random.default_rng(3)
    dout, dfinal = rng.normal(size=(L, E)), (rng.normal(size=M), rng.normal(size=(M, E)))

    def loss(*values):
        inputs, state = values[:7], values[7:]
        out = reference.direct(*inputs, options, causal=causal, state=state)
        final = reference.merge(
            state, reference.summarize(*inputs[1:3], inputs[4], inputs[6], options)
        )
        return np.sum(out * dout) + sum(np.sum(x * g) for x, g in zip(final, dfinal, strict=True))

    grads = reference.gradients(
        *values[:7], dout, options, causal=causal, state=tuple(values[7:]), dfinal=dfinal
    )
    for position, name in enumerate([*INPUTS, *STATE]):
        numeric = differences(loss, values, position)
        assert_close(grads[name], numeric, relative=1e-6, worst=1e-6, what=name)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradients_of_masked_keys_are_zero_and_all_others_finite(causal):
    inputs = arguments()
    inputs[6][[0, 1, 5]] = NONE
    inputs[1][[0, 1, 5]], inputs[2][[0, 1, 5]] = np.nan, np.nan
    grads = reference.gradients(*inputs, np.ones((L, E)) * np.arange(E), causal=causal)
    for name, grad in grads.items():
        assert_finite(grad, what=name)
    for name in ("key", "value", "key_bias"):
        assert not grads[name][[0, 1, 5]].any(), name


@pytest.mark.parametrize(("causal", "packed"), [(False, False), (True, False), (True, True)])
def test_gradients_of_heads_sum_over_what_they_share(causal, packed):
    x = heads_inputs(batch=1 if packed else 2, rows=3, groups=1, heads=2)
    x["query_projection"] = x["query_projection"][:1]
    x["key_bias"] = x["key_bias"][:1]
    rng = np.random.default_rng(1)
    state = rng.normal(size=(1, 1, M)), rng.normal(size=(1, 1, M, E))
    options = {"causal": causal, "offsets": [0, 1, 3] if packed else None}
    grad_out = rng.normal(size=(*x["query"].shape[:3], E))
    grad_state = rng.normal(size=(2, 1, M)), rng.normal(size=(2, 1, M, E))

    def loss(*values):
        named = dict(zip(x, values[:7], strict=True))
        out, final = reference.attention(**named, initial_state=values[7:], **options)
        return np.sum(out * grad_out) + sum(
            np.sum(a * g) for a, g in zip(final, grad_state, strict=True)
        )

    grads = reference.attention_gradients(
        **x, grad_out=grad_out, initial_state=state, grad_state=grad_state, **options
    )
    for position, name in enumerate([*INPUTS, *STATE]):
        numeric = differences(loss, [*x.values(), *state], position)
        assert_close(grads[name], numeric, relative=1e-6, worst=1e-6, what=name)
