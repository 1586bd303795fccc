"""Leaves that NumPy made, with more bits than JAX has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss
from optloss.trees import accumulator_dtype, norm_dtype

WIDE = {"w": np.array([3.0, -4.0]), "z": np.array([12j])}
NARROW = jax.tree.map(jnp.asarray, WIDE)


def test_numpys_64_bits_are_32_where_jax_has_no_more():
    assert norm_dtype(WIDE) == jnp.float32
    assert accumulator_dtype(np.float64) == jnp.float32
    assert accumulator_dtype(np.complex128) == jnp.complex64


def test_numpys_64_bits_are_kept_where_jax_has_them():
    with jax.enable_x64(True):
        assert norm_dtype(WIDE) == jnp.float64
        assert norm_dtype({"z": WIDE["z"]}) == jnp.float64
        assert accumulator_dtype(np.complex128) == jnp.complex128
    assert accumulator_dtype(jnp.bfloat16) == jnp.float32


TRANSFORMS = {
    "clip_by_global_norm": optloss.clip_by_global_norm(6.5),
    "adaptive_clipping": optloss.adaptive_clipping(),
    "multiply_gradients": optloss.multiply_gradients({"w": 0.5}),
    "skip_nonfinite": optloss.skip_nonfinite(optloss.clip_by_global_norm(6.5)),
    "make_optimizer": optloss.make_optimizer(
        0.1, "adam", clip_gradients=6.5, skip_nonfinite=True
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_of_numpys_are_taken_for_what_jax_makes_of_them(name):
    tx = TRANSFORMS[name]
    found = tx.update(WIDE, tx.init(WIDE), WIDE)
    expected = tx.update(NARROW, tx.init(NARROW), NARROW)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert jnp.asarray(one).dtype == other.dtype
        np.testing.assert_array_equal(one, other)
