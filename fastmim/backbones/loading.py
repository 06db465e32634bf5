# SPDX-License-Identifier: Apache-2.0
"""Weights into a timm network of another size of images, other channels or another head; nothing passes silently."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from timm.models import adapt_input_conv
from torch import Tensor

from fastmim.backbones.blueprint import TimmModel
from fastmim.backbones.resizing import plan_carry
from fastmim.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """What became of the weights.

    Attributes:
        fresh: the network's keys that keep their initial values, the head's excepted.
        unused: weights that have no place in the network, the head's excepted.
        resized: keys that were carried to another size of images.
    """

    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    resized: tuple[str, ...]


def load_weights(model: TimmModel, weights: Mapping[str, Tensor], where: str, *, head: bool = False) -> Loaded:
    """Fills a stock timm network with weights of stock keys.

    What depends on the size of the images is carried as FastMIM-P carries it (`fastmim.backbones.resizing`); the first
    convolution is fitted to the network's channels in timm's way.

    Args:
        model: any size, any channels, any number of classes.
        weights: by timm's keys, for the size that they were trained at.
        where: what to call them in messages.
        head: take over the classifier too.

    Raises:
        UserError: a shape does not fit, or nothing does.
    """
    stock = model.state_dict()
    first = tuple(f"{name}." for name in _names(model, "first_conv"))
    classifier = tuple(f"{name}." for name in _names(model, "classifier"))
    wanted = {key for key in stock if head or not key.startswith(classifier or "\0")}
    given = {key: value for key, value in weights.items() if head or not key.startswith(classifier or "\0")}
    known = {key: value for key, value in given.items() if key in wanted}
    if not known:
        raise UserError(f"{where} holds none of the network's weights; first found: {', '.join(list(given)[:3])}")
    for key, value in known.items():
        if key.startswith(first or "\0") and value.ndim == 4 and value.shape[1] != stock[key].shape[1]:
            known[key] = _fit_channels(value, stock[key])
    carried = _carry(model, known, where)
    model.load_state_dict({**stock, **carried})
    return Loaded(
        fresh=tuple(sorted(key for key in wanted - known.keys() if not key.endswith("num_batches_tracked"))),
        unused=tuple(sorted(given.keys() - known.keys())),
        resized=tuple(sorted(key for key, value in known.items() if value.shape != stock[key].shape)),
    )


def _names(model: TimmModel, key: str) -> tuple[str, ...]:
    found = getattr(model, "pretrained_cfg", {}).get(key) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _fit_channels(value: Float[Tensor, "out old h w"], stock: Float[Tensor, "out new h w"]) -> Tensor:
    """Summed for one channel, repeated and scaled for more (timm's way)."""
    if value.shape[1] != 3:
        value = value.mean(1, keepdim=True).repeat(1, 3, 1, 1) * (value.shape[1] / 3)
    fitted: Tensor = adapt_input_conv(stock.shape[1], value)
    return fitted


def _carry(model: TimmModel, known: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights at the shapes of the network."""
    stock = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    old = {key: tuple(value.shape) for key, value in known.items() if key in parameters}
    new = {key: tuple(stock[key].shape) for key in old}
    # What depends on the size of images has positions; a shape that differs elsewhere is another network's.
    for key, value in known.items():
        if len(value.shape) != len(stock[key].shape):
            raise UserError(_misfit(where, key, value, stock[key]))
    try:
        carry = plan_carry("the network", old, new, getattr(model, "num_prefix_tokens", 0))
        carried = {key: carry(key, value) if key in parameters else value for key, value in known.items()}
    except UserError:
        carried = dict(known)
    for key, value in carried.items():
        if key in parameters and value.shape != stock[key].shape:
            raise UserError(_misfit(where, key, value, stock[key]))
    # Tables that timm computes from the size and does not learn stay as it made them.
    return {key: value for key, value in carried.items() if value.shape == stock[key].shape}


def _misfit(where: str, key: str, value: Tensor, stock: Tensor) -> str:
    return (
        f"{where} does not fit the network: {key} is {tuple(value.shape)}, but {tuple(stock.shape)} in it; is it the"
        " same --model?"
    )


def strip_sizes(model_args: Mapping[str, object]) -> dict[str, object]:
    """Arguments for ``timm.create_model`` without those that fastmim chooses itself."""
    return {name: value for name, value in model_args.items() if name not in ("img_size", "num_classes", "in_chans")}
