# SPDX-License-Identifier: Apache-2.0
"""Methods as functions: each file of this folder holds one function of the file's name that returns a ``Config``.

A new method is a new file; the command line and the tests find it by its name. ``finetune.py`` holds those for what
learns from labels.
"""

import importlib
import pkgutil

from fastmim.config import Config, nearest
from fastmim.errors import UserError


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "finetune")


def load(name: str) -> Config:
    """The configuration of one recipe.

    Raises:
        UserError: no recipe has that name.
    """
    if name not in names():
        raise UserError(f"unknown recipe '{name}'{nearest(name, names())}; there are: {', '.join(names())}")
    config: Config = getattr(importlib.import_module(f"{__name__}.{name}"), name)()
    return config
