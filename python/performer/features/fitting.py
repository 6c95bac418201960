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
_KEYS_OF_HESSIAN = 64
# Numbers of one array: sequences are taken together up to this.
_NUMBERS = 2**24


class Rows(NamedTuple):
    """Sampled queries of N sequences, with keys of these. G key heads, R query heads of each.

    Attributes:
        query: float32 [N, G, R n, D], times sqrt(scale), rows of one query head after another.
        key: float32 [N, G, S, D], times sqrt(scale).
        value: float32 [N, G, S, E].
        far: float32 [N, 1|G, R n, S], 1 where a query attends to a key through features, else 0.
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
        logits: [N, G, R n, S].
        far_weight: softmax weights of far keys, 0 for others.
        near_log_mass: log sum of exp(x.y) over near keys, [N, G, R n]; -inf where there are none.
        exists: 1 where the query sees a key, else 0, [N, 1|G, R n].
        query_squares: products of two entries of (x, 1), [G, R, N n, (D + 1) (D + 2) / 2].
        key_squares: products of two entries of y, of some keys, [G, N s, D (D + 1) / 2].
    """

    rows: Rows
    logits: tf.Tensor
    far_weight: tf.Tensor
    near_log_mass: tf.Tensor
    exists: tf.Tensor
    query_squares: tf.Tensor
    key_squares: tf.Tensor


