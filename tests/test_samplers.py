import itertools

import pytest

from selcon_plugin.samplers import StreamSampler


def draw(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_pass_shows_every_image_once_in_another_order():
    drawn = [key.index for key in draw(StreamSampler(50, seed=1), 150)]
    passes = [drawn[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_same_seed_same_stream_other_seed_other_stream():
    assert draw(StreamSampler(50, seed=1), 60) == draw(StreamSampler(50, seed=1), 60)
    assert draw(StreamSampler(50, seed=1), 60) != draw(StreamSampler(50, seed=2), 60)


@pytest.mark.parametrize("start", [0, 7, 50, 123])
def test_resumed_stream_goes_on_where_it_stopped(start):
    sampler = StreamSampler(50, seed=4)
    sampler.start = start
    assert draw(sampler, 40) == draw(StreamSampler(50, seed=4), start + 40)[start:]


def test_ranks_deal_out_the_stream_of_one_process():
    single = draw(StreamSampler(10, seed=0), 24)
    ranks = [draw(StreamSampler(10, seed=0, rank=r, world_size=3), 8) for r in range(3)]
    dealt = [ranks[position % 3][position // 3] for position in range(24)]
    assert dealt == single


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        StreamSampler(0)
