"""Constraints of configuration fields: the annotation gives the kind of value, a `Check` at the field its range."""

from __future__ import annotations

import functools
import json
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Check:
    """Constraint of a field: text of the allowed values, for errors and help, and a function that accepts them."""

    expected: str
    accepts: Callable[[Any], bool]

    def __and__(self, other: Check) -> Check:
        return Check(f"{self.expected} and {other.expected}", lambda v: self.accepts(v) and other.accepts(v))

    def or_none(self) -> Check:
        """Allow None too."""
        return Check(f"{self.expected}, or None", lambda v: v is None or self.accepts(v))


def _bound(words: str, compare: Callable[[Any, Any], bool]) -> Callable[[float], Check]:
    return lambda bound: Check(f"{words} {bound}", lambda v: compare(v, bound))


above, at_least = _bound("above", operator.gt), _bound("at least", operator.ge)
below, at_most = _bound("below", operator.lt), _bound("at most", operator.le)
PROBABILITY = at_least(0) & at_most(1)


def one_of(*choices: Any) -> Check:
    """Allow the given values."""
    return Check(f"one of {', '.join(map(repr, choices))}", lambda v: v in choices)


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_int(value: object) -> bool:
    """Return whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_int(value: Any) -> Any:
    """Convert integers of other libraries (NumPy), also in a list, to int, which JSON can hold; keep other values."""
    if type(value) in (list, tuple):
        return type(value)(map(as_int, value))
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _is_dict(value: object) -> bool:
    try:  # Trainer parses text
        return isinstance(json.loads(value) if isinstance(value, str) else value, dict | None)
    except ValueError:
        return False


_NUMBERS = Check("a list of numbers", lambda v: isinstance(v, list | tuple) and all(map(is_number, v)))
_TOKENS = Check(
    "a token id, a list of them (tokenizer.convert_tokens_to_ids(text) returns the id of a token)",
    lambda v: all(is_int(token) and token >= 0 for token in (v if isinstance(v, list | tuple) else [v])),
)
_KINDS = {
    bool: one_of(True, False),
    int: Check("a whole number", is_int),
    float: Check("a number (YAML reads 3e-5 as text: write 3.0e-5)", is_number),
    str: Check("text", lambda v: isinstance(v, str | os.PathLike)),
    dict[str, Any]: Check("a dict, one as JSON text", _is_dict),
    list[float]: _NUMBERS,
    list[int]: _TOKENS,
}


class _Help(str):
    """Help text that carries the check of its field, because HfArgumentParser passes all metadata to argparse."""

    check: Check | None


def _field(default: Any, text: str, check: Check | None = None) -> Any:
    """Declare a field with its help text, to which the range is added, and the check of its range."""
    help_text = _Help(f"{text} Allowed: {check.expected}." if check else text)
    help_text.check = check
    return field(default=default, metadata={"help": help_text})


@functools.cache
def field_checks(config: type) -> dict[str, list[Check]]:
    """Return the checks of each field that was declared by `_field`: first of its kind, then of its range."""
    hints, checks = get_type_hints(config), {}
    for name, text in ((f.name, f.metadata.get("help")) for f in fields(config)):
        if isinstance(text, _Help):
            kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
            kind = one_of(*get_args(kinds[0])) if get_origin(kinds[0]) is Literal else _KINDS[kinds[0]]
            both = [check for check in (kind, text.check) if check]
            checks[name] = [check.or_none() for check in both] if NoneType in kinds else both
    return checks


def check_fields(config: Any, declaring: type, **inherited: Check) -> None:
    """Check all fields that a class declares by `_field`, after integers of other libraries became int.

    Args:
        config: the object to check.
        declaring: its class, or the base of it that declares the fields: a subclass may redefine one without its check.
        inherited: checks of integer fields that a class of another library declares.

    Raises:
        ValueError: a value is not allowed; names the class, the field, the value, and what is allowed.
    """
    counts = {name: [_KINDS[int], check] for name, check in inherited.items()}
    for name, checks in (counts | field_checks(declaring)).items():
        object.__setattr__(config, name, as_int(getattr(config, name)))
        for check in checks:
            refuse_unless(check.accepts(getattr(config, name)), config, name, check.expected)


def refuse_unless(condition: bool, config: Any, name: str, expected: str) -> None:
    """Raise a ValueError with the class, the field, its value, and what it must be, unless a condition holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}: {name} must be {expected}; got {getattr(config, name)!r}.")
