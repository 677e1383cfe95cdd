"""What only a GPU can show: ``python3 tests/gpu.py`` (or ``nox -s gpu``).

Runs from the source tree with the Python and the packages that are there, needs no network, and
ends within eight minutes: first the tests marked ``gpu``, the Triton kernels among them, then the
benchmarks, then a short run of training for every paper. ``PYTHONPATH`` may name a folder with what
this Python lacks; tests that need more than there is do not stop the others. What ran, on which
device and how long, is written to ``runs/gpu.csv``.
"""

import csv
import importlib.util
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 8 * 60
PROJECTS = [
    ROOT / "shared",
    *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml")),
]


def commands() -> dict[str, list[str]]:
    """What to run, by name: tests of all projects, then benchmarks, then training."""
    python = sys.executable
    tests, benchmarks, training = {}, {}, {}
    for project in PROJECTS:
        name = project.name
        pytest = [python, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors"]
        tests[f"tests {name}"] = [*pytest, str(project / "tests")]
        for script in sorted(project.glob("benchmarks/[a-z]*.py")):
            benchmarks[f"benchmark {name} {script.stem}"] = [python, str(script)]
        if name != "shared":
            metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
            module = metadata["project"]["name"].replace("-", "_")
            training[f"train {name}"] = [python, "-m", module, "train"]
    return {**tests, **benchmarks, **training}


def run(command: list[str], seconds: float) -> str:
    """Run one command from the source tree and say how it ended."""
    paths = [*(str(project / "src") for project in PROJECTS), os.environ.get("PYTHONPATH", "")]
    sources = os.pathsep.join(filter(None, paths))
    folder = ROOT / "runs" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    # pytest must find its settings at the root; training writes where it stands.
    place = ROOT if "pytest" in command else folder
    try:
        done = subprocess.run(
            command, cwd=place, env={**os.environ, "PYTHONPATH": sources}, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "out of time"
    if "pytest" in command and done.returncode == 5:
        return "no gpu tests"
    return "passed" if done.returncode == 0 else f"exit status {done.returncode}"


def main() -> int:
    """Run everything within the time; the status is 0 when nothing failed."""
    missing = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu: nothing was run: {sys.executable} has no {' and no '.join(missing)}")
        return 1
    import torch

    if not torch.cuda.is_available():
        print("gpu: nothing was run: torch sees no GPU on this machine")
        return 0
    device = torch.cuda.get_device_name()
    end = time.monotonic() + SECONDS
    rows = []
    for name, command in commands().items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        status = run(command, end - start) if end > start else "out of time"
        seconds = f"{time.monotonic() - start:.1f}"
        rows.append({"device": device, "torch": torch.__version__, "what": name})
        rows[-1].update(seconds=seconds, status=status)
    output = ROOT / "runs" / "gpu.csv"
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(output.read_text(encoding="utf-8"))
    return int(any(row["status"] not in ("passed", "no gpu tests") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
