"""Near copies are found, other pictures are not, and many alike cost little."""

import io

import numpy as np
import pytest
from factories import near_copies
from PIL import Image, ImageEnhance

from stages.data import duplicates


def scene(seed: int, size=(96, 120)) -> Image.Image:
    """Draw a picture with structure at all scales, as photographs have."""
    random = np.random.default_rng(seed)
    total = np.zeros(size)
    for octave in range(1, 6):
        grid = Image.fromarray(random.normal(size=(2**octave, 2**octave)).astype(np.float32))
        total += np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)) / 2**octave
    total = (total - total.min()) / np.ptp(total) * 200 + 20
    return Image.fromarray(total.astype(np.uint8)).convert("RGB")


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES = {
    "saved at 50": lambda image: saved(image, 50),
    "half as large": lambda image: image.resize((60, 48)),
    "twice as large": lambda image: image.resize((240, 192)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cropped by 3 %": lambda image: image.crop((2, 1, 118, 94)),
    "cropped at a corner": lambda image: image.crop((6, 2, 120, 94)),  # moved, too
    "grey": lambda image: image.convert("L"),
}


def search(queries: list[np.ndarray], targets: list[np.ndarray]) -> duplicates.Pairs:
    thumbnails = np.array([*queries, *targets])
    descriptors = duplicates.describe(np.array(thumbnails))
    place = np.arange(len(thumbnails))
    return near_copies(
        place[: len(queries)],
        place[len(queries) :],
        descriptors,
        lambda rows: thumbnails[rows],
    )


SCENES = [duplicates.thumbnail(scene(seed)) for seed in range(60)]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_found(change):
    changed = [duplicates.thumbnail(CHANGES[change](scene(seed))) for seed in range(20)]
    found = search(changed, SCENES)
    assert len(found.queries) >= 19
    np.testing.assert_array_equal(found.copies - len(changed), found.queries)
    assert (found.distances <= 0.025).all()


def test_other_pictures_are_not():
    assert not len(search(SCENES[:30], SCENES[30:]).queries)


def test_pictures_that_share_a_part_only_are_not():
    """Most of these pairs would do if 0.9 were enough."""
    blends = [
        duplicates.thumbnail(Image.blend(scene(seed), scene(seed + 30), 0.3)) for seed in range(20)
    ]
    assert (duplicates._agreement(np.array(blends), np.array(SCENES[:20])) > 0.9).sum() > 10
    assert not len(search(blends, SCENES[:20]).queries)


def test_flat_pictures_are_not_compared():
    noise = np.random.default_rng(0).normal(128, 2, (2, 24, 24)).astype(np.uint8)
    assert not len(search([noise[0], noise[0]], [noise[1], noise[0]]).queries)


def test_the_descriptor_forgets_brightness_and_contrast():
    thumbnail = SCENES[0] // 2
    other = thumbnail + 40
    np.testing.assert_array_equal(
        duplicates.describe(thumbnail[None]), duplicates.describe(other[None])
    )


def test_pictures_that_vary_in_one_direction_only():
    stripes = Image.new("RGB", (90, 60), "black")
    stripes.paste("red", (0, 20, 90, 40))
    stripes.paste("gold", (0, 40, 90, 60))
    for image in (stripes, stripes.transpose(Image.Transpose.ROTATE_90)):
        larger = image.resize((image.width * 2, image.height * 2))
        found = search([duplicates.thumbnail(image)], [duplicates.thumbnail(larger)])
        assert found.queries.tolist() == [0] and found.copies.tolist() == [1]


def test_thousands_of_almost_equal_pictures():
    """Each query meets a bounded number of others, and still all are found."""
    random = np.random.default_rng(0)
    frames = [
        np.clip(SCENES[0] + random.normal(0, 1, (24, 24)), 0, 255).astype(np.uint8)
        for _ in range(3000)
    ]
    verified = 0
    thumbnails = np.array(frames)
    descriptors = duplicates.describe(np.array(frames))

    def fetch(rows):
        nonlocal verified
        verified += len(rows)
        return thumbnails[rows]

    found = near_copies(np.arange(2000), np.arange(2000, 3000), descriptors, fetch)
    assert len(found.queries) == 2000 and verified <= 3 * 2000


def test_pictures_that_are_alike_by_chance_are_seldom_verified():
    """Pictures of nine spots: many resemble each other, and none is another one moved."""
    random = np.random.default_rng(0)
    grids = random.integers(0, 256, (4000, 3, 3)).repeat(8, axis=1).repeat(8, axis=2)
    thumbnails = np.clip(grids + random.normal(0, 8, grids.shape), 0, 255).astype(np.uint8)
    descriptors = duplicates.describe(thumbnails)
    looked = verified = 0

    def fetch(rows):
        nonlocal looked, verified
        looked += (rows < 2000).sum()
        verified += (rows >= 2000).sum()
        return thumbnails[rows]

    near_copies(np.arange(2000), np.arange(2000, 4000), descriptors, fetch)
    assert looked > 500 and verified < looked


@pytest.mark.parametrize(("flipped", "met"), [(6, True), (7, False)])
def test_pictures_meet_whose_uncertain_signs_differ(flipped, met):
    """Six signs of a band may differ, those of the values nearest to zero."""
    one = np.r_[np.full(14, 34), np.full(6, 1), np.full(20, 3)].astype(np.int8)
    other = one.copy()
    other[20 - flipped :] *= -1  # too many for all bands but that of the first twenty
    many = np.tile(other, (2**17, 1))  # from which on no two signatures share a slot
    queries, _ = duplicates.Targets(many)._candidates(one[None])
    assert (len(queries) > 0) == met


def test_a_search_takes_the_copy_furthest_from_training():
    contents = np.array([0, 1, 0, 2, 0, 1])
    sides = np.array([0, 0, 1, 1, 2, -1], np.int8)
    found = duplicates.Search(contents)(sides)
    assert found.queries.tolist() == [0, 2] and found.copies.tolist() == [4, 4]
    nothing = duplicates.Search(contents)(np.zeros(6, np.int8))
    assert not len(nothing.queries)


def test_a_search_finds_near_copies_of_what_is_on_both_sides():
    """A training image and a test image of equal bytes, and a near copy of these in training."""
    thumbnails = np.array([SCENES[0], duplicates.thumbnail(saved(scene(0), 50)), SCENES[1]])
    descriptors = duplicates.describe(thumbnails)

    def near(queries, targets):
        assert not set(queries) & set(targets)
        return near_copies(queries, targets, descriptors, lambda rows: thumbnails[rows])

    contents, sides = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1], np.int8)
    found = duplicates.Search(contents, near)(sides)
    assert found.queries.tolist() == [0, 1] and found.copies.tolist() == [3, 3]
    assert found.distances[0] == 0 < found.distances[1]
