# SPDX-License-Identifier: Apache-2.0
"""How timm builds a network for images of one size, found on the meta device: shapes without memory or weights."""

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor

from fastmim.backbones import cmt  # noqa: F401, registers with timm, here where every name is looked up
from fastmim.backbones.discarding import plan_cut
from fastmim.errors import UserError

LOCAL = "local-dir:"
# An nn.Module with forward_intermediates, prune_intermediate_layers and feature_info: all have them, none declares it.
TimmModel = Any


@dataclass(frozen=True)
class Plan:
    """A network at one size.

    Attributes:
        resolution: side of the images in pixels.
        architecture: the name under which timm registers it.
        create_args: ``timm.create_model(architecture, num_classes=0, **create_args)`` builds it; plain JSON values.
        model: the network on the meta device, without the blocks that are discarded.
    """

    resolution: int
    architecture: str
    create_args: dict[str, Any]
    model: TimmModel


class Blueprint:
    """A timm network before it is built, from which its plan at any size is drawn in a fraction of a second.

    Args:
        name: a timm model, or ``local-dir:FOLDER``.
        model_args: further arguments for ``timm.create_model``.
        discard: how many of its last blocks are to take no part.

    Attributes:
        model: the network on the meta device, at the size that it was made for, with all its blocks.
        discard: how many of its last blocks take no part.
        cut: what is left of it without those.
        strides: pixels between two positions of each map that is left, shallow to deep.

    Raises:
        UserError: no such model or folder, arguments that the network does not take, or too many blocks to discard.
    """

    def __init__(self, name: str, model_args: Mapping[str, Any], discard: int = 0) -> None:
        _check_name(name)
        for word in ("img_size", "num_classes", "features_only"):
            if word in model_args:
                raise UserError(
                    f"model_args: '{word}' is set by fastmim (the size is the option resolution); remove it"
                )
        self.name = name
        self.model_args = dict(model_args)
        with torch.device("meta"):
            self.model = create(name, **self.model_args)
        self.discard, self.cut = discard, plan_cut(name, self.model, discard)
        self.strides: list[int] = [info["reduction"] for info in self.model.feature_info][: self.cut.maps]

    def absolute(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Indices of maps counted from the front, in order of depth; pruning changes what -1 means.

        Raises:
            UserError: there is no such map.
        """
        count = len(self.strides)
        wrong = [index for index in indices if not -count <= index < count]
        if wrong or not indices:
            raise UserError(f"indices: {wrong or 'none'} given, but the network has {count} maps: 0 to {count - 1}")
        return tuple(sorted({index % count for index in indices}))

    def fits(self, resolution: int, indices: tuple[int, ...]) -> bool:
        """Whether the maps of ``indices`` can be computed for images of ``resolution`` pixels."""
        return isinstance(self._try(resolution, indices), Plan)

    def at(self, resolution: int, indices: tuple[int, ...]) -> Plan:
        """The plan for images of ``resolution`` pixels, once it is known that the maps of ``indices`` can be computed.

        Raises:
            UserError: the network cannot take this size; the next smaller and larger that it can take are named. Or it
                cannot do without the blocks that are discarded.
        """
        plan = self._try(resolution, indices)
        if isinstance(plan, Plan):
            return plan
        if self.cut.blocks and isinstance(self._try(resolution, indices, whole=True), Plan):
            raise UserError(f"discard: {self.name} cannot do without its last blocks ({plan}); discard 0 works")
        step = max(self.strides[index] for index in indices)
        below = range(resolution // step * step, 0, -step)
        above = range((resolution // step + 1) * step, 2 * resolution + step, step)
        found = [next((str(size) for size in sizes if self.fits(size, indices)), "") for sizes in (below, above)]
        nearest = ", ".join(filter(None, found))
        ending = f"; nearest that work: {nearest}" if nearest else ""
        raise UserError(f"model '{self.name}' cannot take images of {resolution} px ({plan}){ending}")

    def _try(self, resolution: int, indices: tuple[int, ...], whole: bool = False) -> Plan | str:
        """The plan, or the reason why there is none; ``whole`` discards nothing."""
        step = max(self.strides[index] for index in indices)
        if resolution % step:
            return f"one position of its map covers {step} px"
        try:
            plan = self._draw(resolution)
            if not whole:
                self.cut.apply(plan.model)
            probe(plan.model, resolution, indices)
        except Exception as error:  # timm raises nearly every kind
            # A network that reads values (Gemma) cannot be tried without memory; its stride is all there is to know.
            return plan if "meta tensor" in str(error) else _line(error)
        return plan

    def _draw(self, resolution: int) -> Plan:
        with torch.device("meta"):
            model = create(self.name, **self.model_args)
            if hasattr(model, "set_input_size") and "window_size" not in self.model_args:
                # Here timm scales the windows with the size; the argument img_size alone leaves them as they were, as
                # somebody may want who names a window.
                model.set_input_size(img_size=resolution)
            else:
                with contextlib.suppress(TypeError):  # has no such argument: most convolutional networks
                    model = timm.create_model(self.name, num_classes=0, **self.model_args, img_size=resolution)
        args = {**get_model_args(model), **self.model_args}
        del args["num_classes"]
        if "img_size" in args:
            args["img_size"] = resolution
        local = self.name.startswith(LOCAL)
        architecture = model.pretrained_cfg["architecture"] if local else self.name.split(".")[0]
        return Plan(resolution, architecture, json.loads(json.dumps(args)), model)


def create(name: str, **arguments: Any) -> TimmModel:
    """``timm.create_model`` without a head.

    Raises:
        UserError: whatever timm, the folder or the download did not like.
    """
    try:
        return timm.create_model(name, num_classes=0, **arguments)
    except Exception as error:  # timm raises nearly every kind, for bad arguments, files and downloads alike
        raise UserError(f"model '{name}' cannot be built: {_line(error)}") from error


def intermediates(
    model: TimmModel, images: Tensor, indices: tuple[int, ...], norm: bool, output_fmt: str = "NCHW"
) -> list[Tensor]:
    """The maps of ``indices``, as [B, C, h, w] or as visible tokens [B, N, C]; ``norm`` applies the final norm."""
    maps: list[Tensor] = model.forward_intermediates(
        images, indices=list(indices), norm=norm, output_fmt=output_fmt, intermediates_only=True
    )
    return maps


def probe(model: TimmModel, resolution: int, indices: tuple[int, ...]) -> tuple[bool, list[Tensor]]:
    """Whether the final norm can be applied (Hiera cannot), and the maps of one empty image; leaves eval mode on."""
    model.eval()  # one image is too few for batch norm, and must not change its statistics
    channels = get_model_args(model).get("in_chans", 3)
    images = torch.zeros(1, channels, resolution, resolution, device=next(model.parameters()).device)
    try:
        return True, intermediates(model, images, indices, norm=True)
    except AssertionError:
        return False, intermediates(model, images, indices, norm=False)


def _check_name(name: str) -> None:
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model '{name}': no config.json in {folder}; a timm hub folder holds it beside the weights"
            )
    elif ":" in name or "/" in name or not timm.is_model(name):
        near = timm.list_models(f"*{name}*") or timm.list_models()
        names = ", ".join(difflib.get_close_matches(name, near, n=3, cutoff=0))
        raise UserError(f"timm has no model '{name}'; nearest: {names} (or local-dir:FOLDER for a timm hub folder)")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
