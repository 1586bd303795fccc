"""Normal noise on the leaves of a tree, quick to run and quick to compile.

Every element of every leaf has a draw of its own: a pure function of the key, the step,
the leaf's name and the element's index in the leaf. It depends neither on the other
leaves nor on the number of devices, and a device computes the draws of its own shard
and nothing else.

The leaf's key is ``fold_in(key, step)`` hashed with 64 bits of the name's BLAKE2b, for
all leaves in one call. With a threefry2x32 key, as JAX's are by default, the draws are
those of :mod:`optloss.normals`: of the same law as ``jax.random.normal``, but **not the
same numbers**, which take five times as long on a CPU. With a key of any other
implementation ``jax.random`` draws.

Three habits of XLA's CPU compiler shape :func:`add_normals`:

* It computes a draw again in each kernel that reads the noisy gradient, unless the draw
  stands in a branch; a barrier is dropped. Noise and Adam without a clip drew thrice.
* It takes a tenth of a second for the code of one draw, so all small leaves are drawn
  in one piece, as the rows of one matrix, each leaf from a row of its own.
* Kernels that are alike are compiled once, so what tells two leaves apart is a number
  that XLA cannot know: with 400 leaves the chain of noise, clip and Adam compiles in a
  tenth of the time that it takes with ``optax.add_noise``.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optloss.mesh import explicit_sharding, is_whole
from optloss.normals import (
    CUT,
    SIGN,
    counters,
    normals,
    threefry,
)

THREEFRY = "threefry2x32"

SMALL = 2**14
"""Largest number of elements of a leaf that is drawn together with others."""

WIDTH = 256
"""Elements of a row of the matrix in which small leaves are drawn."""


class Rows(NamedTuple):
    """Leaves that lie in one matrix, each from the start of a row of its own."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def counts(self, width: int) -> list[int]:
        """Return how many rows of ``width`` elements each leaf takes."""
        return [-(-size // width) for size in self.sizes]


class Law(NamedTuple):
    """Which distribution is drawn, by which implementation."""

    impl: Any
    distribution: str


def split_key(key: Any) -> tuple[jax.Array, Any]:
    """Return the words of ``key``, a seed, a typed or a raw key, and what made them."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raw = getattr(key, "ndim", 0) > 0
        key = jax.random.wrap_key_data(key) if raw else jax.random.key(key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def add_normals(
    leaves: Sequence[jax.Array],
    std: Any,
    key_data: jax.Array,
    impl: Any,
    step: jax.Array,
    names: Sequence[str | Rows],
    *,
    distribution: str = "normal",
    salts: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Add ``std`` times a standard normal draw to each leaf.

    Args:
        leaves: Floating or complex arrays ``[*shape]``. Noise is added in float32 to
            half precision; a complex draw has a mean square of 1, like JAX's.
        std: A real scalar. Where it is 0 the leaves keep their bits.
        key_data: The words of a key, from :func:`split_key`.
        impl: Its implementation.
        step: int32 ``[]``, >= 0: how many draws there were before.
        names: The name of each leaf; for a matrix that holds several, :class:`Rows`.
            Elements of the matrix that belong to no leaf stay as they are.
        distribution: ``"normal"``, or ``"truncated_normal"``: redrawn beyond 2, with a
            standard deviation of 0.8796.
        salts: For each leaf a uint32 scalar that enters its key, such as the index of a
            shard, or ``None``. Leaves that share one should share the very array.

    Returns:
        The noisy leaves, of the same shapes and dtypes.
    """
    if not leaves:
        return []
    salts = [None] * len(leaves) if salts is None else salts
    different = {id(salt): salt for salt in salts}
    noisy: list[jax.Array] = _add(
        list(leaves),
        jnp.asarray(std),
        key_data,
        jnp.asarray(step),
        list(different.values()),
        law=Law(impl, distribution),
        names=tuple(names),
        salted=tuple(list(different).index(id(salt)) for salt in salts),
    )
    return noisy


# Outside of jit the branches of _once would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("law", "names", "salted"))
def _add(
    leaves: list[jax.Array],
    std: jax.Array,
    key_data: jax.Array,
    step: jax.Array,
    salts: list[jax.Array | None],
    *,
    law: Law,
    names: tuple[str | Rows, ...],
    salted: tuple[int, ...],
) -> list[jax.Array]:
    # The second half is always so, which XLA cannot know where the first is constant.
    live = (std != 0) & (step >= 0)
    root = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=law.impl), step)
    lists = [name.names if isinstance(name, Rows) else (name,) for name in names]
    tables = [_key_table(root, salt, lists) for salt in salts]
    places = np.cumsum([0, *map(len, lists)], dtype=np.uint32)[:-1]
    groups = _groups(leaves, names, salted) if law.impl == THREEFRY else []
    noisy: dict[int, jax.Array] = {}
    for group in groups:
        members = [leaves[i] for i in group]
        table = tables[salted[group[0]]][places[group]]
        noisy |= zip(group, _add_together(members, std, table, law, live), strict=True)
    alone = sorted(set(range(len(leaves))).difference(*groups))
    keys = [
        lax.dynamic_slice_in_dim(tables[salted[i]], place, len(lists[i]))
        for i, place in zip(alone, _unknown(places[alone], live), strict=True)
    ]
    members, own_names = [leaves[i] for i in alone], [names[i] for i in alone]
    sums = _add_one_by_one(members, std, keys, own_names, law, live)
    noisy |= zip(alone, sums, strict=True)
    return [noisy[i] for i in range(len(leaves))]


