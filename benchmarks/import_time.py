"""Seconds that ``import pibinn_plugin`` and its schemes add to ``import torch``: ``python benchmarks/import_time.py``.

Each measurement is a fresh process; the cases take turns, and the table gives median and spread.
"""

import statistics
import subprocess
import sys

CASES = (
    "pibinn_plugin",
    "pibinn_plugin.schemes.native",
    "pibinn_plugin.schemes.torchao",
    "pibinn_plugin.schemes.brevitas",
)
ROUNDS = 7


def seconds(module: str) -> float:
    """Seconds of one import in a process that has imported torch."""
    code = f"import time, torch; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print the table."""
    samples: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(ROUNDS):
        for case in CASES:
            samples[case].append(seconds(case))
    print("| import | median, s | min | max |\n|---|---|---|---|")
    for case, values in samples.items():
        print(f"| `{case}` | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
