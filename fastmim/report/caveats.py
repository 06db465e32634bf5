# SPDX-License-Identifier: Apache-2.0
"""What a reader should know before believing the accuracy of a run that learnt from labels."""

from collections.abc import Sequence

from fastmim.report.folder import TransferFolder

FEW_IMAGES = 100
UNEQUAL = 5
"""Largest over smallest class; from here on the accuracy says little of the small ones."""


def caveats(run: TransferFolder) -> list[str]:
    """One plain sentence or two for each of them, the gravest first; none where there is no result."""
    outcome, found = run.outcome, []
    if outcome is None:
        return []
    rates, tested, method = outcome["accuracy"], outcome["test"], run.config.method if run.config else None
    if run.config and run.config.data.shuffle_labels:
        found.append("The training labels were shuffled: this run is a control, from which nothing can be learnt.")
    if rates["top1"] <= rates["majority"]:
        found.append(
            "The accuracy is not above what always naming the most frequent class would get: nothing useful was learnt."
        )
    elif rates["low"] <= rates["majority"]:
        found.append(
            "The interval of the accuracy reaches down to what always naming the most frequent class would get: it is "
            "not certain that anything useful was learnt."
        )
    never = [one["class"] for one in outcome["per_class"] if one["recall"] == 0]
    if never:
        what = "This class was" if len(never) == 1 else f"These {len(never):,} classes were"
        found.append(f"{what} never named rightly: {_some(never)}.")
    unseen = [one["class"] for one in outcome["per_class"] if not one["images"]]
    if unseen:
        found.append(f"No test image of {_some(unseen)} could be read, so it is not known how well that is told apart.")
    if tested < FEW_IMAGES:
        found.append(
            f"There are only {tested} test images, so the accuracy is known roughly. With --folds 5 every image is "
            "tested once."
        )
    unequal = _unequal(run, balanced=method is not None and method.balance != "none")
    found += [unequal] if unequal else []
    if run.data.get("shown") == "test":
        found.append(
            "The curves on the way were measured on the test images too. Nothing is chosen by them here, but you may "
            "have: if you try many settings and keep the best, its accuracy is too high; a test part that is looked at "
            "once (train/, val/ and test/) tells more."
        )
    if outcome.get("unreadable"):
        count = outcome["unreadable"]
        images = "1 test image" if count == 1 else f"{count:,} test images"
        found.append(f"{images} could not be read, and {'is' if count == 1 else 'are'} not counted.")
    return found


def _unequal(run: TransferFolder, balanced: bool) -> str:
    counts = (run.data.get("counts") or {}).get("train")
    counts = counts or [one["images"] for one in (run.outcome or {})["per_class"]]
    low, high = min(counts), max(counts)
    if high < UNEQUAL * max(low, 1):
        return ""
    hint = "" if balanced else " --balance loss or sampler may help the small ones."
    return (
        f"The classes are very unequal ({low:,} to {high:,} images): look at the balanced accuracy and at each class."
        f"{hint}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
