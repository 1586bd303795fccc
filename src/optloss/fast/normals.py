r"""From a counter to a normal number, in few operations that all go elementwise.

A counter of two words is hashed under a key of two words by threefry2x32, here with 13
rounds: JAX has 20, but from 13 on no statistical flaw of the hash is known, and it is
the dearest part. The two words :math:`r_0, r_1` that come out make one normal by the
method of Box and Muller,

.. math:: z = \sqrt{-2 \ln u} \, \sin(\tfrac{\pi}{2} x), \qquad
    u = 2^{-32} (r_0 + \tfrac{1}{2}), \quad x = 2^{-31} r_1

with :math:`r_1` read as a signed number. Logarithm and sine are polynomials of our own;
:math:`z` is right to 3e-6 of itself for the :math:`u` that float32 can hold, finite for
all words and at most 6.77. A normal truncated at :math:`\pm 2` is the inverse of its
distribution function at :math:`2^{-31} r_0`, by a rational function as Giles has them.
A float64 is the inverse of either distribution function at 63 bits and a sign, to the
last digits. No step may round otherwise in a vector than in a single number, because
what a draw is must not depend on which kernel draws it.

For 1e7 float32 normals added to as many numbers, on one core of an AVX-512 machine, in
milliseconds (adding a constant takes 4):

====================================================  ====
``jax.random.normal``, its threefry a loop in memory    85
threefry of 20 rounds unrolled, ``lax.erf_inv``         44
... a rational function of the logarithm                24
... Box and Muller                                      21
threefry of 13 rounds, Box and Muller                   16
====================================================  ====

Drawing two normals from one hash, the cosine beside the sine, would halve the hashes,
but neighbours would share one and XLA's CPU compiler does not vectorise that.

References:
    Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*, 2011;
    on the rounds, the notes in ``threefry.h`` of their library Random123. Box and
    Muller, *A note on the generation of random normal deviates*, 1958. Giles,
    *Approximating the erfinv function*, 2010; our rational is in :math:`1 - x^2`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optloss.mesh import explicit_sharding

Words = tuple[jax.Array, jax.Array]

ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
SIGN = 0x80000000

CUT = 2.0
"""Where the truncated normal ends."""

CUT_PROBABILITY = math.erf(CUT / math.sqrt(2.0))

# Minimax fits: 2 (log(2) y - log(1 + y)) / (y - y^2) on [0, 1]; sin(pi x / 2) / x in
# x^2; the truncated quantile divided by x in 1 - x^2.
LOG = (
    *(-0.613619149, 0.384377688, -0.266091764),
    *(0.168217883, -0.0754438043, 0.0162659865),
)
SINE = (1.57079482, -0.645921111, 0.07948789, -0.00436257431)
NUMERATOR = (1.99999952, 19.932373, 42.9288025, 15.5938816)
DENOMINATOR = (1.0, 11.6756296, 32.9692192, 20.470623, 1.1384635)


@jax.jit(static_argnums=(2, 3))  # leaves of one shape are traced once
def normals(key: Words, count: Words, dtype: DTypeLike, distribution: str) -> jax.Array:
    """Return the draws, float32 or float64, of the counters ``count`` under ``key``.

    Each of the two is a pair of uint32 arrays; they broadcast against each other.
    """
    words = threefry(key, count)
    if dtype == jnp.float64:
        return exact_quantile(words, distribution)
    if distribution == "normal":
        return box_muller(words)
    return truncated_quantile(words)


def threefry(key: Words, count: Words, rounds: int = ROUNDS) -> Words:
    """Return the threefry2x32 hash of ``count`` under ``key``."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY))
    x0, x1 = count[0] + k0, count[1] + k1
    for i in range(rounds):
        left = ROTATIONS[i % 8]
        x0 = x0 + x1
        x1 = x0 ^ ((x1 << jnp.uint32(left)) | (x1 >> jnp.uint32(32 - left)))
        if i % 4 == 3:
            turn = i // 4 + 1
            x0 = x0 + schedule[turn % 3]
            x1 = x1 + (schedule[(turn + 1) % 3] + jnp.uint32(turn))
    return x0, x1


def box_muller(words: Words) -> jax.Array:
    """Return a float32 normal for each pair of ``words``."""
    u = words[0].astype(jnp.float32) * 2.0**-32 + 2.0**-33
    # A float read as an integer is its logarithm, but for a function of its fraction.
    bits = lax.bitcast_convert_type(u, jnp.int32)
    linear = (0x3F800000 - bits).astype(jnp.float32) * (math.log(2.0) * 2.0**-22)
    y = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32) - 1
    radius = jnp.sqrt((y - y * y) * _polynomial(LOG, y) + linear)
    x = _signed(words[1]) * 2.0**-31
    return radius * (x * _polynomial(SINE, x * x))


def truncated_quantile(words: Words) -> jax.Array:
    """Return a float32 normal within the cut for each pair of ``words``."""
    x = _signed(words[0]) * 2.0**-31
    # For a single element XLA writes 1 - x * x in another way, which rounds otherwise.
    s = (1 - x) * (1 + x)
    return x * (_polynomial(NUMERATOR, s) / _polynomial(DENOMINATOR, s))


def exact_quantile(words: Words, distribution: str) -> jax.Array:
    """Return a float64 normal for each pair of ``words``."""
    high, low = (word.astype(jnp.uint64) for word in words)
    u = (((high & jnp.uint64(SIGN - 1)) << jnp.uint64(32)) | low).astype(jnp.float64)
    u = (u + 0.5) * 2.0**-63
    if distribution == "truncated_normal":
        u = u * CUT_PROBABILITY + (1 - CUT_PROBABILITY)
    magnitude = _two_sided_quantile(u)
    if distribution == "truncated_normal":
        magnitude = jnp.minimum(magnitude, np.nextafter(CUT, 0.0))
    return jnp.where(words[0] >= jnp.uint32(SIGN), -magnitude, magnitude)


def _two_sided_quantile(u: jax.Array) -> jax.Array:
    """Return the z that a normal exceeds in magnitude with probability ``u``."""
    # jax.scipy.special.ndtri cannot be traced with Explicit axes (jax 0.10).
    log_u = jnp.log(u)
    far = jnp.sqrt(-2 * log_u - jnp.log(-2 * jnp.minimum(log_u, -1.0)))
    z = jnp.where(u < 1e-3, far, math.sqrt(2) * lax.erf_inv(1 - u))
    for _ in range(3):
        tail = lax.erfc(z * math.sqrt(0.5))
        density = math.sqrt(2 / math.pi) * jnp.exp(-0.5 * z * z)
        z = z + (jnp.log(tail) - log_u) * tail / density
    return z


def counters(template: jax.Array) -> Words:
    """Return for each element two words of its index, unique beyond 2**32, too."""
    first = template.ndim
    while first and math.prod(template.shape[first - 1 :]) <= 2**32:
        first -= 1
    return _index(template, range(first)), _index(template, range(first, template.ndim))


def _index(template: jax.Array, dimensions: range) -> jax.Array:
    total: jax.Array = jnp.uint32(0)
    stride = 1
    for dimension in reversed(dimensions):
        index = lax.broadcasted_iota(
            jnp.uint32,
            template.shape,
            dimension,
            out_sharding=explicit_sharding(template),
        )
        total = total + index * jnp.uint32(stride)
        stride *= template.shape[dimension]
    return total


def _signed(word: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(word, jnp.int32).astype(jnp.float32)


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
