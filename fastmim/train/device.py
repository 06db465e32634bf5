# SPDX-License-Identifier: Apache-2.0
"""What the run computes with: device, arithmetic, loader processes; and the record of it."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from fastmim import __version__
from fastmim.errors import UserError
from fastmim.machine import cores


def pick_device(name: str | None, local: int = 0) -> torch.device:
    """The named device, or the fastest there is; ``local`` is the number of this rank on its machine.

    Raises:
        UserError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        kind = next(kind for kind, usable in there.items() if usable)
        return torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    kind = name.partition(":")[0]
    if not there.get(kind, False) or (kind == "cuda" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count()):
        usable = ", ".join(kind for kind, usable in there.items() if usable)
        raise UserError(f"device '{name}' is not on this machine; there is: {usable}")
    return torch.device(name)


def pick_precision(name: str | None, device: torch.device) -> torch.dtype | None:
    """bfloat16 for autocast, or None for float32; bf16 where the hardware has it, when no name is given."""
    if name is None:
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def pick_workers(count: int | None, device: torch.device) -> int:
    """Loader processes: the cores but one, at most 16; on a CPU one, because the network needs the cores."""
    if count is not None:
        return count
    available = cores()
    if available == 1:
        return 0
    return 1 if device.type == "cpu" else min(16, available - 1)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and command, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "fastmim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "git": _git(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git() -> str | None:
    """The commit of a source checkout of fastmim; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    call = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
