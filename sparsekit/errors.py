"""The one exception that a user's mistake raises, which the command line turns into one sentence and exit code 2; and Ctrl-C."""

from threading import Event

# Set by the command line when Ctrl-C has come, or another signal that ends. KeyboardInterrupt alone does not say so: raised in
# Python that a library in C has called, it can end as an error of the library's, such as that a file is broken.
interrupted = Event()


class SparsekitError(ValueError):
    """Input that cannot be used. The text is one sentence: what must hold, what came, what to do."""


class RankLost(SparsekitError):
    """Another of several processes is gone, or failed by no mistake of the user's: what is finished is of use, and is kept."""


def is_mistake(error: BaseException) -> bool:
    """Whether the error is a user's mistake, so that nothing that was made of such input is of use."""
    return isinstance(error, SparsekitError) and not isinstance(error, RankLost) and not interrupted.is_set()


def listed(names, last: str = "and") -> str:
    """The names as a person would list them: ``a, b and c``; ``last`` stands before the last one."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
