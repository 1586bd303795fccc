r"""The parameters to evaluate with, where the optimizer has others than it trains.

``optax.contrib.schedule_free`` differentiates at :math:`y`, between its fast iterates
:math:`z` and their average :math:`x`, and :math:`x` is what is to be evaluated:

.. math:: x = (y - (1 - \beta_1) z) / \beta_1
"""

import jax
from optax.contrib import ScheduleFreeState

from optloss.fast.packed_states import unpack_moments
from optloss.fast.packing import Layout
from optloss.trees import is_inexact, is_masked, to_float32
from optloss.typing import PyTree


def evaluation_params(
    opt_state: PyTree, trained: PyTree, layout: Layout, pack_size: int
) -> PyTree:
    """Return ``trained`` with averages where the optimizer has them.

    ``layout`` and ``pack_size`` tell how the chain of ``opt_state`` packs its leaves.
    """
    for node in jax.tree.leaves(opt_state, is_leaf=_is_schedule_free):
        if _is_schedule_free(node):
            z = unpack_moments(node.z, trained, layout, pack_size)
            trained = _average(trained, z, node.b1)
    return trained


def _is_schedule_free(node: PyTree) -> bool:
    return isinstance(node, ScheduleFreeState)


def _average(trained: PyTree, z: PyTree, b1: jax.Array) -> PyTree:
    def average(y: PyTree, fast: PyTree) -> PyTree:
        if is_masked(fast) or not is_inexact(y):
            return y
        wide, fast, beta = to_float32((y, fast, b1))
        return ((wide - (1 - beta) * fast) / beta).astype(y.dtype)

    return jax.tree.map(average, trained, z, is_leaf=is_masked)
