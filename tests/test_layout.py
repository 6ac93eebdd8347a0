"""Whether the top folders of a dataset are classes or splits, and class names that look alike."""

import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from factories import make_files
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.data import dataset
from stages.data.arrays import SPLITS
from stages.data.layout import Folder, find_class_folders, split_of
from stages.run.cli import UserError


def fill(root: Path, *folders: str) -> Path:
    """Make folders with an image in each; ``"train:cat,dog"`` stands for two class folders."""
    for folder in folders:
        top, _, classes = folder.partition(":")
        for name in classes.split(","):
            make_files(root, f"{top}/{name}/1.png" if name else f"{top}/1.png")
    return root


def find(root: Path, layout: str = "auto") -> pd.DataFrame:
    return dataset.find(root, layout=layout)[0]


def refusal(root: Path, layout: str = "auto") -> str:
    """Return the message of a refused dataset."""
    with pytest.raises(UserError) as caught:
        dataset.find(root, layout=layout)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Splits


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("Training", "valid", "Testing"),
        ("training_set", "Validation", "test_set"),
        ("Train Images", "dev", "Test Images"),
        ("1_train", "2_val", "3_test"),
        ("train2017", "val2017", "test2017"),
        ("seg_train", "seg_dev", "seg_test"),
        ("trainingSet", "validationSet", "TestSet"),
        ("TRAIN", "VAL", "TEST"),
        ("trainset", "valset", "testset"),
        ("trn", "my-valid.v2", "tst"),
        ("animals train", "animals (validation)", "animals test "),
        ("train/train", "val/Validation", "test/test"),
        ("seg_train/seg_train", "val", "seg_test/seg_test"),
        ("train/train/train", "val/val", "test"),
    ],
)
def test_the_datasets_own_splits(tmp_path, train, val, test):
    fill(tmp_path, f"{train}:cat,dog", f"{val}:cat,dog", f"{test}:cat")
    found = find(tmp_path)
    names = {"train": train, "val": val, "test": test}
    assert set(found["own_split"]) == names.keys() and set(found["class"]) == {"cat", "dog"}
    for _, image in found.iterrows():
        assert image["path"].startswith(names[image["own_split"]] + "/")
        assert image["path"].split("/")[-2] == image["class"]


def test_train_alone_is_a_split(tmp_path):
    found = find(fill(tmp_path, "Training:cat,dog"))
    assert set(found["own_split"]) == {"train"} and list(found["class"]) == ["cat", "dog"]


def test_a_class_called_test_is_no_doubled_split(tmp_path):
    found = find(fill(tmp_path, "train:cat,test", "test:test"))
    assert list(found["path"]) == ["test/test/1.png", "train/cat/1.png", "train/test/1.png"]
    assert list(found["class"]) == ["test", "cat", "test"]
    assert list(found["own_split"]) == ["test", "train", "train"]


word = st.sampled_from(
    [("train", "train"), ("training", "train"), ("trn", "train"), ("val", "val"), ("valid", "val"),
     ("validation", "val"), ("dev", "val"), ("test", "test"), ("testing", "test"), ("tst", "test")]
)  # fmt: skip
separator = st.text("_-. 0123456789()+&,", min_size=1, max_size=4)
decoration = st.one_of(
    st.just(""),
    st.tuples(separator, st.sampled_from(["seg", "Set", "images", "é", "猫", ""])).map("".join),
)


@given(word, decoration, decoration, st.sampled_from([str.lower, str.upper, str.title]))
def test_decorated_words_are_recognized(word, before, after, case):
    name, split = word
    assert split_of(before[::-1] + case(name) + after) == split
    assert split_of(f"{before[::-1]}my{name.title()}{after}") == split  # camel case


@given(word, st.text(st.characters(categories=["Ll", "Lo"]), min_size=1, max_size=5), st.booleans())
def test_a_word_within_a_word_is_none(word, letters, at_start):
    assume(letters not in ("ing", "ation", "id", "idation", "set"))  # as in train + ing
    letters = unicodedata.normalize("NFC", letters)
    assume(unicodedata.normalize("NFC", "e" + letters + "e") == "e" + letters + "e")
    assert split_of(letters + word[0] if at_start else word[0] + letters) is None


