"""`plan_crafter.py`: distances and ways are right, plans lead to goals in the true world, and figures can be made again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("crafter")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import plan_crafter  # noqa: E402
from plan_crafter import IN_MODEL, IN_WORLD, WALKERS, Walk, distance, moves_needed  # noqa: E402

from diffusers_far import FARPipeline  # noqa: E402
from diffusers_far.evaluation.tiles import COLUMNS, MATERIALS, MOVES, PLAYER, ROWS  # noqa: E402


CRAFTER = ROOT / "checkpoints" / "far-crafter"
GRASS, TREE = MATERIALS.index("grass"), MATERIALS.index("tree")


def arguments(*more: str, model=CRAFTER):
    return plan_crafter.parse_args(["--model", str(model), *more])


def test_a_distance_is_that_to_the_nearest_tile_but_for_the_one_under_the_player():
    tiles = np.full((3, COLUMNS, ROWS), GRASS)
    tiles[0, 2, 4] = tiles[0, 7, 5] = tiles[1, 4, 2] = tiles[2][PLAYER] = TREE
    assert distance(tiles, "tree").tolist() == [3, 1, plan_crafter.OUT_OF_VIEW]


def test_the_moves_that_are_needed_are_those_around_what_is_in_the_way():
    class World:
        position = (0, 0)

        def material(self, place):
            return {(3, 0): "tree", (1, 0): "water", (1, 1): "water"}.get(tuple(place), "grass")

    assert moves_needed(World(), "water", 9) == 0
    assert moves_needed(World(), "tree", 9) == 4  # up, three times to the right: then it is below
    assert moves_needed(World(), "tree", 3) is None and moves_needed(World(), "coal", 5) is None


def test_who_plans_in_the_true_world_reaches_a_goal_and_leaves_the_world_as_it_was_while_planning():
    args = arguments("--area", "16", "--num_plans", "8", "--num_rounds", "2", "--horizon", "5")
    result, walk = next(plan_crafter.worlds_with_goals(args))
    assert 3 <= result["moves_needed"] <= 8
    before = walk.world.render()
    plan_crafter.try_out(walk.world, np.array([[0, 0, 1], [2, 3, 3]]))
    assert np.array_equal(walk.world.render(), before)
    planner = plan_crafter.walkers(None, result["goal"], args)[IN_WORLD](np.random.default_rng(0))
    num_frames = len(walk.frames)
    assert walk.reaches(result["goal"], args.num_moves, planner)
    assert result["moves_needed"] <= len(walk.frames) - num_frames <= args.num_moves
    assert distance(walk.world.tiles(), result["goal"]) == 1


def test_a_walk_ends_after_its_moves_where_no_goal_is_reached():
    walk = Walk(2_000_000, 16, 4)
    assert not walk.reaches("diamond", 5, lambda walk: [MOVES[0], MOVES[1]])
    assert len(walk.frames) == 4 + 5 and walk.actions[-5:] == [0, 1, 0, 1, 0]


def test_the_shipped_model_imagines_what_plans_lead_to_from_the_same_moment_again_and_again():
    pipe = FARPipeline.from_pretrained(CRAFTER)
    walk, plans = Walk(2_000_000, 32, 4), np.array([[0, 0], [1, 3], [2, 2]])
    past = {"video": np.stack(walk.frames), "actions": walk.actions, "output_type": "np", "num_inference_steps": 2}
    session = pipe.start_session(**past, generator=torch.Generator().manual_seed(0))
    imagined, true = plan_crafter.imagine(session, plans), plan_crafter.try_out(walk.world, plans)
    assert imagined.shape == true.shape == (3, 2, COLUMNS, ROWS)
    assert (imagined == true)[..., plan_crafter.TO_TILES > 0].mean() > 0.9
    assert np.array_equal(plan_crafter.imagine(session, plans), imagined)


@pytest.mark.parametrize("flag, values", [("--moves_needed", ("5", "4")), ("--num_best", ("12",))])
def test_settings_that_fit_nothing_are_refused_before_a_model_is_loaded(flag, values):
    with pytest.raises(ValueError, match=f"`{flag}` is"):
        plan_crafter.main(arguments(flag, *values, model="nowhere"))


@pytest.mark.full
def test_the_example_prints_and_writes_the_same_figures_again(tmp_path, capsys):
    small = (
        "--num_worlds 2 --num_plans 3 --num_best 1 --num_rounds 1 --horizon 2 --num_moves 4 --num_walkers 3".split()
    )
    written = []
    for name in ("one.json", "two.json"):
        output = tmp_path / name
        plan_crafter.main(arguments(*small, "--output", str(output)))
        written.append((json.loads(output.read_text()), capsys.readouterr().out))
    (results, printed), again = written
    assert again == (results, printed)
    assert len(results["worlds"]) == 2 and set(results["reached"]) == set(WALKERS)
    assert f"{IN_MODEL}: {results['reached'][IN_MODEL]['mean']:.2f}" in printed
