"""``StreamSampler``: every image once per pass, from any place."""

import numpy as np
import pytest

from helpers.sampling import draw
from selcon_plugin.samplers.stream import SampleKey, StreamSampler


def test_every_pass_shows_every_image_once_in_another_order():
    sampled = [key.index for key in draw(StreamSampler(50, seed=1), 150)]
    passes = [sampled[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_position_in_the_stream_does_not_need_the_previous_ones():
    stream = draw(StreamSampler(10, seed=3, batch_size=4), 35)
    for position, key in enumerate(stream):
        number, place = divmod(position, 10)
        order = np.random.default_rng((3, number)).permutation(10)
        assert key == SampleKey(order[place], position)


@pytest.mark.parametrize("batch_size", [2, 7, 50, 120])
def test_size_of_the_batch_does_not_change_the_stream(batch_size):
    expected = draw(StreamSampler(50, seed=1), 300)
    assert draw(StreamSampler(50, seed=1, batch_size=batch_size), 300) == expected


def test_same_seed_same_stream_other_seed_other_stream():
    assert draw(StreamSampler(50, seed=1), 60) == draw(StreamSampler(50, seed=1), 60)
    assert draw(StreamSampler(50, seed=1), 60) != draw(StreamSampler(50, seed=2), 60)


@pytest.mark.parametrize("batch_size", [1, 8, 75])
@pytest.mark.parametrize("start", [0, 1, 7, 50])
def test_resumed_stream_continues_where_it_stopped(start, batch_size):
    sampler = StreamSampler(50, seed=4, batch_size=batch_size)
    skipped = start * batch_size
    expected = draw(sampler, skipped + 90)[skipped:]
    sampler.start = start
    assert draw(sampler, 90) == expected


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        StreamSampler(0)
