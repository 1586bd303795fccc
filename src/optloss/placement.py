"""Where a state lives: each moment beside its parameter, scalars on the whole mesh.

A scalar left on one device beside sharded parameters would be moved to the mesh by the
first step, whose output then differs in placement from its input, and the second call
would compile the step again. So would a leaf that a step returns in another sharding
than it was given in: with Explicit axes types forbid that, with Auto axes XLA is free
to do it unless told.

Under Auto axes a sharding is invisible while tracing. All that can be said there is
that one array is to be sharded like another.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Path = tuple[Any, ...]

_groups = itertools.count()


def place_beside(state: Any, params: Any) -> Any:
    """Return ``state`` with its leaves placed to match ``params``.

    A leaf of the state mirrors a parameter if its path ends with the parameter's and
    the shapes are equal; it gets the parameter's sharding. The rest is replicated on
    the parameters' mesh.
    """
    mirrored = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    home = _home(mirrored.values())

    def place(path: Path, leaf: Any) -> Any:
        parameter = _mirrored(path, leaf, mirrored)
        if isinstance(leaf, Tracer):
            return _place_traced(leaf, parameter, home)
        if home is None or not isinstance(leaf, jax.Array):
            return leaf
        beside = _is_committed(parameter)
        return _put(leaf, parameter.sharding if beside else _everywhere(home, leaf))

    return jax.tree_util.tree_map_with_path(place, state)


def _put(leaf: Any, sharding: Any) -> Any:
    # The same placement may be written in two ways, which jit takes for different.
    same = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_put(leaf, sharding) if same or not leaf.committed else leaf


def _home(parameters: Any) -> Any:
    """Return the sharding of the first parameter that says where it is."""
    for leaf in parameters:
        if isinstance(leaf, Tracer):
            sharding = jax.typeof(leaf).sharding
            if AxisType.Explicit in sharding.mesh.axis_types:
                return sharding
        elif _is_committed(leaf):
            return leaf.sharding
    return None


def _everywhere(home: Any, leaf: Any) -> Any:
    if not isinstance(home, NamedSharding):
        return home
    # A step returns the long form under Explicit axes, the short one under Auto axes.
    explicit = AxisType.Explicit in home.mesh.axis_types
    return NamedSharding(home.mesh, PartitionSpec(*[None] * leaf.ndim * explicit))


def _mirrored(path: Path, leaf: Any, parameters: dict[Path, Any]) -> Any:
    for start in range(len(path) + 1):
        parameter = parameters.get(path[start:])
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter
    return None


def _place_traced(leaf: Any, parameter: Any, home: Any) -> Any:
    if home is not None:
        beside = parameter is not None
        sharding = jax.typeof(parameter).sharding if beside else _everywhere(home, leaf)
        return jax.sharding.reshard(leaf, sharding)
    if parameter is None or parameter is leaf:
        return leaf
    # zeros_like(parameter) loses the sharding; a value computed from it has it.
    never = jnp.abs(parameter) < 0
    return jnp.where(never, jnp.ones((), leaf.dtype), leaf)


def shard_like(tree: Any, like: Any) -> Any:
    """Return the traced ``tree`` with each leaf in the sharding of its like.

    Nothing is to be done in an eager call, where an array is where it is.
    """

    def constrain(leaf: Any, other: Any) -> Any:
        if not isinstance(leaf, Tracer):
            return leaf
        # JAX lowers equal calls once, and pairs of one shape would become one group
        # (jax 0.10): metadata of its own keeps each call apart.
        with set_xla_metadata(shard_group=str(next(_groups))):
            return shard_alike(leaf, other)[0]

    return jax.tree.map(constrain, tree, like)


def kept_shardings(state: Any, params: Any) -> tuple[Any, ...] | None:
    """Return the shardings, one a leaf, in which a step has to return ``state``.

    ``None`` where nothing has to be said: without a mesh, or with Explicit axes alone.
    """
    # The first tells for all, which are on its mesh: this runs at each step.
    home = next((getattr(x, "sharding", None) for x in jax.tree.leaves(params)), None)
    if not isinstance(home, NamedSharding):
        return None
    if AxisType.Auto not in home.mesh.axis_types:
        return None
    return tuple(
        leaf.sharding if _is_committed(leaf) else _everywhere(home, leaf)
        for leaf in jax.tree.leaves(state)
    )


def _is_committed(leaf: Any) -> bool:
    return bool(getattr(leaf, "committed", False))
