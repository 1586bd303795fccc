"""What the arguments and results of the library are, by name.

Modules whose functions are public import ``annotations`` from ``__future__``, so that
``help()`` and the API pages print these names and not what they stand for.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
from jax.typing import ArrayLike

T_co = TypeVar("T_co", covariant=True)

PyTree: TypeAlias = Any
"""Any nesting of containers and arrays that ``jax.tree`` can take apart."""

Scalar: TypeAlias = float | jax.Array
"""A real number or a 0-d array, which may be traced."""

Pattern: TypeAlias = str | re.Pattern[str]
"""A parameter's name, a glob or a compiled regular expression."""


class ByPattern(Protocol[T_co]):
    """A mapping from patterns; unlike a ``Mapping``, one from str is one of them."""

    def __iter__(self) -> Iterator[Pattern]: ...

    def __len__(self) -> int: ...

    def values(self) -> Collection[T_co]:
        """The values, in order."""
        ...

    def items(self) -> Collection[tuple[Pattern, T_co]]:
        """The patterns with their values, in order."""
        ...


Params: TypeAlias = PyTree
"""A tree of arrays, of which the floating and complex ones are trained."""

Loss: TypeAlias = Callable[
    ..., Scalar | tuple[Scalar, PyTree] | tuple[Scalar, PyTree, PyTree]
]
"""``loss(params, [model_state,] ...) -> loss, [new_model_state,] [aux]``."""

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
"""A function of the step that returns a real scalar, as ``optax.Schedule``."""


class Transformation(Protocol):
    """Anything with ``init`` and ``update``, as ``optax.GradientTransformation``."""

    @property
    def init(self) -> Callable[..., PyTree]:
        """``init(params) -> state``."""
        ...

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """``update(updates, state, params) -> (updates, state)``."""
        ...


OneRate: TypeAlias = Scalar | Schedule | None
"""One learning rate; ``None`` for an optimizer that brings its own."""

LearningRate: TypeAlias = OneRate | ByPattern[OneRate]
"""A learning rate, or a mapping from patterns to learning rates."""

OneOptimizer: TypeAlias = (
    str
    | Transformation
    | Callable[[jax.Array], Transformation]
    | Callable[[], Transformation]
)
"""A name, an instance, or a function or class of the learning rate or of nothing."""

Optimizer: TypeAlias = OneOptimizer | ByPattern[OneOptimizer]
"""An optimizer, or a mapping from patterns to optimizers."""

NoiseScale: TypeAlias = Scalar | Schedule | Transformation | None
"""The noise's standard deviation, or a transformation such as add_gradient_noise."""

Multipliers: TypeAlias = ByPattern[Scalar | Schedule]
"""A mapping from patterns to factors, each a number or a function of the step."""

Pairs: TypeAlias = list[tuple[jax.Array, jax.Array]]
"""Every ``(gradient, variable)``, in the order of the leaves."""

Clip: TypeAlias = (
    Scalar
    | Transformation
    | Callable[[Pairs], Iterable[tuple[jax.Array, jax.Array]]]
    | None
)
"""The largest norm, a transformation, or a function of all (gradient, variable)."""

DecayFn: TypeAlias = Callable[[jax.Array, jax.Array], ArrayLike]
"""``decay_fn(learning_rate, step) -> rate``, a real scalar."""

Variables: TypeAlias = (
    Pattern | Collection[Pattern] | Callable[[str, jax.Array], bool] | PyTree | None
)
"""What is trained, by names, patterns, a predicate or a tree of bools."""


class UpdateContext(NamedTuple):
    """What an update op may look at."""

    params: Params  # after the update
    aux: PyTree
    loss: jax.Array  # before the update
    step: jax.Array | None  # before its increment


AxisName: TypeAlias = str | tuple[str, ...] | None
"""The name of a mesh axis, or several."""

UpdateOp: TypeAlias = Callable[[PyTree, UpdateContext], PyTree]
"""``op(model_state, context) -> model_state``."""

Summaries: TypeAlias = Sequence[
    Literal[
        "learning_rate", "loss", "gradients", "gradient_norm", "global_gradient_norm"
    ]
]
"""Names out of ``OPTIMIZER_SUMMARIES``, of what a step reports."""

Differentiated: TypeAlias = tuple[tuple[jax.Array, tuple[PyTree, PyTree]], PyTree]
"""``((loss, (model_state, aux)), gradients)``."""

Objective: TypeAlias = Callable[..., tuple[jax.Array, tuple[PyTree, PyTree]]]
"""``objective(params, /, *args, model_state=None, **kwargs)``."""

Differentiate: TypeAlias = Callable[..., Differentiated]
"""A function of the arguments of the objective."""


class ValueAndGrad(Protocol):
    """A function like ``jax.value_and_grad``."""

    def __call__(
        self, objective: Objective, /, *, has_aux: Literal[True]
    ) -> Differentiate:
        """Return a function that returns the objective's results and its gradient."""
        ...
