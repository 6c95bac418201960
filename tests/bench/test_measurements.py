"""The benchmark: what is counted, and that no wrong result is timed."""

import itertools

import numpy as np
import pytest

from performer.bench import memory
from performer.bench.cases import Case
from performer.bench.checking import WrongResult, check
from performer.bench.expected import distance_from_favor, expected
from performer.bench.implementations import tensorflow_calls as calls
from performer.bench.implementations.catalogue import EPSILON, FAVOR, IMPLEMENTATIONS, SOFTMAX
from performer.bench.worker import Worker

MODES = list(itertools.product((False, True), repeat=2))


def test_operations_are_those_of_the_formulas():
    bidirectional = Case(False, False, 4096, 256, 64)
    assert bidirectional.operations() == 8 * 4096 * 8 * 256 * 64
    causal = Case(True, False, 4096, 256, 64)
    assert causal.operations() == bidirectional.operations() + 64 * 4096 * 8 * (256 + 64)
    assert Case(True, True, 4096, 256, 64).operations() == 3.5 * causal.operations()
    near = Case(False, False, 4096, 256, 64, window=64).operations() - bidirectional.operations()
    assert near == 4 * 4096 * 8 * 64 * 192
    near = Case(True, False, 4096, 256, 64, window=64).operations() - bidirectional.operations()
    assert near == 4 * 4096 * 8 * 64 * (64 + 32.5)
    assert bidirectional.exact_operations() == 4 * 4096**2 * 8 * 64
    assert IMPLEMENTATIONS["exact"].operations(causal) == causal.exact_operations()
    assert IMPLEMENTATIONS["stabilised"].operations(causal) == causal.operations()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_are_reproducible_and_of_the_type(dtype):
    case = Case(True, True, 64, 40, 32, dtype, heads=2)
    one, two = case.inputs(), case.inputs()
    assert one["query"].shape == (1, 64, 2, 32)
    assert one["query"].dtype.name == dtype
    assert one["projection"].shape == (40, 32)
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("causal", "backward"), MODES)
@pytest.mark.parametrize("impl", ["performer", "stabilised", "textbook", "exact"])
def test_implementations_return_what_their_estimator_says(impl, causal, backward):
    case = Case(causal, backward, 192, 32, 16, heads=2)
    got = calls.arrays(calls.call(impl, case, calls.tensors(case.inputs()))())
    record = check(impl, case, got)
    assert record["error"] <= record["bound"]
    gradients = {"query", "key", "value"} | (
        {"projection"} if not IMPLEMENTATIONS[impl].exact else set()
    )
    assert set(got) == {"out"} | (gradients if backward else set())


@pytest.mark.parametrize(("causal", "backward"), MODES)
def test_a_window_is_part_of_the_estimator(causal, backward):
    case = Case(causal, backward, 320, 32, 16, heads=2, window=64)
    got = calls.arrays(calls.call("performer", case, calls.tensors(case.inputs()))())
    record = check("performer", case, got)
    assert record["error"] <= record["bound"]
    with pytest.raises(WrongResult):
        check("performer", Case(causal, backward, 320, 32, 16, heads=2), got)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_softmax_attention_are_those_of_finite_differences(causal, monkeypatch):
    case, step = Case(causal, True, 6, 5, 4, "float64", heads=2), 1e-6
    inputs, right = case.inputs(), expected(SOFTMAX, case)
    for name in ("query", "key", "value"):
        direction = np.random.default_rng(1).standard_normal(inputs[name].shape)
        values = []
        for sign in (-1, 1):
            moved = {**inputs, name: inputs[name] + sign * step * direction}
            monkeypatch.setattr(Case, "inputs", lambda case, moved=moved: moved)
            out = expected.__wrapped__(SOFTMAX, case)["out"]
            values.append(np.sum(out * inputs["grad_out"]))
        slope = (values[1] - values[0]) / (2 * step)
        assert slope == pytest.approx(np.sum(right[name] * direction), rel=1e-6), name


