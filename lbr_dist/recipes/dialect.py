"""The YAML that recipes are written in: YAML 1.2's numbers, no dates, no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """A SafeLoader without YAML's silent last-one-wins where a key is given twice; with the numbers of YAML 1.2 (010 is
    ten, 1:30 a text, 1e-4 a number) and without dates: no setting is one, and a run may be named after the day."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as its base declares it)
        first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag != "tag:yaml.org,2002:timestamp"
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are names, each given once."""
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"line {key.start_mark.line + 1}: a name was expected: is {{{{ ... }}}} to be filled in?",
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice (line {key.start_mark.line + 1}): remove one"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """A number in decimal, whatever zeros it starts with, or in hexadecimal behind 0x."""
        return int(node.value, 16 if "x" in node.value.lower() else 10)


class Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes whatever text `Loader`, or a reader of YAML 1.1, would take for something else."""


_DIGITS = "[0-9]+(_[0-9]+)*"
_INTEGER = rf"([-+]?{_DIGITS}|0x[0-9a-f]+)$"
_FLOAT = rf"([-+]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_integer)
for _kind, _form in (("int", _INTEGER), ("float", _FLOAT)):
    for _user in (Loader, Dumper):
        _user.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(_form, re.IGNORECASE), list("-+.0123456789")
        )
