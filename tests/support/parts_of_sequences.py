"""Attention over sequences in parts, against one process: run as a program, prints JSON.

TensorFlow divides a processor into logical devices only before its first use: in a process of its
own.
"""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import performer
from performer import ops, parallel

B, L, H, G, D, E, M = 2, 256, 4, 2, 8, 12, 16
RNG = np.random.default_rng(0)


def normal(*sizes, dtype="float64"):
    return tf.constant(RNG.normal(size=sizes), dtype)


def relative(found, expected):
    """Largest difference by the largest entry; those that both hide (-inf) do not count."""
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    hidden = np.isneginf(found) & np.isneginf(expected)
    found, expected = (np.where(hidden, 0, x) for x in (found, expected))
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def run(mesh, function, *args):
    """Local results of every replica, for each output."""
    out = mesh.function(tf.autograph.experimental.do_not_convert(function))(*args)
    return tf.nest.map_structure(mesh.strategy.experimental_local_results, out)


def graph_of(strategy, function, *args):
    return tf.function(
        lambda *args: strategy.run(function, args), autograph=False
    ).get_concrete_function(*args)


def payloads(graph):
    """Elements of the tensor that each replica gives to each collective of a graph."""
    kinds = ("CollectiveGatherV2", "CollectiveAllToAllV2")
    found = [op for op in graph.get_operations() if op.type in kinds]
    return sorted((op.type, op.inputs[0].shape.num_elements()) for op in found)


def function_cases(dtype):
    data = {
        "key_mask": tf.constant(RNG.random((B, L)) > 0.2),
        "many": tf.constant(np.sort(RNG.integers(0, 9, (B, L)), axis=1)),
        "two": tf.constant(np.repeat([[0, 1]], [L - 20, 20], axis=1).repeat(B, 0)),
    }
    w = performer.orthogonal_projection(M, D, seed=1)
    w = tf.cast(w, dtype)
    part = [normal(B, 128, n, d, dtype=dtype) for n, d in ((H, D), (G, D), (G, E))]
    state = ops.summarize(part[1], part[2], w)
    near = ops.favor_attention(*part, w, causal=True, exact_window=64, return_state=True)[1]
    window = {"exact_window": 64, "far_bias": -1.0}
    states = {"initial_state": state, "return_state": True}
    return data, w, {
        "all": {},
        "causal": {"causal": True},
        "masked": {"key_mask": True},
        "causal, masked": {"causal": True, "key_mask": True},
        "causal, packed": {"causal": True, "segment_ids": "many"},
        "packed": {"segment_ids": "many", "max_segments": 10},
        "causal, packed, over a border": {"causal": True, "segment_ids": "two", "max_segments": 3},
        "packed, over a border": {"segment_ids": "two"},
        "states": states,
        "causal, states": {"causal": True, **states},
        "window": window,
        "causal, window": {"causal": True, **window},
        "causal, window, masked": {"causal": True, "key_mask": True, **window},
        "window, masked": {"key_mask": True, **window},
        "causal, window, states": {
            "causal": True,
            **window,
            "initial_state": near,
            "return_state": True,
        },
        "window, states": {**window, **states},
    }  # fmt: skip


def compare_functions(mesh, names, dtype="float64"):
    """Largest relative difference of outputs, gradients and states, by case."""
    data, w, cases = function_cases(dtype)
    inputs = [normal(B, L, n, d, dtype=dtype) for n, d in ((H, D), (G, D), (G, E))]
    cotangent = normal(B, L, H, E, dtype=dtype)
    result = {}
    for name in names or cases:
        options = dict(cases[name])
        for argument in ("key_mask", "segment_ids"):
            if argument in options:
                of = options[argument]
                options[argument] = data["key_mask" if of is True else of]

        def call(attend, q, k, v, cotangent, options):
            with tf.GradientTape() as tape:
                tape.watch([q, k, v, w])
                out = attend(q, k, v, w, **options)
                out, state = out if isinstance(out, tuple) else (out, None)
                loss = tf.reduce_sum(out * cotangent)
                if state is not None:
                    weight = 1.0 if attend is ops.favor_attention else 1.0 / mesh.sequence
                    loss += weight * tf.reduce_sum(state.mean**2)
            return out, tape.gradient(loss, [q, k, v, w]), state and state[:4]

        def on_parts(*x, options=options, call=call):
            given = {
                k: mesh.shard(v) if k in ("key_mask", "segment_ids") else v
                for k, v in options.items()
            }
            return call(parallel.favor_attention, *map(mesh.shard, x), {**given, "mesh": mesh})

        expected, gradients, state = call(ops.favor_attention, *inputs, cotangent, options)
        out, parts, states = run(mesh, on_parts, *inputs, cotangent)
        errors = [relative(tf.concat(out, 1), expected)]
        errors += [
            relative(tf.concat(x, 1), y) for x, y in zip(parts[:3], gradients[:3], strict=True)
        ]
        errors.append(relative(sum(np.asarray(x) for x in parts[3]), gradients[3]))
        if state is not None:
            errors += [relative(x, y) for xs, y in zip(states, state, strict=True) for x in xs]
        result[name] = max(errors)
    return result


