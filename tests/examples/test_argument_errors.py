"""A wrong argument is answered before a script or a command imports what takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_far.commands.arguments import PARSERS


ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("examples", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "parse_args" in path.read_text()
]
SLOW = {"torch", "diffusers", "accelerate", "peft", "datasets", "gradio"}  # transformers makes flags of settings
RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("ended with", stop.code, "after importing", sorted({SLOW} & set(sys.modules)))
"""


FAR = f"""
import sys
from diffusers_far.commands import main
sys.argv = sys.argv[1:]
try:
    main()
except SystemExit as stop:
    print("ended with", stop.code, "after importing", sorted({SLOW} & set(sys.modules)))
"""


def call(script: Path, *arguments: str, code: str = RUN) -> tuple[str, str]:
    """The last line that a script prints, and what it says on stderr."""
    result = subprocess.run([sys.executable, "-c", code, script, *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.splitlines()[-1], result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_an_unknown_flag_is_refused_before_anything_slow_is_imported(script):
    end, message = call(script, "--no_such_flag")
    assert end == "ended with 2 after importing []"
    assert "error: " in message


def test_every_script_with_flags_is_among_them():
    names = {path.name for folder in ("examples", "scripts") for path in (ROOT / folder).glob("*.py")}
    assert names == {path.name for path in SCRIPTS}


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("--help",), 0, ""),
        ((), 2, "the following arguments are required: COMMAND"),
        (("paint",), 2, "invalid choice: 'paint'"),
        *[((command, "--help"), 0, "") for command in PARSERS],
        *[((command, "--no_such_flag"), 2, "error: ") for command in PARSERS],
    ],
)
def test_far_answers_help_and_wrong_arguments_before_anything_slow_is_imported(arguments, code, said):
    end, message = call("far", *arguments, code=FAR)
    assert end == f"ended with {code} after importing []"
    assert said in message and message.count("\n") == (1 if code else 0)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("train_far.py", ("--vae", "vae", "--output_dir", "out"), "give `--latents_dir` or `--dataset_name`"),
        ("train_far.py", ("--objective", "gan"), "invalid choice: 'gan'"),
        ("train_far_lora.py", ("--train_batch_size", "many"), "invalid int value: 'many'"),
        ("train_vae.py", ("recipe.yaml",), "the recipe 'recipe.yaml' cannot be read"),
        (
            "train_token_ar.py",
            ("--codes_dir", "c", "--vq", "v", "--model_config", "m", "--output_dir", "o", "--seed", "-1"),
            "`seed` is -1",
        ),
        ("evaluate.py", ("--protocol", "fid"), "invalid choice: 'fid'"),
        (
            "evaluate.py",
            ("--model", "m", "--dataset_name", "d", "--num_recent_frames", "-1"),
            "`num_recent_frames` is -1",
        ),
        ("prepare_dataset.py", ("--source", "zip"), "invalid choice: 'zip'"),
        ("generate.py", ("--model", "m", "--output", "o.mp4", "--fps", "fast"), "'fast' is not a number from 0.1"),
        ("app.py", ("--port", "0"), "'0' is not a whole number from 1"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_slow_is_imported(script, arguments, message):
    end, said = call(Path("examples") / script, *arguments)
    assert end == "ended with 2 after importing []" and message in said
