# SPDX-License-Identifier: Apache-2.0
"""Words to options: the same flat word works on the command line, in Python and in YAML, for every kind of run."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from fastmim.config.parts import RunConfig, Section
from fastmim.config.pretrain import Config
from fastmim.errors import UserError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

# The word that users type where it is not the field's name: `data=` means `data.paths=`, or the one `data.path=`.
WORDS = {"data": ("paths", "path")}


def sections(schema: type[RunConfig] = Config) -> dict[str, type[Section]]:
    """The sections of a kind of run, by name."""
    found = {name: field.annotation for name, field in schema.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def locate(word: str, where: str = "", schema: type[RunConfig] = Config) -> tuple[str, str]:
    """The (section, field) that a user's word means; ``-`` and ``_`` are the same.

    Raises:
        UserError: no such option; the nearest names are given.
    """
    name = word.replace("-", "_")
    for section, part in sections(schema).items():
        for field in (*WORDS.get(name, ()), name):
            if field in part.model_fields:
                return section, field
    raise UserError(f"{where}{': ' if where else ''}unknown option '{word}'{nearest(word, option_words(schema))}")


def option_words(schema: type[RunConfig] = Config) -> list[str]:
    """Every word that a run takes, in the schema's order."""
    back = {field: word for word, fields in WORDS.items() for field in fields}
    return [back.get(field, field) for part in sections(schema).values() for field in part.model_fields]


def nearest(word: str, names: list[str]) -> str:
    """An ending for an error line: ``; nearest: a, b``, or nothing when no name is near."""
    found = difflib.get_close_matches(word.replace("-", "_"), names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else ""


def update(config: ConfigT, words: Mapping[str, Any], where: str = "options") -> ConfigT:
    """``config`` with values set by flat words (``epochs``) or by whole sections (``optim: {epochs: ...}``).

    Raises:
        UserError: an unknown word, or a value that does not fit; ``where`` names the place in the message.
    """
    schema = type(config)
    tree = config.model_dump()
    given: set[str] = set()
    for word, value in words.items():
        if word in sections(schema) and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                section, field = locate(str(inner), where, schema)
                if section != word:
                    raise UserError(f"{where}: '{inner}' stands under '{word}', but belongs under '{section}'")
                tree[section][field] = inner_value
                given.add(field)
        else:
            section, field = locate(word, where, schema)
            plain = _plain(value)
            tree[section][field] = (plain,) if field == "paths" and isinstance(plain, str) else plain
            given.add(field)
    _let_the_last_word_win(tree, given)
    return validate(tree, where, schema)


def _let_the_last_word_win(tree: dict[str, dict[str, Any]], given: set[str]) -> None:
    """Two words for one thing: what is given now replaces the other, which a recipe or a file may have set."""
    for section, word, other in (
        ("optim", "lr", "lr_per_256"),
        ("optim", "lr_per_256", "lr"),
        ("optim", "epochs", "steps"),
        ("data", "resolution", "phases"),
    ):
        if word in given and tree[section][word] is not None and other in tree[section] and other not in given:
            tree[section][other] = None


def _plain(value: Any) -> Any:
    """Paths as text, as YAML and the command line give them."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def validate(tree: Mapping[str, Any], where: str = "options", schema: type[ConfigT] | None = None) -> ConfigT:
    """A configuration of the kind ``schema`` (of a pre-training run, when not given) from nested plain values.

    Raises:
        UserError: the first value that does not fit, in one line.
    """
    try:
        return cast(ConfigT, (schema or Config).model_validate(tree))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "value"
        message = first["msg"].removeprefix("Value error, ")
        # A section's own check speaks of its fields by name; what was given there is the whole section.
        given = "" if isinstance(first["input"], Mapping) else f"{name} = {first['input']!r}: "
        raise UserError(f"{where}: {given}{message}") from None
