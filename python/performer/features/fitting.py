"""Features fitted to real queries and keys: proposals of their moments, and a few steps of EM.

With x and y for query and key times sqrt(scale), softmax attention is exp(x.y), normalised, and the
features of `feature_map="learned"` estimate it by

    sum_m exp(a_m(x) + b_m(y)),    a_m(x) = u_m.x + c_m,    b_m(y) = w_m.y - |y|^2 / 2.

Proposals. For any normal density N(mu, C), exp(x.y) = E exp(w.x - |x|^2/2 + w.y - |y|^2/2 + c(w)),
w from N(mu, C), with the importance weight c(w) = log N(w; 0, I) - log N(w; mu, C) in the bias. The
integrand is proportional to N(w; x + y, I), so a proposal should lie where x + y does:

- "centred": mu = E x + E y, C = I. It is FAVOR+ of queries and keys less their means, which softmax
  does not see for keys, and which for queries is a factor of the keys' weights.
- "scaled": C = (1 - 4 A) I, A = (1 - 2 r - sqrt((2 r + 1)^2 + 8 r)) / 16, r = E|x + y|^2 / D about
  the means: FAVOR++, Likhosherstov et al., https://arxiv.org/abs/2205.15317.
- "dense": C = I + Cov x + Cov y: the normal density that is closest, in mean Kullback-Leibler
  divergence, to the densities N(x + y, I) of independent pairs. A whole matrix instead of a number,
  as in FAVOR#, https://arxiv.org/abs/2302.00787, whose matrix is another one.

Fit. Weights that are normalised over the keys, p(j | i) = sum_m p(m | i) p(j | m), are a mixture:

    p(m | i) = softmax_m(a_m(x_i) + log_mass_m),    p(j | m) = exp(b_m(y_j) - log_mass_m),

and attention with near keys is one with a component more for each of them. EM (of Hofmann's
probabilistic latent semantic analysis, https://arxiv.org/abs/1301.6705, with log-linear factors)
lowers the divergence of p(j | i) from softmax: the E-step distributes the weight of each pair among
the components, t_im and c_mj, and the M-step, two weighted regressions in log space, takes one
Newton step for each row of u, with c, and of w:

    (u, c)_m += (sum_i max(p_im, t_im) x_i x_i' + r n_m I)^-1 sum_i (t_im - p_im) x_i
    w_m      += (n_m Cov_m y + r n_m I)^-1 (sum_j c_mj y_j - sum_i t_im E[y | m, i])

There is no iteration inside a step and no learning rate; a step that does not help is halved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

PROPOSALS = ("centred", "scaled", "dense")
_RIDGE = 1e-2  # r above
_TINY = 1e-30
# Keys of a sequence from which the covariances of w's Newton step are estimated.
_KEYS_OF_HESSIAN = 128


class Rows(NamedTuple):
    """Sampled queries of one sequence, with all its keys. G key heads, R query heads of each.

    Attributes:
        query: float32 [G, R n, D], times sqrt(scale), the rows of one query head after another.
        key: float32 [G, S, D], times sqrt(scale).
        value: float32 [G, S, E].
        far: float32 [1|G, R n, S], 1 where a query attends to a key through features, else 0.
        near: likewise where it attends to it exactly.
    """

    query: tf.Tensor
    key: tf.Tensor
    value: tf.Tensor
    far: tf.Tensor
    near: tf.Tensor


class Weights(NamedTuple):
    """The weights of learned features.

    Attributes:
        query: float32 [G, R, M, D + 1]: projection and bias of the queries.
        key: float32 [G, M, D].
    """

    query: tf.Tensor
    key: tf.Tensor


class Levels(NamedTuple):
    """What stands beside the features in the logits.

    Attributes:
        offset: float32 [G, R], added to the log-features of the queries.
        query_norm: float32 scalar, 1 to subtract |x|^2 / 2 from them, else 0.
    """

    offset: tf.Tensor
    query_norm: tf.Tensor


def proposal(name, draw, query_mean, query_covariance, key_mean, key_covariance):
    """Projection and bias of one head, from a proposal.

    Args:
        name: one of `PROPOSALS`.
        draw: [M, D], rows of a standard normal distribution.
        query_mean, query_covariance: [D] and [D, D], of x; `key_mean`, `key_covariance` of y.

    Returns:
        float64 [M, D], the projection of both sides, and [M], the bias.

    Example:

    >>> import numpy as np
    >>> from performer.features import fitting
    >>> rng = np.random.default_rng(0)
    >>> z, one = rng.normal(size=[100000, 2]), np.eye(2)
    >>> x, y = np.array([0.9, 0.3]), np.array([0.8, -0.5])
    >>> w, c = fitting.proposal("dense", z, np.ones(2), 0.1 * one, np.zeros(2), 0.1 * one)
    >>> exact = np.exp(x @ y)
    >>> estimate = np.mean(np.exp(w @ (x + y) - x @ x / 2 - y @ y / 2 + c))
    >>> bool(abs(estimate / exact - 1) < 0.02)
    True
    """
    draw = np.asarray(draw, np.float64)
    dim = draw.shape[1]
    mean = np.asarray(query_mean, np.float64) + key_mean
    covariance = np.asarray(query_covariance, np.float64) + key_covariance
    if name == "centred":
        root = np.eye(dim)
    elif name == "scaled":
        ratio = np.trace(covariance) / dim
        factor = (1 - 2 * ratio - np.sqrt((2 * ratio + 1) ** 2 + 8 * ratio)) / 16
        root = np.sqrt(1 - 4 * factor) * np.eye(dim)
    else:
        root = np.linalg.cholesky(np.eye(dim) + covariance)
    rows = mean + draw @ root.T
    bias = (np.sum(draw**2, 1) - np.sum(rows**2, 1)) / 2 + np.sum(np.log(np.diag(root)))
    return rows, bias


def errors(weights: Weights, rows: list[Given], levels: Levels) -> np.ndarray:
    """Error of the outputs of attention, float64 [G, R], relative to what attention adds.

    |estimate - exact| / |exact - uniform|, uniform being the mean of the values that a query sees:
    0 is exact, and at 1 one might as well not look.
    """
    pairs = [_distances(weights, x, levels) for x in rows]
    wrong, informative = (np.sum([pair[i] for pair in pairs], 0) for i in (0, 1))
    return np.sqrt(wrong / np.maximum(informative, np.finfo(np.float64).tiny))


def fit(weights: Weights, rows: list[Given], levels: Levels, steps: int):
    """Steps of EM, one after another.

    A key head whose divergence a step has not lowered goes back, and takes half the step.

    Args:
        weights: where to begin.
        rows: what to fit.
        levels: as they are in attention.
        steps: how many.

    Yields:
        The `Weights` after each step.
    """

    def summed(weights):
        sums = _sums(weights, rows[0], levels)
        for x in rows[1:]:
            sums = [a + b for a, b in zip(sums, _sums(weights, x, levels), strict=True)]
        return sums

    sums, part = summed(weights), tf.ones(weights.key.shape[0])
    for _ in range(steps):
        tried = _step(weights, sums, part)
        after = summed(tried)
        better = after[-1] < sums[-1]  # False for NaN, too
        weights, sums = tf.nest.map_structure(
            lambda a, b, better=better: tf.where(
                tf.reshape(better, [-1, *[1] * (a.shape.rank - 1)]), a, b
            ),
            (tried, list(after)),
            (weights, list(sums)),
        )
        part = tf.where(better, tf.minimum(2 * part, 1.0), part / 2)
        yield weights


class Given(NamedTuple):
    """`Rows` with the weights that softmax gives them; `with_targets` makes it.

    Attributes:
        rows: `Rows`.
        logits: [G, R n, S].
        far_weight: softmax weights of far keys, 0 for others.
        near_log_mass: log sum of exp(x.y) over near keys, [G, R n]; -inf where there are none.
        exists: 1 where the query sees a key, else 0, [1|G, R n].
    """

    rows: Rows
    logits: tf.Tensor
    far_weight: tf.Tensor
    near_log_mass: tf.Tensor
    exists: tf.Tensor


@tf.function(reduce_retracing=True, autograph=False)
def with_targets(rows: Rows) -> Given:
    """The rows with the weights of softmax."""
    seen = rows.far + rows.near
    logits = tf.matmul(rows.query, rows.key, transpose_b=True)
    lowest = tf.constant(-np.inf, logits.dtype)
    top = tf.reduce_max(tf.where(seen > 0, logits, lowest), -1, keepdims=True)
    top = tf.where(tf.math.is_finite(top), top, 0.0)
    weight = tf.where(seen > 0, tf.exp(tf.minimum(logits - top, 0.0)), 0.0)
    total = tf.reduce_sum(weight, -1, keepdims=True)
    near = tf.math.log(tf.reduce_sum(weight * rows.near, -1)) + top[..., 0]
    far = weight * rows.far / tf.maximum(total, _TINY)
    exists = tf.cast(tf.reduce_max(seen, -1) > 0, logits.dtype)
    return Given(rows, logits, far, near, exists)


def _query_logits(weights, rows, levels):
    """a_m(x) with levels, [G, R n, M], and x with a 1 behind it, [G, R, n, D + 1]."""
    groups, heads, features = tf.unstack(tf.shape(weights.query)[:3])
    x = rows.query
    one = tf.concat([x, tf.ones_like(x[..., :1])], -1)
    one = tf.reshape(one, [groups, heads, -1, tf.shape(one)[-1]])
    a = tf.matmul(one, weights.query, transpose_b=True) + levels.offset[..., None, None]
    a = tf.reshape(a, [groups, -1, features])
    norm = levels.query_norm / 2 * tf.reduce_sum(x**2, -1, keepdims=True)
    return a - norm, one


def _key_logits(weights, rows):
    """b_m(y), [G, S, M]."""
    b = tf.matmul(rows.key, weights.key, transpose_b=True)
    return b - tf.reduce_sum(rows.key**2, -1, keepdims=True) / 2


@tf.function(reduce_retracing=True, autograph=False)
def _sums(weights: Weights, given: Given, levels: Levels):
    """The sums over one sequence of which a step is made."""
    rows = given.rows
    a, one = _query_logits(weights, rows, levels)
    b = _key_logits(weights, rows)
    top = tf.reduce_max(b, 1, keepdims=True)
    e = tf.exp(b - top)  # [G, S, M]
    mass = tf.maximum(tf.matmul(rows.far, e), _TINY)  # of the keys that each query sees
    logits = a + tf.math.log(mass) + top
    highest = tf.maximum(tf.reduce_max(logits, -1), given.near_log_mass)[..., None]
    p = tf.exp(logits - highest)
    near = tf.exp(given.near_log_mass[..., None] - highest)
    normaliser = tf.reduce_sum(p, -1, keepdims=True) + near
    has_near = tf.cast(tf.math.is_finite(given.near_log_mass), p.dtype)
    p = given.exists[..., None] * p / normaliser
    p_key = p / mass
    estimate = tf.matmul(p_key, e, transpose_b=True)
    ratio = given.far_weight / tf.maximum(estimate, _TINY)
    t = p_key * tf.matmul(ratio, e)  # the E-step: how much of a query's weight is of a component
    shared = e * tf.matmul(ratio, p_key, transpose_a=True)  # and of a key's
    expected = e * tf.matmul(rows.far, t / mass, transpose_a=True)

    y = rows.key
    residual_key = tf.matmul(shared - expected, y, transpose_a=True)
    count = tf.reduce_sum(expected, 1)
    stride = 1 + (tf.shape(y)[1] - 1) // _KEYS_OF_HESSIAN
    mean = tf.matmul(expected, y, transpose_a=True) / tf.maximum(count, _TINY)[..., None]
    some, y = tf.cast(stride, e.dtype) * expected[:, ::stride], y[:, ::stride]
    dim = tf.shape(y)[-1]
    products = tf.reshape(y[..., None] * y[..., None, :], [tf.shape(y)[0], -1, dim * dim])
    second = tf.reshape(
        tf.matmul(some, products, transpose_a=True), [*tf.unstack(tf.shape(mean)[:2]), dim, dim]
    )
    first = mean[..., None] * tf.matmul(some, y, transpose_a=True)[..., None, :]
    square = tf.reduce_sum(some, 1)[..., None, None] * mean[..., None] * mean[..., None, :]
    covariance = second - first - tf.linalg.matrix_transpose(first) + square

    shape = tf.concat([tf.shape(one)[:3], tf.shape(p)[-1:]], 0)
    p, t = tf.reshape(p, shape), tf.reshape(t, shape)
    residual_query = tf.matmul(t - p, one, transpose_a=True)
    wide = tf.shape(one)[-1]
    squares = tf.reshape(one[..., None] * one[..., None, :], [*tf.unstack(shape[:3]), wide * wide])
    # Not below the Hessian, which is that of p alone less the products of p of two components. And
    # where p is far below t, a step in log space has to be of size 1, not of size t / p.
    hessian = tf.matmul(tf.maximum(p, t), squares, transpose_a=True)
    hessian = tf.reshape(hessian, [*tf.unstack(tf.shape(hessian)[:3]), wide, wide])
    far = given.far_weight
    divergence = tf.reduce_sum(tf.math.xlogy(far, far / tf.maximum(estimate, _TINY)), [1, 2])
    near = given.exists * near[..., 0] / normaliser[..., 0]
    left = has_near * tf.maximum(given.exists - tf.reduce_sum(far, -1), 0.0)
    divergence += tf.reduce_sum(tf.math.xlogy(left, left / tf.maximum(near, _TINY)), -1)
    query_sums = residual_query, hessian, tf.reduce_sum(tf.maximum(p, t), 2)
    return *query_sums, residual_key, covariance, count, divergence


@tf.function(reduce_retracing=True, autograph=False)
def _step(weights: Weights, sums, part) -> Weights:
    """The Newton steps, or the `part` `[G]` of them, from the sums over all sequences."""
    residual_query, hessian, count_query, residual_key, covariance, count, _ = sums

    def solved(matrix, count, residual):
        ridge = _RIDGE * count + 1e-3
        matrix += ridge[..., None, None] * tf.eye(tf.shape(matrix)[-1], dtype=matrix.dtype)
        return tf.linalg.solve(matrix, residual[..., None])[..., 0]

    return Weights(
        weights.query + part[:, None, None, None] * solved(hessian, count_query, residual_query),
        weights.key + part[:, None, None] * solved(covariance, count, residual_key),
    )


@tf.function(reduce_retracing=True, autograph=False)
def _distances(weights: Weights, given: Given, levels: Levels):
    """Squared distances of estimate and of uniform weights to the exact output, float64 [G, R]."""
    # A key that no query sees may have the largest features: float64 has the range for that.
    weights, given, levels = tf.nest.map_structure(
        lambda x: tf.cast(x, tf.float64), (weights, given, levels)
    )
    rows = given.rows
    a, _ = _query_logits(weights, rows, levels)
    b = _key_logits(weights, rows)
    top = tf.reduce_max(b, 1, keepdims=True)
    a += top
    highest = tf.maximum(tf.reduce_max(a, -1), given.near_log_mass)[..., None]
    far = tf.matmul(tf.exp(a - highest), tf.exp(b - top), transpose_b=True)
    near = tf.exp(tf.minimum(given.logits - highest, 0.0)) * rows.near
    seen = rows.far + rows.near

    def output(weight):
        total = tf.reduce_sum(weight, -1, keepdims=True)
        return tf.matmul(tf.math.divide_no_nan(weight, total), rows.value)

    top = tf.reduce_max(tf.where(seen > 0, given.logits, -np.inf), -1, keepdims=True)
    top = tf.where(tf.math.is_finite(top), top, 0.0)
    exact = output(tf.exp(tf.minimum(given.logits - top, 0.0)) * seen)
    estimate, uniform = output(rows.far * far + near), output(tf.broadcast_to(seen, tf.shape(far)))
    shape = [*tf.unstack(tf.shape(weights.query)[:2]), -1]

    def distance(x):
        return tf.reduce_sum(tf.reshape((x - exact) ** 2, shape), -1)

    return distance(estimate), distance(uniform)
