"""How values read in an error, and what counts as a number."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optloss.messages import (
    argument_error,
    check_callable,
    check_int,
    check_number,
    listing,
    nearest,
    short_repr,
)


class Point(NamedTuple):
    x: object
    y: object


class Named:
    """It can be called, and has no name."""

    def __call__(self):
        return None

    def __repr__(self):
        return "Named()"


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


CYCLIC: list = []
CYCLIC.append(CYCLIC)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        ("a", "'a'"),
        (None, "None"),
        (jnp.zeros((2, 3)), "float32[2,3]"),
        (np.zeros((), np.int8), "int8[]"),
        (jax.ShapeDtypeStruct((4,), jnp.bfloat16), "bfloat16[4]"),
        (jax.random.key(0), "key<fry>[]"),
        (short_repr, "short_repr"),
        (int, "int"),
        (Named(), "Named()"),
        (
            functools.partial(short_repr, 3, value=jnp.zeros(2)),
            "short_repr(3, value=float32[2])",
        ),
        (
            {"w": jnp.zeros(2), "f": [short_repr, 1]},
            "{'w': float32[2], 'f': [short_repr, 1]}",
        ),
        (Point(jnp.zeros(1), {"y": (np.ones(2),)}), "Point(x=float32[1], y={'y': (flo"),
        ([Named(), Ellipsis], "[Named(), Ellipsis]"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        ({"a\nb": "c   d"}, "{'a\\nb': 'c d'}"),
        ([BadRepr(), 1], "[<BadRepr>, 1]"),
        (CYCLIC, "[[[[[[[...]]]]]]]"),
        (10**5000, "an int of 16610 bits"),
        ({"x" * 10**7: 1}, "{'xxx"),
        ([0] * 10**6, "[0, 0, 0, "),
        ("\udcff", "'\\udcff'"),
        ((1,), "(1,)"),
        (set(), "set()"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_a_value_is_shown_in_few_words(value, text):
    assert short_repr(value).startswith(text)
    assert len(short_repr(value)) <= 60


def test_no_number_of_an_array_is_looked_at():
    @jax.jit
    def traced(leaf):
        assert short_repr({"w": [leaf]}) == "{'w': [float32[3]]}"
        return leaf

    traced(jnp.zeros(3))
    gone = jnp.zeros(3)
    gone.delete()
    assert short_repr((gone,)) == "(float32[3],)"


@pytest.mark.parametrize(
    "good", [0, 1, 0.5, np.float16(0.5), np.int64(3), np.array(7.0), jnp.array(-7)]
)
def test_numbers_are_judged_and_arrays_by_their_kind(good):
    check_number("call", "argument", good, lambda number: number >= 0, "positive.")


@pytest.mark.parametrize(
    "bad",
    [
        *(-1, True, np.True_, "1", None, 1j, np.zeros(1), np.array(1j), np.array(True)),
        *(np.array(-1), np.array(np.nan), np.float32(-1), -(10**400)),
    ],
)
def test_what_is_no_such_number_is_refused(bad):
    with pytest.raises(ValueError, match=r"^call\(argument=.*\): must be positive\.$"):
        check_number("call", "argument", bad, lambda number: number >= 0, "positive.")


def test_whole_numbers():
    for good in (3, np.int64(3)):
        assert type(check_int("call", "argument", good, 3, "an int >= 3.")) is int
    for bad in (2, 3.0, True, "3", None, np.array(3)):
        with pytest.raises(ValueError, match=r"must be an int >= 3\.$"):
            check_int("call", "argument", bad, 3, "an int >= 3.")


def test_lists_of_names_are_sorted_and_short():
    assert listing("cab") == "'a', 'b', 'c'"
    assert listing(map(str, range(12)), 2) == "'0', '1' and 10 more"
    assert listing([]) == ""
    assert nearest("kernal", ["bias", "kernel", "kernels"]) == ["kernel", "kernels"]
    assert nearest("???", ["bias"]) == []
    assert nearest("adamW", ["adam", "adamw", "AdamW2"], 1) == ["adamw"]
    assert nearest("Adm", ["adam", "Adam"], 1) == ["Adam"]
    assert nearest("x" * 10**7, ["x"]) == []


def test_no_message_is_longer_than_two_thousand_letters():
    text = str(argument_error("call", "argument", 1, "what is wrong. " * 10_000))
    assert len(text) <= 2000
    assert text.startswith("call(argument=1): what is wrong.")
    assert text.endswith("what is wrong. ")
    assert len(listing(["x" * 10**6] * 20)) < 2000


def test_a_callable_is_judged_by_its_signature():
    def two(one, other):
        return one, other

    check_callable("call", "fn", two, 2, "a function")
    check_callable("call", "fn", max, 1, "a function")
    check_callable("call", "fn", two, 1, "a function", more=True)
    for bad, text in ((two, "Its signature is (one, other)."), (1, "a function.")):
        with pytest.raises(ValueError, match=re.escape(text) + "$"):
            check_callable("call", "fn", bad, 1, "a function")


def test_a_default_whose_repr_fails_is_no_matter():
    def odd(one, other=BadRepr(), *, third):  # noqa: B008 - such a default is what is tested
        return one, other, third

    with pytest.raises(ValueError, match=r"Its signature is \(\.\.\.\)\.$"):
        check_callable("call", "fn", odd, 1, "a function")
