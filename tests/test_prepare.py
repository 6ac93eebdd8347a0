"""The stage prepare: the same bytes as a run from nothing, whatever happened before."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import ROOT, options
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stages import prepare as stage
from stages.data import arrays, images, scan, splits
from stages.data.cache import Cache
from stages.data.images import Preprocessing
from stages.data.parameters import Prepare
from stages.display.preparation import explain_duplicates, few_lines
from stages.prepare import prepare
from stages.run.cli import UserError
from stages.run.params import read_section

SMALL = Prepare(image_size=[6, 5])
CROP = Preprocessing([6, 5], "crop")


def picture(number: int) -> bytes:
    """Draw one of many small pictures; every third is gray, two are broken."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (9, 8, 3), np.uint8)
    if number % 3 == 0:
        pixels[:] = pixels[..., :1]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()[: 70 if number in (55, 750) else None]


@dataclasses.dataclass
class Place:
    """A dataset and all that prepare makes of it."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("data", "cache"):
            (self.root / name).mkdir(parents=True)

    def write(self, path: str, number: int) -> None:
        file = self.root / "data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))

    def fill(self, classes: int = 2, each: int = 12) -> "Place":
        for number in range(classes * each):
            self.write(f"class {number % classes}/{number}.png", number)
        return self

    def darken(self, count: int, classes: int = 2) -> "Place":
        """Add a darker copy of so many of the pictures."""
        for number in range(100, 100 + count):
            image = Image.open(io.BytesIO(picture(number)))
            image.point(lambda value: value * 9 // 10).save(
                self.root / f"data/class {number % classes}/darker {number}.png"
            )
        return self

    def prepare(self, parameters: Prepare = SMALL, cache: str = "cache") -> int:
        (self.root / cache).mkdir(exist_ok=True)
        out = self.root / "out"
        return prepare(
            parameters, self.root / "data", out, self.root / "metrics", self.root / cache
        )

    def index(self) -> pd.DataFrame:
        return arrays.read_index(self.root / "out" / "index.csv")

    def metrics(self) -> dict:
        return json.loads((self.root / "metrics" / "prepare.json").read_text())

    def bytes(self) -> dict[str, bytes]:
        files = [*self.root.glob("out/**/*"), *self.root.glob("metrics/**/*")]
        return {
            str(file.relative_to(self.root)): file.read_bytes() for file in files if file.is_file()
        }

    def bytes_from_nothing(self, parameters: Prepare) -> dict[str, bytes]:
        for name in ("out", "metrics", "fresh"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        self.prepare(parameters, cache="fresh")
        return self.bytes()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "place")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, request):
    """Spare most tests the picture, which imports Matplotlib."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("stages.report.figures.image_grid", lambda *_, **__: None)


def test_outputs(place):
    place.fill(3, 15)
    assert place.prepare() == 45
    classes = arrays.ImageSpec.read(place.root / "out/image_spec.json")
    assert classes == arrays.ImageSpec(["class 0", "class 1", "class 2"], (6, 5, 3), "rgb", "crop")
    index, metrics = place.index(), place.metrics()
    names = "path class was split digest exclusion_reason array_index"
    assert " ".join(index) == names
    assert index["path"].is_monotonic_increasing and len(index) == 45
    for name in arrays.SPLITS:
        split = arrays.read_split(place.root / "out" / name)
        rows = index[index["split"] == name].sort_values("array_index")
        assert rows["array_index"].tolist() == list(range(len(split))) and metrics[name] == len(
            split
        )
        assert rows["digest"].is_monotonic_increasing
        assert [classes.classes[label] for label in split.labels] == rows["class"].tolist()
        for path, image in zip(rows["path"], split.gather(np.arange(len(split))), strict=True):
            expected = images.read_image(place.root / "data" / path, classes)[0]
            np.testing.assert_array_equal(image, expected)
    table = pd.read_csv(place.root / "metrics/prepare_classes.csv")
    assert table[["train", "val", "test", "excluded"]].to_numpy().sum() == 45


def test_look_alikes_share_a_split_with_the_pattern_of_the_hint(place, capsys):
    place.fill(2, 20)
    for number in range(40):
        place.write(f"class {number % 2}/{number} copy.png", 200 + number)
    place.prepare()
    said = capsys.readouterr().out
    assert "by their names, these files may show the same, and are in several splits" in said
    [pattern] = re.findall(r"set prepare\.group_by: '(.*)'$", said, re.MULTILINE)
    place.prepare(SMALL.model_copy(update={"group_by": pattern}))
    said, index = capsys.readouterr().out, place.index()
    assert "40 groups" in said and "WARNING" not in said
    index = index[index["split"] != ""].assign(of=index["path"].str.replace(" copy", ""))
    assert (index.groupby("of")["split"].nunique() == 1).all() and len(index) > 70


def test_what_is_passed_over_is_told(place, capsys):
    place.fill(2, 20)
    for name in ("#recycle/1.png", "class 0/@eaDir/0.png/THUMB.png", "class 1/.x/1.png"):
        place.write(name, 3)
    for number in range(30):
        place.write(f"class 0/scan {number}.dcm", 3)
    assert place.prepare() == 40
    said = capsys.readouterr().out
    assert "3 images in hidden folders or a system's" in said
    assert "class 0/@eaDir" in said and "#recycle" in said
    assert "passed over for their extension: 30 of 50 in class 0 (30 .dcm); unpack" in said


