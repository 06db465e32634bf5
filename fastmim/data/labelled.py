# SPDX-License-Identifier: Apache-2.0
"""Images with labels, for measuring only: a folder of class folders, as ImageFolder and timm read it."""

from dataclasses import dataclass
from pathlib import Path

from fastmim.data.scan import scan
from fastmim.errors import UserError
from fastmim.seeding import derive

VAL_NAMES = ("val", "valid", "test")
WANTED = "wanted class folders with images, or train/ and val/ with class folders"


@dataclass(frozen=True)
class Labelled:
    """Two labelled sets. A label is the place of the class in ``classes``, which are sorted by name."""

    classes: tuple[str, ...]
    train_files: tuple[str, ...]
    train_labels: tuple[int, ...]
    val_files: tuple[str, ...]
    val_labels: tuple[int, ...]
    split: str
    """How the two sets came about, in words."""


def labelled(path: str, seed: int = 0, val_share: float = 0.2) -> Labelled:
    """Read ``path``: train/ and val/ (or valid/, test/) with class folders, or class folders directly.

    Without a val folder, ``val_share`` of each class (at least one image) is held out, as a pure function of ``seed``.

    Raises:
        UserError: not a folder, fewer than two classes, a class with fewer than two images, or a class of val that
            train does not have.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is not a folder; {WANTED}")
    train_root = root / "train" if _class_folders(root / "train") else root
    val_root = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    train = _read_classes(train_root)
    classes = tuple(train)
    if train_root == root or val_root is None:
        return _split(classes, train, seed, val_share)
    val = {folder.name: scan([str(folder)]).files for folder in _class_folders(val_root)}
    unknown = [name for name in val if name not in train]
    if unknown or not val:
        reason = f"class {unknown[0]!r} is not in {str(train_root)!r}" if unknown else "no class folders"
        raise UserError(f"{str(val_root)!r}: {reason}; {WANTED}")
    return _pack(classes, train, val, f"{train_root.name}/ and {val_root.name}/")


def _read_classes(root: Path) -> dict[str, tuple[str, ...]]:
    folders = _class_folders(root)
    if len(folders) < 2:
        found = f"only {folders[0].name!r}" if folders else "none"
        raise UserError(f"{str(root)!r} needs at least two class folders, but has {found}; {WANTED}")
    files = {folder.name: scan([str(folder)]).files for folder in folders}
    for name, of_class in files.items():
        if len(of_class) < 2:
            raise UserError(f"class {name!r} of {str(root)!r} has one image, but needs at least two")
    return files


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _split(classes: tuple[str, ...], files: dict[str, tuple[str, ...]], seed: int, val_share: float) -> Labelled:
    train: dict[str, tuple[str, ...]] = {}
    val: dict[str, tuple[str, ...]] = {}
    for label, name in enumerate(classes):
        of_class = files[name]
        count = min(max(1, round(val_share * len(of_class))), len(of_class) - 1)
        drawn = sorted(range(len(of_class)), key=lambda place: derive(seed, "split", label, place))
        held_out = set(drawn[:count])
        train[name] = tuple(file for place, file in enumerate(of_class) if place not in held_out)
        val[name] = tuple(file for place, file in enumerate(of_class) if place in held_out)
    return _pack(classes, train, val, f"{val_share:.0%} of each class held out, seed {seed}")


def _pack(
    classes: tuple[str, ...], train: dict[str, tuple[str, ...]], val: dict[str, tuple[str, ...]], split: str
) -> Labelled:
    def flat(files: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        pairs = [(file, label) for label, name in enumerate(classes) for file in files.get(name, ())]
        return tuple(file for file, _ in pairs), tuple(label for _, label in pairs)

    return Labelled(classes, *flat(train), *flat(val), split)
