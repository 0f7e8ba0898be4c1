"""Mistakes that the user can mend: a message that says what, which value, and what to do."""

import contextlib
import importlib
import operator
from collections.abc import Iterator
from types import ModuleType

MEMORY = "not enough memory; try a smaller model or --batch-size, or train with --accumulation-steps"


class UserError(ValueError):
    """A mistake that the user can mend: the message says what, which value, and what to do."""


class NotAvailable(UserError):
    """A dataset that is neither on disk nor to be downloaded."""


class DamagedFile(UserError):
    """A file that is not, or not any more, what it should be."""


LIMITS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "more than"),
    "below": (operator.lt, "less than"),
}


def check_limits(name: str, value: float, **limits: float) -> None:
    """Raise UserError naming a value that is not within limits, such as least=1."""
    for limit, bound in limits.items():
        holds, words = LIMITS[limit]
        if not holds(value, bound):
            raise UserError(f"{name} is {value}; it must be {words} {bound}")


def optional(module: str, user: str) -> ModuleType:
    """A module of a package that only `user` needs; UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"{user} needs the package {package}; get it with: pip install {package}") from error


def is_memory_error(error: BaseException) -> bool:
    """Whether torch, of any device, or Python says that memory is short."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))


def reason_of(error: Exception) -> str:
    """What went wrong with a file's content, in one line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextlib.contextmanager
def believing(what: str) -> Iterator[None]:
    """While what a file says is used, which may be anything: an error becomes a UserError of `what` and the reason.

    Too little memory is not the file's fault, and passes.
    """
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise
        raise UserError(f"{what} ({reason_of(error)})") from error


def flag_of(name: str) -> str:
    """The flag of a field: --hidden-size of hidden_size."""
    return "--" + name.replace("_", "-")


def one_line(message: str) -> str:
    """The message as one line that any terminal can show: a path may hold line breaks, a number 5,000 digits."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    return line if len(line) <= 2000 else f"{line[:900]} ... {line[-900:]}"
