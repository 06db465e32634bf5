# SPDX-License-Identifier: Apache-2.0
"""What a step of each method costs, as ratios to SimMIM at 224 px of the same network in the same run.

    python benchmarks/methods.py [--threads 1] [--batch 32] [--seconds 30] [--models vit_small_patch16_224 ...]

Whole training steps on synthetic images at equal batch; methods take turns (``fastmim bench``). Nothing else should run
meanwhile. Rows go into results/methods.csv.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import rows
import torch

import fastmim

# Of a plain network, four of twelve blocks are discarded; of these hierarchical ones the last stage, and of the next as
# many blocks as make a third of all (Swin-T has 2, 2, 6, 2; ConvNeXt-T 3, 3, 9, 3).
PLAIN = [
    "simmim", "mae", "maskfeat", "selectivemae", "localmim", "localmim+resolution=128", "mae+resolution=128",
    "fastmim", "fastmim_p", "fastmim+discard=4", "fastmim+hide=drop", "fastmim+hide=drop+discard=4", "disjoint",
    "fastmim+target=hog_colour",
]  # fmt: skip
HIERARCHICAL = [
    "fastmim", "fastmim_p", "fastmim+discard={discard}", "compact", "compact+discard={discard}",
    "localmim+hide=pixels+resolution=128", "disjoint+hide=pixels",
]  # fmt: skip
MODELS = {
    "vit_small_patch16_224": PLAIN,
    "swin_tiny_patch4_window7_224": ["simmim", *(name.format(discard=4) for name in HIERARCHICAL)],
    "convnext_tiny": ["simmim+hide=pixels", *(name.format(discard=6) for name in HIERARCHICAL)],
}


def main() -> None:
    """Measures every network and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", help="only these, as recipe+word=value")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    origin = rows.origin()
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            found = fastmim.bench(
                model=model, methods=options.methods or MODELS[model], batch=options.batch, seconds=options.seconds,
                threads=options.threads, out=Path(scratch) / model,
            )  # fmt: skip
            rows.append("methods", [_row(found, row) | origin for row in found.rows])
            for label, reason in found.left_out.items():
                print(f"{model}: {label}: {reason}")


def _row(found: Any, row: Any) -> dict[str, Any]:
    return {
        "model": found.facts["model"],
        "method": row.method,
        "px": row.px,
        "images_per_s": f"{row.images_per_s:.2f}",
        "views_per_s": f"{row.views_per_s:.2f}",
        "ratio": f"{row.ratio:.2f}",
        "spread": f"{row.spread:.3f}",
        "gmac_per_image": f"{row.gmac_per_image:.3f}",
        "share_of_matrix_product": f"{row.share:.3f}",
        "memory_mb": f"{row.memory_mb:.0f}",
        **{name: found.facts[name] for name in ("memory", "batch", "device", "precision", "matrix_tflops")},
    }


if __name__ == "__main__":
    main()
