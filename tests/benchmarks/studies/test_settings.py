"""The committed settings are whole, and what contradicts itself is refused before anything is run."""

import json
from dataclasses import replace

import pytest

from benchmarks.studies.data import DataFolder, read_data_settings
from benchmarks.studies.identity import check_settings, identity, keep_settings
from benchmarks.studies.results import STUDIES
from benchmarks.studies.settings import (
    MOST_REVISITS,
    CacheSettings,
    StudySettings,
    merge,
    read_settings,
)
from benchmarks.studies.study import Study


NUM_WALK_FRAMES = 300  # of make_maze_dataset.py, where nothing else is said

MINIMAL = {
    "seeds": [0],
    "latent_size": 8,
    "transformer": {"num_layers": 1},
    "training": {"num_frames": 4, "train_batch_size": 2},
    "variants": {"a": {"label": "A"}, "b": {"label": "B"}},
    "budget": {"steps": 4, "shares": [0.5, 1]},
    "tasks": {"half": {"label": "half", "num_context_frames": 2, "num_frames": 2, "first_new_frame": 4}},
    "evaluation": {"num_walks": 2, "num_inference_steps": 1},
    "comparisons": [
        {"claim": "A wins", "paper": "so", "higher": {"variant": "a"}, "lower": {"variant": "b"}, "metric": "psnr"}
    ],
}


@pytest.mark.parametrize("smoke", [False, True], ids=["whole", "smoke"])
@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_settings_fit_the_walks(study, smoke):
    settings, mazes = read_settings(study, smoke=smoke), read_data_settings(smoke=smoke)["mazes"]
    num_frames = mazes.get("num_frames", NUM_WALK_FRAMES)
    assert settings.evaluation.num_walks <= mazes[f"num_{settings.evaluation.split}"]
    assert bool(settings.comparisons) == (settings.evaluation.split == "test")  # claims are judged on test walks alone
    tasks = [settings.task] if isinstance(settings, CacheSettings) else settings.tasks.values()
    for task in tasks:
        first = task.history if task.first_new_frame == MOST_REVISITS else task.first_new_frame
        assert first + task.num_frames <= num_frames
    if isinstance(settings, StudySettings):
        assert settings.training["num_frames"] <= num_frames


def test_a_study_over_lengths_says_where_its_tasks_stand():
    for study in ("memory", "compression"):
        assert all(task.length == task.num_context_frames for task in read_settings(study).tasks.values())
    extrapolation = read_settings("extrapolation")
    for task in extrapolation.tasks.values():
        assert task.length == task.num_context_frames + task.num_frames
    assert {task.length / 16 for task in extrapolation.tasks.values()} == {1, 2, 4, 8, 16}
    assert extrapolation.training["num_frames"] == 16


@pytest.mark.parametrize("study", ["memory", "compression"])
def test_the_longest_context_of_a_study_of_memory_fits_its_training(study):
    settings = read_settings(study)
    longest = max(task.num_context_frames + task.num_frames for task in settings.tasks.values())
    assert longest <= settings.training["num_frames"]


def test_models_that_are_compared_by_their_compression_are_trained_alike():
    settings = read_settings("compression")
    assert len({json.dumps(each.arguments) for each in settings.starts.values()}) == 1
    trained = {name: variant for name, variant in settings.variants.items() if variant.script is not None}
    for name, variant in trained.items():
        assert variant.arguments is None
        assert variant.starts_from == ("kernel2_start_4" if name == "kernel2_longer" else f"{name}_start")


def test_the_compressed_model_that_is_trained_for_longer_takes_no_more_operations_than_the_whole_one(tmp_path):
    settings = read_settings("compression")
    study = Study(settings, DataFolder(tmp_path), tmp_path)
    longer, whole = (
        study.training_run(name, 0).flops(settings.budget.steps) for name in ("kernel2_longer", "kernel1")
    )
    assert 0.95 * whole < longer < whole


