# SPDX-License-Identifier: Apache-2.0
"""What a run folder says, in plain words and short numbers."""

import json
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from statistics import fmean, median
from typing import Any

from fastmim import recipes
from fastmim.config import Config, RunConfig
from fastmim.report.curves import is_number
from fastmim.report.folder import Folder, Record, RunFolder

# Options that say where a run goes, not what it is.
PLACE = {"out", "overwrite", "allow_data_change"}
TARGETS = {
    "hog": "HOG",
    "hog_colour": "HOG and mean colours",
    "pixels": "pixels",
    "pixels_norm": "normalised pixels",
}
HIDING = {
    "pixels": "by a learnt colour",
    "tokens": "by a learnt token",
    "drop": "by not encoding them",
    "compact": "by moving the visible ones together",
}
MASKING = {
    "random": "",
    "blockwise": " in rectangles",
    "grid": " (all but one of each 2 x 2)",
    "selective": " (chosen by their gradients)",
}


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 2 d 3 h, 14 min 20 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
        elif parts:
            break
        left %= size
    return " ".join(parts[:2])


def file_size(count: float) -> str:
    """Bytes in decimal units, as disks and downloads have them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def last(records: list[Record], key: str) -> float | None:
    """The last finite reading of a number."""
    return next((record[key] for record in reversed(records) if is_number(record.get(key))), None)


def values(records: list[Record], key: str) -> list[float]:
    """Every finite reading of a number."""
    return [record[key] for record in records if is_number(record.get(key))]


def dataset_name(paths: Sequence[str]) -> str:
    """The images by the names of their folders."""
    names = [_folder_name(path) for path in paths]
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return " and ".join(names[:2]) + rest if len(names) <= 2 else ", ".join(names[:2]) + rest


def _folder_name(path: str) -> str:
    """The last part; of ``signs/train`` both, because a split's name says nothing alone."""
    parts = PurePath(path).parts[-2:]
    return (
        "/".join(parts) if parts[-1:] in (("train",), ("images",)) and len(parts) == 2 else PurePath(path).name or path
    )


def device_name(run: Folder) -> str:
    """The device by the name that it was recorded under."""
    kind, name = run.environment.get("device"), run.environment.get("device_name")
    # What a processor calls itself is often just its family, such as x86_64.
    found = f"CPU ({name})" if kind == "cpu" and name else name or kind
    return str(found or (run.config.system.device if run.config else None) or "")


def seconds_spent(run: Folder) -> float | None:
    """Seconds over all sittings."""
    return last(sorted(run.train + run.evals, key=lambda record: record["step"]), "seconds")


def samples_seen(run: Folder) -> float | None:
    """Images that went through the network, repeats counted."""
    return last(run.train, "samples") or run.status.get("samples")


def lead(run: RunFolder) -> str:
    """One sentence: what was trained on what, for how long."""
    config, seconds, images = run.config, seconds_spent(run), run.data.get("images")
    words = [config.method.model if config else "A network", "was pre-trained", _start(config)]
    words.append(f"on {images:,} unlabelled images" if images else "on unlabelled images")
    words.append(f"from {dataset_name(config.data.paths)}" if config and config.data.paths else "")
    words.append(f"at {', then '.join(str(size) for size, _ in config.data.course)} px" if config else "")
    epoch = last(run.train, "epoch")
    if config and finished(run):
        words.append(f"for {config.optim.epochs:g} epochs")
    elif epoch is not None:
        words.append(f"for {epoch:.3g} epochs so far")
    device = device_name(run)
    taken = f", which took {duration(seconds)}" + (f" on {device}" if device else "") if seconds else ""
    return " ".join(word for word in words if word) + taken + "."


def finished(run: Folder) -> bool:
    """The run did all of its steps."""
    return run.status.get("state") == "finished"


