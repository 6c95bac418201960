"""Features trained to do what exact attention did: layer by layer, then all layers, then LoRA."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from performer.convert.calls import pairs
from performer.convert.progress import Progress
from performer.convert.recording import Recording, held_out_batches, record
from performer.convert.replacement import layers_inside, names_inside
from performer.convert.report import Report
from performer.layers._arguments import check_seed, check_size
from performer.layers._attention import attend
from performer.layers._calibration import AS_IT_WAS, LayerReport

# Positions of a step, and sequences from which a layer is calibrated.
_POSITIONS = 1024
_SEQUENCES = 24
_SAVED_EVERY = 50


def distill(
    student,
    teacher,
    data,
    *,
    steps=200,
    end_to_end=0,
    lora_rank=None,
    lora_steps=0,
    learning_rate=0.03,
    loss=None,
    batch_size=4,
    calibration_steps=8,
    seed=0,
    checkpoint=None,
    verbose=1,
) -> Report:
    """Trains the learned features of a model to do what the exact attention of another one does.

    In three stages, each of which is left out with 0 steps:

    1. Layer by layer. The teacher is called on all data, and the queries, keys and values of its
       attention layers are written to files. Each layer of the student is calibrated on them (see
       `calibrate`) and trained by Adam, its learning rate falling to 0 by a cosine, to make the
       outputs of exact attention from them. What is minimised is the mean over the heads of
       |output - exact|^2 / |uniform - exact|^2. Of the weights that it had, the calibrated and the
       trained ones, every key/value head keeps those with the least error on held-out sequences.
    2. `end_to_end` steps of all layers together: features are trained to make the outputs of the
       model those of the teacher, each model on its own hidden states.
    3. `lora_steps` steps of features and low-rank updates (Keras's `enable_lora`) of the other
       dense layers of the student, with the same loss.

    After the second and third, weights go back to what they were before unless the outputs have
    come closer on held-out batches.

    Nothing but learned features, `far_bias="learned"` and LoRA's factors changes. The first stage
    is the method of Hedgehog, https://arxiv.org/abs/2402.04347, and of attention transfer in
    LoLCATs, https://arxiv.org/abs/2410.10254, with outputs in the place of weights; the third is
    that of LoLCATs.

    Args:
        student: Model with learned features: `replace_attention(teacher, feature_map="learned",
            ...)`, calibrated or not.
        teacher: The model with exact attention in their places.
        data: Inputs of the teacher, without labels: arrays or tensors, the first axis of which is
            the batch, or a `tf.data.Dataset` of batches, which is read in order, several times.
        steps: Of each layer. A step sees about 1,024 positions.
        end_to_end: Steps of the second stage, a batch each.
        lora_rank: Rank of LoRA; needed with `lora_steps`.
        lora_steps: Steps of the third stage, a batch each.
        learning_rate: Largest one of the first stage. The second takes a fifth of it, and the third
            a thirtieth.
        loss: Function of the outputs of teacher and student to a number, for the second and third
            stages; `None` for |student - teacher|^2 / |teacher - its mean|^2.
        batch_size: Of arrays.
        calibration_steps: `steps` of `calibrate`; `None` to begin with the weights as they are.
        seed: Integer, of all that is drawn.
        checkpoint: Folder for what is needed to go on after an interruption: another call with the
            same arguments and models made in the same way goes on, and ends with the same bits. It
            also holds the recorded queries, keys and values.
        verbose: 0 for no progress bars, 1, or 2 for one line a stage.

    Returns:
        A `Report`: errors of every head before and after the first stage, and distances of the
        models' outputs, on held-out data (a fifth of the sequences and of the batches), after each
        stage.

    Raises:
        ValueError: models whose attention layers do not match; an argument outside its range; a
            `checkpoint` that was begun with other arguments.

    Numerics: in the types of the models. Memory for both models and a batch, and the layers one at
        a time; the recording takes 4 (2 D + 3 E) bytes for each head, layer and position on disk.
        The same bits for the same seed.

    Example:

    >>> import keras, tensorflow as tf
    >>> from performer import convert
    >>> x = keras.Input((64, 16))
    >>> exact = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x))
    >>> linear = convert.replace_attention(exact, supports=16, feature_map="learned", seed=1)
    >>> data = tf.random.stateless_normal([16, 64, 16], seed=[1, 2])
    >>> report = convert.distill(linear, exact, data, steps=20, verbose=0)
    >>> report.outputs["layers"] < 0.7 * report.outputs["as it was"]
    True
    """
    layers = pairs(student, teacher)
    if calibration_steps:
        calibration_steps = check_size("calibration_steps", calibration_steps)
    counts = {"steps": steps, "end_to_end": end_to_end, "lora_steps": lora_steps}
    for name, count in counts.items():
        counts[name] = check_size(name, count) if count else 0
    if counts["lora_steps"]:
        lora_rank = check_size("lora_rank", lora_rank)
    settings = {
        **counts,
        "lora_rank": lora_rank,
        "learning_rate": learning_rate,
        "batch_size": check_size("batch_size", batch_size),
        "calibration_steps": calibration_steps,
        "seed": check_seed("seed", seed) or 0,
        "layers": [[layer.name, *map(list, _shapes(layer))] for layer, _ in layers],
    }
    progress = Progress(checkpoint, settings, _SAVED_EVERY)
    batches = _Batches(data, batch_size)
    ends = _Ends(student, teacher, batches, loss or _distance)
    with _folder(checkpoint) as folder:
        stage = _LayerStage(progress, settings, folder, verbose)
        outputs = stage.outputs_before(ends)
        if counts["steps"]:
            stage.record(layers, teacher, batches)
        names = names_inside(student)
        reports = [
            stage.train(n, layer, names[id(layer)])
            for n, (layer, _) in enumerate(layers)
            if counts["steps"]
        ]
    features = [w for layer, _ in layers for w in _weights(layer)]
    outputs["layers"] = ends.error() if counts["steps"] else outputs[AS_IT_WAS]
    if counts["end_to_end"]:
        outputs["end to end"] = ends.train(
            "end to end",
            features,
            rate=learning_rate / 5,
            steps=counts["end_to_end"],
            before=outputs["layers"],
            progress=progress,
            verbose=verbose,
        )
    if counts["lora_steps"]:
        factors = _enable_lora(student, lora_rank, settings["seed"])
        outputs["lora"] = ends.train(
            "lora",
            [*features, *factors],
            rate=learning_rate / 30,
            steps=counts["lora_steps"],
            before=list(outputs.values())[-1],
            progress=progress,
            verbose=verbose,
        )
    return Report(reports, outputs)


@contextlib.contextmanager
def _folder(checkpoint):
    """Where recordings go: into the checkpoint, or into a folder that is removed."""
    if checkpoint is not None:
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _weights(layer):
    """The variables of a layer that the first stage trains."""
    parts = [layer.learned_projection, layer._far_bias]
    return [w for part in parts if part is not None for w in part.trainable_variables]


def _shapes(layer):
    return [tuple(w.shape) for w in _weights(layer)]


def _adam(variables, rate, steps):
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))
    optimizer.build(variables)
    return optimizer


def _bar(name, steps, verbose):
    if verbose:
        print(name)
    return keras.utils.Progbar(steps, verbose=verbose, unit_name="step")


class _Batches:
    """Inputs of calls, in order, as often as they are asked for."""

    def __init__(self, data, size):
        self._data, self._size = data, size
        self.count = sum(1 for _ in self)
        if not self.count:
            raise ValueError("`data` must hold at least one batch. Received: none")
        self.held_out = held_out_batches(self.count) or {0}
        self.fitted = set(range(self.count)) - held_out_batches(self.count)

    def __iter__(self):
        if isinstance(self._data, tf.data.Dataset):
            yield from self._data
            return
        rows = len(tf.nest.flatten(self._data)[0])
        for start in range(0, rows, self._size):
            some = slice(start, start + self._size)
            yield tf.nest.map_structure(lambda x, at=some: tf.convert_to_tensor(x[at]), self._data)

    def to_fit(self, first):
        """Batches to fit to, again and again, from the one of step number `first` on."""
        skipped = first % len(self.fitted)
        while True:
            for number, batch in enumerate(self):
                if number in self.fitted:
                    if not skipped:
                        yield batch
                    skipped = max(skipped - 1, 0)


class _LayerStage:
    """Calibration and training of one layer after the other on what the teacher's layers got."""

    def __init__(self, progress, settings, folder, verbose):
        self._progress, self._settings = progress, settings
        self._folder, self._verbose = folder, verbose

    def outputs_before(self, ends):
        """Errors of the outputs before all stages."""
        known = self._progress.result("before", [])
        if known is None:
            known = {AS_IT_WAS: ends.error()}
            self._progress.finish("before", [], known)
        return known

    def record(self, layers, teacher, batches):
        """Writes what reaches the teacher's layers, unless an earlier call has done so."""
        done = self._folder / "recorded"
        if not done.exists():
            record(self._folder, layers, teacher, batches)
            done.touch()

    def train(self, number, layer, name):
        """Trains a layer; a `LayerReport` under a name."""
        stage, weights = f"layer_{number}", _weights(layer)
        known = self._progress.result(stage, weights)
        if known is not None:
            return LayerReport.from_dict(known)
        self._progress.begin(stage, weights)
        recording = Recording(self._folder, number)
        fit = _Fit(layer, recording, weights)
        errors, candidates = {AS_IT_WAS: fit.errors()}, {AS_IT_WAS: fit.values()}
        methods = [AS_IT_WAS] * fit.groups
        settings = self._settings
        if settings["calibration_steps"] is not None:
            some = recording.sequences(_SEQUENCES)
            methods = layer._fit_features(
                some.heads, some.masks, settings["calibration_steps"], settings["seed"]
            ).methods
            errors["calibrated"], candidates["calibrated"] = fit.errors(), fit.values()
        steps = settings["steps"]
        optimizer = _adam(weights, settings["learning_rate"], steps)
        self._progress.train(
            stage,
            lambda step: fit.step(
                optimizer, np.random.default_rng([settings["seed"], number, step])
            ),
            steps,
            [*weights, *optimizer.variables],
            _bar(f"{name} ({number + 1})", steps, self._verbose),
        )
        errors["distilled"], candidates["distilled"] = fit.errors(), fit.values()
        chosen = fit.choose(errors, candidates)
        names = {AS_IT_WAS: [AS_IT_WAS] * fit.groups, "calibrated": methods}
        methods = [names.get(name, [name] * fit.groups)[g] for g, name in enumerate(chosen)]
        report = LayerReport(name, methods, errors[AS_IT_WAS], fit.errors(), errors)
        self._progress.finish(stage, weights, report.as_dict())
        return report