def test_minimal_settings_are_enough():
    settings = StudySettings.of("minimal", MINIMAL)
    assert list(settings.methods) == ["plain"] and settings.variants["a"].script == "train_far"
    higher, lower = settings.comparisons[0].sides
    assert higher == {"share": 1, "variant": "a"} and lower == {"share": 1, "variant": "b"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sedes": [0]}, "`minimal` has sedes; it takes name, seeds"),
        ({"latent_size": None}, "`minimal` lacks latent_size"),
        ({"seeds": [0, 0]}, r"`seeds` is \[0, 0\]"),
        ({"variants": {"a": None, "b": None}}, "`variants` is empty"),
        ({"variants": {"a": {"script": "train_vae"}}}, "`variants.a`: `script` is 'train_vae'"),
        ({"variants": {"a": {"colour": "red"}}}, "`variants.a` has colour; it takes label"),
        ({"budget": {"steps": 0}}, "`budget`: `steps` is 0"),
        ({"budget": {"shares": [0.5]}}, "`budget`: `shares` is"),
        ({"budget": {"shares": [1, 0.5]}}, "`budget`: `shares` is"),
        ({"budget": {"variant": "c"}}, "`budget.variant` is 'c'; the variants are a, b"),
        ({"tasks": {"half": {"num_frames": 0}}}, "`num_frames` 0; both are at least 1"),
        ({"tasks": {"half": {"first_new_frame": 1}}}, "only 1 frames come before"),
        ({"tasks": {"half": {"first_new_frame": "last"}}}, "`first_new_frame` is 'last'"),
        ({"tasks": {"half": {"first_new_frame": MOST_REVISITS}}}, "only 0 frames come before"),
        ({"methods": {"x": {"label": "X", "kind": "magic"}}}, "`methods.x`: `kind` is 'magic'"),
        ({"methods": {"x": {"label": "X", "kind": "decay"}}}, "a slope above 0 is for 'decay' alone"),
        ({"methods": {"x": {"label": "X", "slope": 0.1}}}, "a slope above 0 is for 'decay' alone"),
        ({"evaluation": {"num_walks": 0}}, "`evaluation`: `num_walks` is 0"),
        ({"evaluation": {"split": "train"}}, "`evaluation`: `split` is 'train'"),
        ({"variants": {"a": {"script": "train_token_ar", "knows_pose": True}}}, "`variants.a`: `knows_pose` is True"),
        ({"variants": {"a": {"script": "train_token_ar", "starts_from": "b"}}}, "`variants.a`: `starts_from` is 'b'"),
        ({"variants": {"a": {"checkpoint": "x"}}}, "`variants.a`: `checkpoint` is 'x' and `script` 'train_far'"),
        ({"variants": {"a": {"starts_from": "b"}}}, "`variants.a` starts from 'b'; those before it are "),
        ({"variants": {"b": {"starts_from": "a", "model": {"num_layers": 2}}}}, "starts from 'a', whose `model` is"),
        ({"variants": {"b": {"starts_from": "a", "knows_pose": True}}}, "starts from 'a', whose `knows_pose` is"),
        ({"starts": {"a": {"label": "A"}}}, "`starts` and `variants` both have a"),
        ({"starts": {"s": {"starts_from": "a", "label": "S"}}}, "`starts.s` starts from 'a'; those before it are "),
        ({"variants": {"c": {"label": "C", "script": None}}, "budget": {"variant": "a"}}, "no equal budget"),
        ({"evaluation": {"max_recent_age": 32}}, "`max_recent_age` is 32 and `min_revisit_age` 32"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        StudySettings.of("minimal", merge(MINIMAL, overrides))


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        ({"lower": {"variant": "c"}}, "names the variant 'c'; there are a, b"),
        ({"lower": {}}, "leaves the variant open; name one of a, b"),
        ({"lower": {"variant": "b", "share": 0.25}}, "names the share 0.25; there are 0.5, 1"),
        ({"lower": {"variant": "b", "colour": "red"}}, "has colour; it takes variant"),
        ({"metric": "beauty"}, "`metric` is 'beauty'"),
        ({"margin": -1.0}, "`margin` is -1.0"),
    ],
)
def test_a_claim_that_nothing_measures_is_refused(comparison, message):
    values = merge(MINIMAL, {"comparisons": [{**MINIMAL["comparisons"][0], **comparison}]})
    with pytest.raises(ValueError, match=message):
        StudySettings.of("minimal", values)


def test_claims_of_the_cache_study_name_its_modes(tmp_path):
    values = json.loads(json.dumps(read_settings("cache").to_json()))
    del values["name"]
    values["speed_claims"][0]["faster"] = "magic"
    with pytest.raises(ValueError, match="names the mode magic; there are none, plain"):
        CacheSettings.of("cache", values)


def test_overrides_replace_key_by_key_and_none_removes():
    values = {"a": {"b": 1, "c": 2}, "d": [1], "e": 3}
    assert merge(values, {"a": {"b": None, "x": 9}, "d": [2], "e": None}) == {"a": {"c": 2, "x": 9}, "d": [2]}
    assert values == {"a": {"b": 1, "c": 2}, "d": [1], "e": 3}


def test_a_work_folder_belongs_to_one_study_whose_claims_may_be_worded_anew(tmp_path):
    settings = StudySettings.of("minimal", MINIMAL)
    keep_settings(settings, tmp_path)
    keep_settings(StudySettings.of("minimal", merge(MINIMAL, {"comparisons": []})), tmp_path)
    with pytest.raises(ValueError, match="`budget.steps` was 4 and is 5"):
        keep_settings(StudySettings.of("minimal", merge(MINIMAL, {"budget": {"steps": 5}})), tmp_path)


@pytest.mark.parametrize("group", ["starts", "variants"])
def test_variants_may_be_added_to_a_work_folder_and_leave_it_but_not_change(group, tmp_path):
    def keep(**variants):
        groups = {"starts": {}, "variants": {"z": {"label": "Z"}}}
        groups[group] = merge({"a": {"label": "A"}, "b": {"label": "B"}}, variants)
        keep_settings(StudySettings.of("minimal", {**MINIMAL, **groups, "comparisons": []}), tmp_path)

    keep()
    keep(c={"label": "C"})
    keep(a=None)
    with pytest.raises(ValueError, match=f"`{group}.a` was "):
        keep(a={"arguments": {"teacher_forcing": True}})
    with pytest.raises(ValueError, match=f"`{group}.c` was "):
        keep(c={"label": "C", "knows_pose": True})


@pytest.mark.parametrize("study", STUDIES)
def test_settings_from_before_a_new_setting_had_its_default(study):
    settings = read_settings(study)
    found = json.loads(json.dumps(settings.to_json()))
    for variant in found.get("variants", {}).values():
        if variant["starts_from"] is None:
            del variant["starts_from"]
    if not found.get("starts"):
        found.pop("starts", None)
    del found["evaluation"]["split"]
    settings = replace(settings, evaluation=replace(settings.evaluation, split="test"))
    assert check_settings(found, settings, "here") == json.loads(json.dumps(identity(settings.to_json())))