def test_names_that_are_hard_to_write(place):
    names = ["a\rb", "a\nb", 'a "b", c', "NA", "007", " a ", "é"]
    for number in range(60):
        place.write(f"class\r{number % 2}/{names[number % 7]} {number}.png", number)
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=0.1))
    index = place.index()
    assert set(index["path"]) == {
        f"class\r{number % 2}/{names[number % 7]} {number}.png" for number in range(60)
    }
    assert set(index["class"]) == {"class\r0", "class\r1"}


def test_picture(place):
    place.fill(3, 10).prepare()
    for name in ("prepared", "duplicates"):
        assert Image.open(place.root / f"metrics/plots/{name}.png").format == "PNG"


steps = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 60), st.integers(0, 2)),
    st.tuples(st.sampled_from(["remove", "rename", "crash", "damage", "lose"]), st.integers(0, 99)),
    st.tuples(st.just("relabel"), st.integers(0, 99), st.integers(0, 2)),
    st.tuples(
        st.just("change"),
        st.sampled_from(
            [
                {"image_size": [4, 4]},
                {"resize": "pad"},
                {"color_mode": "grayscale"},
                {"color_mode": "rgb"},
                {"seed": 2},
                {"test_fraction": 0.3},
                {"drop_near_duplicates": False},
                {"group_by": r"(\d)\.png"},
                {},
            ]
        ),
    ),
)


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.lists(steps, min_size=1, max_size=6))
def test_any_history_gives_what_a_run_from_nothing_gives(tmp_path_factory, history):
    place = Place(tmp_path_factory.mktemp("history") / "place").fill(3, 8)
    parameters = Prepare(image_size=[6, 5], max_unreadable_fraction=1.0)
    known: set[tuple] = set()  # what the cache should hold
    for step, *values in [("start", None), *history]:
        data = place.root / "data"
        paths = sorted(data.rglob("*.png"))
        path = paths[values[0] % len(paths)] if isinstance(values[0], int) else paths[0]
        if step == "add":
            place.write(f"class {values[1]}/new {values[0]}.png", values[0])
        elif step == "remove" and len(list(path.parent.iterdir())) > 5:
            path.unlink()
        elif step == "rename":
            path.rename(path.with_name(f"renamed {values[0]} {path.name}"))
        elif step == "relabel" and len(list(path.parent.iterdir())) > 5:
            path.rename(data / f"class {values[1]}" / path.name)
        elif step == "change":
            parameters = Prepare(image_size=[6, 5], max_unreadable_fraction=1.0).model_copy(
                update=values[0]
            )
        elif step == "lose":
            shutil.rmtree(place.root / "cache")
            known.clear()
        elif step == "damage":
            file = place.root / "cache" / "images.sqlite"
            content = file.read_bytes()
            file.write_bytes(b"no database" * (1 + values[0]) + content[11 * (1 + values[0]) :])
        elif step == "crash":
            with pytest.MonkeyPatch.context() as patch:
                left, decode = [values[0] % 20], scan.decode_for_cache

                def crash(*arguments, left=left, decode=decode):
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                    return decode(*arguments)

                patch.setattr(scan, "decode_for_cache", crash)
                with contextlib.suppress(KeyboardInterrupt, UserError):
                    place.prepare(parameters)
        shape = (tuple(parameters.image_size), parameters.resize)
        wanted = {(images.hash_bytes(file.read_bytes()), *shape) for file in data.rglob("*.png")}
        try:
            decoded = place.prepare(parameters)
        except UserError as error:
            assert "too few images" in str(error)
            known |= wanted
            continue
        if step not in ("crash", "damage"):  # these leave some of the work to do again
            assert decoded == len(wanted - known)
        assert decoded <= len(wanted)
        known |= wanted
        assert place.prepare(parameters) == 0
    try:
        here = place.bytes()
        assert place.bytes_from_nothing(parameters) == here
    except UserError as error:
        assert "too few images" in str(error)


def test_only_what_is_new_is_decoded(place):
    place.fill(2, 16).prepare()
    before = place.bytes()
    place.write("class 0/new.png", 1000)
    assert place.prepare() == 1
    (place.root / "data/class 0/new.png").unlink()
    assert place.prepare() == 0 and place.bytes() == before
    assert place.prepare(Prepare(image_size=[6, 5], color_mode="grayscale")) == 0
    assert place.prepare(Prepare(image_size=[7, 5])) == 32
    assert place.prepare() == 0 and place.bytes() == before


def test_renaming_changes_the_index_only(place):
    place.fill(2, 20).prepare()
    before = place.bytes()
    file = place.root / "data/class 0/4.png"
    file.rename(file.with_name("zz.png"))
    place.prepare()
    after = place.bytes()
    assert {name for name in before if before[name] != after[name]} == {"out/index.csv"}


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_number_of_workers_does_not_matter(place, workers, monkeypatch):
    place.fill(2, 400).darken(200)
    monkeypatch.setenv("PREPARE_WORKERS", "2")
    assert place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=1)) == 1000
    assert place.metrics()["near_duplicates"] > 20
    before = place.bytes()
    monkeypatch.setenv("PREPARE_WORKERS", workers)
    assert place.bytes_from_nothing(Prepare(image_size=[6, 5], max_unreadable_fraction=1)) == before


