"""Heatmaps: on images in which a small square alone decides the class."""

import keras
import numpy as np
import pytest

from stages.model import device
from stages.model.heatmaps import heatmaps
from stages.model.network import accept_floats, build

SIZE, SIDE = 24, 6


def draw_planted(count, channels, seed):
    """Noise with a light or dark square of its class, and a grey one that says nothing."""
    rng = np.random.default_rng(seed)
    images = rng.integers(70, 180, (count, SIZE, SIZE, channels), dtype=np.uint8)
    labels = rng.integers(0, 2, count)
    corners = rng.integers(0, SIZE - SIDE + 1, (count, 2))
    for image, label, (top, left) in zip(images, labels, corners, strict=True):
        other_top, other_left = (top + SIZE // 2) % (SIZE - SIDE), left
        image[other_top : other_top + SIDE, other_left : other_left + SIDE] = 125
        image[top : top + SIDE, left : left + SIDE] = (20, 240)[label]
    return images, labels, corners


@pytest.mark.parametrize(("channels", "mirrored"), [(3, False), (1, True)])
def test_the_maximum_is_on_the_square_that_decides(channels, mirrored):
    device.setup(seed=1)
    network = build((SIZE, SIZE, channels), 2, filters=(8, 16), convs_per_block=1,
                    batch_normalization=False, mirrored=mirrored)  # fmt: skip
    images, labels, _ = draw_planted(256, channels, 0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.logits.compile(keras.optimizers.Adam(0.003), loss)
    network.logits.fit(images, labels, epochs=12, verbose=0)

    images, labels, corners = draw_planted(40, channels, 1)
    classifier = accept_floats(network.classifier)
    assert (np.asarray(classifier(images)).argmax(1) == labels).mean() > 0.95
    maps = heatmaps(classifier, images, labels)
    assert maps.shape == images.shape[:3] and maps.min() >= 0 and (maps.max((1, 2)) == 1).all()
    best = np.stack(np.unravel_index(maps.reshape(40, -1).argmax(1), (SIZE, SIZE)), 1)
    hit = ((corners <= best) & (best < corners + SIDE)).all(1)
    assert hit.mean() >= 0.9
    assert np.array_equal(heatmaps(classifier, images[:2], labels[:2]), maps[:2])


def test_an_image_of_one_colour_has_an_empty_heatmap():
    network = build((8, 8, 1), 2, filters=(4,))
    images = np.full((1, 8, 8, 1), 90, np.uint8)
    assert not heatmaps(accept_floats(network.classifier), images, [1]).any()
