# SPDX-License-Identifier: Apache-2.0
"""The ``fastmim`` command: words in, one call of the library, a few lines out.

Every command is a schema of ``cli_options``, from which tyro draws its help, and a function. torch and timm are
imported inside the functions, so that help and mistakes are answered at once.
"""

import contextlib
import dataclasses
import fnmatch
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from fastmim import __version__
from fastmim.cli_bench import Bench, bench
from fastmim.cli_compare import Compare, compare
from fastmim.cli_data import Prepare, Scan, Select, prepare, scan, select
from fastmim.cli_embed import Embed, embed
from fastmim.cli_options import (
    Demo,
    Doctor,
    Export,
    Models,
    Pretrain,
    Report,
    Resume,
    build,
    dump_yaml,
    own_words,
    parse_yaml,
    read_words,
    resolved,
)
from fastmim.cli_output import INTERRUPTED, OK, USER_ERROR, finished, print_fields, print_styled
from fastmim.cli_probe import Probe, probe
from fastmim.cli_transfer import Distill, Finetune, Predict, distill, finetune, predict
from fastmim.config import Config, Section, locate, nearest, update
from fastmim.errors import UserError

STATUS_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


# ---- What the commands do


def demo(words: dict[str, Any]) -> int:
    """Prints where the report is."""
    options = build(Demo, words, "demo")
    from fastmim.demo.run import demo as run_demo

    path = run_demo(options.out, options.online)
    if path.is_dir():  # a run that was stopped has no report yet
        return finished(path)
    print(f"report:  {path}")
    return OK


def pretrain(words: dict[str, Any]) -> int:
    """Resolves the options and trains, or prints what they are or what they would do."""
    options = build(Pretrain, own_words(words, Pretrain), "pretrain")
    config: Config = resolved(words, options.config)
    if options.print_config:
        print(dump_yaml(config), end="")
        return OK
    if not config.data.paths:
        raise UserError("pretrain needs DATA, a folder of images; see: fastmim pretrain --help")
    from fastmim import runs

    if options.dry_run:
        print_fields(runs.plan(config))
        return OK
    return finished(runs.pretrain(config).path)


def resume(words: dict[str, Any]) -> int:
    """Continues a run with the options that were given."""
    path = words.pop("run", None)
    if path is None:
        raise UserError("resume needs RUN; see: fastmim resume --help")
    config = update(Config(), words, "command line")
    changes = {name: getattr(getattr(config, locate(name)[0]), name) for name in words}
    from fastmim import runs

    return finished(runs.resume(path, changes=changes).path)


def report(words: dict[str, Any]) -> int:
    """Prints where the page is."""
    options = build(Report, words, "report")
    if options.out and not options.runs[1:]:
        raise UserError(f"--out is for a comparison of runs; the report on one is {options.runs[0]}/report.html")
    from fastmim.report.page import write_comparison, write_report

    folders = [Path(run) for run in options.runs]
    if folders[1:]:
        print(write_comparison(folders, Path(options.out or "comparison.html")))
    else:
        print(write_report(folders[0]))
    return OK


def export(words: dict[str, Any]) -> int:
    """Prints where the weights are, and how to load them."""
    options = build(Export, words, "export")
    from fastmim import runs

    folder, difference = runs.export(options.run, out=options.out)
    print(f"{folder} (features differ by at most {difference:.1e} after reloading)")
    print(f"use it: timm.create_model('local-dir:{folder}', pretrained=True)")
    return OK


def models(words: dict[str, Any]) -> int:
    """Prints families of networks, or those that match a pattern."""
    options = build(Models, words, "models")
    from fastmim.backbones import catalog

    families = catalog.families()
    if options.pattern is None:
        width = max(map(len, families))
        for family, names in families.items():
            examples = sorted(names, key=lambda name: (name.startswith("test_"), len(name), name))[:3]
            print_styled("bold", f"{family:{width}}", f"{len(names):5}  {', '.join(examples)}")
        print(f"\n{sum(map(len, families.values()))} models; fastmim models PATTERN tells more, such as: resnet50")
        return OK
    pattern = options.pattern if set(options.pattern) & set("*?[") else f"*{options.pattern}*"
    every = sorted(name for names in families.values() for name in names)
    found = fnmatch.filter(every, pattern)
    if not found:
        raise UserError(f"no model matches '{options.pattern}'{nearest(options.pattern, every)}")
    print_networks(found[: options.limit], options.resolution)
    if len(found) > options.limit:
        print(f"{options.limit} of {len(found)} models; --limit {len(found)} shows all")
    return OK


def doctor(words: dict[str, Any]) -> int:
    """Prints what was found; 1 if training is not possible."""
    options = build(Doctor, words, "doctor")
    from fastmim.doctor import checks

    problems = 0
    # Line by line, because importing torch and timm takes seconds.
    for check in checks(options.compile):
        print_styled(STATUS_STYLES[check.status], f"{check.status:9}", f"{check.name:15}{check.detail}")
        if check.advice:
            print_styled("dim", f"{'':24}-> {check.advice}", "")
        problems += check.status == "problem"
    print("\ntraining is not possible here until the problems above are solved" if problems else "\nready to train")
    return 1 if problems else OK