@given(word, word, separator)
def test_words_for_two_splits_are_none(one, other, between):
    expected = one[1] if one[1] == other[1] else None
    assert split_of(one[0] + between + other[0]) == expected


@pytest.mark.parametrize(
    "name", ["strain", "trainer", "contest", "valley", "device", "latest", "Détest", "evaluation",
             "train_val", "trainval", "eval", "holdout", "", "2017", "tests"]
)  # fmt: skip
def test_other_names_are_no_splits(name):
    assert split_of(name) is split_of(unicodedata.normalize("NFD", name)) is None


# Classes


@pytest.mark.parametrize(
    "classes",
    [
        ["bus", "train"],
        ["bus", "test"],
        ["boots", "training shoes"],
        ["negative_test", "positive_test"],
        ["diesel train", "steam train"],
        ["train", "train_val"],
        ["bus", "train", "val", "test"],
    ],
)
def test_classes_that_are_called_like_splits(tmp_path, classes):
    found = find(fill(tmp_path, *classes))
    assert list(found["class"]) == sorted(classes) and found["own_split"].isna().all()


@pytest.mark.parametrize(
    "folders",
    [
        ["cat:2023,indoors", "dog:2023,outdoors,unknown"],  # one name in common
        ["cat:images", "dog:images", "cow:images,others"],
        ["cat:a,b", "dog:c,d"],
        ["cat:a,b,c,d,e", "dog:a,b,f,g,h"],  # less than half in common
        ["cat", "dog", "pets:cat,other"],
        ["cat", "dog:2023,2024"],
        ["test:small,large", "beaker"],
    ],
)
def test_classes_with_folders(tmp_path, folders):
    found = find(fill(tmp_path, *folders))
    assert set(found["class"]) == {folder.split(":")[0] for folder in folders}
    assert found["own_split"].isna().all()


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "test"],
        ["train:2023,2024", "bus:2023,2024"],
        ["cat:2023,2024", "dog:2023,2024"],
        ["steam train:1,2", "diesel train:1,2"],
        ["cat:train,test", "dog:train,test"],
    ],
)
def test_layout_classes(tmp_path, folders):
    fill(tmp_path, *folders)
    assert "prepare.layout: classes" in refusal(tmp_path)
    found = find(tmp_path, layout="classes")
    assert set(found["class"]) == {folder.split(":")[0] for folder in folders}
    assert found["own_split"].isna().all()


# What is unclear


