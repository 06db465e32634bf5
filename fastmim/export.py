# SPDX-License-Identifier: Apache-2.0
"""Weights handed over as a timm hub folder: config.json, model.safetensors and README.md.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, with a new head, another input size, another number
of channels or as a feature pyramid, and so does everything that stands on timm: transformers, segmentation-models-
pytorch, anomalib, mmpretrain.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from jaxtyping import Float
from torch import Tensor

from fastmim.backbones.adapter import TimmModel, build
from fastmim.errors import UserError
from fastmim.train.checkpoint import sync_folder, write_file

_WEIGHTS, _CONFIG, _README = "model.safetensors", "config.json", "README.md"
# What is true of the architecture with any weights; origin, labels and licence of timm's own weights are not.
_KEPT = ("fixed_input_size", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")


def export_timm(
    architecture: str,
    create_args: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    resolution: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    card: Mapping[str, str],
    discarded: Sequence[str] = (),
) -> Path:
    """Writes a timm hub folder that holds the pre-trained network without a head.

    Args:
        architecture: a timm model name.
        create_args: ``timm.create_model(architecture, num_classes=0, **create_args)`` builds the stock network at the
            training resolution; plain JSON values.
        weights: by timm's own keys. Layers that the feature map does not need (a last norm, a neck) may be missing:
            they keep timm's initial values, the same every time, and README.md lists them.
        folder: replaced as a whole if it holds an earlier export.
        resolution: side of the training images in pixels.
        mean: of each channel (0 to 1, or in the units of raw images), as in training.
        std: likewise.
        card: what README.md tells: a heading to a line of text; "license" is the licence of the weights.
        discarded: prefixes of the keys of layers that took no part in pre-training. Their weights may be missing: they
            keep timm's initial values, and README.md says so.

    Returns:
        ``folder``.

    Raises:
        UserError: ``folder`` holds something else than an earlier export.
        ValueError: the weights do not fit the architecture.
    """
    # transformers passes its own num_classes and would pass it twice; drop rates are how the network was trained here,
    # and no part of what it is.
    args = {key: value for key, value in create_args.items() if key != "num_classes" and not key.endswith("_rate")}
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which this fork does not put back.
        torch.default_generator.manual_seed(0)
        model: TimmModel = timm.create_model(architecture, pretrained=False, num_classes=0, **args).eval()
    initial = _fill(model, weights, resolution, len(mean), discarded)
    name = model.pretrained_cfg["architecture"]
    files: dict[str, bytes | str] = {
        _WEIGHTS: _packed(model.state_dict()),
        _CONFIG: json.dumps(_config(model, args, resolution, mean, std), indent=2),
        _README: _timm_readme(name, folder, card, initial, discarded),
    }
    return _replace(folder, files)


def export_state(weights: Mapping[str, Tensor], folder: Path, card: Mapping[str, str]) -> Path:
    """Writes the weights of a network that is not timm's, and README.md.

    ``weights`` have the network's own keys; all else is as in ``export_timm``.
    """
    return _replace(folder, {_WEIGHTS: _packed(weights), _README: _state_readme(folder, card)})


def verify(
    folder: Path,
    backbone_forward: Callable[[Tensor], list[Float[Tensor, "B _ _ _"]]],
    images: Float[Tensor, "B C H W"],
    discard: int = 0,
) -> float:
    """The largest absolute difference between the network's last map and that of ``folder``, loaded by timm.

    Args:
        folder: made by ``export_timm``.
        backbone_forward: the pre-trained network in eval mode, images to maps.
        images: as the network takes them, at the training resolution.
        discard: how many blocks took no part in pre-training; here they take none either.
    """
    loaded = build(f"local-dir:{folder}", images.shape[-1], discard=discard).eval().to(images.device)
    with torch.no_grad():
        return float((loaded(images)[-1] - backbone_forward(images)[-1]).abs().max())


def _registered_by(architecture: str) -> str:
    """The module whose import makes timm know a network that is not its own, such as CMT; empty for timm's."""
    module = timm.model_entrypoint(architecture).__module__
    return "" if module.partition(".")[0] == "timm" else module


