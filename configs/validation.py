"""From a raw mapping to a typed Config, with every mistake told in one sentence the reader of a recipe understands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .engine_checks import explained
from .errors import UsageError
from .schema import Config
from .stack import MIXERS, AnyMixerSegment, Section, SharedKVSegment

MOST_MISTAKES = 8
"""Lines of mistakes shown at once."""

Location = tuple[int | str, ...]

SEGMENTS: dict[str, type[Section]] = {
    **dict(zip(MIXERS, get_args(AnyMixerSegment), strict=True)),
    "shared_kv": SharedKVSegment,
}

_DEMANDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text: put it in quotes if it looks like a number or a date",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "path_type": "a path: put it in quotes if it looks like a number or a date",
    "duration": "seconds, or text such as 90m, 23h30m or 1d12h",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of no more than {max_length}",
}

_SPLIT: Location = ("parallel", "pipeline_split")

_BESIDE_OPTIONS: dict[Location, str] = {_SPLIT: "a list of the layers of each chunk such as [3, 5]"}
"""What a key takes other than one of its options."""


def validate(raw: Mapping[str, Any]) -> Config:
    """The typed configuration that ``raw`` describes. Raises UsageError with one line per mistake, at most 8."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = list(dict.fromkeys(_mistakes(error.errors(include_url=False))))
    if len(lines) > MOST_MISTAKES:
        rest = len(lines) - MOST_MISTAKES + 1
        lines[MOST_MISTAKES - 1 :] = [f"and {rest} more mistakes"]
    raise UsageError("\n".join(lines))


def nearest(word: str, options: Collection[str], cutoff: float = 0.6) -> str | None:
    """The option that ``word`` is most likely a misspelling of, if any is as similar as ``cutoff`` (1 is equal)."""
    return next(iter(difflib.get_close_matches(word, options, n=1, cutoff=cutoff)), None)


def shown(value: object) -> str:
    """``value`` on one line as YAML would write it, cut when it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True).removesuffix(
        "...\n"
    )
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _mistakes(errors: list[ErrorDetails]) -> Iterator[str]:
    misspelt = {_suggestion(error["loc"]) for error in errors if _is_unknown_key(error)}
    for error in errors:
        if error["type"] == "missing" and _dotted(error["loc"]) in misspelt:
            continue  # its key is there, under a wrong name that is reported already
        if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # the list is long enough: pydantic counts only its valid items
        yield _sentence(error)


def _sentence(error: ErrorDetails) -> str:
    location, kind, value = error["loc"], error["type"], error["input"]
    path = _dotted(location)
    if _is_unknown_key(error):
        return _unknown_key(location)
    if kind == "missing":
        return _missing(location, value)
    if kind == "union_tag_not_found":
        return f"{path}={shown(value)} is not a segment: give it a mixer ({', '.join(MIXERS)}) or a shared_kv"
    if kind == "union_tag_invalid":
        return _not_an_option(f"{path}.mixer", value["mixer"], MIXERS)
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return _not_an_option(path, value, options, beside=_BESIDE_OPTIONS.get(location[:2]))
    if kind == "model_type" and value is None:
        return f"{path} is empty: give it keys or leave it out"
    if kind in _DEMANDS:
        return f"{path}={shown(value)} must be {_DEMANDS[kind].format(**error.get('ctx', {}))}"
    return f"{path}={shown(value)} is not accepted: {error['msg']}"


def _missing(location: Location, within: object) -> str:
    path = _dotted(location)
    if isinstance(within, list):
        return f"{_dotted(location[:-1])}={shown(within)} is too short: it has no {path}"
    return f"{path} is missing, and it has no default"


def _not_an_option(path: str, value: object, options: Collection[str], beside: str | None = None) -> str:
    # Options may differ by one letter and mean different things (fp16 is no misspelling of bf16).
    near = nearest(str(value), options, cutoff=0.8)
    hint = f"; did you mean {near}?" if near else ""
    nor = f", nor {beside}" if beside else ""
    return f"{path}={shown(value)} is not one of {', '.join(options)}{nor}{hint}"


def _is_unknown_key(error: ErrorDetails) -> bool:
    return error["type"] in ("extra_forbidden", "invalid_key")


def _unknown_key(location: Location) -> str:
    section = location[:-1]
    if explanation := explained(_dotted(section), str(location[-1])):
        return explanation
    unknown = f"{_dotted(location)} is not a key{_of_segment(section)}"
    if suggestion := _suggestion(location):
        return f"{unknown}; did you mean {suggestion}?"
    elsewhere = [key for key in _all_keys(Config) if key.rpartition(".")[2] == location[-1]]
    if elsewhere:
        return f"{unknown}; did you mean {' or '.join(elsewhere)}?"
    keys = ", ".join(_owner(section).model_fields)
    return f"{unknown}; the keys of {_dotted(section) or 'the configuration'} are {keys}"


def _suggestion(location: Location) -> str | None:
    """The path of the key beside ``location`` that its last part is a misspelling of."""
    near = nearest(str(location[-1]), _owner(location[:-1]).model_fields)
    return _dotted((*location[:-1], near)) if near else None


def _all_keys(owner: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in owner.model_fields.items():
        if section := _section_in(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def _section_of_items(annotation: Any) -> type[Section] | None:
    return _section_in(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def _section_in(annotation: Any) -> type[Section] | None:
    # A section that may be left out is a union with None.
    members = [member for member in get_args(annotation) or (annotation,) if member is not NoneType]
    only = members[0] if len(members) == 1 else None
    return only if isinstance(only, type) and issubclass(only, Section) else None


def _is_segment_tag(location: Location, position: int) -> bool:
    """Whether a part of a pydantic location names the member of the segment union and not a key."""
    return location[:2] == ("model", "stack") and position == 3


def _is_tag(location: Location, position: int) -> bool:
    """Whether a part of a pydantic location names the member of any union and not a key."""
    return _is_segment_tag(location, position) or (location[:2] == _SPLIT and position == 2)


def _owner(location: Location) -> type[Section]:
    """The section whose keys stand at ``location``."""
    owner: type[Section] = Config
    for position, part in enumerate(location):
        if _is_segment_tag(location, position):
            owner = SEGMENTS[str(part)]
        elif field := owner.model_fields.get(str(part)):
            owner = _section_in(field.annotation) or _section_of_items(field.annotation) or owner
    return owner


def _of_segment(section: Location) -> str:
    return f" of mixer {section[3]}" if len(section) == 4 and section[3] in MIXERS else ""


def _dotted(location: Location) -> str:
    return ".".join(str(part) for position, part in enumerate(location) if not _is_tag(location, position))
