"""A clip and a batch of clips: the one form of frames with actions, from a row of a dataset to the transformer.

    StoredTrajectory --clip--> Clip --stack--> ClipBatch --encode--> ClipBatch

A row is read as a trajectory that is not decoded. A clip is cut from it, decoded, and stacked with others. Where the VAE lies
the batch is encoded. Clips of cached latents are encoded already.

B batch, F frames, C latent channels, H/W latent height/width, A action channels; h/w pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, Image, Video

from ..models.codec import encode_video
from ..pictures import upright_rgb
from .rows import BadExampleError, align_actions, clip_actions
from .video import FrameTimes, read_frame_times, read_frames


IMAGE_DECODER = Image()


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one trajectory, as latents, as pixels, or as both.

    Args:
        latents (`torch.Tensor` of shape `(F, C, H, W)`, *optional*): float32, already multiplied by the scaling factor; or
            codes (F, 1, H, W), int64.
        actions (`torch.Tensor` of shape `(F,)`, int64, or `(F, A)`, float32, *optional*): The action taken at each frame,
            which leads to the next one.
        label (`int`, *optional*): The trajectory's class.
        frames (`torch.Tensor` of shape `(F, 3, h, w)`, *optional*): uint8, RGB.
        pose (`torch.Tensor` of shape `(F, 3)`, float32, *optional*): Where each frame was seen from: x, y and heading in
            degrees.
        name (`str`): The trajectory's, for errors.
    """

    latents: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    label: int | None = None
    frames: torch.Tensor | None = None
    pose: torch.Tensor | None = None
    name: str = ""

    @property
    def video(self) -> torch.Tensor:
        """The frames as the pipelines take them: `(F, 3, h, w)`, float32, in [0, 1]."""
        return self.frames.float() / 255

    def encode(self, vae: torch.nn.Module) -> "Clip":
        """The clip with the latents of its frames, on the device of `vae`."""
        return replace(self, latents=encode_video(vae, self.frames).float())


