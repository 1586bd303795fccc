"""Summaries in TensorBoard, without TensorFlow: a thread fetches and writes them."""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from optloss.histograms import Histogram
from optloss.mesh import is_deleted, is_traced
from optloss.messages import (
    argument_error,
    check_int,
    is_array,
    is_encodable,
    is_number,
    is_real,
    quoted,
    refusal,
    short_repr,
)
from optloss.summaries import without_repeats
from optloss.typing import PyTree

try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import directory_check
except ImportError as error:
    raise ImportError(
        "optloss.integrations.tensorboard needs tensorboardX. Install it: "
        "pip install 'optloss[tensorboard]'"
    ) from error

# Their classes are made on import, which no type checker sees.
events: Any = event_pb2
protos: Any = summary_pb2

# A loop that is faster than the disk waits from here on, rather than fill the memory.
MOST_PENDING = 1000

LARGEST_STEP = 2**63 - 1
LARGEST_NUMBER = 2**1023  # of a float64


class SummaryWriter:
    """Write summaries to an event file that TensorBoard shows.

    A call of :meth:`write` costs the training loop a copy on the device: nothing is
    fetched, waited for or written in the calling thread. Of several processes only the
    first writes; the others may make the same calls.

    Args:
        logdir: Folder for the event file; made if need be. Every writer has a file of
            its own, so a resumed run may go on in the same folder.
        every: Write only the steps that are multiples of it, >= 1.

    Raises:
        ValueError: If ``logdir`` is no path, or ``every`` no int >= 1.

    Note:
        Use it in a ``with`` block, or call :meth:`close`: only then is everything on
        disk. A loop that is a thousand writes ahead of the disk waits for it.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> with SummaryWriter(tempfile.mkdtemp(), every=10) as writer:
        ...     for step in range(100):
        ...         writer.write(step, {"loss": jnp.float32(1 / (1 + step))})

    See also:
        :func:`optloss.get_summaries`, :func:`optloss.histogram`.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, every: int = 1) -> None:
        if not _is_path(logdir):
            raise argument_error("SummaryWriter", "logdir", logdir, "must be a path.")
        self._every = check_int("SummaryWriter", "every", every, 1, "an int >= 1.")
        self._closed = False
        self._worker = _Worker(logdir) if jax.process_index() == 0 else None
        stop = (lambda: None) if self._worker is None else self._worker.stop
        self._stop = weakref.finalize(self, stop)

    def write(self, step: int, summaries: Mapping[str, PyTree]) -> None:
        """Hand the summaries of ``step`` over, to be written soon.

        Args:
            step: Where they stand on TensorBoard's axis, a Python int. For stacked
                summaries, the first of their steps.
            summaries: Dict from tag to real scalar ``[]`` or to
                :class:`optloss.Histogram`, such as ``output.summaries``; or all of them
                stacked by ``jax.lax.scan``, with one more leading axis ``[steps]``. A
                histogram that counted nothing is left out. The rate and the norms,
                which ``output.summaries | get_summaries(state)`` has twice, are written
                once.

        Raises:
            ValueError: If the writer is closed, ``step`` is no int, or a value is none
                of these.
            OSError: If something handed over before could not be written.
        """
        call = "SummaryWriter.write"
        self._check_usable(call)
        wanted = (
            "a Python int of 64 bits. Count the steps in Python: reading one "
            "from the device would wait for it."
        )
        step = check_int(call, "step", step, -LARGEST_STEP, wanted, LARGEST_STEP)
        count = _check_summaries(summaries)
        if count is not None:
            check_int(call, "step", step + count, -LARGEST_STEP, wanted, LARGEST_STEP)
        first = -step % self._every
        rows = range(first, 1 if count is None else count, self._every)
        if self._worker is not None and summaries and rows:
            steps = {step + row: None if count is None else row for row in rows}
            packed = _pack(without_repeats(summaries))
            self._worker.submit(_Pending(time.time(), steps, packed))

    def flush(self) -> None:
        """Wait until all that was handed over is on disk."""
        if self._worker is not None and not self._closed:
            self._check_usable("SummaryWriter.flush")
            self._worker.flush()

    def _check_usable(self, call: str) -> None:
        if self._closed:
            raise refusal(call, "the writer is closed. Make another SummaryWriter.")
        if self._worker is not None and self._worker.is_elsewhere:
            raise refusal(
                call,
                "the writer belongs to the process that this one was forked from. Make "
                "another SummaryWriter here.",
            )

    def close(self) -> None:
        """Wait until all that was handed over is on disk, and close the file."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Packed(NamedTuple):
    """Summaries whose device arrays are joined, those of a dtype into one vector."""

    structure: Any
    leaves: list[PyTree]  # what lives on the host; of the others, the shapes
    places: list[list[int]]  # for each vector, the leaves it is made of
    vectors: list[jax.Array]


