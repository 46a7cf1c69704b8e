"""Sphinx' settings for `make docs`, which lays pages out in build/pages as they lie here: links hold."""

import metattn

project, author = "metattn", "the metattn authors"
version = release = metattn.__version__
html_title = f"metattn {version}"
html_theme = "furo"  # light and dark, narrow screens
html_show_sphinx = html_show_copyright = html_copy_source = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md", "docs/site"]  # index.md shows the former
suppress_warnings = ["toc.not_included"]  # results are pages that have no place in the menu
myst_heading_anchors = 4
nb_execution_mode = "force"  # notebooks are kept without outputs, and run for every build
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True
copybutton_selector = "div:not(.output) > div.highlight > pre"  # what a cell printed has no button
autodoc_typehints = "none"  # docstrings say shapes and dtypes
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
