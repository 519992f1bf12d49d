"""Plan in the model, walk in the world: is a model of Crafter good enough to find the way to a tree?

    python examples/plan_crafter.py --model checkpoints/far-crafter --num_worlds 30 --output plan.json

Each world of Crafter has a goal, a material in view, and somebody has `--num_moves` moves to stand beside such a tile. The
cross-entropy method plans in the model: it draws plans, lets the model draw their futures, reads the tiles of the drawn frames,
and draws the next plans nearer to those that came closest. The first moves of the best plan are taken in the true Crafter, then it
is planned anew. Beside it walk a planner that tries its plans in the true world, a wanderer, and one who moves at random. Needs
the extra `worlds`.
"""

import argparse
import json
import logging
from pathlib import Path

from diffusers_far.command_line import HelpWithDefaults, set_up_logging, whole_number


logger = logging.getLogger(__name__)

GOALS = ("tree", "water", "stone", "coal", "iron")
IN_MODEL, IN_WORLD, WANDERS, AT_RANDOM = "plans in the model", "plans in the true world", "wanders", "moves at random"
WALKERS = (IN_MODEL, IN_WORLD, WANDERS, AT_RANDOM)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    count = whole_number(1, 1000)
    parser.add_argument(
        "--model", default="checkpoints/far-crafter", help="A FAR pipeline that was trained on Crafter."
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    parser.add_argument("--num_worlds", type=count, default=30)
    parser.add_argument("--num_moves", type=count, default=12, help="To reach a goal in.")
    parser.add_argument("--moves_needed", type=count, nargs=2, default=[3, 8], help="On the shortest way to a goal.")
    parser.add_argument("--num_context_frames", type=count, default=8, help="Frames of a wanderer before it begins.")
    parser.add_argument("--horizon", type=count, default=6, help="Moves of a plan.")
    parser.add_argument("--moves_between_plans", type=count, default=4)
    parser.add_argument("--num_rounds", type=count, default=2, help="Of the cross-entropy method, for each plan.")
    parser.add_argument("--num_plans", type=count, default=12, help="Tried in each round.")
    parser.add_argument("--num_best", type=count, default=3, help="Plans that the next round is drawn from.")
    parser.add_argument("--num_inference_steps", type=count, default=2, help="Of a frame.")
    parser.add_argument(
        "--num_walkers", type=count, default=20, help="Wanderers, and walkers at random, in each world."
    )
    parser.add_argument("--area", type=whole_number(8, 256), default=32, help="Tiles along each side of a world.")
    parser.add_argument("--seed", type=whole_number(0, 2**31), default=2_000_000, help="Of the first world.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()  # before the imports that take seconds: a wrong argument is answered at once

import copy
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from crafter_world.game import CrafterWorld
from crafter_world.walkers import place_after

from diffusers_far import FARPipeline, FARSession
from diffusers_far.evaluation.metrics import Estimate
from diffusers_far.evaluation.tiles import (
    COLUMNS,
    MATERIALS,
    MOVES,
    PLAYER,
    ROWS,
    SAFE_TO_WALK,
    STEPS,
    Wanderer,
    load_textures,
    read_tiles,
)


TEXTURES = load_textures()
TO_TILES = np.abs(np.indices((COLUMNS, ROWS)) - np.reshape(PLAYER, (2, 1, 1))).sum(0)  # moves from the player, (8, 6)
OUT_OF_VIEW = COLUMNS + ROWS


def distance(tiles: np.ndarray, goal: str) -> np.ndarray:
    """Moves from the player to the nearest tile of a material, if nothing is in the way: `(..., 8, 6)` -> `(...)`; 1 beside it."""
    is_goal = (tiles == MATERIALS.index(goal)) & (TO_TILES > 0)  # the tile under the player cannot be seen
    return np.where(is_goal, TO_TILES, OUT_OF_VIEW).min((-1, -2))


# The world


class Walk:
    """A walk through a true world, from where a wanderer has come to."""

    def __init__(self, seed: int, area: int, num_frames: int):
        self.world = CrafterWorld(seed, area)
        self.frames, self.actions = [self.world.start(np.random.default_rng((seed, 0)))], []
        wanderer = Wanderer(np.random.default_rng((seed, 1)))
        while len(self.frames) < num_frames:
            self.act(wanderer.next_action(self.world))

    def act(self, action: int) -> None:
        self.actions.append(action)
        self.frames.append(self.world.act(action))

    def reaches(self, goal: str, num_moves: int, next_moves: Callable[["Walk"], Iterator[int]]) -> bool:
        """Whether somebody comes to stand beside the goal."""
        num_frames = len(self.frames) + num_moves
        while len(self.frames) < num_frames:
            for move in next_moves(self):
                self.act(int(move))
                if distance(self.world.tiles(), goal) == 1:
                    return True
                if len(self.frames) == num_frames:
                    break
        return False


def moves_needed(world: CrafterWorld, goal: str, most: int) -> int | None:
    """Moves of the shortest way over safe ground until such a tile is beside the player; `None` for more than `most`."""
    reached = {world.position}
    for num_moves in range(most + 1):
        beside = {place_after(place, STEPS[move]) for place in reached for move in MOVES}
        if any(world.material(place) == goal for place in beside):
            return num_moves
        reached |= {place for place in beside if world.material(place) in SAFE_TO_WALK}
    return None


def worlds_with_goals(args: argparse.Namespace) -> Iterator[tuple[dict, Walk]]:
    """Worlds with a goal that is in view, neither too near nor too far: what is known of each, and the walk so far."""
    least, most = args.moves_needed
    for seed in range(args.seed, args.seed + 1_000_000):
        walk = Walk(seed, args.area, args.num_context_frames)
        in_view = [goal for goal in GOALS if distance(walk.world.tiles(), goal) < OUT_OF_VIEW]
        needed = {goal: moves_needed(walk.world, goal, most) for goal in in_view}
        goals = [goal for goal, moves in needed.items() if moves is not None and moves >= least]
        if goals:
            goal = goals[seed % len(goals)]
            yield {"seed": seed, "goal": goal, "moves_needed": needed[goal]}, walk


# Plans


def imagine(session: FARSession, plans: np.ndarray) -> np.ndarray:
    """The tiles that the model draws on the ways of plans `(n, horizon)`, all in one batch: `(n, horizon, 8, 6)`."""
    futures = session.fork_batch(len(plans))  # the past is stored once; chance is the same for all
    frames = [futures.step(moves) for moves in torch.from_numpy(plans.T)]
    return np.stack([read_tiles(frame * 255, TEXTURES)[0] for frame in frames], axis=1)


def try_out(world: CrafterWorld, plans: np.ndarray) -> np.ndarray:
    """The same in the true world."""
    tiles = []
    for plan in plans:
        future = copy.deepcopy(world)
        tiles.append([(future.act(move), future.tiles())[1] for move in plan])
    return np.array(tiles)


def plan_moves(
    future_tiles: Callable[[np.ndarray], np.ndarray], goal: str, rng: np.random.Generator, args: argparse.Namespace
) -> np.ndarray:
    """The cross-entropy method: the best of all plans that were tried, which stays near the goal for most of its moves."""
    chances = np.full((args.horizon, len(MOVES)), 1 / len(MOVES))
    best, lowest = None, np.inf
    for _ in range(args.num_rounds):
        plans = np.stack([rng.choice(MOVES, args.num_plans, p=each) for each in chances], axis=1)
        costs = distance(future_tiles(plans), goal).sum(1)
        order = costs.argsort(kind="stable")
        if costs[order[0]] < lowest:
            best, lowest = plans[order[0]], costs[order[0]]
        chosen = (plans[order[: args.num_best], :, None] == MOVES).mean(0)
        chances = (chances + chosen) / 2  # no move is given up for good
    return best


def walkers(pipe: FARPipeline, goal: str, args: argparse.Namespace) -> dict[str, Callable]:
    """Who walks: by name, what makes a walker of a seed; a walker gives the next moves of a walk."""

    def plans_in_model(rng):
        def next_moves(walk):
            session = pipe.start_session(
                video=np.stack(walk.frames),
                actions=walk.actions,
                num_inference_steps=args.num_inference_steps,
                generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
                output_type="np",
            )
            return plan_moves(lambda plans: imagine(session, plans), goal, rng, args)[: args.moves_between_plans]

        return next_moves

    def plans_in_world(rng):
        return lambda walk: plan_moves(lambda plans: try_out(walk.world, plans), goal, rng, args)[
            : args.moves_between_plans
        ]

    def wanders(rng):
        wanderer = Wanderer(rng)
        return lambda walk: [wanderer.next_action(walk.world)]

    def moves_at_random(rng):
        return lambda walk: [rng.choice(MOVES)]

    return dict(zip(WALKERS, (plans_in_model, plans_in_world, wanders, moves_at_random)))


def report(results: list[dict], args: argparse.Namespace) -> None:
    """Print the share of goals that each walker reached, and write it with what happened in each world."""
    by_name = {name: np.array([result[name] for result in results]) for name in WALKERS}
    shares = {name: Estimate.of(100 * reached) for name, reached in by_name.items()}
    gains = {name: Estimate.of(100 * (by_name[IN_MODEL] - by_name[name])) for name in WALKERS[1:]}
    print(f"Goals reached within {args.num_moves} moves, % of {len(results)} worlds, with 95% intervals")
    for name, share in shares.items():
        more = f"; the planner in the model reaches {gains[name]} more" if name in gains else ""
        print(f"{name}: {share}{more}")
    if args.output is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "model")}
        estimates = {
            kind: {name: each.to_json() for name, each in of_kind.items()}
            for kind, of_kind in (("reached", shares), ("gain_of_the_model", gains))
        }
        args.output.write_text(json.dumps({"settings": settings, **estimates, "worlds": results}, indent=1) + "\n")


def main(args: argparse.Namespace) -> None:
    set_up_logging(__name__)
    if args.moves_needed[0] > args.moves_needed[1]:
        raise ValueError(f"`--moves_needed` is {args.moves_needed}; give the fewest first, then the most.")
    if args.num_best >= args.num_plans:
        raise ValueError(
            f"`--num_best` is {args.num_best} but {args.num_plans} plans are tried in a round; choose fewer, for the best ones "
            "to be chosen."
        )
    pipe = FARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    results = []
    for result, walk in islice(worlds_with_goals(args), args.num_worlds):
        for name, new_walker in walkers(pipe, result["goal"], args).items():
            num_walkers = 1 if name in (IN_MODEL, IN_WORLD) else args.num_walkers
            reached = [
                copy.deepcopy(walk).reaches(result["goal"], args.num_moves, new_walker(rng))
                for rng in np.random.default_rng((result["seed"], 2)).spawn(num_walkers)
            ]
            result[name] = float(np.mean(reached))
        results.append(result)
        logger.info(", ".join(f"{name} {value}" for name, value in result.items()))
    report(results, args)


if __name__ == "__main__":
    main(args)
