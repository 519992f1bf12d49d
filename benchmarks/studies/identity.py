"""What numbers of a study depend on, so that those of different settings are never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers_far.evaluation.results import check_same
from diffusers_far.files import written_whole

from .settings import CacheSettings, StudySettings


CLAIMS = {"comparisons", "speed_claims"}
TRAININGS = {"starts", "variants"}


def identity(settings: Mapping) -> dict:
    """What the numbers of one seed depend on: of a study's settings as JSON, all but the seeds and the claims, which may be
    worded anew."""
    return {name: value for name, value in settings.items() if name not in ("seeds", *CLAIMS)}


def check_settings(found: Mapping, settings: StudySettings | CacheSettings, place: str) -> dict:
    """Refuse to mix numbers of different settings. Variants may be added to a study or leave it, as each is trained and
    measured by itself.

    Args:
        found (`Mapping`): Settings as JSON that numbers were made by, those of all variants that there are numbers of; what
            they do not name, being older, had its default.
        settings ([`StudySettings`] or [`CacheSettings`]): That are asked for.
        place (`str`): Of what was found; named in the error.

    Returns:
        `dict`: The identity of both together.

    Raises:
        ValueError: Says in what they differ.
    """
    wanted = settings.to_json()
    complete = type(settings).of(settings.name, {**wanted, **found, **dict.fromkeys(CLAIMS & wanted.keys(), [])})
    # By way of JSON, where there are no tuples.
    known, wanted = (identity(json.loads(json.dumps(each))) for each in (complete.to_json(), wanted))
    both = {group: {**known[group], **wanted[group]} for group in TRAININGS & wanted.keys()}
    for group in both:
        shared = sorted(known[group].keys() & wanted[group].keys())
        for each in (known, wanted):
            each[group] = {name: each[group][name] for name in shared}
    check_same(known, wanted, place)
    return {**wanted, **both}


def keep_settings(settings: StudySettings | CacheSettings, folder: Path) -> None:
    """Remember in a work folder what its study is: what is measured may not change halfway.

    Raises:
        ValueError: The folder holds a study of other settings.
    """
    file = folder / "settings.json"
    kept = identity(settings.to_json())
    if file.exists():
        kept = check_settings(json.loads(file.read_text()), settings, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(kept, indent=2) + "\n")
