"""The one exception that a user's mistake raises, which the command line turns into one sentence and exit code 2; and Ctrl-C."""

from threading import Event

# Set by the command line when Ctrl-C has come. KeyboardInterrupt alone does not say so: raised in Python that a library in C has
# called, it can end as an error of the library's, such as that a file is broken.
interrupted = Event()


class SparsekitError(ValueError):
    """Input that cannot be used. The text is one sentence: what must hold, what came, what to do."""


def listed(names, last: str = "and") -> str:
    """The names as a person would list them: ``a, b and c``; ``last`` stands before the last one."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
