"""The command backbone."""

import hashlib
import http.server
import json
import math
import os
import sys
import threading
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import options
from factories import make_prepared
from test_train import run_killed_after

from stages import backbone as command
from stages.backbone import backbone
from stages.data.arrays import ImageSpec
from stages.deploy import onnx_model
from stages.display.backbones import BACKBONES, propose, table
from stages.model import model_file
from stages.model.network import accept_floats, build, flatten_layers
from stages.model.parameters import Train
from stages.pretrained import dinov2
from stages.pretrained.safetensors import read_tensors
from stages.report.heatmaps import make_heatmap_fn
from stages.run.cli import UserError

SIZE = 56  # pixels: 4 * 4 patches
SMALL = dinov2.Variant(128, 4, "main", None, blocks=2, grid=7)
PLAIN = SMALL._replace(registers=0)


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
        UserError, match="MobileNetV2: can't download the weights: .*--weights FILE"
    ) as caught:
        backbone("MobileNetV2", tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def write_tensors(path, tensors):
    """Write float32 or float16 arrays as .safetensors."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        content = values.tobytes()
        header[name] = {
            "dtype": {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}[
                str(values.dtype)
            ],
            "shape": values.shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def random_tensors(variant, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal("norm" in name and name.endswith("weight"), 0.2, shape).astype("f4")
        for name, shape in dinov2.tensor_shapes(variant).items()
    }


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small network's file on a local web server, as if it was published."""
    folder = tmp_path / "web"
    folder.mkdir()
    path = write_tensors(folder / "model.safetensors", random_tensors(SMALL))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(dinov2.VARIANTS, "small", SMALL._replace(sha256=digest))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        source = f"http://127.0.0.1:{server.server_port}/model.safetensors"
        monkeypatch.setattr(dinov2, "SOURCE", source)
        (cache := tmp_path / "keras").mkdir()
        get_file = partial(keras.utils.get_file, cache_dir=cache)
        monkeypatch.setattr(keras.utils, "get_file", get_file)
        yield path
        server.shutdown()


def pixels(seed=1, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (3, size, size, 3), dtype=np.uint8)


def reference(variant, tensors, images):
    """DINOv2 in NumPy, float64, for the size that its positions have."""
    t = {name: values.astype(float) for name, values in tensors.items()}
    erf = np.vectorize(math.erf)

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    n, side = len(x), images.shape[1] // 14
    x = x.reshape(n, side, 14, side, 14, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, side**2, -1)
    projection = "embeddings.patch_embeddings.projection"
    x = x @ t[f"{projection}.weight"].reshape(variant.width, -1).T + t[f"{projection}.bias"]
    token = np.broadcast_to(t["embeddings.cls_token"], (n, 1, variant.width))
    x = np.concatenate([token, x], 1) + t["embeddings.position_embeddings"]
    if variant.registers:
        registers = np.broadcast_to(
            t["embeddings.register_tokens"], (n, variant.registers, variant.width)
        )
        x = np.concatenate([x[:, :1], registers, x[:, 1:]], 1)
    for block in range(variant.blocks):
        start = f"encoder.layer.{block}"
        y = norm(x, f"{start}.norm1")
        query, key, value = (
            linear(y, f"{start}.attention.attention.{part}")
            .reshape(n, -1, variant.heads, 64)
            .swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        weights = np.exp(query @ key.swapaxes(2, 3) / 8)
        y = weights / weights.sum(-1, keepdims=True) @ value
        y = linear(y.swapaxes(1, 2).reshape(x.shape), f"{start}.attention.output.dense")
        x = x + y * t[f"{start}.layer_scale1.lambda1"]
        y = linear(norm(x, f"{start}.norm2"), f"{start}.mlp.fc1")
        y = linear(y * (1 + erf(y / 2**0.5)) / 2, f"{start}.mlp.fc2")
        x = x + y * t[f"{start}.layer_scale2.lambda1"]
    x = norm(x, "layernorm")
    return np.concatenate([x[:, 0], x[:, 1 + variant.registers :].mean(1)], 1)


@pytest.mark.parametrize("variant", [SMALL, PLAIN], ids=["with registers", "without"])
def test_a_vision_transformer_is_the_published_one(tmp_path, monkeypatch, variant):
    monkeypatch.setitem(dinov2.VARIANTS, "small", variant)
    tensors = random_tensors(variant)
    file = write_tensors(tmp_path / "model.safetensors", tensors)
    path = backbone("small", tmp_path, weights=file, size=7 * 14)
    images = pixels(size=7 * 14)
    found = keras.saving.load_model(path, safe_mode=True)(images.astype("f4"))
    assert np.allclose(found, reference(variant, tensors, images), atol=2e-4)


# Of torch.nn.functional.interpolate (PyTorch 2.14), mode bicubic, without and with antialias: the
# numbers 0, 1, 8, 27, ... of a row of 7 patches in each of 7 rows, resized to 3 and to 9.
RESIZED = {
    (3, False): [-0.0926, 27.0, 160.4259],
    (3, True): [-0.4194, 30.2747, 151.0968],
    (9, False): [
        -0.0658,
        -0.0926,
        2.6022,
        11.4061,
        27.0,
        51.0631,
        91.9905,
        160.4259,
        221.9919,
    ],
    (9, True): [
        -0.0473,
        0.1786,
        3.0412,
        11.07,
        27.0,
        53.8189,
        94.5144,
        158.6072,
        220.3077,
    ],
}


@pytest.mark.parametrize(("side", "antialias"), RESIZED)
def test_positions_are_resized_as_in_pytorch(side, antialias):
    row = np.arange(7.0) ** 3
    for square in (np.tile(row, (7, 1)), np.tile(row[:, None], (1, 7))):
        found = dinov2._interpolate(square.reshape(-1, 1), side, antialias).reshape(side, side)
        found = found if (square[0] == row).all() else found.T
        assert np.allclose(found, RESIZED[side, antialias], atol=2e-4)
    same = np.random.default_rng(0).normal(size=(49, 3)).astype("f4")
    assert np.array_equal(dinov2._interpolate(same, 7, antialias), same)


def test_a_transformer_trains_exports_and_explains_as_any_backbone(tmp_path, published):
    path = backbone("small", tmp_path, size=SIZE)
    network = build((SIZE, SIZE, 3), 3, Train(dense_units=0), path)
    assert network.backbone.output_shape == (None, 256)
    images = pixels()
    classifier = accept_floats(network.classifier)
    spec = ImageSpec(["a", "b", "c"], (SIZE, SIZE, 3), "rgb", "crop")
    model_file.save(classifier, tmp_path / "model.keras", spec)
    loaded, _ = model_file.load(tmp_path / "model.keras")
    expected = np.asarray(network.classifier(images))
    assert np.array_equal(loaded(images), expected)
    onnx_model.convert(network.classifier, tmp_path / "model.onnx", {})
    answer, _ = onnx_model.load(tmp_path / "model.onnx")
    assert np.allclose(answer([images]), expected, atol=1e-5)
    heatmaps = make_heatmap_fn(classifier)(images, np.array([0, 1, 2]))
    assert heatmaps.shape == images.shape[:3] and np.allclose(heatmaps.max((1, 2)), 1)


def test_a_wrong_download_is_one_line(tmp_path, published, monkeypatch):
    content = published.read_bytes()
    for wrong, message in (
        (content[:-4], "Incomplete or corrupted file"),
        (content[:-1] + b"x", "Incomplete or corrupted file"),
        (None, "URL fetch failure .*404"),
    ):
        published.unlink() if wrong is None else published.write_bytes(wrong)
        with pytest.raises(UserError, match=f"small: can't download.*{message}.*--weights") as no:
            backbone("small", tmp_path)
        assert "\n" not in str(no.value)
    assert not list(tmp_path.glob("*.keras"))


def changed(**changes):
    """Return the tensors of a small network with some changed; None drops one."""
    tensors = random_tensors(PLAIN) | changes
    return {name: values for name, values in tensors.items() if values is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (random_tensors(SMALL), r"another network: embeddings.register_tokens \(1, 4, 128\)"),
        (
            random_tensors(PLAIN._replace(width=64)),
            r"cls_token \(1, 1, 64\), expected \(1, 1, 128\)",
        ),
        (random_tensors(PLAIN._replace(blocks=3)), "encoder.layer.2.attention.*expected none"),
        (changed(**{"layernorm.bias": None}), r"layernorm.bias is missing, expected \(128,\)"),
        (
            {"conv1.weight": np.zeros((2, 2), "f4")},
            "another network: embeddings.cls_token is missing",
        ),
        (changed(**{"layernorm.bias": np.zeros(128, "i8")}), "numbers of type I64; expected F32"),
    ],
)
def test_a_file_of_another_network_is_one_line(tmp_path, monkeypatch, tensors, message):
    monkeypatch.setitem(dinov2.VARIANTS, "small", PLAIN)
    file = write_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(UserError, match=f"other.safetensors: .*{message}") as caught:
        backbone("small", tmp_path, weights=file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_file_is_one_line(tmp_path, monkeypatch, length):
    monkeypatch.setitem(dinov2.VARIANTS, "small", PLAIN)
    file = write_tensors(tmp_path / "cut.safetensors", random_tensors(PLAIN))
    file.write_bytes(file.read_bytes()[:length])
    message = "an incomplete copy" if length < 0 else "not a .safetensors file, or cut off"
    with pytest.raises(UserError, match=f"cut.safetensors: .*{message}"):
        backbone("small", tmp_path, weights=file)


def test_half_precision_is_read_as_single(tmp_path):
    values = np.float32([1, -2.5, 3e-3, 0])
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = write_tensors(tmp_path / "half", {"a": values.astype("f2"), "b": upper, "c": values})
    found = read_tensors(path)
    assert [found[name].dtype for name in "abc"] == [np.float32] * 3
    assert np.allclose(found["a"], values, rtol=1e-3) and np.allclose(found["b"], values, rtol=1e-2)
    assert np.array_equal(found["c"], values)


def test_the_weights_of_keras_can_be_a_file(tmp_path):
    network = keras.applications.MobileNetV3Small(include_top=False, weights=None)
    network.save_weights(file := tmp_path / "small_notop.weights.h5")
    path = backbone("MobileNetV3Small", tmp_path, weights=file)
    first = keras.models.load_model(path).get_weights()[0]
    assert np.array_equal(first, network.get_weights()[0])
    with pytest.raises(
        UserError, match="notop.weights.h5: not the weights of MobileNetV2 without top"
    ):
        backbone("MobileNetV2", tmp_path, weights=file)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dinov2-small", {"size": 230}, "--size: 230 is no multiple of 14 .* 224 and 238"),
        ("MobileNetV2", {"size": 224}, "--size: MobileNetV2 takes images of any size"),
        ("dinov2-small", {"weights": "missing"}, "--weights: missing: no such file"),
        ("dinov2smal", {}, "dinov2smal: no such network .*dinov2-small"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        backbone(name, tmp_path, **changes)


def test_without_a_name_the_command_lists_backbones(capsys):
    command.main(options("backbone"))
    printed = capsys.readouterr().out
    assert printed == f"{table()}\n"
    rows = printed.splitlines()[1 : len(BACKBONES) + 1]
    assert {row.split()[0] for row in rows} == set(BACKBONES)
    assert len({len(row.split("Apache")[0].split("MIT")[0]) for row in rows}) == 1  # aligned
    with pytest.raises(UserError, match="name a backbone"):
        command.main(options("backbone", "--size", "224"))


def test_every_backbone_of_the_list_can_be_written():
    known = dinov2.VARIANTS.keys() | set(dir(keras.applications))
    assert BACKBONES.keys() <= known and dinov2.VARIANTS.keys() <= BACKBONES.keys()


def test_the_proposed_backbone_is_the_most_accurate_that_takes_minutes():
    accuracies = [BACKBONES[propose(images, 2)].top1 for images in (100, 3_781, 12_000, 10**7)]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) > 2
    assert propose(10**7, 2) == "MobileNetV3Small"
    assert BACKBONES[propose(3_781, 64)].top1 > BACKBONES[propose(3_781, 1)].top1


def test_an_interrupted_fine_tuning_of_a_transformer_ends_with_the_same_bytes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setitem(dinov2.VARIANTS, "small", SMALL)
    make_prepared(tmp_path, ["a", "b"], {"train": 32, "val": 16}, size=(28, 28, 3))
    path = backbone("small", weights=write_tensors(Path("w"), random_tensors(SMALL)), size=28)
    changes = {
        "backbone": path.name, "epochs": 1, "fine_tune_fraction": 0.5, "fine_tune_epochs": 2,
        "learning_rate": 1e-6, "fine_tune_learning_rate": 1e-4,
        "precision": "mixed_bfloat16",
    }  # fmt: skip
    assert run_killed_after(2, **changes) == [1, 2]
    assert run_killed_after(math.inf, **changes) == [3]
    resumed = Path("data/model.keras").read_bytes()
    assert run_killed_after(math.inf, **changes) == [1, 2, 3]
    assert Path("data/model.keras").read_bytes() == resumed
    before = keras.models.load_model(path)
    after = {one.name: one for one in flatten_layers(keras.models.load_model("data/model.keras"))}
    for name, is_tuned in (("patches", False), ("block1_mlp2", True), ("scaling", False)):
        old = next(one for one in flatten_layers(before) if one.name == name).get_weights()
        same = np.array_equal(old[0], after[name].get_weights()[0])
        assert same != is_tuned
