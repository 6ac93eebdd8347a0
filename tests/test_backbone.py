"""The command backbone."""

import os
import sys

import keras
import numpy as np
import pytest

from stages.backbone import backbone
from stages.run.cli import UserError


@pytest.mark.parametrize("name", ["MobileNet", "VGG16", "MobileNetV3Small"])
def test_a_backbone_takes_raw_pixels(tmp_path, name):
    variables = dict(os.environ)
    path = backbone(name, tmp_path, weights=None)
    assert dict(os.environ) == variables
    model = keras.models.load_model(path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    module = sys.modules[getattr(keras.applications, name).__module__]
    if name == "MobileNetV3Small":  # it scales by itself
        assert "scaling" not in [layer.name for layer in model.layers]
        assert np.array_equal(module.preprocess_input(pixels.copy()), pixels)
    else:
        scaling = keras.Model(model.input, model.get_layer("scaling").output)
        expected = np.asarray(module.preprocess_input(pixels.copy()))
        assert np.allclose(scaling(pixels), expected, rtol=1e-5, atol=1e-4)
    assert model(pixels).shape[:3] == (2, 2, 2)


def test_an_unknown_backbone_names_similar_ones(tmp_path):
    with pytest.raises(UserError, match="MobilNetV2: no such network .*MobileNetV2"):
        backbone("MobilNetV2", tmp_path)


def test_without_internet_access_there_is_one_clear_line(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(
        UserError, match="MobileNetV2: can't download the ImageNet weights"
    ) as caught:
        backbone("MobileNetV2", tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
