# SPDX-License-Identifier: Apache-2.0
"""What to do about what was found in the images: options to type, each with its reason; the most important first."""

from fastmim.data.inspection.findings import Advice, Findings

RESOLUTION = 128
"""Pretraining's default."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_BAD = 0.05
"""Pretraining's default: it stops when more of the images cannot be read."""
MIXED = 0.05
"""Share of files with values of another type above which they are something else, and not a few odd files."""
FEW_POSITIONS = 64
"""Side in pixels below which patches of 16 px leave too few positions (under 4 x 4) to hide some of them."""
PREPARED_MILLISECONDS, ENCODING_MILLISECONDS = 0.6, 1.0
"""On one core: to decode a prepared square of 256 px and cut a crop from it, and to make one from decoded pixels."""
WORTHWHILE_SECONDS, WORTHWHILE_MILLISECONDS = 2.0, 1.2
"""Of an epoch, and of an image: below, decoding is no burden even over hundreds of epochs."""
CACHE_BYTES = 4e9


def advise(findings: Findings) -> tuple[Advice, ...]:
    """What to do, in at most eight pieces."""
    if findings.statistics is None:
        return ()
    pieces = (
        _broken(findings),
        _mixed(findings) or _channels(findings),
        _resolution(findings),
        None if _mixed(findings) else _colours(findings),
        _reading(findings),
        _duplicates(findings),
        _frames(findings),
        _suffixes(findings),
    )
    return tuple(piece for piece in pieces if piece is not None)