def test_the_order_in_which_chunks_are_scanned_does_not_matter(place, monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK_IMAGES", 16)
    expected = place.fill(2, 60).darken(40).bytes_from_nothing(SMALL)
    assert place.metrics()["near_duplicates"] > 3

    def backwards(function, tasks, count, shared, cluster):
        return reversed([function(*task, *shared) for task in tasks])

    monkeypatch.setattr(scan, "map_unordered", backwards)
    assert place.bytes_from_nothing(SMALL) == expected


def test_a_file_that_can_not_be_opened_has_no_digest(place):
    place.fill(2, 16)
    (place.root / "data/class 0/gone.png").symlink_to("nowhere")
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=0.1))
    image = place.index().set_index("path").loc["class 0/gone.png"]
    assert image["digest"] == "" and image["exclusion_reason"] == "not a file, or a broken link"


def test_an_interruption_while_arrays_are_written(place, monkeypatch):
    expected = place.fill(2, 160).bytes_from_nothing(SMALL)
    shutil.rmtree(place.root / "out")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stages.data.images.in_color_mode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            place.prepare(cache="fresh")
    assert not list((place.root / "out").iterdir())
    assert place.prepare(cache="fresh") == 0
    assert place.bytes() == expected


LOSSES = {
    "the rows of another run's eviction": lambda folder: Cache(folder, CROP).evict([], 0),
    "the folder": shutil.rmtree,
    "the file": lambda folder: (folder / "images.sqlite").write_bytes(b"no database" * 5000),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cache_that_is_lost_while_prepare_is_at_work(place, loss, monkeypatch):
    """What it held is decoded again, or the connection still has it."""
    expected = place.fill(2, 80).darken(20).bytes_from_nothing(SMALL)
    assign, lost = splits.assign, []

    def lose(*arguments):
        lost.append(LOSSES[loss](place.root / "cache"))
        return assign(*arguments)

    monkeypatch.setattr(splits, "assign", lose)
    place.prepare()
    assert place.bytes() == expected and lost


def test_groups_that_are_too_coarse_are_told(place):
    with pytest.raises(
        UserError, match=r"class 0 has 12 usable images in 1 group.*in different groups"
    ):
        place.fill(2, 12).prepare(
            Prepare(image_size=[6, 5], group_by="^[^/]+", max_unreadable_fraction=1)
        )


def test_a_file_that_changes_while_prepare_is_at_work(place, monkeypatch):
    """It matters only if the cache has lost it as well."""
    place.fill(2, 80)
    assign = splits.assign

    def change(*arguments):
        Cache(place.root / "cache", CROP).evict([], 0)
        for number in range(160):
            place.write(f"class {number % 2}/{number}.png", number + 1000)
        return assign(*arguments)

    monkeypatch.setattr(splits, "assign", change)
    with pytest.raises(UserError, match="png: changed during prepare; run it again"):
        place.prepare(
            Prepare(image_size=[6, 5], drop_near_duplicates=False, max_unreadable_fraction=0.1)
        )
    assert not (place.root / "out/train").exists()


def test_the_cache_is_kept_within_its_bound(place, monkeypatch):
    evict = Cache.evict
    monkeypatch.setattr(Cache, "evict", lambda cache, used: evict(cache, used, 2**16))
    decoded = place.fill(2, 400).prepare(Prepare(image_size=[64, 64], max_unreadable_fraction=1))
    assert (place.root / "cache/images.sqlite").stat().st_size < decoded * 64 * 64 / 10


def test_a_truncated_cache_is_not_trusted(place):
    """SQLite reads what is missing of its last page as zeros."""
    place.fill(3, 8).prepare(parameters := Prepare(image_size=[6, 5], max_unreadable_fraction=1))
    expected, file = place.bytes(), place.root / "cache/images.sqlite"
    for percent in range(0, 100, 9):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * percent // 100])
        place.prepare(parameters)
        assert place.bytes() == expected, percent
        place.prepare(parameters)  # images that were read before the damage was noticed
        assert place.prepare(parameters) == 0


def test_nothing_of_a_run_is_left_in_the_cache_folder(place):
    place.fill().prepare()
    assert not list((place.root / "cache").glob("thumbnails*"))


@hypothesis.given(
    st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(0, 2**32 - 1), st.integers(1, 99)
)
def test_a_new_row_changes_one_file_unless_the_number_of_files_changes(values, new, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_MAX_FILE_BYTES", 100)
        patch.setattr(arrays, "_MAX_FILES", 8)

        def files(values):
            values = np.array(sorted(values), np.uint32)
            bounds = arrays.file_bounds(values, size)
            assert bounds[0] == 0 and bounds[-1] == len(values)
            return [tuple(values[a:b]) for a, b in itertools.pairwise(bounds)]

        before, after = files(values), files([*values, new])
    assert len(after) in (1, 2, 4, 8)
    assert len(after) == 8 or len(after) * 100 >= (len(values) + 1) * size
    if len(before) == len(after):
        assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def test_reading_keeps_no_file_open(place, monkeypatch):
    """A system lets a process open only so many files, on macOS 256."""
    monkeypatch.setattr(arrays, "_MAX_FILE_BYTES", 100)
    place.fill(2, 100)
    place.prepare()
    before = psutil.Process().num_fds()
    split = arrays.read_split(place.root / "out/train")
    assert len(split.files) >= 64
    order = np.random.default_rng(0).permutation(len(split))
    shuffled = split.gather(order)
    assert psutil.Process().num_fds() == before
    whole = np.concatenate([np.load(path) for path, _, _ in split.files])
    np.testing.assert_array_equal(shuffled, whole[order])
    np.testing.assert_array_equal(np.concatenate(list(split.batches(7))), whole)
    largest = max((path for path, _, _ in split.files), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{largest.name}: truncated"):
        split.gather(order)


def test_advice_on_many_near_duplicates(place, capsys):
    place.fill(2, 100)
    place.prepare()
    assert "prepare.drop_near_duplicates" not in capsys.readouterr().out
    place.darken(40)
    place.prepare()
    near = place.metrics()["near_duplicates"]
    printed = " ".join(capsys.readouterr().out.split())
    assert near > 3 and f"{near} of 240 images ({near / 240:.0%}) are excluded" in printed
    assert "duplicates.png" in printed and "prepare.drop_near_duplicates: false" in printed


def test_a_fixed_camera_is_told_where_to_look_and_what_to_set(place):
    """All images of a class are near duplicates, so that too few are left."""
    drawn, base = [], np.asarray(Image.open(io.BytesIO(picture(1))).resize((48, 48)), int)
    for number in range(100, 140):
        noise = np.random.default_rng(number).normal(0, 3, base.shape)
        image = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
        place.write(f"class {number % 2}/{number}.png", number)
        if number % 2:
            image.save(place.root / f"data/class 1/{number}.png")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr("stages.report.figures.image_grid", lambda *args, **_: drawn.append(args))
        place.prepare()
    words = ("class class 1", "near duplicate", "duplicates.png", "drop_near_duplicates: false")
    assert all(word in str(caught.value) for word in words)
    ((images_, titles, heading, path),) = drawn
    assert path == place.root / "metrics/plots/duplicates.png" and "side by side" in heading
    assert len(images_) == len(titles) > 2
    assert all(title.startswith("class 1\n1") for title in titles)


@pytest.mark.parametrize("size", [(6, 5), (24, 30)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_copies_do_not_depend_on_how_images_are_resized(place, size, resize):
    """Mirrored and squeezed copies are found whatever the size; JPEGs decode at several scales."""
    for number in range(100, 160):
        image = Image.open(io.BytesIO(picture(number))).resize((240, 160), Image.Resampling.BICUBIC)
        place.write(f"class {number % 2}/{number}.png", number)
        image.convert("RGB").save(place.root / f"data/class {number % 2}/{number}.jpg")
        image = ImageOps.mirror(image).resize((200, 200)).convert("RGB")
        image.save(place.root / f"data/class {number % 2}/mirrored {number}.jpg")
    place.prepare(Prepare(image_size=list(size), resize=resize, max_unreadable_fraction=1))
    table = (place.root / "out/duplicates.csv").read_bytes()
    place.prepare(Prepare(image_size=[50, 40], max_unreadable_fraction=1))
    assert (place.root / "out/duplicates.csv").read_bytes() == table
    assert table.count(b"mirrored") > 20 and place.metrics()["near_duplicates"] > 20


def test_bad_files_are_named_and_tolerated_up_to_a_share(place, capsys):
    place.fill(2, 16)
    (place.root / "data/class 0/empty.png").write_bytes(b"")
    (place.root / "data/class 1/a.heic").write_bytes(b"x")  # read by its content, not its name
    with pytest.raises(UserError) as caught:
        place.prepare()
    assert "2 of 34 images can't be read" in str(caught.value)
    assert "class 0/empty.png (empty file)" in str(caught.value)
    assert not (place.root / "out").exists()
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=0.1))
    reasons = place.index().set_index("path")["exclusion_reason"]
    assert reasons["class 1/a.heic"].startswith("not an image")
    assert place.metrics()["unreadable"] == 2 and place.metrics()["excluded"] == 2
    assert "class 0/empty.png (empty file)" in capsys.readouterr().out


def test_a_clone_without_its_images_is_told_why(place):
    """Each image is a Git LFS pointer of its own; one is a text."""
    for number in range(30):
        place.write(f"class {number % 2}/{number:02}.png", number)
    for number, file in enumerate(sorted((place.root / "data").rglob("*.png"))):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{number:064}\nsize 9\n"
        file.write_text(pointer if number else "404: Not Found")
    with pytest.raises(UserError) as caught:
        place.prepare()
    assert str(caught.value) == (
        "prepare: none of 30 images can be read: class 0/02.png and 28 more (a Git LFS pointer in"
        " place of the image: run `git lfs pull` in its repository); class 0/00.png (not an image"
        " but a text, such as an error message of a download: look at it in an editor)"
    )


def write_deep(place, white: int, names: str = "abcdefgh") -> None:
    """Add gray pictures of two classes, of values up to `white`, in files of 16 bits."""
    for number, name in enumerate(names):
        values = np.random.default_rng(number).integers(0, white + 1, (5, 6), np.uint16)
        values[0, 0] = white
        for kind in "ab":
            file = place.root / "data" / kind / f"{name}{kind}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(values if kind == "a" else values[::-1]).save(file)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_a_dataset_that_would_be_almost_black_is_refused_with_the_remedy(place, bits):
    white = 2**bits - 1
    write_deep(place, white)
    with pytest.raises(UserError) as caught:
        place.prepare()
    assert f"16 images have more than 8 bits per channel but no value above {white}," in str(
        caught.value
    )
    assert (
        f"prepare.white_level in params.yaml to the value that is white, for instance {white}"
        in (str(caught.value))
    )
    place.prepare(Prepare(image_size=[5, 6], white_level=white))
    spec = arrays.ImageSpec.read(place.root / "out/image_spec.json")
    assert spec.white_level == white
    test = arrays.read_split(place.root / "out/train")
    assert (test.gather(np.arange(len(test))).max(axis=(1, 2, 3)) == 255).all()


def test_images_of_different_scales_and_clipped_ones_are_told(place, capsys):
    write_deep(place, 65535)
    write_deep(place, 4095, "st")
    place.prepare(Prepare(image_size=[5, 6]))
    assert "WARNING: dark  4 of 20 images of more than 8 bits" in capsys.readouterr().out
    place.prepare(Prepare(image_size=[5, 6], white_level=4095))
    out = capsys.readouterr().out
    assert "16 of 20 images" in out and "up to 65535; they become white" in out
    assert "dark" not in out


def test_a_dataset_of_which_nothing_is_left_on_white_is_refused(place):
    """A class is transparent everywhere; the other is cut out, which is right."""
    place.fill(2, 12)
    for file in (place.root / "data").rglob("*.png"):
        image = Image.open(file).convert("RGBA")
        mask = np.arange(72).reshape(9, 8) % 5 * 255 // 4 if "class 1" in str(file) else 0
        pixels = np.asarray(image).copy()
        pixels[..., 3] = mask
        Image.fromarray(pixels).save(file)
    with pytest.raises(UserError) as caught:
        place.prepare()
    assert "12 of 24 images can't be read" in str(caught.value)
    assert "class 0/0.png and 11 more (one plain shade on white, as the rest is tr" in str(
        caught.value
    )


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_a_dataset_of_one_plain_shade_is_refused(place, shade):
    place.fill(2, 12)
    for number in range(15):
        Image.new("RGB", (9, 8 + number), 3 * (shade,)).save(
            place.root / f"data/class {number % 2}/{number}.png"
        )
    with pytest.raises(UserError, match=rf"15 of 24 images are one plain shade \(level {shade} of"):
        place.prepare()


def test_plain_images_of_many_shades_may_be_what_is_to_be_learned(place, capsys):
    for number in range(24):
        file = place.root / f"data/class {number % 2}/{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), (10 * number, 40, 90)).save(file)
    place.prepare()
    assert "24 images of one plain shade at this size (the first: c" in capsys.readouterr().out


def test_what_a_person_should_know_of_images_is_counted(place, capsys):
    """Also of images that are in the cache."""
    place.fill(2, 12)
    frames = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (9, 8), np.uint8)) for n in (1, 2)
    ]
    for name in "ab":
        frames[0].rotate(ord(name)).save(
            place.root / f"data/class 1/{name}.tif", save_all=True, append_images=frames
        )
    frames[1].putalpha(frames[0])
    frames[1].save(place.root / "data/class 0/clear.png")
    for _ in range(2):
        place.prepare()
        said = capsys.readouterr().out
        assert "2 images with several pages, frames or groups of bands, of which only the" in said
        assert "(the first: class 1/a.tif)" in said
        assert "1 image with transparent parts, which become white (class 0/clear.png)" in said
        assert "plain" not in said and "colors" not in said


