"""``python -m lightning_modules compare``: one table for a task, the same search and budget for every row.

``python -m lightning_modules compare --config configs/sparse_recovery.yaml --folder runs/compare/sparse_recovery``.
Every option of ``fit`` is an option here, for all rows. A comparison that was stopped goes on when it is called again.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.compare.comparison import compare
from lightning_modules.compare.plot import plot_error_against_bits
from lightning_modules.compare.rows import QUANTIZERS, read_rows
from lightning_modules.compare.table import results_text, terminal_table
from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules compare",
        description=__doc__.partition("\n")[0],
        epilog="All other options are those of fit: --config (required), --trainer.max_epochs, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=(),
        metavar="ROW",
        help=f"quantizers ({', '.join(QUANTIZERS)}; all unless given), or one YAML file that maps each row to its "
        f"quantizer and overrides (options of fit)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... (3)")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=(2e-4, 2e-3, 1e-2),
        metavar="RATE",
        help="of weights and latents, searched for every row on the first seed (0.0002 0.002 0.01)",
    )
    parser.add_argument(
        "--seeded",
        nargs="+",
        default=(),
        metavar="OPTION",
        help="options of fit that get each seed too, such as data.operator.seed: for an operator that the solver does "
        "not know, another one for each seed",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="of all results (runs/compare)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (1)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="RUNS",
        help="how many are trained at a time, each in a process of its own with so many threads; -1: one on each "
        "processor (1). The results are the same; times are taken beside the other runs",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Compare, print the table, and write ``RESULTS.md`` and ``error_against_bits.png`` into the folder.

    Raises:
        MisconfigurationException: no config, or what `compare` refuses.
        FileNotFoundError: a config or a file of rows that is not there.
    """
    own, options = _parser().parse_known_args(list(args))
    if own.seeds < 1 or own.threads < 1 or not all(0 < rate < float("inf") for rate in own.learning_rates):
        raise MisconfigurationException(
            f"seeds={own.seeds}, threads={own.threads}, learning_rates={list(own.learning_rates)}: counts are at least "
            f"1, rates positive"
        )
    if find_spec("matplotlib") is None:  # now, not when hours of training are done
        raise MisconfigurationException("a comparison ends with a plot: pip install pibinn-plugin[plot]")
    try:
        comparison = compare(
            [*options, f"--threads={own.threads}"],
            read_rows(own.rows),
            range(own.seeds),
            own.learning_rates,
            own.folder,
            lambda line: print(line, flush=True),
            own.seeded,
            own.jobs,
        )
    except KeyboardInterrupt as error:
        raise SystemExit("stopped; the same command goes on with what is not finished") from error
    print(terminal_table(comparison))
    plot = plot_error_against_bits(comparison, own.folder / "error_against_bits.png")
    path = own.folder / "RESULTS.md"
    command = shlex.join(["python", "-m", "lightning_modules", "compare", *args])
    with atomic_file(path) as partial:
        partial.write_text(results_text(comparison, command, plot))
    print(f"results: {path}, {plot}")
