# SPDX-License-Identifier: Apache-2.0
"""``fastmim bench``: how fast each method trains on this machine, and how long a run would take."""

import re
import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from tyro.conf import Positional, arg

from fastmim.cli_options import build
from fastmim.cli_output import INTERRUPTED, OK
from fastmim.config import MethodConfig, Section, listed


def _methods(value: Any) -> Any:
    """``fastmim,simmim+scales=1,-1``, as a command line gives it, as a list; a name begins with a letter."""
    return re.split(r",\s*(?=[A-Za-z])", value) if isinstance(value, str) else value


Methods = Annotated[tuple[str, ...], BeforeValidator(_methods)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=8)], ...], BeforeValidator(listed)]


class Bench(Section):
    """Measure how fast each method trains here, and estimate your run.

    Whole training steps on synthetic images, side by side in one run: images/s, memory, arithmetic, share of the
    machine's speed. Ctrl-C ends it with what is measured so far.
    """

    data: Positional[str | None] = None
    """Images whose loading is measured too, and for which the time is estimated."""
    model: str = MethodConfig().model
    """Any timm model."""
    methods: Annotated[Methods | None, arg(metavar="METHOD,...")] = None
    """Recipes with words, as fastmim+hide=drop+discard=4,mae; all that fit the network when not given."""
    sizes: Annotated[Sizes | None, arg(metavar="PX,...")] = None
    """Sides of the images in pixels, as 128,160,224; each method's own when not given."""
    batch: int | None = Field(default=None, ge=2)
    """Images of a step, for all methods; 32 on a CPU, and what fits all of them on a GPU, when not given."""
    seconds: float = Field(default=10.0, gt=0)
    """Measuring time for each method and size."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on a CPU; torch's own choice when not given."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu; the fastest there is when not given."""
    precision: Literal["bf16", "fp32"] | None = None
    """Arithmetic of the network; bf16 where the hardware has it, when not given."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    epochs: float | None = Field(default=None, gt=0)
    """Also estimate a run of so many epochs, beside each recipe's own."""
    images: int | None = Field(default=None, ge=1)
    """Images of the estimated run; those of DATA, or the 1,281,167 of ImageNet-1k, when not given."""
    out: str | None = None
    """The folder for bench.csv and bench.png; the next free runs/bench-001 when not given."""


def bench(words: dict[str, Any]) -> int:
    """Prints the tables, and where the picture is."""
    options = build(Bench, words, "bench")
    from fastmim.speed.compare import bench as compare
    from fastmim.speed.page import lines

    result = compare(**options.model_dump())
    print(*lines(result), sep="\n")
    print(f"\n{result.folder / 'bench.png'}\n{result.folder / 'bench.csv'}")
    if result.interrupted:
        print("fastmim: interrupted; what was measured until then is above", file=sys.stderr)
    return INTERRUPTED if result.interrupted else OK
