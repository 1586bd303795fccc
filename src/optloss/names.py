"""Names of the leaves of a tree, and patterns that select them.

A leaf's name is its path joined by ``/``: ``dense/kernel``, ``layers/0/weight``. It is
the same whether the tree is made of dicts, lists, named tuples, dataclasses, Flax or
Equinox modules. A pattern is a name, a glob or a compiled regular expression, and the
first pattern that matches a name wins.

Silent typos are what this module is there to prevent: a pattern that matches nothing,
and one that earlier patterns leave nothing to, are errors.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeGuard

import jax

from optloss.messages import (
    argument_error,
    check_callable,
    listing,
    nearest,
    quoted,
    refusal,
    short_repr,
)
from optloss.trees import is_float8, is_inexact
from optloss.typing import Pattern, PyTree, Variables


def is_pattern(value: object) -> TypeGuard[Pattern]:
    """Tell whether ``value`` is a name, a glob or a compiled regular expression."""
    return isinstance(value, (str, re.Pattern))


def text_of(pattern: Pattern) -> str:
    """Return the text that a pattern is written as."""
    return pattern if isinstance(pattern, str) else pattern.pattern


def leaf_names(tree: PyTree) -> list[str]:
    """Return the name of every leaf of ``tree``, in the order of ``jax.tree.leaves``.

    >>> leaf_names({"dense": {"kernel": 0.0, "bias": 0.0}, "scales": [1.0, 2.0]})
    ['dense/bias', 'dense/kernel', 'scales/0', 'scales/1']
    """
    names = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_nnx_variable):
        # An nnx Variable adds a key of its own, which `init` sees and `update` may not.
        cut = 1 if _is_nnx_variable(node) else 0
        for rest, _ in jax.tree.leaves_with_path(node):
            whole = (*path, *rest[cut:])
            names.append(jax.tree_util.keystr(whole, simple=True, separator="/"))
    return names


def inexact_names(tree: PyTree) -> list[str]:
    """Return the names of the floating and complex leaves of ``tree``."""
    pairs = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return [name for name, leaf in pairs if is_inexact(leaf)]


def _is_nnx_variable(node: object) -> bool:
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(node).__mro__
    )


def check_names(call: str, params: PyTree) -> None:
    """Refuse ``params`` if two of its leaves have the same name."""
    first: dict[str, int] = {}
    for i, name in enumerate(leaf_names(params)):
        earlier = first.setdefault(name, i)
        if earlier < i:
            paths = jax.tree.leaves_with_path(params)
            one, other = (jax.tree_util.keystr(paths[at][0]) for at in (earlier, i))
            raise refusal(
                call,
                f"the parameters {one} and {other} have the same name {quoted(name)}, "
                "by which noise is drawn, patterns match and summaries are told apart. "
                "Rename one of them.",
            )


def matcher(pattern: Pattern) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches ``pattern``.

    >>> matches = matcher("layers_*/**/bias")
    >>> matches("layers_0/bias"), matches("layers_0/mlp/bias"), matches("head/bias")
    (True, True, False)
    """
    if isinstance(pattern, re.Pattern):
        return lambda name: pattern.fullmatch(name) is not None
    if "*" not in pattern:
        return lambda name: name == pattern
    regex = re.compile(_regex_of_glob(pattern), re.DOTALL)
    return lambda name: name == pattern or regex.fullmatch(name) is not None


def _regex_of_glob(glob: str) -> str:
    parts = [
        part
        for part, following in itertools.pairwise((*glob.split("/"), ""))
        if not part == following == "**"
    ]
    if parts == ["**"]:
        return ".*"
    regex = ""
    for i, part in enumerate(parts):
        slash = "/" if i > 0 and parts[i - 1] != "**" else ""
        if part != "**":
            regex += slash + _regex_of_segment(part)
        elif i < len(parts) - 1:
            regex += slash + "(?:[^/]*/)*"
        else:
            regex += "(?:/[^/]*)*"
    return regex


def _regex_of_segment(segment: str) -> str:
    wild = {"*": "[^/]*", "**": ".*"}
    pieces = re.split(r"(\*+)", segment)
    return "".join(wild.get(piece[:2]) or re.escape(piece) for piece in pieces)


def first_match(patterns: Sequence[Pattern], names: Sequence[str]) -> list[int | None]:
    """Return, for each name, the index of the first of ``patterns`` that matches it."""
    matchers = [matcher(pattern) for pattern in patterns]
    return [
        next((i for i, matches in enumerate(matchers) if matches(name)), None)
        for name in names
    ]


