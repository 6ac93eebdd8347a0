"""The package stages.model: augmentation, optimizer, network, inference, files."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.python.framework import config as tf_config

from stages.data.arrays import MAX_SPEC_BYTES, ImageSpec
from stages.model import device, model_file
from stages.model.augment import augment
from stages.model.calibration import LIMITS, apply_temperature, fit_temperature, log_loss
from stages.model.checkpoint import Checkpoint
from stages.model.features import Features
from stages.model.fit import Trainer, class_weights, fit
from stages.model.inference import BATCH_SIZE, make_predict_fn
from stages.model.network import FusedBatchNormalization, accept_floats, build, flatten_layers
from stages.model.optimizer import Optimizer
from stages.model.parameters import Train
from stages.model.phases import Phase
from stages.model.replicas import Replicas
from stages.run.cli import UserError

NO_CHANGES = {"flip": "none", "translation": 0.0, "rotation": 0.0, "zoom": 0.0, "contrast": 0.0}


@pytest.fixture(autouse=True)
def scratch_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture(scope="module")
def network():
    device.setup(seed=1)
    return build((12, 9, 3), 4, Train(filters=[4, 8], dense_units=6, dropout=0.3))


def random_images(count, height=12, width=9, channels=3, seed=0):
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def changed(images, seed=(1, 2), **changes):
    return augment(tf.constant(images), tf.constant(seed), **NO_CHANGES | changes).numpy()


# Device


@pytest.mark.parametrize("deterministic", [True, False, True])
def test_the_environment_says_whether_tensorflow_is_deterministic(deterministic):
    environment = device.setup(deterministic)
    assert environment["deterministic"] == tf_config.is_op_determinism_enabled() == deterministic


def test_a_keras_that_is_configured_otherwise_is_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(UserError, match="image_data_format is 'channels_first'.*keras.json"):
            device.setup()
    finally:
        keras.config.set_image_data_format("channels_last")


# Augmentation


def test_without_changes_images_stay_as_they_are():
    images = random_images(5)
    assert np.array_equal(changed(images), images)


@pytest.mark.parametrize(
    "changes",
    [{"flip": "both"}, {"translation": 0.4}, {"rotation": 40}, {"zoom": 0.4}, {"contrast": 0.5}],
)
def test_changes_follow_from_the_seed_and_differ_between_images(changes):
    images = np.repeat(random_images(1), 16, axis=0)
    first = changed(images, **changes)
    assert first.dtype == np.uint8 and first.shape == images.shape
    assert np.array_equal(first, changed(images, **changes))
    assert not np.array_equal(first, changed(images, seed=(1, 3), **changes))
    assert len(np.unique(first, axis=0)) > 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_of_few_images(count):
    images = random_images(count)
    assert changed(images, flip="both", rotation=9, contrast=0.2).shape == images.shape
    assert changed(images, translation=0.2).shape == images.shape


def test_a_flip_mirrors_about_half_of_the_images():
    images = random_images(200)
    result = changed(images, flip="horizontal")
    same = (result == images).all((1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_a_translation_is_by_whole_pixels_within_its_range():
    image = np.zeros((1, 20, 20, 1), np.uint8)
    image[0, 10, 10] = 255
    result = changed(np.repeat(image, 300, axis=0), translation=0.1)
    where = np.argwhere(result == 255)
    assert len(where) == 300  # no pixel is blurred
    assert {*where[:, 1]} == {*where[:, 2]} == {8, 9, 10, 11, 12}


def test_vertical_and_horizontal_translations_are_independent():
    spots = np.zeros((64, 21, 21, 1), np.uint8)
    spots[:, 10, 10] = 255
    found = np.array(
        [np.argwhere(image[..., 0] == 255)[0] for image in changed(spots, translation=0.3)]
    )
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.4


def test_zoom_and_contrast_are_independent():
    squares = np.full((64, 21, 21, 1), 100, np.uint8)
    squares[:, 6:15, 6:15] = 150
    found = changed(squares, zoom=0.4, contrast=0.4)[..., 0].astype(float)
    low, high = found.min(axis=(1, 2)), found.max(axis=(1, 2))
    area = (found > ((low + high) / 2)[:, None, None]).sum(axis=(1, 2))
    assert abs(np.corrcoef(area, high - low)[0, 1]) < 0.4 and np.ptp(area) > 20


def test_vertical_and_horizontal_flips_are_independent():
    images = random_images(64)
    mirrored = changed(images, flip="both")
    found = {
        (down, right)
        for image, result in zip(images, mirrored, strict=True)
        for down in (1, -1)
        for right in (1, -1)
        if np.array_equal(image[::down, ::right], result)
    }
    assert len(found) == 4


def test_a_rotation_is_about_the_center():
    image = np.zeros((1, 21, 21, 1), np.uint8)
    image[0, 9:12, 3:18] = 255  # a line through the center
    result = changed(np.repeat(image, 100, axis=0), rotation=90)
    assert (result[:, 10, 10] > 250).all()
    assert (result[:, 4:7, 10].min((1, 2)) > 100).any()  # some now stand upright


def test_a_zoom_keeps_the_center_and_scales_sizes():
    image = np.zeros((1, 40, 40, 1), np.uint8)
    image[0, 10:30, 10:30] = 255
    areas = (changed(np.repeat(image, 200, axis=0), zoom=0.3) > 127).sum((1, 2, 3)) / 400
    assert 0.45 < areas.min() < 0.6 and 1.5 < areas.max() < 1.75


def test_contrast_keeps_the_mean_and_stays_in_range():
    images = random_images(50) // 2 + 64
    result = changed(images, contrast=0.4).astype(float)
    assert np.allclose(result.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1)
    ratio = result.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.59 < ratio.min() < 0.8 and 1.2 < ratio.max() < 1.41


@settings(max_examples=12)
@given(
    seed=st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1000)),
    changes=st.sampled_from(
        [{"flip": "both", "translation": 0.2}, {"rotation": 20, "zoom": 0.2, "contrast": 0.3}]
    ),
)
def test_the_shares_of_a_batch_are_augmented_as_the_batch(seed, changes):
    images, replicas = random_images(12), 3
    shares = [
        changed(share, seed, replica=number, replicas=replicas, **changes).astype(int)
        for number, share in enumerate(np.split(images, replicas))
    ]
    assert np.array_equal(np.concatenate(shares), changed(images, seed, **changes))


# Optimizer


def stepped(optimizer, start, gradients, **options):
    """Return a weight after steps along these gradients."""
    weight = keras.Variable(start, **options)
    optimizer = optimizer(weight)
    optimizer.build([weight])
    optimizer.learning_rate.assign(0.1)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [weight])
    return weight.numpy()


def test_other_weights_are_updated_as_by_adamw():
    start, *gradients = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    ours = stepped(lambda _: Optimizer([], 0.3), start, gradients)
    adamw = stepped(lambda _: keras.optimizers.AdamW(weight_decay=0.3), start, gradients)
    assert np.allclose(ours, adamw, atol=1e-6) and not np.allclose(ours, start, atol=0.1)


def test_biases_do_not_decay():
    start = np.ones(5, np.float32)
    still = [np.zeros_like(start)]
    assert stepped(lambda _: Optimizer([], 0.3), start, still, name="weight")[0] < 1
    assert stepped(lambda _: Optimizer([], 0.3), start, still, name="bias")[0] == 1


def test_kernels_decay():
    start = np.ones((3, 3, 4, 5), np.float32)
    still = [np.zeros_like(start)]
    decayed = stepped(lambda kernel: Optimizer([kernel], 0.3), start, still)
    assert np.allclose(decayed, 1 - 0.1 * 0.3)


@pytest.mark.parametrize("shape", [(3, 3, 5, 8), (1, 1, 3, 8), (2, 2, 4, 16)])
def test_a_kernel_is_updated_by_an_orthogonal_matrix_along_its_gradient(shape):
    start, gradient = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    step = start - stepped(lambda kernel: Optimizer([kernel], 0.0), start, [gradient])
    matrix = step.reshape(-1, shape[-1])
    values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
    assert ((values > 0.6) & (values < 1.3)).all()
    left, _, right = np.linalg.svd(gradient.reshape(-1, shape[-1]), full_matrices=False)
    nearest = left @ right
    agreement = (matrix * nearest).sum() / np.linalg.norm(matrix) / np.linalg.norm(nearest)
    assert agreement > 0.95


# Network


@settings(max_examples=12)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3]),
    filters=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    convs_per_block=st.integers(1, 2),
    normalization=st.booleans(),
    dense_units=st.sampled_from([0, 5]),
)
def test_any_size_and_depth_gives_probabilities(
    height, width, channels, filters, convs_per_block, normalization, dense_units
):
    parameters = Train(
        filters=filters,
        convs_per_block=convs_per_block,
        batch_normalization=normalization,
        dense_units=dense_units,
    )
    model = build((height, width, channels), 3, parameters).classifier
    probabilities = model(random_images(2, height, width, channels), training=False).numpy()
    assert probabilities.shape == (2, 3)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("normalization", [True, False])
def test_the_network_for_training_has_the_same_weights(normalization):
    parameters = Train(filters=[4, 6], batch_normalization=normalization)
    networks = [build((9, 8, 3), 4, parameters, for_training=choice) for choice in (False, True)]
    ours, theirs = ([weight.path for weight in x.logits.weights] for x in networks)
    assert ours == theirs
    kinds = [type(layer) for layer in networks[1].logits.layers]
    assert keras.layers.BatchNormalization not in kinds
    assert kinds.count(FusedBatchNormalization) == (4 if normalization else 0)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 5)])
def test_fused_batch_normalization_is_that_of_keras(precision, shape):
    random = np.random.default_rng(0)
    images = random.normal(3, 2, (8, *shape, 4)).astype("float32")
    errors = tf.constant(random.normal(size=images.shape), "float32")
    found = []
    for kind in (keras.layers.BatchNormalization, FusedBatchNormalization):
        layer = kind(momentum=0.9, dtype=keras.DTypePolicy(precision))
        layer.build(images.shape)
        layer.set_weights([np.linspace(start, start + 1, 4) for start in (0.5, -1, 2, 1)])
        x = tf.cast(images, layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        assert y.dtype == layer.compute_dtype
        weights = [layer.gamma.value, layer.beta.value]
        gradients = tape.gradient(y, [x, *weights], tf.cast(errors, y.dtype))
        found.append((y, *gradients, layer.moving_mean, layer.moving_variance, layer(x)))
    (*theirs, variance, inference), (*ours, our_variance, our_inference) = found
    tolerance = {"float32": 1e-5, "mixed_float16": 0.01, "mixed_bfloat16": 0.05}[precision]
    for expected, value in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(
            tf.cast(value, "float32"), tf.cast(expected, "float32"), tolerance, tolerance
        )
    count = 8 * shape[0] * shape[1]
    kept = 0.9 * np.linspace(1, 2, 4)
    unbiased = kept + (variance - kept) * count / (count - 1)
    np.testing.assert_allclose(our_variance, unbiased, 1e-4)
    assert our_inference.dtype == inference.dtype


def test_dropout_comes_before_each_dense_layer(network):
    names = [layer.name for layer in network.logits.layers]
    rates = {layer.name: layer.rate for layer in network.logits.layers if "dropout" in layer.name}
    assert rates == {"dense_dropout": 0.3, "dropout": 0.3}
    assert names[-4:] == ["dense_dropout", "dense", "dropout", "logits"]


def test_the_head_stays_small_for_large_images():
    small, large = (
        build((side, side, 3), 10, Train(filters=[8, 8])).classifier.count_params()
        for side in (64, 512)
    )
    assert large < small + 20_000  # of the first convolution


def test_logits_and_probabilities_share_their_weights(network):
    images = random_images(3)
    logits = network.logits(images, training=False).numpy()
    assert np.allclose(
        keras.ops.softmax(logits), network.classifier(images, training=False), atol=1e-6
    )
    assert [w.path for w in network.logits.weights] == [w.path for w in network.classifier.weights]


def test_with_flips_a_network_predicts_the_same_for_an_image_and_its_mirror_image(tmp_path):
    images = random_images(4)
    network = build((12, 9, 3), 4, Train(filters=[4, 8], augment={"flip": "horizontal"}))
    one, other = (network.logits(x, training=False) for x in (images, images[:, :, ::-1]))
    assert not np.allclose(one, other, atol=1e-3)
    expected = keras.ops.softmax((one + other) / 2)
    assert np.allclose(network.classifier(images, training=False), expected, atol=1e-6)
    assert np.allclose(network.classifier(images[:, :, ::-1], training=False), expected, atol=1e-6)
    assert [w.path for w in network.logits.weights] == [w.path for w in network.classifier.weights]
    model_file.save(network.classifier, tmp_path / "model.keras", SPEC)
    loaded, _ = model_file.load(tmp_path / "model.keras")
    assert np.array_equal(
        loaded(images, training=False), network.classifier(images, training=False)
    )


@pytest.fixture
def backbone(tmp_path):
    images = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(4, 3, strides=2)(x)
    x = keras.layers.BatchNormalization()(x)
    path = tmp_path / "small.keras"
    keras.Model(images, x).save(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_backbone_gets_three_channels_of_raw_pixels_in_inference_mode(backbone, channels):
    images = random_images(4, 16, 16, channels)
    network = build((16, 16, channels), 3, Train(), backbone)
    pixels = np.broadcast_to(images, (4, 16, 16, 3)).astype(np.float32)
    maps = keras.models.load_model(backbone)(pixels, training=False).numpy()
    assert maps.shape == (4, 7, 7, 4)
    halves = slice(0, 4), slice(3, 7)
    quarters = [maps[:, rows, columns].mean((1, 2)) for rows in halves for columns in halves]
    expected = np.concatenate(quarters, axis=1)
    for training in (False, True):
        assert np.allclose(network.backbone(images, training=training), expected, atol=1e-5)
    assert np.allclose(
        network.head(network.backbone(images)),
        network.classifier(images, training=False),
        atol=1e-6,
    )


def test_the_last_layers_of_a_nested_backbone_are_its_last(tmp_path):
    inner = keras.Input((None, None, 3))
    x = inner
    for number in range(4):
        x = keras.layers.Conv2D(3, 1, name=f"inner{number}")(x)
    pixels = keras.Input((None, None, 3), name="pixels")
    scaled = keras.layers.Conv2D(3, 1, name="scaling", trainable=False)(pixels)
    keras.Model(pixels, keras.Model(inner, x)(scaled)).save(tmp_path / "nested.keras")
    network = build((8, 8, 3), 2, Train(), tmp_path / "nested.keras")
    body = network.classifier.get_layer("backbone")
    names = [layer.name for layer in flatten_layers(body) if layer.weights]
    assert names == ["scaling", "inner0", "inner1", "inner2", "inner3"]
    trained = {weight.path.split("/")[-2] for weight in body.trainable_weights}
    assert trained == {"inner0", "inner1", "inner2", "inner3"}


def test_a_file_that_is_not_a_model_is_refused_as_backbone(tmp_path):
    (tmp_path / "text.keras").write_text("text")
    with pytest.raises(UserError, match="train.backbone: .*not a complete .*stages.backbone"):
        build((16, 16, 3), 3, Train(), tmp_path / "text.keras")


@pytest.mark.parametrize(
    ("channels", "kind", "layers", "message"),
    [
        (1, "float32", lambda x: keras.layers.Conv2D(2, 3)(x), "input .*, 3.*found"),
        (3, "float32", lambda x: [x, keras.layers.Conv2D(2, 3)(x)], "output .* or"),
        (3, "float32", lambda x: keras.layers.Reshape((-1, 3))(x), "output .* or"),
        (3, "bfloat16", lambda x: keras.layers.Conv2D(2, 3)(x), "float32 .*'bfloat16'"),
    ],
)
def test_an_unsuitable_backbone_is_refused(tmp_path, channels, kind, layers, message):
    keras.config.set_dtype_policy(kind)
    images = keras.Input((16, 16, channels))
    keras.Model(images, layers(images)).save(tmp_path / "other.keras")
    keras.config.set_dtype_policy("float32")
    with pytest.raises(UserError, match=f"other.keras: train.backbone: .*{message}"):
        build((16, 16, 3), 3, Train(), tmp_path / "other.keras")


def test_a_truncated_backbone_is_refused(backbone):
    backbone.write_bytes(backbone.read_bytes()[:-100])
    with pytest.raises(UserError, match="train.backbone: .*not a complete"):
        build((16, 16, 3), 3, Train(), backbone)


def test_a_backbone_of_another_image_size_names_the_parameter_to_change(tmp_path):
    images = keras.Input((8, 8, 3))
    keras.Model(images, keras.layers.Conv2D(2, 3)(images)).save(tmp_path / "fixed.keras")
    with pytest.raises(UserError, match="prepare.image_size"):
        build((16, 16, 3), 3, Train(), tmp_path / "fixed.keras")


# Inference


def test_an_image_gets_the_same_probabilities_alone_and_in_a_batch(network):
    images = random_images(2 * BATCH_SIZE + 5)
    run = make_predict_fn(network.classifier)
    together = run([images])
    assert together.shape == (len(images), 4) and together.dtype == np.float32
    assert np.array_equal(together, run([images[:7], images[7:BATCH_SIZE], images[BATCH_SIZE:]]))
    assert np.array_equal(together[-1:], run([images[-1:]]))
    assert run([]).shape == (0, 4)


# Fit


def phase(random_layers=(), precision="float32", augment=None):
    """Return a phase that trains a dense layer on vectors."""
    rng = np.random.default_rng(0)
    train, val = (
        Features(rng.normal(size=(80, 5)).astype(np.float32), rng.integers(0, 3, 80))
        for _ in range(2)
    )
    x = inputs = keras.Input((5,))
    for layer in random_layers:
        x = layer(x)
    train_model = keras.Model(inputs, keras.layers.Dense(3, dtype=precision)(x))
    eval_model = keras.Sequential([inputs, keras.layers.Dense(3, activation="softmax")])
    return Phase("train", train_model, eval_model, train, val, 4, 0.01, augment)


def fitted(phase, **parameters):
    """Train one phase; return the history."""
    parameters = Train(batch_size=16, weight_decay=0, **parameters)
    return fit([phase], parameters, Checkpoint("a"), Replicas(), print, lambda *_: None)[0]


def test_half_precision_learns_from_small_gradients():
    trainer = Trainer(phase(precision="mixed_float16"), Train(), 0, Replicas())
    trainer.class_weights = np.full(3, 1e-7)
    losses = [trainer.run_epoch(epoch)["val_loss"] for epoch in range(4)]
    assert len({*losses}) == 4


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    read = []
    gather = Features.gather
    monkeypatch.setattr(Features, "gather", lambda *given: read.append(given[1]) or gather(*given))
    fitted(phase())
    orders = np.reshape(read, (4, 80))
    assert (np.sort(orders) == np.arange(80)).all()
    for one, other in ((orders[0], orders[1]), (orders[1], orders[2]), (orders[0], np.arange(80))):
        assert np.mean(one == other) < 0.1


def test_reported_losses_are_without_label_smoothing_and_class_weights():
    found = []
    for smoothing, weight in ((0.0, 1), (0.4, 3)):
        trainer = Trainer(phase(), Train(label_smoothing=smoothing), 0, Replicas())
        trainer.class_weights = np.full(3, weight)
        trainer.phase.train_model.set_weights([np.ones((5, 3)), np.arange(3)])
        trainer.learning_rate = lambda _: 1e-9
        found.append(trainer.run_epoch(0))
    for name in ("loss", "val_loss"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5)


def test_the_learning_rate_rises_linearly_and_falls_linearly_to_zero():
    trainer = Trainer(phase(), Train(warmup_fraction=0.25), 0, Replicas())
    rates = [trainer.learning_rate(step) for step in range(4 * trainer.steps)]
    assert len(rates) == 40 and np.argmax(rates) == 9 and 0.009 < max(rates) <= 0.01
    assert np.allclose(np.diff(rates[:10]), rates[0])
    assert np.allclose(np.diff(rates[10:]), -rates[-1])


def test_patience_stops_after_epochs_without_a_better_loss():
    long = dataclasses.replace(phase(), epochs=30, learning_rate=1.0)
    losses = [row["val_loss"] for row in fitted(long, patience=2)]
    assert 3 <= len(losses) < 30 and len(losses) - (np.argmin(losses) + 1) == 2


def test_balanced_classes_have_equal_total_weights():
    labels = np.array([0, 1, 1, 1, 2, 2])
    assert np.allclose(class_weights("balanced", labels, 3) * np.bincount(labels), 2)
    assert np.array_equal(class_weights("none", labels, 3), np.ones(3))
    assert np.isfinite(class_weights("balanced", labels, 4)).all()


class Noise(keras.layers.Layer):
    """A layer that takes seeds from a generator and records them."""

    def __init__(self, record):
        super().__init__()
        self.generator, self.record = keras.random.SeedGenerator(1), record

    def call(self, x, training=False):
        if training:
            self.record(self.generator.next())
        return x


def test_no_random_number_is_drawn_twice():
    seeds = []

    def record(seed):
        tf.numpy_function(lambda seed: seeds.append(tuple(seed.tolist())), [seed], [])

    def augment(images, seed):
        record(seed)
        return images

    fitted(phase([Noise(record), Noise(record)], augment=augment))
    assert len(seeds) == len(set(seeds)) == 4 * 10 * 3  # epochs, steps, sources


# Model file

SPEC = ImageSpec(["a", "é", "u", "y"], (12, 9, 3), "rgb", "pad", 1.25)


def test_a_model_file_is_the_same_bytes_at_every_save(network, tmp_path):
    for name in ("one.keras", "two.keras"):
        model_file.save(network.classifier, tmp_path / name, SPEC)
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()


def test_plain_keras_loads_a_model_file(network, tmp_path):
    model_file.save(network.classifier, tmp_path / "model.keras", SPEC)
    plain = keras.models.load_model(tmp_path / "model.keras")
    images = random_images(3)
    assert np.array_equal(plain(images), network.classifier(images))
    model, spec = model_file.load(tmp_path / "model.keras")
    assert spec == SPEC
    assert np.array_equal(model(images), network.classifier(images))


def test_a_model_file_whose_network_is_not_that_of_its_spec_is_refused(network, tmp_path):
    path = tmp_path / "model.keras"
    for change in ({"classes": ["a", "é", "z"]}, {"image_shape": (9, 12, 3)}):
        model_file.save(network.classifier, path, dataclasses.replace(SPEC, **change))
        with pytest.raises(UserError, match=r"its network maps .* but its image_spec.json says"):
            model_file.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_spec.json", b"0" * (MAX_SPEC_BYTES + 1))
    with pytest.raises(UserError, match="image_spec.json: not a valid image spec .larger than"):
        model_file.load(path)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """The model as the train stage saves it, loaded by plain Keras."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model_file.save(accept_floats(network.classifier), path, SPEC)
    return keras.models.load_model(path)