def compare_layers(mesh, names=None):
    """The same for models of the blocks, over whole sequences and in the scope."""
    ids = tf.constant(RNG.integers(0, 20, (B, L)))
    segments = tf.constant(np.sort(RNG.integers(0, 4, (B, L)), axis=1))
    rotary = performer.RotaryEmbedding
    result = {}

    def decoder(**options):
        return performer.PerformerDecoder(32, 2, supports=16, seed=1, dtype="float64", **options)

    def encoder(**options):
        return performer.PerformerEncoder(32, 2, supports=16, seed=1, dtype="float64", **options)

    for name, block, packed in (
        ("decoder, rotary", decoder(rotary_embedding=rotary()), False),
        ("decoder, window, delayed keys", decoder(exact_window=64, delay_keys=True), False),
        ("encoder, packed, rotary", encoder(rotary_embedding=rotary()), True),
    ):
        if names is not None and name not in names:
            continue
        embed = performer.TokenAndPositionEmbedding(20, L, 16, dtype="float64")
        head = keras.layers.Dense(5, dtype="float64")

        def model(x, segments, embed=embed, block=block, head=head, packed=packed):
            return head(block(embed(x), segment_ids=segments if packed else None))

        with mesh.strategy.scope():
            model(ids, segments)
        weights = [w for x in (embed, block, head) for w in x.trainable_weights]

        def call(x, segments, model=model, weights=weights):
            with tf.GradientTape() as tape:
                out = model(x, segments)
                loss = tf.reduce_sum(tf.sin(3 * out))
            return out, [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]

        expected, gradients = call(ids, segments)

        def on_parts(*x, call=call):
            return call(*map(mesh.shard, x))

        with parallel.sequence(mesh):
            out, parts = run(mesh, on_parts, ids, segments)
        errors = [relative(tf.concat(out, 1), expected)]
        errors += [
            relative(sum(np.asarray(x) for x in xs), y)
            for xs, y in zip(parts, gradients, strict=True)
        ]
        result[name] = max(errors)
    return result


def graph_of_gradient(mesh, length, **options):
    """The graph of a call and its gradient, for sequences of one length."""
    spec = [tf.TensorSpec([B, length, n, d]) for n, d in ((H, D), (G, D), (G, E))]
    w = performer.orthogonal_projection(M, D, seed=1)

    def call(*x):
        with tf.GradientTape() as tape:
            x = [mesh.shard(part) for part in x]
            tape.watch(x)
            out = parallel.favor_attention(*x, w, mesh=mesh, **options)
        return tape.gradient(out, x)[1]

    return graph_of(mesh.strategy, call, *spec).graph


def traffic(mesh, length, **options):
    """Payloads of the collectives of a call and its gradient."""
    return payloads(graph_of_gradient(mesh, length, **options))


def slice_gradients(mesh, length, **options):
    """Sizes of the tensors that the gradients of slices fill in a call's gradient.

    A slice of a part costs a pass over the whole part there, and as many numbers of memory.
    """
    operators = graph_of_gradient(mesh, length, **options).get_operations()
    found = [op.outputs[0].shape for op in operators if op.type == "StridedSliceGrad"]
    return sorted(shape.num_elements() for shape in found)


