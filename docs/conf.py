"""Sphinx configuration: MyST pages, and an API reference from docstrings and annotations."""

import re
from typing import Any

from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PRNGKeyArray
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util.typing import stringify_annotation

project = "fclayers"
author = "The fclayers developers"
copyright = "The fclayers developers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "inventories"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# In docstrings, `name` is a link where there is such a name; a type in a signature must be one.
default_role = "py:obj"
nitpicky = True
nitpick_ignore = [("py:class", f"fclayers.{name}") for name in ("Geometry", "Params", "Row")]
nitpick_ignore_regex = [("py:obj", "[^`]*")]

autosummary_generate = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# The inventories are small text files, so that the site builds without a network: one line for
# each object that a signature or a docstring names, with the page that documents it.
intersphinx_mapping = {
    name: (address, f"inventories/{name}.txt")
    for name, address in {
        "jax": "https://docs.jax.dev/en/latest/",
        "jaxtyping": "https://docs.kidger.site/jaxtyping/",
        "numpy": "https://numpy.org/doc/stable/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

html_theme = "furo"
html_title = "fclayers"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
pygments_dark_style = "github-dark"

# Annotations are written with the names that users import, not with where things are defined.
_PUBLIC_NAMES = {
    stringify_annotation(annotation, "smart"): name
    for annotation, name in [
        (ArrayLike, "~jax.typing.ArrayLike"),
        (DTypeLike, "~jax.typing.DTypeLike"),
        (PRNGKeyArray, "~jaxtyping.PRNGKeyArray"),
        (lax.PrecisionLike, "~jax.lax.PrecisionLike"),
    ]
}
_PUBLIC_MODULES = [
    (r"~?(?:jax\.)?\bjaxlib\._jax\.Array\b", "~jax.Array"),
    (r"~?\bjax\._src\.(?:partition_spec|named_sharding|mesh)\.", "~jax.sharding."),
    (r"~?\bfclayers\.(train|interop)\.(?:\w+\.)*(?=[A-Z])", r"~fclayers.\1."),
    (r"~?\bfclayers\.(?!train|interop|models)(?:\w+\.)+(?=[A-Z])", "~fclayers."),
]


def _with_public_names(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, arguments: Any, result: Any
) -> tuple[Any, Any]:
    def shorten(text: str | None) -> str | None:
        if text:
            for written, public in _PUBLIC_NAMES.items():
                text = text.replace(written, public)
            for pattern, public in _PUBLIC_MODULES:
                text = re.sub(pattern, public, text)
        return text

    return shorten(arguments), shorten(result)


def _with_returns_as_text(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Keeps napoleon from taking what is before a colon for a type; annotations say the types."""
    for i, line in enumerate(lines[:-1]):
        if line == "Returns:":
            lines[i + 1] = re.sub(r"^(\s+)", r"\1: ", lines[i + 1])


def _from_any_namespace(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Links flat names from the namespaces' docstrings, and names that begin with `fc.`."""
    if (node.get("refdomain"), node.get("reftype")) != ("py", "obj"):
        return None
    name = "fclayers." + node["reftarget"].removeprefix("fc.")
    page = node["refdoc"]
    return env.domains["py"].resolve_xref(env, page, app.builder, "obj", name, node, content)


def setup(app: Sphinx) -> None:
    """Connects the functions above, and calls the fields of a `NamedTuple` attributes."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("missing-reference", _from_any_namespace)
    app.connect("autodoc-process-signature", _with_public_names)
    app.connect("autodoc-process-docstring", _with_returns_as_text, priority=400)
