"""The card of a finished run, and the way of its folder to the Hub."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import create_repo, upload_folder

from ..files import written_whole
from ..pipelines.hub import card_on_hub
from .config import FARSettings


logger = logging.get_logger(__name__)

README = "README.md"
# Of a run's folder: what serves to go on with the run, not to use its result.
NOT_UPLOADED = ("checkpoint-*", "replaced-*", "unfinished-*", "validation/*", "*/.*", ".*")

# The last line of a card that a run wrote. As long as the hash is that of the text, nobody has edited it.
_SIGNATURE = re.compile(
    r"\n<!-- Written by diffusers-far ([0-9a-f]{16}); once it is edited it is kept as it is. -->\n*\Z"
)

REPORTED = {
    "loss": "held-out loss",
    "psnr_of_frame_1": "PSNR of the first predicted frame, dB",
    "psnr": "PSNR, mean of the predicted frames, dB",
    "repeated_psnr": "the same of repeating the last frame, dB",
    "vae_psnr": "the VAE's reconstruction against the true frames, dB",
}


def known_metadata(settings: FARSettings, *, relation: str) -> dict[str, Any]:
    """What a run's card tells the Hub of licence, data sets and base model: what was said, or is named by its id on the
    Hub, and nothing that is not known.

    Args:
        settings ([`FARSettings`]): Of a script.
        relation (`str`): Of the result to the model that training starts from: `"finetune"` or `"adapter"`.
    """

    def on_hub(name: str | None) -> str | None:
        # The name of a folder would link to whatever repo is called so.
        return None if name is None or Path(name).exists() else name

    dataset, start = on_hub(settings.dataset_name), on_hub(settings.pretrained_model_name_or_path)
    base_model = settings.base_model_id or start
    known = {
        "license": settings.license,
        "datasets": settings.dataset_ids or ([dataset] if dataset else None),
        "base_model": base_model,
        "base_model_relation": relation if base_model else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def results_section(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, sample: str | None = None
) -> str:
    """The part of a card that says how good the model is.

    Args:
        before (`dict`, *optional*), after (`dict`, *optional*): Metrics of a [`Measurement`] without and with the
            training; `None`: not measured.
        sample (`str`, *optional*): A video file beside the card: truth on the left, prediction on the right.
    """
    measured = {heading: metrics for heading, metrics in (("before", before), ("after", after)) if metrics is not None}
    lines = ["## Results", ""]
    if not measured:
        lines += ["Not measured: the run had no validation split."]
    else:
        lines += ["Held-out trajectories; PSNR against the VAE's reconstruction of the true frames.", ""]
        lines += [f"| | {' | '.join(measured)} |", "|---" * (1 + len(measured)) + "|"]
        for name, heading in REPORTED.items():
            if all(name in metrics for metrics in measured.values()):
                values = " | ".join(f"{metrics[name]:.4g}" for metrics in measured.values())
                lines += [f"| {heading} | {values} |"]
    if sample is not None:
        lines += [
            "",
            "Truth on the left, prediction on the right:",
            "",
            f'<video controls loop src="{sample}"></video>',
        ]
    return "\n".join(lines) + "\n"


def signed(card: str) -> str:
    """The card with a last line by which `is_unedited` knows it again."""
    text = card.rstrip("\n") + "\n"
    return f"{text}\n<!-- Written by diffusers-far {_digest(text)}; once it is edited it is kept as it is. -->\n"


def is_unedited(card: str) -> bool:
    """Whether a card is as a run wrote it, down to the letter."""
    match = _SIGNATURE.search(card)
    return match is not None and _digest(card[: match.start()]) == match[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(folder: str | Path, card: str) -> bool:
    """Write `card` as the README.md of a folder, unless there is one that was edited.

    A card that an earlier launch of the run wrote is replaced: it tells of an earlier step.

    Returns:
        `bool`: Whether it was written.
    """
    readme = Path(folder) / README
    if readme.exists() and not is_unedited(readme.read_text(encoding="utf-8")):
        logger.warning(f"{str(readme)!r} was edited and is kept; what this run has to say is not in it.")
        return False
    with written_whole(readme) as unfinished:
        unfinished.write_text(signed(card), encoding="utf-8")
    return True


def open_repo(output_dir: str | Path, hub_model_id: str | None, token: str | None = None) -> str:
    """Create the repo that a run will be uploaded to, if it does not exist, before the run: so a missing token stops
    it at once and not at its end.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        hub_model_id (`str`, *optional*): The repo; by default the folder's name in the user's namespace.
        token (`str`, *optional*): By default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        `str`: The repo's full id.
    """
    return create_repo(hub_model_id or Path(output_dir).resolve().name, exist_ok=True, token=token).repo_id


def push_folder(
    folder: str | Path, repo_id: str, *, commit_message: str, logging_dir: str = "logs", token: str | None = None
) -> str:
    """Upload the result of a run, a pipeline or an adapter, without its checkpoints and logs.

    A README.md that the repo has is replaced only where a run wrote it and nobody has edited it since.

    Args:
        folder (`str` or `Path`): The run's folder.
        repo_id (`str`): An existing repo.
        commit_message (`str`): Of the upload.
        logging_dir (`str`): Of the logs, which stay here.
        token (`str`, *optional*): As for `open_repo`.

    Returns:
        `str`: The commit's address.
    """
    ignored = [*NOT_UPLOADED, f"{os.path.relpath(Path(folder) / logging_dir, folder)}/*"]
    card = card_on_hub(repo_id, token=token)
    if card is not None and not is_unedited(card):
        ignored.append(README)
        logger.warning(f"The README.md of {repo_id!r} was edited and is kept; what this run has to say is not in it.")
    commit = upload_folder(
        repo_id=repo_id, folder_path=str(folder), ignore_patterns=ignored, commit_message=commit_message, token=token
    )
    return commit.commit_url
