"""Pictures of every kind, through every door by which they come in."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from malformed_media import PNG_START, png_chunk
from PIL import Image

from diffusers_far.data.media_files import read_clip
from diffusers_far.data.rows import BadExampleError
from diffusers_far.data.video import read_video
from diffusers_far.data.video_clips import FrameDataset, VideoClips
from diffusers_far.pictures import upright_rgb
from diffusers_far.pipelines.inputs import video_to_tensor


ORIENTATION = 0x0112
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def grey(*levels: int) -> list:
    """A row of pixels."""
    return [[[level] * 3 for level in levels]]


def stored(image: Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def with_pixels(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    for column, pixel in enumerate(pixels):
        image.putpixel((column, 0), pixel)
    return image


def with_transparency(image: Image.Image, transparency) -> Image.Image:
    image.info["transparency"] = transparency
    return image


def with_palette(transparency) -> Image.Image:
    image = with_pixels("P", 0, 1, 2)
    image.putpalette([200, 10, 20, 30, 220, 40, 50, 60, 240])
    return image if transparency is None else with_transparency(image, transparency)


def png_of_16_bits(*pixels: tuple[int, int, int], transparency: tuple[int, int, int] | None = None) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, 16, 2, 0, 0, 0))
    hidden = b"" if transparency is None else png_chunk(b"tRNS", struct.pack(">3H", *transparency))
    row = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    return PNG_START + header + hidden + png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b"")


SIXTEEN_BITS = np.array([[0, 257 * 51, 65535]], np.uint16)

# Name, picture, pixels
PICTURES = [
    ("1", with_pixels("1", 0, 1), grey(0, 255)),
    ("L", with_pixels("L", 0, 51, 255), grey(0, 51, 255)),
    ("LA", with_pixels("LA", (255, 255), (255, 0), (200, 51)), grey(255, 0, 40)),
    ("L, one level transparent", with_transparency(with_pixels("L", 7, 255), 255), grey(7, 0)),
    ("P", with_palette(None), [[[200, 10, 20], [30, 220, 40], [50, 60, 240]]]),
    ("P, one colour transparent", with_palette(1), [[[200, 10, 20], [0, 0, 0], [50, 60, 240]]]),
    ("P, with alpha", with_palette(bytes([51, 0, 255])), [[[40, 2, 4], [0, 0, 0], [50, 60, 240]]]),
    ("RGB", with_pixels("RGB", (1, 2, 3)), [[[1, 2, 3]]]),
    (
        "RGB, one colour transparent",
        with_transparency(with_pixels("RGB", (9, 8, 7), (1, 2, 3)), (9, 8, 7)),
        [[[0] * 3, [1, 2, 3]]],
    ),
    (
        "RGBA",
        with_pixels("RGBA", (200, 100, 50, 255), (200, 100, 50, 51), (255, 255, 255, 0)),
        [[[200, 100, 50], [40, 20, 10], [0, 0, 0]]],
    ),
    ("RGBa", with_pixels("RGBA", (200, 100, 50, 51)).convert("RGBa"), [[[40, 20, 10]]]),
    ("CMYK", with_pixels("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), [[[0, 255, 255], [0, 0, 0]]]),
    ("YCbCr", with_pixels("YCbCr", (51, 128, 128)), grey(51)),
    ("HSV", with_pixels("HSV", (0, 255, 255)), [[[255, 0, 0]]]),
    ("I;16", Image.fromarray(SIXTEEN_BITS), grey(0, 51, 255)),
    ("I;16B", Image.fromarray(SIXTEEN_BITS).convert("I").convert("I;16B"), grey(0, 51, 255)),
    ("I;16, one level transparent", with_transparency(Image.fromarray(SIXTEEN_BITS), 65535), grey(0, 51, 0)),
    ("F", Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), grey(0, 51, 255)),
    ("16-bit grey PNG", stored(Image.fromarray(SIXTEEN_BITS), "PNG"), grey(0, 51, 255)),
    ("16-bit grey TIFF", stored(Image.fromarray(SIXTEEN_BITS), "TIFF"), grey(0, 51, 255)),
    ("16-bit PGM", stored(Image.fromarray(SIXTEEN_BITS), "PPM"), grey(0, 51, 255)),
    ("16-bit RGB PNG", png_of_16_bits((65535, 0, 51 * 257)), [[[255, 0, 51]]]),
    (
        "16-bit RGB PNG, one colour transparent",
        png_of_16_bits((65535, 0, 51 * 257), (0, 65535, 0), transparency=(65535, 0, 51 * 257)),
        [[[0, 0, 0], [0, 255, 0]]],
    ),
]
REFUSED = [
    ("I", with_pixels("I", 0, 70_000), "32-bit integers"),
    (
        "F above 1",
        Image.fromarray(np.array([[0, 128.0]], np.float32)),
        r"floats from 0 to 128; scale them to \[0, 1\]",
    ),
    ("F below 0", Image.fromarray(np.array([[-1, 1.0]], np.float32)), "floats from -1 to 1"),
    ("F not finite", Image.fromarray(np.array([[0, np.nan]], np.float32)), "floats from nan"),
]


def by_name(cases: list[tuple]) -> list:
    return [pytest.param(*case, id=name) for name, *case in cases]


def opened(picture: Image.Image | bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture


def frame_column(*pictures: bytes) -> Dataset:
    rows = {"video": [[{"bytes": picture, "path": "a/view.png"} for picture in pictures]]}
    return Dataset.from_dict(rows, features=Features({"video": List(ImageFeature())}))


@pytest.mark.parametrize(("picture", "pixels"), by_name(PICTURES))
def test_a_picture_of_any_mode_is_rgb_on_black_through_every_door(picture, pixels, tmp_path):
    pixels = np.array(pixels)
    assert np.array_equal(upright_rgb(opened(picture)), pixels)
    video = video_to_tensor([opened(picture)])
    assert torch.equal(video[0, 0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    if isinstance(picture, bytes):
        assert np.array_equal(FrameDataset(frame_column(picture))[0].permute(1, 2, 0), pixels)
        assert np.array_equal(VideoClips(frame_column(picture)).frames(0, 0, 1)[0].permute(1, 2, 0), pixels)
        if picture.startswith(PNG_START):
            (tmp_path / "view.png").write_bytes(picture)
            assert np.array_equal(read_clip(tmp_path / "view.png").frames[0], pixels)


@pytest.mark.parametrize(("picture", "message"), by_name(REFUSED))
def test_a_picture_whose_white_nobody_knows_is_refused_by_name(picture, message):
    with pytest.raises(ValueError, match=f"`video` has an image.*{message}"):
        video_to_tensor([picture])
    with pytest.raises(BadExampleError, match=f"view.png.*{message}"):
        FrameDataset(frame_column(stored(picture, "TIFF")))[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_and_mirrored_as_its_exif_says_through_every_door(orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = stored(Image.fromarray(COLOURS), "PNG", exif=exif)
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    expected = np.rot90(COLOURS, turns)
    expected = expected[:, ::-1] if orientation in (2, 4, 5, 7) else expected
    (tmp_path / "view.png").write_bytes(content)
    assert np.array_equal(read_clip(tmp_path / "view.png").frames[0], expected)
    assert np.array_equal(FrameDataset(frame_column(content))[0].permute(1, 2, 0), expected)
    video = video_to_tensor([opened(content)])[0, 0].permute(1, 2, 0)
    assert np.array_equal(np.rint(video.numpy() * 255), expected)


def test_what_is_wrong_with_an_image_of_a_dataset_is_said_with_its_name():
    whole = stored(Image.fromarray(COLOURS), "PNG")
    bomb = stored(Image.new("1", (20_000, 20_000)), "PNG")
    for content in (b"", b"no image", whole[: len(whole) // 2], bomb):
        with pytest.raises(BadExampleError, match="view.png.*cannot be read"):
            FrameDataset(frame_column(content))[0]
    other_size = stored(Image.fromarray(COLOURS[:2]), "PNG")
    with pytest.raises(BadExampleError, match=r"images are of sizes \[\(2, 6\), \(4, 6\)\]"):
        VideoClips(frame_column(whole, other_size)).frames(0, 0, 2)


# Animations and videos

HALF_HIDDEN = np.full((32, 48, 4), 255, np.uint8)  # magenta, the left half transparent
HALF_HIDDEN[..., 1] = 0
HALF_HIDDEN[:, :24, 3] = 0


def write_half_hidden(path: Path, codec: str, pixel_format: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0"} if "vpx" in codec else {})
        stream.height, stream.width, stream.pix_fmt = 32, 48, pixel_format
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(HALF_HIDDEN, format="rgba").reformat(format=pixel_format, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def require_half_hidden(frames: np.ndarray) -> None:
    assert len(frames) == 3
    assert frames[:, :, :20].max() <= 2
    assert np.abs(frames[:, :, 28:].astype(int) - (255, 0, 255)).max() <= 6


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.webm", "libvpx", "yuva420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_colour_that_a_video_hides_is_black(tmp_path, name, codec, pixel_format):
    path = write_half_hidden(tmp_path / name, codec, pixel_format)
    require_half_hidden(read_video(path))
    require_half_hidden(read_clip(path).frames)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_colour_that_an_animation_hides_is_black(tmp_path, name):
    frames = [Image.fromarray(HALF_HIDDEN.copy()) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.putpixel((47, 0), (number, 0, 0, 255))  # equal frames would become one
    options = {"lossless": True} if name.endswith("webp") else {"disposal": 1}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    video = read_clip(tmp_path / name).frames.copy()
    video[:, 0, 47] = (255, 0, 255)
    require_half_hidden(video)


@pytest.mark.parametrize("pixel_format", ["gray16le", "gray10le", "gray12le", "gbrp10le", "gbrp16le", "yuv444p12le"])
def test_deep_video_is_scaled_to_eight_bits(tmp_path, pixel_format):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = 16, 24, pixel_format
        for level in (0, 51, 255):
            frame = av.VideoFrame.from_ndarray(np.full((16, 24, 3), level, np.uint8), format="rgb24")
            # Several threads now and then leave a part of so small a frame unwritten.
            container.mux(stream.encode(frame.reformat(format=pixel_format, threads=1)))
        container.mux(stream.encode())
    levels = read_video(tmp_path / "a.mkv").astype(int)
    assert np.abs(levels - np.array([0, 51, 255])[:, None, None, None]).max() <= 1


@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
def test_colours_come_back_as_the_file_says_that_they_are_coded(tmp_path, matrix, color_range):
    colours = np.zeros((32, 48, 3), np.uint8)
    colours[:16, :24], colours[:16, 24:], colours[16:, :24] = (200, 30, 60), (20, 220, 40), (10, 20, 230)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        frame = av.VideoFrame.from_ndarray(colours, format="rgb24").reformat(
            format="yuv444p", dst_colorspace=matrix, dst_color_range=color_range, threads=1
        )
        container.mux(stream.encode(frame) + stream.encode())
    assert np.abs(read_video(tmp_path / "a.mp4").astype(int) - colours).max() <= 6
