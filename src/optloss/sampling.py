r"""Standard normal draws for the leaves of a tree, quick to run and quick to compile.

Every element of every leaf has a draw of its own: a pure function of the key, the step,
the leaf's name and the element's index in the leaf. It depends neither on the other
leaves nor on the number of devices, and a device computes the draws of its own shard
and nothing else.

The leaf's key is ``fold_in(key, step)`` hashed with 64 bits of the name's BLAKE2b. Under
it the element's index is hashed by threefry2x32, here with 13 rounds (JAX has 20, and
from 13 on no statistical flaw is known), and the two words :math:`r_0, r_1` that come
out make one normal by the method of Box and Muller,

.. math:: z = \sqrt{-2 \ln u} \, \sin(\tfrac{\pi}{2} x), \qquad
    u = 2^{-32} (r_0 + \tfrac{1}{2}), \quad x = 2^{-31} r_1

with :math:`r_1` read as a signed number; logarithm and sine are polynomials of our own,
:math:`z` is right to 3e-6 of itself and at most 6.77. The truncated normal is the
inverse of its distribution function at :math:`2^{-31} r_0`, a rational function in the
manner of Giles. Of the same law as ``jax.random.normal`` these are **other numbers**: on
a CPU, JAX takes six times as long for its own, because it runs threefry as loops
through memory. float64 is drawn by the inverse of the distribution function at 63 bits,
a complex number as two draws; with a key of another implementation than threefry2x32
``jax.random`` draws.

Three habits of XLA's CPU compiler shape :func:`add_normals`. It computes a draw again in
each kernel that reads the noisy gradient, unless the draw stands in a branch. It takes a
tenth of a second for the code of a draw, so the small leaves are drawn as the rows of
one matrix, each from a row of its own. And it compiles kernels that are alike only
once, so what tells two leaves apart reaches their kernels as a number it cannot know.

References:
    Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*, 2011;
    on the rounds, the notes in ``threefry.h`` of their library Random123. Box and
    Muller, *A note on the generation of random normal deviates*, 1958. Giles,
    *Approximating the erfinv function*, 2010; our rational is in :math:`1 - x^2`.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import lax

Distribution = Literal["normal", "truncated_normal"]

THREEFRY = "threefry2x32"
ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
SIGN = 0x80000000

CUT = 2.0
CUT_PROBABILITY = math.erf(CUT / math.sqrt(2.0))

# Minimax fits: 2 (log(2) y - log(1 + y)) / (y - y^2) on [0, 1], of sin(pi x / 2) / x in
# x^2, and of the quantile divided by x in 1 - x^2.
LOG = (
    *(-0.613619149, 0.384377688, -0.266091764),
    *(0.168217883, -0.0754438043, 0.0162659865),
)
SINE = (1.57079482, -0.645921111, 0.07948789, -0.00436257431)
NUMERATOR = (3.02733469, 89.9695969, 320.046387, 144.597488)
DENOMINATOR = (1.0, 41.5741997, 214.666946, 176.562958, 11.1290379)

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
    """What is drawn from what."""

    impl: Any
    distribution: Distribution


def split_key(key: Any) -> tuple[jax.Array, Any]:
    """Return the words of ``key`` (a seed, a typed or a raw key) and its implementation."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raw = getattr(key, "ndim", 0) > 0
        key = jax.random.wrap_key_data(key) if raw else jax.random.key(key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def draw_normals(
    key_data: jax.Array,
    impl: Any,
    step: jax.Array,
    names: Sequence[str | Rows],
    likes: Sequence[jax.Array],
    *,
    distribution: Distribution = "normal",
    salts: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Return what :func:`add_normals` adds to ``likes`` where ``std`` is 1.

    The draws are float32 for half precision.
    """
    zeros = [jnp.zeros_like(like, _wide(like.dtype)) for like in likes]
    return add_normals(
        zeros, 1.0, key_data, impl, step, names, distribution=distribution, salts=salts
    )


def add_normals(
    leaves: Sequence[jax.Array],
    std: Any,
    key_data: jax.Array,
    impl: Any,
    step: jax.Array,
    names: Sequence[str | Rows],
    *,
    distribution: Distribution = "normal",
    salts: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Add ``std`` times a standard normal draw to each leaf.

    Args:
        leaves: Floating or complex arrays ``[*shape]``. Noise is added in float32 to
            half precision; a complex draw has a mean square of 1, like JAX's.
        std: A real scalar. Where it is 0 nothing is drawn.
        key_data: The words of a key, from :func:`split_key`.
        impl: Its implementation.
        step: int32 ``[]``, >= 0: how many draws there were before.
        names: The name of each leaf; for a matrix that holds several, its :class:`Rows`.
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
    return _add(
        list(leaves),
        jnp.asarray(std),
        key_data,
        jnp.asarray(step),
        list(different.values()),
        law=Law(impl, distribution),
        names=tuple(names),
        salted=tuple(list(different).index(id(salt)) for salt in salts),
    )


# Traced once for all calls alike, outside of jit, too.
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
    live = (std != 0) & (step >= 0)
    root = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=law.impl), step)
    lists = [name.names if isinstance(name, Rows) else (name,) for name in names]
    tables = [_key_table(root, salt, lists) for salt in salts]
    places = np.cumsum([0, *map(len, lists)], dtype=np.uint32)[:-1]
    groups = _groups(leaves, names, salted) if law.impl == THREEFRY else []
    noisy: dict[int, jax.Array] = {}
    for group in groups:
        members = [leaves[i] for i in group]
        keys = tables[salted[group[0]]][places[group]]
        noisy |= zip(group, _add_together(members, std, keys, law, live), strict=True)
    alone = sorted(set(range(len(leaves))).difference(*groups))
    slots = _unknown(places[alone], live)
    keys = [
        lax.dynamic_slice_in_dim(tables[salted[i]], slot, len(lists[i]))
        for i, slot in zip(alone, slots, strict=True)
    ]
    members = [leaves[i] for i in alone]
    sums = _add_alone(members, std, keys, [names[i] for i in alone], law, live)
    noisy |= zip(alone, sums, strict=True)
    return [noisy[i] for i in range(len(leaves))]


def _add_alone(
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

    return _once(noisy, silent, live, noisy)


def _add_together(
    leaves: list[jax.Array],
    std: jax.Array,
    keys: jax.Array,
    law: Law,
    live: jax.Array,
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
    starts = np.cumsum([0, *counts], dtype=np.uint32)[:-1] * WIDTH
    pieces = [
        lax.dynamic_slice_in_dim(matrix.reshape(-1), start, leaf.size)
        for leaf, start in zip(leaves, _unknown(starts, live), strict=True)
    ]
    return [
        _plus(leaf, std, z.reshape(leaf.shape))
        for leaf, z in zip(leaves, pieces, strict=True)
    ]


def _once(
    active: Callable[[], Any],
    idle: Callable[[], Any],
    live: jax.Array,
    elsewhere: Callable[[], Any],
) -> Any:
    """Return ``active()``, on a CPU in a branch that XLA can see neither way through."""
    return lax.platform_dependent(
        cpu=lambda: lax.cond(live, active, idle), default=elsewhere
    )


def _unknown(numbers: np.ndarray[Any, Any], live: jax.Array) -> list[jax.Array]:
    """Return ``numbers`` as scalars that XLA cannot fold into the kernels they go to."""

    def known() -> list[jax.Array]:
        return [jnp.uint32(number) for number in numbers]

    def zeros() -> list[jax.Array]:
        return [jnp.uint32(0) for _ in numbers]

    return _once(known, zeros, live, known)


def _plus(leaf: jax.Array, std: jax.Array, z: jax.Array) -> jax.Array:
    noise = std.astype(jnp.finfo(z.dtype).dtype) * z
    return (leaf.astype(z.dtype) + noise).astype(leaf.dtype)


def _key_table(
    root: jax.Array, salt: jax.Array | None, lists: list[tuple[str, ...]]
) -> jax.Array:
    """Return the words ``[names, words]`` of the keys of all names."""
    names = [name for several in lists for name in several]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    words = jnp.asarray(np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2))
    root = root if salt is None else jax.random.fold_in(root, salt)
    if jax.random.key_impl(root) == THREEFRY:
        data = jax.random.key_data(root)
        hashed = jax.extend.random.threefry_2x32(
            (data[0], data[1]), words.T.reshape(-1)
        )
        return hashed.reshape(2, -1).T

    def key_of(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1])

    return jax.random.key_data(jax.vmap(key_of)(words))


def _groups(
    leaves: list[jax.Array], names: tuple[str | Rows, ...], salted: tuple[int, ...]
) -> list[list[int]]:
    """Return which leaves are drawn together: small ones of one dtype and salt."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        whole = all(axis is None for axis in jax.typeof(leaf).sharding.spec)
        if leaf.size <= SMALL and whole and isinstance(names[i], str):
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
    high, low = _counters(like)
    high = high | jnp.uint32(part * SIGN)
    return _normals(key[0, 0], key[0, 1], high, low, dtype, law.distribution)


def _draw_rows(
    law: Law, key: jax.Array, shape: tuple[int, int], rows: Rows, dtype: Any, part: int
) -> jax.Array:
    counts = rows.counts(shape[1])
    owners = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([np.arange(count) * shape[1] for count in counts])
    filled = np.take(rows.sizes, owners) - first
    column = lax.broadcasted_iota(jnp.uint32, shape, 1)
    low = column + first[:, None].astype(np.uint32)
    k0, k1 = key[owners, 0][:, None], key[owners, 1][:, None]
    z = _normals(k0, k1, jnp.uint32(part * SIGN), low, dtype, law.distribution)
    return jnp.where(
        column < filled[:, None].clip(max=shape[1]).astype(np.uint32), z, 0
    )


def _draw_by_jax(
    law: Law, key: jax.Array, like: Any, name: str | Rows, dtype: Any, part: int
) -> jax.Array:
    keys = jax.random.wrap_key_data(key, impl=law.impl)

    def draw(i: int, shape: tuple[int, ...], sharding: Any = None) -> jax.Array:
        of_part = jax.random.fold_in(keys[i], part)
        if law.distribution == "normal":
            return jax.random.normal(of_part, shape, dtype, out_sharding=sharding)
        return jax.random.truncated_normal(
            of_part, -CUT, CUT, shape, dtype, out_sharding=sharding
        )

    if isinstance(name, str):
        return draw(0, like.shape, _sharding(like))
    pieces = [draw(i, (size,)) for i, size in enumerate(name.sizes)]
    padded = [jnp.pad(piece, (0, -piece.size % like.shape[1])) for piece in pieces]
    return jnp.concatenate(padded).reshape(like.shape)


def _counters(like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two words of each element's index, unique beyond 2**32, too."""
    first = like.ndim
    while first and math.prod(like.shape[first - 1 :]) <= 2**32:
        first -= 1
    return _index(like, range(first)), _index(like, range(first, like.ndim))


def _index(like: jax.Array, dimensions: range) -> jax.Array:
    total, stride = jnp.uint32(0), 1
    for dimension in reversed(dimensions):
        index = lax.broadcasted_iota(
            jnp.uint32, like.shape, dimension, out_sharding=_sharding(like)
        )
        total = total + index * jnp.uint32(stride)
        stride *= like.shape[dimension]
    return total


def _sharding(like: jax.Array) -> Any:
    sharding = jax.typeof(like).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


@functools.partial(jax.jit, static_argnums=(4, 5))
def _normals(
    k0: jax.Array,
    k1: jax.Array,
    high: jax.Array,
    low: jax.Array,
    dtype: Any,
    distribution: Distribution,
) -> jax.Array:
    """Return the draws that belong to the counters ``(high, low)`` under the keys."""
    r0, r1 = _threefry(k0, k1, high, low)
    if dtype == jnp.float64:
        return _exact_quantile(r0, r1, distribution)
    return _box_muller(r0, r1) if distribution == "normal" else _truncated_quantile(r0)


def _threefry(
    k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(ROUNDS):
        left = ROTATIONS[i % 8]
        x0 = x0 + x1
        x1 = x0 ^ ((x1 << jnp.uint32(left)) | (x1 >> jnp.uint32(32 - left)))
        if i % 4 == 3:
            turn = i // 4 + 1
            x0 = x0 + schedule[turn % 3]
            x1 = x1 + (schedule[(turn + 1) % 3] + jnp.uint32(turn))
    return x0, x1


def _box_muller(r0: jax.Array, r1: jax.Array) -> jax.Array:
    u = r0.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    # Read as an integer, a float is its own logarithm but for a function of its fraction.
    bits = lax.bitcast_convert_type(u, jnp.int32)
    linear = (0x3F800000 - bits).astype(jnp.float32) * (math.log(2.0) * 2.0**-22)
    fraction = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    y = fraction - 1
    radius = jnp.sqrt((y - y * y) * _polynomial(LOG, y) + linear)
    x = lax.bitcast_convert_type(r1, jnp.int32).astype(jnp.float32) * 2.0**-31
    return radius * (x * _polynomial(SINE, x * x))


def _truncated_quantile(r0: jax.Array) -> jax.Array:
    signed = lax.bitcast_convert_type(r0, jnp.int32).astype(jnp.float32)
    x = signed * (2.0**-31 * CUT_PROBABILITY)
    s = 1 - x * x
    z = x * (_polynomial(NUMERATOR, s) / _polynomial(DENOMINATOR, s))
    edge = np.nextafter(np.float32(CUT), np.float32(0))
    return jnp.clip(z, -edge, edge)


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _exact_quantile(
    r0: jax.Array, r1: jax.Array, distribution: Distribution
) -> jax.Array:
    """Return the float64 normal of 63 bits of probability and a sign."""
    high, low = r0.astype(jnp.uint64), r1.astype(jnp.uint64)
    u = (((high & jnp.uint64(SIGN - 1)) << 32) | low).astype(jnp.float64)
    u = (u + 0.5) * 2.0**-63
    if distribution == "truncated_normal":
        u = u * CUT_PROBABILITY + (1 - CUT_PROBABILITY)
    magnitude = -jax.scipy.special.ndtri(0.5 * u)
    if distribution == "truncated_normal":
        magnitude = jnp.minimum(magnitude, np.nextafter(CUT, 0.0))
    return jnp.where(r0 >= jnp.uint32(SIGN), -magnitude, magnitude)