def refusals(mesh):
    """Messages of calls that are refused."""
    x, w = normal(B, L, H, D), performer.orthogonal_projection(M, D, seed=1)
    uneven = parallel.Mesh(mesh.strategy, lengths=[100, 156])

    def attend(x, **options):
        return parallel.favor_attention(x, x, x, w, **options)

    def in_replica(function):
        return lambda: graph_of(mesh.strategy, function)

    layer = performer.Performer(2, 4, attention_method="quadratic", dtype="float64")
    y = normal(B, L, 6)
    layer(y, y)

    def quadratic():
        with parallel.sequence(mesh):
            graph_of(mesh.strategy, lambda: layer(y, y))

    calls = {
        "no mesh": in_replica(lambda: attend(x)),
        "not in a replica": lambda: attend(x, mesh=mesh),
        "no strategy": lambda: parallel.Mesh(),
        "not a strategy": lambda: parallel.Mesh("all"),
        "sequence": lambda: parallel.Mesh(mesh.strategy, sequence=3),
        "lengths": lambda: parallel.Mesh(mesh.strategy, lengths=[3]),
        "timeout": lambda: parallel.Mesh(mesh.strategy, timeout=-1),
        "an uneven part": in_replica(lambda: mesh.shard(x[:, :255])),
        "another length": in_replica(lambda: attend(x[:, :99], mesh=uneven)),
        "exact keys": in_replica(lambda: attend(x, mesh=mesh, exact_keys=3)),
        "an unknown option": in_replica(lambda: attend(x, mesh=mesh, chunk=3)),
        "a part of a block": in_replica(lambda: attend(x[:, :100], mesh=mesh, exact_window=64)),
        "no mesh for a scope": lambda: parallel.sequence("mesh").__enter__(),
        "eager": lambda: mesh.strategy.run(lambda: attend(x, mesh=mesh)),
        "parts of two lengths": lambda: run(
            mesh, lambda: attend(x[:, : 100 + mesh.index()], mesh=mesh)
        ),
        "quadratic": quadratic,
    }
    result = {}
    for name, call in calls.items():
        try:
            call()
            result[name] = "served"
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"
    return result


def main():
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    four = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])
    mesh = parallel.Mesh(two, timeout=60)
    uneven = parallel.Mesh(two, lengths=[64, L - 64], timeout=60)
    if sys.argv[1] == "few":
        some = ["causal, packed, over a border", "causal, window, states"]
        # The last refusal ends the collectives of the process: it comes last.
        result = {
            "functions": compare_functions(mesh, ["states", *some]),
            "uneven": compare_functions(uneven, ["causal"]),
            "layers": compare_layers(mesh, ["decoder, window, delayed keys"]),
            "traffic": [traffic(mesh, n, causal=True) for n in (8192, 2**20)],
            "slices": [
                [slice_gradients(mesh, n, exact_window=64, causal=causal) for n in (1024, 8192)]
                for causal in (False, True)
            ],
            "refusals": refusals(mesh),
        }
    else:
        all_four = parallel.Mesh(four, timeout=60)
        rows = parallel.Mesh(four, sequence=2)
        result = {
            "functions": compare_functions(mesh, None),
            "uneven": compare_functions(uneven, ["causal", "packed", "causal, window"]),
            "layers": compare_layers(mesh),
            "uneven layers": compare_layers(uneven, ["decoder, rotary"]),
            "of four": compare_functions(
                all_four, ["states", "causal", "packed", "causal, window"]
            ),
            "traffic": [
                [traffic(mesh, n, **options) for n in (8192, 2**20)]
                for options in ({}, {"causal": True, "exact_window": 64}, {"exact_window": 64})
            ],
            "rows": sorted(
                zip(
                    *(
                        [int(x) for x in xs]
                        for xs in run(
                            rows, lambda: (tf.constant(rows.index()), tf.constant(rows.row()))
                        )
                    ),
                    strict=True,
                )
            ),
            "float32": [
                compare_functions(m, ["all", "causal", "causal, window", *more], "float32")
                for m, more in ((mesh, ["window"]), (all_four, []))  # of four, parts are too short
            ],
        }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
