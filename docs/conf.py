"""How the site is built: ``nox -s docs``, without a network."""

import importlib.util
import tomllib
from pathlib import Path

project = "optloss"
author = "The optloss authors"
pyproject = Path(__file__).parents[1] / "pyproject.toml"
release = version = tomllib.loads(pyproject.read_text())["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tables"]
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(jax|jnp|np|numpy|optax|flax)\..*")]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/plot_",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "default_thumb_file": str(Path(__file__).parent / "_static" / "demo.png"),
    "download_all_examples": False,
    "min_reported_time": 3600,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# MathJax in one file that draws its own glyphs: nothing is fetched when a page is read.
mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert mathjax is not None
assert mathjax.origin is not None
mathjax_path = "tex-svg.js"

pygments_style = "friendly"
pygments_dark_style = "monokai"

html_theme = "furo"
html_title = f"optloss {release}"
html_static_path = [
    "_static",
    str(Path(mathjax.origin).parent / "static" / "mathjax" / mathjax_path),
]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
