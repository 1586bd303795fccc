"""Devices: where arrays live, how they are spread, and what must agree across them.

All that the library knows of meshes is in this module: Auto, Explicit and manual axes,
varying types, placement. So is every JAX interface that may change under us, each with
the versions that have it.

* With **Auto** axes XLA decides how a value is spread, and while tracing nothing tells.
* With **Explicit** axes the type of a value says how it is spread.
* **Manual** axes are those of a ``shard_map`` or ``pmap``: the traced code runs once a
  device, sees its own shard and speaks of the others by the axes' names.

A scalar left on one device beside sharded parameters would be moved to the mesh by the
first step, whose output then differs in placement from its input, and the second call
would compile the step again. So would a leaf that a step returns in another sharding
than it was given in: Explicit axes forbid that by type, with Auto axes XLA is free to
do it unless told.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer  # not in jax.typing or jax itself up to 0.12
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from optloss.typing import AxisName, PyTree

T = TypeVar("T")

Axes = tuple[str, ...]
Path = tuple[Hashable, ...]


def is_traced(value: object) -> TypeGuard[jax.Array]:
    """Tell whether ``value`` is known by its type alone."""
    return isinstance(value, Tracer)


def is_deleted(leaf: object) -> bool:
    """Tell whether ``leaf`` is an array whose buffer was donated or deleted."""
    return isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted()


def axes_of(axis_name: AxisName) -> Axes:
    """Return ``axis_name`` as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


# Explicit axes


def explicit_sharding(like: jax.Array) -> NamedSharding | None:
    """Return the sharding that the type of ``like`` tells, None if it tells none."""
    sharding = jax.typeof(like).sharding
    return sharding if sharding.mesh.explicit_axes else None


def explicit_axes(tree: PyTree) -> tuple[AbstractMesh | None, Axes]:
    """Return the mesh and the Explicit axes that a leaf of ``tree`` is sharded over."""
    found: dict[str, AbstractMesh] = {}
    for leaf in jax.tree.leaves(tree):
        sharding = jax.typeof(leaf).sharding
        for axis in jax.tree.leaves(tuple(sharding.spec)):
            if axis in sharding.mesh.explicit_axes:
                found[axis] = sharding.mesh
    return next(iter(found.values()), None), tuple(found)


def reduce_over_mesh(fn: Callable[[PyTree, Axes], T], tree: PyTree, axes: Axes) -> T:
    """Return ``fn(tree, axes)``, whose result is the same on all devices.

    ``fn`` reduces what a device holds and combines the results along the axes it is
    given. Leaves with Explicit axes are handed to it shard by shard, so that it
    combines them itself, in one collective for all.
    """
    mesh, explicit = explicit_axes(tree)
    if not explicit:
        return fn(tree, axes)
    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)
    return jax.shard_map(
        lambda tree: fn(tree, (*axes, *explicit)),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        axis_names=set(explicit),
    )(tree)


def is_whole(leaf: jax.Array) -> bool:
    """Tell whether the type of ``leaf`` says that no Explicit axis divides it."""
    return all(axis is None for axis in jax.typeof(leaf).sharding.spec)


# Manual axes


