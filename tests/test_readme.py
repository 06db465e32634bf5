# SPDX-License-Identifier: Apache-2.0
"""What the README says is there is there, and its tables are what results/ say."""

import re
import subprocess
import sys
from pathlib import Path

from fastmim.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_the_results_say() -> None:
    subprocess.run([sys.executable, "benchmarks/readme_tables.py", "--check"], cwd=ROOT, check=True, timeout=120)


def test_every_linked_file_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"fastmim (\w+)", README))
    assert {"demo", "pretrain", "resume", "probe", "report"} <= commands
    assert {word for word in commands if word not in COMMANDS} <= {"takes"}
