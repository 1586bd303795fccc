"""The draws against NumPy, SciPy and the exact laws; what they may not depend on."""

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special, stats

from optloss.fast import normals
from optloss.fast.draws import SMALL, add_normals, split_key

MANY = 1_000_000
TRUNCATED_STD = 0.8796256610342398
KURTOSIS = {"normal": 0.0, "truncated_normal": -0.6344632828703595}
LAWS = {"normal": stats.norm(), "truncated_normal": stats.truncnorm(-2, 2)}


def is_known(impl):
    try:
        jax.random.key(0, impl=impl)
    except ValueError:
        return False
    return True


EVERYWHERE = ("threefry2x32", "rbg", "unsafe_rbg")
IMPLEMENTATIONS = (*EVERYWHERE, *filter(is_known, ["philox4x32"]))  # not in jax 0.10.0
COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


def draw(names, likes, *, key=0, step=0, **options):
    words, impl = split_key(key)
    zeros = [jnp.zeros_like(like) for like in likes]
    std = options.pop("std", 1.0)
    return add_normals(zeros, std, words, impl, jnp.int32(step), names, **options)


def normal_numbers(count, name="w", **options):
    return np.asarray(draw([name], [jnp.zeros(count)], **options)[0], np.float64)


def rotate(x, left):
    return (x << np.uint32(left)) | (x >> np.uint32(32 - left))