def resolution(findings: Findings) -> int:
    """The training resolution that suits the images: no more pixels than they have, if 32 will do."""
    if findings.prepared is not None:
        return findings.prepared // 2  # what prepare made them for
    side = findings.short_side.median if findings.short_side is not None else float(RESOLUTION)
    if side >= RESOLUTION:
        return RESOLUTION
    # Strides of networks are 16 and 32; below 64 pixels only small patches make sense, and 16 is fine enough.
    step = 32 if side >= FEW_POSITIONS else 16
    return max(32, int(side) // step * step)


def duration(seconds: float) -> str:
    """A time as a person would say it."""
    if seconds < 1:
        return "less than a second"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def epoch_seconds(findings: Findings) -> float:
    """How long the cores of this machine take to read and decode every image once."""
    return findings.images * findings.milliseconds / 1000 / findings.cores


def _broken(findings: Findings) -> Advice | None:
    share = len(findings.broken) / max(findings.opened, 1)
    if not findings.broken:
        return None
    listing = ("" if findings.opened == findings.images else "--all ") + "--out found.json lists them"
    if share <= MAX_BAD:
        return Advice(f"{share:.1%} cannot be read: training skips and lists them; {listing}")
    return Advice(
        f"{share:.1%} cannot be read, and training stops at {MAX_BAD:.0%}: {listing}; mend or remove them, or go on",
        f"--max-bad {min(1.0, round(1.5 * share + 0.005, 2)):g}",
    )


def _mixed(findings: Findings) -> Advice | None:
    """Masks and labels are often stored beside images, as pictures of another depth."""
    if len(findings.depths) < 2 or sorted(findings.depths.values())[-2] < MIXED * sum(findings.depths.values()):
        return None
    most = ", ".join(f"{count:,} {kind}" for kind, count in list(findings.kinds.items())[:3])
    return Advice(
        f"files are of different kinds ({most}): if some are masks or labels, name the folder of images alone"
    )


def _channels(findings: Findings) -> Advice | None:
    channels, options = findings.measured_channels, _reading_as(findings).strip()
    if findings.prepared is not None:
        return Advice("what the prepared set holds", options) if options else None
    if options and len(findings.channels) > 1 and channels != 1:
        most = ", ".join(f"{count} of {number}" for number, count in list(findings.channels.items())[:3])
        return Advice(f"files have different numbers of channels ({most}): train on each kind alone", options)
    if options:
        what = f"stored are {channels} x {next(iter(findings.depths))}"
        return Advice(f"{what}, seen as they are; pretrain measures their mean and std", options)
    return _grey(findings)


def _grey(findings: Findings) -> Advice | None:
    """Of images that are seen as colour of 8 bits."""
    good = findings.opened - len(findings.broken)
    if findings.grey == good:
        return Advice("all are grey: one channel holds all of it (not with --pretrained weights)", "--channels 1")
    if findings.grey > good / 2:
        return Advice(f"{findings.grey / good:.0%} are grey: they train beside the colour ones, as RGB")
    if next(iter(findings.kinds)).startswith("tiff of 4 "):
        return Advice("of 4 channels the last is left out, as if it were transparency; if it is not: --channels 4")
    return None


def _reading_as(findings: Findings) -> str:
    """The options for what was measured, where that is not the default; each with a space before it."""
    channels = f" --channels {findings.measured_channels}" if findings.measured_channels != 3 else ""
    return channels + (" --values raw" if findings.measured_raw else "")


def _resolution(findings: Findings) -> Advice | None:
    side, best = findings.short_side, resolution(findings)
    if side is None or best == RESOLUTION:
        return None
    if findings.prepared is not None:
        return Advice(
            f"squares of {findings.prepared} px are made for crops of half their side", f"--resolution {best}"
        )
    reason = f"the shorter side is {side.median:.0f} px (median): more pixels than that would be invented"
    if side.median < best:
        reason = f"the shorter side is {side.median:.0f} px (median): {best} is the nearest that networks can take"
    if best < FEW_POSITIONS:
        return Advice(
            f"{reason}; patches of 4 px, because 16 would leave {best // 16} x {best // 16} of them",
            f"--resolution {best} --model-args '{{\"patch_size\": 4}}'",
        )
    return Advice(reason, f"--resolution {best}")


def _colours(findings: Findings) -> Advice | None:
    found = findings.statistics
    if found is None or findings.measured_raw or findings.measured_channels != 3:
        return None
    if findings.grey == findings.opened - len(findings.broken):
        return None  # one channel is advised, and measured by pretrain
    shift = max(abs(one - other) for one, other in zip(found.mean, IMAGENET_MEAN, strict=True))
    ratios = [one / other for one, other in zip(found.std, IMAGENET_STD, strict=True)]
    if shift <= 0.1 and min(ratios) >= 0.7 and max(ratios) <= 1.4:
        return None
    mean, std = (",".join(f"{value:.3f}" for value in values) for values in (found.mean, found.std))
    return Advice("colours differ from ImageNet's, whose mean and std are the default", f"--mean {mean} --std {std}")


def _reading(findings: Findings) -> Advice | None:
    seconds = epoch_seconds(findings)
    if findings.prepared is not None:
        return None
    if seconds < WORTHWHILE_SECONDS or findings.milliseconds < WORTHWHILE_MILLISECONDS:
        return None
    side = 2 * resolution(findings)
    told = f"decoding takes about {duration(seconds)} an epoch on {findings.cores} cores"
    plain = findings.measured_channels == 3 and not findings.measured_raw
    if findings.images * side * side * findings.measured_channels * (1 if plain else 4) <= CACHE_BYTES:
        return Advice(f"{told}; kept in memory, only the first epoch decodes", "--cache ram")
    later = findings.images * PREPARED_MILLISECONDS / 1000 / findings.cores
    once = seconds + findings.images * ENCODING_MILLISECONDS / 1000 / findings.cores
    command = f"fastmim prepare DATA --out FOLDER --resolution {resolution(findings)}{_reading_as(findings)}"
    return Advice(f"{told}; about {duration(later)} from small squares, written once in {duration(once)}: {command}")


def _duplicates(findings: Findings) -> Advice | None:
    groups = len(findings.exact.groups) + len(findings.near.groups)
    if not groups:
        return None
    return Advice(
        "an image that is in training and in test makes results look better than they are:"
        " fastmim scan TRAIN TEST --all --out found.json lists what they share"
    )


def _frames(findings: Findings) -> Advice | None:
    if not findings.several_frames:
        return None
    return Advice(f"several frames or pages in one file ({findings.several_frames} x): only the first is used")


def _suffixes(findings: Findings) -> Advice | None:
    if not findings.wrong_suffix:
        return None
    lies = ", ".join(f"{count} x {lie}" for lie, count in list(findings.wrong_suffix.items())[:2])
    return Advice(f"suffix and content differ ({lies}): fastmim goes by content, other tools may not")
