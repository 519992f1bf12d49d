"""The page: what is pressed goes to the visitor's rollout, and what it shows comes back."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ...data.media_files import MEDIA_SUFFIXES
from ...evaluation.media import write_frames
from .door import guards, keep_within
from .settings import Settings, WorldError, WorldLimits
from .starts import NOOP_NAMES, RecordedWalks, new_world, uploaded_start
from .view import CSS, scene_html
from .visitors import Turns, Visitor, VisitorStore
from .world import WorldModel


DEFAULT_FPS = 8.0
DOWNLOAD_SIDE = 256  # pixels that the shorter side of a download has at least
KEYS = {  # of a word in an action's name
    "up": "ArrowUp",
    "forward": "ArrowUp",
    "forwards": "ArrowUp",
    "down": "ArrowDown",
    "back": "ArrowDown",
    "backward": "ArrowDown",
    "backwards": "ArrowDown",
    "left": "ArrowLeft",
    "right": "ArrowRight",
    "do": "Space",
}
SIGNS = {"ArrowUp": "↑", "ArrowDown": "↓", "ArrowLeft": "←", "ArrowRight": "→"}

# One keyboard event presses one button. While it is being answered, Gradio passes over more presses of the same button.
KEYS_SCRIPT = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, textarea, select, [contenteditable], [role=listbox]")) return;
  const key = event.key === " " ? "Space" : event.key;
  const button = /^[A-Za-z0-9]+$/.test(key) && document.querySelector(`button.key-${key}`);
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
        # The model serves one caller at a time. Visitors' files are read and written beside it, so that nobody waits for
        # another's.
        self.turns, self.file_turns = (Turns(parts.limits.max_waiting) for _ in range(2))
        self.files = tempfile.TemporaryDirectory(prefix="far-app-")

    def begin_recorded(
        self, request: gr.Request, walk: int, frame: float, num_context: float, *settings: object
    ) -> tuple:
        """Start in a recording."""
        with shown_to_the_visitor(), self.visitors.starting(request.session_hash) as visitor:
            with self.turns.of(request.session_hash):
                start = self.parts.walks.start(walk, whole(frame), whole(num_context))
                visitor.begin(start, read_settings(settings))
                return self.seen_by(visitor)

    def begin_new(self, request: gr.Request, *settings: object) -> tuple:
        """Start from nothing."""
        with shown_to_the_visitor(), self.visitors.starting(request.session_hash) as visitor:
            with self.turns.of(request.session_hash):
                visitor.begin(new_world(self.parts.model.size), read_settings(settings))
                return self.seen_by(visitor)

    def begin_uploaded(self, request: gr.Request, path: str | None, num_context: float, *settings: object) -> tuple:
        """Start from the visitor's own clip or image."""
        with shown_to_the_visitor():
            if not path:
                raise WorldError("Choose a clip or an image first.")
            model = self.parts.model
            with self.visitors.starting(request.session_hash) as visitor:
                with self.file_turns.of(request.session_hash):
                    start = uploaded_start(path, model.size, whole(num_context), model.action_names, self.parts.limits)
                with self.turns.of(request.session_hash):
                    visitor.begin(start, read_settings(settings))
                    return self.seen_by(visitor)

    @contextmanager
    def turn_of(self, request: gr.Request) -> Iterator[Visitor]:
        """The visitor, in their turn at the model; one who has started nothing waits for none."""
        with shown_to_the_visitor():
            self.visitors.visitor(request.session_hash)
            with self.turns.of(request.session_hash):
                yield self.visitors.visitor(request.session_hash)

    def step(self, request: gr.Request, action: int | None, *settings: object) -> tuple:
        """Take an action, see the next frame."""
        with self.turn_of(request) as visitor:
            visitor.world.configure(read_settings(settings))
            visitor.world.step(action)
            return self.seen_by(visitor)

    def autoplay(self, request: gr.Request, *settings: object) -> tuple:
        """One step by itself; where there is none, autoplay is switched off rather than failing again and again."""
        try:
            with self.turn_of(request) as visitor:
                action = visitor.world.autoplay_action()
            return (*self.step(request, action, *settings), gr.skip(), gr.skip())
        except gr.Error as error:
            gr.Warning(error.message, title="Autoplay stopped")
            return gr.skip(), gr.skip(), False, gr.Timer(active=False)

    def rewind(self, request: gr.Request, num_frames: int) -> tuple:
        """Go back so many frames, or to the start where there are fewer."""
        with self.turn_of(request) as visitor:
            visitor.world.rewind(min(num_frames, visitor.world.num_new_frames) or num_frames)
            return self.seen_by(visitor)

    def fork(self, request: gr.Request) -> tuple:
        """Go on in a copy of the walk in view."""
        with self.turn_of(request) as visitor:
            visitor.fork()
            return self.seen_by(visitor)

    def show(self, request: gr.Request, branch: int) -> tuple:
        """Bring another of the visitor's walks into view."""
        with self.turn_of(request) as visitor:
            visitor.show(branch)
            return self.seen_by(visitor)

    def save(self, request: gr.Request) -> gr.File:
        """Write the walk in view as an mp4 to download."""
        with self.turn_of(request) as visitor:
            world = visitor.world
            frames, num_new_frames = world.frames, world.num_new_frames
        with shown_to_the_visitor(), self.file_turns.of(request.session_hash):
            path = self.new_download_folder() / f"rollout_{num_new_frames}_frames.mp4"
            side = min(frames.shape[1:3])
            scale = max(1, -(-DOWNLOAD_SIDE // side))
            write_frames(path, frames, self.parts.model.pipe.config.fps or DEFAULT_FPS, scale + scale % 2)
            return gr.File(str(path), visible=True)

    def new_download_folder(self) -> Path:
        """One for each request keeps two visitors from writing the same file."""
        limits = self.parts.limits
        keep_within(Path(self.files.name), limits.max_files, limits.max_file_bytes)
        return Path(tempfile.mkdtemp(dir=self.files.name))

    def leave(self, request: gr.Request) -> None:
        """Drop the walks of a visitor who closed the page."""
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


def build_app(handlers: Handlers) -> gr.Blocks:
    """The page."""
    parts = handlers.parts
    # The handlers take turns themselves: Gradio's line is first come, first served, whoever floods it.
    alone = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="diffusers-far", fill_width=True, analytics_enabled=False, delete_cache=(60, 600)) as app:
        gr.Markdown(
            "## Play in a world that a model makes up\n"
            "The keys that stand on the buttons, number keys, or the buttons; each press is one frame."
        )
        scene = gr.HTML(elem_id="scene")
        buttons = action_buttons(parts.model.action_names)
        with gr.Row():
            back_one = small_button("Back 1", "back-1", elem_classes="key-Backspace")
            back_many = small_button("Back 8", "back-8")
            fork = small_button("Fork", "fork")
            save = small_button("Make mp4", "save")
            new = small_button("New world", "new-world", visible=parts.model.size is not None)
        with gr.Row():
            autoplay = gr.Checkbox(label="Autoplay: the recorded way, then the last action again", elem_id="autoplay")
            branch = gr.Radio([], label="Branch", visible=False, elem_id="branch")
        download = gr.File(label="Download", interactive=False, visible=False, elem_id="download")
        with gr.Row():
            with gr.Column(min_width=280):
                num_context = slider(1, parts.limits.max_context_frames, 32, step=1, label="Frames of context")
                recorded = recorded_controls(parts.walks)
                upload = gr.File(
                    label=f"Your own clip or image, up to {parts.limits.upload.max_bytes // 2**20} MiB",
                    file_types=list(MEDIA_SUFFIXES),
                    height=150,
                    elem_id="upload",
                )
            with gr.Column(min_width=280):
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
        new.click(handlers.begin_new, settings, seen, **alone)
        upload.upload(handlers.begin_uploaded, [upload, num_context, *settings], seen, **alone)
        if recorded:
            *choice, begin = recorded
            begin.click(handlers.begin_recorded, [*choice, num_context, *settings], seen, **alone)
            app.load(handlers.begin_recorded, [*choice, num_context, *settings], seen, **alone)
        app.unload(handlers.leave)
    return app.queue(max_size=None, default_concurrency_limit=1, api_open=False)


def small_button(label: str, elem_id: str, **options: object) -> gr.Button:
    return gr.Button(label, size="sm", min_width=90, elem_id=elem_id, **options)


def action_buttons(action_names: list[str]) -> list[gr.Button]:
    """A button per action, with its keys."""
    buttons = []
    with gr.Row(elem_classes="far-actions"):
        for index, (name, keys) in enumerate(zip(action_names or ["next frame"], action_keys(action_names))):
            label = f"{SIGNS.get(keys[0], keys[0])}  {name}" if keys else name
            classes = [f"key-{key}" for key in keys]
            buttons.append(
                gr.Button(label, variant="primary", min_width=100, elem_id=f"action-{index}", elem_classes=classes)
            )
    return buttons


def action_keys(action_names: list[str]) -> list[list[str]]:
    """The keys of each action, the one that is shown first.

    An action whose name is a direction, or has one in it ("move_left"), has that arrow, and "do" the space bar; the first of
    several that mean the same key has it, plain names before others. One that does nothing ("noop") has 0, and all have the
    number key of their place, as far as there are such keys.

    Returns:
        `list[list[str]]`: As browsers name keys; of a model without actions those of the one button.
    """
    if not action_names:
        return [["ArrowUp", "1"]]
    words = [re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()) for name in action_names]
    keys: list[list[str]] = [[] for _ in action_names]
    taken = set()
    for index in sorted(range(len(words)), key=lambda index: len(words[index])):
        meant = {KEYS[word] for word in words[index] if word in KEYS}
        if "".join(words[index]) in NOOP_NAMES:
            meant = {"0"}
        if len(meant) == 1 and not meant <= taken:
            keys[index] += meant
            taken |= meant
    for index in range(len(keys)):
        if index < 9:
            keys[index].append(str(index + 1))
    if len(keys) > 9 and "0" not in taken:
        keys[9].append("0")
    return keys