@dataclass(frozen=True)
class ClipBatch:
    """Clips of one length. What a clip has is here with a batch dimension in front.

    Args:
        latents (`torch.Tensor` of shape `(B, F, C, H, W)`, *optional*): As of [`Clip`].
        actions (`torch.Tensor` of shape `(B, F)` or `(B, F, A)`, *optional*): The action taken at each frame.
        labels (`torch.Tensor` of shape `(B,)`, int64, *optional*): Classes.
        frames (`torch.Tensor` of shape `(B, F, 3, h, w)`, *optional*): uint8, RGB.
        pose (`torch.Tensor` of shape `(B, F, 3)`, *optional*): As of [`Clip`].
        names (`tuple[str]`): Of the clips' trajectories, for errors; empty where they are not known.
    """

    latents: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    frames: torch.Tensor | None = None
    pose: torch.Tensor | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def stack(cls, clips: Sequence[Clip]) -> "ClipBatch":
        """A batch of clips that have the same length and hold the same things."""
        tensors = {
            name: torch.stack([getattr(clip, name) for clip in clips])
            for name in ("latents", "actions", "frames", "pose")
            if getattr(clips[0], name) is not None
        }
        labels = None if clips[0].label is None else torch.tensor([clip.label for clip in clips])
        return cls(**tensors, labels=labels, names=tuple(clip.name for clip in clips))

    def __len__(self) -> int:
        return len(self.frames if self.latents is None else self.latents)

    def __getitem__(self, clips: slice) -> "ClipBatch":
        """Some of the clips, as views."""
        return replace(self._changed(lambda tensor: tensor[clips]), names=self.names[clips])

    @property
    def num_frames(self) -> int:
        """F."""
        return (self.frames if self.latents is None else self.latents).shape[1]

    @property
    def video(self) -> torch.Tensor:
        """The frames as the pipelines take them: `(B, F, 3, h, w)`, float32, in [0, 1]."""
        # Contiguous: else what the autoencoder rounds depends on which frames it is given together.
        return self.frames.contiguous().float() / 255

    def to(self, device: torch.device | str) -> "ClipBatch":
        """The same clips on a device."""
        return self._changed(lambda tensor: tensor.to(device))

    def encode(self, vae: torch.nn.Module) -> "ClipBatch":
        """Latents in place of the frames: each clip by itself, so that its latents do not depend on the others in the batch.
        Clips that have latents are left as they are."""
        if self.latents is not None:
            return self
        latents = torch.stack([encode_video(vae, frames).float() for frames in self.frames])
        return replace(self, latents=latents, frames=None)

    def in_order(self, frame_order: torch.Tensor) -> "ClipBatch":
        """The clips with the frames `frame_order`, shape `(B, F)`, int64, of each, and the actions taken at them."""
        clips = torch.arange(len(frame_order), device=frame_order.device)[:, None]
        actions = None if self.actions is None else self.actions[clips, frame_order]
        return replace(self, latents=self.latents[clips, frame_order], actions=actions)

    def not_finite(self) -> list[str]:
        """The names of the clips whose latents or actions have NaN or infinite values."""
        is_finite = torch.stack(
            [value.flatten(1).isfinite().all(1) for value in (self.latents, self.actions) if value is not None]
        )
        names = self.names or [f"clip {number} of the batch" for number in range(len(self))]
        return [name for name, is_good in zip(names, is_finite.all(0).tolist()) if not is_good]

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "ClipBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class StoredTrajectory:
    """A row of a dataset, read and not decoded.

    Args:
        name (`str`): What an error calls it.
        video (list of `dict`, `pa.Array`, `str` or `bytes`): Its images, or its video file's path or content.
        num_frames (`int`): Frames.
        actions (`list` or `np.ndarray`, *optional*): Not yet checked against the frames.
        label (`int`, *optional*): Its class.
        pose (`list`, *optional*): Where each frame was seen from; not yet checked.
    """

    name: str
    video: list[dict] | pa.Array | str | bytes
    num_frames: int
    actions: list | np.ndarray | None = None
    label: int | None = None
    pose: list | None = None

    def clip(
        self,
        start: int,
        length: int,
        interval: int = 1,
        combine_actions: Callable[[np.ndarray], np.ndarray] | None = None,
        times: Callable[[], FrameTimes | None] | None = None,
    ) -> Clip:
        """Decode `length` frames, `interval` apart, from frame `start` on, with what belongs to them.

        Args:
            start, length, interval (`int`): Which frames.
            combine_actions (callable, *optional*): Such as an [`ActionCombiner`]; needed if there are actions and `interval`
                is above 1.
            times (callable, *optional*): Gives the [`FrameTimes`] of the video file; by default they are read from it.

        Raises:
            BadExampleError: The frames cannot be read, or actions or poses do not fit them; the message has the name.
            ValueError: Actions would be lost.
        """
        actions = pose = None
        try:
            if self.actions is not None:
                actions = align_actions(self.actions, self.num_frames)
            if self.pose is not None:
                pose = np.asarray(self.pose, dtype=np.float32)
                if pose.shape != (self.num_frames, 3):
                    raise ValueError(
                        f"`pose` has shape {pose.shape}, not ({self.num_frames}, 3): x, y and heading in degrees."
                    )
        except ValueError as error:
            raise BadExampleError(f"{self.name}: {error}") from error
        if actions is not None:
            actions = torch.from_numpy(clip_actions(actions[start:], length, interval, combine_actions))
        if pose is not None:
            pose = torch.from_numpy(pose[_span(start, length, interval)])
        frames = self.frames(start, length, interval, times)
        return Clip(actions=actions, label=self.label, frames=frames, pose=pose, name=self.name)

    def frames(
        self,
        start: int,
        length: int,
        interval: int = 1,
        times: Callable[[], FrameTimes | None] | None = None,
    ) -> torch.Tensor:
        """The frames of [`StoredTrajectory.clip`] alone: `(length, 3, h, w)`, uint8, RGB.

        Raises:
            BadExampleError: They cannot be read; the message has the name.
        """
        try:
            if not isinstance(self.video, (str, bytes)):
                images = self.video[_span(start, length, interval)]
                return decode_images(images.to_pylist() if isinstance(images, pa.Array) else images)
            found = None
            if start:  # nothing comes before the first frame
                found = read_frame_times(self.video) if times is None else times()
            return torch.from_numpy(read_frames(self.video, start, length, interval, found)).permute(0, 3, 1, 2)
        except (ValueError, OSError) as error:  # frames of several sizes, an image that is none
            raise BadExampleError(f"{self.name} has frames that cannot be read: {error}") from error

    def without_other_images(self, start: int, length: int, interval: int = 1) -> "StoredTrajectory":
        """The same trajectory with the images of one clip alone: small, to be sent to the process that decodes it."""
        if not isinstance(self.video, list):
            return self
        kept = [None] * self.num_frames
        kept[_span(start, length, interval)] = self.video[_span(start, length, interval)]
        return replace(self, video=kept)


def _span(start: int, length: int, interval: int) -> slice:
    """The places of `length` frames, `interval` apart."""
    return slice(start, start + (length - 1) * interval + 1, interval)


def decode_images(images: Iterable[dict]) -> torch.Tensor:
    """Images as `datasets` stores them, `{"bytes": ..., "path": ...}`: `(F, 3, h, w)`, uint8, RGB.

    Raises:
        BadExampleError: If one is missing or damaged, has pixels of an unknown scale, or another size than the others.
    """
    frames = [_decode_image(image) for image in images]
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) != 1:
        raise BadExampleError(f"{len(frames)} images are of sizes {sizes} (height, width); a clip has frames of one.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _decode_image(image: dict) -> np.ndarray:
    try:
        return upright_rgb(IMAGE_DECODER.decode_example(image))
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        name = repr(image["path"]) if image and image.get("path") else "An image without a name"
        reason = " ".join(str(error).split())[:300]
        raise BadExampleError(f"{name} cannot be read ({type(error).__name__}: {reason}); write it anew.") from error


def holds_video_files(features: Features, column: str) -> bool:
    """Whether a column holds video files rather than lists of images.

    Raises:
        ValueError: If it is missing, or neither of the two.
    """
    feature = features.get(column)
    if isinstance(feature, Video):
        return True
    if not isinstance(getattr(feature, "feature", None), Image):
        raise ValueError(
            f"`column` is {column!r}, but the dataset has {dict(features)}; name a column of type `List(Image())` or "
            "`Video`, or prepare the dataset with `far prepare`."
        )
    return False


def evenly_spaced(num_samples: int, num_wanted: int) -> list[int]:
    """At most `num_wanted` indices spread over `range(num_samples)`, for a sample that is the same in every run."""
    return np.linspace(0, num_samples - 1, min(num_samples, num_wanted)).round().astype(int).tolist()
