"""A trained model as a backbone: what it has learned from is not evaluated."""

import numpy as np
import pandas as pd
import pytest
from factories import make_prepared

from stages import backbone as command
from stages.backbone import from_model
from stages.data.arrays import ImageSpec, read_index, read_split
from stages.evaluate import evaluate
from stages.model import model_file
from stages.model.model_file import Learned
from stages.model.network import accept_floats, build
from stages.model.parameters import Train
from stages.report.outputs import feature_network
from stages.report.parameters import Evaluate
from stages.run.cli import UserError
from stages.run.files import write_csv
from stages.train import train

CLASSES = ["ant", "bee", "cat"]
SIZE = (16, 16, 3)
TINY = {"filters": [4], "dense_units": 4, "epochs": 1, "batch_size": 8, "convs_per_block": 1}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Prepared images, and a network for them with random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(command, "changed_since_run", lambda *_: [])
    make_prepared(tmp_path, CLASSES, {"train": 20, "val": 60, "test": 80}, size=SIZE)
    write_model()
    return tmp_path


def write_model(backbone=None, learned=None, flip="none"):
    parameters = Train(**TINY, augment={"flip": flip})
    classifier = build(SIZE, 3, parameters, backbone).classifier
    spec = ImageSpec.read("data/prepared/image_spec.json")
    model_file.save(accept_floats(classifier), "data/model.keras", spec, learned)


def digests(*splits):
    index = read_index("data/prepared/index.csv")
    return index["digest"][index["split"].isin(splits)]


@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_it_maps_pixels_to_the_features_of_the_model(place, flip):
    write_model(flip=flip)
    path = from_model("ours")
    assert path.name == "ours.keras" and path.parent.name == "backbones"
    body = build(SIZE, 3, Train(**TINY), path).backbone
    images = read_split("data/prepared/test").gather(np.arange(9))
    expected = feature_network(model_file.load("data/model.keras")[0])(images)
    assert np.allclose(body(images), expected, atol=1e-6) and np.ptp(expected) > 0
    learned = model_file.read_learned(path)
    assert learned.trained.dtype == learned.validated.dtype == np.uint64
    assert (learned.trained == model_file.image_keys(digests("train"))).all()
    assert (learned.validated == model_file.image_keys(digests("val"))).all()


def test_what_was_learned_is_remembered_over_trainings_and_backbones(place):
    path = from_model("first")
    train(Train(**TINY, backbone="first.keras"))
    first = model_file.read_learned(path)
    again = model_file.read_learned("data/model.keras")
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert list(map(len, first)) == [20, 60]
    make_prepared(place, CLASSES, {"train": 30, "val": 50, "test": 80}, size=SIZE)
    index = read_index("data/prepared/index.csv")
    index["digest"] = [f"{row:064x}" for row in range(1, len(index) + 1)]  # as of new images
    index["digest"] = index["digest"].str[-16:] + index["digest"].str[:48]
    write_csv("data/prepared/index.csv", index)
    second = model_file.read_learned(from_model("second"))
    assert list(map(len, second)) == [50, 110]
    assert all(np.isin(one, other).all() for one, other in zip(first, second, strict=True))


def test_images_that_the_backbone_has_learned_from_are_not_evaluated(place, capsys):
    """Themselves, after a change of the splits, and near duplicates of what is excluded today."""
    values = evaluate(Evaluate(), dataset="data/pets")
    index = read_index("data/prepared/index.csv")
    tests = index[index["split"] == "test"]
    excluded = {
        "path": "x.png",
        "class": "ant",
        "split": "",
        "digest": "f" * 64,
        "array_index": pd.NA,
    }
    excluded |= {"was": "", "exclusion_reason": "near duplicate"}
    write_csv("data/prepared/index.csv", pd.concat([index, pd.DataFrame([excluded])]))
    pair = {"path": ["x.png"], "other_path": [tests["path"].iloc[7]]}
    write_csv("data/prepared/duplicates.csv", pd.DataFrame(pair))
    trained = [*tests["digest"][:3], *digests("val")[:2], "f" * 64]
    validated = [*tests["digest"][3:5], *digests("val")[2:30]]  # the latter still are in val
    write_model(learned=Learned(*map(model_file.image_keys, (trained, validated))))
    capsys.readouterr()
    fewer = evaluate(Evaluate(), dataset="data/pets")
    assert values["images"] == 80 and fewer["images"] == 74
    assert "left out  8 images of val and test" in capsys.readouterr().out
    left_out = {*tests["path"][:5], tests["path"].iloc[7]}
    listed = pd.read_csv("metrics/predictions.csv")["path"]
    assert set(listed) == set(tests["path"]) - left_out
    summary = pd.read_csv("metrics/summary.csv").set_index("name")["value"]
    assert summary["images"] == "20 train, 58 val, 74 test, 9 excluded"

    write_model(learned=Learned(*map(model_file.image_keys, (tests["digest"], []))))
    with pytest.raises(UserError, match="has learned from all test images"):
        evaluate(Evaluate())


def test_what_is_no_model_of_these_images_is_refused(place, monkeypatch):
    from_model("ours")
    with pytest.raises(UserError, match=r"ours.keras exists"):
        from_model("ours")
    monkeypatch.setattr(command, "changed_since_run", lambda *_: ["prepare: data/pets"])
    with pytest.raises(UserError, match=r"not of the present data \(prepare: data/pets\)"):
        from_model("other")
    gray = ImageSpec(CLASSES, (16, 16, 1), "grayscale", "crop")
    classifier = build((16, 16, 1), 3, Train(**TINY)).classifier
    model_file.save(accept_floats(classifier), "data/model.keras", gray)
    with pytest.raises(UserError, match="takes gray images"):
        from_model("other")
