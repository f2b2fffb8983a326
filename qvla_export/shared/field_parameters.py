"""A dataclass that a function takes whole, as parameters that a command line can offer."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any


def with_fields(
    command: Callable[..., None], name: str, noun: type[Any], options: Mapping[str, Any]
) -> Callable[..., None]:
    """Return a function with a parameter for each field of a dataclass that it takes whole.

    Args:
        command: the function; parameters of its own with a field's name stay its own.
        name: its parameter that takes the dataclass.
        noun: the dataclass, each field with a default.
        options: field -> annotation of its parameter. A tuple is taken as a list, or None.
    """
    shown = signature(command)
    # An option of that name which the command has itself is its own affair.
    members = [f for f in fields(noun) if f.name not in shown.parameters]
    # A list that is not given has no default to show.
    lists = {f.name for f in members if isinstance(f.default, tuple)}
    defaults = {f.name: None if f.name in lists else f.default for f in members}
    singles = [
        Parameter(part, Parameter.KEYWORD_ONLY, default=default, annotation=options[part])
        for part, default in defaults.items()
    ]

    @wraps(command)
    def parsed(**values: Any) -> None:
        parts = {single.name: values.pop(single.name) for single in singles}
        parts |= {part: tuple(parts[part] or ()) for part in lists}
        command(**values, **{name: noun(**parts)})

    parameters = []
    for parameter in shown.parameters.values():
        own = [parameter.replace(kind=Parameter.KEYWORD_ONLY)]
        parameters.extend(singles if parameter.name == name else own)
    parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    parsed.__dict__["__signature__"] = shown.replace(parameters=parameters)
    return parsed
