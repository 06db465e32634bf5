# SPDX-License-Identifier: Apache-2.0
"""What ``fastmim scan`` prints: lines of a label and a text, for at most 100 columns where names allow."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastmim.data.inspection.advice import duration, epoch_seconds
from fastmim.data.inspection.findings import Findings, Range, Same
from fastmim.data.inspection.statistics import PERCENTILES

WIDTH = 100
LABEL = 13
SHOWN = 5
"""Broken files and groups of duplicates that are printed; all of them are in the JSON."""
CHANNELS_SHOWN = 16

Line = tuple[str, str, str]
"""Style on a terminal, what has that style, and the rest of the line."""


def lines(findings: Findings, paths: Sequence[str]) -> Iterator[Line]:
    """The page on the images in ``paths``."""
    yield from _overview(findings)
    yield from _broken(findings, paths)
    yield from _duplicates("identical", findings.exact, paths)
    yield from _duplicates("look alike", findings.near, paths)
    yield from _values(findings)
    if findings.milliseconds:
        told = f"{findings.milliseconds:.2g} ms an image; an epoch of all takes {duration(epoch_seconds(findings))}"
        yield _line("decoding", f"{told} on {findings.cores} cores")
    yield from _advice(findings, paths)


def _overview(findings: Findings) -> Iterator[Line]:
    count = f"{findings.images:,}" + (" (prepared)" if findings.prepared else "")
    which = "all opened" if findings.opened == findings.images else f"{findings.opened:,} opened (--all opens all)"
    if findings.remembered:
        which += f", {'all' if findings.remembered == findings.opened else f'{findings.remembered:,}'} remembered"
    yield _line("images", f"{count}, {_bytes(findings.bytes)}; {which}, in {duration(findings.seconds)}")
    yield _line("format", _kinds(findings.formats) or "unknown")
    for text in _wrapped("; ".join(_besides(findings)), WIDTH - LABEL):
        yield _line("", text)
    if findings.width is not None and findings.height is not None:
        yield from _sizes(findings, findings.width, findings.height)
    depths = _kinds({_depth(name): count for name, count in findings.depths.items()})
    channels = _kinds({str(number): count for number, count in findings.channels.items()})
    grey = f"; {findings.grey:,} without colour" if findings.grey and findings.measured_channels != 1 else ""
    yield _line("channels", f"{channels}; of {depths}{grey}" if channels else "unknown")


def _sizes(findings: Findings, width: Range, height: Range) -> Iterator[Line]:
    what = f"squares of {findings.prepared} px; originals " if findings.prepared else ""
    if (width.low, height.low) == (width.high, height.high):
        yield _line("size", f"{what}{width.median:.0f} x {height.median:.0f} px")
        return
    yield _line(
        "size",
        f"{what}{width.median:.0f} x {height.median:.0f} px (median); width {width.low:.0f} to {width.high:.0f},"
        f" height {height.low:.0f} to {height.high:.0f} (5 to 95 %)",
    )
    if findings.megapixels is not None and findings.aspect is not None:
        aspect, pixels = findings.aspect, findings.megapixels
        yield _line(
            "",
            f"{pixels.median:.2g} megapixels, {pixels.low:.2g} to {pixels.high:.2g};"
            f" width / height {aspect.median:.2f}, {aspect.low:.2f} to {aspect.high:.2f}",
        )


def _besides(findings: Findings) -> list[str]:
    notes = []
    if findings.turned:
        notes.append(f"{findings.turned:,} turned by EXIF (training sees them upright)")
    if findings.several_frames:
        notes.append(f"{findings.several_frames:,} with several frames")
    if findings.wrong_suffix:
        notes.append(f"{sum(findings.wrong_suffix.values()):,} with a wrong suffix")
    return notes


def _broken(findings: Findings, paths: Sequence[str]) -> Iterator[Line]:
    if not findings.broken:
        yield _line("broken", f"none of {findings.opened:,} opened")
        return
    yield _line(
        "broken", f"{len(findings.broken):,} of {findings.opened:,} opened: {_counted(findings.reasons)}", "red"
    )
    for one in findings.broken[:SHOWN]:
        yield _line("", f"{_short(one.path, paths)}: {one.reason}")
    yield from _rest(len(findings.broken))


def _duplicates(label: str, same: Same, paths: Sequence[str]) -> Iterator[Line]:
    among = f"among {same.compared:,}" + (f" ({same.left_out:,} too plain to tell)" if same.left_out else "")
    if not same.groups:
        yield _line(label, f"none {among}")
        return
    count, groups = sum(map(len, same.groups)), len(same.groups)
    yield _line(label, f"{count:,} images in {groups:,} group{'s' * (groups > 1)}, {among}", "yellow")
    for group in same.groups[:SHOWN]:
        others = f" and {len(group) - 2} more" if len(group) > 2 else ""
        yield _line("", " = ".join(_short(path, paths) for path in group[:2]) + others)
    yield from _rest(groups)


def _rest(count: int) -> Iterator[Line]:
    if count > SHOWN:
        yield _line("", f"and {count - SHOWN:,} more; --out FILE lists all")


def _values(findings: Findings) -> Iterator[Line]:
    """A table of the channels, in the units that training sees."""
    found = findings.statistics
    if found is None:
        return
    digits = 3 if not findings.measured_raw else None
    heads = ["mean", "std", *(f"{percent} %" for percent in PERCENTILES)]
    unit = "stored values" if findings.measured_raw else "0 to 1"
    yield _line("values", "".join(f"{head:>9}" for head in heads) + f"   ({unit})")
    names = ["red", "green", "blue"] if len(found.mean) == 3 else ["grey"] if len(found.mean) == 1 else None
    shown = min(len(found.mean), CHANNELS_SHOWN)
    if findings.grey == findings.opened - len(findings.broken) and names:
        names, shown = ["grey"], 1
    for number in range(shown):
        row = (found.mean[number], found.std[number], *found.percentiles[number])
        cells = "".join(f"{value:9.{digits}f}" if digits else f"{value:9.5g}" for value in row)
        note = "   constant: std 1 is used" if number in found.constant else ""
        label = names[number] if names else f"channel {number + 1}"
        yield ("dim", f"  {label:{LABEL - 2}}", cells + note)
    if len(found.mean) > CHANNELS_SHOWN:
        yield _line("", f"and {len(found.mean) - CHANNELS_SHOWN} more channels; --out FILE lists all")


def _advice(findings: Findings, paths: Sequence[str]) -> Iterator[Line]:
    data = " ".join(map(shlex.quote, paths))
    yield ("", "", "")
    for piece in findings.advice:
        # A long list of paths would drown the advice.
        text = piece.text.replace("DATA", data) if len(data) < 50 else piece.text
        for number, line in enumerate(_wrapped(f"{piece.options}: {text}" if piece.options else text, WIDTH - 2)):
            bold = piece.options if number == 0 and line.startswith(piece.options) else ""
            yield ("bold", ("- " if number == 0 else "  ") + bold, line.removeprefix(bold))
    if not findings.advice:
        yield ("", "- the defaults fit these images", "")
    # A long command is continued as a shell wants it, and cut before options only.
    parts = [f"fastmim pretrain {data}"]
    for option in (option for piece in findings.advice for option in _options(piece.options)):
        if len(parts[-1]) + len(option) > WIDTH - LABEL - 3:
            parts[-1] += " \\"
            parts.append(" " * LABEL + "  " + option)
        else:
            parts[-1] += f" {option}"
    yield ("bold", f"{'to train':{LABEL}}", "\n".join(parts))


def _options(text: str) -> list[str]:
    """Each option with its value."""
    return [f"--{part.strip()}" for part in text.split("--") if part]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _short(path: str, paths: Sequence[str]) -> str:
    """A path as a person would write it below the one folder that was named; quoted, as names may hold any bytes."""
    root = str(Path(paths[0]).expanduser().absolute()) + "/" if len(paths) == 1 else ""
    return repr(path.removeprefix(root))


def _line(label: str, text: str, style: str = "bold") -> Line:
    return (style, f"{label:{LABEL}}", text)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "unknown"


def _kinds(counts: Mapping[str, int]) -> str:
    """Each kind, with its number if there are several."""
    return ", ".join(f"{name} ({count:,})" if len(counts) > 1 else name for name, count in counts.items())


def _depth(name: str) -> str:
    bits = "".join(filter(str.isdigit, name)) or "?"
    return f"{bits} bits" if name.startswith("u") else f"{name} ({bits} bits)"


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
