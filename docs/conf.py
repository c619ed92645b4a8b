"""Sphinx settings of the site; docs/build.py copies this file into the folder where it assembles the pages."""

from fastgpt import __version__

project = "fastgpt"
author = "the fastgpt authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"fastgpt {__version__}"
html_show_sphinx = html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
show_warning_types = True
default_role = "code"  # single backticks in docstrings

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# The site has no page for type variables and for names of other packages, which the build does not look up online.
nitpick_ignore_regex = [("py:.*", r"(?!fastgpt\.).*"), ("py:.*", r"fastgpt\..*\.[A-Z]")]
