# SPDX-License-Identifier: Apache-2.0
"""What a scan can find, in plain numbers and text."""

from dataclasses import dataclass

from fastmim.data.inspection.statistics import Statistics


@dataclass(frozen=True)
class Range:
    """Of a number that each image has."""

    low: float
    """5th percentile."""
    median: float
    high: float
    """95th percentile."""


@dataclass(frozen=True)
class Broken:
    """A file that cannot be used."""

    path: str
    reason: str


@dataclass(frozen=True)
class Same:
    """Groups of images that are the same."""

    groups: tuple[tuple[str, ...], ...]
    compared: int
    """Images among which they were looked for."""
    left_out: int
    """Images that are too plain to be compared (of those that look the same)."""


@dataclass(frozen=True)
class Advice:
    """One thing to do."""

    text: str
    """What, and why; one sentence or two."""
    options: str = ""
    """Words for ``fastmim pretrain`` that do it; empty if it is done otherwise."""


@dataclass(frozen=True)
class Findings:
    """Plain numbers and text: ``dataclasses.asdict`` of it can be written as JSON."""

    images: int
    bytes: int
    opened: int
    """Images whose pixels were decoded, or tried; all that follows is about them."""
    remembered: int
    """Those of them that an earlier scan had opened, and that have not changed since."""
    seconds: float
    cores: int
    prepared: int | None
    """Side of the squares of a prepared set; None for other images."""
    true_size: bool
    """Whether sizes are those of the originals of a prepared set (of all images)."""
    formats: dict[str, int]
    """By content."""
    wrong_suffix: dict[str, int]
    """Suffix and content that do not fit, as ``.jpg holds png``, and how many."""
    wrong_suffix_example: str
    width: Range | None
    height: Range | None
    short_side: Range | None
    megapixels: Range | None
    aspect: Range | None
    """Width divided by height."""
    kinds: dict[str, int]
    """Format, number of channels and type of values together; with the folder that they are in, if they share one."""
    channels: dict[int, int]
    depths: dict[str, int]
    """How values are stored: uint8, uint16, float32 ..."""
    several_frames: int
    """Animations and files of several pages, of which the first is used."""
    turned: int
    """Pictures that EXIF turns (and that training sees upright)."""
    grey: int
    """Pictures without colour, whatever they are stored as."""
    broken: tuple[Broken, ...]
    reasons: dict[str, int]
    exact: Same
    near: Same
    """Groups that look the same; those that are the same byte for byte are listed under ``exact`` alone."""
    measured_channels: int
    measured_raw: bool
    """What the statistics are of: values of 0 to 1, or stored ones."""
    statistics: Statistics | None
    """None if no picture could be decoded."""
    milliseconds: float
    """To read and decode one image, on average, on one core of this machine."""
    advice: tuple[Advice, ...] = ()
