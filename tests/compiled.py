"""What a compiled program holds, read off its text."""

import contextlib
import logging
import re

import jax


def computations(text):
    """Return the computations of a program by name; the entry's is ''."""
    found = {}
    for part in re.split(r"\n\n(?=\S)", text):
        head = re.match(r"(ENTRY )?%(\S+) \(", part)
        if head:
            found["" if head[1] else head[2]] = part
    return found


def always_run(text):
    """Return the text of all that runs whatever the branches taken."""
    parts, found, waiting = computations(text), {}, [""]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = parts[name]
            called = r"\b(?:calls|to_apply|body|condition)=%([^\s,}]+)"
            waiting += re.findall(called, parts[name])
    return "\n".join(found.values())


@contextlib.contextmanager
def compilations():
    """Yield a list that gets the name of each function that JAX compiles meanwhile.

    The size of a function's cache is no count of them: up to jax 0.10 a call with a
    typed key may be in it twice.
    """
    names = []

    class Listener(logging.Handler):
        def emit(self, record):
            found = re.match(r"Compiling (?:jit\()?([\w<>]+)", record.getMessage())
            names.extend(found.groups() if found else [])

    logger, listener = logging.getLogger("jax"), Listener()
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(listener)


def compiled_programs(train_op):
    """Return how many programs the calls of a training op were compiled to."""
    programs = train_op._compiled.programs.values()
    return sum(program._cache_size() for program in programs)
