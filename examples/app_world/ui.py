"""The page: what is pressed goes to the visitor's walk, and what it shows comes back."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from diffusers_far.data.media_files import MEDIA_SUFFIXES
from diffusers_far.evaluation.media import write_frames

from .settings import Settings, WorldError, WorldLimits
from .starts import RecordedWalks, uploaded_start
from .view import CSS, scene_html
from .visitors import Visitor, VisitorStore
from .world import WorldModel


DEFAULT_FPS = 8.0
DOWNLOAD_SIDE = 256  # pixels that the shorter side of a download has at least
ARROWS = {
    "forward": "ArrowUp",
    "back": "ArrowDown",
    "backward": "ArrowDown",
    "left": "ArrowLeft",
    "right": "ArrowRight",
}
SIGNS = {"ArrowUp": "↑", "ArrowDown": "↓", "ArrowLeft": "←", "ArrowRight": "→"}

# One keyboard event presses one button. While it is being answered, Gradio passes over more presses of the same button.
KEYS_SCRIPT = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, textarea, select, [contenteditable], [role=listbox]")) return;
  const button = /^[A-Za-z0-9]+$/.test(event.key) && document.querySelector(`button.key-${event.key}`);
  if (!button) return;
  event.preventDefault();
  if (!button.disabled) button.click();
});
</script>
"""


@dataclass(frozen=True)
class AppParts:
    """What the app is made of.

    Args:
        model ([`WorldModel`]): Shared by all visitors.
        walks ([`RecordedWalks`], *optional*): To start from; without them, visitors bring their own clips.
        limits ([`WorldLimits`]).
    """

    model: WorldModel
    walks: RecordedWalks | None = None
    limits: WorldLimits = WorldLimits()


@contextmanager
def shown_to_the_visitor() -> Iterator[None]:
    """What a visitor can mend appears as a message on the page, and the app goes on."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        message = " ".join(str(error).replace("`", "").split())[:400] or type(error).__name__
        raise gr.Error(message, title="This cannot be done", print_exception=False) from error


class Handlers:
    """What happens when something is pressed. Every method answers one visitor, whom the request names.

    Args:
        parts ([`AppParts`]).
    """

    def __init__(self, parts: AppParts):
        self.parts = parts
        self.visitors = VisitorStore(parts.model, parts.limits)
        self.downloads = tempfile.TemporaryDirectory(prefix="far-app-")

    def begin_recorded(
        self, request: gr.Request, walk: int, frame: float, num_context: float, *settings: object
    ) -> tuple:
        with shown_to_the_visitor():
            start = self.parts.walks.start(walk, whole(frame), whole(num_context))
            visitor = self.visitors.visitor(request.session_hash)
            visitor.begin(start, read_settings(settings))
            return self.seen_by(visitor)

    def begin_uploaded(self, request: gr.Request, path: str | None, num_context: float, *settings: object) -> tuple:
        with shown_to_the_visitor():
            if not path:
                raise WorldError("Choose a clip or an image first.")
            model = self.parts.model
            start = uploaded_start(path, model.size, whole(num_context), model.action_names, self.parts.limits)
            visitor = self.visitors.visitor(request.session_hash)
            visitor.begin(start, read_settings(settings))
            return self.seen_by(visitor)

    def step(self, request: gr.Request, action: int | None, *settings: object) -> tuple:
        with shown_to_the_visitor():
            visitor = self.visitors.visitor(request.session_hash)
            visitor.world.configure(read_settings(settings))
            visitor.world.step(action)
            return self.seen_by(visitor)

    def autoplay(self, request: gr.Request, *settings: object) -> tuple:
        """One step by itself; where there is none, autoplay is switched off rather than failing again and again."""
        try:
            with shown_to_the_visitor():
                visitor = self.visitors.visitor(request.session_hash)
                action = visitor.world.autoplay_action()
            return (*self.step(request, action, *settings), gr.skip(), gr.skip())
        except gr.Error as error:
            gr.Warning(error.message, title="Autoplay stopped")
            return gr.skip(), gr.skip(), False, gr.Timer(active=False)

    def rewind(self, request: gr.Request, num_frames: int) -> tuple:
        with shown_to_the_visitor():
            visitor = self.visitors.visitor(request.session_hash)
            visitor.world.rewind(min(num_frames, visitor.world.num_new_frames) or num_frames)
            return self.seen_by(visitor)

    def fork(self, request: gr.Request) -> tuple:
        with shown_to_the_visitor():
            visitor = self.visitors.visitor(request.session_hash)
            visitor.fork()
            return self.seen_by(visitor)

    def show(self, request: gr.Request, branch: int) -> tuple:
        with shown_to_the_visitor():
            visitor = self.visitors.visitor(request.session_hash)
            visitor.show(branch)
            return self.seen_by(visitor)

    def save(self, request: gr.Request) -> gr.File:
        with shown_to_the_visitor():
            world = self.visitors.visitor(request.session_hash).world
            path = self.new_download_folder() / f"walk_{world.num_new_frames}_frames.mp4"
            side = min(world.frames.shape[1:3])
            scale = max(1, -(-DOWNLOAD_SIDE // side))
            write_frames(path, world.frames, self.parts.model.pipe.config.fps or DEFAULT_FPS, scale + scale % 2)
            return gr.File(str(path), visible=True)

    def new_download_folder(self) -> Path:
        """One for each request keeps two visitors from writing the same file. Gradio copies what it sends, so that only
        the latest need be kept."""
        folders = sorted(Path(self.downloads.name).iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in folders[: -self.parts.limits.max_visitors]:
            shutil.rmtree(folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self.downloads.name))

    def leave(self, request: gr.Request) -> None:
        self.visitors.drop(request.session_hash)

    def seen_by(self, visitor: Visitor) -> tuple:
        """The scene, and the choice of branches."""
        num_branches = len(visitor.branches)
        scene = scene_html(visitor.world, visitor.branch, num_branches)
        choices = [(f"{index + 1}", index) for index in range(num_branches)]
        return scene, gr.Radio(choices=choices, value=visitor.branch, visible=num_branches > 1)


def whole(value: object) -> object:
    """A slider's number as an integer where it is one; anything else is left for the checks."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_settings(values: tuple) -> Settings:
    """Settings from the page's controls, in their order."""
    num_steps, guidance_scale, slope, short_cache, max_long_frames = values
    max_long_frames = whole(max_long_frames)
    return Settings(
        whole(num_steps), guidance_scale, slope, short_cache, None if max_long_frames == 0 else max_long_frames
    )


