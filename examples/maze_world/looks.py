"""What mazes are papered with: the engine's own textures (`doom`), or bright and simple ones of ours (`plain`).

Animated textures are left out of `doom`: their phase follows the engine's clock, not the map's, so a maze would depend
on the mazes recorded before it.
"""

import io
from dataclasses import dataclass, field

from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Look:
    """The texture names that a maze draws from, by place.

    Args:
        walls, posters, floors, ceilings (`tuple[str]`): Names of at most 8 letters, as map files want them. Posters
            are the landmarks: wall faces unlike those around them.
        poster_share (`float` in [0, 1]): Share of wall faces that carry a poster.
        textures (`dict[str, bytes]`): PNG files of the names that the engine does not bring along.
    """

    walls: tuple
    posters: tuple
    floors: tuple
    ceilings: tuple
    poster_share: float
    textures: dict = field(default_factory=dict)


DOOM_WALLS = """
A-BRICK1 A-CAMO1 A-MARBLE A-MOSBRI A-REDROK A-TILE A-VINE1 AQBRIK01 AQCONC01 AQCONC07 AQMETL01 AQMETL13 AQPANL05
AQRUST01 AQRUST06 AQTILE01 ASHWALL2 BIGBRIK1 BIGBRIK2 BRICK1 BRICK10 BRICK4 BRICK6 BRONZE1 BRONZE4 BROVINE2 BROWN1
BROWNGRN BSTONE2 CEMENT9 COMPBLUE CRACKLE2 CRATE1 CRATE2 ESPIBR1 ESPIG1 ESPIGR1 ESPITAN1 GRAY7 GRAYVINE GSTONE1
GSTVINE1 ICKWALL3 MARBGRAY MARBLE1 MARBLE2 METAL2 METAL6 MODWALL1 MODWALL3 PANBLUE PANEL4 PANRED PWHITE REDWALL ROCK3
SHAWN2 SILVER1 SILVER2 SKINMET1 SLADWALL STARBR2 STARG1 STARGR1 STARTAN2 STONE STONE4 STONE6 STUCCO STUCCO1 TANROCK2
TANROCK5 TEKGREN2 TEKWALL4 WOOD1 WOOD5 WOOD9 WOODMET1 ZIMMER2 ZIMMER5 ZIMMER7
"""
DOOM_POSTERS = """
BIGDOOR5 BIGMURAL COMPTALL COMPTILE DLEVSIGN EXITSTON GSTLION GSTSATYR MARBFAC2 MARBFACE MURAL1 MURAL2 PANBOOK PANCASE1
PLANET1 SKINFACE SP_DUDE1 SP_HOT1 SPACEW3 STONGARG SW1GARG WOODGARG WOODSKUL ZDOORB1
"""
DOOM_FLATS = """
AQF001 AQF010 AQF020 AQF030 AQF040 AQF050 AQF060 CEIL1_1 CEIL3_5 CEIL4_1 CEIL5_1 CRATOP1 DEM1_5 FLAT1 FLAT10 FLAT14
FLAT17 FLAT19 FLAT2 FLAT20 FLAT5_4 FLAT5_5 FLAT8 FLOOR0_1 FLOOR0_6 FLOOR1_1 FLOOR1_6 FLOOR4_1 FLOOR4_8 FLOOR5_4 FLOOR6_1
FLOOR7_1 GATE1 GRASS1 GRASS2 GRNROCK MFLR8_1 MFLR8_3 RROCK01 RROCK04 RROCK09 RROCK13 RROCK17 RROCK20 SFLR6_1 SLIME13
SLIME15 STEP1
"""

PLAIN_PATTERNS = ("smooth", "stripes", "disc", "chequer", "posts")
PLAIN_WALL_COLOURS = (
    (214, 86, 74),
    (70, 130, 200),
    (92, 168, 88),
    (226, 170, 60),
    (150, 110, 190),
    (160, 160, 165),
    (80, 180, 180),
    (205, 120, 160),
    (190, 150, 110),
    (110, 120, 70),
)
PLAIN_POSTER_COLOURS = ((30, 30, 30), (250, 250, 250))
PLAIN_POSTER_PATTERNS = ("disc", "chequer", "posts")
PLAIN_FLOOR_COLOURS = (
    (120, 190, 90),
    (60, 120, 190),
    (220, 170, 70),
    (170, 170, 170),
    (150, 100, 70),
    (190, 110, 110),
)
PLAIN_FLOOR_PATTERNS = ("smooth", "chequer")
PLAIN_CEILING_COLOURS = ((140, 220, 255), (250, 220, 180), (200, 200, 240))


def plain_texture(colour, pattern):
    """One PNG of 64x64 pixels: a colour, and a pattern of `PLAIN_PATTERNS` in a darker shade of it."""
    image = Image.new("RGB", (64, 64), colour)
    draw = ImageDraw.Draw(image)
    shade = tuple(int(channel * 0.72) for channel in colour)
    if pattern == "stripes":
        for y in (0, 16, 32, 48):
            draw.line((0, y, 63, y), fill=shade, width=3)
    elif pattern == "disc":
        draw.ellipse((14, 14, 50, 50), fill=shade)
    elif pattern == "chequer":
        draw.rectangle((0, 32, 31, 63), fill=shade)
        draw.rectangle((32, 0, 63, 31), fill=shade)
    elif pattern == "posts":
        for x in (0, 32):
            draw.line((x, 0, x, 63), fill=shade, width=5)
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def plain_textures(prefix, colours, patterns):
    """A texture for every colour and pattern, by name: the prefix (two letters) and a count."""
    combinations = [(colour, pattern) for pattern in patterns for colour in colours]
    return {f"{prefix}{count:03d}": plain_texture(*combination) for count, combination in enumerate(combinations)}


def plain_look():
    walls = plain_textures("WA", PLAIN_WALL_COLOURS, PLAIN_PATTERNS)
    posters = plain_textures("PO", PLAIN_POSTER_COLOURS, PLAIN_POSTER_PATTERNS)
    floors = plain_textures("FL", PLAIN_FLOOR_COLOURS, PLAIN_FLOOR_PATTERNS)
    ceilings = plain_textures("CE", PLAIN_CEILING_COLOURS, ("smooth",))
    return Look(
        walls=tuple(walls),
        posters=tuple(posters),
        floors=tuple(floors),
        ceilings=tuple(ceilings),
        poster_share=0.08,
        textures={**walls, **posters, **floors, **ceilings},
    )


def doom_look():
    flats = tuple(DOOM_FLATS.split())
    return Look(
        walls=tuple(DOOM_WALLS.split()),
        posters=tuple(DOOM_POSTERS.split()),
        floors=flats,
        ceilings=flats,
        poster_share=0.12,
    )


LOOKS = {"doom": doom_look, "plain": plain_look}