@pytest.mark.parametrize(
    "folders, message",
    [
        (["train:cat,dog", "eval:cat,dog"],
         "{root} holds eval beside train; expected only train, val and test, each with its class"
         " folders, or only class folders: rename the splits, and move what is neither split nor"
         " class out of the dataset; if these folders are classes, set prepare.layout: classes"),
        (["Training:cat,dog,cow", "holdout:cat,dog"], "holds holdout beside Training; expected"),
        (["train:cat,dog", "other:cat"], "holds other beside train; expected"),
        (["train:cat,dog", "val:cat,dog", "hold out:cat,dog"], "holds hold out beside train, val;"),
        (["train/train:cat,dog", "eval/eval:cat,dog"], "holds eval beside train; expected"),
        (["seg_train:cat,dog", "seg_test:cat,dog", "seg_pred"], "seg_pred beside seg_test, seg_tr"),
        (["train:cat,dog", "val:cat", "test:cat", "copy/train:cat"], "holds copy beside test, tra"),
        (["train:Caf\u00e9,tea", "eval:Cafe\u0301,Tea"], "holds eval beside train; expected"),
        (["train:a,b", "x/train:a,b"], "holds x beside train; expected"),
        (["a:cat,dog", "b:cat,dog"],
         "{root} holds the same folders (cat, dog) in a, b, as splits do; expected only train"),
        (["fold1:cat,dog", "fold2:dog,cow,cat", "fold3:cow,dog"], "in fold1, fold2, fold3, as"),
        (["big:1,2,3,4,5,6,7,8", "small:1,2"], "the same folders (1, 2) in big, small, as"),
        (["a/images:cat,dog", "b/images:cat,dog"], "the same folders (cat, dog) in a, b, as"),
        (["a/a:cat,dog", "b/b:cat,dog"], "the same folders (cat, dog) in a, b, as"),
        (["development:cat,dog", "test:cat,dog"], "(cat, dog) in development, test, as"),
        (["cat:train,test", "dog:train,test"], "the same folders (test, train) in cat, dog, as"),
        (["a:Caf\u00e9,Tea", "b:Cafe\u0301,tea"], "in a, b, as splits do"),
        (["cat", "dog", "pets:cat,dog"],
         "{root} holds pets, a folder with the names of those beside it (cat, dog); expected only"),
        (["cat", "dog", "pets:1,2,3,cat,dog"], "holds pets, a folder with the names of those"),
        (["cat", "dog", "pets/pets:cat,dog"], "holds pets, a folder with the names of those"),
        (["train:a,b", "training:a,b"], "has one split under two names (train, training); keep"),
        (["train:a,b", "val:a", "validation:a"], "has one split under two names (train, val, vali"),
        (["train:a,b", "Train:a,b", "test:a"], "under two names"),
        (["test:a,b", "val:a,b"], "holds val, test but no train; add train/, or if these folders"),
        (["train", "test"], "{root}/train holds 1 image (1.png) and no class folders"),
        (["pets/pets:cat,dog"], "set `dataset: {root}/pets/pets`"),
        (["pets/pets/pets:cat,dog"], "set `dataset: {root}/pets/pets/pets`"),
        (["pets/Training:cat,dog", "pets/Testing:cat,dog"], "set `dataset: {root}/pets`"),
        (["pets/train:cat,dog"], "set `dataset: {root}/pets`"),
        (["train:images"], "holds one class only (images)"),
    ],
)  # fmt: skip
def test_an_unclear_layout_is_refused(tmp_path, folders, message):
    assert message.replace("{root}", str(tmp_path)) in refusal(fill(tmp_path, *folders))


# Masks and annotations


@pytest.mark.parametrize(
    "folders, named",
    [
        (["COVID:images,masks", "Normal:images,masks"], "COVID/masks/, Normal/masks/"),
        (["COVID:Images,lung_mask", "Normal:Images"], "COVID/lung_mask/"),
        (["images", "labels"], "labels/"),
        (["images:cat,dog", "annotations:cat,dog"], "annotations/"),
        (["JPEGImages", "SegmentationClass"], "SegmentationClass/"),
        (["train:good", "test:good,broken", "ground_truth:broken"], "ground_truth/"),
        (["train:images,labels", "val:images,labels"], "train/labels/, val/labels/"),
        (["images:train,val", "labels:train,val"], "labels/"),
        (["cat", "dog", "GroundTruth"], "GroundTruth/"),
        (["cat", "dog", "cat_masks", "dog_masks"], "cat_masks/, dog_masks/"),
        (["xray:cat,dog", "masks:cat,dog"], "masks/"),
        (["cat", "dog", "masks:cat,dog"], "masks/"),
        (["train:cat,dog", "masks:cat,dog"], "masks/"),
        (["images:cat,dog", "annotations/trimaps"], "annotations/"),
    ],
)
def test_masks_beside_images_are_refused(tmp_path, folders, named):
    message = refusal(fill(tmp_path, *folders))
    assert (
        f"holds masks or annotations beside images: {named}; a class is a folder of its i"
        in message
    )
    assert "move the others out of the dataset" in message