@pytest.mark.parametrize(("height", "width", "cut"), [(9, 8, 0.1111), (5, 20, 0.75), (7, 7, 0)])
def test_the_share_that_a_crop_cuts_off_is_told(place, capsys, height, width, cut):
    random = np.random.default_rng(0)
    for number in range(20):
        file = place.root / f"data/class {number % 2}/{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width), np.uint8)).save(file)
    for resize, expected in (("crop", cut), ("pad", 0), ("stretch", 0)):
        place.prepare(Prepare(image_size=[6, 6], resize=resize))
        out = capsys.readouterr().out
        assert place.metrics()["cropped_fraction"] == expected
        assert ("cuts off" in out) == (expected > 0) and ("WARNING" in out) == (expected > 1 / 3)


def test_a_given_split_of_which_nothing_can_be_read(place):
    for number in range(60):
        place.write(f"train/class {number % 2}/{number}.png", number)
    place.write("val/class 0/broken.png", 750)
    with pytest.raises(UserError, match=r"none of the 1 images of .* own val .*broken.png"):
        place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=0.1))


def test_too_few_images_are_named_with_count_and_need(place):
    place.fill(3, 10)
    for name in ("1.png", "4.png", "7.png"):
        (place.root / "data/class 1" / name).unlink()
    for number in (13, 16, 19, 22, 25):
        (place.root / f"data/class 1/{number}.png").unlink()
    with pytest.raises(UserError) as caught:
        place.prepare()
    assert "class 1 has" in str(caught.value) and "needs 3" in str(caught.value)
    assert not (place.root / "out").exists()


