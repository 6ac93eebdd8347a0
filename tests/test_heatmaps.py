"""Heatmaps: on images in which a small square alone decides the class."""

import keras
import numpy as np
import pytest

from stages.model import device
from stages.model.network import accept_floats, build
from stages.model.parameters import Train
from stages.report.heatmaps import make_heatmap_fn

SIZE, SIDE = 24, 6


def draw_planted(count, seed):
    """Noise with a square in the color of its class, and a yellow one that says nothing."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 160, (count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, count)
    corners = rng.integers(0, SIZE - SIDE + 1, (count, 2))
    for image, label, (top, left) in zip(images, labels, corners, strict=True):
        other = (top + SIZE // 2) % (SIZE - SIDE)
        image[other : other + SIDE, left : left + SIDE] = (230, 210, 40)
        image[top : top + SIDE, left : left + SIDE] = np.roll((220, 40, 40), label)
    return images, labels, corners


@pytest.fixture(scope="module")
def network():
    device.setup(seed=1)
    parameters = Train(
        filters=[16, 16], convs_per_block=1, dense_units=0, dropout=0, augment={"flip": "both"}
    )
    network = build((SIZE, SIZE, 3), 3, parameters)
    images, labels, _ = draw_planted(256, 0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.logits.compile(keras.optimizers.Adam(0.005), loss)
    network.logits.fit(images, labels, epochs=12, verbose=0)
    return network


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_maximum_is_on_the_square_that_decides(network, mirrored):
    logits = network.logits
    plain = keras.Model(logits.input, keras.layers.Softmax()(logits.output))
    classifier = accept_floats(network.classifier if mirrored else plain)
    images, labels, corners = draw_planted(20, 1)
    assert (np.asarray(classifier(images)).argmax(1) == labels).mean() >= 0.95
    heatmaps = make_heatmap_fn(classifier)
    maps = heatmaps(images, labels)
    assert maps.shape == images.shape[:3] and maps.min() >= 0 and (maps.max((1, 2)) == 1).all()
    best = np.stack(np.unravel_index(maps.reshape(20, -1).argmax(1), (SIZE, SIZE)), 1)
    assert ((corners <= best) & (best < corners + SIDE)).all(1).mean() >= 0.9
    np.testing.assert_allclose(heatmaps(images[:2], labels[:2]), maps[:2], atol=1e-5)
    flipped = heatmaps(images[:2, :, ::-1], labels[:2])[:, :, ::-1]
    assert np.allclose(flipped, maps[:2], atol=1e-4) == mirrored


def test_the_network_is_traced_once(network, monkeypatch):
    layer, traced = network.logits.get_layer("logits"), []
    call = layer.call
    monkeypatch.setattr(layer, "call", lambda x, **_: traced.append(x) or call(x))
    heatmaps = make_heatmap_fn(accept_floats(network.classifier))
    traced.clear()
    images, labels, _ = draw_planted(9, 1)
    for count in (9, 1, 0):
        assert len(heatmaps(images[:count], labels[:count])) == count
    assert len(traced) == 1


def test_an_image_of_one_color_has_an_empty_heatmap():
    network = build((8, 8, 1), 2, Train(filters=[4]))
    images = np.full((1, 8, 8, 1), 90, np.uint8)
    assert not make_heatmap_fn(accept_floats(network.classifier))(images, np.array([1])).any()


def test_a_backbone_that_takes_whole_numbers_has_empty_heatmaps(tmp_path):
    """No gradient reaches its images."""
    images = keras.Input((None, None, 3), dtype="uint8")
    features = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(images))
    keras.Model(images, features).save(tmp_path / "whole.keras")
    network = build((16, 16, 3), 2, Train(), tmp_path / "whole.keras")
    shown = np.random.default_rng(1).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    assert not make_heatmap_fn(accept_floats(network.classifier))(shown, np.array([1])).any()
