"""Drawings as SVG: a canvas with a few shapes. The same drawing gives the same file, byte for byte."""

from pathlib import Path
from xml.etree import ElementTree


FONT = "system-ui, 'DejaVu Sans', sans-serif"
INK = "#24292f"
QUIET = "#6a737d"


class Drawing:
    """A white canvas; x goes right, y goes down, in pixels.

    Args:
        width (`float`), height (`float`): Size.
        title (`str`): What it shows, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str):
        size = {"width": number(width), "height": number(height), "viewBox": f"0 0 {number(width)} {number(height)}"}
        self.root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **size})
        ElementTree.SubElement(self.root, "title").text = title
        self.rect(0, 0, width, height, "#ffffff")

    def shape(self, tag: str, **attributes) -> ElementTree.Element:
        """Any element; underscores in the names of attributes stand for hyphens, and `None` leaves one out."""
        values = {name.replace("_", "-"): number(value) for name, value in attributes.items() if value is not None}
        return ElementTree.SubElement(self.root, tag, values)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str | None = None, **more
    ) -> None:
        self.shape("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke, **more)

    def text(
        self, x: float, y: float, text: str, size: float = 13, anchor: str = "middle", fill: str = INK, **more
    ) -> None:
        """Text on the line `y`; `anchor` says what of it is at `x`: `"start"`, `"middle"` or `"end"`."""
        style = {"font_family": FONT, "font_size": size, "text_anchor": anchor, "fill": fill}
        self.shape("text", x=x, y=y, **style, **more).text = text

    def line(self, points: list[tuple[float, float]], stroke: str = INK, width: float = 1.5, **more) -> None:
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.shape("polyline", points=path, fill="none", stroke=stroke, stroke_width=width, **more)

    def arrow(self, x: float, y: float, to_x: float, stroke: str = QUIET) -> None:
        """A level arrow."""
        tip = 5 if to_x > x else -5
        self.line([(x, y), (to_x, y)], stroke)
        self.line([(to_x - tip, y - 4), (to_x, y), (to_x - tip, y + 4)], stroke)

    def legend(self, x: float, y: float, entries: dict[str, str], gap: float = 26) -> None:
        """Coloured squares, each with its name, in a row; the names' widths are estimated."""
        for name, fill in entries.items():
            self.rect(x, y - 11, 12, 12, fill, QUIET)
            self.text(x + 18, y, name, anchor="start")
            x += 18 + 6.9 * len(name) + gap

    def save(self, path: Path) -> None:
        ElementTree.indent(self.root)
        path.write_text(ElementTree.tostring(self.root, encoding="unicode") + "\n")


def number(value: float | str) -> str:
    """As short as can be, to a hundredth of a pixel."""
    return value if isinstance(value, str) else f"{round(float(value), 2):g}"
