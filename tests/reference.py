"""The reference of all public names, from their docstrings: python -m tests.reference FOLDER.

A link that leads nowhere is an error, and so is a public name that is left out.
"""

import re
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import wan22

MODULES = [
    "wan22",
    "wan22.accel",
    "wan22.accel.parallel",
    "wan22.accel.quantize",
    "wan22.checkpoints",
    "wan22.presets",
    "wan22.prompts",
    "wan22.schedulers",
    "wan22.video.recipe",
]


# Calls are what pipelines are for; pdoc leaves out what has two underscores.
TEMPLATE = """{% extends "default/module.html.jinja2" %}
{% macro is_public(doc) %}
{% if doc.name == "__call__" %}true{% else %}{{ default_is_public(doc) }}{% endif %}
{% endmacro %}"""


def bases():
    """Return the modules of this package that the public classes inherit from: their members are there."""
    classes = [value for name in wan22.__all__ if isinstance(value := getattr(wan22, name), type)]
    found = {base.__module__ for one in classes for base in one.__mro__[1:]}
    return sorted(name for name in found if name.startswith("wan22."))


def build(folder):
    """Write a page for each module."""
    import pdoc

    for name in MODULES:
        module = import_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))  # pdoc sees what is loaded already
    with tempfile.TemporaryDirectory() as templates, warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found .* does not resolve", module="pdoc")
        Path(templates, "module.html.jinja2").write_text(TEMPLATE)
        footer = f"wan22 {wan22.__version__}"
        pdoc.render.configure(
            docformat="google", show_source=False, footer_text=footer, template_directory=Path(templates)
        )
        pdoc.pdoc(*MODULES, *bases(), output_directory=Path(folder))


class Page(HTMLParser):
    """The names and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def unlink_strangers(path):
    """Leave the text of links to members that a class has of other libraries: the pages do not show those."""
    page, text = Page(path), path.read_text(encoding="utf-8")
    for link in page.links:
        if link.startswith("#") and link[1:] not in page.names:
            text = re.sub(rf'<a href="{re.escape(link)}">(.*?)</a>', r"\1", text)
    path.write_text(text, encoding="utf-8")


def broken_links(folder):
    """Return "page: link" for each link of a folder's pages that leads to no file or no name in it."""
    pages = {path.resolve(): Page(path) for path in Path(folder).rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target.exists() and (not parts.fragment or unquote(parts.fragment) in pages[target].names)
            if not there:
                found.append(f"{path.name}: {link}")
    return sorted(found)


def main(folder):
    build(folder)
    for path in Path(folder).rglob("*.html"):
        unlink_strangers(path)
    missing = {*wan22.__all__, "WanT2VPipeline.__call__"} - Page(Path(folder) / "wan22.html").names
    if wrong := [*broken_links(folder), *(f"{name} is missing" for name in sorted(missing))]:
        sys.exit("\n".join(wrong))
    print(f"{Path(folder) / 'index.html'}: {len(MODULES)} modules and their bases")


if __name__ == "__main__":
    main(sys.argv[1])
