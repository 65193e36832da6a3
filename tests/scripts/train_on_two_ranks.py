"""Trains with TwoStageQAT on one rank, on two ranks of DDP and on two ranks of FSDP2, and leaves what came of it.

    python tests/scripts/train_on_two_ranks.py DIRECTORY

Each rank is forked from this process, which has torch and Lightning imported and has computed nothing. For each run,
``DIRECTORY/RUN-RANK.pt`` holds what it did (see `train`), and ``DIRECTORY/RUN`` its checkpoints, one an epoch.
"""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from train_and_die import quiet_trainer
from two_stage import EPOCHS, TARGETS, HalfShardedModule, RootShardedModule, ShardedModule, SmallModule, callback

import pibinn_plugin as pb

TWO_RANKS = {"devices": 2, "strategy": "ddp"}
ACCUMULATING = {"accumulate_grad_batches": 2, "starts": (0.25, 0.75)}
# Seconds, for what takes ten: a rank that waits for another in vain says where it waits, and ends,
# in either of the two groups before the test loses its own patience.
PATIENCE = 100


class States(pl.Callback):
    """The whole state dict after each epoch, and the loss of each step."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.states[trainer.current_epoch] = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in pl_module.state_dict().items()
        }


def train(
    run: str,
    module: SmallModule,
    resume: str | None = None,
    scheme: str = "native",
    starts: Any = (2, 4),
    **trainer: Any,
) -> pl.Trainer:
    """Trains in the current directory; leaves the states by epoch, the losses by step and the last metrics."""
    states = States()
    checkpoints = ModelCheckpoint(run, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=[callback(scheme, *starts), states, checkpoints], **trainer)
    trainer.fit(module, ckpt_path=resume)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    leave(f"{run}-{trainer.global_rank}", {"states": states.states, "losses": states.losses, "metrics": metrics})
    return trainer


def leave(name: str, result: dict[str, Any]) -> None:
    torch.save(result, f"{name}.pt")


def fsdp2(is_distributed: bool, tensor_parallel_size: int = 1) -> dict[str, Any]:
    size = 2 // tensor_parallel_size
    strategy = ModelParallelStrategy(size, tensor_parallel_size, save_distributed_checkpoint=is_distributed)
    return {"devices": 2, "strategy": strategy}


def one_rank() -> None:
    train("one", SmallModule())
    train("one_accumulating", SmallModule(), **ACCUMULATING)


def ddp() -> None:
    train("ddp", SmallModule(), **TWO_RANKS)
    for epoch in range(EPOCHS - 1):
        train(f"ddp_resumed_{epoch}", SmallModule(), f"ddp/epoch={epoch}.ckpt", **TWO_RANKS)
    train("ddp_accumulating", SmallModule(), **ACCUMULATING, **TWO_RANKS)
    bucket_views = {"strategy": pl.strategies.DDPStrategy(gradient_as_bucket_view=True)}
    train("ddp_bucket_views", SmallModule(), **TWO_RANKS | bucket_views)


def fsdp() -> None:
    trainer = train("fsdp", ShardedModule(), **fsdp2(False))
    messages = {"convert": message_of(lambda: pb.convert(trainer.lightning_module))}
    for epoch in (1, 3, 4):
        train(f"fsdp_resumed_{epoch}", ShardedModule(), f"fsdp/epoch={epoch}.ckpt", **fsdp2(False))

    trainer = train("fsdp_root", RootShardedModule(), **fsdp2(True))
    trainer.validate(trainer.lightning_module, verbose=False)
    messages["convert_validated"] = message_of(lambda: pb.convert(trainer.lightning_module))
    for epoch in (1, 4):
        train(f"fsdp_root_resumed_{epoch}", RootShardedModule(), f"fsdp_root/epoch={epoch}.ckpt", **fsdp2(True))

    for scheme in ("torchao", "brevitas"):
        train(f"fsdp_{scheme}", ShardedModule(), scheme=scheme, **fsdp2(True))
        path = f"fsdp_{scheme}/epoch=3.ckpt"
        train(f"fsdp_{scheme}_resumed_3", ShardedModule(), path, scheme=scheme, **fsdp2(True))

    refused = {
        "root_not_sharded": lambda: train("refused", HalfShardedModule(), **fsdp2(False)),
        "brevitas_consolidated": lambda: train("refused", ShardedModule(), scheme="brevitas", **fsdp2(False)),
        "tensor_parallel": lambda: train("refused", ShardedModule(), **fsdp2(False, tensor_parallel_size=2)),
        "structure": lambda: train("refused", ShardedModule(), "other_structure.ckpt", **fsdp2(False)),
    }
    if os.environ["LOCAL_RANK"] == "0":
        checkpoint = torch.load("fsdp/epoch=1.ckpt", weights_only=True)
        checkpoint["callbacks"]["TwoStageQAT"]["structures"]["layers.0.weight"] = '{"kind": "dense"}'
        torch.save(checkpoint, "other_structure.ckpt")
    messages |= {name: message_of(run) for name, run in refused.items()}
    leave(f"fsdp_messages-{trainer.global_rank}", messages)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fork(run: Callable[[], None], **environment: str) -> int:
    child = os.fork()
    if child == 0:
        # Threads do not survive a fork: an OpenMP pool inherited half would hang.
        torch.set_num_threads(1)
        os.environ.update(environment)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def fork_two_ranks(run: Callable[[], None]) -> list[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return [fork(run, LOCAL_RANK=str(rank), **address) for rank in range(2)]


def wait(children: list[int]) -> None:
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit("a rank failed")


def other_numbers_of_ranks() -> None:
    for epoch in (1, 3, 4):
        train(f"ddp_from_one_{epoch}", SmallModule(), f"one/epoch={epoch}.ckpt", **TWO_RANKS)
    unused = {"strategy": pl.strategies.DDPStrategy(find_unused_parameters=True)}
    train("ddp_unused", SmallModule(), **TWO_RANKS | unused)


def one_rank_from_two() -> None:
    for epoch in (1, 3, 4):
        train(f"one_from_ddp_{epoch}", SmallModule(), f"ddp/epoch={epoch}.ckpt")
    # Lightning's own launcher starts these ranks.
    fork_ranks = {"devices": 2, "strategy": "ddp_fork"}
    module, messages = SmallModule(), {}
    messages["not_prepared"] = message_of(lambda: quiet_trainer(callbacks=[callback()], **fork_ranks).fit(module))
    messages["is_prepared"] = str(any("parametrizations" in name for name, _ in module.named_parameters()))
    leave("fork_messages", messages)
    pb.prepare(module, TARGETS)
    quiet_trainer(max_epochs=EPOCHS, callbacks=[callback()], **fork_ranks).fit(module)
    leave("forked", module.state_dict())


def main() -> None:
    os.chdir(Path(sys.argv[1]))
    wait([fork(one_rank), *fork_two_ranks(ddp)])
    wait([fork(one_rank_from_two), *fork_two_ranks(other_numbers_of_ranks)])
    wait(fork_two_ranks(fsdp))


if __name__ == "__main__":
    main()
