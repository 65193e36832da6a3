"""Flash and RAM of exported C on a Cortex-M4: ``python benchmarks/embedded.py``, with gcc-arm-none-eabi installed.

Networks of the committed configurations with random signs.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "scripts"))

from config_networks import INPUTS, config_network

import pibinn_plugin as pb
from pibinn_plugin.export import c as c_format
from pibinn_plugin.export.c_compiler import CORTEX_M4, memory_sizes

NAMES = {
    "eeg_eog": "EEG: HiddenLISTA, 512 samples (`eeg_eog.yaml`)",
    "calibration": "calibration: CalibratedAMP, 8 blocks (`calibration.yaml`)",
    "sparse_recovery": "coupled ISTA, 12 layers of 8 blocks (`sparse_recovery.yaml`)",
}


def main() -> None:
    torch.set_num_threads(1)
    for name in INPUTS:
        model, x = config_network(name)
        with tempfile.TemporaryDirectory() as folder:
            path = pb.export(model, Path(folder) / "network.c", (x,), "c")
            sizes = memory_sizes(path, CORTEX_M4)
            with torch.no_grad():
                expected = model(x)
            difference = (c_format.runner(path)((x,))[0] - expected).abs().max() / expected.abs().max()
        signs = pb.summary(model).payload_bytes
        print(f"| {NAMES[name]} | {signs:,} | {sizes.flash:,} | {sizes.ram:,} | {difference:.1e} |")


if __name__ == "__main__":
    main()
