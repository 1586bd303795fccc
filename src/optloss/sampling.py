r"""Standard normal draws for the leaves of a tree, fast to run and fast to compile.

Every element of every leaf has a draw of its own, a pure function of the key, the step,
the leaf's name and the element's index in the leaf. It depends neither on the other
leaves nor on how many devices there are: a device computes the draws of its own shard
and nothing else.

The leaf's key is ``threefry2x32(fold_in(key, step), 64 bits of the name's blake2b)``.
The element's index is hashed under that key by threefry2x32 once more, here with the 13
rounds from which on no statistical flaw of it is known instead of JAX's 20, and the two
words :math:`r_0, r_1` of the result make one normal by the method of Box and Muller,

.. math:: z = \sqrt{-2 \ln u} \, \sin(\tfrac{\pi}{2} x), \qquad
    u = 2^{-32} (r_0 + \tfrac{1}{2}), \quad x = 2^{-31} r_1

with :math:`r_1` read as a signed number. Logarithm and sine are polynomials of our own;
:math:`z` is within 3e-6 of its exact value, relatively, and reaches to 6.76. The
truncated normal is the inverse of its distribution function at
:math:`2^{-31} r_0`, a rational function in the manner of Giles. Both are therefore **not
the numbers of** ``jax.random.normal``, though of the same law: that takes more than five
times as long on a CPU, where JAX lowers threefry as loops through memory. float64 leaves
are drawn by the exact inverse of the distribution function at 63 bits, complex ones from
two draws, and with a key of another implementation than threefry2x32 ``jax.random``
draws all of them.

Two habits of XLA's CPU compiler shape :func:`add_normals`. It computes a draw again in
every kernel that reads the noisy gradient, unless the draw stands in a branch; and it
takes a tenth of a second to compile one draw, so that all small leaves are drawn as the
rows of one matrix, each leaf starting a row of its own, and cut out of it.

References:
    Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*, 2011,
    and the notes on rounds in ``threefry.h`` of their library Random123. Box and Muller,
    *A note on the generation of random normal deviates*, 1958. Giles, *Approximating the
    erfinv function*, 2010; we fit other coefficients, in :math:`1 - x^2`.
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
Words = tuple[jax.Array, jax.Array]

ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
SIGN = 0x80000000

CUT = 2.0
CUT_PROBABILITY = math.erf(CUT / math.sqrt(2.0))

# Minimax: 2 log(1 + y) = 2 log(2) y + (y - y^2) q(y) on [0, 1], and so on.
LOG = (
    0.613619149,
    -0.384377688,
    0.266091764,
    -0.168217883,
    0.0754438043,
    -0.0162659865,
)
SINE = (1.57079482, -0.645921111, 0.07948789, -0.00436257431)
NUMERATOR = (3.02733469, 89.9695969, 320.046387, 144.597488)
DENOMINATOR = (1.0, 41.5741997, 214.666946, 176.562958, 11.1290379)

SMALL = 2**16
"""Largest number of elements of a leaf that is drawn together with others."""

WIDTH = 256
"""Elements of a row in which small leaves are drawn."""


class Rows(NamedTuple):
    """Leaves that lie in one matrix, each from the start of a row of its own."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]


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
    """Return what :func:`add_normals` adds to ``likes`` for a standard deviation of 1.

    The draws are float32 for half precision.
    """
    zeros = [
        jnp.zeros_like(like, jnp.promote_types(like.dtype, jnp.float32))
        for like in likes
    ]
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
        std: A real scalar, traced or not. Where it is 0 nothing is drawn.
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
    different = list({id(salt): salt for salt in salts}.values())
    return _add(
        list(leaves),
        jnp.asarray(std),
        key_data,
        jnp.asarray(step),
        different,
        impl=impl,
        names=tuple(names),
        salted=tuple(
            [other is salt for other in different].index(True) for salt in salts
        ),
        distribution=distribution,
    )


@functools.partial(jax.jit, static_argnames=("impl", "names", "salted", "distribution"))
def _add(
    leaves: list[jax.Array],
    std: jax.Array,
    key_data: jax.Array,
    step: jax.Array,
    salts: list[jax.Array | None],
    *,
    impl: Any,
    names: tuple[str | Rows, ...],
    salted: tuple[int, ...],
    distribution: Distribution,
) -> list[jax.Array]:
    keys = _leaf_keys(key_data, impl, step, salts, names, salted)
    threefry = impl == "threefry2x32"
    groups = _groups(leaves, names, salted) if threefry else []
    grouped = {i for group in groups for i in group}
    alone = [i for i in range(len(leaves)) if i not in grouped]
    tables = [_table(group, leaves, names, keys) for group in groups]
    draw = _draw if threefry else _draw_by_jax

    def active() -> tuple[list[jax.Array], list[jax.Array]]:
        matrices = [
            _draw(key, jnp.zeros(shape, dtype), rows, distribution=distribution)
            for key, rows, shape, dtype in tables
        ]
        noisy = [
            _plus(
                leaves[i],
                std,
                draw(keys[i], leaves[i], _rows(names[i]), distribution=distribution),
            )
            for i in alone
        ]
        return matrices, noisy

    def idle() -> tuple[list[jax.Array], list[jax.Array]]:
        # Of the same type as the draws, also where types tell what varies over a mesh.
        matrices = [
            jnp.broadcast_to((key[0, 0] & 0).astype(dtype), shape)
            for key, _, shape, dtype in tables
        ]
        # Not the leaves themselves, which XLA would copy on the way into the branch.
        return matrices, [_plus_zero(leaves[i], std) for i in alone]

    matrices, noisy = _once(active, idle, (std != 0) & (step >= 0))
    result = dict(zip(alone, noisy, strict=True))
    for group, matrix in zip(groups, matrices, strict=True):
        pieces = _cut(matrix, [leaves[i].shape for i in group])
        for i, z in zip(group, pieces, strict=True):
            result[i] = _plus(leaves[i], std, z)
    return [result[i] for i in range(len(leaves))]
