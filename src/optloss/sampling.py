"""Counter-based draws from the standard normal, one array per named leaf."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Distribution = Literal["normal", "truncated_normal"]
Words = tuple[jax.Array, jax.Array]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
SALT_DOMAIN = 0x73616C74
SIGN = 0x80000000

TAIL_CUT = math.erfc(math.sqrt(2.0))
LOG2 = (
    -3.2456212,
    7.1343846,
    -7.495007,
    5.7824550,
    -2.9857202,
    0.97838020,
    -0.18400367,
    0.015131449,
)
NUMERATOR = (
    1.2533141,
    0.33374119,
    0.047883794,
    0.0045801187,
    0.00029664306,
    4.8507350e-6,
)
DENOMINATOR = (
    1.0,
    0.084836893,
    0.016515246,
    0.0010298629,
    4.4522516e-5,
    1.5563425e-7,
)


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
    names: Sequence[str],
    likes: Sequence[jax.Array],
    *,
    distribution: Distribution = "normal",
    salts: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Return one standard draw for each leaf, a function of key, step, name and shape."""
    if not likes:
        return []
    salts = [None] * len(likes) if salts is None else salts
    if impl == "threefry2x32":
        keys = _leaf_keys(key_data, step, names, salts)
        return [
            _draw(key, like, distribution)
            for key, like in zip(keys, likes, strict=True)
        ]
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=impl), step)
    return [
        _draw_by_jax(key, name, like, salt, distribution)
        for name, like, salt in zip(names, likes, salts, strict=True)
    ]


def _name_words(name: str) -> list[int]:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").tolist()


def _leaf_keys(
    key_data: jax.Array,
    step: jax.Array,
    names: Sequence[str],
    salts: Sequence[jax.Array | None],
) -> list[Words]:
    zero = jnp.uint32(0)
    root = _threefry(
        (key_data[0], key_data[1]), zero, jnp.asarray(step).astype(jnp.uint32)
    )
    keys: list[Words] = [root] * len(names)
    for salt in {id(salt): salt for salt in salts}.values():
        base = root
        if salt is not None:
            base = _threefry(
                root, jnp.uint32(SALT_DOMAIN), jnp.asarray(salt).astype(jnp.uint32)
            )
        members = [i for i, other in enumerate(salts) if other is salt]
        words = np.array([_name_words(names[i]) for i in members], np.uint32)
        first, second = _threefry(base, jnp.asarray(words[:, 0]), words[:, 1])
        for row, i in enumerate(members):
            keys[i] = (first[row], second[row])
    return keys


def _threefry(key: Words, x0: Any, x1: Any) -> Words:
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for block in range(1, 6):
        for distance in ROTATIONS[(block - 1) % 2]:
            x0 = x0 + x1
            left, right = jnp.uint32(distance), jnp.uint32(32 - distance)
            x1 = lax.shift_left(x1, left) | lax.shift_right_logical(x1, right)
            x1 = x1 ^ x0
        x0 = x0 + schedule[block % 3]
        x1 = x1 + (schedule[(block + 1) % 3] + jnp.uint32(block))
    return x0, x1


def _draw(key: Words, like: jax.Array, distribution: Distribution) -> jax.Array:
    high, low = _counters(like)
    if not jnp.issubdtype(like.dtype, jnp.complexfloating):
        return _quantile(_threefry(key, high, low), like.dtype, distribution)
    real = jnp.finfo(like.dtype).dtype
    parts = [
        _quantile(_threefry(key, high | jnp.uint32(part), low), real, distribution)
        for part in (0, SIGN)
    ]
    return lax.complex(*parts) * math.sqrt(0.5)


def _counters(like: jax.Array) -> Words:
    shape = like.shape
    first = len(shape)
    while first and math.prod(shape[first - 1 :]) <= 2**32:
        first -= 1
    return _index(like, range(first)), _index(like, range(first, len(shape)))


def _index(like: jax.Array, dimensions: range) -> jax.Array:
    shape, total, stride = like.shape, None, 1
    for dimension in reversed(dimensions):
        iota = lax.broadcasted_iota(
            jnp.uint32, shape, dimension, out_sharding=_sharding(like)
        )
        term = iota * jnp.uint32(stride)
        total = term if total is None else total + term
        stride *= shape[dimension]
    return jnp.uint32(0) if total is None else total


def _sharding(like: jax.Array) -> Any:
    sharding = jax.typeof(like).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def _quantile(words: Words, dtype: Any, distribution: Distribution) -> jax.Array:
    if dtype == jnp.float64:
        return _quantile64(words, distribution)
    word = words[0] ^ words[1]
    u = (word & jnp.uint32(SIGN - 1)).astype(jnp.int32).astype(jnp.float32)
    u = (u + 0.5) * 2.0**-31
    if distribution == "truncated_normal":
        u = u * (1 - TAIL_CUT) + TAIL_CUT
    w = 127 - _biased_log2(u * (2 - u))
    magnitude = (1 - u) * _polynomial(NUMERATOR, w) / _polynomial(DENOMINATOR, w)
    if distribution == "truncated_normal":
        magnitude = jnp.minimum(magnitude, np.nextafter(np.float32(2), np.float32(0)))
    signed = lax.bitcast_convert_type(magnitude, jnp.uint32) | (word & jnp.uint32(SIGN))
    return lax.bitcast_convert_type(signed, jnp.float32)


def _biased_log2(t: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(t, jnp.int32)
    exponent = (bits >> 23).astype(jnp.float32)
    mantissa = (bits & 0x7FFFFF) | 0x3F800000
    return exponent + _polynomial(LOG2, lax.bitcast_convert_type(mantissa, jnp.float32))


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _quantile64(words: Words, distribution: Distribution) -> jax.Array:
    high, low = (word.astype(jnp.uint64) for word in words)
    u = (((high & jnp.uint64(SIGN - 1)) << 32) | low).astype(jnp.float64)
    u = (u + 0.5) * 2.0**-63
    if distribution == "truncated_normal":
        u = u * (1 - TAIL_CUT) + TAIL_CUT
    magnitude = -jax.scipy.special.ndtri(0.5 * u)
    if distribution == "truncated_normal":
        magnitude = jnp.minimum(magnitude, np.nextafter(2.0, 0.0))
    return jnp.where(words[0] >= jnp.uint32(SIGN), -magnitude, magnitude)


def _draw_by_jax(
    key: jax.Array,
    name: str,
    like: jax.Array,
    salt: jax.Array | None,
    distribution: Distribution,
) -> jax.Array:
    for word in _name_words(name):
        key = jax.random.fold_in(key, word)
    if salt is not None:
        key = jax.random.fold_in(key, salt)
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    sharding = _sharding(like)
    if distribution == "normal":
        return jax.random.normal(key, like.shape, dtype, out_sharding=sharding)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.random.truncated_normal(
            key, -2.0, 2.0, like.shape, dtype, out_sharding=sharding
        )
    parts = [
        jax.random.truncated_normal(
            part, -2.0, 2.0, like.shape, jnp.finfo(dtype).dtype, out_sharding=sharding
        )
        for part in jax.random.split(key)
    ]
    return lax.complex(*parts) * math.sqrt(0.5)
