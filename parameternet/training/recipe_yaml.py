"""Parse the YAML of a recipe, and apply `key=value` overrides."""

from __future__ import annotations

from typing import Any

import yaml

from parameternet.training.errors import RecipeError


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a duplicate key is an error; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            value = self.construct_object(key)
            if value in first:
                lines = f"lines {first[value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {value!r} in {lines}")
            first[value] = key
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain data.

    Raises:
        yaml.YAMLError: not YAML, or a duplicate key.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    except (ValueError, OverflowError, RecursionError) as error:  # an impossible date, endless nesting
        raise yaml.YAMLError(str(error)) from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply `key=value` to `values`, in place; `a.b=value` sets a key of a dictionary.

    Raises:
        RecipeError: the override is not `key=value`, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"an override must be key=value, got {override!r}")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {key} is not valid YAML: {text!r} ({error})") from error
    *outer, last = key.strip().split(".")
    for name in outer:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r} sets a key of {name}, which is {inner!r}, not a dictionary")
        values = inner
    values[last] = value
