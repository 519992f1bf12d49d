"""Clips that processes share, which here are threads; `tests/examples/test_several_processes.py` trains with processes."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test, random_clip, tiny_separable, tiny_transformer

from diffusers_far.models import context_parallel
from diffusers_far.models.context_parallel import ClipGroup, divided


@dataclass
class Threads:
    """What `torch.distributed` is among the threads of one process."""

    size: int
    sent: dict = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=60)

    def all_to_all_single(self, output, tensor, output_sizes, input_sizes, rank):
        self.sent[rank] = tensor.split(input_sizes)
        self.barrier.wait()
        output.copy_(torch.cat([self.sent[other][rank] for other in range(self.size)]))
        self.barrier.wait()

    def run(self, work) -> list:
        """What `work(clip_group)` gives, of each."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(ClipGroup(rank)), range(self.size)))


@pytest.fixture
def threads(monkeypatch):
    def started(size: int) -> Threads:
        threads = Threads(size)
        functions = SimpleNamespace(
            get_world_size=lambda group: size,
            get_rank=lambda group: group,
            all_to_all_single=threads.all_to_all_single,
        )
        monkeypatch.setattr(context_parallel, "dist", functions)
        return threads

    return started


@property_test
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 5))
def test_each_place_belongs_to_one_process_which_has_whole_frames_and_about_as_many_as_others(kinds, num_shares):
    shares = divided(kinds, num_shares)
    assert sorted(torch.cat(shares).tolist()) == list(range(sum(num * size for num, size in kinds)))
    start = 0
    for num_frames, size in kinds:
        counts = []
        for share in shares:
            own = share[(share >= start) & (share < start + num_frames * size)] - start
            frames = own[::size] // size
            assert torch.equal(own, (frames[:, None] * size + torch.arange(size)).flatten())
            counts.append(len(frames))
        assert max(counts) - min(counts) <= 1
        start += num_frames * size


def loss_and_gradients(model, clip, with_twins: bool, sharing: ClipGroup | None = None):
    """Of one pass over a clip: the output, and the gradient of each parameter."""
    model = copy.deepcopy(model).train()
    clean = {"clean_hidden_states": clip.latents.flip(1)} if with_twins else {}
    call = (clip.latents, torch.linspace(100, 900, clip.latents.shape[1]).expand(2, -1))
    if sharing is None:
        output = model(*call, **clean).sample
    else:
        with model.sharing_clips(sharing):
            output = model(*call, **clean).sample
    output.square().mean().backward()
    return output.detach(), [torch.zeros_like(each) if each.grad is None else each.grad for each in model.parameters()]


SIZES = {"num_attention_heads": 6, "condition_dropout": 0.0, "short_window": 4}


@pytest.mark.parametrize("size, num_frames", [(2, 5), (3, 9)])
@pytest.mark.parametrize(
    "make, config, with_twins",
    [
        (tiny_transformer, {"long_patch_size": 2}, False),
        (tiny_transformer, {"long_patch_size": 2}, True),
        (tiny_transformer, {}, True),
        (tiny_transformer, {"frame_causal": False}, False),
        (tiny_separable, {"long_patch_size": 2, "feature_noise": 0.0}, True),
        (tiny_separable, {"feature_noise": 0.0}, True),
    ],
    ids=["long", "long-twins", "twins", "not-causal", "long-separable", "separable"],
)
def test_shared_clips_have_the_outputs_and_in_the_mean_the_gradients_of_one_process(
    threads, monkeypatch, size, num_frames, make, config, with_twins
):
    monkeypatch.setattr("diffusers_far.models.functional.MIN_CHUNK_TOKENS", 16)  # several chunks
    model = make(**SIZES, **config)
    clip = random_clip(model, num_frames)
    output, gradients = loss_and_gradients(model, clip, with_twins)
    shared = threads(size).run(lambda group: loss_and_gradients(model, clip, with_twins, group))
    for found, _ in shared:
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    means = [torch.stack(each).mean(dim=0) for each in zip(*(found for _, found in shared))]
    torch.testing.assert_close(means, gradients, rtol=1e-4, atol=1e-6)


def test_each_process_takes_its_frames_alone_through_the_blocks(threads):
    model = tiny_transformer(**SIZES, long_patch_size=2)
    clip = random_clip(model, 7)  # 3 long frames, then 4 short ones and their twins

    def shapes_in_block(group):
        found, own = [], copy.deepcopy(model)
        own.transformer_blocks[1].register_forward_pre_hook(
            lambda block, inputs: found.extend(each.shape[1] for each in inputs[:3])
        )
        with torch.no_grad(), own.sharing_clips(group):
            own(clip.latents, 500, clean_hidden_states=clip.latents)
        assert own.clip_group is None
        return found

    assert threads(2).run(shapes_in_block) == [[2 + 2, 1, 1 + 2 + 2], [2 + 2, 2, 2 + 2 + 2]]
