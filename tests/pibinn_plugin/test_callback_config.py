"""TwoStageQAT from YAML: every argument has a place there, and a printed configuration is the same again."""

import contextlib
import io
import sys

import pytest
import torch
import yaml
from fit_two_stage import C
from pytorch_lightning.cli import LightningCLI
from two_stage import SmallModule

import pibinn_plugin as pb

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("(?s).*JSONARGPARSE_DEPRECATION_WARNINGS", "(?s).*was deprecated in v4.49.0")
]

CONFIG = """
trainer:
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
  callbacks:
    - class_path: pibinn_plugin.TwoStageQAT
      init_args:
        targets:
          layers.0.weight: {class_path: pibinn_plugin.BlockDiagonal, init_args: {rows: [2, 6], columns: [4, 4]}}
          layers.2.weight: null
          layers.4.weight:
            class_path: pibinn_plugin.Mask
            init_args: {pattern: [[1,1,0,0,0,0,0,0], [0,1,1,0,0,0,0,0], [0,0,1,1,0,0,0,0], [0,0,0,1,1,0,0,1]]}
        scheme: torchao
        sign_stage_start: 1
        scale_stage_start: 0.5
"""


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


def callback_from(config, directory):
    path = directory / "config.yaml"
    path.write_text(config)
    cli = LightningCLI(SmallModule, args=["--config", str(path)], run=False, save_config_callback=None)
    return cli, next(each for each in cli.trainer.callbacks if isinstance(each, pb.TwoStageQAT))


def test_a_config_names_every_argument_and_survives_printing(tmp_path):
    printed = io.StringIO()
    (tmp_path / "config.yaml").write_text(CONFIG)
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        LightningCLI(SmallModule, args=["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    once_printed = {key: yaml.safe_load(printed.getvalue())[key] for key in ("trainer", "seed_everything")}
    for config in (CONFIG, yaml.safe_dump(once_printed)):
        cli, callback = callback_from(config, tmp_path)
        assert callback.targets == {
            "layers.0.weight": pb.BlockDiagonal(rows=(2, 6), columns=(4, 4)),
            "layers.2.weight": None,
            "layers.4.weight": pb.Mask(torch.eye(4, 8) + torch.eye(4, 8).roll(1, 1) + corner()),
        }
        starts = (callback.schedule.sign_stage_start, callback.schedule.scale_stage_start)
        assert (callback.scheme, *starts) == ("torchao", 1, 0.5)
        assert [type(start) for start in starts] == [int, float]
    cli.trainer.fit(cli.model)
    assert callback.stage == C


def corner():
    pattern = torch.zeros(4, 8)
    pattern[3, 7] = 1
    return pattern


def test_a_config_with_a_bad_structure_is_refused(tmp_path):
    bad = CONFIG.replace("pibinn_plugin.Mask", "pibinn_plugin.NoSuchThing")
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit):
        callback_from(bad, tmp_path)
    assert "NoSuchThing" in errors.getvalue()
