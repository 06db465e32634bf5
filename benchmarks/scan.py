# SPDX-License-Identifier: Apache-2.0
"""How long it takes to find a million images, and how much memory, beside what others do.

Appends rows to results/scan.csv.

    python benchmarks/scan.py                      a million files in a folder for temporary files, about 3 minutes
    python benchmarks/scan.py --files 50000 --folder /data/tmp

Every measurement is a process of its own, started when the names are in the page cache. Time is that of the call,
without Python's start and imports; memory is the largest of the whole process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PER_FOLDER = 1000
REPEATS = 3
# The last three are what people use: each keeps an object for every path, and sizes are not looked at but by the first.
METHODS = {
    "fastmim": "from fastmim.data.sources.scan import scan as call",
    "os.walk + stat": """
import os
def call(paths):
    files = [os.path.join(folder, name) for folder, _, names in os.walk(paths[0]) for name in names]
    return sorted((file, os.stat(file).st_size) for file in files)
""",
    "os.walk": """
import os
def call(paths):
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(paths[0]) for name in names)
""",
    "torchvision make_dataset": """
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
def call(paths):
    return make_dataset(paths[0], find_classes(paths[0])[1], extensions=IMG_EXTENSIONS)
""",
}
MEASURE = """
import json, resource, sys, time
{method}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
found = call(sys.argv[1:])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"files": len(found), "seconds": seconds, "before_mb": before / 1024, "peak_mb": peak / 1024}}))
"""


def make_tree(root: Path, files: int) -> None:
    """Files of one byte, in folders of 1,000."""
    for folder in range(0, files, PER_FOLDER):
        path = root / f"class_{folder // PER_FOLDER:04d}"
        path.mkdir()
        number = os.open(path, os.O_RDONLY)
        for file in range(folder, min(files, folder + PER_FOLDER)):
            made = os.open(f"image_{file:08d}.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=number)
            os.write(made, b"x")
            os.close(made)
        os.close(number)


def measure(method: str, root: Path) -> dict[str, Any]:
    """One call in a process of its own."""
    call = [sys.executable, "-c", MEASURE.format(method=METHODS[method]), str(root)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fastmim-scan-") as made:
        start = time.perf_counter()
        make_tree(Path(made), options.files)
        print(f"{options.files} files made in {time.perf_counter() - start:.0f} s", flush=True)
        for method in METHODS:
            measure(method, Path(made))  # also fills the page cache
        # In turns, so that a slow minute of the machine is everybody's.
        runs = [(method, measure(method, Path(made))) for _ in range(REPEATS) for method in METHODS]
        print("removing them", flush=True)
    import rows  # only now: it needs torch, and the children are to start from a small process

    measured = []
    for method in METHODS:
        every = [run for name, run in runs if name == method]
        assert all(run["files"] == options.files for run in every)
        row = {"method": method, "files": options.files, "per_folder": PER_FOLDER, "repeats": REPEATS}
        row["seconds"] = round(statistics.median(run["seconds"] for run in every), 3)
        row["seconds_all"] = " ".join(f"{run['seconds']:.3f}" for run in every)
        row["before_mb"] = round(statistics.median(run["before_mb"] for run in every), 1)
        row["peak_mb"] = round(statistics.median(run["peak_mb"] for run in every), 1)
        row["bytes_per_file"] = round((row["peak_mb"] - row["before_mb"]) * 2**20 / options.files, 1)
        measured.append(row | rows.origin())
        print(" ".join(f"{key}={row[key]}" for key in row))
    print(rows.append("scan", measured))


if __name__ == "__main__":
    main()