def build_app(parts: AppParts) -> gr.Blocks:
    """The page and its queue; [`launch_options`] belong to it."""
    handlers = Handlers(parts)
    # One model, one caller at a time; this also keeps two events of one visitor apart.
    alone = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="diffusers-far", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown("## Walk through a world that a model makes up\nArrow keys or buttons; each press is one frame.")
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                scene = gr.HTML(elem_id="scene")
                buttons = action_buttons(parts.model.action_names)
                with gr.Row():
                    back_one = gr.Button(
                        "Back 1", size="sm", min_width=90, elem_id="back-1", elem_classes="key-Backspace"
                    )
                    back_many = gr.Button("Back 8", size="sm", min_width=90, elem_id="back-8")
                    fork = gr.Button("Fork", size="sm", min_width=90, elem_id="fork")
                    save = gr.Button("Make mp4", size="sm", min_width=90, elem_id="save")
                with gr.Row():
                    autoplay = gr.Checkbox(
                        label="Autoplay: the recorded way, then the last action again", elem_id="autoplay"
                    )
                    branch = gr.Radio([], label="Branch", visible=False, elem_id="branch")
                download = gr.File(label="Download", interactive=False, visible=False, elem_id="download")
            with gr.Column(scale=2, min_width=280):
                num_context = slider(1, parts.limits.max_context_frames, 32, step=1, label="Frames of context")
                recorded = recorded_controls(parts.walks)
                upload = gr.File(
                    label=f"Your own clip or image, up to {parts.limits.upload.max_bytes // 2**20} MiB",
                    file_types=list(MEDIA_SUFFIXES),
                    height=150,
                    elem_id="upload",
                )
                settings = settings_controls(parts.model)
        timer = gr.Timer(0.2, active=False)

        seen = [scene, branch]
        for index, button in enumerate(buttons):
            action = gr.State(index if parts.model.action_names else None)
            button.click(handlers.step, [action, *settings], seen, **alone)
        timer.tick(handlers.autoplay, settings, [*seen, autoplay, timer], **alone)
        autoplay.input(lambda is_on: gr.Timer(active=is_on), autoplay, timer, api_visibility="private")
        back_one.click(handlers.rewind, gr.State(1), seen, **alone)
        back_many.click(handlers.rewind, gr.State(8), seen, **alone)
        fork.click(handlers.fork, None, seen, **alone)
        branch.input(handlers.show, branch, seen, **alone)
        save.click(handlers.save, None, download, **alone)
        upload.upload(handlers.begin_uploaded, [upload, num_context, *settings], seen, **alone)
        if recorded:
            *choice, begin = recorded
            begin.click(handlers.begin_recorded, [*choice, num_context, *settings], seen, **alone)
            app.load(handlers.begin_recorded, [*choice, num_context, *settings], seen, **alone)
        app.unload(handlers.leave)
    return app.queue(max_size=4 * parts.limits.max_visitors, default_concurrency_limit=1, api_open=False)


