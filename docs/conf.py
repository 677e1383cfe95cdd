"""Settings of the site."""

project = "Separata"
author = "The Separata developers"
copyright = "2026, The Separata developers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# A README links to files of its own folder; those links are for readers of the repository.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
doctest_test_doctest_blocks = "default"

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Separata"
