"""How the site is built: ``nox -s docs``, with a network or without."""

import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import tomllib
import urllib.request
from pathlib import Path

import optloss

ROOT = Path(__file__).parents[1]
settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "optloss"
author = "The optloss authors"
release = version = optloss.__version__
jax, optax = (importlib.metadata.version(name) for name in ("jax", "optax"))
copyright = (  # noqa: A001 - so Sphinx calls it
    f"2026, {author}. {settings['license']}. "
    f"optloss {release}, built with jax {jax} and optax {optax}"
)

# The owner of the repository is not known before it is published: see CONTRIBUTING.md.
repository = settings["urls"]["Repository"]
published = "/OWNER/" not in repository

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode" if published else "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tables"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(collections|flax|jax|jnp|np|numpy|optax|os|re|types|typing)\..*"),
    ("py:class", r"optloss\.\w+\.(AverageState|Levels|LossScale|T)"),
    (
        "py:class",
        r"ArrayLike|AverageState|Filter|LossScale|Mapping|ModelLoss|Rates|Collection|"
        r"Iterable|Sequence|nnx\..*",
    ),
]


def inventory(name, url):
    """Return a local copy of the names that ``url`` documents, or None offline."""
    path = Path(__file__).parent / "_build" / "inventories" / f"{name}.inv"
    if not path.exists() and os.environ.get("OPTLOSS_DOCS_OFFLINE") != "1":
        try:
            with urllib.request.urlopen(f"{url}/objects.inv", timeout=3) as answer:
                content = answer.read()
        except OSError:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path) if path.exists() else None


# Without a network the names of other libraries stay plain text.
LIBRARIES = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "jax": "https://docs.jax.dev/en/latest",
    "optax": "https://optax.readthedocs.io/en/latest",
    "flax": "https://flax.readthedocs.io/en/latest",
}
intersphinx_mapping = {
    name: (url, path)
    for name, url in LIBRARIES.items()
    if (path := inventory(name, url))
}
if intersphinx_mapping:
    extensions.append("sphinx.ext.intersphinx")


def linkcode_resolve(domain, info):
    """Return where the source of a documented object is, in the repository."""
    if domain != "py" or not info["module"]:
        return None
    found = sys.modules[info["module"]]
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    try:
        path = Path(inspect.getsourcefile(found)).relative_to(
            Path(optloss.__file__).parents[2]
        )
        lines, first = inspect.getsourcelines(found)
    except (TypeError, ValueError, OSError):
        return None
    return f"{repository}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


myst_enable_extensions = [
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: f"optloss.typing.{name}"
    for name in vars(optloss.typing)
    if name[0].isupper() and name not in ("Any", "Callable", "Literal", "Protocol")
}
python_maximum_signature_line_length = 80


def name_types(app, what, name, obj, options, signature, return_annotation):
    """Return a signature in which types have their names of ``optloss.typing``."""
    of_sphinx = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    return tuple(
        text and of_sphinx.sub(r"\1", text).replace("optloss.typing.", "")
        for text in (signature, return_annotation)
    )


def setup(app):
    """Name the types before Sphinx links them."""
    app.connect("autodoc-process-signature", name_types)


autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!multi_host)[^/]*$",  # it needs several processes
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 3600,
    "show_memory": False,
    "remove_config_comments": True,
    "show_signature": False,
    "write_computation_times": False,
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.highlight-text) > div.highlight pre"

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
html_theme_options = {
    "navigation_with_keys": True,
}
if published:
    html_theme_options |= {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }
