"""The files of data/prepared: checked where they are read, so that none is believed for another."""

import json

import numpy as np
import pytest
from factories import make_prepared

from stages.data.arrays import MAX_SPEC_BYTES, ImageSpec, read_index, read_split
from stages.run.cli import UserError

SPEC = ImageSpec(["a", "é"], (8, 8, 1), "grayscale", "pad", 1.25, 4095)


@pytest.fixture
def prepared(tmp_path):
    make_prepared(tmp_path, ["a", "b", "c"], {"train": 9, "val": 5})
    return tmp_path / "data/prepared"


def test_a_spec_is_read_as_it_was_written(tmp_path):
    SPEC.write(tmp_path / "image_spec.json")
    assert ImageSpec.read(tmp_path / "image_spec.json") == SPEC
    assert ImageSpec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("classes", [3, "ab", [], [1, 2], ["a", "a"], {"a": 1}, None, ["a", ["b"]], ["a", {}]]),
        ("image_shape", [3, [8, 8], [8, 8, 2], [8.0, 8, 1], [0, 8, 1], [-1, 8, 1], "881", None]),
        ("image_shape", [[10**9, 8, 1], [True, 8, 1], [8, 8, 1, 1], [8, 8, None], [[8], 8, 1], {}]),
        ("color_mode", ["rgb", "RGB", None, 1, ["grayscale"]]),
        ("resize", ["zoom", None, 1, ["pad"]]),
        ("temperature", [0, -1, "1", None, float("inf"), float("nan"), True, [1]]),
        ("white_level", [0, 65536, 255.0, "255", None, True]),
        ("another", [1]),
    ],
)
def test_a_value_of_another_kind_is_named(key, values):
    for value in values:
        text = json.dumps(json.loads(SPEC.to_json()) | {key: value})
        with pytest.raises(UserError, match=rf"^m.keras: spec: .*{key}.*`dvc repro`") as caught:
            ImageSpec.from_json(text, "m.keras: spec")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "text", ["", "null", "3", "[]", "{}", "{", b"\xff", "[" * 100_000, "x" * (MAX_SPEC_BYTES + 9)]
)
def test_what_is_no_spec_is_refused(tmp_path, text):
    path = tmp_path / "image_spec.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="image_spec.json: not a valid image spec") as caught:
        ImageSpec.read(path)
    assert "\n" not in str(caught.value)


IMAGES = np.zeros((9, 8, 8, 1), np.uint8)
LABELS = np.zeros(9, np.int32)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images-0000", IMAGES.astype(np.float32)),
        ("images-0000", IMAGES.astype(object)),
        ("images-0000", np.asfortranarray(np.zeros((9, 8, 8, 3), np.uint8))),
        ("images-0000", IMAGES[..., 0]),
        ("images-0000", IMAGES[:, :4]),
        ("images-0000", np.zeros((9, 8, 8, 3), np.uint8)),
        ("images-0000", IMAGES[:8]),
        ("images-0001", IMAGES[:, :4]),
        ("images-0001", IMAGES),
        ("labels", LABELS[:8]),
        ("labels", LABELS[:0]),
        ("labels", np.zeros(10, np.int32)),
        ("labels", LABELS + 3),
        ("labels", LABELS - 1),
        ("labels", LABELS.astype(np.float32)),
        ("labels", LABELS.astype(object)),
        ("labels", LABELS.astype(str)),
        ("labels", LABELS[:, None]),
        ("labels", np.int32(1)),
    ],
)
def test_arrays_of_another_kind_or_number_are_refused(prepared, name, array):
    np.save(prepared / "train" / f"{name}.npy", array)
    with pytest.raises(UserError, match=r"prepared/train.*; delete it and run `dvc repro`$"):
        read_split(prepared / "train")
    assert len(read_split(prepared / "val")) == 5


@pytest.mark.parametrize("name", ["images-0000", "labels"])
@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00"])
def test_what_is_no_array_is_refused(prepared, name, content):
    path = prepared / "train" / f"{name}.npy"
    whole = path.read_bytes()
    for damaged in (content, whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}.npy: .*; delete it and run"):
            read_split(prepared / "train")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a,b\n1,2\n", b"path,array_index\nx,y\n"])
def test_what_is_no_table_of_images_is_refused(prepared, content):
    (prepared / "index.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"index.csv: not a table of images \(.*`dvc repro`$"):
        read_index(prepared / "index.csv")
