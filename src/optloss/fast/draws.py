"""Normal noise on the leaves of a tree, quick to run and quick to compile.

Every element of every leaf has a draw of its own: a pure function of the key, the step,
the leaf's name and the element's index in the leaf. It depends neither on the other
leaves nor on the number of devices, and a device computes the draws of its own shard
and nothing else.

The leaf's key is ``fold_in(key, step)`` hashed with 64 bits of the name's BLAKE2b, for
all leaves in one call. With a threefry2x32 key, as JAX's are by default, the draws are
those of :mod:`optloss.fast.normals`: of the same distribution as ``jax.random.normal``,
but **not the same numbers**, which take five times as long on a CPU. With a key of any
other implementation ``jax.random`` draws.

On an accelerator each draw is part of the kernel that adds it. Three habits of XLA's
CPU compiler shape what runs there:

* It computes a draw again in each kernel that reads the noisy gradient, unless the draw
  stands in a branch; a barrier is dropped. Noise and Adam without a clip drew thrice.
* It takes a tenth of a second for the code of one draw, so all small leaves are drawn
  in one piece, as the rows of one matrix, each leaf from a row of its own.
* Kernels that are alike are compiled once, so what tells two leaves apart is a number
  that XLA cannot know: with 400 leaves the chain of noise, clip and Adam compiles in a
  tenth of the time that it takes with ``optax.add_noise``.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from optloss.fast.normals import CUT, SIGN, counters, normals, threefry
from optloss.fast.slices import slices
from optloss.mesh import cond_on_mesh, explicit_sharding, is_whole
from optloss.messages import is_array
from optloss.trees import accumulator_dtype

SMALL = 2**14
"""Largest number of elements of a leaf that is drawn together with others."""

WIDTH = 256
"""Elements of a row of the matrix in which small leaves are drawn."""

Leaves = list[jax.Array]


class Sampler(NamedTuple):
    """Which distribution is drawn, by which implementation."""

    impl: Hashable
    distribution: str

    @property
    def ours(self) -> bool:
        """Whether the draws are this library's own."""
        return bool(self.impl == "threefry2x32")


def split_key(key: int | jax.Array) -> tuple[jax.Array, Hashable]:
    """Return the words of ``key``, a seed, a typed or a raw key, and what made them."""
    if is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        typed = key
    elif is_array(key) and key.ndim > 0:
        typed = jax.random.wrap_key_data(key)
    else:
        typed = jax.random.key(key)
    return jax.random.key_data(typed), jax.random.key_impl(typed)


def add_normals(
    leaves: Sequence[jax.Array],
    std: float | jax.Array,
    key_data: jax.Array,
    impl: Hashable,
    step: jax.Array,
    names: Sequence[str],
    *,
    distribution: str = "normal",
    shard_ids: Sequence[jax.Array | None] | None = None,
) -> Leaves:
    """Add ``std`` times a standard normal draw to each leaf, floating or complex.

    Noise is added in float32 to half precision; a complex draw has a mean square of 1,
    like JAX's. A ``"truncated_normal"`` is redrawn beyond 2, with a standard deviation
    of 0.8796. Where ``std`` is 0 the leaves keep their bits.

    ``key_data`` and ``impl`` are those of :func:`split_key`; ``step``, int32 ``[]``, is
    how many draws there were before. ``shard_ids`` has for each leaf a uint32 scalar
    that enters its key, the index of a shard, or ``None``. Leaves that share one should
    share the very array.
    """
    if not leaves:
        return []
    shard_ids = [None] * len(leaves) if shard_ids is None else shard_ids
    different = {id(shard): shard for shard in shard_ids}
    return _add(
        list(leaves),
        jnp.asarray(std),
        key_data,
        jnp.asarray(step),
        list(different.values()),
        sampler=Sampler(impl, distribution),
        names=tuple(names),
        owners=tuple(list(different).index(id(shard)) for shard in shard_ids),
    )