def check_patterns(
    call: str, patterns: Sequence[Pattern], names: Sequence[str]
) -> None:
    """Refuse a pattern that matches no name, or only names that earlier ones took."""
    unused = sorted(set(range(len(patterns))) - set(first_match(patterns, names)))
    if not unused:
        return
    pattern = patterns[unused[0]]
    text = text_of(pattern)
    shown, taken = quoted(text), list(filter(matcher(pattern), names))
    if taken:
        raise refusal(
            call,
            f"the pattern {shown} is left nothing by the patterns before it, which "
            f"already match {listing(taken)}. Put the narrower pattern first.",
        )
    name = text.removesuffix(":0")
    ending = ": names have no ':0' ending here" if name != text else ""
    if ending and name in names:
        advice = f"Write {quoted(name)}."
    elif close := nearest(name, names):
        advice = f"Nearest: {listing(close)}."
    else:
        advice = f"The parameters are {listing(names)}." if names else "There are none."
    raise refusal(call, f"the pattern {shown} matches no parameter{ending}. {advice}")


def check_variables(call: str, variables: Variables) -> None:
    """Refuse ``variables`` if it is empty or nothing that can select parameters."""
    if variables is None or is_pattern(variables) or is_mask(variables):
        return
    if callable(variables):
        wanted = "a predicate (name, leaf) -> bool"
        check_callable(call, "variables", variables, 2, wanted)
    elif not is_pattern_list(variables):
        problem = (
            "must be names or patterns, a predicate (name, leaf) -> bool, or a tree of "
            "bools like the parameters."
        )
        raise argument_error(call, "variables", variables, problem)
    elif not variables:
        problem = "selects nothing to train. None trains every floating parameter."
        raise argument_error(call, "variables", variables, problem)


def select(call: str, variables: Variables, params: PyTree) -> list[bool]:
    """Return, for each leaf of ``params``, whether ``variables`` has it trained.

    Only inexact leaves can be; ``None`` selects all of them.
    """
    check_variables(call, variables)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    if not names:  # nothing, or a placeholder that stands for parameters
        return []
    chosen = _choose(call, variables, params, names, leaves)
    selected = [
        wanted and is_inexact(leaf) for wanted, leaf in zip(chosen, leaves, strict=True)
    ]
    for name, leaf, wanted in zip(names, leaves, selected, strict=True):
        if wanted and is_float8(leaf):
            raise refusal(
                call,
                f"the parameter {quoted(name)} is {short_repr(leaf)}, too coarse to be "
                "trained. Keep it in bfloat16 and cast it in the loss, or name the "
                "others with variables.",
            )
    if not any(selected) and variables is not None:
        raise argument_error(
            call,
            "variables",
            variables,
            "selects no floating parameter, so there is nothing to train. "
            f"The parameters are {listing(names)}.",
        )
    return selected


def _choose(
    call: str,
    variables: Variables,
    params: PyTree,
    names: list[str],
    leaves: list[PyTree],
) -> list[bool]:
    if variables is None:
        return [True] * len(names)
    if is_mask(variables):
        # By name, not structure: an nnx State meets its own plain arrays in an update.
        if leaf_names(variables) != names:
            raise argument_error(
                call,
                "variables",
                variables,
                "a tree of bools must have the structure of the parameters, "
                f"{jax.tree.structure(params)}. Names, patterns or a predicate (name, "
                "leaf) -> bool are accepted, too.",
            )
        return jax.tree.leaves(variables)
    if callable(variables):
        return [bool(variables(*pair)) for pair in zip(names, leaves, strict=True)]
    patterns = as_patterns(call, "variables", variables)
    for pattern in patterns:
        check_patterns(f"{call}, variables", [pattern], names)
    return [index is not None for index in first_match(patterns, names)]


def as_patterns(call: str, argument: str, value: object) -> list[Pattern]:
    """Return names and patterns as a list, of which ``value`` may be one."""
    if is_pattern(value):
        return [value]
    if not is_pattern_list(value):
        problem = "must be a name, a pattern or a list of them."
        raise argument_error(call, argument, value, problem)
    return sorted(value, key=str)


def is_pattern_list(value: object) -> TypeGuard[Collection[Pattern]]:
    """Tell whether ``value`` is a list, tuple or set of names and patterns."""
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        is_pattern(entry) for entry in value
    )


def is_mask(value: object) -> bool:
    """Tell whether ``value`` is a tree of bools; a module of them may be callable."""
    if isinstance(value, Iterator):  # which JAX would take for a leaf
        return False
    try:
        leaves = jax.tree.leaves(value)
    except (RecursionError, SystemError):  # a list that holds itself
        return False
    return bool(leaves) and all(isinstance(leaf, bool) for leaf in leaves)
