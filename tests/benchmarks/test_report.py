"""The tables of the page are those of the committed results."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

from benchmarks.measurement import Measurement, Row
from benchmarks.report import filled, main, parse_args, sections


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "speed.md"
RESULTS = [ROOT / "docs" / "results" / f"{name}.json" for name in ("rollout", "step", "frame", "benchmarks", "gpu")]
RESULTS = [file for file in RESULTS if file.is_file()]  # not everybody has a GPU
MACHINE = {
    "date": "2026-01-01",
    "processor": "some",
    "cores": 2,
    "threads": 2,
    "memory": "8 GiB",
    "python": "3.11",
    "torch": "2.13",
    "diffusers": "0.42",
}


def results() -> dict:
    rows = [Row("step", {"frames": number}, {"FAR": Measurement((1.0, 2.0), "s")}) for number in (3, 5)]
    return {"machine": MACHINE, "seed": 0, "num_rounds": 2, "rows": [row.to_json() for row in rows]}


def test_marked_places_are_filled_and_what_is_not_measured_stays_empty():
    page = (
        "# Speed\n\n<!-- benchmarks: machine -->\n<!-- end of machine -->\n\n<!-- benchmarks: step -->\nold\n"
        "<!-- end of step -->\n\n<!-- benchmarks: frame -->\nold\n<!-- end of frame -->\n\nprose\n"
    )
    once = filled(page, sections(results()))
    assert once == (
        "# Speed\n\n<!-- benchmarks: machine -->\n\n2026-01-01, some, 2 cores, 2 threads, 8 GiB of memory; Python 3.11, torch "
        "2.13, diffusers 0.42; seed 0, 2 rounds (fewer of what takes long).\n\n<!-- end of machine -->\n\n"
        "<!-- benchmarks: step -->\n\n| frames | FAR |\n| --- | --- |\n| 3 | 1.5 s |\n| 5 | 1.5 s |\n\n<!-- end of step -->\n\n"
        "<!-- benchmarks: frame -->\n<!-- end of frame -->\n\nprose\n"
    )
    assert filled(once, sections(results())) == once


def test_a_gpu_has_a_line_of_its_own():
    on_gpu = {**results(), "gpu": {"name": "Some GPU", "memory": "80 GiB", "cuda": "13.0"}}
    assert sections(on_gpu)["gpu_machine"].startswith("2026-01-01, Some GPU with 80 GiB, CUDA 13.0; some, 2 cores")
    assert "machine" not in sections(on_gpu)


def run_report(*arguments) -> None:
    with patch.object(sys, "argv", ["report", *map(str, arguments)]):
        main(parse_args())


def test_the_same_results_make_the_same_report(tmp_path, capsys):
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    file.write_text(json.dumps(results()))
    printed = []
    for _ in range(2):
        run_report(file)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "| 5 | 1.5 s |" in printed[0]
    page.write_text("<!-- benchmarks: step -->\n<!-- end of step -->\n")
    run_report(file, "--page", page)
    first = page.read_text()
    run_report(file, "--page", page)
    assert page.read_text() == first and "| 5 | 1.5 s |" in first


def test_where_several_files_have_the_same_the_first_one_counts(tmp_path, capsys):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    files[0].write_text(json.dumps(results()))
    later = {**results(), "num_rounds": 9}
    later["rows"] = [{**row, "case": case} for case in ("step", "frame") for row in later["rows"]]
    later["rows"][0]["settings"] = {"frames": 77}
    files[1].write_text(json.dumps(later))
    run_report(*files)
    printed = capsys.readouterr().out
    assert "2 rounds" in printed and "9 rounds" not in printed
    assert "77" not in printed and "## frame" in printed


def test_the_page_shows_the_committed_results():
    contents = {}
    for file in reversed(RESULTS):
        contents |= sections(json.loads(file.read_text()))
    page, names = PAGE.read_text(), " ".join(f"docs/results/{file.name}" for file in RESULTS)
    assert filled(page, contents) == page, f"run: python -m benchmarks.report {names} --page docs/speed.md"


def test_the_page_has_a_place_for_every_case():
    from benchmarks.cases import CASES
    from benchmarks.gpu import PARTS

    page = PAGE.read_text()
    on_gpu = [f"gpu_{name}" for name in ("machine", *PARTS)]
    for name in ("machine", *CASES, *on_gpu):
        assert page.count(f"<!-- benchmarks: {name} -->") == page.count(f"<!-- end of {name} -->") == 1, name