USES = {
    "uint8": lambda images: images,
    "int64": lambda images: images.astype(np.int64),
    "float32 to 255": lambda images: images.astype(np.float32),
    "float64 to 1": lambda images: images / 255.0,
    "float32 to 1": lambda images: (images / 255).astype(np.float32),
    "float16 to 1": lambda images: (images / 255).astype(np.float16),
    "a tensor to 1": lambda images: tf.cast(images, tf.float32) / 255,
}


@pytest.mark.parametrize("use", USES)
def test_a_saved_model_takes_pixels_of_any_type(network, saved, use):
    images = random_images(BATCH_SIZE)
    images[0] = 0
    expected = network.classifier(images).numpy()
    assert len(np.unique(expected.argmax(axis=1))) > 1 or np.ptp(expected[:, 0]) > 0
    assert np.array_equal(saved(USES[use](images)), expected)
    assert np.array_equal(saved.predict(USES[use](images), verbose=0), expected)


@pytest.mark.parametrize(
    "convert",
    [
        lambda images: images / 127.5 - 1,
        lambda images: (images - [123.7, 116.3, 103.5]) / [58.4, 57.1, 57.4],
        lambda images: images.astype(np.uint16) * 257,
        lambda images: np.where(images < 128, np.nan, images),
    ],
)
def test_a_saved_model_gives_nan_for_what_are_no_pixels(saved, convert):
    images = random_images(4)
    assert np.isnan(saved.predict(convert(images), verbose=0)).all()
    mixed = np.stack([images[0], convert(images[:1].astype(np.float64))[0]])
    assert np.isnan(saved(mixed)).all(axis=1).tolist() == [False, True]


