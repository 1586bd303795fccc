"""Where a new state lives: each moment beside its parameter, scalars on the whole mesh.

A scalar left on one device beside sharded parameters would be moved to the mesh by the
first step, whose output then differs in placement from its input, and the second call
would compile the step again.
"""

from typing import Any

import jax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec

Path = tuple[Any, ...]


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
        if isinstance(leaf, jax.core.Tracer):
            return leaf if parameter is None else _alike(leaf, parameter)
        if home is None or leaf.committed:
            return leaf
        return jax.device_put(leaf, home if parameter is None else parameter.sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def _home(leaves: Any) -> Any:
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            if isinstance(leaf.sharding, NamedSharding):
                return NamedSharding(leaf.sharding.mesh, PartitionSpec())
            if leaf.committed:
                return leaf.sharding
    return None


def _mirrored(path: Path, leaf: Any, parameters: dict[Path, Any]) -> Any:
    for start in range(len(path) + 1):
        parameter = parameters.get(path[start:])
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter
    return None


def _alike(leaf: Any, parameter: Any) -> Any:
    # Under Auto axes a sharding is invisible while tracing, and zeros_like loses it.
    return shard_alike(leaf, parameter)[0]
