"""README and documentation hold together: blocks of code are marked, links resolve, the table of contents is complete."""

import ast
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from docs_site.autodoc import Package
from docs_site.pages import Autodoc, code_blocks, heading_ids, links, markdown, read_toc, references, split_autodoc


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOC_PAGES = sorted(DOCS.rglob("*.md"))
PAGES = [README, CONTRIBUTING, *DOC_PAGES]
REPOSITORY_PATH = re.compile(r"(?:benchmarks|checkpoints|docs|examples|scripts|src|tests)/[\w./-]*")
LANGUAGES = {"python", "bash", "text", "json", "yaml"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors_of(page: Path) -> set[str]:
    return {anchor for _, _, anchor in heading_ids(markdown().parse(page.read_text()))}


def directives(page: Path) -> list[Autodoc]:
    return [part for part in split_autodoc(page.read_text()) if isinstance(part, Autodoc)]


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / "src")


def test_the_table_of_contents_names_each_page_once():
    listed = [entry.local for entry in read_toc(DOCS)]
    assert listed[0] == "index"
    assert sorted(listed) == [page.relative_to(DOCS).with_suffix("").as_posix() for page in DOC_PAGES]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_name_a_language_and_say_why_they_are_not_run(page):
    for block in code_blocks(page):
        assert block.language in LANGUAGES, f"{block}: name the language of the block, one of {sorted(LANGUAGES)}"
        if block.mark is not None:
            assert block.reason, f"{block}: say why it is {block.mark}"
            assert block.language in ("python", "bash"), f"{block}: nothing would run it anyway"
            assert block.language == "bash" or block.mark == "not run", f"{block}: Python is run, or not run"
    marks = re.findall(r"^\s*<!--\s*(?:parsed|not run)\b", page.read_text(), re.MULTILINE)
    marked = [block for block in code_blocks(page) if block.mark is not None]
    assert len(marks) == len(marked), f"{name_of(page)}: a mark stands right before its block, with a colon"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_valid_syntax(page):
    for block in code_blocks(page):
        if block.language == "python":
            ast.parse(block.code, filename=str(block))
        if block.language == "bash":
            result = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
            assert result.returncode == 0, f"{block}: {result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_resolve(page):
    for link in links(page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        if page in DOC_PAGES:
            assert DOCS in target.parents, f"{name_of(page)}: {link} leaves the documentation; name the path instead"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), f"{name_of(page)}: {link}: no such heading"


def test_the_layout_names_each_module_or_its_room():
    layout, package = (DOCS / "design.md").read_text(), ROOT / "src" / "diffusers_far"
    for path in package.rglob("*.py"):
        rooms = [folder.relative_to(package).as_posix() for folder in path.parents if package in folder.parents]
        if path.name != "__init__.py":
            assert path.name in layout or any(f"| `{room}/` |" in layout for room in rooms), (
                f"docs/design.md says nothing of {path.relative_to(package)}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_of_the_repository_exist(page):
    for token in markdown().parse(page.read_text()):
        for child in token.children or ():
            if child.type == "code_inline" and REPOSITORY_PATH.fullmatch(child.content):
                assert (ROOT / child.content).exists(), f"{name_of(page)}: there is no {child.content}"


def test_every_public_class_and_function_has_an_entry(package):
    documented = {directive.name for page in DOC_PAGES for directive in directives(page)}
    missing = set(package.public_names()) - documented
    assert not missing, f"give each an `[[autodoc]] Name` on a page of docs/api: {sorted(missing)}"


def test_entries_name_what_exists_and_have_a_docstring(package):
    for page in DOC_PAGES:
        for directive in directives(page):
            entry = package.entry(directive)
            assert all(each.text for each in entry.all()), f"{name_of(page)}: {directive.name} lacks a docstring"


def test_names_in_brackets_are_entries(package):
    entries = [package.entry(directive) for page in DOC_PAGES for directive in directives(page)]
    names = {name for entry in entries for each in entry.all() for name in (each.anchor, each.short_name)}
    for page in DOC_PAGES:
        for name, *_ in references(markdown().parse(page.read_text())):
            assert name in names, f"{name_of(page)}: [`{name}`] has no entry in the API"
