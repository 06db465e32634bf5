# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints of unknown origin: tensors and plain values, never code.

A ``.pth`` file is a pickle, which can name any function to be called while it is read. ``weights_only=True`` builds
tensors and containers only, and the allow-list below adds what published checkpoints hold beside their weights. There
is no second, less safe try.
"""

import argparse
import codecs
import json
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fastmim.backbones.official.state import Content, State
from fastmim.errors import UserError

FILES = ("model.safetensors", "pytorch_model.bin")
_MODELS = ("model", "state_dict", "model_state", "model_state_dict", "teacher", "model_ema")
_LIMIT_CONFIG = 1 << 20
# A wrapper's name is taken off where one of these follows, with which every network begins.
_WRAPPERS = ("module.", "backbone.", "encoder.", "model.", "trunk.")
_BEGINNINGS = ("patch_embed", "stem", "cls_token", "embeddings", "downsample_layers", "conv1.")


def _allowed() -> list[Any]:
    """What may be built beside tensors: values without behaviour.

    ``argparse.Namespace`` (MAE, FastMIM save their arguments), the configuration of yacs and fvcore (Swin, SimMIM,
    pySlowFast), in whose place an ordinary OrderedDict is built, and numbers of NumPy (losses and accuracies), with the
    codec that pickles of protocol 2 write their bytes with. NumPy's arrays are left out: their shape alone could fill
    the memory.
    """
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "bool")}
    settings = [(OrderedDict, f"{module}.CfgNode") for module in ("yacs.config", "fvcore.common.config")]
    numpy = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, codecs.encode, *kinds, *settings, *numpy]


def read(path: Path) -> Content:
    """The tensors of a checkpoint, on the CPU, without the names of wrappers.

    Args:
        path: a ``.safetensors`` file, a file of ``torch.save``, or a folder with ``config.json`` and one of `FILES`.

    Raises:
        UserError: there is no such file, it is damaged, it holds objects that could run code, or no tensors.
    """
    file, config = _find(path)
    if file.suffix == ".safetensors":
        try:
            tensors: Any = safetensors.torch.load_file(file)
        except Exception as error:  # SafetensorError, OSError, and what torch makes of a strange type
            raise UserError(f"{file}: no intact safetensors file ({_line(error)})") from error
    else:
        tensors = _load(file)
    state, wrapped, notes = _unwrap(file, tensors)
    return Content(_bare(state), config, wrapped, notes)


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            return path, {}
        found = [path / name for name in FILES if (path / name).is_file()] if stat.S_ISDIR(kind) else []
        if not found:
            raise UserError(f"{path}: neither a checkpoint nor a folder with {' or '.join(FILES)}")
        return found[0], _config(path / "config.json")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{path} cannot be read: {_line(error)}") from error


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > _LIMIT_CONFIG:
        raise UserError(f"{file}: larger than 1 MB; a network's configuration is not")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no valid JSON ({_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: no configuration of a network")
    return config


def _load(file: Path) -> Any:
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:
            _check_zip(file)
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # torch raises nearly every kind for damaged files
        # torch explains itself over many lines; what it met comes after these words.
        reason = str(error).rpartition("WeightsUnpickler error:")[2]
        foreign = re.search(r"GLOBAL ([\w.]+)", reason)
        if foreign is not None:
            raise UserError(
                f"{file}: it holds {foreign[1]}, which could run code, and is not read; save its state_dict alone"
            ) from error
        reason = _line(reason) if " " in _line(reason) else type(error).__name__
        raise UserError(f"{file}: no checkpoint of PyTorch, or a damaged one ({reason})") from error


def _check_zip(file: Path) -> None:
    """torch.save stores without compression, so what a file says that it holds is no more than its own size."""
    with zipfile.ZipFile(file) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
    size = file.stat().st_size
    if total > size:
        raise UserError(f"{file}: says that it holds {total} bytes, but has {size}; it is damaged or hostile")


def _unwrap(file: Path, content: Any) -> tuple[State, bool, tuple[str, ...]]:
    """The state of the network, whether it lay inside of something, and what to say of it."""
    notes: list[str] = []
    wrapped = False
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        held = [name for name in _MODELS if isinstance(content.get(name), Mapping)]
        if held:
            wrapped = True
            content = content[held[0]]
            if held[0] in {"teacher", "model_ema"}:
                notes.append(f"The weights are those of '{held[0]}'.")
            elif "model_ema" in held:
                notes.append("The file also holds averaged weights (model_ema), which are not read.")
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds {type(content).__name__}, not the weights of a network")
    state = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        first = ", ".join(str(key)[:40] for key in list(content)[:5])
        raise UserError(f"{file}: holds no weights ({f'its keys are {first}' if first else 'it is empty'})")
    size = sum(value.numel() * value.itemsize for value in state.values())
    if size > 2 * file.stat().st_size:  # many names for one tensor; networks tie a few
        raise UserError(f"{file}: its weights would fill {size} bytes, but it has {file.stat().st_size}")
    for key, value in state.items():
        if value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UserError(f"{file}: {key} of shape {tuple(value.shape)} is larger than what is stored of it")
    # Copies: the file is mapped, not read, and what it maps would change with it.
    return {key: value.clone() for key, value in state.items()}, wrapped, tuple(notes)


def _bare(state: State) -> State:
    """The state without the names of wrappers around the network; what lies beside them keeps its name."""
    while True:
        for wrapper in _WRAPPERS:
            inside = {key.removeprefix(wrapper): value for key, value in state.items() if key.startswith(wrapper)}
            begins = (*_BEGINNINGS, *_WRAPPERS) if len(inside) == len(state) else _BEGINNINGS
            if any(key.startswith(begins) for key in inside):
                state = {key: value for key, value in state.items() if not key.startswith(wrapper)} | inside
                break
        else:
            return state


def _line(error: object) -> str:
    return str(error).strip().split("\n")[0][:200]
