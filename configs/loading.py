"""Reading a recipe from YAML, and writing the resolved configuration of a run back to it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .overrides import apply_override
from .schema import Config
from .validation import validate

RECIPES = Path(__file__).resolve().parent
"""The folder of the recipes that come with the package."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file ``path`` with ``key.sub=value`` overrides laid over it, in order.

    The types and the keys are checked here; whether the numbers fit together is asked of ``check_config`` and
    ``check_layout``. Raises UsageError with one sentence per mistake.
    """
    raw = _parse(_read(path), path)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def dump_config(config: Config) -> str:
    """YAML of the resolved configuration: defaults written out, unset keys left out.

    Loading it gives an equal Config.
    """
    document = config.model_dump(mode="json", exclude_none=True)
    segments = document["model"]["stack"]
    document["model"]["stack"] = [_mixer_first(segment) for segment in segments]
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)


def set_vocabulary(config: Config, size: int) -> Config:
    """A copy whose vocabulary has room for the ``size`` token ids of the data.

    A larger vocabulary that the configuration names itself is kept; a smaller one raises UsageError.
    """
    named = config.model.vocabulary_size
    if named is not None and named < size:
        raise UsageError(
            f"model.vocabulary_size={named} is smaller than the {size} token ids of the data; "
            f"leave it out or set model.vocabulary_size={size}"
        )
    model = config.model.model_copy(update={"vocabulary_size": named or size})
    return config.model_copy(update={"model": model})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist{_similar_recipes(path)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text, so it is no YAML recipe") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path} is not valid YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    _refuse_repeated_keys(root, path)
    if not isinstance(document, dict):
        raise UsageError(f"{path} holds no configuration: write sections such as 'model:' and 'train:'")
    return document


def _refuse_repeated_keys(root: yaml.Node | None, path: Path) -> None:
    """YAML lets the last of two equal keys win, which would drop a whole section without a word."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse_repeats_in(node, path)
            waiting.extend(value for _, value in node.value)
        else:
            waiting.extend(node.value)


def _refuse_repeats_in(node: yaml.MappingNode, path: Path) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UsageError(
                f"{path} gives {key.value} at line {lines[key.value]} and again at line {line}: keep one"
            )
        lines[key.value] = line


def _similar_recipes(path: Path) -> str:
    recipes = {_recipe_name(recipe): recipe for recipe in sorted(RECIPES.rglob("*.yaml"))}
    names = [name for name in recipes if name.split("/")[-1] == _recipe_name(path)]
    names = names or difflib.get_close_matches(_recipe_name(path), recipes, n=2)
    if not names:
        return f"; recipes are in {_displayed(RECIPES)}"
    return f"; did you mean {' or '.join(_displayed(recipes[name]) for name in names)}?"


def _recipe_name(path: Path) -> str:
    """Family and size. The folder of all recipes is left out: it would make any two names alike."""
    return "/".join(part for part in path.parts[-2:] if part != RECIPES.name).removesuffix(".yaml")


def _displayed(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _mixer_first(segment: dict[str, Any]) -> dict[str, Any]:
    head = {key: segment[key] for key in ("mixer",) if key in segment}
    return head | segment