def manual_axes() -> Axes:
    """Return the axes of the ``shard_map`` or ``pmap`` that is being traced."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying(leaf: PyTree) -> frozenset[str]:
    """Return the manual axes that ``leaf`` may differ over."""
    # Up to jax 0.9 this was jax.typeof(leaf).vma.
    return frozenset(jax.typeof(leaf).manual_axis_type.varying)


def varying_axes(tree: PyTree, axes: Axes) -> Axes:
    """Return those of the manual ``axes`` over which a leaf of ``tree`` is sharded.

    Where types do not tell, all of them.
    """
    if not axes:
        return ()
    if not types_tell(axes):
        return axes
    own = _varying_together(jax.tree.leaves(tree))
    return tuple(axis for axis in axes if axis in own)


def types_tell(axes: Axes) -> bool:
    """Tell whether the types of values say over which of the manual ``axes`` they vary.

    They do not under ``pmap`` and ``shard_map`` with ``check_vma=False``.
    """
    return all(axis in varying(jax.lax.axis_index(axis)) for axis in axes)


def gradient_of_all(gradients: PyTree, replicas: Axes, shards: Axes) -> PyTree:
    """Return the gradient of a loss that all devices share, where no types tell.

    There JAX differentiates the sum of what the devices return. Of a loss that is the
    same on n devices, a shard gets n times its gradient, and each of n replicas of a
    parameter its own part of that.
    """
    if replicas:
        gradients = jax.lax.pmean(gradients, replicas)
    if shards:
        size = jax.lax.axis_size(shards)
        gradients = jax.tree.map(lambda gradient: gradient / size, gradients)
    return gradients


def _varying_together(leaves: Sequence[PyTree]) -> frozenset[str]:
    return frozenset().union(*map(varying, leaves))


def vary_over(leaf: jax.Array, axes: frozenset[str] | set[str]) -> jax.Array:
    """Return ``leaf`` as a value that may differ over ``axes``, too."""
    missing = tuple(sorted(axes - varying(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def shard_index(axes: Axes) -> jax.Array | None:
    """Return the number of this shard along ``axes``, None where there are none."""
    return jax.lax.axis_index(axes).astype(jnp.uint32) if axes else None


def all_devices(holds: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return whether ``holds`` is true on all devices along ``axis_name``."""
    over = varying_axes(holds, axes_of(axis_name))
    if not over:
        return holds
    refusals: jax.Array = jax.lax.psum(jnp.logical_not(holds).astype(jnp.int32), over)
    return refusals == 0