def action_buttons(action_names: list[str]) -> list[gr.Button]:
    """A button per action, with the arrow key of its name, or the number key of its place."""
    buttons = []
    with gr.Row(elem_classes="far-actions"):
        for index, name in enumerate(action_names or ["next frame"]):
            key = ARROWS.get(name.lower(), str(index + 1))
            label = f"{SIGNS.get(key, key)}  {name}"
            classes = [f"key-{key}"] if action_names else ["key-ArrowUp"]
            buttons.append(
                gr.Button(label, variant="primary", min_width=100, elem_id=f"action-{index}", elem_classes=classes)
            )
    return buttons


def recorded_controls(walks: RecordedWalks | None) -> list:
    """Which recorded walk, from which frame, and the button; nothing without walks."""
    if walks is None:
        return []
    choices = [(title, index) for index, title in enumerate(walks.titles)]
    walk = gr.Dropdown(choices, value=0, label="Start in a maze that the model never saw", elem_id="walk")
    last = min(walks.num_frames) - 2
    frame = slider(0, last, min(100, last), step=1, label="At its frame", elem_id="frame")
    return [walk, frame, gr.Button("Start", elem_id="begin")]


def settings_controls(model: WorldModel) -> list:
    """The controls, in the order of the fields of [`Settings`], at the model's own settings."""
    own = model.default_settings
    steps, guidance, slope = own.num_inference_steps, own.guidance_scale, own.flex_rope_slope
    with gr.Accordion("Settings", open=True):
        return [
            slider(1, max(50, steps), steps, step=1, label="Denoising steps", elem_id="steps"),
            slider(min(1, guidance), max(5, guidance), guidance, step=0.1, label="Guidance", elem_id="guidance"),
            slider(
                0,
                max(1, slope),
                slope,
                step=0.01,
                label="FlexRoPE slope",
                info="Beyond the trained length; 0: plain RoPE.",
                elem_id="slope",
            ),
            short_cache_control(own.short_cache),
            slider(0, 512, 0, step=1, label="Long frames kept", info="0: all. From the next start on."),
        ]


def short_cache_control(own: str | int) -> gr.Radio:
    """How the short window is cached, the model's own way among the choices."""
    choices = [(f"anew every {own} frames", own)] if isinstance(own, int) else []
    choices = [("exact", "exact"), *choices, ("rolling", "rolling")]
    return gr.Radio(choices, value=own, label="Short cache", info="From the next start on.", elem_id="short-cache")


def slider(low: float, high: float, value: float, **options: object) -> gr.Slider:
    """A slider whose number the handlers check: before Gradio's own check a field that was emptied fails without a word."""
    control = gr.Slider(low, high, value, **options)
    control.preprocess = as_it_is
    return control


def as_it_is(value: object) -> object:
    return value


def launch_options(limits: WorldLimits = WorldLimits()) -> dict:
    """What `launch` of the page needs beside an address: looks, keys, the size of uploads."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    return {
        "theme": gr.themes.Default(**fonts),
        "css": CSS,
        "head": KEYS_SCRIPT,
        "max_file_size": limits.upload.max_bytes,
        "footer_links": [],
        "ssr_mode": False,
        "enable_monitoring": False,
    }
