"""Buckets for the sizes of a data set: few, small enough, and none too small."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.data import buckets
from dat_jax.errors import UserError
from tests.reference.compare import few_examples

SIDES = st.integers(1, 300)


def test_one_size_has_one_bucket():
    assert buckets.choose_buckets([(33, 64)] * 5) == [(33, 64)]
    assert buckets.choose_buckets([(33, 64)], multiple=32) == [(64, 64)]
    assert buckets.choose_buckets([]) == []


def test_two_orientations_have_two_buckets():
    assert buckets.choose_buckets([(64, 128)] * 3 + [(128, 64)]) == [(64, 128), (128, 64)]
    assert buckets.choose_buckets([(64, 128)] * 3 + [(128, 64)], max_waste=0.5) == [(128, 128)]


@few_examples(60)
@given(shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=40), waste=st.floats(0, 0.9))
def test_every_image_fits_and_little_is_wasted(shapes, waste):
    chosen = buckets.choose_buckets(shapes, max_waste=waste, multiple=32)
    assert chosen == sorted(set(chosen))
    assert all(side % 32 == 0 for bucket in chosen for side in bucket)
    rounded = {buckets.round_up(shape, 32) for shape in shapes}
    measured = buckets.measure_waste(shapes, chosen)
    assert measured <= waste + 1e-12 or measured == buckets.measure_waste(shapes, sorted(rounded))


@few_examples(25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), waste=st.floats(0, 0.6)
)
def test_sizes_of_one_height_need_the_fewest_buckets_possible(shapes, waste):
    """Compared with all sets of buckets, for images that differ in width only, where the orders lose nothing."""
    shapes = [(4, width) for _, width in shapes]
    chosen = buckets.choose_buckets(shapes, max_waste=waste)
    possible = sorted(set(shapes))
    for count in range(1, len(chosen)):
        for others in itertools.combinations(possible, count):
            if others[-1] == possible[-1]:
                assert buckets.measure_waste(shapes, others) > waste - 1e-12


def test_sizes_like_those_of_ade20k_need_few_buckets():
    """Short side 512, aspect ratios up to 4."""
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.normal(0.28, 0.12, 1500)).clip(1, 4)
    shapes = [
        (512, round(512 * ratio)) if wide else (round(512 * ratio), 512)
        for ratio, wide in zip(ratios, rng.random(1500) < 0.75, strict=True)
    ]
    chosen = buckets.choose_buckets(shapes)
    assert len(set(shapes)) > 200
    assert len(chosen) <= 8
    assert buckets.measure_waste(shapes, chosen) <= buckets.MAX_WASTE


@few_examples(60)
@given(shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_a_side_of_the_ladder_is_at_most_a_quarter_too_long(shape):
    bucket = buckets.ladder_bucket(shape)
    for side, padded in zip(shape, bucket, strict=True):
        assert padded % 32 == 0
        assert side <= padded <= max(32, 1.25 * side + 64)
    assert buckets.ladder_bucket(bucket) == bucket


def test_the_smallest_bucket_is_found_or_all_are_named():
    choices = [(64, 96), (96, 64), (96, 96)]
    assert buckets.find_bucket((50, 90), choices) == (64, 96)
    assert buckets.find_bucket((65, 65), choices) == (96, 96)
    with pytest.raises(
        UserError, match="No bucket holds an image of 97 x 10 pixels. The buckets are 64x96, 96x64, 96x96."
    ):
        buckets.find_bucket((97, 10), choices)


def test_buckets_are_parsed_or_refused():
    assert buckets.parse_buckets("512x704, 704x512") == [(512, 704), (704, 512)]
    for text in ("608", "608x832,", "608x832x3", "608*832", "axb", "0x32", " ", "", "-32x32", "9" * 5000 + "x32"):
        with pytest.raises(UserError, match=r"config.eval.buckets: expected heights and widths such as"):
            buckets.parse_buckets(text, key="config.eval.buckets")
    with pytest.raises(UserError, match="one of .auto. and .exact. where these are offered, got 'Exact'"):
        buckets.parse_buckets("Exact")
    with pytest.raises(UserError, match="sides must be at most 16384 pixels, got '99999x64'"):
        buckets.parse_buckets("99999x64")
