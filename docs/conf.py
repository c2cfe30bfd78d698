"""Sphinx builds the pages of this folder into a static site: ``make docs``, no network needed."""

from __future__ import annotations

project = "pvec"
html_title = "pvec"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
myst_heading_anchors = 4  # headings can be linked to as on GitHub; a link to none is a warning
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
autosummary_generate = True  # a page for each public name, into docs/api
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