# Outside of jit the branches would be compiled at every call.
@jax.jit(static_argnames=("sampler", "names", "owners"))
def _add(
    leaves: Leaves,
    std: jax.Array,
    key_data: jax.Array,
    step: jax.Array,
    shard_ids: list[jax.Array | None],
    *,
    sampler: Sampler,
    names: tuple[str, ...],
    owners: tuple[int, ...],
) -> Leaves:
    root = jax.random.wrap_key_data(key_data, impl=sampler.impl)
    root = jax.random.fold_in(root, step)
    tables = [_key_table(root, shard, names) for shard in shard_ids]
    # The second half is always so, which XLA cannot know where the first is constant.
    enabled = (std != 0) & (step >= 0)

    def on_a_cpu() -> Leaves:
        noisy: dict[int, jax.Array] = {}
        groups = _groups(leaves, owners) if sampler.ours else []
        for group in groups:
            rows = tables[owners[group[0]]][np.array(group)]
            members = [leaves[i] for i in group]
            sums = _add_together(members, std, rows, sampler, enabled)
            noisy |= zip(group, sums, strict=True)
        alone = sorted(set(range(len(leaves))).difference(*groups))
        keys: dict[int, jax.Array] = {}
        for owner, table in enumerate(tables):
            own = [i for i in alone if owners[i] == owner]
            keys |= zip(own, slices(table, own, [1] * len(own)), strict=True)
        others = [leaves[i] for i in alone]
        their_keys = [keys[i][0] for i in alone]
        sums = _add_in_a_branch(others, std, their_keys, sampler, enabled)
        noisy |= zip(alone, sums, strict=True)
        return [noisy[i] for i in range(len(leaves))]

    def elsewhere() -> Leaves:
        keys = [tables[owner][i] for i, owner in enumerate(owners)]
        return _add_each(leaves, std, keys, sampler)

    return lax.platform_dependent(cpu=on_a_cpu, default=elsewhere)


def _add_each(leaves: Leaves, std: jax.Array, keys: Leaves, sampler: Sampler) -> Leaves:
    draws = [_draw(sampler, key, leaf) for leaf, key in zip(leaves, keys, strict=True)]
    return [_plus(leaf, std, z) for leaf, z in zip(leaves, draws, strict=True)]


def _plus(leaf: jax.Array, std: jax.Array, z: jax.Array) -> jax.Array:
    noise = std.astype(jnp.finfo(z.dtype).dtype) * z
    noisy = (leaf.astype(z.dtype) + noise).astype(leaf.dtype)
    # Without noise a leaf keeps its bits: -0.0 + 0 is 0.0, and so is 1e-40 + 0 here.
    return jnp.where(std != 0, noisy, leaf)


def _add_in_a_branch(
    leaves: Leaves,
    std: jax.Array,
    keys: Leaves,
    sampler: Sampler,
    enabled: jax.Array,
) -> Leaves:
    def silent() -> Leaves:
        # A branch that returned the leaf itself would have it copied.
        return [jnp.where(std != 0, std.astype(x.dtype), x) for x in leaves]

    return cond_on_mesh(enabled, lambda: _add_each(leaves, std, keys, sampler), silent)


