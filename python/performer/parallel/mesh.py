"""Which replica of a `tf.distribute` strategy has which part of which sequences."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import tensorflow as tf

from performer import checks
from performer.parallel.collectives import Group

_FIRST_GROUP_KEY = 0x50000000
_meshes = itertools.count()
_entered: list = []


class Mesh:
    """The replicas of a strategy as a table: rows are groups that share sequences.

    Replica r has part r % P of the sequences of row r // P, P = `sequence`. With P = 1 every
    replica has sequences of its own (data parallel); with as many as there are replicas all share
    each sequence; between them both.

    Args:
        strategy: `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`. Defaults to the
            strategy whose scope is entered.
        sequence: P, the number of replicas that share a sequence, a divisor of the strategy's
            replicas. Defaults to all.
        lengths: the lengths of the P parts, a list of integers of at least 1; `None` (default)
            where all parts are as long as each other.
        timeout: seconds after which an exchange in which a replica is missing ends with
            `tf.errors.DeadlineExceededError`. Defaults to 0: it waits for as long as the strategy
            knows of no failure.

    Raises:
        ValueError: an argument breaks its rule, or there is no strategy.
        TypeError: `strategy` is another object.

    Example:

    >>> import tensorflow as tf
    >>> from performer import parallel
    >>> mesh = parallel.Mesh(tf.distribute.MirroredStrategy(["CPU:0"]))
    >>> mesh.data, mesh.sequence
    (1, 1)
    """

    def __init__(self, strategy=None, *, sequence=None, lengths=None, timeout=0):
        if strategy is None:
            if not tf.distribute.has_strategy():
                raise ValueError(
                    "strategy must be given where no scope of a strategy is entered, got None"
                )
            strategy = tf.distribute.get_strategy()
        known = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
        if not isinstance(strategy, known):
            raise TypeError(
                "strategy must be a tf.distribute.MirroredStrategy or MultiWorkerMirroredStrategy, "
                f"got {type(strategy).__name__}"
            )
        replicas = strategy.num_replicas_in_sync
        sequence = replicas if sequence is None else checks.size("sequence", sequence)
        if replicas % sequence:
            raise ValueError(
                f"sequence must divide the {replicas} replicas of the strategy, got {sequence}"
            )
        if lengths is not None:
            lengths = [checks.size(f"lengths[{i}]", n) for i, n in enumerate(lengths)]
            if len(lengths) != sequence:
                raise ValueError(
                    f"lengths must have one entry for each of the {sequence} parts of a sequence, "
                    f"got {lengths}"
                )
        timeout = checks.number("timeout", timeout, zero=True)
        self._strategy, self._lengths, self._timeout = strategy, lengths, timeout
        self._sequence, self._data = sequence, replicas // sequence
        # Meshes are made in the same order in all processes; so their numbers agree.
        self._key = _FIRST_GROUP_KEY + next(_meshes) * 2**12
        self._tokens = []
        with tf.init_scope():
            for device in strategy.extended.worker_devices:
                with tf.device(device):
                    token = tf.raw_ops.VarHandleOp(
                        dtype=tf.float32, shape=[], shared_name=f"performer_{self._key}_{device}"
                    )
                    self._tokens.append(token)

    @property
    def strategy(self):
        """The strategy."""
        return self._strategy

    @property
    def sequence(self):
        """P, the number of replicas that share a sequence."""
        return self._sequence

    @property
    def data(self):
        """The number of groups of replicas; each group has sequences of its own."""
        return self._data

    @property
    def lengths(self):
        """The lengths of the parts, or None where they are equal."""
        return None if self._lengths is None else list(self._lengths)

    def index(self) -> int:
        """Which part of its sequences the calling replica has, 0 to P - 1.

        Raises:
            RuntimeError: it is not called in a replica of the mesh's strategy.
        """
        return self._replica() % self._sequence

    def row(self) -> int:
        """Which group the calling replica is in, 0 to `data` - 1; raises as `index`."""
        return self._replica() // self._sequence

    def start(self, length) -> Any:
        """Position of the first element of the calling replica's part of `length` elements.

        Args:
            length: int, or int scalar tensor: the length of its part.

        Raises:
            ValueError: another length than `lengths` says.
            RuntimeError: as `index`.
        """
        index = self.index()
        if self._lengths is None:
            return index * length
        self.check_length(length)
        return sum(self._lengths[:index])

    def total(self, length) -> Any:
        """Length of the whole sequence, of which the calling replica has `length` elements."""
        return self._sequence * length if self._lengths is None else sum(self._lengths)

    def check_length(self, length) -> None:
        """Refuses a part of another length than `lengths` says, where it is known."""
        expected = None if self._lengths is None else self._lengths[self.index()]
        if isinstance(length, int) and expected not in (None, length):
            raise ValueError(
                f"the part of replica {self.index()} of a sequence must have the length that the "
                f"mesh was given, {expected} of lengths={self._lengths}, got {length}"
            )

    def shard(self, x, axis=1):
        """The calling replica's part of a tensor that has the whole sequence on `axis`.

        Args:
            x: tensor, or a structure of tensors.
            axis: the axis of the sequence.

        Raises:
            ValueError: its length is no multiple of P, or not the sum of `lengths`.
            RuntimeError: as `index`.
        """
        index = self.index()
        return tf.nest.map_structure(lambda x: self._part(x, axis, index), x)

    def distribute(self, dataset, axis=1):
        """A dataset of whole batches as one for `fit` or for a loop over the strategy.

        Replica r is given rows r // P, of as many equal ones as `data` says, and of these the part
        r % P along `axis`. Every worker reads the whole dataset, which has to be the same on all.

        Args:
            dataset: `tf.data.Dataset` of structures of tensors `[B, L, ...]`; tensors with no
                `axis` are divided by rows only.
            axis: the axis of the sequence.

        Returns:
            `tf.distribute.DistributedDataset`.

        Raises:
            tf.errors.InvalidArgumentError: B is no multiple of `data`, or L not of P.
        """
        local = len(self._tokens)

        def parts(context):
            first = context.input_pipeline_id * local
            replicas = tf.data.Dataset.range(first, first + local)

            def of_replica(batch, replica):
                return tf.nest.map_structure(
                    lambda x: self._part_of_batch(tf.convert_to_tensor(x), axis, replica), batch
                )

            options = tf.data.Options()
            options.autotune.enabled = False
            given = dataset.flat_map(
                lambda *batch: replicas.map(
                    lambda r: of_replica(batch if len(batch) > 1 else batch[0], r)
                )
            ).with_options(options)
            # Where `fit` knows no number of batches it ends an epoch by a step that fails, and that
            # step counts in the optimizer.
            batches = dataset.cardinality()
            known = batches != tf.data.UNKNOWN_CARDINALITY
            if local == 1 and known:
                given = given.apply(tf.data.experimental.assert_cardinality(batches))
            return given

        return self._strategy.distribute_datasets_from_function(parts)

    def function(self, step):
        """`step` as a function that all replicas of the strategy run.

        It is `strategy.run` in a `tf.function`, with a `tf.function` of its own for each replica.
        That matters where a process has several replicas: TensorFlow puts the assertions of one
        function into one order, and those of one replica would wait for an exchange that waits for
        the other replica.

        Args:
            step: function of tensors, `tf.distribute` values or structures of them.

        Returns:
            Function of the same arguments, each replica's result as `strategy.run` returns it.

        Example:

        >>> import tensorflow as tf
        >>> from performer import parallel
        >>> mesh = parallel.Mesh(tf.distribute.MirroredStrategy(["CPU:0"]))
        >>> int(mesh.function(lambda x: x + mesh.index())(tf.constant(3)))
        3
        """
        of_replica = tf.function(step)

        @tf.autograph.experimental.do_not_convert
        def run(*args, **kwargs):
            return self._strategy.run(
                tf.autograph.experimental.do_not_convert(lambda *x, **y: of_replica(*x, **y)),
                args,
                kwargs,
            )

        return tf.function(run)

    def group(self) -> Group:
        """The group of the calling replica; raises as `index`."""
        replica = self._replica()
        local = replica % len(self._tokens)
        if tf.executing_eagerly() and len(self._tokens) > 1:
            raise RuntimeError(
                "replicas of one process take turns when they run eagerly, and none would end its "
                "exchange with the others: run them by `performer.parallel.Mesh.function`"
            )
        return Group(
            self._sequence,
            replica % self._sequence,
            self._key + replica // self._sequence,
            self._tokens[local],
            self._timeout,
        )

    def has_caller(self) -> bool:
        """Whether the caller is a replica of the strategy."""
        context = tf.distribute.get_replica_context()
        return context is not None and context.strategy is self._strategy

    def _replica(self) -> int:
        if not self.has_caller():
            raise RuntimeError(
                "parts of a sequence exist in the replicas of the mesh's strategy: call this in a "
                "function that strategy.run runs"
            )
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return replica if isinstance(replica, int) else int(tf.get_static_value(replica))

    def _part(self, x, axis, index):
        """Part `index` (an int) of x along `axis`."""
        x = tf.convert_to_tensor(x)
        length = x.shape[axis]
        if self._lengths is None:
            if length is not None and length % self._sequence:
                raise ValueError(
                    f"axis {axis} must have a length that is a multiple of the {self._sequence} "
                    f"parts of a sequence, got shape {x.shape}. A mesh with `lengths` has parts "
                    "of other lengths"
                )
            return tf.split(x, self._sequence, axis)[index]
        if length is not None and length != sum(self._lengths):
            raise ValueError(
                f"axis {axis} must have the length {sum(self._lengths)}, the sum of "
                f"lengths={self._lengths}, got shape {x.shape}"
            )
        return tf.split(x, self._lengths, axis)[index]

    def _part_of_batch(self, x, axis, replica):
        """What `replica` (a tensor) is given of a whole batch."""
        rows = tf.stack(tf.split(x, self._data, 0))[replica // self._sequence]
        if x.shape.rank <= axis or self._sequence == 1:
            return rows
        parts = [
            lambda index=index: self._part(rows, axis, index) for index in range(self._sequence)
        ]
        return tf.switch_case(tf.cast(replica % self._sequence, tf.int32), parts)


@contextlib.contextmanager
def sequence(mesh):
    """A scope in which layers attend over whole sequences of which each replica has a part.

    In it, linear `Performer` layers and the blocks made of them exchange states with the other
    replicas of their group, and count positions from the start of the whole sequence; so do
    `PositionEmbedding` and `TokenAndPositionEmbedding`. Calls outside of replicas of the mesh's
    strategy are not changed. A `tf.function` keeps what it was traced with: trace it in the scope.

    Args:
        mesh: `Mesh`.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a performer.parallel.Mesh, got {type(mesh).__name__}")
    _entered.append(mesh)
    try:
        yield mesh
    finally:
        _entered.remove(mesh)


def current() -> Mesh | None:
    """The mesh over which a call of this replica attends, or None where there is nothing to share.

    The scope is one of the process, because a strategy runs its replicas in threads of their own.
    """
    for mesh in reversed(_entered):
        if mesh.has_caller():
            return mesh if mesh.sequence > 1 else None
    return None
