"""Several optimizers, or several rates, in one chain: which parameter has which.

Either mapping goes from a pattern to one form of an optimizer or a rate, and the first
pattern that matches a parameter's name wins. ``optax.partition`` does the work: an
outer one by rate, each with a base rate of its own, and inside it one by optimizer. A
group stands in the state under the text of its pattern.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optloss.extra import by_signature
from optloss.fast.packing import Layout, is_elementwise, layout_of, pack_small_leaves
from optloss.messages import listing, quoted, refusal, short_repr
from optloss.names import check_patterns, first_match, leaf_names, text_of
from optloss.plateau import OwnRateState
from optloss.transforms.learning_rate import check_transformation, in_float32, with_rate
from optloss.trees import select_leaves
from optloss.typing import DecayFn, OneRate, Pattern, PyTree

Transform = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True, eq=False)
class Maker:
    """One optimizer: how it is called, and what makes it."""

    text: str
    factory: Any  # a function of the rate; None where none is taken
    own: Any  # a function that makes it without a rate, or None
    governs: bool = False  # an instance: its own rate, whatever rate is given

    def keeps_own(self, rate: OneRate) -> bool:
        """Tell whether the rate that is given has no effect."""
        return self.factory is None or (rate is None and self.own is not None)

    @functools.cached_property
    def is_elementwise(self) -> bool:
        """Whether it may work on packed leaves; trying it out takes a second."""
        # The caller's rate may be traced, and the answer is the same at this one.
        made = self.own() if self.factory is None else self.factory(0.1)
        return is_elementwise(by_signature(made))


class Table(NamedTuple):
    """What a mapping of the caller's says, or one value for all parameters."""

    patterns: tuple[Pattern, ...] | None  # None: there was no mapping
    values: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any) -> "Table":
        """Return the table of a mapping, or of one value."""
        if isinstance(given, Mapping):
            return cls(tuple(given), tuple(given.values()))
        return cls(None, (given,))

    @property
    def keys(self) -> list[str]:
        """The texts of the patterns."""
        return list(map(text_of, self.patterns or ()))

    def match(self, names: Sequence[str]) -> list[int | None]:
        """Return, for each name, the place of what applies to it."""
        if self.patterns is None:
            return [0] * len(names)
        return first_match(self.patterns, names)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which parameter has which optimizer, at which rate."""

    call: str
    makers: Table
    rates: Table
    decay_fn: DecayFn | None
    pack_size: int

    def check(self, names: Sequence[str], trained: Sequence[str]) -> None:
        """Refuse patterns without a parameter and trained parameters without one."""
        for argument, table in self._tables.items():
            if table.patterns is None:
                continue
            check_patterns(f"{self.call}, {argument}", table.patterns, names)
            rules = zip(trained, table.match(trained), strict=True)
            missed = [name for name, rule in rules if rule is None]
            if missed:
                noun = "parameters" if len(missed) > 1 else "parameter"
                raise refusal(
                    f"{self.call}, {argument}",
                    f"no key matches the trained {noun} {listing(missed)}. Add '**' as "
                    "the last key, for all the rest.",
                )
        for name, (maker, rate) in zip(trained, self._of(trained), strict=True):
            _check_pair(f"{self.call}, learning_rate", name, maker, rate)

    @property
    def _tables(self) -> dict[str, Table]:
        return {"optimizer": self.makers, "learning_rate": self.rates}

    def _of(self, names: Sequence[str]) -> list[tuple[Maker, OneRate]]:
        """Return the optimizer and the rate of each parameter, all of them matched."""
        places = self._places(names)
        return [(self.makers.values[i], self.rates.values[j]) for i, j in places]

    def _places(self, names: Sequence[str]) -> list[tuple[int, int]]:
        makers, rates = (table.match(names) for table in self._tables.values())
        return [(i or 0, j or 0) for i, j in zip(makers, rates, strict=True)]

    def words(self, name: str) -> tuple[str, str]:
        """Return the optimizer and the rate of a parameter, for people."""
        if any(table.match([name]) == [None] for table in self._tables.values()):
            return "", ""
        [(maker, rate)] = self._of([name])
        return maker.text, "own" if maker.keeps_own(rate) else short_repr(rate)

    def transform(self) -> Transform:
        """Return all groups as one transform, its packable ones packed."""
        one = self.makers.values[0]
        if self.makers.patterns is None and one.factory is None:
            return self._own(one)
        if self.rates.patterns is not None:
            return partition(self._by_rate)
        rate = self.rates.values[0]
        if all(maker.keeps_own(rate) for maker in self.makers.values):
            return self._by_optimizer(None)
        return self._at_rate(0)

    def layout(self, trained: PyTree) -> Layout:
        """Return which of the ``trained`` leaves lie in which vector, by group."""
        groups = [self._group(*places) for places in self._places(leaf_names(trained))]
        vectors: Layout = {}
        for group in dict.fromkeys(groups):
            if self.makers.values[group[0]].is_elementwise:
                part = select_leaves(trained, [other == group for other in groups])
                vectors |= layout_of(part, self.pack_size)
        return vectors

    def _group(self, i: int, j: int) -> tuple[int, int | None]:
        """Return what the parameters of one group have in common."""
        maker = self.makers.values[i]
        at_any_rate = self.makers.patterns is not None or maker.factory is None
        own = at_any_rate and maker.keeps_own(self.rates.values[j])
        return i, None if own else j

    def _by_rate(self, names: Sequence[str]) -> "Members":
        """Return the groups by rate, and one for each optimizer with its own."""
        labels: list[str] = []
        members: dict[str, Transform] = {}
        for i, j in self._places(names):
            maker, label = self.makers.values[i], self.rates.keys[j]
            if not maker.keeps_own(self.rates.values[j]):
                members.setdefault(label, self._at_rate(j))
            else:
                label = self._own_label(i, label)
                members.setdefault(label, _at_own_rate(self._own(maker)))
            labels.append(label)
        return members, labels

    def _own_label(self, place: int, label_of_rate: str) -> str:
        if self.makers.patterns is None:
            return label_of_rate
        label = self.makers.keys[place]
        return f"{label} at its own rate" if label in self.rates.keys else label

    def _at_rate(self, place: int) -> Transform:
        rate = self.rates.values[place]
        key = None if self.rates.patterns is None else self.rates.keys[place]
        return with_rate(self.call, self._by_optimizer, rate, self.decay_fn, key)

    def _by_optimizer(self, rate: OneRate) -> Transform:
        """Return the groups by optimizer, made at one rate."""

        def made(maker: Maker) -> Transform:
            if maker.keeps_own(rate):
                return _at_own_rate(self._own(maker))
            result = check_transformation(self.call, maker.factory(rate))
            return self._packed(in_float32(result), maker)

        def members(names: Sequence[str]) -> Members:
            labels = [self.makers.keys[i or 0] for i in self.makers.match(names)]
            pairs = zip(self.makers.keys, self.makers.values, strict=True)
            return {key: made(maker) for key, maker in pairs if key in labels}, labels

        if self.makers.patterns is None:
            return made(self.makers.values[0])
        return partition(members)

    def _own(self, maker: Maker) -> Transform:
        return self._packed(by_signature(maker.own()), maker)

    def _packed(self, transform: Transform, maker: Maker) -> Transform:
        if not self.pack_size or not maker.is_elementwise:
            return transform
        return pack_small_leaves(transform, self.pack_size)


Members = tuple[dict[Any, Transform], list[str]]


def partition(members: Callable[[Sequence[str]], Members]) -> Transform:
    """Return the transform that hands each leaf to the member that it belongs to.

    ``members(names)`` returns those that are needed and, for each name, whose it is.
    """

    def of(tree: PyTree) -> Transform:
        found, labels = members(leaf_names(tree))
        tree_of_labels = jax.tree.unflatten(jax.tree.structure(tree), labels)
        return optax.partition(found, tree_of_labels, mask_compatible_extra_args=True)

    def init(params: PyTree) -> PyTree:
        return of(params).init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        return of(updates).update(updates, state, params, **extra)

    return Transform(init, update)


def _check_pair(where: str, name: str, maker: Maker, rate: OneRate) -> None:
    """Refuse a rate for what takes none, and none for what takes one."""
    if maker.factory is None and rate is not None and not maker.governs:
        raise refusal(
            where,
            f"{quoted(name)} has a rate, but its optimizer, {maker.text}, is a "
            "function without arguments, which brings its own. Map it to None.",
        )
    if rate is None and maker.own is None:
        raise refusal(
            where,
            f"{quoted(name)} has the rate None, but its optimizer, {maker.text}, takes "
            "one. Give a number or a schedule.",
        )


def _at_own_rate(inner: Transform) -> Transform:
    """Return ``inner`` with a state marked as that of a rate of its own."""

    def init(params: PyTree) -> OwnRateState:
        return OwnRateState(inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, OwnRateState]:
        updates, after = inner.update(updates, state.inner, params, **extra)
        return updates, OwnRateState(after)

    return Transform(init, update)
