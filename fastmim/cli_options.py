# SPDX-License-Identifier: Apache-2.0
"""What each command takes, as a schema; and a command line or a YAML file read as the words of a schema.

The values of every source (flags, ``key=value``, YAML, Python) are checked by pydantic in one place, so that a wrong
one reads the same everywhere, in one line; a command line is therefore only split here.
"""

import re
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from tyro.conf import Positional, Suppress, arg

from fastmim import recipes
from fastmim.config import (
    WORDS,
    Config,
    ConfigT,
    DataConfig,
    MethodConfig,
    OptimConfig,
    PretrainSystemConfig,
    RunConfig,
    Section,
    locate,
    nearest,
    sections,
    update,
)
from fastmim.errors import UserError

SchemaT = TypeVar("SchemaT", bound=Section)
MAX_YAML_BYTES = 1_000_000
_KEY = re.compile(r"[A-Za-z][\w-]*")


# ---- What the commands take


class Demo(Section):
    """See it all work, in a few minutes on a CPU.

    Trains, probes and reports on a small set of photos that ships with the package.
    """

    out: str | None = None
    """The run folder; the next free one below runs/ when not given."""
    online: bool = False
    """Fetch Imagenette (94 MB) instead of using the photos that ship with the package."""


class Pretrain(Config):
    """Train a backbone on images without labels.

    Every option can also be written as epochs=10, or stand in a YAML file. The command line wins over --config, and
    --config over the recipe.
    """

    config: str | None = None
    """A YAML file of options, nested or flat, such as the config.yaml of an earlier run."""
    print_config: bool = False
    """Print the options that would be used, as YAML for --config, and stop."""
    dry_run: bool = False
    """Look at the images and the network, print what would happen, and stop."""


class Resume(Section):
    """Continue a run from its last checkpoint.

    What cannot change the result may change, and the run may become longer; everything else stays as it was.
    """

    run: Positional[str]
    """The run folder."""
    epochs: float = Field(default=400, gt=0)
    """Passes over the images, all in all; as before when not given."""
    data: Suppress[DataConfig] = DataConfig()
    method: Suppress[MethodConfig] = MethodConfig()
    optim: Suppress[OptimConfig] = OptimConfig()
    system: PretrainSystemConfig = PretrainSystemConfig()