def unfinished(run: Folder) -> str:
    """Why the report is not of a whole run; empty when it is."""
    if finished(run):
        return ""
    state, step, steps = (run.status.get(key) for key in ("state", "step", "steps"))
    how = {
        "running": "was still going (or was killed) when this report was written",
        "interrupted": "was interrupted",
        "failed": "failed",
    }.get(str(state), "left no word of how it ended")
    where = f" at step {step:,} of {steps:,}" if is_number(step) and is_number(steps) else ""
    message = run.status.get("message")
    return f"This run {how}{where}." + (f" It said: {message}" if message else "")


def key_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Name and value of what one asks first."""
    config = run.config
    facts = [("Network", f"{config.method.model}{parameters(run)}")] if config else []
    if run.data:
        facts.append(("Images", images_on_disk(run.data)))
    if config:
        method, optim = config.method, config.optim
        cell = f" in cells of {method.cell} px" if method.cell and not method.scales else ""
        cell += f" on {len(method.scales)} scales" if method.scales else ""
        part = f", {100 * method.predict_ratio:g} % of blocks" if method.predict_ratio else ""
        which = MASKING[method.masking]
        masks = f", {method.masks} masks an image" if method.masks > 1 else ""
        block = f" of {method.block} px" if method.block else ""
        batch = f", {optim.global_batch:,} images a step" if optim.global_batch else ""
        facts += [
            ("Resolution", _sizes(config)),
            ("Hidden", f"{100 * method.mask_ratio:g} % of blocks{block}{which}, {HIDING[method.hide]}{masks}"),
            ("Predicted", f"{TARGETS[method.target]}{cell}{part}, {method.loss.upper()} loss"),
            ("Length", f"{optim.epochs:g} epochs{batch}"),
        ]
    loss = last(run.evals, "val_loss")
    facts += [*costs(run), ("Held-out loss", f"{loss:.4g}" if loss is not None else "")]
    return [(name, value) for name, value in facts if value]


def costs(run: Folder) -> list[tuple[str, str]]:
    """Samples, time and device of a run."""
    seen, seconds, device = samples_seen(run), seconds_spent(run), device_name(run)
    precision = f", {run.config.system.precision}" if run.config and run.config.system.precision else ""
    return [
        ("Samples seen", f"{seen:,.0f}" if seen else ""),
        ("Time", duration(seconds) if seconds else ""),
        ("Device", device + precision if device else ""),
    ]


def parameters(run: Folder) -> str:
    """How many the exported network has, to follow its name; empty without an export."""
    count = run.parameters
    if not count:
        return ""
    return f", {count / 1e6:.3g} million parameters" if count >= 1e6 else f", {count:,} parameters"


def _sizes(config: Config) -> str:
    course = config.data.course
    if len(course) == 1:
        return f"{config.data.resolution} x {config.data.resolution} px"
    return ", then ".join(f"{size} x {size} px ({share:.0%})" for size, share in course)


def speed(run: Folder) -> tuple[float, float] | None:
    """(images a second, share of the time spent waiting for images), or None without readings."""
    # The first reading holds the start of the workers and the warm-up of the device.
    rates, waits = values(run.train, "images_per_s"), values(run.train, "data_wait")
    rates, waits = rates[1:] or rates, waits[1:] or waits
    return (median(rates), fmean(waits) if waits else 0.0) if rates else None


def waiting_hint(share: float) -> str:
    """What to do about a network that waits for its images; empty when it hardly does."""
    if share <= 0.05:
        return ""
    return (
        "The device often stood idle because images came too slowly. It would run faster with more --workers, with "
        "--cache ram if the images fit into memory, or with images that 'fastmim prepare' has made small once."
    )


def not_finite(run: Folder) -> int:
    """Readings of the training loss that were not a number: the training had broken down."""
    return sum(not is_number(record.get("loss")) for record in run.train)


def flat(tree: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON as (names on the way to it, text); what is null is left out."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def rerun_command(config: Config) -> str:
    """The shell command that gives the same run again: the recipe, and every option that differs from it."""
    recipe = config.method.recipe
    base = recipes.load(recipe) if recipe in recipes.names() else Config()
    return shell_command(["pretrain", "--recipe", recipe], changed(config, base, {"paths"}), config.data.paths)


def changed(config: RunConfig, base: RunConfig, given: Collection[str] = ()) -> list[tuple[str, Any, Any]]:
    """Name, value and the recipe's value of every option that differs from a recipe's.

    Args:
        config: of the run.
        base: of its recipe.
        given: options that are named elsewhere.
    """
    found = []
    for section, defaults in base.model_dump().items():
        chosen = config.model_dump()[section]
        for name, default in defaults.items() if isinstance(defaults, dict) else ():
            if chosen[name] != default and name not in {*PLACE, "recipe", *given}:
                found.append((name, chosen[name], default))
    return found


def shell_command(words: Sequence[str], options: Sequence[tuple[str, Any, Any]], places: Sequence[str]) -> str:
    """A fastmim command, an option a line; ``options`` are those of `changed`."""
    # After "--" a path is a path, even when it looks like an option.
    lines = [["fastmim", words[0]], words[1:], *(_flag(name, value) for name, value, _ in options), ["--", *places]]
    return " \\\n    ".join(" ".join(shell_word(word) for word in line) for line in lines)


def shell_word(word: str) -> str:
    """One word of a bash command; bytes that are no text, and control characters, are written as escapes."""
    if all(letter.isprintable() for letter in word):
        return shlex.quote(word)
    escaped = (
        letter if letter.isprintable() and letter not in "\\'" else "".join(f"\\x{byte:02x}" for byte in _bytes(letter))
        for letter in word
    )
    return "$'" + "".join(escaped) + "'"


def load_snippet(path: Path) -> str:
    """Python that loads the exported weights by timm, which must be told of a network that is not its own."""
    export = path.resolve() / "export" / "timm"
    config = export / "config.json"
    module = json.loads(config.read_text(encoding="utf-8")).get("registered_by") if config.is_file() else None
    folder = json.dumps(f"local-dir:{export}", ensure_ascii=False)
    register = f"import {module}\n" if module else ""
    return (
        f"import timm\n{register}\n"
        f"folder = {folder}\n\n"
        "# a new head, to fine-tune\nnetwork = timm.create_model(folder, pretrained=True, num_classes=10)\n\n"
        "# one vector per image\nfeatures = timm.create_model(folder, pretrained=True, num_classes=0)\n\n"
        "# maps, to segment or detect\nstages = timm.create_model(folder, pretrained=True, features_only=True)"
    )


def _start(config: Config | None) -> str:
    if config is None:
        return ""
    if config.method.pretrained:
        return "(from timm's released weights)"
    return "" if config.method.model.startswith("local-dir:") else "from scratch"


def images_on_disk(data: Record) -> str:
    """How many images there were, how large and of which kinds."""
    formats = data.get("formats") or {}
    parts = [f"{data['images']:,}" if is_number(data.get("images")) else ""]
    parts.append(f"{data['held_out']:,} held out" if data.get("held_out") else "")
    parts.append(file_size(data["bytes"]) if is_number(data.get("bytes")) else "")
    parts.append(" + ".join(name.upper() for name in formats))
    return ", ".join(part for part in parts if part)


def _flag(name: str, value: Any) -> list[str]:
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    if value is None:
        return [f"--{word}", "none"]
    if isinstance(value, dict):
        return [f"--{word}", json.dumps(value)]
    parts = value if isinstance(value, tuple) else (value,)
    numbers = (f"{part:.0f}" if isinstance(part, float) and part.is_integer() else str(part) for part in parts)
    return [f"--{word}", ",".join(numbers)]


def _bytes(letter: str) -> bytes:
    return letter.encode("utf-8", "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass")


def shortest_ends(paths: Sequence[Sequence[str]]) -> list[str] | None:
    """The shortest ends of paths, given by their parts, that tell them apart; None where two are the same."""
    for length in range(1, max(len(parts) for parts in paths) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return None
