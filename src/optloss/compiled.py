"""A step, compiled once for each placement of its state, whose buffers it may take."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from optloss.donation import copies_of_donated
from optloss.fast.handover import Stacked
from optloss.mesh import kept_shardings
from optloss.typing import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledStep:
    """A function of the shardings of its state, the state, and more arguments.

    It returns the new state, and an output whose placement XLA chooses.
    """

    step: Callable[..., Any]
    donate: bool
    programs: dict[PyTree, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, state: PyTree, *args: PyTree, **kwargs: PyTree) -> Any:
        """Make the step. Arrays of ``state`` among the arguments are copied before."""
        if self.donate:
            args, kwargs = copies_of_donated(state, (args, kwargs))
        new_state, output = self._program(state)(state, *args, **kwargs)
        return new_state, output._replace(summaries=output.summaries.summaries())

    def _program(self, state: PyTree) -> Callable[..., Any]:
        shardings = kept_shardings(state, state.params)
        key = None if shardings is None else (jax.tree.structure(state), shardings)
        if key not in self.programs:
            placed = None if key is None else jax.tree.unflatten(*key)
            self.programs[key] = jax.jit(
                functools.partial(self._handed_over, placed),
                donate_argnums=(0,) if self.donate else (),
                out_shardings=(placed, None),
            )
        return self.programs[key]

    def _handed_over(
        self, shardings: PyTree, state: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> Any:
        new_state, output = self.step(shardings, state, *args, **kwargs)
        return new_state, output._replace(summaries=Stacked.of(output.summaries))
