"""Runs every Python block of the README and the docs, and every example in a docstring."""

import doctest
import os

import hypothesis
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.myst import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

# The tests compile thousands of small programs and run each a few times: most of their time is
# LLVM's. CI runs them with all its optimizations as well. Without any, some gradients come out NaN.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import fclayers  # noqa: F401 (before Sybil imports its parts one by one)

hypothesis.settings.register_profile("quick", max_examples=3, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=10, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

_pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"])
_docstrings = Sybil(
    parsers=[DocTestParser(optionflags=doctest.NORMALIZE_WHITESPACE)],
    patterns=["fclayers/**/*.py", "fclayers/*.py"],
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = (_pages + _docstrings).pytest()
