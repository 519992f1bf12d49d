"""What a change must pass, and what it must not skip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chromium import chromium


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("is_required, outcome", [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_without_a_browser_tests_of_pages_are_skipped_unless_one_is_required(monkeypatch, is_required, outcome):
    monkeypatch.setenv("REQUIRE_CHROMIUM", is_required)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(outcome, match="There is no Chromium"):
        with chromium():
            pass


def run_ci(folder: Path, user: int, commands: dict[str, str]) -> tuple[int, list[str]]:
    """The exit status of `.ci/run` where only `commands` exist, and what it called."""
    (folder / "bin").mkdir()
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    calls = folder / "calls"
    note = f'echo "$(basename "$0") $* ${{REQUIRE_CHROMIUM:+with a browser}}" >> {calls}'
    for name, body in {"make": "", "id": f"echo {user}", **commands}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{note if name != 'id' else ''}\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    for name in ("bash", "sh", "dirname", "basename", "rm", "chmod", "echo"):
        (folder / "bin" / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(folder / "bin"), "HOME": os.environ["HOME"]}
    status = subprocess.run([shutil.which("bash"), folder / ".ci" / "run"], env=environment).returncode
    return status, [call.strip() for call in calls.read_text().splitlines()]


TESTS = ["make demo", "make test", "make test-full"]
INSTALL = ["apt-get update -qq", "apt-get install -y -qq --no-install-recommends chromium"]


@pytest.mark.full
@pytest.mark.parametrize(
    "user, has_apt, has_chromium, installs, requires",
    [
        (0, True, False, True, True),
        (0, True, True, False, True),
        (0, False, False, False, False),
        (1000, True, False, False, False),
        (1000, False, True, False, True),
    ],
)
def test_ci_installs_a_browser_where_it_can_and_then_skips_no_test_of_pages(
    tmp_path, user, has_apt, has_chromium, installs, requires
):
    installed = tmp_path / "bin" / "chromium"
    apt = f'case "$*" in install*) echo "#!/bin/sh" > {installed}; chmod +x {installed};; esac'
    commands = ({"apt-get": apt} if has_apt else {}) | ({"chromium": ""} if has_chromium else {})
    status, calls = run_ci(tmp_path, user, commands)
    tests = [f"{call} with a browser" for call in TESTS] if requires else TESTS
    assert status == 0 and calls == ["make lint", *(INSTALL if installs else []), *tests]


@pytest.mark.full
def test_ci_fails_if_the_browser_cannot_be_installed(tmp_path):
    status, calls = run_ci(tmp_path, 0, {"apt-get": "exit 1"})
    assert status != 0 and "make test" not in calls