def test_copies_conflicts_and_their_list(place):
    place.fill(2, 60)
    for number in range(0, 40, 2):
        place.write(f"class 0/again {number}.png", number)
        place.write(f"class 1/conflict {number}.png", number)
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=1))
    index = place.index()
    index = index[index["exclusion_reason"].isin(["", "duplicate", "label conflict"])]
    table = pd.read_csv(place.root / "out/duplicates.csv", keep_default_na=False)
    assert set(table["kind"]) == {"exact", "conflict"}
    known = place.index().set_index("path")
    one, other = (known.loc[table[name]].reset_index() for name in ("path", "other_path"))
    assert (one["digest"] == other["digest"]).all()
    assert ((one["class"] == other["class"]) == (table["kind"] == "exact")).all()
    assert (other["exclusion_reason"][table["kind"] == "exact"] != "duplicate").all()
    twice = (
        index[index["split"] != ""].groupby("digest")["split"].agg(["nunique", "count", "first"])
    )
    assert (twice["nunique"] == 1).all()
    assert (twice.loc[twice["count"] > 1, "first"] == "test").all()
    assert (
        place.metrics()["label_conflicts"]
        == (index["exclusion_reason"] == "label conflict").sum()
        > 0
    )


def test_a_picture_in_two_classes_is_named(place, capsys, monkeypatch):
    """Label conflicts come first in the figure, marked, and the summary names both paths."""
    drawn = []
    monkeypatch.setattr(
        "stages.report.figures.image_grid", lambda *args, **kw: drawn.append((*args, kw))
    )
    place.fill(2, 60).darken(20)
    for number in range(0, 14, 2):
        place.write(f"class 1/conflict {number}.png", number)
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=1))
    printed = " ".join(capsys.readouterr().out.split())
    assert "class 0/0.png = class 1/conflict 0.png" in printed and "and 5 more pairs" in printed
    (titles, options), *_ = [(args[1], args[-1]) for args in drawn if "duplicates" in str(args[3])]
    assert titles[0].startswith("class 0\n0.png\n")
    assert titles[1].startswith("class 1\nconflict 0.png\n")
    assert options["marked"][:14] == [True] * 14 and not any(options["marked"][14:])
    assert len(titles) > 14
    split = place.index().set_index("path")["split"]
    for folder, name, last in (title.split("\n") for title in titles):
        assert last.endswith(", excluded") == (split[f"{folder}/{name}"] == "")


