"""One pass of a network gives the very probabilities of predict, and its last hidden layer."""

import numpy as np
import pytest

from stages.data.arrays import ImageSpec
from stages.model import device, model_file
from stages.model.parameters import Train


@pytest.mark.parametrize("flip", ["none", "horizontal"])
@pytest.mark.parametrize("dense_units", [0, 7])
def test_both_outputs_of_a_model_file(tmp_path, flip, dense_units):
    device.setup()
    from stages.model.inference import make_predict_fn
    from stages.model.network import accept_floats, build, flatten_layers
    from stages.report.outputs import predict_both

    values = {"filters": [4], "dense_units": dense_units, "augment": {"flip": flip}}
    network = build((12, 9, 3), 5, Train.model_validate(values)).classifier
    spec = ImageSpec([*"abcde"], (12, 9, 3), "rgb", "crop")
    model_file.save(accept_floats(network), tmp_path / "model.keras", spec)
    model, _ = model_file.load(tmp_path / "model.keras")
    images = np.random.default_rng(0).integers(0, 256, (70, 12, 9, 3)).astype(np.uint8)
    probabilities, vectors = predict_both(model, [images[:40], images[40:]])
    expected = make_predict_fn(model)([images[:40], images[40:]])
    assert probabilities.tobytes() == expected.tobytes()
    assert vectors.shape == (70, dense_units or 4)
    if flip == "none":  # the logits follow from the vectors
        layer = next(layer for layer in flatten_layers(model) if layer.name == "logits")
        kernel, bias = layer.get_weights()
        logits = vectors @ kernel + bias
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert shares == pytest.approx(expected, abs=1e-5)
