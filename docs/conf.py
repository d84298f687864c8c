"""Sphinx configuration: MyST pages, an API reference from the docstrings."""

project = "fclayers"
author = "The fclayers developers"
copyright = "The fclayers developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "literal"
nitpicky = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_preserve_defaults = True
myst_enable_extensions = ["dollarmath"]

html_theme = "sphinx_book_theme"
html_title = "fclayers"
html_theme_options = {"show_toc_level": 2}