def _add_one_by_one(
    leaves: list[jax.Array],
    std: jax.Array,
    keys: list[jax.Array],
    names: list[str | Rows],
    law: Law,
    live: jax.Array,
) -> list[jax.Array]:
    def noisy() -> list[jax.Array]:
        return [
            _plus(leaf, std, _draw(law, key, leaf, name, _wide(leaf.dtype)))
            for leaf, key, name in zip(leaves, keys, names, strict=True)
        ]

    def silent() -> list[jax.Array]:
        # A branch that returned the leaf itself would have it copied.
        return [jnp.where(std != 0, std.astype(x.dtype), x) for x in leaves]

    def either() -> list[jax.Array]:
        sums = zip(leaves, noisy(), strict=True)
        return [jnp.where(std != 0, some, leaf) for leaf, some in sums]

    sums: list[jax.Array] = _once(noisy, silent, live, either)
    return sums


def _add_together(
    leaves: list[jax.Array], std: jax.Array, keys: jax.Array, law: Law, live: jax.Array
) -> list[jax.Array]:
    rows = Rows(("",) * len(leaves), tuple(leaf.size for leaf in leaves))
    counts, dtype = rows.counts(WIDTH), _wide(leaves[0].dtype)
    like = jax.ShapeDtypeStruct((sum(counts), WIDTH), dtype)

    def draw() -> jax.Array:
        return _draw(law, keys, like, rows, dtype)

    def zeros() -> jax.Array:
        # Of the keys' type, which tells over which mesh axes the draws vary.
        return jnp.broadcast_to((keys[0, 0] & 0).astype(dtype), like.shape)

    matrix = _once(draw, zeros, live, lambda: lax.optimization_barrier(draw()))
    starts = np.cumsum([0, *counts], dtype=np.uint32)[:-1] * np.uint32(WIDTH)
    pieces = [
        lax.dynamic_slice_in_dim(matrix.reshape(-1), start, leaf.size)
        for leaf, start in zip(leaves, _unknown(starts, live), strict=True)
    ]
    # Without noise a leaf keeps its bits: -0.0 + 0 is 0.0, and so is 1e-40 + 0 here.
    return [
        jnp.where(std != 0, _plus(leaf, std, z.reshape(leaf.shape)), leaf)
        for leaf, z in zip(leaves, pieces, strict=True)
    ]


def _plus(leaf: jax.Array, std: jax.Array, z: jax.Array) -> jax.Array:
    noise = std.astype(jnp.finfo(z.dtype).dtype) * z
    return (leaf.astype(z.dtype) + noise).astype(leaf.dtype)


def _once(
    active: Callable[[], Any],
    idle: Callable[[], Any],
    live: jax.Array,
    elsewhere: Callable[[], Any],
) -> Any:
    """Return on a CPU ``active()`` by a branch, on other devices ``elsewhere()``."""
    return lax.platform_dependent(
        cpu=lambda: lax.cond(live, active, idle), default=elsewhere
    )