def _add_together(
    leaves: Leaves,
    std: jax.Array,
    keys: jax.Array,
    sampler: Sampler,
    enabled: jax.Array,
) -> Leaves:
    """Draw all leaves as the rows of one matrix, in a branch of its own."""
    sizes = [leaf.size for leaf in leaves]
    counts = [-(-size // WIDTH) for size in sizes]
    starts = [0, *itertools.accumulate(count * WIDTH for count in counts[:-1])]
    dtype = accumulator_dtype(leaves[0].dtype)

    def zeros() -> jax.Array:
        # Of the keys' type, which tells over which mesh axes the draws vary.
        nothing = (keys[0, 0] & 0).astype(dtype)
        return jnp.broadcast_to(nothing, (sum(counts), WIDTH))

    matrix: jax.Array = cond_on_mesh(
        enabled, lambda: _draw_rows(sampler, keys, counts, dtype), zeros
    )
    pieces = slices(matrix.reshape(-1), starts, sizes)
    return [
        _plus(leaf, std, z.reshape(leaf.shape))
        for leaf, z in zip(leaves, pieces, strict=True)
    ]


def _key_table(
    root: jax.Array, shard: jax.Array | None, names: tuple[str, ...]
) -> jax.Array:
    """Return the words ``[names, words]`` of the keys of all names."""
    # A name that was read off a disk may be no valid UTF-8.
    texts = [name.encode(errors="surrogatepass") for name in names]
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    words = jnp.asarray(np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2))
    root = root if shard is None else jax.random.fold_in(root, shard)
    # Of fold_in a vmap is not safe: unsafe_rbg's depends on the size of the batch.
    data = jax.random.key_data(root)
    halves = jnp.pad(data.reshape(-1), (0, data.size % 2)).reshape(-1, 2)
    hashed = [
        jnp.concatenate(threefry((k0, k1), (words[:, 0], words[:, 1]), rounds=20))
        for k0, k1 in halves
    ]
    table = jnp.stack(hashed).reshape(-1, len(names)).T
    return table[:, : data.size].reshape(-1, *data.shape)


def _groups(leaves: Leaves, owners: tuple[int, ...]) -> list[list[int]]:
    """Return which leaves are drawn together: small ones of one dtype and shard."""
    groups: dict[Hashable, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.size <= SMALL and is_whole(leaf):
            groups.setdefault((accumulator_dtype(leaf.dtype), owners[i]), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _draw(sampler: Sampler, key: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return a draw of the shape of ``leaf``."""

    def draw(part: int, dtype: DTypeLike) -> jax.Array:
        if not sampler.ours:
            return _draw_by_jax(sampler, key, leaf, dtype, part)
        high, low = counters(leaf)
        count = high | jnp.uint32(part * SIGN), low
        return normals((key[0], key[1]), count, dtype, sampler.distribution)

    return _both_parts(draw, accumulator_dtype(leaf.dtype))


def _both_parts(
    draw: Callable[[int, DTypeLike], jax.Array], dtype: DTypeLike
) -> jax.Array:
    """Return ``draw(0, dtype)``, or for a complex dtype real and imaginary part."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return draw(0, dtype)
    real = jnp.finfo(dtype).dtype
    return lax.complex(draw(0, real), draw(1, real)) * math.sqrt(0.5)


def _draw_rows(
    sampler: Sampler, keys: jax.Array, counts: list[int], dtype: DTypeLike
) -> jax.Array:
    """Return draws ``[rows, WIDTH]``, so many rows for each of the ``keys``."""
    owners = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([np.arange(count) * WIDTH for count in counts])
    column = lax.broadcasted_iota(jnp.uint32, (len(owners), WIDTH), 1)
    low = column + first[:, None].astype(np.uint32)
    words = (keys[owners, 0][:, None], keys[owners, 1][:, None])

    def draw(part: int, dtype: DTypeLike) -> jax.Array:
        count = jnp.uint32(part * SIGN), low
        return normals(words, count, dtype, sampler.distribution)

    return _both_parts(draw, dtype)


def _draw_by_jax(
    sampler: Sampler, key: jax.Array, leaf: jax.Array, dtype: DTypeLike, part: int
) -> jax.Array:
    own = jax.random.wrap_key_data(key, impl=sampler.impl)
    own = jax.random.fold_in(own, part) if part else own
    sharding = explicit_sharding(leaf)
    if sampler.distribution == "normal":
        return jax.random.normal(own, leaf.shape, dtype, out_sharding=sharding)
    return jax.random.truncated_normal(
        own, -CUT, CUT, leaf.shape, dtype, out_sharding=sharding
    )
