"""The gradient of a loss that several devices share, where types do not tell.

Under ``shard_map`` the type of a value says along which axes it differs from device to
device, and JAX sums the gradient of a parameter along the others. Under ``pmap``, and
``shard_map`` with ``check_vma=False``, nothing says so, and the caller has to.
"""

from collections.abc import Mapping

from optloss.mesh import Axes, axes_of, gradient_of_all, manual_axes, types_tell
from optloss.messages import refusal
from optloss.typing import AxisName, PyTree


def shard_axes(given: Mapping[str, AxisName]) -> AxisName:
    """Return those of ``axis_name`` that leaves may be sharded over."""
    replicas = axes_of(given.get("replica_axis_name"))
    if not replicas:
        return given["axis_name"]
    return tuple(axis for axis in axes_of(given["axis_name"]) if axis not in replicas)


def shared_gradient(
    gradients: PyTree, shards: AxisName, replica_axis_name: AxisName
) -> PyTree:
    """Return the gradient of the loss that all devices have returned alike.

    Leaves are sharded over ``shards`` and the same along ``replica_axis_name``, which
    is ``None`` if the caller did not say.
    """
    axes: Axes = (*axes_of(shards), *axes_of(replica_axis_name), *manual_axes())
    try:
        if types_tell(axes):
            return gradients
    except NameError as error:  # JAX's for an axis of which it knows nothing
        raise refusal(
            "train_op",
            f"{axes!r} is no axis of a shard_map or pmap that is being traced. "
            "axis_name and replica_axis_name are for train_op.update inside one; "
            "under jit on a mesh leave them out.",
        ) from error
    if replica_axis_name is None:
        raise refusal(
            f"train_op.update(axis_name={shards!r})",
            "under pmap, and shard_map with check_vma=False, types do not say whether "
            "the parameters are the same on all devices, and their gradients are not "
            "averaged. Name the axes along which they are: optimize_loss("
            "replica_axis_name=...), or () for none: all are sharded along axis_name, "
            "or the devices train apart.",
        )
    return gradient_of_all(gradients, axes_of(replica_axis_name), axes_of(shards))