class _Fit:
    """The features of a layer, trained on a recording."""

    def __init__(self, layer, recording, weights):
        self._layer, self._recording, self._weights = layer, recording, weights
        self.groups = layer.learned_projection.key_projection.shape[0]
        self._train = tf.function(self._trained, autograph=False, reduce_retracing=True)
        self._measure = tf.function(self._distances, autograph=False, reduce_retracing=True)

    def values(self):
        """The weights as they are."""
        return [w.numpy() for w in self._weights]

    def step(self, optimizer, random):
        """One step on a few sequences; the loss."""
        batch = self._recording.some(random, _POSITIONS)
        return self._train(optimizer, *_tensors(batch), causal=batch.masks.causal)

    def errors(self):
        """Errors on the held-out sequences, float64 `[H]`."""
        sums = np.zeros((2, self._layer.num_heads))
        for place, rows in self._recording.held_out:
            for row in rows:
                batch = self._recording.read(place, [row])
                tensors = _tensors(batch)
                sums += np.array(self._measure(*tensors, causal=batch.masks.causal), float)
        wrong, informative = sums
        error = np.sqrt(wrong / np.maximum(informative, np.finfo(float).tiny))
        return np.where(np.isfinite(error), error, np.inf)

    def choose(self, errors, candidates):
        """Gives every key/value head the best weights; the names of what was chosen."""
        names = list(candidates)
        by_group = [np.mean(errors[n].reshape(self.groups, -1) ** 2, 1) for n in names]
        which = np.argmin(by_group, 0)
        for place, weight in enumerate(self._weights):
            # Of H query heads, or of G key/value heads: those of a group follow each other.
            parts = [candidates[n][place] for n in names]
            repeats = len(parts[0]) // self.groups
            weight.assign(
                np.concatenate(
                    [parts[w][g * repeats : (g + 1) * repeats] for g, w in enumerate(which)]
                )
            )
        return [names[w] for w in which]

    def _distances(self, heads, masks, exact, uniform, causal):
        """Squared distances of outputs and of uniform weights to exact attention, `[H]` each."""
        features = self._layer._features(training=False, with_draw=False)
        masks = masks._replace(causal=causal)
        query, key, value = heads
        most = self._layer._options.max_segments
        out, _ = attend(query, key, value, features, masks, max_segments=most)
        return [tf.reduce_sum((x - exact) ** 2, [0, 1, 3]) for x in (out, uniform)]

    def _trained(self, optimizer, heads, masks, exact, uniform, causal):
        values = [w.value for w in self._weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            wrong, informative = self._distances(heads, masks, exact, uniform, causal)
            loss = tf.reduce_mean(wrong / tf.maximum(informative, 1e-30))
        optimizer.apply(tape.gradient(loss, values), self._weights)
        return loss


def _tensors(batch):
    masks = batch.masks._replace(causal=False)
    return batch.heads, masks, batch.exact, batch.uniform


def _distance(teacher, student):
    """|student - teacher|^2 / |teacher - its mean|^2, the mean over several outputs."""
    found = []
    for a, b in zip(tf.nest.flatten(teacher), tf.nest.flatten(student), strict=True):
        a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
        spread = tf.reduce_sum((a - tf.reduce_mean(a, 0, keepdims=True)) ** 2)
        found.append(tf.reduce_sum((a - b) ** 2) / tf.maximum(spread, 1e-30))
    return tf.add_n(found) / len(found)


class _Ends:
    """The outputs of student and teacher on the same inputs."""

    def __init__(self, student, teacher, batches, loss):
        self._student, self._teacher = student, teacher
        self._batches, self._loss = batches, loss

    def error(self):
        """Mean loss on the held-out batches, its root where it is the default one."""
        losses = [
            float(
                self._loss(
                    self._teacher(batch, training=False), self._student(batch, training=False)
                )
            )
            for number, batch in enumerate(self._batches)
            if number in self._batches.held_out
        ]
        mean = float(np.mean(losses))
        return mean**0.5 if self._loss is _distance else mean

    def train(self, stage, weights, rate, steps, before, progress, verbose):
        """Trains weights of the student, or leaves them if that does not make `error` less.

        Returns:
            The error, which was `before`.
        """
        known = progress.result(stage, weights)
        if known is not None:
            return known["error"]
        progress.begin(stage, weights)
        begun = [w.numpy() for w in weights]
        optimizer = _adam(weights, rate, steps)
        batches = None

        @tf.function(autograph=False, reduce_retracing=True)
        def trained(batch):
            wanted = self._teacher(batch, training=False)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                for weight in weights:
                    tape.watch(weight.value)
                loss = self._loss(wanted, self._student(batch, training=False))
            optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
            return loss

        def step(number):
            nonlocal batches
            batches = self._batches.to_fit(number) if batches is None else batches
            return trained(next(batches))

        bar = _bar(stage, steps, verbose)
        progress.train(stage, step, steps, [*weights, *optimizer.variables], bar)
        after = self.error()
        if not after < before:  # NaN neither
            for weight, value in zip(weights, begun, strict=True):
                weight.assign(value)
            after = before
        progress.finish(stage, weights, {"error": after})
        return after


def _enable_lora(model, rank, seed):
    """Gives the dense layers of a model low-rank updates; their factors."""
    factors = []
    dense = (keras.layers.Dense, keras.layers.EinsumDense)
    for number, layer in enumerate(x for x in layers_inside(model) if isinstance(x, dense)):
        if not layer.lora_enabled:
            start = keras.initializers.HeUniform(seed=seed + number)
            layer.enable_lora(rank, a_initializer=start)
        factors += [layer.lora_kernel_a, layer.lora_kernel_b]
    return factors
