"""nnx objects taken apart for a compiled step, and put together again inside it.

A compiled step works on arrays. What else an nnx object is, its modules, their flags
and which variables they share, is its *graph*: static, and compiled for by itself. The
model and the nnx objects among the arguments of a step are taken apart together, so
that what they share is one variable.

To take a model apart costs more than many a step. So a graph is kept together with the
attributes it was made from, and made anew only when one of these is another object.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import errors, nnx

from optloss.messages import (
    listing,
    quoted,
    refusal,
    short_repr,
    short_text,
    signature_of,
    takes,
)
from optloss.typing import PyTree

Path: TypeAlias = tuple[int | str, ...]
GraphDef: TypeAlias = nnx.GraphDef[Any]
CALL = "optimize_loss"
MOST_RECENT = 4
"""Calls that are recognised without taking the model apart: two modes, with and without
other objects."""


@dataclasses.dataclass(frozen=True, eq=False)
class Attribute:
    """An array that a module holds bare; the methods are those of a variable."""

    owner: Any
    key: Any
    name: str

    def get_raw_value(self) -> PyTree:
        """Return the array."""
        return _child(self.owner, self.key)

    def set_raw_value(self, value: PyTree) -> None:
        """Put another array in its place."""
        if isinstance(self.owner, nnx.Pytree):
            setattr(self.owner, str(self.key), value)
        elif isinstance(self.owner, (list, dict)):
            self.owner[self.key] = value
        else:
            raise refusal(
                CALL,
                f"the array {quoted(self.name)} lies in a {type(self.owner).__name__}, "
                "where no step can replace it. Make it an nnx.Variable.",
            )


def _child(owner: Any, key: Any) -> Any:
    return getattr(owner, str(key)) if isinstance(owner, nnx.Pytree) else owner[key]


Slot: TypeAlias = nnx.Variable[Any] | Attribute
"""Where the value of a variable is read and written."""


def is_object(node: object) -> bool:
    """Tell whether ``node`` is an nnx object: a module, a metric, a Variable."""
    return isinstance(node, (nnx.Pytree, nnx.Variable))


def taken_apart(root: tuple[PyTree, ...]) -> tuple[GraphDef, dict[Path, Slot]]:
    """Return the graph of nnx objects, and by path, in its order, where values live."""
    found: Any = nnx.flatten(root)
    graphdef, state = found
    return graphdef, {path: _slot(root, path, leaf) for path, leaf in state}


def _slot(root: PyTree, path: Path, leaf: PyTree) -> Slot:
    if isinstance(leaf, nnx.Variable):
        return leaf
    owner = functools.reduce(_child, path[:-1], root)
    return Attribute(owner, path[-1], name_of(path[1:]))


def name_of(path: Path) -> str:
    """Return a path as parameters are named."""
    return "/".join(map(str, path))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model and nnx objects without their values; each is compiled for by itself.

    A value has a place: first come those of the model, in the order of the training
    op, then those of the objects that the model does not share.
    """

    graphdef: GraphDef
    paths: tuple[Path, ...]  # of the values, in the order of the graph
    places: tuple[int, ...]  # likewise

    def is_like(self, other: "Graph") -> bool:
        """Tell whether both stand for the same program."""
        return self.graphdef == other.graphdef and self.places == other.places

    def call(
        self, loss: Callable[..., PyTree], values: Sequence[PyTree], arguments: PyTree
    ) -> tuple[PyTree, list[PyTree]]:
        """Return what ``loss`` returned, and the values after it, in place order."""
        nodes = nnx.unflatten(self.graphdef, [values[place] for place in self.places])
        model, *objects = nodes
        args, kwargs = _with_objects(arguments, objects)
        if not takes(loss, 1 + len(args), keywords=tuple(kwargs)):
            names = ", ".join(("model", *(f"{name}=..." for name in kwargs)))
            raise refusal(
                CALL,
                f"the loss {short_repr(loss)}{signature_of(loss)} cannot be called "
                f"with ({names}) and {len(args)} positional arguments more.",
            )
        try:
            result = loss(model, *args, **kwargs)
        except errors.TraceContextError as error:
            text = short_text(str(error).partition(" (http")[0])
            raise refusal(
                CALL,
                f"the loss changes an nnx object that was made outside it: {text}. "
                "Make it an argument, whose changes are kept: write loss(model, batch, "
                "rngs), and call op(batch, rngs).",
            ) from error
        return result, self._values((model, *objects))

    def _values(self, nodes: PyTree) -> list[PyTree]:
        _, found = taken_apart(nodes)
        for problem, paths in (
            ("adds", set(found) - set(self.paths)),
            ("takes away", set(self.paths) - set(found)),
        ):
            if paths:
                names = listing(name_of(path[1:]) for path in paths)
                raise refusal(
                    CALL,
                    f"the loss {problem} variables, {names}. At its end the model has "
                    "those that it had before: make a new one before the op is made, "
                    "and take away what was sown: nnx.pop(model, nnx.Intermediate).",
                )
        values = [None] * len(self.places)
        for place, slot in zip(self.places, found.values(), strict=True):
            values[place] = slot.get_raw_value()
        return values


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Place:
    """Where an nnx object was among the arguments; it holds no array."""

    number: int


