"""Sphinx configuration: ``make docs`` builds the pages in ``docs/_build/html``, without warnings."""

import os
import warnings
from importlib import metadata

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")  # of the packages that the gallery runs; Sphinx has its own

project = "pibinn_plugin"
author = "the pibinn_plugin developers"
release = metadata.version("pibinn-plugin")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "pibinn_plugin"
exclude_patterns = ["_build", "gallery/README.txt"]
default_role = "code"  # single backticks in docstrings are names
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
add_module_names = False
suppress_warnings = ["config.cache"]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "_gallery",
    "remove_config_comments": True,
    "show_memory": False,
    "download_all_examples": False,
}
