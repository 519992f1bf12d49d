"""Docstrings in the style of Hugging Face's libraries, as Markdown.

Args:
    height (`int`), width (`int`): Text that may
        go on.
"""

import re
import textwrap


# A section runs as far as its lines are indented.
SECTION = re.compile(
    r"^(Args|Attributes|Returns|Yields|Raises|Examples?):[ \t]*\n((?:[ \t]+\S.*\n|[ \t]*\n)*)", re.MULTILINE
)
SOURCE = re.compile(r"^Source:", re.MULTILINE)
TITLES = {"Args": "Arguments", "Example": "Examples"}
NAME = re.compile(r"[\w*]+")


def docstring_to_markdown(docstring: str) -> str:
    """A docstring with its sections as titles and lists; all else is Markdown already."""
    text = SECTION.sub(_section, docstring.rstrip() + "\n")
    return SOURCE.sub("**Source**:", text).strip()


def _section(match: re.Match) -> str:
    name, body = match[1], textwrap.dedent(match[2]).strip()
    if not body:  # `Examples:` that diffusers fills in
        return ""
    if name in ("Args", "Attributes", "Raises"):
        body = "\n".join(_list_item(entry) for entry in _entries(body))
    elif body.startswith(">>>"):
        body = f"```python\n{_plain_code(body)}\n```"
    return f"\n**{TITLES.get(name, name)}**\n\n{body}\n\n"


def _entries(body: str) -> list[str]:
    """Each begins at the left edge; its further lines are indented."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?=\S)", body)]


def _list_item(entry: str) -> str:
    """`a (`int`), b (`int`): Text.` as an item of a list, its names in bold."""
    head, text = _split_head(entry)
    position, named = 0, []
    while match := NAME.match(head, position):
        end = _end_of_brackets(head, match.end())
        named.append(f"**{match[0]}**{head[match.end() : end]}")
        position = end + len(", ")
    return f"- {', '.join(named)}" + (f": {text}" if text else "")


def _split_head(entry: str) -> tuple[str, str]:
    """What stands before the first colon outside of brackets, and after it."""
    depth = 0
    for position, character in enumerate(entry):
        depth += (character in "([") - (character in ")]")
        if character == ":" and not depth:
            return entry[:position], entry[position + 1 :].strip()
    return entry.removesuffix("."), ""


def _end_of_brackets(head: str, start: int) -> int:
    """Where the bracket ends that opens after a space at `start`; `start` where none does."""
    if not head.startswith(" (", start):
        return start
    depth = 0
    for position in range(start + 1, len(head)):
        depth += (head[position] == "(") - (head[position] == ")")
        if not depth:
            return position + 1
    return len(head)


def _plain_code(example: str) -> str:
    """Code without the prompts of an interpreter."""
    return re.sub(r"^(>>>|\.\.\.) ?", "", example, flags=re.MULTILINE)
