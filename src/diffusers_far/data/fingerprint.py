"""What identifies a dataset and a VAE: their content, not where they lie or when they were written."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Video

from ..models.identity import model_identity


def dataset_fingerprint(dataset: Dataset, num_rows: int = 32) -> str:
    """Sha256 (hex) of the features, the number of rows and the content of up to `num_rows` evenly spaced rows.

    Of a video in a file of its own the content counts, not where it lies.
    """
    digest = hashlib.sha256(json.dumps([dataset.num_rows, str(dataset.features)]).encode())
    rows = dataset.with_format("arrow")
    for row in np.unique(np.linspace(0, dataset.num_rows - 1, min(num_rows, dataset.num_rows)).astype(int)):
        for name, column in zip(dataset.column_names, rows[int(row)].columns):
            values = column.to_pylist()
            if isinstance(dataset.features[name], Video):
                values = [_content_hash(file) for file in values]
            digest.update(repr(values).encode())
    return digest.hexdigest()


def _content_hash(file: dict) -> str:
    content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
    return hashlib.sha256(content).hexdigest()


def vae_hash(vae: torch.nn.Module) -> str:
    """What latents are known to be made by: a VAE's [`~models.identity.model_identity`], the same in float32 and in
    float16."""
    return model_identity(vae, rounded_to=torch.float16)