def numpy_threefry(key, count, rounds):
    """Threefry2x32 as its paper has it, on uint32 arrays."""
    k = [np.uint32(key[0]), np.uint32(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
    x = [np.asarray(count[0], np.uint32) + k[0], np.asarray(count[1], np.uint32) + k[1]]
    for i in range(rounds):
        x[0] = x[0] + x[1]
        x[1] = rotate(x[1], (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]) ^ x[0]
        if i % 4 == 3:
            n = i // 4 + 1
            x = [x[0] + k[n % 3], x[1] + k[(n + 1) % 3] + np.uint32(n)]
    return x


def numpy_words(count, name, key, step):
    """The two words that element 0, 1, ... of a leaf is made of."""
    with np.errstate(over="ignore"):
        root = jax.random.key_data(jax.random.fold_in(key, step))
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        leaf_key = numpy_threefry(np.asarray(root), np.frombuffer(digest, "<u4"), 20)
        return numpy_threefry(leaf_key, (np.zeros(count), np.arange(count)), 13)


# The hash and the quantiles


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x3707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_the_hash_gives_the_known_answers_of_random123(key, count, expected):
    words = [[jnp.uint32(word) for word in pair] for pair in (key, count)]
    assert tuple(int(word) for word in normals.threefry(*words)) == expected


def test_a_draw_is_the_formula_of_box_and_muller():
    count, key = 200_000, jax.random.key(3)
    r0, r1 = numpy_words(count, "dense/kernel", key, 5)
    found = normal_numbers(count, "dense/kernel", key=key, step=5)
    sine = np.sin(np.pi / 2 * (r1.view(np.int32) / 2**31))
    exact = (r0.astype(np.float64) + 0.5) / 2**32
    rounded = r0.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    for u, error in ((exact, {"atol": 1e-4}), (rounded.astype(float), {"rtol": 3e-6})):
        expected = np.sqrt(-2 * np.log(u)) * sine
        np.testing.assert_allclose(found, expected, **error)


def test_a_truncated_draw_is_the_quantile_of_its_word():
    count, key = 200_000, jax.random.key(3)
    r0, _ = numpy_words(count, "w", key, 0)
    x = r0.view(np.int32) / 2**31
    expected = np.sqrt(2) * special.erfinv(x * special.erf(np.sqrt(2)))
    found = normal_numbers(count, key=key, distribution="truncated_normal")
    np.testing.assert_allclose(found, expected, rtol=3e-6)


@pytest.mark.wide
def test_a_float64_draw_is_the_quantile_of_63_bits():
    count, key = 2_000, jax.random.key(3)
    r0, r1 = numpy_words(count, "w", key, 0)
    tail = (((r0.astype(np.uint64) & 0x7FFFFFFF) << 32) | r1).astype(np.float64)
    sign = np.where(r0 >> 31, -1, 1)
    with jax.enable_x64(True):
        like = jnp.zeros(count, jnp.float64)
        (found,) = draw(["w"], [like], key=key)
        (cut,) = draw(["w"], [like], key=key, distribution="truncated_normal")
    assert found.dtype == np.float64
    expected = -sign * special.ndtri((tail + 0.5) / 2**64)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    inside = special.erf(np.sqrt(2)) * (1 - (tail + 0.5) / 2**63)
    np.testing.assert_allclose(
        cut, sign * np.sqrt(2) * special.erfinv(inside), rtol=1e-9
    )


EXTREMES = np.array(
    [0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 129, 2**32 - 2, 2**32 - 1],
    np.uint32,
)


@pytest.mark.wide
def test_extreme_words_give_finite_draws():
    r0, r1 = (jnp.asarray(words.ravel()) for words in np.meshgrid(EXTREMES, EXTREMES))
    z = np.asarray(jax.jit(normals.box_muller)((r0, r1)))
    assert np.isfinite(z).all()
    assert z.max() == -z.min() == pytest.approx(np.sqrt(2 * np.log(2**33)), rel=1e-6)
    cut = np.asarray(jax.jit(normals.truncated_quantile)((r0, r1)))
    assert 2 - 1e-6 < cut.max() == -cut.min() < 2
    with jax.enable_x64(True):
        exact = normals.exact_quantile((r0, r1), "normal")
        assert np.isfinite(exact).all()
        assert float(exact.max()) == pytest.approx(-special.ndtri(2.0**-65), rel=1e-12)


def test_every_float_below_one_has_a_real_radius():
    # r0 near 2**32 stands for u near 1, where rounding might make the square negative.
    r0 = jnp.arange(2**32 - 2**24, 2**32, 64, dtype=jnp.uint32)
    z = jax.jit(normals.box_muller)((r0, jnp.full_like(r0, 2**31 - 1)))
    assert bool((z >= 0).all())
    assert bool((jnp.diff(z) <= 1e-6).all())


# The laws


@pytest.mark.wide
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_a_million_draws_follow_the_law(distribution, scale):
    z = normal_numbers(MANY, key=11, std=scale, distribution=distribution)
    std = scale * (1.0 if distribution == "normal" else TRUNCATED_STD)
    kurtosis = KURTOSIS[distribution]
    assert abs(z.mean()) < 4 * std / np.sqrt(MANY)
    assert abs(z.std() / std - 1) < 4 * np.sqrt((kurtosis + 2) / 4 / MANY)
    assert abs(stats.skew(z)) < 4 * np.sqrt(6 / MANY)
    assert abs(stats.kurtosis(z) - kurtosis) < 4 * np.sqrt(24 / MANY)
    assert stats.kstest(z / scale, LAWS[distribution].cdf).pvalue > 0.01
    if distribution == "truncated_normal":
        assert 1.999 * scale < np.abs(z).max() <= 2 * scale


@pytest.mark.wide
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_float64_follows_the_law(distribution):
    with jax.enable_x64(True):
        like = jnp.zeros(MANY // 4, jnp.float64)
        (z,) = draw(["w"], [like], key=5, distribution=distribution)
    assert stats.kstest(np.asarray(z), LAWS[distribution].cdf).pvalue > 0.01


@pytest.mark.wide
@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_other_implementations_follow_the_law(impl, distribution):
    key = jax.random.key(1, impl=impl)
    z = normal_numbers(MANY // 4, key=key, distribution=distribution)
    assert stats.kstest(z, LAWS[distribution].cdf).pvalue > 0.01


def test_the_tails_of_ten_million_draws_are_full():
    z = np.abs(normal_numbers(10 * MANY, key=2))
    assert 4.8 < z.max() < 6.5
    for bound in (3.0, 4.0, 4.5):
        expected = 10 * MANY * 2 * special.ndtr(-bound)
        assert abs((z > bound).sum() - expected) < 4 * np.sqrt(expected)


@pytest.mark.wide
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_a_complex_draw_has_a_mean_square_of_one(impl, dtype):
    with jax.enable_x64(True):
        likes, key = [jnp.zeros(MANY // 5, dtype)], jax.random.key(1, impl=impl)
        (z,) = draw(["w"], likes, key=key)
        assert z.dtype == dtype
    z = np.asarray(z)
    assert np.mean(np.abs(z) ** 2) == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(z.real, z.imag)[0, 1]) < 5 / np.sqrt(z.size)
    assert stats.kstest(np.sqrt(2) * z.imag, stats.norm().cdf).pvalue > 0.01


@pytest.mark.wide
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_from_float32(dtype):
    leaf = jnp.linspace(-1, 1, 5000)
    words, impl = split_key(1)
    exact, half = (
        add_normals([x], 0.5, words, impl, jnp.int32(0), ["w"])[0]
        for x in (leaf.astype(dtype).astype(jnp.float32), leaf.astype(dtype))
    )
    np.testing.assert_array_equal(half, exact.astype(dtype))


# Independence


def correlations(draws):
    """The largest correlation between two of the draws, their squares included."""
    values = np.stack([np.ravel(z) for z in draws]).astype(np.float64)
    found = np.corrcoef(np.concatenate([values, values**2]))
    between = np.tile(~np.eye(len(values), dtype=bool), (2, 2))
    return np.abs(found[between]).max()


@pytest.mark.wide
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leaves_steps_keys_and_shards_are_independent(impl):
    shape, key = (300, 400), jax.random.key(7, impl=impl)
    like = jnp.zeros(shape)
    draws = [*draw(["a", "b", "a/b"], [like] * 3, key=key)]
    draws += draw(["a"], [like], key=key, step=1)
    draws += draw(["a"], [like], key=jax.random.key(8, impl=impl))
    shards = [jnp.uint32(0), jnp.uint32(1)]
    draws += draw(["a", "b"], [like] * 2, key=key, shard_ids=shards)
    draws += draw(["a", "b"], [like] * 2, key=key, shard_ids=shards[::-1])
    assert correlations(draws) < 5 / np.sqrt(like.size)
    for i, z in enumerate(draws):
        assert all(np.mean(z == other) < 1e-3 for other in draws[:i])


def test_neighbours_are_independent():
    z = normal_numbers(MANY, key=13)
    lagged = [z[: -(2**10)], *(z[lag : lag - 2**10 or None] for lag in (1, 2, 3, 2**9))]
    assert correlations(lagged) < 5 / np.sqrt(MANY)


@pytest.mark.wide
def test_no_two_of_many_leaves_are_alike():
    names = [f"layers/{i}/bias" for i in range(300)]
    draws = np.stack(draw(names, [jnp.zeros(100)] * 300))
    assert correlations(draws) < 7 / np.sqrt(100)
    assert len(np.unique(draws[:, 0])) == 300


def test_counters_do_not_repeat_beyond_two_to_the_32():
    # XLA computes just the elements that are read.
    huge = jax.ShapeDtypeStruct((3, 2**16, 2**16), jnp.float32)
    elements = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 0, 0), (2, -1, -1)]

    @jax.jit
    def read():
        words = normals.counters(huge)
        return [[word[element] for word in words] for element in elements]

    found = [tuple(map(int, pair)) for pair in read()]
    assert found == [(0, 0), (0, 1), (0, 2**16), (1, 0), (2, 0), (2, 2**32 - 1)]


# What a draw may not depend on

SHAPES = [(), (1,), (7,), (256,), (257,), (50, 50), (3, 5, 7), (0, 3), (SMALL,)]
LARGE = [(SMALL + 1,), (300, 111)]


@pytest.mark.wide
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_a_leaf_is_drawn_the_same_alone_and_among_others(distribution):
    likes = [jnp.zeros(shape) for shape in SHAPES + LARGE]
    names = [f"leaf{i}" for i in range(len(likes))]
    together = draw(names, likes, distribution=distribution)
    backwards = draw(names[::-1], likes[::-1], distribution=distribution)[::-1]
    for i, like in enumerate(likes):
        (alone,) = draw([names[i]], [like], distribution=distribution)
        np.testing.assert_array_equal(together[i], alone)
        np.testing.assert_array_equal(together[i], backwards[i])
        assert together[i].shape == like.shape


@pytest.mark.parametrize("quantile", [normals.box_muller, normals.truncated_quantile])
def test_one_element_is_rounded_like_many(quantile):
    r0, r1 = np.random.default_rng(0).integers(0, 2**32, (2, 500), dtype=np.uint32)
    draw_some = jax.jit(lambda std, *words: 1 + std * quantile(words))
    many = draw_some(0.5, r0, r1)
    one_by_one = [draw_some(0.5, r0[i : i + 1], r1[i : i + 1]) for i in range(500)]
    np.testing.assert_array_equal(many, jnp.concatenate(one_by_one))


@pytest.mark.wide
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_leaves_drawn_together_are_drawn_as_each_alone(impl, dtype):
    key = jax.random.key(4, impl=impl)
    sizes, names = (300, 256, 1, 513), ("a", "b", "c", "d")
    together = draw(names, [jnp.zeros(size, dtype) for size in sizes], key=key)
    for name, size, leaf in zip(names, sizes, together, strict=True):
        (alone,) = draw([name], [jnp.zeros(size, dtype)], key=key)
        np.testing.assert_array_equal(leaf, alone)


def test_what_an_accelerator_is_given_draws_the_same(monkeypatch):
    likes = [jnp.ones(300), jnp.ones((40, 50), jnp.bfloat16), jnp.ones(SMALL + 5)]
    words, impl = split_key(1)
    arguments = (likes, 0.5, words, impl, jnp.int32(3), ["a", "b", "c"])
    on_a_cpu = add_normals(*arguments)
    for_others = jax.lax.platform_dependent
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *, cpu, default: for_others(cpu=default)
    )
    elsewhere = jax.jit(lambda: add_normals(*arguments))()
    for one, other in zip(on_a_cpu, elsewhere, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.wide
def test_a_traced_step_and_std_change_nothing():
    likes, names = [jnp.ones((40, 50)), jnp.ones(SMALL + 5)], ["a", "b"]
    words, impl = split_key(1)

    @jax.jit
    def noisy(std, step):
        return add_normals(likes, std, words, impl, step, names)

    plain = [
        add_normals(likes, 0.1, words, impl, jnp.int32(n), names) for n in range(3)
    ]
    _, scanned = jax.lax.scan(lambda _, n: (None, noisy(0.1, n)), None, jnp.arange(3))
    mapped = jax.vmap(noisy)(jnp.full(3, 0.1), jnp.arange(3))
    for n in range(3):
        for i in range(2):
            np.testing.assert_array_equal(noisy(0.1, n)[i], plain[n][i])
            np.testing.assert_array_equal(scanned[i][n], plain[n][i])
            np.testing.assert_array_equal(mapped[i][n], plain[n][i])


def test_noise_of_no_strength_leaves_the_leaves():
    odd = jnp.array([1.0, jnp.inf, -3e-39, -0.0])
    leaves = [odd, jnp.tile(odd, SMALL), jnp.ones(5)]
    words, impl = split_key(1)
    noisy = jax.jit(add_normals, static_argnums=(3, 5))
    names = ("a", "b", "c")
    for leaf, same in zip(
        leaves, noisy(leaves, 0.0, words, impl, jnp.int32(0), names), strict=True
    ):
        assert np.asarray(same).tobytes() == np.asarray(leaf).tobytes()


def test_it_can_be_differentiated():
    words, impl = split_key(1)

    def energy(std, leaf):
        (noisy,) = add_normals([leaf], std, words, impl, jnp.int32(0), ["w"])
        return jnp.sum(noisy**2)

    (z,) = draw(["w"], [jnp.zeros(50)], key=1)
    by_std, by_leaf = jax.jit(jax.grad(energy, (0, 1)))(0.5, jnp.ones(50))
    np.testing.assert_allclose(by_leaf, 2 * (1 + 0.5 * z), rtol=1e-6)
    np.testing.assert_allclose(by_std, jnp.sum(2 * (1 + 0.5 * z) * z), rtol=1e-5)


def test_a_key_may_be_a_seed_a_typed_or_a_raw_one():
    typed = jax.random.key(9)
    expected = normal_numbers(100, key=typed)
    np.testing.assert_array_equal(normal_numbers(100, key=9), expected)
    np.testing.assert_array_equal(
        normal_numbers(100, key=jax.random.key_data(typed)), expected
    )


# What it compiles to


def test_a_draw_is_computed_once_however_many_read_it():
    words, impl = split_key(0)
    leaves = [jnp.ones((300, 200)), *[jnp.ones((20, 10))] * 5]
    names = [str(i) for i in range(6)]

    def three_readers(leaves, moments, step):
        noisy = add_normals(leaves, 0.1, words, impl, step, names)
        return [
            (g, g * g + m, 0.9 * m + g) for g, m in zip(noisy, moments, strict=True)
        ]

    text = (
        jax.jit(three_readers).lower(leaves, leaves, jnp.int32(0)).compile().as_text()
    )
    # One for the large leaf, one for the small ones, and one for all their keys.
    shifts = text.count(" shift-right-logical(")
    assert 0 <= shifts - (2 * normals.ROUNDS + 20) < normals.ROUNDS


# Devices


MESHES = {
    "one axis": ((8,), ("x",)),
    "two axes": ((4, 2), ("x", "y")),
}
SHARDED = {
    "one axis": [P("x"), P(None, "x"), P("x"), P(), P("x", None, None)],
    "two axes": [P("x", "y"), P(("y", "x")), P("y"), P("x"), P("x", None, "y")],
}
SHARDED_SHAPES = [(512, 64), (64, 512), (64,), (128, 8), (8, 16, 16)]


@pytest.mark.wide
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", MESHES)
def test_each_device_draws_its_own_shard(axes, kind):
    names = [f"leaf{i}" for i in range(len(SHARDED_SHAPES))]
    words, impl = split_key(0)
    words = np.asarray(words)

    def noisy(leaves, step):
        return add_normals(leaves, 0.5, words, impl, step, names)

    leaves = [jnp.ones(shape) for shape in SHARDED_SHAPES]
    expected = jax.jit(noisy)(leaves, jnp.int32(2))
    sizes, mesh_names = MESHES[axes]
    mesh = jax.make_mesh(sizes, mesh_names, axis_types=(kind,) * len(sizes))
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, spec) for spec in SHARDED[axes]]
        placed = [jax.device_put(x, s) for x, s in zip(leaves, shardings, strict=True)]
        step = jax.device_put(jnp.int32(2), NamedSharding(mesh, P()))
        compiled = jax.jit(noisy, out_shardings=shardings).lower(placed, step).compile()
        found = compiled(placed, step)
    assert not COLLECTIVES.search(compiled.as_text())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("impl", "check_vma"),  # philox4x32 fails in JAX itself
    [("threefry2x32", False), *((impl, True) for impl in EVERYWHERE)],
)
def test_shards_of_a_shard_map_differ_by_their_shard(impl, check_vma):
    words, impl = split_key(jax.random.key(0, impl=impl))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(P("x"), P("x"), P()),
        out_specs=(P("x"), P("x"), P()),
        check_vma=check_vma,
    )
    def noisy(small, large, whole):
        shard = jax.lax.axis_index("x").astype(jnp.uint32)
        leaves, shards = [small, large, whole, small], [shard, shard, None, shard]
        names = ["a", "b", "c", "d"]
        a, b, c, _ = add_normals(
            leaves, 1.0, words, impl, jnp.int32(0), names, shard_ids=shards
        )
        return a, b, c

    small, large, whole = noisy(
        jnp.zeros((4, 90)), jnp.zeros((4, 20_000)), jnp.zeros(9)
    )
    for shards in (small, large):
        assert correlations(shards) < 6 / np.sqrt(shards.shape[1])
        assert len(np.unique(shards[:, 0])) == 4
    (alone,) = draw(["c"], [jnp.zeros(9)], key=jax.random.key(0, impl=impl))
    # In the larger program jax 0.10.0 rounds the last element otherwise.
    np.testing.assert_array_max_ulp(np.asarray(whole), np.asarray(alone), maxulp=1)
