"""Faults that the tests must catch, each with the tests that do; `faults.py` plants them.

A fault replaces one piece of text, which stands once in its file, by another. The barriers of the
CUDA kernels are not in the table: `tests/emulated/test_mutations.py` leaves out each of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault.

    Attributes:
        name: What is wrong with the code that has it.
        path: The file, from the root of the project.
        old, new: The right text, and the wrong one.
        tests: Arguments of pytest.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str


def _faults(path, tests, *entries):
    """Faults of one file; an entry (name, old, new) or, with tests of its own, (..., tests)."""
    return [Fault(name, path, old, new, *(more or [tests])) for name, old, new, *more in entries]


COMPOSITION = "tests/composition"
STEPS = "tests/ops/test_steps.py"
CALLS = "tests/cpu/test_calls.py tests/cpu/test_properties.py"
CAUSALITY = "tests/cpu/test_causality.py"
GRADIENTS = "tests/cpu/test_gradients.py"
REFUSALS = "tests/cpu/test_bad_input.py"
NEAR_FAR = "tests/cpu/test_near_far.py"
EMULATED = "tests/emulated/test_kernels.py"
EMULATED_GRADIENTS = "tests/emulated/test_gradients.py"

PYTHON = [
    *_faults(
        "python/performer/ops/fingerprint.py",
        STEPS,
        (
            "every step of a loop hashes the projection",
            "    with _where_all_are(projection):\n",
            "    with contextlib.nullcontext():\n",
        ),
    ),
    *_faults(
        "python/performer/composition/chunked.py",
        COMPOSITION,
        (
            "rows of a block read their own block: the future",
            "keys, values = halves(b, block)[0], halves(v, block)[0]",
            "keys, values = halves(b, block)[1], halves(v, block)[1]",
        ),
        (
            "a chunk starts from the state after it",
            "[tf.concat([x[None], y[:-1]], 0) for x, y",
            "[tf.concat([x[None], y[1:]], 0) for x, y",
        ),
        (
            "padding of the last chunk counts as keys",
            "in_chunks(b, logsumexp.NONE)",
            "in_chunks(b, 0)",
        ),
        (
            "a packed sequence goes on from the one before",
            "past = [tf.where(begins, x, y)",
            "past = [tf.where(begins, y, y)",
        ),
        (
            "a row does not see its own key",
            "weight = logsumexp.logsumexp(a + b[:, :, None], -1)",
            "weight = logsumexp.logsumexp(a + b[:, :, None], -1) - 30.0",
        ),
    ),
    *_faults(
        "python/performer/composition/log_features.py",
        COMPOSITION,
        (
            "what masked values hold leaks",
            "key, value = tf.where(masked, zero, key), tf.where(masked, zero, value)",
            "key = tf.where(masked, zero, key)",
        ),
        ("the norm of keys counts twice", "u - scale / 2 *", "u - scale *"),
        (
            "the epsilon of ReLU features counts twice",
            "+ feature_epsilon\n",
            "+ 2 * feature_epsilon\n",
        ),
        ("ELU features bend at 1", "tf.where(u > 0, tf.math", "tf.where(u > 1, tf.math"),
        (
            "a rounded projection gets no gradient",
            "return projection + tf.stop_gradient(",
            "return tf.stop_gradient(projection) + tf.stop_gradient(",
        ),
        (
            "a projection for each head is taken in another order",
            "return tf.reshape(x, [outer, first // outer, *rest])",
            "return tf.reshape(x[::-1], [outer, first // outer, *rest])",
        ),
    ),
    *_faults(
        "python/performer/composition/logsumexp.py",
        COMPOSITION,
        (
            "an epsilon in the denominator",
            "tf.matmul(terms, values) / total",
            "tf.matmul(terms, values) / (total + 1e-3)",
        ),
        (
            "sums are scaled by the first set, not by the larger one",
            "tf.stop_gradient(tf.maximum(log_mass, other_log_mass))",
            "tf.stop_gradient(log_mass)",
        ),
        (
            "merged masses get no gradient",
            "first, second = tf.exp(log_mass - top), tf.exp(other_log_mass - top)",
            "first, second = map(tf.stop_gradient, (tf.exp(log_mass - top), "
            "tf.exp(other_log_mass - top)))",
        ),
        (
            "an empty sum has a gradient of NaN",
            "tf.math.log(tf.where(empty, tf.ones([], x.dtype), x))",
            "tf.math.log(x)",
        ),
    ),
    *_faults(
        "python/performer/ops/state.py",
        "tests/ops/test_state.py",
        (
            "merged states go on where the second ends",
            "tf.maximum(first.position, second.position)",
            "second.position",
            "tests/ops/test_state.py tests/layers/test_streaming.py",
        ),
        (
            "an empty state has a mass",
            "tf.fill([batch, heads, features], tf.constant(logsumexp.NONE, dtype))",
            "tf.fill([batch, heads, features], tf.constant(0.0, dtype))",
        ),
    ),
    *_faults(
        "python/performer/ops/attention.py",
        "tests/ops/test_favor_attention.py",
        (
            "the initial state is read twice and the keys not at all",
            "else join(call.state, state, call.draw)",
            "else join(call.state, call.state, call.draw)",
        ),
        (
            "packed key biases are not laid out as the keys",
            "bias = tf.transpose(_end_to_end(tf.transpose(bias, [0, 2, 1])), [0, 2, 1])",
            "bias = tf.reshape(bias, [1, dims(bias)[1], batch * length])",
        ),
    ),
    *_faults(
        "python/performer/ops/gradients.py",
        "tests/ops/test_gradients.py",
        (
            "gradients of the state are lost",
            "for name in outputs), _dense(incoming, op.outputs), strict=True)",
            "for name in outputs), _dense([incoming[0]] + [None] * (len(outputs) - 1), "
            "op.outputs), strict=True)",
        ),
        (
            "second-order gradients leave out the cotangents",
            "*nothing, *second[count:]]",
            "*nothing, *map(tf.zeros_like, second[count:])]",
        ),
        (
            "the gradient of a projection is left out where it is asked for",
            "any(_of_projections(name) and i not in skipped",
            "all(_of_projections(name) and i not in skipped",
        ),
        (
            "the gradient of a projection is computed where nobody asks for it",
            "i not in skipped",
            "i != skipped",
        ),
    ),
    *_faults(
        "python/performer/ops/vectorize.py",
        "tests/ops/test_vectorize.py",
        (
            "iterations are unfolded as heads",
            "tf.reduce_sum(x, axis + 2), [axis, *range(axis)",
            "tf.reduce_sum(x, axis + 2), [axis + 1, *range(axis)",
        ),
    ),
    *_faults(
        "python/performer/layers/_projection.py",
        "tests/layers/test_training.py",
        (
            "a redraw comes one call late",
            "due = calls >= self._redraw_interval",
            "due = calls > self._redraw_interval",
        ),
        (
            "a redraw draws what was there",
            "projection = self._sample(self.base_seed.value, redraws + 1)",
            "projection = self._sample(self.base_seed.value, redraws)",
        ),
        (
            "a redraw by hand leaves the count of calls",
            "        self.calls.assign(tf.zeros_like(self.calls.value))\n",
            "",
        ),
        (
            "projections do not depend on the seed",
            "stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(_STREAM, tf.int64)])",
            "stream = tf.stack([tf.constant(3, tf.int64), tf.constant(_STREAM, tf.int64)])",
            "tests/layers/test_training.py tests/layers/test_serialization.py",
        ),
    ),
    *_faults(
        "python/performer/layers/_attention.py",
        "tests/layers/test_masks.py tests/layers/test_performer.py",
        (
            "masked keys are in the prefix",
            "in_prefix, others = in_prefix & keys, others & keys",
            "others = others & keys",
        ),
        (
            "keys of the prefix count twice",
            "        keys = others\n",
            "",
        ),
        (
            "as many keys are dropped as should be kept",
            "return uniform < rate",
            "return uniform > rate",
            "tests/layers/test_masks.py tests/layers/test_training.py",
        ),
        (
            "masked queries get an output",
            "return tf.where(queries[:, :, tf.newaxis, tf.newaxis], output, tf.zeros_like(output))",
            "return output",
        ),
    ),
    *_faults(
        "python/performer/layers/_masks.py",
        "tests/layers/test_masks.py tests/layers/test_performer.py tests/layers/test_drop_in.py",
        (
            "a key mask replaces a value mask",
            "result = mask if result is None else tf.logical_and(result, mask)",
            "result = mask",
        ),
    ),
    *_faults(
        "python/performer/layers/_dense.py",
        "tests/layers/test_masks.py",
        (
            "a query does not see its own key",
            "allowed = tf.range(keys) <= tf.range(length)[:, tf.newaxis]",
            "allowed = tf.range(keys) < tf.range(length)[:, tf.newaxis]",
        ),
    ),
    *_faults(
        "python/performer/layers/_state.py",
        "tests/layers/test_streaming.py tests/layers/test_positions.py",
        (
            "positions of a stream fall behind by one",
            "position=start + (length if mesh is None else mesh.total(length))",
            "position=start + (length if mesh is None else mesh.total(length)) - 1",
        ),
    ),
    *_faults(
        "python/performer/layers/performer.py",
        "tests/layers/test_streaming.py tests/layers/test_training.py",
        (
            "keys are dropped in inference, too",
            "if training and self._dropout:",
            "if self._dropout:",
        ),
        (
            "an initial state belongs to any projection",
            "draw=self._projection_layer.draw_number(),",
            "draw=0,",
        ),
    ),
    *_faults(
        "python/performer/layers/rotary_embedding.py",
        "tests/layers/test_positions.py",
        ("pairs turn the wrong way", "first * cos - second * sin", "first * cos + second * sin"),
        (
            "packed sequences do not start at 0",
            "tf.reshape(flat - tf.gather(first, run), tf.shape(ids))",
            "tf.reshape(flat - tf.gather(first, run) + run, tf.shape(ids))",
        ),
    ),
    *_faults(
        "python/performer/layers/streaming_sequential.py",
        "tests/test_generation.py",
        (
            "a layer begins anew in every part",
            'options["initial_state"] = next(before)',
            'options["initial_state"] = next(before) and None',
        ),
    ),
    *_faults(
        "python/performer/features/projections.py",
        "tests/features/test_projections.py",
        (
            "directions favour the first axis",
            "q *= tf.where(tf.linalg.diag_part(r) < 0, -tf.ones([], tf.float64), 1)[..., None, :]",
            "q *= tf.sign(q[..., :1, :])",
        ),
        (
            "rows and directions share their random numbers",
            "tf.norm(_normal([count, rows, dim], norm_seed)",
            "tf.norm(_normal([count, 1, dim], norm_seed)",
        ),
    ),
    *_faults(
        "python/performer/generation.py",
        "tests/test_generation.py",
        (
            "tokens are one position late",
            "position = first + index\n",
            "position = first + index + 1\n",
        ),
        (
            "the share of `top_p` takes one token more",
            "kept = (before * (1 + _SHARE_SLACK) <",
            "kept = (before * (1 - 1e-3) <=",
        ),
        (
            "an end token of the prompt ends it",
            "ended |= ~given & (new == end)",
            "ended |= new == end",
        ),
        ("`top_k` keeps the likeliest only", "kept[:, -1:])", "kept[:, :1])"),
        (
            "what has ended goes on",
            "tf.where(ended, end, new))",
            "new)",
        ),
        (
            "the last token of the prompt is read twice",
            "chunk = tokens[:, start : min(start + _CHUNK, shortest - 1)]",
            "chunk = tokens[:, start : min(start + _CHUNK, shortest)]",
        ),
        (
            "all positions draw the same random numbers",
            "stream = tf.stack([seed, tf.cast(position, tf.int64)])",
            "stream = tf.stack([seed, seed])",
        ),
        (
            "a slice begins with the state before the last one",
            "        new, last, ended, state = graphs.write(",
            "        new, last, ended, _ = graphs.write(",
        ),
    ),
    *_faults(
        "python/performer/features/diagnostics.py",
        "tests/test_callbacks.py",
        (
            "an error that is no number is none",
            "tf.where(tf.math.is_nan(distance + unit), tf.constant(np.nan, tf.float64), error)",
            "error",
        ),
    ),
    *_faults(
        "python/performer/callbacks.py",
        "tests/test_callbacks.py",
        (
            "redraws begin one batch early",
            "self._count % every == 0",
            "self._count % every == 1 % every",
        ),
    ),
    *_faults(
        "python/performer/loader.py",
        "tests/building/test_loader.py",
        (
            "a library of another TensorFlow is loaded",
            "if built and minor not in map(_minor, built):",
            "if built and minor[:1] not in [version[:1] for version in built]:",
        ),
        (
            "a truncated library is loaded",
            "if path.stat().st_size < table + entry_size * entries:",
            "if path.stat().st_size < table:",
        ),
    ),
    *_faults(
        "python/performer/reference/one_head.py",
        "tests/reference",
        (
            "the reference has the norm of keys twice",
            "u - scale * np.sum(x * x, -1, keepdims=True) / 2",
            "u - scale * np.sum(x * x, -1, keepdims=True)",
        ),
    ),
]

CPU = [
    *_faults(
        "cc/core/schema.cc",
        REFUSALS,
        ("any number of query heads is taken", "heads % groups != 0)", "heads % groups == heads)"),
        (
            "sizes that must agree are not compared",
            "    return (*this)[letter] == dim;\n",
            "    return true;\n",
        ),
        ("a size of 0 is taken for D", '"key dimension", 1,', '"key dimension", 0,'),
    ),
    *_faults(
        "cc/core/indices.h",
        CALLS,
        (
            "a projection for each group is taken for the first",
            "count == heads ? head : group;",
            "count == heads ? head : 0;",
        ),
    ),
    *_faults(
        "cc/core/half.h",
        CALLS,
        (
            "bfloat16 is cut off, not rounded",
            "rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
            "rounded = bits >> 16;",
        ),
        (
            "halves below the normal ones are 0",
            "rest < 0x38800000 ? subnormal :",
            "rest < 0x38800000 ? 0 :",
        ),
    ),
    *_faults(
        "cc/cpu/driver/work_division.h",
        CALLS,
        (
            "the last split runs beyond the sequence",
            "const int64_t next = std::min(row + block, end);",
            "const int64_t next = row + block;",
        ),
    ),
    *_faults(
        "cc/cpu/driver/reduce.h",
        GRADIENTS,
        (
            "a shared key bias gets the gradient of one key",
            "* dims.keys + s + k]);",
            "* dims.keys + s]);",
        ),
    ),
    *_faults(
        "cc/cpu/driver/backward.h",
        GRADIENTS,
        (
            "the gradient of the feature bias has the scale of the projection's",
            "    bias.Store(1, params.grad_queries.feature_bias);\n    return Status();",
            "    bias.Store(RootScale(), params.grad_queries.feature_bias);\n    return Status();",
        ),
        (
            "means are added with the stride of others",
            "+= mean[m * strides_.e_pad + e];",
            "+= mean[m * strides_.e + e];",
        ),
    ),
    *_faults(
        "cc/cpu/driver/forward.h",
        CALLS,
        (
            "the second split of a sequence is left out",
            "for (int64_t i = begin + 1; i < end; ++i) kernels_.merge",
            "for (int64_t i = begin + 2; i < end; ++i) kernels_.merge",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/key_chunk.h",
        CALLS,
        (
            "masked keys are not skipped",
            "skip[j] = offset[j] == -kInf<Acc>;",
            "skip[j] = false;",
        ),
        (
            "key biases are read from the first row on",
            "offset[j] = bias[(first + j) * stride];",
            "offset[j] = bias[j * stride];",
        ),
        (
            "all rows of a batch have the key bias of the first",
            "(keys.bias_batch == 1 ? 0 : batch)",
            "(keys.bias_batch >= 1 ? 0 : batch)",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/summarize.h",
        CALLS,
        (
            "masses keep their old scale",
            "      to.mass[m] *= keep[m - m0];\n",
            "",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/state.h",
        CALLS,
        (
            "what the mean of an empty feature holds leaks",
            "log_mass[m] == -kInf<Acc> ? 0 : strides.e;",
            "strides.e;",
        ),
        (
            "an epsilon in the denominator",
            "nothing ? Acc(0) : 1 / mass[m];",
            "nothing ? Acc(0) : 1 / (mass[m] + Acc(1e-3));",
        ),
        (
            "a merged mass is that of the first",
            "mass += weight[i] * Load(from[i].mass + m0);",
            "mass += Acc(i == 0) * weight[i] * Load(from[i].mass + m0);",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/near_far/blocks.h",
        NEAR_FAR,
        (
            "the position of the first key does not count",
            "phase(params.start % window)",
            "phase(0)",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/near_far/far_states.h",
        NEAR_FAR,
        (
            "a far state leaves out what comes after its group",
            "    if (HasEnd(group)) list.Add(End(group));\n    AddBlocks(group * kFarGroup",
            "    AddBlocks(group * kFarGroup",
        ),
        (
            "a state is not made again with its section",
            "first = j == 0 ? 0 : j + 1",
            "first = j == 0 ? 0 : j + 2",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/near_far/near_far.h",
        NEAR_FAR,
        (
            "threads that share a sequence read the state of the first block of a stage",
            "SummaryPartial<Acc>::At(reads + (block - first) * size",
            "SummaryPartial<Acc>::At(reads + 0 * size",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/near_far/logits.h",
        NEAR_FAR,
        ("the number of features does not count", "far_bias[m] -= log_features;", "continue;"),
        ("a query sees the key after it", "rows.at + i + 1 :", "rows.at + i + 2 :"),
    ),
    *_faults(
        "cc/cpu/kernels/near_far/decode.h",
        NEAR_FAR,
        (
            "a token reads the far keys of the initial state only",
            "    if (has_keys_) {\n      state_.Update(strides_);",
            "    if (false) {\n      state_.Update(strides_);",
        ),
        (
            "a masked near key counts for a token",
            "near.skip[j] ? -kInf<Acc> : kLog2e<Acc>",
            "kLog2e<Acc>",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/near_far_backward/gradient.h",
        NEAR_FAR,
        ("gradients are not centred", "centred || !keys.keys.any", "true"),
    ),
    *_faults(
        "cc/cpu/kernels/query_chunk.h",
        CALLS,
        (
            "a query that sees nothing gives NaN",
            "shift[i] = highest == -kInf<Acc> ? Acc(0) : highest;",
            "shift[i] = highest;",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/log_features.h",
        CALLS,
        (
            "ReLU features have no epsilon",
            "(u < Acc(0) ? zero : u) + map.epsilon;",
            "(u < Acc(0) ? zero : u);",
        ),
        (
            "ELU features have the slope 1",
            "u > Acc(0) ? one / (one + u) : one);",
            "one);",
            GRADIENTS,
        ),
        (
            "the slope of a map is left out",
            "      Store(g + m, Load(g + m) * Load(slope + m));\n",
            "      Store(g + m, Load(g + m));\n",
            GRADIENTS,
        ),
    ),
    *_faults(
        "cc/cpu/kernels/decode.h",
        CALLS,
        (
            "a token reads the state before it",
            "s.f + i * strides.m_stride + first, mean + first * strides.e,",
            "s.f + i * strides.m_stride + first, before.mean + first * strides.e,",
        ),
        (
            "the first token reads what an empty state holds",
            "} else if (was_empty) {",
            "} else if (false) {",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/key_gradients.h",
        GRADIENTS,
        (
            "masked keys have a gradient of their bias",
            "to.bias[row + j] = keys.skip[j] ? 0 : row_sum[j];",
            "to.bias[row + j] = row_sum[j] + Acc(1e-3);",
        ),
        (
            "the norm of keys gives no gradient",
            "const Acc norm = map.key_norm ? map.scale * row_sum[j] : Acc(0);",
            "const Acc norm = map.key_norm ? Acc(0) : Acc(0);",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal/operands.h",
        CALLS,
        (
            "features that have seen no key weigh something",
            "Store(share_ + m, mass / least);",
            "Store(share_ + m, least / least);",
        ),
        (
            "masses below 1 make weights overflow",
            "return mass > 1 ? 1 / mass : Acc(1);",
            "return mass == 0 ? Acc(1) : 1 / mass;",
            "tests/cpu/test_steep_keys.py",
        ),
        (
            "means are sums",
            "const Vec<float> x = Load(row(m) + e) * first,",
            "const Vec<float> x = Load(row(m) + e),",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal_backward/gradient.h",
        GRADIENTS,
        (
            "products with panels of pairs read the state of the first panel",
            "right + p * Operand::Depth(width) * kPanel);",
            "right);",
        ),
        (
            "the last rows of f^T in pairs are those of another sub-chunk",
            "Transpose(f.data, f.row_stride, RoundUp(n, 4), ",
            "Transpose(f.data, f.row_stride, n / 4 * 4, ",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal/key_chain.h",
        CAUSALITY,
        (
            "no chunk is cut at a large key",
            "    if (exceeds[j / kLanes<Acc>][j % kLanes<Acc>]) return j;\n",
            "",
        ),
        (
            "a cut looks one key ahead",
            "if (exceeds[j / kLanes<Acc>][j % kLanes<Acc>]) return j;",
            "if (exceeds[j / kLanes<Acc>][j % kLanes<Acc>]) return j - 1 > begin ? j - 1 : j;",
            f"{CAUSALITY} tests/cpu/test_determinism.py",
        ),
        (
            "the anchors of a steep sub-chunk stay those of its first key",
            "if (raised > s.state.anchor[m]) s.Raise(m, raised, strides, s.state);",
            "if (false) s.Raise(m, raised, strides, s.state);",
            "tests/cpu/test_steep_keys.py",
        ),
        (
            "masses grow without a limit",
            "if (next.mass[m] > kRescaleThreshold<Acc>)",
            "if (false)",
            "tests/cpu/test_properties.py",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal/steep.h",
        CAUSALITY,
        (
            "a query of a steep sub-chunk sees the next key",
            "sub_chunk.begin + i + 1);",
            "sub_chunk.begin + i + 2);",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal_backward/forward_scan.h",
        "tests/cpu/test_steep_keys.py",
        (
            "every steep key keeps anchors of its own",
            "const bool steep = (begin > 0 || exceeds) && !IsEmpty(gradient);",
            "const bool steep = false;",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal_backward/forward_scan.h",
        GRADIENTS,
        (
            "the normaliser gives no gradient",
            "const Acc scaled = sum * inverse[r];",
            "const Acc scaled = 0 * sum * inverse[r];",
        ),
        (
            "values of large steep keys are less a centre of the past",
            "        if (!RenewCentre(gradient, *sub_chunk)) return false;\n",
            "",
        ),
        (
            "values of the first chunk are less nothing",
            "    if (!CentreByFirstKey(gradient, n)) return false;\n",
            "",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal_backward/reverse_scan.h",
        GRADIENTS,
        (
            "the reverse state keeps a later centre",
            "  if (gradient.centre_in_force == centre || strides.e_pad == 0) return;\n",
            "  return;\n",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal_backward/steep.h",
        GRADIENTS,
        (
            "large products of steep pairs are compared as they are",
            "const double reference = first_key < 0 ? 0 : pair_of(first_key);",
            "const double reference = 0;",
        ),
    ),
    *_faults(
        "cc/cpu/simd/triangle.h",
        CAUSALITY,
        (
            "rows see the later keys of their tile",
            "tile.MultiplyLower(pair + r * ldp + r, ldp, x + r * ldx + c, ldx);",
            "tile.Multiply(pair + r * ldp + r, ldp, 1, x + r * ldx + c, ldx, tile.kRows);",
        ),
    ),
]

# Races: their tests run under ThreadSanitizer.
THREADS = [
    *_faults(
        "cc/cpu/driver/pipeline.h",
        "tests/cpu/threads_test.cc",
        (
            "a thread takes a window before it is complete",
            "Window(c, 1 - stage);\n      if (window.count",
            "Window(c, stage);\n      if (window.count",
        ),
    ),
    *_faults(
        "cc/cpu/kernels/causal/sub_chunks.h",
        "tests/cpu/threads_test.cc",
        (
            "two threads may take the same queries",
            "return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);",
            "return taken++;",
        ),
    ),
]

CUDA = [
    *_faults(
        "cc/cuda/kernels/forward/merge_states.cuh",
        EMULATED,
        (
            "a merged mean has the weight of the other state",
            "mass / sum * mean[i]) +",
            "other_mass / sum * mean[i]) +",
        ),
        (
            "the first split begins with the state of its own keys",
            "if (p.before) {",
            "if (p.before && split > first) {",
        ),
    ),
    *_faults(
        "cc/cuda/device/online_softmax.cuh",
        EMULATED,
        (
            "sums keep their old scale",
            "          sum[m][e] *= factor[m][e];\n",
            "",
        ),
    ),
    *_faults(
        "cc/cuda/kernels/backward/common.cuh",
        EMULATED_GRADIENTS,
        (
            "a sum is kept in one number with a large maximum",
            "inline constexpr bool kKeepsLogSum = !kIs16Bit<T>;",
            "inline constexpr bool kKeepsLogSum = false;",
        ),
    ),
    *_faults(
        "cc/cuda/kernels/backward/block_softmax.cuh",
        EMULATED_GRADIENTS,
        (
            "exponentials stay relative to the largest of their warp",
            "Exp2((own_max_ - base) * unit) * inverse;",
            "inverse;",
        ),
    ),
    *_faults(
        "cc/cuda/kernels/backward/dq.cuh",
        EMULATED_GRADIENTS,
        (
            "sums over tokens keep the scale of earlier queries",
            "gradients.projection[m][n][i] *= scale.now / before;",
            "gradients.projection[m][n][i] *= 1;",
        ),
    ),
]
