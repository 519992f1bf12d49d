"""How many files and lines of a folder run in a piece of work: what a reader must open to follow it.

Counted are whole functions that were called, in bare lines: without docstrings, comments and blank lines.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class CodeWalk:
    """What ran: bare lines by file."""

    lines: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        files = "\n".join(f"{count:5} {name}" for name, count in sorted(self.lines.items()))
        return f"{files}\n{sum(self.lines.values())} lines in {len(self.lines)} files"


@contextmanager
def walked(*folders: Path) -> Iterator[CodeWalk]:
    """Note which functions of the Python files below `folders` run in this thread."""
    walk, called, roots = CodeWalk(), defaultdict(set), tuple(f"{folder}/" for folder in folders)

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(roots) and code.co_name != "<module>":
            called[code.co_filename].add(code.co_firstlineno)

    sys.setprofile(note)
    try:
        yield walk
    finally:
        sys.setprofile(None)
    for name, starts in called.items():
        if count := lines_of_functions(Path(name).read_text(), starts):
            (root,) = [root for root in roots if name.startswith(root)]
            walk.lines[name.removeprefix(root)] = count


def lines_of_functions(source: str, starts: set[int]) -> int:
    """Bare lines of the functions whose first line, of a decorator or of `def`, is among `starts`."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines = set()
    for function in functions:
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        if first in starts or function.lineno in starts:
            lines.update(range(first, function.end_lineno + 1))
    return len(lines & bare_lines(source))


def bare_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines
