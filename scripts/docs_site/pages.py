"""The pages of the documentation: their order, their code blocks, their links.

Pages are Markdown in the layout of Hugging Face's doc-builder: `_toctree.yml` names them, `[[autodoc]] Name` stands for an entry
of the API, and [`Name`] refers to one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token


MARK = re.compile(r"<!--\s*(parsed|not run):(.*?)-->\s*", re.DOTALL)
AUTODOC = re.compile(r"^\[\[autodoc\]\]\s+(\S+)\s*$")
REFERENCE = re.compile(r"\[`([^`]+)`\](?![(\[])")
MEMBER = re.compile(r"^\s+-\s+(\S+)\s*$")


@dataclass(frozen=True)
class TocEntry:
    """A page in the table of contents. `local` is its path in the docs folder, without `.md`."""

    local: str
    title: str
    section: str


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of code.

    Args:
        page (`Path`): Where it stands.
        line (`int`): Its first line of code, from 1.
        language (`str`): What the fence says; empty where it says nothing.
        code (`str`): With the newline at its end.
        mark (`str`, *optional*): `"parsed"` or `"not run"`, from an HTML comment right before the block; `None`: it is run.
        reason (`str`): Why it is not run, from the same comment.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Autodoc:
    """A directive `[[autodoc]] Name`, with the members that are listed under it; `None` where none are."""

    name: str
    members: tuple[str, ...] | None = None


def markdown() -> MarkdownIt:
    """The dialect of the pages: what GitHub shows, and [`Name`], a link that has no target yet."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    parser.inline.ruler.before("link", "reference", _read_reference)
    return parser


def _read_reference(state: StateInline, silent: bool) -> bool:
    match = REFERENCE.match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        state.push("link_open", "a", 1).meta["reference"] = match[1].removeprefix("~")
        # With a tilde in front only the last part of the name is shown.
        state.push("code_inline", "code", 0).content = re.sub(r"^~(.*\.)?", "", match[1])
        state.push("link_close", "a", -1)
    state.pos = match.end()
    return True


def read_toc(docs: Path) -> list[TocEntry]:
    """All pages in the order of the table of contents."""
    sections = yaml.safe_load((docs / "_toctree.yml").read_text())
    return [
        TocEntry(page["local"], page["title"], section["title"])
        for section in sections
        for page in section["sections"]
    ]


def code_blocks(page: Path) -> list[CodeBlock]:
    """The fenced blocks of a page, each with its mark."""
    blocks, before = [], None
    for token in markdown().parse(page.read_text()):
        if token.type == "fence":
            comment = MARK.fullmatch(before.content) if before is not None and before.type == "html_block" else None
            mark, reason = comment.groups() if comment else (None, "")
            language = token.info.split(" ")[0]
            blocks.append(CodeBlock(page, token.map[0] + 2, language, token.content, mark, " ".join(reason.split())))
        before = token
    return blocks


def split_autodoc(text: str) -> Iterator[str | Autodoc]:
    """A page's Markdown as stretches of text and directives."""
    lines = text.splitlines()
    start = number = 0
    is_code = False
    while number < len(lines):
        is_code ^= lines[number].startswith("```")
        directive = AUTODOC.match(lines[number])
        if is_code or directive is None:
            number += 1
            continue
        yield "\n".join(lines[start:number])
        number += 1
        members = []
        while number < len(lines) and (member := MEMBER.match(lines[number])):
            members.append(member[1])
            number += 1
        yield Autodoc(directive[1], tuple(members) or None)
        start = number
    yield "\n".join(lines[start:])


def heading_ids(tokens: list[Token]) -> Iterator[tuple[Token, str, str]]:
    """The headings of a page with their text and the anchors that GitHub gives them."""
    taken: dict[str, int] = {}
    for heading, inline in zip(tokens, tokens[1:]):
        if heading.type == "heading_open":
            title = "".join(child.content for child in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            count = taken[anchor] = taken.get(anchor, -1) + 1
            yield heading, title, f"{anchor}-{count}" if count else anchor


def references(tokens: list[Token]) -> Iterator[tuple[str, Token, Token]]:
    """What each [`Name`] names, and the tokens where its link opens and closes."""
    for token in tokens:
        children = token.children or []
        for number, child in enumerate(children):
            if "reference" in child.meta:
                yield child.meta["reference"], child, children[number + 2]


def links(text: str) -> list[str]:
    """Targets of all links and images, in Markdown and in HTML."""
    finder = LinkFinder()
    for token in markdown().parse(text):
        for part in (token, *(token.children or ())):
            if part.type in ("html_block", "html_inline"):
                finder.feed(part.content)
            finder.targets.extend(str(part.attrs[name]) for name in ("href", "src") if name in part.attrs)
    return finder.targets


class LinkFinder(HTMLParser):
    """Collects what HTML links to (`targets`), what it loads (`loaded`) and the anchors that it has (`anchors`)."""

    def __init__(self):
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        for name in ("href", "src"):
            if name in values:
                is_link = tag == "a"
                self.targets.append(values[name])
                if not is_link:
                    self.loaded.append(values[name])