# ---- Parts of the commands


def print_networks(names: list[str], resolution: int) -> None:
    """Prints what can be known of networks without building them in memory, one line each."""
    from fastmim.backbones import catalog

    width = max(map(len, names))
    print_styled("dim", f"{'name':{width}}  {'weights':>9}  {'hides by':20}  channels/stride of its maps", "")
    # Line by line, because laying a network out takes up to a second or two.
    for name in names:
        try:
            facts = catalog.describe(name, resolution)
        except UserError as error:
            print_styled("bold", f"{name:{width}}", f"  {error}")
            continue
        hides = " ".join(way for way in ("pixels", "tokens", "drop") if way in facts["hides"])
        maps = " ".join(f"{channels}/{stride}" for channels, stride in facts["stages"])
        print_styled("bold", f"{name:{width}}", f"  {facts['params'] / 1e6:7.1f} M  {hides:20}  {maps}")
    print("\nhides by: pixels, a learnt colour; tokens, a learnt token; drop, hidden tokens are not encoded (fastest);")
    print("and every network by compact: visible blocks moved together")


# ---- Help


def print_help(schema: type[Section], command: str) -> None:
    """Prints the help of one command, drawn by tyro from the schema and its docstrings."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional_rule)
    registry.primitive_rule(_mapping_rule)
    with contextlib.suppress(SystemExit):
        tyro.cli(
            schema,
            prog=f"fastmim {command}",
            args=["--help"],
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.PositionalMetavarFromFieldName,
                tyro.conf.FlagCreatePairsOff,
            ),
            registry=registry,
        )


def _optional_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Shows ``X | None`` as plain X: that ``none`` is its default is said by the default."""
    inner = [option for option in get_args(info.type) if option is not type(None)]
    if len(inner) != 1 or type(None) not in get_args(info.type):
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none"] if value is None else spec.str_from_instance(value),
    )


def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A mapping is one word of JSON or YAML; tyro itself would take its default apart into options."""
    if info.type_origin is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda texts: parse_yaml(texts[0], "command line"),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [dump_yaml(value)],
    )


# ---- The command line


class Command(NamedTuple):
    """What a command takes, what it does (words in, exit code out), and how it is called."""

    schema: type[Section]
    run: Callable[[dict[str, Any]], int]
    usage: str


COMMANDS = {
    "demo": Command(Demo, demo, "demo"),
    "pretrain": Command(Pretrain, pretrain, "pretrain DATA..."),
    "probe": Command(Probe, probe, "probe RUN DATA"),
    "finetune": Command(Finetune, finetune, "finetune DATA RUN"),
    "compare": Command(Compare, compare, "compare DATA"),
    "predict": Command(Predict, predict, "predict RUN IMAGES"),
    "distill": Command(Distill, distill, "distill DATA RUN"),
    "embed": Command(Embed, embed, "embed RUN DATA..."),
    "report": Command(Report, report, "report RUN..."),
    "resume": Command(Resume, resume, "resume RUN"),
    "export": Command(Export, export, "export RUN"),
    "scan": Command(Scan, scan, "scan DATA..."),
    "prepare": Command(Prepare, prepare, "prepare DATA..."),
    "select": Command(Select, select, "select RUN"),
    "bench": Command(Bench, bench, "bench [DATA]"),
    "models": Command(Models, models, "models [PATTERN]"),
    "doctor": Command(Doctor, doctor, "doctor"),
}
FIRST = 4


def print_overview() -> None:
    """Prints what ``fastmim --help`` says: the commands that most people need first, then the rest."""
    lines = [f"  fastmim {command.usage:20}{first_sentence(command.schema)}" for command in COMMANDS.values()]
    print("fastmim pre-trains any vision backbone on your own images, without labels.\n")
    print("To begin", *lines[:FIRST], "", "Also", *lines[FIRST:], sep="\n")
    print("\nfastmim COMMAND --help shows every option; fastmim --version the version.")
    print("Exit codes: 0 done, 2 something to mend in the command or its input, 130 interrupted;")
    print("            doctor answers 1 when training is not possible on this machine.")


def first_sentence(schema: type[Section]) -> str:
    """The first line of a schema's docstring: what the command is for."""
    return (schema.__doc__ or "").splitlines()[0]


def run(argv: list[str]) -> int:
    """Finds and runs one command; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_overview()
        return OK
    if argv[0] == "--version":
        print(f"fastmim {__version__}")
        return OK
    name, *rest = argv
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {what} '{name}'{nearest(name, list(COMMANDS))}; see: fastmim --help")
    command = COMMANDS[name]
    options = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in options or "--help" in options:
        print_help(command.schema, name)
        return OK
    return command.run(read_words(command.schema, rest))


def main(argv: list[str] | None = None) -> int:
    """The console script: runs ``argv`` (the process's arguments when None) and returns the exit code."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fastmim: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("fastmim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone (`fastmim models vit | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