def test_a_copy_in_another_format_is_a_near_one(place):
    """Pixel for pixel equal, at distance 0, but not the same bytes."""
    place.fill(2, 60)
    for number in range(60, 120):
        image = Image.open(io.BytesIO(picture(number)))
        image.save(place.root / f"data/class {number % 2}/again {number}.bmp")
    place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=0.1))
    copies_ = pd.read_csv(place.root / "out/duplicates.csv")
    assert (copies_["distance"] == 0).any() and set(copies_["kind"]) == {"near"}


def test_groups_stay_together_and_the_rest_is_counted(place, capsys):
    for number in range(60):
        place.write(f"class {number % 2}/patient {number % 15} {number}.png", 1 + 17 * number)
    place.write("class 0/other.png", 7777)
    place.prepare(Prepare(image_size=[6, 5], group_by=r"patient (\d+)"))
    index = place.index()
    groups = index["path"].str.extract(r"patient (\d+)")[0]
    assert index.groupby(groups)["split"].nunique().max() == 1
    names = sorted(groups.dropna().unique())
    ranks = splits.rank_names((b"group " + name.encode() for name in names), 1)
    expected = pd.Series(splits.split_by_rank(ranks, 0.15, 0.15), names).map(
        arrays.SPLITS.__getitem__
    )
    assert (index.groupby(groups)["split"].first() == expected).mean() > 0.8  # a few are reassigned
    assert (
        "15 groups; 1 image without one (by prepare.group_by), each its own group: class 0/other"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("pattern, words", [
    (r"patient(\d+)", "matches none of the 24 paths within the dataset, for instance class 0/0.png,"
     " class 0/10.png, class 0/12.png"),
    ("CLASS", "class 0/12.png; it matches if case is ignored: put (?i) at its start"),
    ("^data/", "prepare.group_by: ^data/ matches none"),
])  # fmt: skip
def test_a_group_by_that_matches_no_path_is_refused_before_any_image_is_read(
    place, pattern, words, monkeypatch
):
    monkeypatch.setattr("stages.prepare.scan", None)
    with pytest.raises(UserError) as caught:
        place.fill(2, 12).prepare(Prepare(image_size=[6, 5], group_by=pattern))
    assert words in str(caught.value)
    assert ("case is ignored" in str(caught.value)) == (pattern == "CLASS")


def test_many_paths_without_a_group_are_a_warning(place, capsys):
    place.fill(2, 12)
    for number in range(30, 32):
        place.write(f"class {number % 2}/other {number}.png", number)
    place.prepare(Prepare(image_size=[6, 5], group_by=r"/(\d+)"))
    said = capsys.readouterr().out
    assert "WARNING: 24 groups, but 2 of 26 images have none (by prepare.group_by)" in said
    assert "class 0/other 30.png, class 1/other 31.png" in said


def test_what_was_left_out_is_named_and_counted(place, capsys):
    place.fill(2, 12)
    (place.root / "data/class 0/note.txt").touch()
    (place.root / "data/class 0/more").symlink_to(place.root)
    place.prepare()
    said = capsys.readouterr().out
    assert "1 file without an image extension (1 .txt): class 0/note.txt" in said
    assert "1 link to a folder or to nothing left out" in said and "(class 0/more)" in said
    for number in range(5):
        (place.root / f"data/class 1/{number}.xml").touch()
        (place.root / f"data/class 1/link {number}").symlink_to("nowhere")
    place.prepare()
    said = capsys.readouterr().out
    assert "6 files without an image extension (5 .xml, 1 .txt): class 0/note.txt, class 1" in said
    assert "6 links to a folder or to nothing left out" in said and "and 1 more)" in said


def test_folders_that_were_recognized_as_splits_are_named(place, capsys):
    for number in range(40):
        folder = "1_Training" if number < 30 else "test"
        place.write(f"{folder}/{number % 2}/{number}.png", number)
    place.prepare()
    said = capsys.readouterr().out
    assert "(the dataset's own, from 1_Training/, minus what was split off)" in said
    assert "(the dataset's own)" in said


def test_layout_classes(place):
    for number in range(24):
        place.write(f"{('train', 'test')[number % 2]}/{number % 3}/{number}.png", number)
    place.prepare(Prepare(image_size=[6, 5], layout="classes"))
    assert set(place.index()["class"]) == {"train", "test"}


def test_given_splits_are_kept_and_what_they_share_is_told(place, capsys):
    for number in range(40):
        place.write(f"{'train' if number < 30 else 'test'}/{number % 2}/{number}.png", 17 * number)
    place.write("test/0/leak.png", 0)
    place.prepare()
    metrics = place.metrics()
    assert metrics["test"] == 11 and metrics["train"] + metrics["val"] == 30
    assert metrics["cross_split_duplicates"] == 1 and "WARNING" in capsys.readouterr().out
    table = pd.read_csv(place.root / "out/duplicates.csv", keep_default_na=False)
    assert table["path"].tolist() == ["train/0/0.png"]
    assert table["other_path"].tolist() == ["test/0/leak.png"]
    assert table["excluded_path"].tolist() == [""]


def test_labels_of_a_table_give_what_their_folders_give(place, capsys):
    """Its column of groups, what group_by finds; its splits, those of folders."""
    for number in range(60):
        place.write(f"class {number % 2}/p{number % 15} {number}.png", 1 + 17 * number)
    place.prepare(Prepare(image_size=[6, 5], group_by=r"p\d+"))
    before, paths = place.bytes(), place.index()["path"]
    index = place.index()
    table = pd.DataFrame({"path": paths, "label": paths.str.extract(r"(class \d)")[0]})
    table["group"] = paths.str.extract(r"(p\d+)")[0]
    table.to_csv(place.root / "data/labels.csv", index=False)
    place.write("test/unlabeled.png", 5)
    capsys.readouterr()
    place.prepare()
    assert place.bytes() == before
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "labels from labels.csv\n" in said and "groups 15 groups\n" in said
    assert "unlabeled 1 image that labels.csv does not name passed over: test/unlabe" in said
    table.assign(split=index["split"].fillna("train"), group="").to_csv(
        place.root / "data/labels.csv", index=False
    )
    place.prepare(Prepare(image_size=[6, 5], drop_near_duplicates=False))
    assert place.index()["split"].tolist() == index["split"].fillna("train").tolist()
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert f"test {(index['split'] == 'test').sum()} (the dataset's own)\n" in said
    with pytest.raises(UserError, match="in the column group of labels.csv already"):
        place.prepare(Prepare(image_size=[6, 5], group_by=r"p\d+"))


def test_without_a_test_split(place):
    place.fill(2, 16).prepare(Prepare(image_size=[6, 5], test_fraction=0.0))
    assert list((place.root / "out/test").iterdir()) == []
    assert len(arrays.read_split(place.root / "out/test")) == 0


def test_photographs_that_become_thumbnails_are_told(place, capsys):
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 90, 3), np.uint8)
        file = place.root / f"data/{number % 2}/{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    place.prepare(Prepare(image_size=[16, 16]))
    assert "prepare.image_size" in capsys.readouterr().out
    place.prepare(Prepare(image_size=[17, 17]))
    assert "prepare.image_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, message",
    [
        ("image_size: [0, 5]", "prepare.image_size[0]"),
        ("image_size: [5]", "prepare.image_size"),
        ("image_size: [100000, 5]", "prepare.image_size[0]"),
        ("val_fraction: 1.5", "prepare.val_fraction"),
        ("val_fraction: 0", "prepare.val_fraction"),
        ("val_fraction: 0.5\n  test_fraction: 0.5", "leave nothing to train on"),
        ("group_by: '('", "prepare.group_by: expected a regular expression"),
        ("resize: squeeze", "prepare.resize"),
        ("seed: -1", "prepare.seed"),
        ("seed: 4294967296", "prepare.seed"),
        ("sed: 2", "did you mean `seed`?"),
    ],
)
def test_parameters(tmp_path, lines, message):
    (tmp_path / "params.yaml").write_text(f"prepare:\n  {lines}\n")
    with pytest.raises(UserError) as caught:
        read_section(Prepare, "prepare", tmp_path / "params.yaml")
    assert message in str(caught.value)