def test_a_saved_model_gives_the_same_for_uint8_even_if_an_image_is_almost_black(network, saved):
    images = random_images(6) % 2
    assert np.array_equal(saved(images), network.classifier(images))


def test_a_model_file_has_no_dates(network, tmp_path):
    model_file.save(network.classifier, tmp_path / "model.keras", SPEC)
    with zipfile.ZipFile(tmp_path / "model.keras") as saved:
        assert {info.date_time for info in saved.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert json.loads(saved.read("metadata.json"))["date_saved"].startswith("1980")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model file; `dvc repro`"),
        (b"text", "not a model file"),
        ("plain", "not one of this pipeline"),
        ({"image_spec.json": SPEC.to_json()}, "can't load it"),
        ({"image_spec.json": "{broken"}, "not a valid image spec"),
        ({"image_spec.json": b"\xff\xfe"}, "not a valid image spec"),
        ({"image_spec.json": '{"classes": ["a", "b"]}'}, "not a valid image spec .*image_shape"),
    ],
)
def test_an_unusable_model_file_is_refused_in_one_line(network, tmp_path, content, message):
    path = tmp_path / "model.keras"
    if content == "plain":
        network.classifier.save(path)
    elif isinstance(content, dict):
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        model_file.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Calibration


def drawn_labels(probabilities, seed=0):
    draws = np.random.default_rng(seed).random((len(probabilities), 1))
    return (probabilities.cumsum(1) < draws).sum(1).clip(max=probabilities.shape[1] - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_an_applied_temperature_is_recovered(temperature):
    true = np.random.default_rng(1).dirichlet([0.3] * 5, 20_000)
    labels = drawn_labels(true)
    found = fit_temperature(apply_temperature(true, 1 / temperature), labels)
    assert found == pytest.approx(temperature, rel=0.05)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=6, unique=True), st.floats(0.2, 5))