@pytest.mark.parametrize(
    "names",
    [
        ["x.png", "x_mask.png"],
        ["benign (1).png", "benign (1)_mask.png"],
        ["benign (1).png", "benign (1)_mask_1.png"],
        ["X.jpg", "x-Mask.PNG"],
        ["7.jpg", "mask_7.png"],
        ["7.jpg", "7(mask).png"],
        ["a.jpg", "a.seg.png"],
        ["ISIC_1.jpg", "ISIC_1_segmentation.png"],
        ["ISIC_1.jpg", "ISIC_1_superpixels.png"],
        ["a.jpg", "a_gt.png"],
        ["a.jpg", "a_Ground_Truth.png"],
    ],
)
def test_a_mask_beside_its_image_is_refused(tmp_path, names):
    make_files(tmp_path, *(f"a/deep/{name}" for name in names), "b/1.png")
    assert f"masks or annotations beside images: a/deep/{names[1]};" in refusal(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        ["with_mask", "without_mask"],
        ["mask", "no mask"],
        ["mask_1", "mask_2"],
        ["mask", "vase", "label"],
        ["mask:indoors,outdoors,x,y,z", "no_mask:indoors,a,b,c,d"],
        ["bottle", "label"],
        ["GT", "SUV"],
        ["train:with_mask,without_mask", "test:with_mask,without_mask"],
    ],
)
def test_classes_that_are_called_like_masks(tmp_path, folders):
    find(fill(tmp_path, *folders))


def test_a_top_folder_is_a_class_if_that_is_said_and_text_files_harm_no_class(tmp_path):
    fill(tmp_path, "images", "masks")
    make_files(tmp_path, "images/images/1.png", "images/labels/1.txt", "masks/mask_2.png")
    assert set(find(tmp_path, "classes")["class"]) == {"images", "masks"}


# What is not sorted into classes


@pytest.mark.parametrize(
    "folders, named",
    [
        (["HAM10000_images_part_1", "HAM10000_images_part_2"], "HAM10000_images_part_1, HAM1000"),
        (["images_001:images", "images_002:images", "images_003:images"], "images_001, images_002"),
        (["pets-20240501T102030Z-001/pets:cat", "pets-20240501T102030Z-002/pets:dog"], "-002; m"),
        (["part1", "part2", "part3"], "part1, part2, part3; move each image into the folder of"),
        (["Photos from 2019", "Photos from 2020"], "Photos from 2019, Photos from 2020"),
        (["fold_1:cat,dog", "fold_2:cow"], "fold_1, fold_2"),
        (["cat", "dog", "_unlabeled"], "not sorted yet: _unlabeled; move"),
        (["cat", "dog", "no_label", "New folder (2)"], "New folder (2), no_label;"),
        (["train:cat,dog,unsup", "test:cat"], "train/unsup; move each image into the folder of"),
        (["train:cat,dog", "test:cat", "val:dog,Unsorted"], "val/Unsorted;"),
    ],
)  # fmt: skip
def test_parts_of_an_archive_and_unsorted_images_are_no_classes(tmp_path, folders, named):
    message = refusal(fill(tmp_path, *folders))
    assert named in message and "like what is not sorted yet: " in message
    is_split = folders[0].startswith("train:")
    assert ("rename them" in message, "layout: classes" in message) == (is_split, not is_split)


@pytest.mark.parametrize(
    "classes",
    [
        ["class 1", "class 2"],
        ["001", "002"],
        ["mask_1", "mask_2"],
        ["n01440764", "n01443537"],
        ["10_girl", "20_boy"],
        ["photo", "drawing 2"],
        ["part 1", "screw"],
        ["unknown", "label"],
        ["no_label", "with label"],
        ["labeled bottles", "unlabeled"],
    ],
)
def test_numbered_classes(tmp_path, classes):
    assert set(find(fill(tmp_path, *classes))["class"]) == set(classes)


def test_folders_that_are_called_like_parts_are_classes_if_that_is_said(tmp_path):
    assert len(find(fill(tmp_path, "part1", "part2", "unlabeled"), "classes")) == 3


# Names that look alike


