# SPDX-License-Identifier: Apache-2.0
"""From a file to weights that fit a timm network: read, tell the layout, rename, recognise, and check every key."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value
from torch import Tensor

from fastmim.backbones.blueprint import Blueprint, TimmModel, create
from fastmim.backbones.official import hugging_face, mmpretrain, staged, vit
from fastmim.backbones.official.networks import SIZES, Network, recognise
from fastmim.backbones.official.read import read
from fastmim.backbones.official.state import Content, Converted, Layout, State
from fastmim.errors import UserError

LAYOUTS: Sequence[Layout] = (*hugging_face.LAYOUTS, *mmpretrain.LAYOUTS, *vit.LAYOUTS, *staged.LAYOUTS)
_TIMM = "timm"
# Batch norm counts its batches only to average over all of them, which no network here does.
_COUNTER = "num_batches_tracked"
# Where weights of the network itself lie, in any layout: one without a place would change what is computed.
_INSIDE = ("blocks.", "layers.", "stages.", "encoder.layer", "encoder.stages.", "patch_embed", "stem", "block1.")


@dataclass(frozen=True)
class Imported:
    """Weights of another project, by the keys of a timm network.

    Attributes:
        weights: by stock timm keys, at their native size; without decoder, mask token and the like. The classifier is
            kept where there is one that timm's network can have.
        architecture: a timm name.
        model_args: further arguments of ``timm.create_model`` that the weights need; plain JSON values, without
            ``img_size`` and ``num_classes``. A Swin whose windows follow the size of the images, as all published ones
            do, needs no ``window_size``: `fastmim.backbones.adapter.build` sets it by the resolution.
        resolution: side in pixels of the images that the weights are for, where shapes tell it.
        layout: the project, such as "FastMIM" or "Hugging Face".
        unused: foreign keys that have no place in the backbone.
        missing: stock keys of the backbone, head excepted, that the file does not hold.
        notes: sentences that a user should read.
    """

    weights: dict[str, Tensor]
    architecture: str
    model_args: dict[str, Any]
    resolution: int | None
    layout: str
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def read_official(path: str | Path, architecture: str | None = None, heads: int | None = None) -> Imported:
    """Reads a checkpoint of another project and brings it to the keys of a timm network; no code in it is run.

    Args:
        path: a ``.pth`` or ``.safetensors`` file, or a folder with ``config.json`` beside such a file.
        architecture: a timm name, where the network cannot be recognised or is to be another; its shapes must fit.
        heads: of attention, for a plain ViT, whose shapes do not show them (`paper.md`: FastMIM's ViT-B).

    Raises:
        UserError: the file cannot be read or is no checkpoint, its layout or network is not known, or its weights do
            not fit the network.
    """
    path = Path(path)
    content = read(path)
    hint = architecture or _text(content.config.get("architecture"))
    layout = next((one for one in LAYOUTS if one.recognise(content)), None)
    name = _TIMM if layout is None else layout.name
    try:
        converted = Converted(dict(content.state)) if layout is None else layout.convert(content)
        if heads is not None:
            converted = _with_heads(converted, heads)
        network = recognise(converted)
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:  # shapes that no network of theirs has
        raise UserError(f"{path}: {name}'s keys, but with shapes that are not read ({error})") from error
    if hint is not None:
        network = _named(hint, network, content, layout is None and architecture is None, heads)
    if network is None:
        raise UserError(f"{path}: {_unknown(content, layout)}")
    if heads is not None and not _plain(network.architecture):
        raise UserError(f"heads: {network.architecture} is no plain ViT; its heads follow from its weights")
    if layout is None:
        converted = replace(converted, weights=_by_timm(converted.weights, network))
    imported = _fit(path, name, converted, network)
    return replace(imported, notes=(*content.notes, *converted.notes, *network.notes, *imported.notes))


def describe(imported: Imported) -> list[str]:
    """Lines for the terminal: what was read, what is left out, what keeps its initial values, and the notes."""
    stock = _shapes(Network(imported.architecture, imported.model_args, imported.resolution))
    known = sum(not key.endswith(_COUNTER) for key in stock)
    classifier = imported.weights.keys() - stock.keys()
    args = ", ".join(f"{key}={value}" for key, value in imported.model_args.items())
    size = f", {imported.resolution} px" if imported.resolution else ""
    lines = [
        f"layout: {imported.layout}",
        f"network: {imported.architecture}{f' ({args})' if args else ''}{size}",
        f"weights: {known - len(imported.missing)} of {known} of the network"
        + (" and a classifier" if classifier else ""),
    ]
    if imported.unused:
        lines.append(f"left out: {_grouped(imported.unused)}")
    if imported.missing:
        lines.append(f"keep their initial values: {_grouped(imported.missing)}")
    return lines + list(imported.notes)


def _with_heads(converted: Converted, heads: int) -> Converted:
    if heads < 1:
        raise UserError(f"heads: {heads} given; a positive number works")
    return replace(converted, heads=heads, notes=tuple(note for note in converted.notes if "--heads" not in note))


def _named(hint: str, seen: Network | None, content: Content, own: bool, heads: int | None) -> Network:
    """The network by its name, from the user or from timm's ``config.json``, with what the weights show of it."""
    import fastmim.backbones.cmt  # noqa: F401, registers CMT with timm

    hint = hint.split(".", maxsplit=1)[0]  # behind the dot stands which of timm's weights
    if not timm.is_model(hint):
        raise UserError(f"timm has no model '{hint}' (`fastmim models` lists those that it has)")
    told = content.config.get("model_args") if own else None
    if isinstance(told, Mapping) or (own and seen is None):
        args = {key: value for key, value in (told or {}).items() if key not in {"img_size", "num_classes"}}
        cfg = content.config.get("pretrained_cfg", {})
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
        side = size[-1] if isinstance(size, list) and size and isinstance(size[-1], int) and size[-1] > 0 else None
        return Network(hint, args | ({"num_heads": heads} if heads else {}), side)
    if seen is None or seen.architecture.split("_")[0] != hint.split("_")[0]:
        return Network(hint, {"num_heads": heads} if heads else {})
    kept = {key: value for key, value in seen.model_args.items() if key not in SIZES}
    if "num_heads" in seen.model_args and not seen.notes and _plain(hint):
        kept["num_heads"] = seen.model_args["num_heads"]
    return Network(hint, kept, seen.resolution)


def _plain(architecture: str) -> bool:
    return architecture.startswith(("vit_", "deit", "beit", "flexivit", "eva"))


def _unknown(content: Content, layout: Layout | None) -> str:
    if layout is not None:
        return f"{layout.name}'s weights, but of a network that is not recognised; name it with --model"
    known = ", ".join(dict.fromkeys([*(one.name for one in LAYOUTS), _TIMM]))
    first = ", ".join(list(content.state)[:5])
    return f"unknown layout (its keys begin with {first}); known: {known}; if the keys are timm's, name it with --model"


def _by_timm(weights: State, network: Network) -> State:
    """Timm's own weights, by its own remaps where they are older than its names of today."""
    model = create(network.architecture, **network.model_args)
    stock = model.state_dict()
    if weights.keys() & stock.keys() == stock.keys():
        return weights
    remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if remap is None:
        return weights
    try:
        remapped = dict(remap(dict(weights), model))
    except Exception:  # made for other weights: what is left unmatched is told below
        return weights
    better = len(remapped.keys() & stock.keys()) > len(weights.keys() & stock.keys())
    return remapped if better else weights


def _fit(path: Path, layout: str, converted: Converted, network: Network) -> Imported:
    """Compares every key and shape with the stock network's."""
    if converted.act_layer is not None and _plain(network.architecture):
        network = replace(network, model_args={**network.model_args, "act_layer": converted.act_layer})
    network, stock = _stock(network, converted.weights)
    head = _head(network.architecture)
    weights: State = {}
    surplus: list[str] = []
    for key, value in converted.weights.items():
        if key in stock and value.shape != stock[key]:
            raise UserError(
                f"{path}: {key} is {tuple(value.shape)}, but {stock[key]} in {network.architecture}; name another "
                "network with --model"
            )
        if key in stock or key.startswith(head):
            weights[key] = value
        else:
            surplus.append(key)
    unused = (*converted.unused, *surplus)
    missing = tuple(key for key in stock if key not in weights and not key.endswith(_COUNTER))
    known = sum(not key.endswith(_COUNTER) for key in stock)
    found = known - len(missing)
    if 2 * found < known:
        raise UserError(
            f"{path}: only {found} of {known} weights of {network.architecture} are there (missing: "
            f"{', '.join(missing[:3])} ...; instead: {', '.join(unused[:3]) or 'nothing'}); name the network with "
            "--model"
        )
    inside = [key for key in unused if key.startswith(_INSIDE)]
    if inside:
        raise UserError(
            f"{path}: {', '.join(inside[:3])} ({len(inside)} in all) are part of the network, but have no place in "
            f"{network.architecture}; name another with --model"
        )
    notes: tuple[str, ...] = ()
    if missing:
        notes = (f"{len(missing)} of the network's weights are not in the file and keep their initial values.",)
    place = (network.architecture, network.model_args, network.resolution)
    return Imported(weights, *place, layout, unused, missing, notes)


def _stock(network: Network, weights: Mapping[str, Tensor]) -> tuple[Network, dict[str, tuple[int, ...]]]:
    """The shapes of the stock network at the weights' size; without ``window_size``, if windows follow the size."""
    args = {key: value for key, value in network.model_args.items() if key != "window_size"}
    shapes = _shapes(replace(network, model_args=args))
    fits = all(shapes.get(key, one.shape) == one.shape for key, one in weights.items())
    if "window_size" in network.model_args and not fits:
        return network, _shapes(network)
    return replace(network, model_args=args), shapes


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    if "window_size" in network.model_args:  # said outright: nothing is to follow the size
        with torch.device("meta"):
            model: TimmModel = create(network.architecture, img_size=network.resolution, **network.model_args)
    else:
        blueprint = Blueprint(network.architecture, network.model_args)
        model = blueprint.model
        if network.resolution is not None:
            model = blueprint.at(network.resolution, blueprint.absolute((-1,))).model
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _head(architecture: str) -> tuple[str, ...]:
    """How keys of the classifier begin, which the stock network without classes does not have."""
    name = get_pretrained_cfg_value(architecture, "classifier") or ()
    return ("head.", *(f"{one}." for one in ([name] if isinstance(name, str) else name)))


def _grouped(keys: Iterable[str]) -> str:
    groups = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{name} ({number})" for name, number in groups.items())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
