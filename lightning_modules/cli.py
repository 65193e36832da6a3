"""The command line: LightningCLI's ``fit``, ``validate`` and ``test``; and four more.

``convert`` packs a trained solver, ``export`` writes it for another runtime, ``summary`` says where its bytes are,
``analyze`` what can be guaranteed of it.

``apply``, ``compare``, ``demo`` and ``frames`` are commands of their own: see `lightning_modules.apply.command`,
`lightning_modules.compare.command`, `lightning_modules.demo` and `lightning_modules.mirror_frames`.

``python -m lightning_modules fit --config configs/eeg_eog.yaml``; any value of the YAML can be overridden by an option,
``--print_config`` shows the whole configuration, and ``fit --ckpt_path last`` resumes a run that was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.apply.command import main as apply
from lightning_modules.compare.command import main as compare
from lightning_modules.data.files import DataFileError
from lightning_modules.demo import command as demo
from lightning_modules.mirror_frames import main as frames
from lightning_modules.modules import SolverModule
from lightning_modules.quiet import ignore_hints
from lightning_modules.solver_cli import SolverCLI
from lightning_modules.trainer import SolverTrainer
from pibinn_plugin import PIBiNNError

__all__ = ["main"]

# What a user can cause, and what says what to do about it; files and folders that the system refuses; an extra that is
# not installed.
_USER_ERRORS = (PIBiNNError, DataFileError, MisconfigurationException, OSError, ModuleNotFoundError)

_Command = Callable[[Sequence[str]], None]

# What LightningCLI does not know: none of these takes its options, but for `compare`.
_COMMANDS: dict[str, tuple[_Command, str]] = {
    "apply": (apply, "a packed network at work on a signal, an image or measurements"),
    "compare": (compare, "other quantizers beside the global scale, in one table"),
    "demo": (demo, "what one bit is good for, in under three minutes"),
    "frames": (frames, "learned patterns as the frames of a micromirror device"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend is one line on stderr and the exit status 2."""
    ignore_hints()
    arguments = sys.argv[1:] if args is None else list(args)
    try:
        if arguments and arguments[0] in _COMMANDS:
            run, _ = _COMMANDS[arguments[0]]
            return run(arguments[1:])
        _check_command(arguments)
        others = "; ".join(f"{name}, {does}" for name, (_, does) in _COMMANDS.items())
        SolverCLI(
            SolverModule,
            trainer_class=SolverTrainer,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "description": "Train unrolled solvers in one bit a weight, pack, export and analyze them.",
                "epilog": f"Commands of their own: {others}.",
            },
            args=None if args is None else arguments,
        )
    except _USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def _check_command(arguments: Sequence[str]) -> None:
    known = sorted({*_COMMANDS, *SolverCLI.subcommands()})
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        raise PIBiNNError(f"there is no command {arguments[0]!r}: expected one of {', '.join(known)}")