def recorded_controls(walks: RecordedWalks | None) -> list:
    """Which recorded walk, from which frame, and the button; nothing without walks."""
    if walks is None:
        return []
    choices = [(title, index) for index, title in enumerate(walks.titles)]
    walk = gr.Dropdown(choices, value=0, label="Start in a recording", elem_id="walk")
    last = min(walks.num_frames) - 2
    first = min(100, max(last // 2, last - 32))  # true frames are left to follow
    frame = slider(0, last, first, step=1, label="At its frame", elem_id="frame")
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


def serve(parts: AppParts, allowed_hosts: Iterable[str] = (), **address: object) -> gr.Blocks:
    """Build the page and serve it.

    Args:
        parts ([`AppParts`]).
        allowed_hosts (iterable of `str`): Names that the page is served as, beside those of this machine, see [`guards`].
        address: As for `gr.Blocks.launch`: `server_name`, `server_port`, `prevent_thread_lock`.
    """
    handlers, limits = Handlers(parts), parts.limits
    middleware = guards(handlers.visitors, limits, Path(handlers.files.name), allowed_hosts)
    # A folder of its own, whose size can be bounded; Gradio has no other way to name it.
    os.environ["GRADIO_TEMP_DIR"] = handlers.files.name
    # After each call Gradio would sum up the last 10,000 with pandas, for a page of figures that is off here.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    app = build_app(handlers)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    app.launch(
        theme=gr.themes.Default(**fonts),
        css=CSS,
        head=KEYS_SCRIPT,
        max_file_size=limits.upload.max_bytes,
        max_threads=2 * limits.max_visitors * limits.max_waiting + 8,  # who waits for a turn holds a thread
        app_kwargs={"middleware": middleware},
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        **address,
    )
    return app
