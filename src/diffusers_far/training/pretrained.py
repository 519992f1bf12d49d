"""A pretrained pipeline as the start of a training: what is taken over, and what other conditions change."""

import logging
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..models.frame_network import FrameNetwork
from ..models.frame_transformer import FrameTransformer
from ..models.identity import public_config


logger = logging.getLogger(__name__)

CONDITIONS = ("num_actions", "action_dim", "num_classes")
CONDITION_EMBEDDERS = {"action_embedder", "label_embedder"}
INHERITED_SETTINGS = ("fps", "num_inference_steps", "guidance_scale", "short_cache")


def is_pipeline(name_or_path: str) -> bool:
    """Whether a folder holds a whole pipeline, not a transformer alone; a repo on the Hub is taken for one."""
    return not Path(name_or_path).is_dir() or (Path(name_or_path) / "transformer").is_dir()


def pipeline_settings(name_or_path: str, num_actions: int | None, revision: str | None = None) -> dict:
    """Scheduler and settings, as arguments of [`FARPipeline`], of the pipeline that training starts from.

    Args:
        name_or_path (`str`): Folder or Hub id. A transformer alone has none.
        num_actions (`int`, *optional*): Of the model that is trained; names of another number of actions are left out.
        revision (`str`, *optional*): On the Hub: branch, tag or commit.
    """
    if not is_pipeline(name_or_path):
        return {}
    config = DiffusionPipeline.load_config(name_or_path, revision=revision)
    scheduler_class = getattr(diffusers, config["scheduler"][1])
    scheduler = scheduler_class.from_pretrained(name_or_path, subfolder="scheduler", revision=revision)
    settings = {"scheduler": scheduler}
    settings |= {name: config[name] for name in INHERITED_SETTINGS if config.get(name) is not None}
    action_names = config.get("action_names") or {}
    if len(action_names) == num_actions:
        settings["action_names"] = action_names
    return settings


def with_conditions(transformer: FrameTransformer, **conditions: int | None) -> FrameTransformer:
    """The same weights under other conditions; the embeddings of conditions that change are made anew, and it is said.

    Args:
        transformer ([`FARTransformer3DModel`] or [`SCDTransformer3DModel`]): Stays as it is.
        conditions: `num_actions`, `action_dim` or `num_classes` of the new model.

    Returns:
        `transformer` itself where nothing changes.
    """
    unknown = conditions.keys() - set(CONDITIONS)
    if unknown:
        raise ValueError(f"`conditions` has {sorted(unknown)}; what can change is {', '.join(CONDITIONS)}.")
    changed = {name: value for name, value in conditions.items() if transformer.config[name] != value}
    if not changed:
        return transformer
    renewed = type(transformer)(**(public_config(transformer.config) | changed)).to(transformer.dtype)
    weights, fresh = transformer.state_dict(), renewed.state_dict()
    is_renewed = {
        name: CONDITION_EMBEDDERS & set(name.split("."))
        and (name not in weights or weights[name].shape != tensor.shape)
        for name, tensor in fresh.items()
    }
    renewed.load_state_dict({name: fresh[name] if is_renewed[name] else weights[name] for name in fresh})
    _keep_null_rows(transformer.context_network, renewed.context_network)
    _keep_null_rows(transformer.denoising_network, renewed.denoising_network)
    for name, value in changed.items():
        logger.warning(f"`{name}` was {transformer.config[name]} and is {value}: its embedding starts anew.")
    return renewed


def as_flow_map(transformer: FrameTransformer) -> FrameTransformer:
    """The same weights as a flow map, which computes the same where a step ends at its beginning: the embedding of the end
    starts as a copy of the beginning's. A flow map itself is returned as it is."""
    if transformer.config.flow_map:
        return transformer
    flow_map = type(transformer)(**(public_config(transformer.config) | {"flow_map": True})).to(transformer.dtype)
    weights = transformer.state_dict()
    flow_map.load_state_dict(
        {name: weights[name.replace("r_timestep_embedder", "timestep_embedder")] for name in flow_map.state_dict()}
    )
    return flow_map


@torch.no_grad()
def _keep_null_rows(network: FrameNetwork, renewed: FrameNetwork) -> None:
    """The last row of a table stands for "none given", which means the same in both models."""
    for name in ("action_embedder.embedding_table", "label_embedder"):
        try:
            old, new = network.get_submodule(name), renewed.get_submodule(name)
        except AttributeError:
            continue
        new.weight[-1] = old.weight[-1]