def test_a_temperature_never_changes_the_predicted_class(weights, temperature):
    probabilities = np.array([weights]) / sum(weights)
    assert apply_temperature(probabilities, temperature).argmax() == probabilities.argmax()


def test_a_temperature_is_one_without_enough_evidence_and_bounded_otherwise():
    right = np.full((200, 2), [0.9, 0.1])
    zeros = np.zeros(200, int)
    assert fit_temperature(right, zeros) == 1
    assert fit_temperature(right[:20], 1 - zeros[:20]) == 1
    assert fit_temperature(right, 1 - zeros) == LIMITS[1]


def test_log_loss_equals_scikit_learns():
    from sklearn.metrics import log_loss as peer

    probabilities = np.random.default_rng(0).dirichlet([1] * 4, 50)
    labels = drawn_labels(probabilities)
    assert log_loss(probabilities, labels) == pytest.approx(peer(labels, probabilities))


# Checkpoint


def test_a_checkpoint_loads_what_was_saved(tmp_path):
    checkpoint = Checkpoint("a")
    assert checkpoint.load() is None
    arrays = {
        "weights": [np.arange(3.0), np.zeros((2, 2), np.float32)],
        "optimizer": [np.ones(1)],
    }
    checkpoint.save(arrays, {"epoch": 3, "loss": 0.1})
    loaded, state = Checkpoint("a").load()
    assert state == {"epoch": 3, "loss": 0.1}
    assert loaded.keys() == arrays.keys()
    for name, items in arrays.items():
        for item, other in zip(items, loaded[name], strict=True):
            assert item.dtype == other.dtype and np.array_equal(item, other)
    assert Checkpoint("b").load() is None
    checkpoint.delete()
    assert checkpoint.load() is None


