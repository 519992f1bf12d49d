"""The documentation is built into a site that holds together and loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_site.pages import LinkFinder, read_toc


pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_docs.py"
IS_FOREIGN = re.compile(r"(?:\w+:)?//")

# Runs the script where torch cannot be imported and no connection opened: the site is built from source alone.
RUN = """
import runpy, socket, sys
sys.modules["torch"] = socket.socket = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def build(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, str(SCRIPT), "--output_dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    result = build(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, LinkFinder]:
    """What each page links to and loads."""
    found = {}
    for page in site.rglob("*.html"):
        found[page] = LinkFinder()
        found[page].feed(page.read_text())
    return found


def test_there_is_a_page_for_each_entry_of_the_table_of_contents(site, pages):
    assert sorted(pages) == sorted(site / f"{entry.local}.html" for entry in read_toc(ROOT / "docs"))


def test_no_link_is_broken(pages):
    for page, found in pages.items():
        for target in found.targets:
            if re.match(r"\w+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in pages[file].anchors, f"{page.name}: {target}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for page, found in pages.items():
        assert not [target for target in found.loaded if IS_FOREIGN.match(target)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(", style.read_text()), style.name
    for script in site.glob("search.js"):
        assert "//" not in re.sub(r"^\s*//.*$", "", script.read_text(), flags=re.MULTILINE), script.name


def test_names_in_docstrings_and_pages_are_links(site):
    concepts = (site / "concepts.html").read_text()
    assert '<a href="api/models.html#FARKVCache"><code>FARKVCache</code></a>' in concepts
    pipelines = (site / "api" / "pipelines.html").read_text()
    assert '<a href="../api/models.html#FARTransformer3DModel"><code>FARTransformer3DModel</code></a>' in pipelines
    assert '<a href="#FARSession.load"><code>load</code></a>' in pipelines  # in the docstring of `FARSession.save`
    assert "[[autodoc]]" not in pipelines and "[<code>" not in pipelines


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = build(tmp_path)
    assert result.returncode == 2 and "something else" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