def together(rows: list[Rows], heads: int, features: int) -> list[Rows]:
    """Sequences of one shape, joined to as few as memory allows.

    Args:
        rows: of one sequence each, arrays, N = 1.
        heads: R.
        features: M.
    """
    _, groups, queries, dim = rows[0].query.shape
    keys = rows[0].key.shape[2]
    squares = (dim + 1) * (dim + 2) // 2
    numbers = groups * (queries * (keys + squares + features) + keys * features)
    count = max(1, _NUMBERS // numbers)
    return [
        Rows(
            *(
                tf.constant(np.concatenate(x), tf.float32)
                for x in zip(*rows[i : i + count], strict=True)
            )
        )
        for i in range(0, len(rows), count)
    ]


@tf.function(reduce_retracing=True, autograph=False)
def with_targets(rows: Rows, levels: Levels) -> Given:
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
    x = _by_head(_with_one(rows.query), tf.shape(levels.offset)[1])
    y = _joined(rows.key[:, :, :: _stride(rows)])
    return Given(rows, logits, far, near, exists, _squares(x), _squares(y))


def _stride(rows):
    """Every how many keys one is looked at for the covariances."""
    return 1 + (tf.shape(rows.key)[2] - 1) // _KEYS_OF_HESSIAN


def _with_one(x):
    return tf.concat([x, tf.ones_like(x[..., :1])], -1)


def _by_head(x, heads):
    """[N, G, R n, X] to [G, R, N n, X]."""
    count, groups, rows, last = tf.unstack(tf.shape(x), 4)
    x = tf.transpose(tf.reshape(x, [count, groups, heads, rows // heads, last]), [1, 2, 0, 3, 4])
    return tf.reshape(x, [groups, heads, -1, last])


def _joined(x):
    """[N, G, s, X] to [G, N s, X]."""
    count, groups, rows, last = tf.unstack(tf.shape(x), 4)
    return tf.reshape(tf.transpose(x, [1, 0, 2, 3]), [groups, count * rows, last])


def _upper(size):
    """Row and column of the entries of a symmetric matrix of this size, [X (X + 1) / 2, 2]."""
    return tf.where(tf.linalg.band_part(tf.ones([size, size], tf.bool), 0, -1))


def _squares(x):
    """[..., X] to [..., X (X + 1) / 2]: products of entries i and j, i <= j."""
    first, second = tf.unstack(_upper(tf.shape(x)[-1]), 2, axis=1)
    return tf.gather(x, first, axis=-1) * tf.gather(x, second, axis=-1)


def _matrices(x, size):
    """[..., X (X + 1) / 2] to the symmetric [..., X, X], X = size."""
    numbers = tf.range(tf.shape(x)[-1], dtype=tf.int64)
    place = tf.scatter_nd(_upper(size), numbers, tf.cast([size, size], tf.int64))
    return tf.gather(x, tf.maximum(place, tf.transpose(place)), axis=-1)


def attend(logits, seen, value):
    """Softmax attention [..., n, E], 0 where a query sees nothing.

    Args:
        logits: [..., n, S].
        seen: 1 where a query sees a key, else 0, of a shape that broadcasts to `logits`.
        value: [..., S, E].
    """
    top = tf.reduce_max(tf.where(seen > 0, logits, -np.inf), -1, keepdims=True)
    top = tf.where(tf.math.is_finite(top), top, tf.zeros_like(top))
    return _average(tf.exp(tf.minimum(logits - top, 0.0)) * seen, value)


def _average(weight, value):
    total = tf.reduce_sum(weight, -1, keepdims=True)
    return tf.matmul(tf.math.divide_no_nan(weight, total), value)


def _query_logits(weights, rows, levels):
    """a_m(x) with levels, [N, G, R n, M]."""
    x = rows.query
    count, groups, n, dim = tf.unstack(tf.shape(x), 4)
    heads, features = tf.unstack(tf.shape(weights.query)[1:3], 2)
    one = tf.reshape(_with_one(x), [count, groups, heads, n // heads, dim + 1])
    a = tf.matmul(one, weights.query, transpose_b=True) + levels.offset[..., None, None]
    norm = levels.query_norm / 2 * tf.reduce_sum(x**2, -1, keepdims=True)
    return tf.reshape(a, [count, groups, n, features]) - norm


def _key_logits(weights, rows):
    """b_m(y), [N, G, S, M]."""
    b = tf.matmul(rows.key, weights.key, transpose_b=True)
    return b - tf.reduce_sum(rows.key**2, -1, keepdims=True) / 2


@tf.function(reduce_retracing=True, autograph=False)
def _sums(weights: Weights, given: Given, levels: Levels):
    """The sums over sequences of which a step is made."""
    rows = given.rows
    a = _query_logits(weights, rows, levels)
    b = _key_logits(weights, rows)
    top = tf.reduce_max(b, 2, keepdims=True)
    e = tf.exp(b - top)  # [N, G, S, M]
    mass = tf.maximum(tf.matmul(rows.far, e), _TINY)  # of the keys that each query sees
    logits = a + tf.math.log(mass) + top
    highest = tf.maximum(tf.reduce_max(logits, -1), given.near_log_mass)[..., None]
    p = tf.exp(logits - highest)
    near = tf.exp(given.near_log_mass[..., None] - highest)
    normaliser = tf.reduce_sum(p, -1, keepdims=True) + near
    has_near = tf.cast(tf.math.is_finite(given.near_log_mass), p.dtype)
    p = given.exists[..., None] * p / normaliser
    p_key = p / mass
    estimate = tf.maximum(tf.matmul(p_key, e, transpose_b=True), _TINY)
    ratio = given.far_weight / estimate
    t = p_key * tf.matmul(ratio, e)  # the E-step: how much of a query's weight is of a component
    shared = e * tf.matmul(ratio, p_key, transpose_a=True)  # and of a key's
    expected = e * tf.matmul(rows.far, t / mass, transpose_a=True)

    y, dim = rows.key, tf.shape(rows.key)[-1]
    residual_key = tf.matmul(_joined(shared - expected), _joined(y), transpose_a=True)
    count = tf.reduce_sum(expected, 2)  # [N, G, M]
    mean = tf.matmul(expected, y, transpose_a=True) / tf.maximum(count, _TINY)[..., None]
    stride = _stride(rows)
    some = tf.cast(stride, e.dtype) * expected[:, :, ::stride]
    covariance = _matrices(tf.matmul(_joined(some), given.key_squares, transpose_a=True), dim)
    # About the means of each sequence: less their products with h, and these transposed.
    h = tf.matmul(some, y[:, :, ::stride], transpose_a=True)
    h -= tf.reduce_sum(some, 2)[..., None] * mean / 2
    product = tf.matmul(*(tf.transpose(x, [1, 2, 0, 3]) for x in (mean, h)), transpose_a=True)
    covariance -= product + tf.linalg.matrix_transpose(product)

    heads, wide = tf.shape(weights.query)[1], dim + 1
    difference, largest = (_by_head(x, heads) for x in (t - p, tf.maximum(p, t)))
    x = _by_head(_with_one(rows.query), heads)
    residual_query = tf.matmul(difference, x, transpose_a=True)
    # Not below the Hessian, which is that of p alone less the products of p of two components. And
    # where p is far below t, a step in log space has to be of size 1, not of size t / p.
    hessian = _matrices(tf.matmul(largest, given.query_squares, transpose_a=True), wide)
    far = given.far_weight
    divergence = tf.reduce_sum(tf.math.xlogy(far, far / estimate), [0, 2, 3])
    near = given.exists * near[..., 0] / normaliser[..., 0]
    left = has_near * tf.maximum(given.exists - tf.reduce_sum(far, -1), 0.0)
    divergence += tf.reduce_sum(tf.math.xlogy(left, left / tf.maximum(near, _TINY)), [0, 2])
    query_sums = residual_query, hessian, tf.reduce_sum(largest, 2)
    return *query_sums, residual_key, covariance, tf.reduce_sum(count, 0), divergence


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
    rows, (weights, levels) = given.rows, _wide((weights, levels))
    rows = rows._replace(query=_wide(rows.query), key=_wide(rows.key))
    a = _query_logits(weights, rows, levels)
    b = _key_logits(weights, rows)
    top = tf.reduce_max(b, 2, keepdims=True)
    a += top
    nearest = tf.cast(given.near_log_mass, a.dtype)
    highest = tf.maximum(tf.reduce_max(a, -1), nearest)[..., None]
    far = tf.matmul(tf.exp(a - highest), tf.exp(b - top), transpose_b=True)
    near = tf.exp(tf.minimum(tf.cast(given.logits, a.dtype) - highest, 0.0))
    far_seen, near_seen = _wide((rows.far, rows.near))
    estimate = _average(far_seen * far + near_seen * near, tf.cast(rows.value, a.dtype))
    seen = rows.far + rows.near
    exact = attend(given.logits, seen, rows.value)
    uniform = attend(tf.zeros_like(given.logits), seen, rows.value)
    count, groups, n, size = tf.unstack(tf.shape(exact), 4)
    heads = tf.shape(weights.query)[1]

    def distance(x):
        difference = tf.cast(x, a.dtype) - tf.cast(exact, a.dtype)
        squares = tf.reshape(difference**2, [count, groups, heads, n // heads, size])
        return tf.reduce_sum(squares, [0, 3, 4])

    return distance(estimate), distance(uniform)


def _wide(tensors):
    return tf.nest.map_structure(lambda x: tf.cast(x, tf.float64), tensors)
