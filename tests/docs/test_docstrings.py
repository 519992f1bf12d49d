"""Docstrings in the style of Hugging Face's libraries become Markdown that shows their structure."""

from docs_site.docstrings import docstring_to_markdown


def test_arguments_become_a_list_with_bold_names():
    markdown = docstring_to_markdown(
        "Do it.\n\nArgs:\n    height (`int`, defaults to 4), width (`int`): Size in\n        pixels: both.\n    scheduler: Any.\n"
    )
    assert markdown.split("\n\n", 1)[1].strip() == (
        "**Arguments**\n\n"
        "- **height** (`int`, defaults to 4), **width** (`int`): Size in pixels: both.\n"
        "- **scheduler**: Any."
    )


def test_colons_and_commas_in_brackets_do_not_end_a_name():
    markdown = docstring_to_markdown(
        'Args:\n    a (`slice`, such as `1:2`): `x: y`.\n    b (`Callable[[int], str]`)\n    c, d (`dict`): `{"k": 1}`.\n'
    )
    assert "- **a** (`slice`, such as `1:2`): `x: y`.\n" in markdown
    assert "- **b** (`Callable[[int], str]`)\n" in markdown
    assert '- **c**, **d** (`dict`): `{"k": 1}`.' in markdown


def test_text_after_a_section_is_not_part_of_it():
    markdown = docstring_to_markdown("Args:\n    a: One.\n\n    b: Two.\n\nSource: FAR.\n")
    assert markdown.split() == "**Arguments** - **a**: One. - **b**: Two. **Source**: FAR.".split()


def test_errors_are_listed_and_results_are_text():
    markdown = docstring_to_markdown("Returns:\n    `int`, at\n    least 1.\n\nRaises:\n    ValueError: It is 0.\n")
    assert markdown == "**Returns**\n\n`int`, at\nleast 1.\n\n\n**Raises**\n\n- **ValueError**: It is 0."


def test_examples_are_code_without_prompts_and_empty_ones_vanish():
    markdown = docstring_to_markdown("Examples:\n    >>> x = 1\n    ... + 2\n")
    assert markdown == "**Examples**\n\n```python\nx = 1\n+ 2\n```"
    assert docstring_to_markdown("Do it.\n\nExamples:\n\nReturns:\n    One.") == "Do it.\n\n\n**Returns**\n\nOne."
