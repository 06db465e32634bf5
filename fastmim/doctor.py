# SPDX-License-Identifier: Apache-2.0
"""What this machine can do for a training run: every answer is tried out, not looked up."""

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastmim import __version__

if TYPE_CHECKING:
    import torch

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding: ``note`` is worth knowing, ``problem`` makes training impossible; ``advice`` says what to do."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""


def checks(compile: bool = False) -> Iterator[Check]:
    """Every check, each as soon as it is known; ``compile`` also compiles a small function (up to a minute)."""
    yield _python()
    yield _fastmim()
    libraries = [_library(name) for name in ("torch", "torchvision", "timm")]
    yield from libraries
    if all(check.status == "ok" for check in libraries):
        yield from _devices()
        yield _bfloat16()
        yield _compiled() if compile else _compiler()
    yield _folder()
    yield from _shared_memory(Path("/dev/shm"))
    yield from _decoding()
    yield from _extras()


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _fastmim() -> Check:
    try:
        return Check("fastmim", "ok", version("fastmim"))
    except PackageNotFoundError:
        detail = f"{__version__}, found in {Path(__file__).parent}, but not installed"
        return Check("fastmim", "note", detail, "pip install fastmim")


def _library(name: str) -> Check:
    """Imports it: a wheel that does not fit its neighbours fails here, with missing files or missing operators."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "install torch, torchvision and timm together: pip install --upgrade torch torchvision timm"
        return Check(name, "problem", reason, advice)
    return Check(name, "ok", str(module.__version__))


def _devices() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    detail = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    if _device().type == "cpu":
        yield Check("cpu", "note", f"{detail}; no GPU found", "keep to small networks and --resolution 64 to 128")
    else:
        yield Check("cpu", "ok", detail)


def _device() -> "torch.device":
    """The device that is tried: the one that a run would take."""
    from fastmim.train.device import pick_device

    return pick_device(None)


def _bfloat16() -> Check:
    import torch

    from fastmim.train.device import pick_precision

    device = _device()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            product = torch.ones(16, 16, device=device) @ torch.ones(16, 16, device=device)
        right = product.dtype == torch.bfloat16 and bool((product == 16).all())
    except RuntimeError as error:
        return Check("bf16", "note", f"{device.type}: {str(error).splitlines()[0]}", "--precision fp32")
    if not right:
        return Check("bf16", "note", f"{device.type} computes it wrongly", "--precision fp32")
    chosen = "bf16" if pick_precision(None, device) else "fp32"
    return Check("bf16", "ok", f"works on {device.type}; without --precision a run takes {chosen}")


def _compiler() -> Check:
    """Whether what torch.compile needs is there, without the minute that a compilation can take."""
    triton = importlib.util.find_spec("triton") is not None
    found = [name for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl") if name and shutil.which(name)]
    if _device().type == "cuda" and not triton:
        return Check("compile", "note", "triton is missing", "pip install triton, or leave --compile away")
    if not found:
        return Check("compile", "note", "no C++ compiler", "install g++ or clang++, or leave --compile away")
    tools = f"{found[0]} and triton" if triton else found[0]
    return Check("compile", "ok", f"{tools} found; not tried", "to try it: fastmim doctor --compile")


def _compiled() -> Check:
    import torch

    device = _device()
    start = time.monotonic()
    try:
        # A compiler can fail in any way (a missing header, a driver, a full disk): that is the finding.
        result = torch.compile(lambda x: (x * 2).relu().sum())(torch.ones(64, device=device)).item()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Check("compile", "note", f"{device.type}: {reason}", "leave --compile away")
    if result != 128:
        return Check("compile", "note", f"{device.type} computes it wrongly", "leave --compile away")
    return Check("compile", "ok", f"works on {device.type} ({time.monotonic() - start:.0f} s for a small function)")


def _folder() -> Check:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    detail = f"{here}: {free:.0f} GiB free"
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        return Check("folder", "note", f"{here}: {error.strerror}", "name a folder that can be written: --out FOLDER")
    if free < 2:
        return Check("folder", "note", detail, "two checkpoints of a ViT-B need 2 GiB: --out on a larger disk")
    return Check("folder", "ok", detail)


def _shared_memory(path: Path) -> Iterator[Check]:
    """Loader workers hand images over in shared memory, of which containers have 64 MiB unless told otherwise."""
    if not path.is_dir():
        return
    size = shutil.disk_usage(path).total / GIB
    detail = f"{path}: {size:.2g} GiB"
    if size < 0.5:
        yield Check("shared memory", "note", detail, "docker run --ipc=host (or --shm-size=8g), or --workers 0")
    else:
        yield Check("shared memory", "ok", detail)


def _decoding() -> Iterator[Check]:
    from PIL import Image

    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    failed = []
    for kind in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        # Pillow built without a codec raises KeyError (not registered) or OSError (encoder not available).
        with contextlib.suppress(KeyError, OSError):
            picture.save(buffer, kind)
            with Image.open(buffer) as image:
                if image.convert("RGB").size == picture.size:
                    continue
        failed.append(kind)
    if failed:
        status: Literal["note", "problem"] = "problem" if "JPEG" in failed else "note"
        yield Check("images", status, f"Pillow cannot read {', '.join(failed)}", "pip install --force-reinstall pillow")
    else:
        yield Check("images", "ok", f"JPEG, PNG and WebP with Pillow {version('pillow')}")


def _extras() -> Iterator[Check]:
    """What the installed package itself names as optional, so that there is no second list to keep."""
    try:
        lines = requires("fastmim") or []
    except PackageNotFoundError:
        return
    wanted: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        name = re.match(r"[\w.-]+", requirement.strip())
        if extra and name and name[0] != "fastmim":
            wanted[extra[1]].append(name[0])
    for extra_name, names in wanted.items():
        missing = [name for name in names if not _installed(name)]
        title = f"[{extra_name}]"
        if missing:
            yield Check(title, "note", f"missing: {', '.join(missing)}", f'pip install "fastmim[{extra_name}]"')
        else:
            yield Check(title, "ok", ", ".join(names))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