def test_a_damaged_checkpoint_is_ignored_with_a_message(capsys):
    """It loads as it was saved, or not at all, whichever byte is another or the last."""
    checkpoint, weights, state = Checkpoint("a"), np.arange(3000.0), {"epoch": 3}
    checkpoint.save({"weights": [weights]}, state)
    content = checkpoint.path.read_bytes()
    size = len(content)
    damaged = [content[:end] for end in range(0, size, 500)]
    for position in (*range(700), *range(size - 400, size)):
        for bit in (1, 64):
            other = bytes([content[position] ^ bit])
            damaged.append(content[:position] + other + content[position + 1 :])
    refused = 0
    for other in damaged:
        checkpoint.path.write_bytes(other)
        loaded = checkpoint.load()
        assert ("damaged" in capsys.readouterr().out) == (loaded is None)
        if loaded is None:
            refused += 1
        else:
            assert np.array_equal(loaded[0]["weights"], [weights]) and loaded[1] == state
    assert refused > 0.7 * len(damaged)


def test_only_the_newest_checkpoints_are_kept():
    for name in "abcdefgh":
        Checkpoint(name).save({"weights": [np.zeros(1)]}, {})
    left = list(Checkpoint("h").path.parent.iterdir())
    assert len(left) <= 5 and Checkpoint("h").load() is not None


def test_two_runs_of_one_training_can_save_at_the_same_time(tmp_path):
    code = (
        "import numpy as np; from stages.model.checkpoint import Checkpoint\n"
        "for n in range(50): Checkpoint('a').save({'weights': [np.zeros(99)]}, {'epoch': n})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        for _ in range(2)
    ]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert Checkpoint("a").load()[1] == {"epoch": 49}
