"""The site: every public name is in the reference exactly once, and in its overview."""

import re
from collections import Counter
from pathlib import Path

import fclayers as fc
import fclayers.models.vgg

DOCS = Path(__file__).parents[1] / "docs"


def public_names() -> set[str]:
    """The names that users import, without modules and constants."""
    spaces = (fc, fc.train, fc.interop, fc.models.vgg)
    return {
        f"{space.__name__}.{name}"
        for space in spaces
        for name in space.__all__
        if callable(getattr(space, name))
    }


def test_every_public_name_is_on_exactly_one_page():
    directive = re.compile(r"^\.\. auto(?:function|class):: (\S+)", re.MULTILINE)
    pages = (DOCS / "reference").glob("*.md")
    documented = Counter(name for page in pages for name in directive.findall(page.read_text()))
    assert documented == Counter(public_names())


def test_the_overview_lists_every_public_name():
    listed = re.findall(r"^   ~(\S+)", (DOCS / "reference/index.md").read_text(), re.MULTILINE)
    assert Counter(listed) == Counter(public_names())


def test_every_page_is_in_the_sidebar():
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    toctree = re.compile(r"^```\{toctree\}\n(?:^:.*\n)*\n((?:^[\w/]+\n)+)", re.MULTILINE)
    listed = [
        page.relative_to(DOCS).parent / entry
        for page in (DOCS / "index.md", DOCS / "reference/index.md")
        for entries in toctree.findall(page.read_text())
        for entry in entries.split()
    ]
    assert Counter(listed) == Counter(pages - {Path("index")})
