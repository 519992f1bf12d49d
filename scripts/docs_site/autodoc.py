"""Entries of the API, from the package's source: nothing is imported."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import griffe

from .docstrings import docstring_to_markdown
from .pages import Autodoc


PACKAGE = "diffusers_far"
LINE_LENGTH = 88


@dataclass(frozen=True)
class Entry:
    """A class, function, method or property, with what is said about it.

    Args:
        anchor (`str`): Its name in the package, such as `FARSession.step`.
        kind (`str`): `"class"`, `"function"`, `"method"`, `"classmethod"`, `"staticmethod"` or `"property"`.
        signature (`str`): As code.
        text (`str`): Its docstring, as Markdown.
        source (`str`): File, from the package's folder.
        members (`tuple[Entry, ...]`): Of a class.
    """

    anchor: str
    kind: str
    signature: str
    text: str
    source: str
    members: tuple["Entry", ...] = ()

    @property
    def short_name(self) -> str:
        """Of a class or function its own name alone, of a member that with its class in front."""
        return re.sub(r"^([a-z]\w*\.)+(?=\w)", "", self.anchor)

    def all(self) -> Iterator["Entry"]:
        yield self
        for member in self.members:
            yield from member.all()


class Package:
    """The package as its source states it."""

    def __init__(self, source: Path):
        self.root = griffe.load(PACKAGE, search_paths=[source], allow_inspection=False, resolve_aliases=True)

    def public_names(self) -> list[str]:
        """Classes and functions that `import diffusers_far` brings."""
        is_object = ("class", "function")
        return [
            name for name, member in self.root.members.items() if member.is_alias and member.kind.value in is_object
        ]

    def entry(self, directive: Autodoc) -> Entry:
        """What a directive stands for. Without a list of members a class shows its public ones that have a docstring;
        `all` in the list stands for these.

        Raises:
            KeyError: There is no such name.
        """
        try:
            found = resolve(self.root[directive.name])
        except KeyError:
            raise KeyError(f"`[[autodoc]] {directive.name}`: {PACKAGE} has no {directive.name}.") from None
        return self._entry(found, directive.name, directive.members)

    def _entry(self, found: griffe.Object, anchor: str, listed: tuple[str, ...] | None) -> Entry:
        members = ()
        if found.is_class:
            names = list(dict.fromkeys(self._member_names(found, listed or ("all",))))
            members = tuple(self._member(found, anchor, name) for name in names)
        return Entry(
            anchor=anchor,
            kind=kind_of(found),
            signature=signature_of(found),
            text=docstring_to_markdown(found.docstring.value) if found.docstring else "",
            source=found.relative_package_filepath.as_posix(),
            members=members,
        )

    def _member_names(self, owner: griffe.Class, listed: tuple[str, ...]) -> Iterator[str]:
        for name in listed:
            if name == "all":
                members = {**owner.members, **owner.inherited_members}
                yield from (name for name, member in members.items() if is_documented(name, member))
            elif name != "none":
                yield name

    def _member(self, owner: griffe.Class, anchor: str, name: str) -> Entry:
        if name not in owner.all_members:
            raise KeyError(f"`[[autodoc]] {anchor}` lists {name}, which {anchor} does not have.")
        return self._entry(resolve(owner.all_members[name]), f"{anchor}.{name}", ("none",))


def resolve(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if found.is_alias else found


def is_documented(name: str, member: griffe.Object | griffe.Alias) -> bool:
    if name.startswith("_"):
        return False
    member = resolve(member)
    return member.has_docstring and (member.is_function or "property" in member.labels)


def kind_of(found: griffe.Object) -> str:
    for label in ("property", "classmethod", "staticmethod"):
        if label in found.labels:
            return label
    if found.is_class:
        return "class"
    return "method" if found.parent is not None and found.parent.is_class else "function"


def signature_of(found: griffe.Object) -> str:
    """`name(parameters) -> result`, a parameter a line where they do not fit on one."""
    if "property" in found.labels:
        return f"{found.name}: {found.annotation}" if found.annotation else found.name
    parameters = [text for text in _parameters(found) if text not in ("self", "cls")]
    returns = "" if found.is_class or found.returns is None else f" -> {found.returns}"
    on_one_line = f"{found.name}({', '.join(parameters)}){returns}"
    if len(on_one_line) <= LINE_LENGTH:
        return on_one_line
    return "\n".join([f"{found.name}(", *(f"    {text}," for text in parameters), f"){returns}"])


def _parameters(found: griffe.Class | griffe.Function) -> Iterator[str]:
    has_star = False
    for parameter in found.parameters:
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not has_star:
            has_star = True
            yield "*"
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        has_star |= stars == "*"
        annotation = "" if parameter.annotation is None else f": {parameter.annotation}"
        default = ""
        if parameter.default is not None and not stars:
            default = f" = {parameter.default}" if annotation else f"={parameter.default}"
        yield f"{stars}{parameter.name}{annotation}{default}"