def test_a_killed_stage_keeps_what_it_decoded(place):
    for number in range(800):
        pixels = np.random.default_rng(number).integers(0, 256, (200, 200, 3), np.uint8)
        file = place.root / f"data/{number % 2}/{number}.bmp"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    code = (
        "import sys; from stages.prepare import prepare, Prepare;"
        "prepare(Prepare(image_size=[150, 150]), sys.argv[1] + '/data', sys.argv[1] + '/out',"
        " sys.argv[1] + '/metrics', sys.argv[1] + '/cache')"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(place.root)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PREPARE_WORKERS": "2"},
    )
    until = time.monotonic() + 60
    with Cache(place.root / "cache", Preprocessing([150, 150], "crop")) as cache:
        while time.monotonic() < until and not len(cache.digests()):
            time.sleep(0.02)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert not (place.root / "out").exists()
    assert place.prepare(Prepare(image_size=[150, 150])) < 800


def test_prepare_does_not_import_heavy_libraries():
    code = (
        "import sys, stages.prepare;"
        "print([name for name in ('tensorflow', 'keras', 'matplotlib', 'scipy', 'sklearn')"
        " if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"


def test_what_own_splits_lack_or_share_is_a_warning(place, capsys):
    for number in range(24):
        split = ("train", "val", "test")[number % 3]
        label = 0 if split == "val" else number % 2
        place.write(f"{split}/class {label}/p{number % 4} {number}.png", 1 + 17 * number)
    place.prepare(Prepare(image_size=[6, 5], group_by=r"p\d"))
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: classes val has no image of class 1" in said
    assert "WARNING: groups 4 of 4 groups are in several of the dataset's own splits" in said


def test_a_class_of_look_alikes_is_told_what_to_do(place):
    place.fill(2, 12)
    pixels = np.random.default_rng(5).integers(60, 200, (9, 8, 3), np.uint8)
    (place.root / "data/stars").mkdir()
    for number in range(3):
        image = Image.fromarray((pixels * (1 - 0.02 * number)).astype(np.uint8))
        image.resize((90, 80), Image.Resampling.BICUBIC).save(
            place.root / f"data/stars/{number}.png"
        )
    with pytest.raises(
        UserError, match=r"class stars has 1 usable image \(.* set prepare.drop_near_duplicates"
    ):
        place.prepare(Prepare(image_size=[6, 5], max_unreadable_fraction=1, seed=4))


def test_the_figure_of_duplicates_explains_only_what_it_shows():
    alike, both = (pd.DataFrame({"has_two_labels": marks}) for marks in ([False], [True, False]))
    assert "None was found" in explain_duplicates(alike[:0], 0, True)
    assert "orange" not in explain_duplicates(alike, 30, True)
    note = explain_duplicates(both, 30, False)
    assert explain_duplicates(alike, 1, True).startswith("1 pair,")
    assert note.startswith("2 of 30 pairs") and "orange frame" in note
    assert note.endswith("were not looked for (prepare.drop_near_duplicates: false).")


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (lambda a: (a / "9.png").write_bytes(picture(9)), True),
        (lambda a: (a / "1.png").unlink(), True),
        (lambda a: (a / "1.png").rename(a.parent / "b/9.png"), True),
        (lambda a: (a / "1.png").write_bytes(picture(9)), True),
        (lambda a: (a.parent / "corrections.csv").write_text("more"), True),
        (lambda a: (a.parent / "labels.csv").write_text("path,label"), True),
        (lambda a: (a / "labels.csv").write_text("path,label"), False),
        (lambda a: (a / ".DS_Store").write_bytes(b""), False),
        (lambda a: (a / "._1.png").write_bytes(b""), False),
        (lambda a: (a / "1.png").read_bytes(), False),
    ],
)
def test_a_dataset_that_changes_while_prepare_runs_is_refused(
    tmp_path, monkeypatch, change, is_refused
):
    place = Place(tmp_path)
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        place.write(name, int(name[2]))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "data/corrections.csv", tmp_path / "data")
    (tmp_path / "params.yaml").write_text("dataset: data\nprepare: {}\ntrain: {}\nevaluate: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "prepare")
    monkeypatch.setattr(stage.files, "exit_with_dvc", lambda: None)
    monkeypatch.setattr(stage, "prepare", lambda *_, **__: change(tmp_path / "data/a"))
    refused = pytest.raises(
        UserError, match=r"^prepare: data/(a/\d\.png|corr|labels).*: changed while it ran"
    )
    with refused if is_refused else contextlib.nullcontext():
        stage.main(options("prepare"))


@pytest.mark.parametrize(
    ("val", "test", "made", "words"),
    [
        (289, 254, ["val", "test"], ""),
        (50, 100, ["val", "test"], ""),
        (50, 0, ["val"], ""),  # no test split is wanted
        (60, 37, ["val", "test"],
         "37 test images: an accuracy of 90 % is known to ±11 points: add images, or raise"
         " prepare.test_fraction (0.15), at the cost of training"),
        (19, 37, ["val", "test"], "raise prepare.val_fraction (0.15) and prepare.test_fraction"),
        (1, 300, ["val"], "1 val image: too few to calibrate confidences (50)"),
        (30, 37, [], "±11 points: add images"),  # the dataset's own splits
    ],
)  # fmt: skip
def test_few_images_are_told_with_what_they_mean_and_what_to_set(val, test, made, words):
    lines = few_lines({"val": val, "test": test}, Prepare(), made)
    assert words in lines.get("few images", "") and bool(lines) == bool(words)
    if not made:
        assert "fraction" not in str(lines)
