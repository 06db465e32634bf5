# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, files and functions stay small, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastmim

PACKAGE = Path(fastmim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Who may import whom; a part may always import itself and the leaves.
LEAVES = {"errors", "evidence", "seeding", "config", "mask", "machine"}
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "recipes": set(),
    "data": set(),
    "backbones": set(),
    "mim": set(),
    "tasks": {"data", "backbones", "mim"},
    "train": set(),
    "significance": set(),
}
TOP = {
    *("__init__", "__main__", "runs", "run_folder", "run_images", "run_network", "run_training", "export", "report"),
    *("cli", "cli_bench", "cli_compare", "cli_data", "cli_embed", "cli_options", "cli_output", "cli_probe"),
    *("cli_transfer", "demo", "doctor", "choose", "comparing", "contact_sheet", "embedding", "outcome", "predicting"),
    *("significance", "speed", "starts", "transfer", "transfer_setup"),
}
LIGHT = [
    "fastmim",
    "fastmim.errors",
    "fastmim.evidence",
    "fastmim.seeding",
    "fastmim.config",
    "fastmim.recipes",
    "fastmim.cli",
]


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "fastmim":
            names = [f"fastmim.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("fastmim."):
                yield name.split(".")[1]


def test_every_file_belongs_to_a_part() -> None:
    assert {part(path) for path in FILES} <= set(MAY_IMPORT) | TOP


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    here = part(path)
    names = set(imported(ast.parse(path.read_text(encoding="utf-8")))) - {"__version__"}
    if here in TOP:
        return
    assert names <= MAY_IMPORT[here] | LEAVES | {here}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    assert "util" not in path.stem
    assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_dangerous(path: Path) -> None:
    """No pickle, no code from data: weights are safetensors, options are YAML of plain values.

    Other projects' checkpoints are pickles: one file may read them, and only tensors and plain values of them.
    """
    reads_pickles = path == PACKAGE / "backbones" / "official" / "read.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "marshal", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if reads_pickles and call == "torch.load":
                only = [word.value for word in node.keywords if word.arg == "weights_only"]
                assert [ast.unparse(value) for value in only] == ["True"]
                continue
            assert call not in {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system"}, call
            assert "shell=True" not in ast.unparse(node)


def test_help_needs_neither_torch_nor_timm() -> None:
    script = (
        f"import sys, {', '.join(LIGHT)}; print([m for m in ('torch', 'timm', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert sorted(fastmim.__all__) == dir(fastmim)
    for name in fastmim.__all__:
        assert getattr(fastmim, name) is not None
