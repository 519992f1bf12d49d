"""What stands on a page is found: marks, directives, anchors, links."""

import pytest
from docs_site.pages import Autodoc, code_blocks, heading_ids, links, markdown, references, split_autodoc


@pytest.fixture
def blocks_of(tmp_path):
    def read(text):
        page = tmp_path / "page.md"
        page.write_text(text)
        return code_blocks(page)

    return read


def test_a_mark_belongs_to_the_block_right_after_it(blocks_of):
    first, second = blocks_of("<!-- not run: it\nneeds a GPU -->\n```python\na\n```\n\nText.\n\n```python\nb\n```\n")
    assert (first.mark, first.reason, first.code, first.line) == ("not run", "it needs a GPU", "a\n", 4)
    assert (second.mark, second.reason, second.line) == (None, "", 10)


def test_a_mark_with_text_between_marks_nothing(blocks_of):
    (block,) = blocks_of("<!-- parsed: long -->\n\nText.\n\n```bash\nmake\n```\n")
    assert block.mark is None


def test_blocks_in_lists_are_found_without_their_indentation(blocks_of):
    (block,) = blocks_of("- An item:\n\n  <!-- not run: short -->\n  ```python\n  if a:\n      b\n  ```\n")
    assert (block.code, block.mark, block.line) == ("if a:\n    b\n", "not run", 5)


def test_directives_stand_between_stretches_of_text():
    parts = list(split_autodoc("# Title\n\n[[autodoc]] One\n  - all\n  - __call__\n\nText.\n\n[[autodoc]] room.two"))
    assert parts == ["# Title\n", Autodoc("One", ("all", "__call__")), "\nText.\n", Autodoc("room.two"), ""]


def test_a_directive_in_a_block_of_code_is_code():
    assert list(split_autodoc("```text\n[[autodoc]] One\n```")) == ["```text\n[[autodoc]] One\n```"]


def test_anchors_are_those_of_github():
    tokens = markdown().parse("# The `FARKVCache`, in short\n\n## Twice\n\n## Twice\n")
    assert [anchor for _, _, anchor in heading_ids(tokens)] == ["the-farkvcache-in-short", "twice", "twice-1"]


def test_names_in_brackets_are_references_unless_they_are_links_or_code():
    tokens = markdown().parse("[`One`], [`~room.Two`] and [`Three`](three.md), `[`Four`]`.\n\n    [`Five`]\n")
    assert [name for name, *_ in references(tokens)] == ["One", "room.Two"]


def test_links_are_found_in_markdown_and_in_html():
    text = '[a](a.md#x) ![b](b.png)\n\n<img src="c.gif">\n\n| <a href="d.md">d</a> |\n|---|\n'
    assert links(text) == ["a.md#x", "b.png", "c.gif", "d.md"]
