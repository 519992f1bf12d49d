"""Files that somebody might give for a clip or an image, none of which is one; each maker writes into an empty folder.

What they are named after is their fault; whoever reads them must say so, in bounded time and memory.
"""

import gzip
import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from video_files import gray_frames, truncate, write_video


PNG_START = b"\x89PNG\r\n\x1a\n"


def write(content: bytes, name: str, folder: Path) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def image_bytes(image_format: str, **options) -> bytes:
    """A small picture of noise, which no format can make much smaller."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, image_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of 8-bit grey with the given chunks between its header and its end."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return PNG_START + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def zeros(num_bytes: int) -> bytes:
    """As many zero bytes, deflated to a thousandth."""
    return zlib.compress(bytes(num_bytes), 9)


def cut(content: bytes, share: float, name: str, folder: Path) -> Path:
    return truncate(write(content, name, folder), share)


def cut_video(name: str, share: float, folder: Path, **options) -> Path:
    return truncate(write_video(folder / name, gray_frames(6), **options), share)


def without_index(folder: Path) -> Path:
    """An mp4 whose frames are all there, but not the box that says where."""
    path = write_video(folder / "no_index.mp4", gray_frames(6))
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"moov") - 4])
    return path


def sound_alone(folder: Path) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.time_base = 8000, Fraction(1, 8000)
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


def video_without_frames(folder: Path) -> Path:
    path = folder / "no_frames.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return path


def huge_avi(folder: Path) -> Path:
    """A small avi whose headers speak of frames of a billion pixels."""
    path = write_video(folder / "huge.avi", gray_frames(3), codec="rawvideo", pixel_format="bgr24")
    content = path.read_bytes()
    sides, huge = struct.pack("<ii", 48, 32), struct.pack("<ii", 32_000, 32_000)
    flipped = struct.pack("<ii", 48, -32)
    path.write_bytes(content.replace(sides, huge).replace(flipped, huge))
    return path


def zip_bomb(folder: Path) -> Path:
    path = folder / "bomb.png"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames", bytes(20_000_000))
    return path


def folder_of(name: str, files: dict[str, bytes], folder: Path) -> Path:
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / file).write_bytes(content)
    return folder / name


def folder_of_dangling_links(folder: Path) -> Path:
    folder_of("dangling", {}, folder)
    (folder / "dangling" / "1.png").symlink_to("nowhere.png")
    return folder / "dangling"


def link(target: str, name: str, folder: Path) -> Path:
    (folder / name).symlink_to(target)
    return folder / name


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def listening_socket(folder: Path) -> Path:
    # Its whole path may have no more than a hundred characters.
    before = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.mp4")
    finally:
        os.chdir(before)
    return folder / "socket.mp4"


GIF_OF_A_HUGE_SCREEN = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
GIF_OF_A_HUGE_SCREEN += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;"
WEBP_OF_A_HUGE_CANVAS = (
    b"VP8X" + struct.pack("<II", 10, 2) + struct.pack("<I", 16382)[:3] + struct.pack("<I", 16382)[:3]
)
BMP_OF_HUGE_SIDES = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
BMP_OF_HUGE_SIDES += struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)


def huge_jpeg() -> bytes:
    content = image_bytes("JPEG")
    sides = struct.pack(">HH", 24, 32)
    return content.replace(sides, struct.pack(">HH", 65500, 65500), 1)


OTHER_KINDS = {
    "text": b"walk forward, then left\n" * 20,
    "text in UTF-16": "walk forward".encode("utf-16"),
    "HTML": b"<!doctype html><video src='file:///etc/hostname'></video>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "JSON": b'{"frames": [1, 2, 3]}',
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
    "list of clips": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "gzip": gzip.compress(b"frames" * 100),
    "zeros": bytes(10_000),
    "noise": np.random.default_rng(1).bytes(10_000),
}

STARTS = {
    "PNG": PNG_START,
    "JPEG": b"\xff\xd8\xff\xe0",
    "GIF": b"GIF89a",
    "WEBP": b"RIFF\x40\0\0\0WEBP",
    "BMP": b"BM",
    "MP4": b"\0\0\0\x18ftypisom",
    "MKV": b"\x1a\x45\xdf\xa3",
    "AVI": b"RIFF\x40\0\0\0AVI ",
}

MALFORMED_MEDIA: dict[str, Callable[[Path], Path]] = {
    "an empty file": partial(write, b"", "empty.mp4"),
    **{f"{kind} named mp4": partial(write, content, "other.mp4") for kind, content in OTHER_KINDS.items()},
    **{f"{kind} named png": partial(write, content, "other.png") for kind, content in OTHER_KINDS.items()},
    **{f"the first bytes of {kind}": partial(write, start, "start") for kind, start in STARTS.items()},
    **{f"{kind} of zeros": partial(write, start + bytes(500), "zeros") for kind, start in STARTS.items()},
    "half an mp4": partial(cut_video, "half.mp4", 0.5),
    "nearly an mp4 with its index in front": partial(
        cut_video, "nearly.mp4", 0.95, container_options={"movflags": "faststart"}
    ),
    "a tenth of an mkv": partial(cut_video, "tenth.mkv", 0.1),
    "a tenth of an avi": partial(cut_video, "tenth.avi", 0.1, codec="mpeg4"),
    "an mp4 without index": without_index,
    "sound without pictures": sound_alone,
    "a video without frames": video_without_frames,
    "an avi of a billion pixels": huge_avi,
    "half a PNG": partial(cut, image_bytes("PNG"), 0.5, "half.png"),
    "half a JPEG": partial(cut, image_bytes("JPEG"), 0.5, "half.jpg"),
    "half a GIF": partial(cut, image_bytes("GIF"), 0.5, "half.gif"),
    "half a WEBP": partial(cut, image_bytes("WEBP", lossless=True), 0.5, "half.webp"),
    "half a BMP": partial(cut, image_bytes("BMP"), 0.5, "half.bmp"),
    "a PNG without pixels": partial(write, png(8, 8), "no_pixels.png"),
    "a PNG of no width": partial(write, png(0, 8, png_chunk(b"IDAT", zeros(8))), "no_width.png"),
    "a PNG of wrong checksums": partial(write, image_bytes("PNG").replace(b"IDAT", b"IDAT\0", 1), "checksum.png"),
    "a PNG of few pixels": partial(write, png(64, 64, png_chunk(b"IDAT", zeros(100))), "few_pixels.png"),
    "a PNG that claims four billion pixels": partial(write, png(65535, 65535), "claims.png"),
    "a PNG of a hundred million pixels": partial(
        write, png(10_000, 10_000, png_chunk(b"IDAT", zeros(100_010_000))), "bomb.png"
    ),
    "a PNG with a bomb for a comment": partial(
        write, png(8, 8, png_chunk(b"zTXt", b"Comment\0\0" + zeros(50_000_000))), "comment.png"
    ),
    "a PNG with a bomb for a profile": partial(
        write, png(8, 8, png_chunk(b"iCCP", b"Profile\0\0" + zeros(50_000_000))), "profile.png"
    ),
    "a GIF of a huge screen": partial(write, GIF_OF_A_HUGE_SCREEN, "screen.gif"),
    "a WEBP of a huge canvas": partial(
        write,
        b"RIFF" + struct.pack("<I", 4 + len(WEBP_OF_A_HUGE_CANVAS)) + b"WEBP" + WEBP_OF_A_HUGE_CANVAS,
        "canvas.webp",
    ),
    "a BMP of huge sides": partial(write, BMP_OF_HUGE_SIDES, "sides.bmp"),
    "a JPEG of huge sides": partial(write, huge_jpeg(), "sides.jpg"),
    "a zip bomb named png": zip_bomb,
    "an empty folder": partial(folder_of, "frames", {}),
    "a folder of texts": partial(folder_of, "texts", {"1.txt": b"one", "2.txt": b"two"}),
    "a folder with a damaged image": partial(
        folder_of, "damaged", {"1.png": image_bytes("PNG"), "2.png": image_bytes("PNG")[:100]}
    ),
    "a folder with a text named png": partial(folder_of, "renamed", {"1.png": image_bytes("PNG"), "2.png": b"two"}),
    "a folder of links to nothing": folder_of_dangling_links,
    "a link to nothing": partial(link, "nowhere.mp4", "dangling.mp4"),
    "a link to itself": partial(link, "loop.mp4", "loop.mp4"),
    "a link to endless zeros": partial(link, "/dev/zero", "endless.mp4"),
    "a pipe that nobody writes to": pipe,
    "a socket": listening_socket,
    "a file that is not there": lambda folder: folder / "nowhere.mp4",
    "a file inside a file": lambda folder: write(b"text", "file", folder) / "clip.mp4",
    "a name that is too long": lambda folder: folder / ("a" * 300 + ".mp4"),
}