def mean_of_devices(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """Return the mean of ``value`` over the devices along ``axis_name``."""
    over = varying_axes(value, axes_of(axis_name))
    return jax.lax.pmean(value, over) if over else value


def cond_on_mesh(
    pred: jax.Array, on_true: Callable[[], T], on_false: Callable[[], T]
) -> T:
    """Return ``on_true()`` if ``pred``, else ``on_false()``: ``jax.lax.cond``.

    That refuses branches of which one is replicated where the other is sharded, which
    under ``shard_map`` are different types. Here the result counts as sharded then.
    """
    if not manual_axes():
        return jax.lax.cond(pred, on_true, on_false)
    over = jax.tree.map(
        lambda *leaves: _varying_together(leaves),
        jax.eval_shape(on_true),
        jax.eval_shape(on_false),
    )
    return jax.lax.cond(
        pred,
        lambda: jax.tree.map(vary_over, on_true(), over),
        lambda: jax.tree.map(vary_over, on_false(), over),
    )


# Placement


def shard_state(state: T, params: PyTree) -> T:
    """Return ``state`` with its leaves placed to match ``params``.

    A leaf of the state mirrors a parameter if its path ends with the parameter's and
    the shapes are equal; it gets the parameter's sharding. The rest is replicated on
    the parameters' mesh.
    """
    mirrored = dict(jax.tree.leaves_with_path(params))
    home = _home(mirrored.values())

    def place(path: Path, leaf: PyTree) -> PyTree:
        parameter = _mirrored(path, leaf, mirrored)
        # Under vmap, zeros like a traced parameter are no tracer.
        if is_traced(leaf) or (home is not None and is_traced(parameter)):
            return _place_traced(leaf, parameter, home)
        if home is None or not isinstance(leaf, jax.Array):
            return leaf
        if _is_committed(parameter):
            return _put(leaf, parameter.sharding)
        return _put(leaf, _everywhere(home, leaf))

    return jax.tree.map_with_path(place, state)


def put_like(new: jax.Array, old: PyTree) -> jax.Array:
    """Return ``new`` on the devices of ``old``; elsewhere it costs a compilation."""
    if is_traced(new) or is_traced(old) or not _is_committed(old):
        return new
    return jax.device_put(new, old.sharding)


def _put(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    # The same placement may be written in two ways, which jit takes for different.
    same = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_put(leaf, sharding) if same or not leaf.committed else leaf


def _home(parameters: Iterable[jax.Array]) -> Sharding | None:
    """Return the sharding of the first parameter that says where it is."""
    for leaf in parameters:
        if is_traced(leaf):
            sharding = explicit_sharding(leaf)
            if sharding is not None:
                return sharding
        elif _is_committed(leaf):
            return leaf.sharding
    return None


def _everywhere(home: Sharding, leaf: jax.Array) -> Sharding:
    if not isinstance(home, NamedSharding):
        return home
    # A step returns the long form under Explicit axes, the short one under Auto axes.
    explicit = AxisType.Explicit in home.mesh.axis_types
    return NamedSharding(home.mesh, PartitionSpec(*[None] * leaf.ndim * explicit))


def _mirrored(
    path: Path, leaf: jax.Array, parameters: dict[Path, jax.Array]
) -> jax.Array | None:
    for start in range(len(path) + 1):
        parameter = parameters.get(path[start:])
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter
    return None


def _place_traced(
    leaf: jax.Array, parameter: jax.Array | None, home: Sharding | None
) -> jax.Array:
    if home is not None:
        beside = parameter is not None
        sharding = jax.typeof(parameter).sharding if beside else _everywhere(home, leaf)
        return jax.sharding.reshard(leaf, sharding)
    if parameter is None or not jnp.issubdtype(parameter.dtype, jnp.inexact):
        return leaf
    return jnp.where(never(parameter), jnp.ones((), leaf.dtype), leaf)


def zeros_like(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return zeros that are spread as the traced ``leaf`` is."""
    zeros = jnp.zeros_like(leaf, dtype)
    return vary_over(jnp.where(never(leaf), jnp.ones((), dtype), zeros), varying(leaf))


def never(leaf: jax.Array) -> jax.Array:
    """Return False for each element of ``leaf``, which XLA cannot know."""
    # With Auto axes zeros_like(leaf) loses the sharding; what is computed from leaf, as
    # this False everywhere, has it. A TPU's compiler knows that abs(leaf) < 0 is False.
    width = leaf.real.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf.real, jnp.dtype(f"uint{width}"))
    return jax.lax.population_count(bits) > width


def kept_shardings(state: PyTree, params: PyTree) -> tuple[Sharding, ...] | None:
    """Return the shardings, one a leaf, in which a step has to return ``state``.

    ``None`` where nothing has to be said: without a mesh, or with Explicit axes alone.
    """
    # The first tells for all, which are on its mesh: this runs at each step.
    home = next((getattr(x, "sharding", None) for x in jax.tree.leaves(params)), None)
    if not isinstance(home, NamedSharding) or AxisType.Auto not in home.mesh.axis_types:
        return None
    return tuple(
        leaf.sharding if _is_committed(leaf) else _everywhere(home, leaf)
        for leaf in jax.tree.leaves(state)
    )


def shard_like(tree: PyTree, like: PyTree, shardings: PyTree = None) -> PyTree:
    """Return the traced ``tree`` with each leaf in the sharding of its like.

    With Explicit axes its type tells; with Auto axes ``shardings`` do, a tree like
    ``tree``, or XLA chooses.
    """
    if shardings is not None:
        return jax.lax.with_sharding_constraint(tree, shardings)

    def constrain(leaf: jax.Array, other: jax.Array) -> jax.Array:
        sharding = explicit_sharding(other) if is_traced(leaf) else None
        return leaf if sharding is None else jax.sharding.reshard(leaf, sharding)

    return jax.tree.map(constrain, tree, like)


def _is_committed(leaf: object) -> TypeGuard[jax.Array]:
    # jax.Array.committed is public since 0.5; tracers and NumPy arrays have none.
    return bool(getattr(leaf, "committed", False))
