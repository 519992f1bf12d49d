import torch
from datasets import Dataset

from diffusers_far.data.loading import dataset_fingerprint
from diffusers_far.models.identity import vae_hash


def test_a_dataset_is_known_by_its_content_wherever_it_lies(trajectories, tmp_path):
    trajectories.to_parquet(tmp_path / "copy.parquet")
    copy = Dataset.from_parquet(str(tmp_path / "copy.parquet"), cache_dir=str(tmp_path / "cache"))
    assert dataset_fingerprint(copy) == dataset_fingerprint(trajectories)


def test_another_row_another_order_or_another_action_is_another_dataset(trajectories):
    actions = [list(row) for row in trajectories["actions"]]
    actions[2][1] += 1
    changed = trajectories.remove_columns("actions").add_column("actions", actions)
    others = [trajectories.select(range(4)), trajectories.select([1, 0, 2, 3, 4]), changed]
    assert len({dataset_fingerprint(each) for each in [trajectories, *others]}) == 4


def test_a_vae_keeps_its_hash_through_saving_in_either_precision(vae, tmp_path):
    expected = vae_hash(vae)
    vae.save_pretrained(tmp_path / "full")
    assert vae_hash(type(vae).from_pretrained(tmp_path / "full")) == expected
    vae.half().save_pretrained(tmp_path / "half")
    assert vae_hash(type(vae).from_pretrained(tmp_path / "half")) == expected


def test_other_weights_or_another_scaling_factor_make_another_vae(vae):
    expected = vae_hash(vae)
    vae.register_to_config(scaling_factor=0.25)
    assert vae_hash(vae) != expected
    vae.register_to_config(scaling_factor=0.5)
    assert vae_hash(vae) == expected
    with torch.no_grad():
        vae.decoder.conv_in.weight[0, 0, 0, 0] += 0.1
    assert vae_hash(vae) != expected
