import math

import torch
from diffusers.models.embeddings import get_timestep_embedding

from time_emb import TimestepEmbedder, timestep_embedding


def test_equals_diffusers():
    t = torch.tensor([0, 1, 250, 999])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (timestep_embedding(t) - theirs).abs().max() <= 1e-5


def test_cosines_before_sines_and_the_papers_frequencies():
    embedding = timestep_embedding(torch.tensor([3.5]))[0]
    for i in (0, 1, 64, 127):
        frequency = math.exp(-math.log(10_000) * i / 128)
        assert abs(embedding[i] - math.cos(3.5 * frequency)) < 1e-5
        assert abs(embedding[128 + i] - math.sin(3.5 * frequency)) < 1e-5


def test_takes_ints_and_floats_alike():
    embed = TimestepEmbedder(32)
    assert torch.equal(embed(torch.tensor([7, 993])), embed(torch.tensor([7.0, 993.0])))
    assert embed(torch.tensor([7])).shape == (1, 32)