def without_objects(arguments: PyTree) -> tuple[PyTree, list[PyTree]]:
    """Return ``arguments`` with places for the nnx objects, and these."""
    leaves, structure = jax.tree.flatten(arguments, is_leaf=is_object)
    objects: list[PyTree] = []
    for i, leaf in enumerate(leaves):
        if is_object(leaf):
            leaves[i] = Place(len(objects))
            objects.append(leaf)
    return jax.tree.unflatten(structure, leaves), objects


def _with_objects(arguments: PyTree, objects: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(
        lambda leaf: objects[leaf.number] if isinstance(leaf, Place) else leaf,
        arguments,
        is_leaf=lambda node: isinstance(node, Place),
    )


class Watch:
    """The attributes that a graph was made from, to see whether one was replaced."""

    def __init__(self, root: PyTree) -> None:
        """Note the attributes of all modules in ``root``."""
        nodes = [node for _, node in nnx.iter_graph(root)]
        modules = [node for node in nodes if isinstance(node, nnx.Pytree)]
        self._attributes = [vars(module).values() for module in modules]
        # Kept, not their ids alone: another object may get the id of one that is gone.
        self._values = [[*found] for found in self._attributes]
        self._variables = [node for node in nodes if isinstance(node, nnx.Variable)]
        self._metadata = [one.get_metadata() for one in self._variables]
        self._complete = all(
            is_object(value) or isinstance(value, jax.Array) or _is_hashable(value)
            for values in self._values
            for value in values
        )

    def sees_no_change(self) -> bool:
        """Tell whether all is as it was. A list or dict cannot be watched."""
        return (
            self._complete
            and all(map(are_same, self._attributes, self._values))
            and [one.get_metadata() for one in self._variables] == self._metadata
        )


def are_same(objects: Collection[Any], others: Collection[Any]) -> bool:
    """Tell whether both hold the very same objects, in the same order."""
    return len(objects) == len(others) and all(map(operator.is_, objects, others))


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Found(NamedTuple):
    """The nnx objects of a call, taken apart."""

    objects: list[PyTree]
    watch: Watch
    graph: Graph
    slots: list[Slot]  # of the objects alone


class Graphs:
    """The graphs of one model, with and without other objects, as calls meet them."""

    def __init__(self, model: nnx.Module, slots: Sequence[Slot]) -> None:
        """Take ``slots``, those of the model, in the order of their places."""
        self._model = model
        self._slots = slots
        self._known: list[Graph] = []
        self._recent: list[Found] = []

    def find(self, objects: list[PyTree]) -> Found:
        """Return the model and ``objects`` as they are now, taken apart."""
        for found in self._recent:
            if are_same(found.objects, objects) and found.watch.sees_no_change():
                return found
        found = self._take_apart(objects)
        self._recent = [found, *self._recent][:MOST_RECENT]
        return found

    def _take_apart(self, objects: list[PyTree]) -> Found:
        root = (self._model, *objects)
        graphdef, slots = taken_apart(root)
        own = {path[1:]: slot for path, slot in slots.items() if path[0] == 0}
        others = [slot for path, slot in slots.items() if path[0] != 0]
        own_places = self._own_places(own)
        behind = range(len(own_places), len(slots))
        new = Graph(graphdef, tuple(slots), (*own_places, *behind))
        graph = next(filter(new.is_like, self._known), new)
        if graph is new:
            self._known.append(new)
        return Found(objects, Watch(root), graph, others)

    def _own_places(self, own: dict[Path, Slot]) -> list[int]:
        by_id = {_identity(slot): place for place, slot in enumerate(self._slots)}
        places = [by_id.get(_identity(slot)) for slot in own.values()]
        pairs = zip(own, places, strict=True)
        strange = [name_of(path) for path, place in pairs if place is None]
        known = [place for place in places if place is not None]
        if strange or len(known) < len(self._slots):
            which = f"; new are {listing(strange)}" if strange else ""
            raise refusal(
                "op",
                f"the model has other variables than when the op was made{which}. Make "
                "another op. To keep what fits of the optimizer's state: "
                "opt_state, *_ = optloss.carry_over(op.state.opt_state, "
                "other.state.opt_state); other.restore(other.state._replace("
                "step=op.state.step, opt_state=opt_state)).",
            )
        return known


def _identity(slot: Slot) -> tuple[int, object]:
    if isinstance(slot, Attribute):
        return id(slot.owner), slot.key
    return id(slot), ""
