"""Sphinx: it reads the docstrings' roles as they stand; furo reads well on a telephone, in light and dark."""

import oftsurgery

project = "oftsurgery"
author = "the oftsurgery developers"
copyright = author  # noqa: A001 - Sphinx reads this name
version = release = oftsurgery.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_use_ivar = True
nitpicky = False
