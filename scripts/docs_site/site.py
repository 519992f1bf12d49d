"""The site: pages and API entries as static HTML that loads nothing from elsewhere."""

import html
import json
import re
import shutil
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .autodoc import PACKAGE, Entry, Package
from .pages import Autodoc, TocEntry, heading_ids, markdown, read_toc, references, split_autodoc


ASSETS = Path(__file__).parent / "assets"
COPIED = ("images", "results")  # what pages show and link to


@dataclass(frozen=True)
class Heading:
    """A heading of a page, for the list of what is on it."""

    level: int
    title: str
    anchor: str


@dataclass
class Page:
    """A page that is being built.

    Args:
        toc (`TocEntry`): Its place in the table of contents.
        parts (`list[str | Entry]`): Its Markdown, and the API entries between.
        headings (`list[Heading]`): Filled in when it is rendered.
    """

    toc: TocEntry
    parts: list[str | Entry]
    headings: list[Heading] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"{self.toc.local}.html"

    @property
    def to_root(self) -> str:
        return "../" * self.toc.local.count("/")


class Site:
    """The documentation, read from Markdown and from the package's source.

    Args:
        docs (`Path`): The folder of the pages.
        source (`Path`): The folder that holds the package.
    """

    def __init__(self, docs: Path, source: Path):
        self.docs = docs
        self.toc = read_toc(docs)
        package = Package(source)
        self.pages = [
            Page(entry, [read_part(part, package) for part in split_autodoc((docs / f"{entry.local}.md").read_text())])
            for entry in self.toc
        ]
        self.places = dict(self._places())

    def _places(self):
        """Where each API entry is: by its name in the package and, for classes and functions, by its own name alone."""
        for page in self.pages:
            for part in page.parts:
                if isinstance(part, Entry):
                    for entry in part.all():
                        yield from ((name, (page, entry.anchor)) for name in (entry.anchor, entry.short_name))

    def write(self, folder: Path) -> None:
        """Build everything into `folder`, which is replaced."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(ASSETS), trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=True
        )
        template = environment.get_template("page.html.jinja")
        sections = [(title, list(pages)) for title, pages in groupby(self.pages, lambda page: page.toc.section)]
        search_index = []
        for number, page in enumerate(self.pages):
            content = "\n".join(self._render_part(page, part) for part in page.parts)
            search_index.extend(search_entries(page, content))
            path = folder / page.path
            path.parent.mkdir(parents=True, exist_ok=True)
            neighbours = {"previous": self.pages[number - 1] if number else None, "next": None}
            if number + 1 < len(self.pages):
                neighbours["next"] = self.pages[number + 1]
            path.write_text(template.render(page=page, sections=sections, content=content, **neighbours))
        for name in COPIED:
            shutil.copytree(self.docs / name, folder / name)
        (folder / "search_index.js").write_text(f"const SEARCH_INDEX = {json.dumps(search_index)};\n")
        (folder / "style.css").write_text((ASSETS / "style.css").read_text() + code_colours())
        shutil.copy(ASSETS / "search.js", folder)

    def _render_part(self, page: Page, part: str | Entry) -> str:
        return self._render_entry(page, part) if isinstance(part, Entry) else self._render(page, part)

    def _render_entry(self, page: Page, entry: Entry, owner: Entry | None = None) -> str:
        text = self._render(page, entry.text, owner or entry)
        members = "\n".join(self._render_entry(page, member, entry) for member in entry.members)
        anchor, title = html.escape(entry.anchor), html.escape(entry.short_name)
        return (
            f'<section class="api" id="{anchor}">\n'
            f'<p class="kind">{entry.kind} <a href="#{anchor}">{title}</a> <span>{entry.source}</span></p>\n'
            f"{highlight_code(entry.signature, 'python', '')}\n{text}\n{members}\n</section>"
        )

    def _render(self, page: Page, text: str, owner: Entry | None = None) -> str:
        """Markdown as HTML: anchors for headings, links to pages and to API entries. `owner` is the API entry whose
        docstring the text is: names of its members mean these."""
        renderer = markdown_with_colours()
        tokens = renderer.parse(text)
        if owner is None:
            for token, title, anchor in heading_ids(tokens):
                token.attrSet("id", anchor)
                page.headings.append(Heading(int(token.tag[1]), title, anchor))
        for name, *link in references(tokens):
            place = self.place_of(name, owner)
            for token in link:
                token.hidden = place is None
            if place is not None:
                link[0].attrSet("href", address(page, *place))
        for token in tokens:
            for child in token.children or ():
                if "href" in child.attrs:
                    child.attrSet("href", page_link(child.attrs["href"]))
        return renderer.renderer.render(tokens, renderer.options, {})

    def place_of(self, name: str, owner: Entry | None = None) -> tuple[Page, str] | None:
        """The page and anchor of an API entry; `None` where there is none."""
        name = name.removeprefix(f"{PACKAGE}.")
        own = None if owner is None else self.places.get(f"{owner.anchor}.{name}")
        return own or self.places.get(name)


def read_part(part: str | Autodoc, package: Package) -> str | Entry:
    return package.entry(part) if isinstance(part, Autodoc) else part


def address(page: Page, target: Page, anchor: str) -> str:
    """The link from one page to an anchor on another."""
    return f"#{anchor}" if target is page else f"{page.to_root}{target.path}#{anchor}"


def page_link(link: str) -> str:
    """A link to a page's Markdown, as one to its HTML; other links as they are."""
    return re.sub(r"^(?!\w+:)([^#]*)\.md(?=#|$)", r"\1.html", link)


def markdown_with_colours() -> MarkdownIt:
    renderer = markdown()
    renderer.options["highlight"] = highlight_code
    return renderer


def highlight_code(code: str, language: str, attributes: str) -> str:
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f'<pre class="highlight"><code>{highlight(code, lexer, HtmlFormatter(nowrap=True))}</code></pre>'


def code_colours() -> str:
    """Style of highlighted code, for light and for dark."""
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{HtmlFormatter(style='default').get_style_defs('.highlight')}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def search_entries(page: Page, content: str) -> list[dict[str, str]]:
    """What can be searched for: each page's text, its headings and its API entries."""
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", content)).split())
    entries = [{"title": page.toc.title, "link": page.path, "text": text}]
    for heading in page.headings[1:]:
        entries.append({"title": heading.title, "link": f"{page.path}#{heading.anchor}", "text": page.toc.title})
    for part in page.parts:
        for entry in part.all() if isinstance(part, Entry) else ():
            entries.append({"title": entry.short_name, "link": f"{page.path}#{entry.anchor}", "text": page.toc.title})
    return entries
