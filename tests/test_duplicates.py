"""Near duplicates are found, other pictures are not, and many that are alike cost little."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from stages.data import duplicates, images, lsh


def scene(seed: int, size=(96, 120)) -> Image.Image:
    """Draw a picture with structure at all scales, as photographs have."""
    random = np.random.default_rng(seed)
    total = np.zeros(size)
    for octave in range(1, 6):
        grid = Image.fromarray(random.normal(size=(2**octave, 2**octave)).astype(np.float32))
        total += np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)) / 2**octave
    total = (total - total.min()) / np.ptp(total) * 200 + 20
    return Image.fromarray(total.astype(np.uint8)).convert("RGB")


def thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(images.thumbnail(image))


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def count_verified(monkeypatch) -> list[int]:
    """Return a list that grows by the number of pairs of each verification, in this process."""
    monkeypatch.setenv("PREPARE_WORKERS", "1")
    verify, counts = duplicates.aligned_correlation, []
    monkeypatch.setattr(
        duplicates,
        "aligned_correlation",
        lambda one, other: counts.append(len(one)) or verify(one, other),
    )
    return counts


CHANGES = {
    "saved at 50": lambda image: saved(image, 50),
    "half as large": lambda image: image.resize((60, 48)),
    "twice as large": lambda image: image.resize((240, 192)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cropped by 3 %": lambda image: image.crop((2, 1, 118, 94)),
    "cropped at a corner": lambda image: image.crop((6, 2, 120, 94)),  # moved, too
    "gray": lambda image: image.convert("L"),
    "mirrored": ImageOps.mirror,
    "mirrored and saved": lambda image: saved(ImageOps.mirror(image), 60),
    "squeezed": lambda image: image.resize((180, 96)),
    "cropped by 10 %": lambda image: image.crop((8, 3, 116, 89)),
    "turned by 5 degrees": lambda image: image.rotate(-5, Image.Resampling.BICUBIC),
    "in a border": lambda image: ImageOps.expand(image, 5, "white"),
}


def search(queries: list[np.ndarray], targets: list[np.ndarray]) -> duplicates.Matches:
    place = np.arange(len(queries) + len(targets))
    return duplicates.find_near(
        np.array([*queries, *targets]), place[: len(queries)], place[len(queries) :]
    )


SCENES = [thumbnail(scene(seed)) for seed in range(60)]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_found(change):
    changed = [thumbnail(CHANGES[change](scene(seed))) for seed in range(20)]
    found = search(changed, SCENES)
    assert len(found.queries) >= 19
    np.testing.assert_array_equal(found.targets - len(changed), found.queries)
    assert (found.distances <= 0.02).all()
    assert len(search(SCENES, changed).queries) >= 19


def test_other_pictures_are_not():
    assert not len(search(SCENES[:30], SCENES[30:]).queries)


def test_pictures_that_share_a_part_only_are_not():
    """Most of these pairs would do if 0.8 were enough."""
    blends = [thumbnail(Image.blend(scene(seed), scene(seed + 30), 0.4)) for seed in range(20)]
    assert (
        duplicates.aligned_correlation(np.array(blends), np.array(SCENES[:20])) > 0.8
    ).sum() > 10
    assert not len(search(blends, SCENES[:20]).queries)


def test_flat_pictures_are_not_compared():
    noise = np.random.default_rng(0).normal(128, 2, (2, 24, 24)).astype(np.uint8)
    assert not len(search([noise[0], noise[0]], [noise[1], noise[0]]).queries)


def test_the_descriptor_forgets_brightness_and_contrast():
    thumbnail = SCENES[0] // 2
    other = thumbnail + 40
    np.testing.assert_array_equal(
        duplicates.compute_descriptors(thumbnail[None]), duplicates.compute_descriptors(other[None])
    )


def test_pictures_that_vary_in_one_direction_only():
    stripes = Image.new("RGB", (90, 60), "black")
    stripes.paste("red", (0, 20, 90, 40))
    stripes.paste("gold", (0, 40, 90, 60))
    for image in (stripes, stripes.transpose(Image.Transpose.ROTATE_90)):
        larger = image.resize((image.width * 2, image.height * 2))
        found = search([thumbnail(image)], [thumbnail(larger)])
        assert found.queries.tolist() == [0] and found.targets.tolist() == [1]


def test_thousands_of_almost_equal_pictures(monkeypatch):
    """Each query meets a bounded number of others, and still all are found."""
    random = np.random.default_rng(0)
    frames = [
        np.clip(SCENES[0] + random.normal(0, 1, (24, 24)), 0, 255).astype(np.uint8)
        for _ in range(3000)
    ]
    verified = count_verified(monkeypatch)
    found = search(frames[:2000], frames[2000:])
    assert len(found.queries) == 2000 and sum(verified) <= 3 * 2000


def test_pictures_that_are_alike_by_chance_are_seldom_verified(monkeypatch):
    """Pictures of nine spots: many resemble each other, and none is another one moved."""
    random = np.random.default_rng(0)
    grids = random.integers(0, 256, (4000, 3, 3)).repeat(8, axis=1).repeat(8, axis=2)
    thumbnails = np.clip(grids + random.normal(0, 8, grids.shape), 0, 255).astype(np.uint8)
    verified = count_verified(monkeypatch)
    candidates, _ = lsh.candidates(
        lsh.build_index(duplicates.compute_descriptors(thumbnails[2000:])),
        duplicates.compute_descriptors(thumbnails[:2000]),
    )
    search(thumbnails[:2000], thumbnails[2000:])
    assert len(candidates) > 500 and sum(verified) < len(candidates)


def test_of_images_with_equal_bytes_the_one_furthest_from_training_is_the_target():
    contents = np.array([0, 1, 0, 2, 0, 1])
    splits = np.array([0, 0, 1, 1, 2, -1], np.int8)
    found = duplicates.find_across_splits(contents, splits, None)
    assert found.queries.tolist() == [0, 2] and found.targets.tolist() == [4, 4]
    nothing = duplicates.find_across_splits(contents, np.zeros(6, np.int8), None)
    assert not len(nothing.queries)


def test_near_duplicates_of_what_is_in_both_splits_are_found():
    """Equal bytes in training and in test, and a near duplicate of both in training."""
    near = thumbnail(saved(scene(0), 50))
    thumbnails = np.array([SCENES[0], near, SCENES[1], SCENES[0]])
    contents, splits = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1], np.int8)
    found = duplicates.find_across_splits(contents, splits, thumbnails)
    assert found.queries.tolist() == [0, 1] and found.targets.tolist() == [3, 3]
    assert found.distances[0] == 0 < found.distances[1]


def test_the_order_of_queries_and_the_pool_do_not_matter(monkeypatch):
    """Blocks run here or in a pool, and end in any order."""
    queries = [thumbnail(saved(scene(seed), 60)) for seed in range(60)] * 40
    expected = search(queries, SCENES)
    monkeypatch.setenv("PREPARE_WORKERS", "2")
    monkeypatch.setattr("stages.run.parallel._TRIAL_SECONDS", 0)
    monkeypatch.setattr("stages.run.parallel._POOL_SECONDS", 0)
    for one, two in zip(search(queries, SCENES), expected, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(expected.queries) == 2400
