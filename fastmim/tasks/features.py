# SPDX-License-Identifier: Apache-2.0
"""Images to vectors: what a network says of each, and what plain pixels say."""

from collections.abc import Callable, Iterable, Mapping

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int64
from torch import Tensor, nn

from fastmim.errors import UserError
from fastmim.mim.model import as_floats

# Called with the number of images of each batch as it is done.
Progress = Callable[[int], None]


def pool(maps: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D"]:
    """One vector for each image: the mean over the positions of the last map (D is its number of channels)."""
    return maps[-1].mean(dim=(2, 3))


def tokens(maps: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D"]:
    """All positions of the last map, as one vector for each image: D = channels * height * width, in that order."""
    return maps[-1].flatten(1)


def features(
    network: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    pooling: Callable[[list[Tensor]], Tensor] = pool,
    keep: Callable[[Float[Tensor, "B D h w"]], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "N D"], Int64[Tensor, "N"] | None]:
    """The pooled features of every image in float32 on the CPU, and the labels where the loader has them.

    Args:
        network: a Backbone (images to a list of NCHW maps) on ``device``; used in eval mode, then each of its modules
            is put back into the mode that it was in.
        loader: yields ``{"images": UInt8["B 3 S S"]}``, perhaps with ``"labels": Int64["B"]``.
        device: where the network is.
        mean: what is subtracted from each colour (0 to 1).
        std: what each colour is divided by.
        pooling: makes one vector of an image's maps.
        keep: called with the last map of each batch, before it is pooled.
        progress: called after each batch.

    Raises:
        UserError: the loader has no image.
    """
    shift = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def encode(images: Tensor) -> Tensor:
        maps = network((as_floats(images.to(device)) - shift) / scale)
        if keep:
            keep(maps[-1])
        return pooling(maps).float().cpu()

    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return _collect(loader, encode, progress)
    finally:
        for module, training in modes:
            module.training = training


class TokenBank:
    """Last maps that are not pooled, in float16 on the CPU: its ``add`` is what `features` keeps maps with.

    Args:
        images: how many there will be at most.
    """

    def __init__(self, images: int) -> None:
        self._images, self._filled = images, 0
        self._store: Tensor | None = None

    @property
    def tokens(self) -> Float16[Tensor, "N T D"]:
        """One token for each place of the map, of all images so far."""
        assert self._store is not None
        return self._store[: self._filled]

    def add(self, last: Float[Tensor, "B D h w"]) -> None:
        """Keeps one more batch.

        Raises:
            UserError: all images together would need more than a quarter of the memory that is free.
        """
        found = last.flatten(2).transpose(1, 2).float()
        if self._store is None:
            need, free = 2 * self._images * found[0].numel(), psutil.virtual_memory().available
            if need > free / 4:
                raise UserError(
                    f"the tokens of {self._images:,} images need {need / 2**30:.1f} GiB, more than a quarter of the "
                    f"{free / 2**30:.1f} GiB that are free; use fewer images or a smaller --resolution, or leave out "
                    "the methods that read tokens (attentive)"
                )
            self._store = torch.empty(self._images, *found.shape[1:], dtype=torch.float16)
        # What is beyond float16 would become infinite, and then no number.
        largest = torch.finfo(torch.float16).max
        self._store[self._filled : self._filled + len(found)] = found.clamp(-largest, largest).cpu()
        self._filled += len(found)


def pixel_features(
    loader: Iterable[Mapping[str, Tensor]], side: int = 16, progress: Progress | None = None
) -> tuple[Float[Tensor, "N D"], Int64[Tensor, "N"] | None]:
    """What any network has to beat: the images averaged down to ``side`` x ``side`` pixels, D = C * side * side."""

    def encode(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(as_floats(images), side).flatten(1)

    return _collect(loader, encode, progress)


def _collect(
    loader: Iterable[Mapping[str, Tensor]], encode: Callable[[Tensor], Tensor], progress: Progress | None
) -> tuple[Tensor, Tensor | None]:
    vectors, labels = [], []
    for batch in loader:
        vectors.append(encode(batch["images"]))
        if "labels" in batch:
            labels.append(batch["labels"].cpu())
        if progress:
            progress(len(batch["images"]))
    if not vectors:
        first = next(iter(getattr(loader, "bad", {}).items()), None)
        raise UserError(
            "none of the images to measure on can be read" + (f"; first {first[0]!r}: {first[1]}" if first else "")
        )
    return torch.cat(vectors), torch.cat(labels) if labels else None
