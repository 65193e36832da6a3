"""The analysis package as a whole: its names, its imports, its page."""

import re
import subprocess
import sys
from pathlib import Path

from lightning_modules import analysis

PAGE = Path(__file__).parents[3] / "docs" / "analysis.md"


def test_the_page_names_every_function_in_its_module():
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line.endswith("` |")]
    named = set()
    for line in table:
        functions, modules = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[2:4])
        places = {f"lightning_modules.analysis.{module}" for module in modules}
        for name in functions:
            assert getattr(analysis, name).__module__ in places
            named.add(name)
    assert named == set(analysis.__all__) - {"Unrolled"}


def test_importing_the_plugin_leaves_it_out_and_importing_it_brings_no_plots():
    code = (
        "import sys, {}; print(*(name in sys.modules for name in ('lightning_modules.analysis', 'matplotlib', 'rich')))"
    )
    for module, expected in (
        ("pibinn_plugin", "False False False"),
        ("lightning_modules.analysis", "True False False"),
    ):
        result = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == expected
