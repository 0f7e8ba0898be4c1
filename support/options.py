"""Fields of a dataclass that say what they mean and which values they take: config.py is made of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from support.errors import UserError, check_limits


def option(default: Any, help: str, type: Callable = str, choices: tuple = (), group: str = "", **limits: float) -> Any:
    """A field of Config: its default, its meaning, how a flag's text is read, and the values it may take.

    A group is the heading in --help of this field and of those after it; limits are those of check_limits.
    """
    metadata = {"help": help, "type": type, "choices": choices, "group": group, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def check_option(field: dataclasses.Field, value: Any) -> None:
    """UserError unless a field made by `option` may have this value."""
    kind, choices = field.metadata["type"], field.metadata["choices"]
    if value is None and isinstance(None, field.type):
        return
    if not isinstance(value, (int, float) if kind is float else kind):
        raise UserError(f"{field.name} {value!r} is not of type {kind.__name__}")
    if choices and value not in choices:
        raise UserError(f"{field.name} {value!r} is not one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name} is {value}; give a finite number")
    check_limits(field.name, value, **field.metadata["limits"])
