"""What a compiled program holds, read off its text."""

import re


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


def compiled_programs(train_op):
    """Return how many programs the calls of a training op were compiled to."""
    programs = train_op._compiled.programs.values()
    return sum(program._cache_size() for program in programs)
