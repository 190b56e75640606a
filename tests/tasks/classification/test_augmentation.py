"""Random erasing, mixup and cutmix against the distributions of the published recipe, with 20,000 draws each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dat_jax.tasks.classification.augmentation import draw_erased_box, erase_randomly, mix
from tests.reference.augmentation import draw_boxes

P_VALUE = 1e-3  # threshold of each statistical test; seeded draws make the tests deterministic
DRAWS = 20_000


def keys(seed=0, count=DRAWS):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 160)])
def test_distributions_of_erased_boxes(height, width):
    draw = jax.jit(jax.vmap(lambda key: jnp.stack(draw_erased_box(key, height=height, width=width))))
    top, left, h, w = np.asarray(draw(keys())).T
    drawn = h > 0
    bound = np.log(1 / 0.3)
    wanted_w, wanted_h = draw_boxes(
        np.random.default_rng(1),
        DRAWS,
        height=height,
        width=width,
        area=(0.02, 1 / 3),
        log_aspect=(-bound, bound),  # h / w
        fits=lambda w, h: (h < height) & (w < width),
    )
    assert drawn.sum() == len(wanted_h) == DRAWS
    assert stats.ks_2samp(h * w, wanted_h * wanted_w).pvalue > P_VALUE
    assert stats.ks_2samp(h / w, wanted_h / wanted_w).pvalue > P_VALUE
    for place, room in ((top, height - h), (left, width - w)):
        assert (place >= 0).all()
        assert (place <= room).all()
        free = room >= 30
        jitter = np.random.default_rng(2).uniform(size=free.sum())
        assert stats.kstest((place[free] + jitter) / (room[free] + 1), "uniform").pvalue > P_VALUE


def test_erasing_fills_one_box_with_standard_normal_noise_at_the_given_probability():
    images = jnp.full((4000, 16, 16, 3), 7.0)
    erased = np.asarray(jax.jit(lambda x, key: erase_randomly(x, key, probability=0.25))(images, jax.random.key(0)))
    changed = erased != 7.0
    assert (changed.all(axis=-1) == changed.any(axis=-1)).all()
    counts = changed[..., 0].sum(axis=(1, 2))
    assert stats.binomtest(int((counts > 0).sum()), 4000, 0.25).pvalue > P_VALUE
    for mask in changed[counts > 0][..., 0]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert stats.kstest(erased[changed][:DRAWS], "norm").pvalue > P_VALUE
    np.testing.assert_array_equal(erased[counts == 0], 7.0)


def mixed_pairs(**alphas):
    """Mixed images and targets of 20,000 batches of a white and a black image of 64 x 48 pixels."""
    pair = jnp.stack([jnp.ones((64, 48, 1)), jnp.zeros((64, 48, 1))])
    mixed = jax.jit(jax.vmap(lambda key: mix(pair, jnp.eye(2), key, **alphas)))
    images, targets = mixed(keys())
    return np.asarray(images)[..., 0], np.asarray(targets)


@pytest.mark.slow
def test_mixup_weights_are_beta_distributed():
    images, targets = mixed_pairs(mixup_alpha=0.8, cutmix_alpha=0.0)
    weights = images[:, 0, 0, 0]
    np.testing.assert_array_equal(images[:, 0], np.broadcast_to(weights[:, None, None], images[:, 0].shape))
    np.testing.assert_allclose(images[:, 1], 1 - images[:, 0], atol=1e-6)
    np.testing.assert_allclose(targets[:, 0, 0], weights, atol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(targets[:, 1, 0], 1 - weights, atol=1e-6)
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > P_VALUE


@pytest.mark.slow
def test_cutmix_boxes_and_targets():
    images, targets = mixed_pairs(mixup_alpha=0.0, cutmix_alpha=1.0)
    first = images[:, 0]
    assert set(np.unique(first)) == {0.0, 1.0}
    np.testing.assert_allclose(targets[:, 0, 0], first.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(images[:, 1], 1 - first)
    heights, widths = (first == 0).any(axis=2).sum(axis=1), (first == 0).any(axis=1).sum(axis=1)
    np.testing.assert_array_equal((first == 0).sum(axis=(1, 2)), heights * widths)
    rng = np.random.default_rng(1)
    part = np.sqrt(1 - rng.beta(1, 1, DRAWS))
    half_h, half_w = (64 * part).astype(int) // 2, (48 * part).astype(int) // 2
    y, x = rng.integers(64, size=DRAWS), rng.integers(48, size=DRAWS)
    wanted_h = np.clip(y + half_h, 0, 64) - np.clip(y - half_h, 0, 64)
    wanted_w = np.clip(x + half_w, 0, 48) - np.clip(x - half_w, 0, 48)
    assert stats.ks_2samp(heights * widths, wanted_h * wanted_w).pvalue > P_VALUE
    nonempty = heights * widths > 0
    assert stats.ks_2samp(heights[nonempty], wanted_h[wanted_h * wanted_w > 0]).pvalue > P_VALUE


@pytest.mark.slow
def test_mixup_and_cutmix_are_equally_likely():
    images, _ = mixed_pairs(mixup_alpha=0.8, cutmix_alpha=1.0)
    cut = np.isin(images, (0.0, 1.0)).all(axis=(1, 2, 3))
    assert stats.binomtest(int(cut.sum()), DRAWS).pvalue > P_VALUE


def test_zero_alphas_disable_mixing():
    images, targets = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
    unchanged = mix(images, targets, jax.random.key(0), mixup_alpha=0.0, cutmix_alpha=0.0)
    assert unchanged[0] is images
    assert unchanged[1] is targets


@pytest.mark.parametrize("partners", [(1, 0, 3, 2, 5, 4), (1, 0, 3, 2, 4)])
def test_neighboring_images_are_mixed(partners):
    images = jnp.arange(float(len(partners)))[:, None, None, None] * jnp.ones((len(partners), 8, 8, 3))
    targets = jnp.eye(len(partners))
    mixed, mixed_targets = mix(images, targets, jax.random.key(3), mixup_alpha=0.8, cutmix_alpha=0.0)
    weight, other = mixed_targets[0, 0], jnp.array(partners)
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[other], rtol=1e-6)
    np.testing.assert_allclose(mixed_targets, weight * targets + (1 - weight) * targets[other], rtol=1e-6)