class _Pending(NamedTuple):
    """What was handed over in one call."""

    wall_time: float
    steps: dict[int, int | None]  # from step to its row in stacked summaries
    packed: _Packed


class _Worker:
    """The thread that fetches and writes, and the file it writes to."""

    numbers = itertools.count()

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        directory_check(os.fspath(logdir))
        suffix = f".{os.getpid()}.{next(self.numbers)}"
        self._file = EventsWriter(os.path.join(logdir, "events"), suffix)
        self._queue: queue.Queue[_Pending | None] = queue.Queue(MOST_PENDING)
        self._failure: Exception | None = None
        self._process = os.getpid()
        # A daemon, for whoever forgets to close: else the interpreter would never end.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process was forked: its copy has no thread to wait for."""
        return self._process != os.getpid()

    def submit(self, pending: _Pending) -> None:
        self._raise_failure()
        self._queue.put(pending)

    def flush(self) -> None:
        self._queue.join()
        self._file.flush()
        self._raise_failure()

    def stop(self) -> None:
        if self.is_elsewhere:
            return
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        self._raise_failure()

    def _run(self) -> None:
        while (pending := self._queue.get()) is not None:
            try:
                self._write(pending)
            except Exception as failure:
                self._failure = failure
            self._queue.task_done()

    def _write(self, pending: _Pending) -> None:
        summaries = _unpack(pending.packed)
        for step, row in pending.steps.items():
            values = [_proto(tag, _row(value, row)) for tag, value in summaries.items()]
            summary = protos.Summary(
                value=[value for value in values if value is not None]
            )
            event = events.Event(
                wall_time=pending.wall_time, step=step, summary=summary
            )
            self._file.write_event(event)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _is_path(value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = os.fspath(value)
    return isinstance(path, str) and "\0" not in path


def _check_summaries(summaries: object) -> int | None:
    """Return how many steps ``summaries`` were stacked of; None if they were not."""
    if not isinstance(summaries, Mapping):
        raise argument_error(
            "SummaryWriter.write",
            "summaries",
            summaries,
            "must be a dict from tag to value, such as output.summaries.",
        )
    shapes = sorted({_check_value(tag, value) for tag, value in summaries.items()})
    if len(shapes) > 1:
        raise refusal(
            "SummaryWriter.write",
            f"the summaries have the shapes {shapes[0]} and {shapes[1]}. All must be "
            "of one step, or stacked of equally many.",
        )
    return shapes[0][0] if shapes and shapes[0] else None


def _check_value(tag: object, value: object) -> tuple[int, ...]:
    call = f"SummaryWriter.write(summaries[{quoted(tag)}]={short_repr(value)})"
    parts = value.tree_flatten()[0] if isinstance(value, Histogram) else (value,)
    if any(map(is_traced, parts)):
        raise refusal(
            call, "is traced. Return it from the jitted function, then write it."
        )
    if any(map(is_deleted, parts)):
        raise refusal(
            call,
            "was donated to a later step, and is deleted. Write it before that step.",
        )
    shape = _shape(value) if len(parts) == 1 else _histogram_shape(*parts)
    named = isinstance(tag, str) and is_encodable(tag)
    if shape is None or len(shape) > 1 or not named:
        raise refusal(
            call,
            "must be a real scalar or a Histogram under a str, or those of several "
            "steps stacked by jax.lax.scan.",
        )
    return shape


def _shape(value: object) -> tuple[int, ...] | None:
    """Return the shape of real numbers, None where ``value`` is no such array."""
    if isinstance(value, bool) or (is_number(value) and abs(value) < LARGEST_NUMBER):
        return ()
    if not (is_array(value) or isinstance(value, np.generic)):
        return None
    if not (is_real(value.dtype) or jnp.issubdtype(value.dtype, np.bool_)):
        return None
    return tuple(value.shape)


def _histogram_shape(*parts: object) -> tuple[int, ...] | None:
    """Return the leading dimensions that all parts have, None if they do not fit."""
    *scalars, limits, counts = map(_shape, parts)
    if any(one is None or one != scalars[0] for one in scalars) or not counts:
        return None
    if (parts[-2] is not None and limits != counts) or counts[:-1] != scalars[0]:
        return None
    return scalars[0]


def _pack(summaries: dict[str, PyTree]) -> _Packed:
    """Return copies that outlive a donation, few and on their way to the host."""
    leaves, structure = jax.tree.flatten(summaries)
    homes: dict[tuple[Sharding, np.dtype[np.generic]], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            leaves[i] = _on_one_device(leaf)
            homes.setdefault((leaves[i].sharding, leaf.dtype), []).append(i)
        else:
            leaves[i] = np.array(leaf)
    vectors: list[jax.Array] = [_join([leaves[i] for i in at]) for at in homes.values()]
    with jax.transfer_guard_device_to_host("allow"):
        for vector in vectors:
            vector.copy_to_host_async()
    for i in itertools.chain(*homes.values()):
        leaves[i] = leaves[i].shape
    return _Packed(structure, leaves, list(homes.values()), vectors)


def _on_one_device(leaf: jax.Array) -> jax.Array:
    if not leaf.is_fully_replicated:
        leaf = jax.device_put(leaf, leaf.addressable_shards[0].device)
    # The type of an array with Explicit axes outlives the move; that of its shard not.
    return leaf.addressable_data(0)


@jax.jit
def _join(arrays: list[jax.Array]) -> jax.Array:
    # Without the copy a lone vector would come back as it was, buffer and all.
    return jnp.copy(jnp.concatenate([jnp.ravel(array) for array in arrays]))


def _unpack(packed: _Packed) -> dict[str, PyTree]:
    leaves = list(packed.leaves)
    with jax.transfer_guard_device_to_host("allow"):
        vectors = jax.device_get(packed.vectors)
    for vector, places in zip(vectors, packed.places, strict=True):
        ends = np.cumsum([math.prod(leaves[i]) for i in places])
        for i, part in zip(places, np.split(vector, ends[:-1]), strict=True):
            leaves[i] = part.reshape(leaves[i])
    return jax.tree.unflatten(packed.structure, leaves)


def _row(value: PyTree, row: int | None) -> PyTree:
    return value if row is None else jax.tree.map(lambda field: field[row], value)


def _proto(tag: str, value: PyTree) -> Any:
    if not isinstance(value, Histogram):
        return protos.Summary.Value(tag=tag, simple_value=float(value))
    if value.num == 0:
        return None
    # Of a run of empty buckets only the last says something: where the next one begins.
    counted = value.bucket_counts > 0
    kept = counted | np.append(counted[1:], False)
    histo = protos.HistogramProto(
        min=float(value.min),
        max=float(value.max),
        num=float(value.num),
        sum=float(value.sum),
        sum_squares=float(value.sum_squares),
        bucket_limit=value.bucket_limits[kept].tolist(),
        bucket=value.bucket_counts[kept].tolist(),
    )
    return protos.Summary.Value(tag=tag, histo=histo)