def _unknown(numbers: np.ndarray[Any, Any], live: jax.Array) -> list[jax.Array]:
    """Return ``numbers`` as scalars that XLA cannot fold into kernels they go to."""

    def known() -> list[jax.Array]:
        return [jnp.uint32(number) for number in numbers]

    def zeros() -> list[jax.Array]:
        return [jnp.uint32(0) for _ in numbers]

    scalars: list[jax.Array] = _once(known, zeros, live, known)
    return scalars


def _key_table(
    root: jax.Array, salt: jax.Array | None, lists: list[tuple[str, ...]]
) -> jax.Array:
    """Return the words ``[names, words]`` of the keys of all names."""
    names = [name for several in lists for name in several]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    words = jnp.asarray(np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2))
    root = root if salt is None else jax.random.fold_in(root, salt)
    # Of fold_in a vmap is not safe: unsafe_rbg's depends on the size of the batch.
    data = jax.random.key_data(root)
    halves = jnp.pad(data.reshape(-1), (0, data.size % 2)).reshape(-1, 2)
    hashed = [
        jnp.concatenate(threefry((k0, k1), (words[:, 0], words[:, 1]), rounds=20))
        for k0, k1 in halves
    ]
    table = jnp.stack(hashed).reshape(-1, len(names)).T
    return table[:, : data.size].reshape(-1, *data.shape)


def _groups(
    leaves: list[jax.Array], names: tuple[str | Rows, ...], salted: tuple[int, ...]
) -> list[list[int]]:
    """Return which leaves are drawn together: small ones of one dtype and salt."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.size <= SMALL and is_whole(leaf) and isinstance(names[i], str):
            groups.setdefault((_wide(leaf.dtype), salted[i]), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _draw(
    law: Law, key: jax.Array, like: Any, name: str | Rows, dtype: Any, part: int = 0
) -> jax.Array:
    """Return a draw of the shape of ``like``; ``part`` is 1 for an imaginary part."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = jnp.finfo(dtype).dtype
        parts = [_draw(law, key, like, name, real, part) for part in (0, 1)]
        return lax.complex(*parts) * math.sqrt(0.5)
    if law.impl != THREEFRY:
        return _draw_by_jax(law, key, like, name, dtype, part)
    if isinstance(name, Rows):
        return _draw_rows(law, key, like.shape, name, dtype, part)
    high, low = counters(like)
    count = (high | jnp.uint32(part * SIGN), low)
    return _normals((key[0, 0], key[0, 1]), count, dtype, law.distribution)


# Leaves of one shape are traced once.
_normals: Callable[..., jax.Array] = jax.jit(normals, static_argnums=(2, 3))


def _draw_rows(
    law: Law, key: jax.Array, shape: tuple[int, int], rows: Rows, dtype: Any, part: int
) -> jax.Array:
    width, counts = shape[1], rows.counts(shape[1])
    owners = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([np.arange(count) * width for count in counts])
    filled = np.minimum(np.take(rows.sizes, owners) - first, width)
    column = lax.broadcasted_iota(jnp.uint32, shape, 1)
    low = column + first[:, None].astype(np.uint32)
    words = (key[owners, 0][:, None], key[owners, 1][:, None])
    z = _normals(words, (jnp.uint32(part * SIGN), low), dtype, law.distribution)
    return jnp.where(column < filled[:, None].astype(np.uint32), z, 0)


def _draw_by_jax(
    law: Law, key: jax.Array, like: Any, name: str | Rows, dtype: Any, part: int
) -> jax.Array:
    keys = jax.random.wrap_key_data(key, impl=law.impl)

    def draw(i: int, shape: tuple[int, ...], sharding: Any = None) -> jax.Array:
        own = jax.random.fold_in(keys[i], part) if part else keys[i]
        if law.distribution == "normal":
            return jax.random.normal(own, shape, dtype, out_sharding=sharding)
        return jax.random.truncated_normal(
            own, -CUT, CUT, shape, dtype, out_sharding=sharding
        )

    if isinstance(name, str):
        return draw(0, like.shape, explicit_sharding(like))
    pieces = [draw(i, (size,)) for i, size in enumerate(name.sizes)]
    padded = [jnp.pad(piece, (0, -piece.size % like.shape[1])) for piece in pieces]
    return jnp.concatenate(padded).reshape(like.shape)