def find_names(*folders: str, layout: str = "auto") -> list[str]:
    """Return the class names of folders that need not exist: many file systems can't hold both."""
    image = Folder(["1.png"], [], [], [], [])
    tree = {"": Folder([], [], [], [], [])}
    for folder in folders:
        top, _, classes = folder.partition(":")
        names = classes.split(",") if classes else []
        tree[""].folders.append(top)
        tree[top] = Folder([], names, [], [], []) if names else image
        tree |= {f"{top}/{name}": image for name in names}
    return [one.name for one in find_class_folders(Path("d"), tree, layout)]


@pytest.mark.parametrize(
    "folders, message",
    [
        (["Caf\u00e9", "Cafe\u0301", "tea"], r"'Caf\xe9', 'Cafe\u0301'; if they"),
        (["Tea", "tea", "coffee"], "'Tea', 'tea'; if they"),
        (["tea", "tea "], "'tea', 'tea '"),
        (["tea", " TEA"], "'tea', ' TEA'"),
        (["tea", "tea."], "'tea', 'tea.'"),
        (["t-shirt", "t_shirt", "T shirt"], "'t-shirt', 't_shirt', 'T shirt'"),
        (["tea", "te\u200ba"], r"'tea', 'te\u200ba'"),
        (["tea", "tea\ufeff"], r"'tea\ufeff'"),
        (["a b", "a\u00a0b"], r"'a b', 'a\xa0b'"),
        (["a b", "a  b"], "'a b', 'a  b'"),
        (["stra\u00dfe", "strasse"], r"'stra\xdfe', 'strasse'"),
        (["\uff21", "a"], r"'\uff21', 'a'"),
        (["tea", "tea - Copy"], "'tea', 'tea - Copy'; if they"),
        (["tea", "Tea copy 2"], "'tea', 'Tea copy 2'"),
        (["tea", "tea - Kopie (2)"], "'tea', 'tea - Kopie (2)'"),
        (["Copy of tea", "tea"], "'Copy of tea', 'tea'"),
        (["tea", "tea (1)", "tea (2)"], "'tea', 'tea (1)', 'tea (2)'"),
        (["tea", "tea (Ann's conflicted copy 2024-05-01)"], "'tea', \"tea (Ann's"),
        (["tea", "tea - \u526f\u672c"], r"'tea - \u526f\u672c'"),
        (["train:tea,coffee", "test:tea (1)"], "'train/tea', 'test/tea (1)'"),
        (["Caf\u00e9", "Cafe\u0301", "tea", "Tea", "x"], r"'Cafe\u0301'; 'tea', 'Tea'; if they"),
        (["train:Caf\u00e9,tea", "test:Cafe\u0301,tea"],
         r"'train/Caf\xe9', 'test/Cafe\u0301'; if they"),
        (["train:tea,coffee", "val:Tea", "test:coffee,Coffee"],
         "'train/tea', 'val/Tea'; 'train/coffee', 'test/Coffee'; if they"),
    ],
)  # fmt: skip
def test_names_that_look_alike_are_refused(folders, message):
    with pytest.raises(UserError) as caught:
        find_names(*folders)
    assert "class names that look alike: " in str(caught.value) and message in str(caught.value)


name = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/:,"), min_size=1)
invisible = st.sampled_from(["", " ", "\u200b", "\u200d", "\ufeff", "\u00ad"])


@given(name, invisible, invisible, st.sampled_from(["NFC", "NFD"]), st.booleans())
def test_any_name_with_a_look_alike_is_refused(name, before, after, form, fold):
    other = unicodedata.normalize(form, name.casefold() if fold else name)
    other = before + other + after
    assume(other != name)
    with pytest.raises(UserError, match="look alike"):
        find_names(name, other, "and another class", layout="classes")


@given(st.lists(st.from_regex(r"[a-z猫é]{1,8}( [0-9]{1,3})?", fullmatch=True), unique=True,
                min_size=2))  # fmt: skip
def test_names_that_differ_are_accepted(names):
    assert find_names(*names, layout="classes") == names


def test_the_splits_are_named_as_stages_name_them():
    assert {split_of(split) for split in SPLITS} == set(SPLITS)