def _config(
    model: TimmModel, args: dict[str, Any], resolution: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    stock = model.pretrained_cfg
    module = _registered_by(stock["architecture"])
    return {
        **({"registered_by": module} if module else {}),
        "architecture": stock["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [len(mean), resolution, resolution],
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            **{key: stock[key] for key in _KEPT},
        },
    }


def _fill(
    model: TimmModel, weights: Mapping[str, Tensor], resolution: int, channels: int, discarded: Sequence[str]
) -> list[str]:
    """Loads the weights into the stock network; returns the other keys that keep their initial values.

    Those of discarded layers are not among them.
    """
    stock = model.state_dict()
    unexpected = sorted(weights.keys() - stock.keys())
    if unexpected:
        raise ValueError(f"weights that the stock network does not have: {', '.join(unexpected)}")
    for key, value in weights.items():
        if value.shape != stock[key].shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, but {tuple(stock[key].shape)} in the stock network")
    below = tuple(f"{prefix}." for prefix in discarded)
    missing = [key for key in stock if key not in weights and not key.startswith(below)]
    needed = sorted(_needed(model, resolution, channels).intersection(missing)) if missing else []
    if needed:
        raise ValueError(f"weights that the feature map needs are missing: {', '.join(needed)}")
    model.load_state_dict(weights, strict=False)
    return missing


def _needed(model: TimmModel, resolution: int, channels: int) -> set[str]:
    """The keys that the last feature map depends on: what a gradient reaches, and the buffers of those layers."""
    parameters = dict(model.requires_grad_().named_parameters())
    with torch.enable_grad():
        maps = model.forward_intermediates(
            torch.zeros(1, channels, resolution, resolution), indices=1, norm=False, intermediates_only=True
        )
        gradients = torch.autograd.grad(maps[-1].sum(), list(parameters.values()), allow_unused=True)
    unused = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    unused_layers = {_layer(name) for name in unused} - {_layer(name) for name in parameters.keys() - unused}
    buffers = {name for name in model.state_dict().keys() - parameters.keys() if _layer(name) not in unused_layers}
    return (parameters.keys() - unused) | buffers


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _packed(weights: Mapping[str, Tensor]) -> bytes:
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    # transformers refuses a file that does not say which framework it comes from.
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _replace(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Makes ``folder`` hold exactly ``files``; it never holds a mixture of old and new ones.

    Between two renames it is absent; after a crash right then the complete new one lies beside it as ``.NAME.new``.
    """
    place = folder.resolve()
    if place.is_file():
        raise UserError(f"{folder} is a file; name a new folder for the export")
    if place.exists():
        strangers = sorted(path.name for path in place.iterdir() if path.name not in {_WEIGHTS, _CONFIG, _README})
        if strangers:
            raise UserError(f"{folder} holds other files ({strangers[0]}); name a new folder for the export")
    new, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, content in files.items():
        write_file(new / name, content if isinstance(content, bytes) else content.encode())
    sync_folder(new)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    new.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _timm_readme(
    architecture: str, folder: Path, card: Mapping[str, str], initial: list[str], discarded: Sequence[str]
) -> str:
    name = folder.as_posix()
    untouched = _list("Not pre-trained", "Pre-training does not use these layers; they hold timm's start:", initial)
    fresh = (
        "Pre-training went without these layers, to save time. They are in their places with timm's start, as fresh as "
        "the head, for fine-tuning to train; features without fine-tuning should come from the layers before them:"
    )
    untouched += _list("Discarded in pre-training", fresh, discarded)
    module = _registered_by(architecture)
    register = f"import {module}  # registers {architecture} with timm\n" if module else ""
    return f"""{_front(card, ["image-feature-extraction", "timm", "transformers", "fastmim"])}
# {architecture}

{_story(card)}
## Use

```python
import timm
{register}
timm.create_model("local-dir:{name}", pretrained=True)                      # pooled features
timm.create_model("local-dir:{name}", pretrained=True, num_classes=10)      # with a new head
timm.create_model("local-dir:{name}", pretrained=True, features_only=True)  # feature maps
```

`in_chans=5` and, where the architecture takes it, `img_size=224` work too. timm's `checkpoint_path=` does not.

```python
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
{register}
AutoModel.from_pretrained("{name}")
AutoModelForImageClassification.from_pretrained("{name}", num_labels=10, ignore_mismatched_sizes=True)
AutoImageProcessor.from_pretrained("{name}")
```
{untouched}"""


def _list(heading: str, text: str, names: Sequence[str]) -> str:
    """A section of README.md; none where there are no names."""
    lines = "\n".join(f"- `{name}`" for name in names)
    return f"\n## {heading}\n\n{text}\n\n{lines}\n" if names else ""


def _state_readme(folder: Path, card: Mapping[str, str]) -> str:
    return f"""{_front(card, ["image-feature-extraction", "fastmim"])}
# Pre-trained weights

{_story(card)}
## Use

```python
from safetensors.torch import load_file

network.load_state_dict(load_file("{folder.as_posix()}/{_WEIGHTS}"))
```
"""


def _front(card: Mapping[str, str], tags: list[str]) -> str:
    """The block of YAML that the Hugging Face Hub reads; JSON strings are YAML strings."""
    lines = [f"tags: {json.dumps(tags)}"]
    if "timm" in tags:
        lines.append("library_name: timm")
    if "license" in card:
        lines.append(f"license: {json.dumps(card['license'])}")
    return "\n".join(["---", *lines, "---"])


def _story(card: Mapping[str, str]) -> str:
    facts = "".join(f"- {heading}: {text}\n" for heading, text in card.items() if heading != "license")
    licence = card.get("license", "yours to choose; fastmim claims no rights in the weights that it trains")
    return (
        "Pre-trained without labels, by masked image modelling, with fastmim.\n\n"
        f"{facts}\nLicence of these weights: {licence}.\n"
    )