class Report(Section):
    """Write an HTML report on a run, or compare several."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN..."), Field(min_length=1)]]
    """Run folders."""
    out: str | None = None
    """The file of a comparison; comparison.html when not given. The report on one run is RUN/report.html."""


class Export(Section):
    """Hand the weights over as a timm folder.

    The folder is loaded again, to check that the features come back as they were.
    """

    run: Positional[str]
    """The run folder."""
    out: str | None = None
    """The folder to write to; RUN/export/timm when not given."""


class Models(Section):
    """List the networks that can be trained."""

    pattern: Positional[str | None] = None
    """Part of a name, or a pattern such as 'vit_*_224'; families when not given."""
    resolution: int = Field(default=128, ge=8)
    """Side of the training crop in pixels, for which maps and strides are given."""
    limit: int = Field(default=40, ge=1)
    """Names to list at most."""


class Doctor(Section):
    """Check this machine and what is installed.

    Versions, devices, arithmetic, disk, image formats and extras are tried out, not only looked up.
    """

    compile: bool = False
    """Also compile a small function with torch.compile, which can take a minute."""


# ---- The command line


def leaves(schema: type[Section]) -> dict[str, FieldInfo]:
    """Every option of a schema by its flat name; the options of its sections stand beside its own."""
    found: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= leaves(field.annotation)
        elif Suppress not in field.metadata:
            found[name] = field
    return found


def read_words(schema: type[Section], argv: list[str]) -> dict[str, Any]:
    """The words that a command line sets, by field name, with values as text; the last of two settings wins.

    ``--mask-ratio 0.6``, ``--mask_ratio=0.6`` and ``mask_ratio=0.6`` are the same; ``--flip`` and ``--no-flip`` set a
    switch; what follows ``--`` is positional, whatever it looks like.

    Raises:
        UserError: an unknown word (the nearest names are given), a missing value, or a word too many.
    """
    known = leaves(schema)
    words: dict[str, Any] = {}
    loose: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        key, equals, text = token.removeprefix("--").partition("=")
        if token == "--":
            loose += tokens
            break
        if token.startswith("-") or (equals and _KEY.fullmatch(key)):
            name, negated = _find(key, known)
            _set(words, name, known[name], _value(token, known[name], text if equals else None, negated, tokens))
        else:
            loose.append(token)
    for name, field in known.items():
        if Positional in field.metadata:
            while loose and (name not in words or _is_list(field)):
                _set(words, name, field, loose.pop(0))
    if loose:
        raise UserError(f"unexpected word '{loose[0]}'")
    return words


def _find(key: str, known: Mapping[str, FieldInfo]) -> tuple[str, bool]:
    """The field that a key names, and whether it is said with ``no-`` before it."""
    name = key.replace("-", "_")
    for candidate in (*WORDS.get(name, ()), name):
        if candidate in known:
            return candidate, False
    switched = name.removeprefix("no_")
    if switched != name and switched in known and known[switched].annotation is bool:
        return switched, True
    typed = {field: word for word, fields in WORDS.items() for field in fields}
    raise UserError(f"unknown option '{key}'{nearest(key, [typed.get(field, field) for field in known])}")


def _value(token: str, field: FieldInfo, text: str | None, negated: bool, tokens: deque[str]) -> Any:
    """The value of one option: the ``text`` after its ``=``, or else as many of the next ``tokens`` as it takes."""
    if field.annotation is bool and (negated or text is None):
        if negated and text is not None:
            raise UserError(f"{token.partition('=')[0]} takes no value")
        return not negated
    width = 1 if _is_list(field) else len(get_args(field.annotation)) if _is_tuple(field) else 1
    parts: list[str] = []
    if text is None:
        while len(parts) < width:
            if not tokens or tokens[0].startswith("--"):
                raise UserError(f"{token} needs {'a value' if width == 1 else f'{width} values'}")
            parts += tokens.popleft().split(",") if width > 1 else [tokens.popleft()]
    else:
        parts = text.strip("[]()").split(",") if width > 1 else [text]
    if width > 1:
        return parts
    if type(None) in get_args(field.annotation) and parts[0].lower() in ("none", "null"):
        return None
    return parse_yaml(parts[0], token) if get_origin(field.annotation) is dict else parts[0]


def _set(words: dict[str, Any], name: str, field: FieldInfo, value: Any) -> None:
    words[name] = (*words.get(name, ()), value) if _is_list(field) else value


def _is_tuple(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _is_list(field: FieldInfo) -> bool:
    return _is_tuple(field) and Ellipsis in get_args(field.annotation)


def build(schema: type[SchemaT], words: Mapping[str, Any], command: str) -> SchemaT:
    """The options of one command from its words.

    Raises:
        UserError: a value that is missing or does not fit, in one line.
    """
    try:
        return schema.model_validate(words)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            labels = [item.metavar for item in schema.model_fields[name].metadata if hasattr(item, "metavar")]
            raise UserError(f"{command} needs {(*labels, name.upper())[0]}; see: fastmim {command} --help") from None
        raise UserError(f"command line: {name} = {first['input']!r}: {first['msg']}") from None


def own_words(words: dict[str, Any], schema: type[Section]) -> dict[str, Any]:
    """Takes out of ``words`` those of a command itself, which are no options of a run."""
    return {name: words.pop(name) for name in schema.__annotations__ if name in words}


def resolved(
    words: Mapping[str, Any],
    file: str | None,
    load: Callable[[str], ConfigT] = recipes.load,  # type: ignore[assignment]
    schema: type[RunConfig] = Config,
) -> ConfigT:
    """The recipe's options, changed by a YAML ``file``, changed by the ``words`` of the command line.

    Args:
        words: of the command line.
        file: of options, or None.
        load: gives the configuration of a recipe; of one for pre-training, when not given.
        schema: of that configuration.

    Raises:
        UserError: an unknown recipe, an unreadable file, an unknown option or a value that does not fit.
    """
    written = read_yaml(file, schema) if file else {}
    method = written.get("method")
    recipe = words.get("recipe") or written.get("recipe") or (isinstance(method, dict) and method.get("recipe"))
    config = load(str(recipe or schema.model_fields["method"].default.recipe))
    if file:
        config = update(config, {name: value for name, value in written.items() if name != "task"}, file)
    return update(config, words, "command line")


# ---- YAML


class _Loader(yaml.SafeLoader):
    """Plain data only, with the scalars of YAML 1.2: ``1e-3`` is a number, ``no`` and ``2024-01-01`` are text.

    Anchors and aliases are refused (a small file can stand for a huge one), and so is a key that stands twice.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever ``_Loader`` would not read back as text."""


_Loader.yaml_implicit_resolvers = {}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def read_yaml(path: str, schema: type[RunConfig] = Config) -> dict[str, Any]:
    """The options in a YAML file, nested in sections or flat; an empty file holds none.

    Raises:
        UserError: not a readable YAML mapping of at most 1 MB.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    if len(content) > MAX_YAML_BYTES:
        raise UserError(f"--config {path}: larger than {MAX_YAML_BYTES} bytes, so not a file of options")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not UTF-8 text") from None
    tree = parse_yaml(text, path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, but needs options as 'name: value' lines")
    seen: set[str] = set()
    for word, value in tree.items():
        if word == "task" and word in schema.model_fields:
            continue
        for name in value if word in sections(schema) and isinstance(value, dict) else [word]:
            _, field = locate(name, schema=schema)
            if field in seen:
                raise UserError(f"{path}: '{name}' is set twice, on its own and in a section or in two spellings")
            seen.add(field)
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML or JSON text.

    Raises:
        UserError: ``text`` does not parse; ``where`` and the line stand in the message.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def dump_yaml(value: RunConfig | Mapping[str, Any]) -> str:
    """YAML text that ``read_yaml`` reads back to the same values; a config is written in its four sections."""
    if isinstance(value, RunConfig):
        return yaml.dump(value.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True).strip()
