"""The page says what the numbers say, and of a study that was not run that it was not."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies.plots import PLOTS, draw
from benchmarks.studies.report import TABLES, all_sections, rewrite, study_section, table
from benchmarks.studies.results import STUDIES, hardware, machines, read_results, write_results
from benchmarks.studies.settings import read_settings
from benchmarks.timing import describe_machine


ROOT = Path(__file__).parents[3]
MACHINE = {"date": "2026-01-02", "processor": "A Processor", "cores": 2, "torch": "2.13"}


def scores(level: float) -> dict:
    """Three walks about a level; the last one has no revisited frame."""
    walks = [level, level + 1, level + 2]
    by_walk = dict.fromkeys(("psnr", "psnr_first", "unseen", "gain", "sharpness", "repeated", "codec"), walks)
    return {"by_walk": {**by_walk, "revisited": [*walks[:2], None]}, "psnr_by_frame": [level] * 32}


def made_up(study: str) -> dict:
    """Results of a study in which each later variant, method, task and share scores 1 dB higher."""
    settings = read_settings(study)
    results = {"study": study, "smoke": False, "machine": MACHINE, "settings": settings.to_json(), "records": []}
    if study == "cache":
        for level, (name, mode) in enumerate(settings.modes.items()):
            if mode.is_long and mode.use_cache:
                facts = {"variant": name, "seed": 0, "share": 1, "task": "quality", "method": "plain"}
                results["records"].append({**facts, **scores(20)})
        results["timings"] = [
            {"mode": name, "num_frames": num_frames, "seconds": [num_frames / (level + 1)] * 3}
            for level, name in enumerate(settings.modes)
            for num_frames in settings.num_frames
        ]
        return results
    for seed in settings.seeds:
        for v, variant in enumerate(settings.variants):
            for s, share in enumerate(settings.budget.shares):
                for t, task in enumerate(settings.tasks):
                    for m, method in enumerate(settings.methods):
                        facts = {"variant": variant, "seed": seed, "share": share, "task": task, "method": method}
                        facts |= {"steps": 100 * (s + 1), "flops": 1e12 * (s + 1)}
                        results["records"].append({**facts, **scores(10 + v + s + t + m)})
    cost = {"tokens": 640, "parameters": 1.9, "gib": 1.5, "seconds": 0.5, "threads": 2, "seconds_in_training": None}
    results["costs"] = dict.fromkeys(settings.variants, cost) if settings.measures_cost else {}
    return results


def test_what_stands_between_marks_is_replaced_and_nothing_else():
    page = "a\n<!-- study: x -->\nold\n<!-- end of x -->\nb\n<!-- study: y -->\n<!-- end of y -->\nc\n"
    once = rewrite(page, {"x": "new\n\n\\1 lines"})
    assert once == (
        "a\n<!-- study: x -->\n\nnew\n\n\\1 lines\n\n<!-- end of x -->\nb\n<!-- study: y -->\n<!-- end of y -->\nc\n"
    )
    assert rewrite(once, {"x": "new\n\n\\1 lines"}) == once


@pytest.mark.parametrize("page", ["", "<!-- study: x -->\n<!-- end of x -->\n" * 2, "<!-- study: x -->\n"])
def test_a_section_without_its_marks_is_an_error(page):
    with pytest.raises(ValueError, match="needs the marks of 'x' once"):
        rewrite(page, {"x": "text"})


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_that_was_not_run_says_so_and_how_to(study, tmp_path):
    assert read_results(study, tmp_path) is None
    text = study_section(study, None, tmp_path)
    assert text.startswith("Not run yet: `python -m benchmarks.studies") and f" {study} --data_dir" in text


@pytest.mark.parametrize("study", STUDIES)
def test_numbers_come_back_from_their_file_as_they_were(study, tmp_path):
    results = made_up(study)
    path = write_results(results, tmp_path)
    assert path.name == f"{study}.json"
    assert read_results(study, tmp_path) == results
    assert max(map(len, path.read_text().splitlines())) < 2000


@pytest.mark.parametrize("study", STUDIES)
def test_a_section_names_size_machine_and_every_claim(study, tmp_path):
    text = study_section(study, made_up(study), tmp_path)
    assert "2026-01-02" in text and "A Processor" in text and f"`docs/results/{study}.json`" in text
    settings = read_settings(study)
    for comparison in [*settings.comparisons, *getattr(settings, "speed_claims", [])]:
        assert f"| {comparison.claim} | {comparison.paper} |" in text
    assert "![" not in text and "smoke" not in text
    assert "**A smoke test" in study_section(study, {**made_up(study), "smoke": True}, tmp_path)


def test_every_machine_that_made_numbers_is_named_once(tmp_path):
    here = hardware(describe_machine())
    assert machines({"records": []})["earlier_machines"] == []
    once = machines({"machine": MACHINE})
    assert once["earlier_machines"] == [MACHINE] and hardware(once["machine"]) == here
    again = machines({**once, "machine": {**MACHINE, "accelerator": "A GPU"}})
    assert [hardware(each) for each in again["earlier_machines"]] == ["A Processor, 2 cores", "A GPU"]
    assert machines(once)["earlier_machines"] == [MACHINE]  # this one is not an earlier one
    text = " ".join(study_section("memory", {**made_up("memory"), **again}, tmp_path).split())
    assert f"A Processor, 2 cores and A GPU and {here}, torch" in text
    assert f"torch 2.13 and {torch.__version__};" in text


def test_a_plot_is_shown_where_it_was_drawn(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "study-memory.png").touch()
    assert "(images/study-memory.png)" in study_section("memory", made_up("memory"), tmp_path / "images")


def test_verdicts_and_means_of_made_up_numbers(tmp_path):
    """Every variant after `far` is 1 dB better than the one before it, on every walk."""
    text = study_section("convergence", made_up("convergence"), tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| FAR ")]
    assert rows[0].endswith("| -1.00 ± 0.00 dB (by seed -1.00, -1.00, -1.00) | contradicted |")
    assert rows[1].endswith("| -3.00 ± 0.00 dB (by seed -3.00, -3.00, -3.00) | contradicted |")
    assert rows[2] == "| FAR | 11.00 ± 1.13 | 12.00 ± 1.13 | 13.00 ± 1.13 | 14.00 ± 1.13 | 15.00 ± 1.13 |"
    memory = study_section("memory", made_up("memory"), tmp_path)
    assert "| +4.00 ± 0.00 dB on revisited views | holds |" in memory
    assert "| +4.00 ± 0.00 dB on unseen views | contradicted |" in memory
    assert "| in full | 640 | 0.50 | not known | 1.50 |" in memory
    assert "| in full | 10.50 ± 0.98 |" in memory  # two of three walks


def test_speeds_of_made_up_numbers(tmp_path):
    """The mode number k takes 1 / k of the seconds of the first one."""
    text = study_section("cache", made_up("cache"), tmp_path)
    assert "| 2.0 times (2.0 to 2.0) | holds |" in text
    assert "| plain cache | 32.0 s (2.0x) | 64.0 s (2.0x) | 128.0 s (2.0x) |" in text
    assert "| +0.00 ± 0.00 dB | holds |" in text
    untimed = study_section("cache", {**made_up("cache"), "timings": []}, tmp_path)
    assert "times (" not in untimed and "Not timed yet." in untimed and "| +0.00 ± 0.00 dB | holds |" in untimed


def test_every_study_has_tables_and_those_with_claims_a_plot():
    assert set(TABLES) == set(STUDIES)
    assert set(PLOTS) == {study for study in STUDIES if read_settings(study).comparisons}
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize("study", PLOTS)
def test_plots_are_drawn(study, tmp_path):
    pytest.importorskip("matplotlib")
    draw(made_up(study), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_without_matplotlib_a_plot_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(RuntimeError, match="docs/requirements.txt"):
        draw(made_up("cache"), tmp_path / "plot.png")


@pytest.mark.full
def test_the_committed_page_is_that_of_the_committed_numbers():
    page = (ROOT / "docs" / "results.md").read_text()
    assert rewrite(page, all_sections(ROOT / "docs" / "results", ROOT / "docs" / "images")) == page
