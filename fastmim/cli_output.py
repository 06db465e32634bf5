# SPDX-License-Identifier: Apache-2.0
"""What all commands end with and print: exit codes, lines of fields, styled lines, what to do with a finished run."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OK, USER_ERROR, INTERRUPTED = 0, 2, 130


def finished(path: Path) -> int:
    """Says what to do with a run that has ended, or been interrupted; the exit code."""
    if os.environ.get("RANK", "0") != "0":
        return OK  # of several processes the first speaks, and is still writing
    if json.loads((path / "status.json").read_text(encoding="utf-8"))["state"] == "interrupted":
        print(f"fastmim: interrupted; to continue: fastmim resume {path}", file=sys.stderr)
        return INTERRUPTED
    print(f"report:  {path / 'report.html'}")
    print(f"weights: {path / 'export' / 'timm'}")
    if (path / "finetune.json").is_file():
        result = json.loads((path / "finetune.json").read_text(encoding="utf-8"))
        top = result["accuracy"]
        print(f"result:  {top['top1']:.1f} % of {result['test']} images right ({top['low']:.1f} to {top['high']:.1f})")
        print(f"use it:  fastmim predict {path} IMAGES")
    else:
        print(f"probe:   fastmim probe {path} LABELLED_IMAGES")
        print(f"then:    fastmim finetune LABELLED_IMAGES {path}")
    return OK


def print_fields(values: Mapping[str, Any], indent: str = "") -> None:
    """Prints names and values in two columns, groups indented below their name."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            print_fields(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name:{width}}  {text}")


def print_styled(style: str, start: str, rest: str) -> None:
    """Prints a line whose start has a style on a terminal, and none elsewhere."""
    if not sys.stdout.isatty():
        print(start + rest, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((start, style), rest), soft_wrap=True)
