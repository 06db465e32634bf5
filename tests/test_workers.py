# SPDX-License-Identifier: Apache-2.0
"""Processes that read images end when they should, whatever they wait for."""

import multiprocessing
import time
from typing import Any

import pytest

from fastmim.data.workers import work
from fastmim.errors import UserError


class Samples:
    """Answers what it is asked; "wait" never comes back, "error" is a mistake of the user's."""

    def __getitems__(self, piece: str) -> str:
        if piece == "wait":
            time.sleep(10_000)
        if piece == "error":
            raise UserError("the shard is damaged")
        return piece


def started_since(before: set[Any]) -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.pid not in before]


def test_an_error_ends_workers_that_wait_for_ever() -> None:
    """One meets a damaged shard while another waits for a download that does not come."""
    before = {child.pid for child in multiprocessing.active_children()}
    answers = work(Samples(), ["a", "wait", "error", "b"], workers=2)
    assert next(answers) == "a"
    # The second answer would never come; the error must not wait for it, nor the end of the program.
    answers.close()
    assert started_since(before) == []

    answers = work(Samples(), ["error", "wait"], workers=2)
    with pytest.raises(UserError, match="damaged") as caught:
        next(answers)
    # Even while somebody holds the exception, and with it all frames.
    assert caught.tb is not None and started_since(before) == []


def test_a_stream_that_ends_leaves_no_worker() -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    assert list(work(Samples(), ["a", "b", "c"], workers=2)) == ["a", "b", "c"]
    assert started_since(before) == []