def test_epsilon_is_another_estimator():
    case = Case(False, False, 128, 64, 64, heads=1)
    assert distance_from_favor(EPSILON, case) > 0.1
    assert distance_from_favor(FAVOR, case) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 1.001, "must be within"),
        (lambda x: np.where(x == x.max(), np.nan, x), "must be within"),
        (lambda x: x[:, :-1], "must have shape"),
    ],
    ids=["a little off", "NaN", "shape"],
)
@pytest.mark.parametrize("result", ["out", "key", "projection"])
def test_a_wrong_result_is_refused(result, spoil, message):
    case = Case(True, True, 64, 16, 16, heads=1)
    right = expected(FAVOR, case)
    assert check("stabilised", case, right)["error"] == 0
    with pytest.raises(WrongResult, match=message) as refusal:
        check("stabilised", case, {**right, result: spoil(right[result])})
    assert "stabilised, causal, forward + backward, float32" in str(refusal.value)


def test_exact_attention_does_not_pass_for_linear():
    case = Case(False, False, 64, 16, 16, heads=1)
    with pytest.raises(WrongResult, match="of FAVOR"):
        check("performer", case, expected(SOFTMAX, case))


class Planted:
    """Calls of a framework in which one implementation is wrong."""

    def __getattr__(self, name):
        return getattr(calls, name)

    def prepare(self, threads):
        """Leaves the threads of this process alone."""

    def call(self, impl, case, tensors):
        """The right results, but for "stabilised"."""
        right = expected(IMPLEMENTATIONS[impl].estimator, case)
        return lambda: {"out": right["out"] * (1.1 if impl == "stabilised" else 1.0)}

    def arrays(self, results):
        """What `call` returns are arrays."""
        return results


def test_no_figure_of_a_case_with_a_wrong_peer():
    records = []
    worker = Worker("tensorflow", 1, 1, 1.0, lambda **record: records.append(record))
    worker.calls = Planted()
    case = Case(False, False, 256, 8, 8)
    with pytest.raises(WrongResult, match="stabilised"):
        worker.time([("performer", case), ("stabilised", case)])
    assert {record["kind"] for record in records} == {"check"}


def test_too_slow_and_unfit_implementations_are_named_once(monkeypatch):
    records = []
    worker = Worker("tensorflow", 1, 1, 1.0, lambda **record: records.append(record))
    short, long = Case(False, False, 1024), Case(False, False, 4096)
    worker.seconds = {("exact", short): 0.1, ("stabilised", short): 0.1}
    assert worker.forecast("exact", long) == pytest.approx(1.6)
    assert worker.forecast("stabilised", long) == pytest.approx(0.4)
    assert not worker.possible("exact", long)
    assert not worker.possible("exact", long)
    assert not worker.possible("textbook", Case(False, False, 64, dtype="bfloat16"))
    monkeypatch.setattr(memory, "available", lambda: 2.0**20)
    assert not worker.possible("performer", long)
    reasons = [record["reason"] for record in records]
    assert len(reasons) == 3
    assert "more than 1 s" in reasons[0]
    assert "float32" in reasons[1]
    assert "memory" in reasons[2]


def test_a_framework_that_is_not_installed_is_left_out_by_name(monkeypatch):
    records = []
    worker = Worker("torch", 1, 1, 1.0, lambda **record: records.append(record))
    monkeypatch.setattr(worker.calls, "missing", lambda impl: "torch not installed")
    entries = [("torch_exact", Case(False, False, 64)), ("torch_performer", Case(True, True, 64))]
    worker.time(entries)
    worker.memory(entries)
    assert [(x["kind"], x["implementation"], x["reason"]) for x in records] == [
        ("left out", impl, "torch not installed") for impl, _ in entries
    ]


def test_memory_of_a_call_is_measured_in_its_own_process():
    def prepare():
        return lambda: np.ones(64 << 20, np.uint8)

    assert memory.peak(prepare) == pytest.approx(64, abs=4)
    assert memory.peak(lambda: 1 / 0) is None
