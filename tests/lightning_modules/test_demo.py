"""The demo, its training cut short: rows start where they say, and it ends in files."""

import re

import pytest
import torch
from rich.table import Table

import pibinn_plugin as pb
from lightning_modules import demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FOLDER", folder)
        patch.setattr(demo, "EPOCHS", 1)
        patch.setattr(demo, "TRAIN_EXAMPLES", 5 * demo.PAIRS)
        shown = []
        threads = torch.get_num_threads()
        demo.main(shown.append)
        torch.set_num_threads(threads)
    return folder, shown


def test_the_table_has_a_row_a_network_and_the_bytes_of_the_files(finished):
    folder, shown = finished
    [table] = [each for each in shown if isinstance(each, Table)]
    names, errors, weights, files = ([*column.cells] for column in table.columns)
    assert names == [row.name for row in demo.rows()]
    assert sorted(int(size.replace(",", "")) for size in files) == sorted(
        path.stat().st_size for path in folder.glob("*.safetensors")
    )
    weight_bytes = [int(size.replace(",", "")) for size in weights]
    assert 31 * weight_bytes[3] < weight_bytes[0] == weight_bytes[1] < 32 * weight_bytes[3]
    least_squares, one_bit_start, ternary, one_bit, oracle = map(float, errors)
    assert oracle < one_bit
    assert max(one_bit_start, ternary, one_bit) < least_squares - 3  # the start decides, whatever the weights
    assert (folder / "error_against_bytes.png").read_bytes().startswith(b"\x89PNG")


def test_the_one_bit_file_stands_for_itself(finished):
    folder, shown = finished
    [table] = [each for each in shown if isinstance(each, Table)]
    loaded = pb.load(folder / "one_bit__one_scale.safetensors")
    assert f"{demo.nmse_of(loaded):.2f}" == [*table.columns[1].cells][3]
    assert loaded.operator.weight.abs().unique().numel() == 1
    assert any(re.search(str(folder), str(line)) for line in shown)
