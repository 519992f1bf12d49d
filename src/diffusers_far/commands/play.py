"""`far play`: load a model and recordings to start from, and serve the page where visitors walk through its world."""

import argparse

from .app import RecordedWalks, WorldLimits, WorldModel
from .app.ui import AppParts, serve
from .inputs import load_pipeline


def main(args: argparse.Namespace) -> None:
    """Serve this machine until it is interrupted, with the arguments of [`parse_play`].

    Raises:
        ValueError: The model has no actions that buttons can take, or the dataset is not its own.
    """
    limits = WorldLimits(max_visitors=args.max_visitors)
    model = WorldModel(load_pipeline(args.model))
    walks = None
    if args.dataset_name:
        num_actions = len(model.action_names)
        walks = RecordedWalks(args.dataset_name, model.size, limits, split=args.dataset_split, num_actions=num_actions)
    serve(AppParts(model, walks, limits), args.allowed_hosts, server_name="127.0.0.1", server_port=args.port)
