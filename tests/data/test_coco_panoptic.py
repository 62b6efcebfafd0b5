"""The data set: rules of the paper, determinism, every kind of file, every kind of damage."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldmseg_fast.data.coco_panoptic import CocoPanoptic, DataError, collate
from ldmseg_fast.data.folders import find_split, list_splits, read_image
from ldmseg_fast.data.sampler import EpochSampler
from ldmseg_fast.data.transforms import Augmentation
from ldmseg_fast.panoptic.format import write_panoptic_png

MakeMap = Callable[[int, int], np.ndarray]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(
        torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        for key in first
    )


def test_item(folder, quarters: MakeMap) -> None:
    ids = quarters(48, 63)
    folder.add(noise(48, 63), ids, "png")
    item = CocoPanoptic(folder.root, "val", 32, num_slots=8)[0]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
    assert item["segment_ids"].shape == (32, 32) and item["segment_ids"].dtype == torch.uint8
    assert item["table"].shape == (256,) and item["table"].dtype == torch.uint8
    assert item["num_segments"] == 4 and item["image_id"] == 0 and item["original_size"] == (48, 63)
    expected = np.array(Image.fromarray(noise(48, 63)).resize((32, 32), Image.BICUBIC))
    assert np.array_equal(item["image"].numpy(), expected.transpose(2, 0, 1))
    resized = np.array(Image.fromarray(ids).resize((32, 32), Image.NEAREST))
    order = [5, 900, 70_001, 16_777_215]  # as in segments_info
    assert np.array_equal(np.array([0, *order])[item["segment_ids"].numpy()], resized)


def test_ground_truth_is_the_map_as_stored(folder, quarters: MakeMap) -> None:
    folder.add(noise(41, 30), quarters(41, 30), crowd=(900,))
    dataset = CocoPanoptic(folder.root, "val", 16, train=True)
    ids, segments_info = dataset.ground_truth(0)
    assert np.array_equal(ids, quarters(41, 30)) and ids.dtype == np.int32
    assert segments_info == folder.content["annotations"][0]["segments_info"]
    assert dataset.load_image(0).shape == (41, 30, 3)


def test_training_rules(folder) -> None:
    """Crowds, and segments under ten pixels of the original map, are void in training only."""
    ids = np.full((40, 40), 300, np.int32)
    ids[:3, :3], ids[10, 10:20], ids[20:, 20:] = 7, 8, 9  # 9 px, 10 px, a crowd
    folder.add(noise(40, 40), ids, crowd=(9,))
    plain = Augmentation(flip=0)
    assert CocoPanoptic(folder.root, "val", 40)[0]["num_segments"] == 4
    trained = CocoPanoptic(folder.root, "val", 40, train=True, augmentation=plain)[0]
    assert trained["num_segments"] == 2
    assert np.array_equal(trained["segment_ids"].numpy() == 0, (ids == 7) | (ids == 9))
    strict = CocoPanoptic(folder.root, "val", 40, train=True, min_area=11, augmentation=plain)[0]
    assert strict["num_segments"] == 1


def test_largest_segments_are_kept(folder) -> None:
    """140 segments, the first twice as large as the last ones: 127 slots take the largest, all other is void."""
    ids = np.repeat(np.arange(1, 141), np.where(np.arange(140) < 100, 40, 20)).astype(np.int32).reshape(48, 100)
    folder.add(noise(48, 100), ids)
    item = CocoPanoptic(folder.root, "val", 100)[0]
    assert item["num_segments"] == 127
    kept = np.unique(np.array(Image.fromarray(ids).resize((100, 100), 0))[item["segment_ids"].numpy() > 0])
    assert len(kept) == 127 and set(range(1, 101)) <= set(kept.tolist())
    assert CocoPanoptic(folder.root, "val", 100, num_slots=256)[0]["num_segments"] == 140
    assert CocoPanoptic(folder.root, "val", 100, num_slots=2)[0]["num_segments"] == 1


def test_more_than_255_segments(folder) -> None:
    ids = np.arange(1, 401, dtype=np.int32).reshape(20, 20)
    folder.add(noise(20, 20), ids)
    item = CocoPanoptic(folder.root, "val", 20, num_slots=256)[0]
    assert item["num_segments"] == 255 and (item["segment_ids"] > 0).sum() == 255


def test_void_only(folder) -> None:
    folder.add(noise(20, 20), np.zeros((20, 20), np.int32))
    for scheme in ("random", "position", "area"):
        item = CocoPanoptic(folder.root, "val", 16, id_assignment=scheme)[0]
        assert item["num_segments"] == 0 and not item["segment_ids"].any() and not item["table"].any()


def test_flip_moves_picture_and_map_together(folder, quarters: MakeMap) -> None:
    folder.add(noise(32, 32), quarters(32, 32), "png")
    plain, flipped = (
        CocoPanoptic(folder.root, "val", 32, train=True, augmentation=Augmentation(flip=p))[0] for p in (0, 1)
    )
    assert torch.equal(plain["image"].flip(2), flipped["image"])
    assert torch.equal(plain["segment_ids"].flip(1), flipped["segment_ids"])


def test_crop_numbers_what_is_left(folder, quarters: MakeMap) -> None:
    folder.add(noise(64, 64), quarters(64, 64))
    dataset = CocoPanoptic(folder.root, "val", 32, train=True, augmentation=Augmentation(scale_min=0.2))
    counts = set()
    for epoch in range(40):
        item = dataset[(epoch, 0)]
        present = set(item["segment_ids"].unique().tolist())
        assert present == set(range(1, item["num_segments"] + 1))
        counts.add(len(present))
    assert {1, 2, 4} <= counts


def test_random_numbers_come_from_seed_epoch_and_index(scenes: Path) -> None:
    def make(**options) -> CocoPanoptic:
        return CocoPanoptic(
            scenes, "train2017", 32, augmentation=Augmentation(0.5, 0.5, 0.3), **{"train": True, "seed": 3, **options}
        )

    dataset = make()
    assert same(dataset[4], make()[4]) and same(dataset[4], dataset[(0, 4)])
    assert not same(dataset[4], make(seed=5)[4])
    dataset.set_epoch(2)
    assert same(dataset[4], make()[(2, 4)]) and not same(dataset[4], make()[4])
    evaluation = make(train=False)
    assert same(evaluation[(0, 4)], evaluation[(9, 4)]), "evaluation sees no epochs"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(scenes: Path, workers: int) -> None:
    dataset = CocoPanoptic(
        scenes, "train2017", 32, train=True, num_slots=32, augmentation=Augmentation(0.5, 0.6, 0.2), seed=1
    )
    sampler = EpochSampler(len(dataset), 7, seed=1, start_step=2)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate))
    for step in range(2, 6):  # runs into the second epoch
        expected = collate([dataset[key] for key in sampler.batch(step)])
        batch = next(batches)
        assert same(batch, expected)
        assert batch["image"].shape == (7, 3, 32, 32) and batch["table"].shape == (7, 256)
        assert batch["num_segments"].dtype == torch.int64 and batch["original_size"][0] == (64, 64)


def test_cache_changes_nothing(scenes: Path) -> None:
    options = {"train": True, "num_slots": 32, "augmentation": Augmentation(0.5, 1.0, 0.2)}
    cached, plain = (CocoPanoptic(scenes, "train2017", 48, cache=cache, **options) for cache in (True, False))
    for epoch in range(3):
        for index in (0, 5, 9):
            assert same(cached[(epoch, index)], plain[(epoch, index)])
    cached[0]["image"].fill_(0)
    cached[0]["segment_ids"].fill_(0)
    assert same(cached[0], plain[0]), "items are copies of what is cached"


def test_cache_excludes_crops(scenes: Path) -> None:
    with pytest.raises(ValueError, match="cache"):
        CocoPanoptic(scenes, "train2017", 48, train=True, cache=True, augmentation=Augmentation(scale_min=0.5))


def test_limit_and_iteration(scenes: Path) -> None:
    dataset = CocoPanoptic(scenes, "train2017", 16, limit=3)
    assert len(dataset) == 3 and len(list(dataset)) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_maps_inside_annotations(folder, quarters: MakeMap) -> None:
    folder.add(noise(16, 16), quarters(16, 16))
    (folder.root / "panoptic_val").rename(folder.root / "annotations" / "panoptic_val")
    assert CocoPanoptic(folder.root, "val", 16)[0]["num_segments"] == 4


def test_second_annotation_of_a_split_uses_its_folders(folder, quarters: MakeMap) -> None:
    folder.add(noise(16, 16), quarters(16, 16))
    shutil.copy(folder.json, folder.root / "annotations" / "panoptic_val_classes.json")
    assert list_splits(folder.root) == ["val", "val_classes"]
    assert find_split(folder.root, "val_classes").maps == folder.root / "panoptic_val"
    assert len(CocoPanoptic(folder.root, "val_classes", 16)) == 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [*[(mode, "jpg") for mode in ("L", "CMYK")], *[(mode, "png") for mode in ("RGB", "L", "LA", "P", "RGBA", "1")]],
)
def test_picture_formats(folder, quarters: MakeMap, mode: str, suffix: str) -> None:
    gradient = np.add.outer(np.arange(50), np.arange(40))[..., None] * np.array([1, 2, 2])
    folder.add(Image.fromarray(gradient.astype(np.uint8)).convert(mode), quarters(50, 40), suffix)
    image = CocoPanoptic(folder.root, "val", 32).load_image(0)
    assert image.shape == (50, 40, 3) and image.dtype == np.uint8
    if mode in ("CMYK", "RGB", "RGBA"):
        assert np.abs(image.astype(int) - gradient).mean() < 6
    assert CocoPanoptic(folder.root, "val", 32)[0]["num_segments"] == 4


def test_exif_rotation_is_not_applied(folder, quarters: MakeMap) -> None:
    picture = Image.fromarray(noise(20, 30))
    exif = picture.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    folder.add(noise(20, 30), quarters(20, 30))
    picture.save(folder.root / "val" / "0.jpg", exif=exif)
    assert Image.open(folder.root / "val" / "0.jpg").getexif()[0x0112] == 6
    dataset = CocoPanoptic(folder.root, "val", 16)
    assert dataset.load_image(0).shape == (20, 30, 3)
    assert dataset[0]["original_size"] == (20, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (480, 640), (427, 639)])
def test_sizes(folder, size: tuple[int, int]) -> None:
    folder.add(noise(*size), np.full(size, 3, np.int32))
    item = CocoPanoptic(folder.root, "val", 64)[0]
    assert item["original_size"] == size and item["num_segments"] == 1 and (item["segment_ids"] == 1).all()


def test_eight_thousand_by_six_thousand(folder) -> None:
    ids = np.ones((6000, 8000), np.int32)
    ids[:3000] = 2
    folder.add(Image.new("RGB", (8000, 6000), (9, 90, 200)), ids)
    item = CocoPanoptic(folder.root, "val", 64, train=True, augmentation=Augmentation(flip=0))[0]
    assert item["original_size"] == (6000, 8000) and item["num_segments"] == 2
    assert (item["segment_ids"][:32] == 2).all() and (item["segment_ids"][32:] == 1).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_picture(folder, quarters: MakeMap, suffix: str) -> None:
    folder.add(noise(60, 60), quarters(60, 60), suffix)
    path = folder.root / "val" / f"0.{suffix}"
    whole = path.read_bytes()
    for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=rf"0\.{suffix}.*again"):
            CocoPanoptic(folder.root, "val", 32)[0]


def test_truncated_map(folder, quarters: MakeMap) -> None:
    folder.add(noise(60, 60), quarters(60, 60))
    path = folder.root / "panoptic_val" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"panoptic_val.0\.png"):
        CocoPanoptic(folder.root, "val", 32)[0]


@pytest.mark.parametrize(("mode", "message"), [("P", "palette"), ("RGBA", "RGBA"), ("L", "grey")])
def test_map_of_another_format(folder, quarters: MakeMap, mode: str, message: str) -> None:
    folder.add(noise(60, 60), quarters(60, 60))
    Image.new(mode, (60, 60)).save(folder.root / "panoptic_val" / "0.png")
    with pytest.raises(DataError, match=rf"0\.png.*{message}"):
        CocoPanoptic(folder.root, "val", 32)[0]


def test_sixteen_bit_and_foreign_pictures(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 40).all()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"deep\.tif.*8-bit"):
        read_image(tmp_path / "deep.tif")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"text\.jpg.*not a readable picture"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"absent\.jpg.*no such picture"):
        read_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("side", [9000, 40000])
def test_picture_that_claims_gigabytes(tmp_path: Path, side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\x09IDAT")
    with pytest.raises(DataError, match=r"huge\.png.*scale it down"):
        read_image(tmp_path / "huge.png")


def test_sizes_that_differ(folder, quarters: MakeMap) -> None:
    folder.add(noise(20, 30), quarters(20, 30))
    folder.add(noise(20, 30), quarters(20, 30))
    write_panoptic_png(folder.root / "panoptic_val" / "0.png", quarters(20, 31))
    write_panoptic_png(folder.root / "panoptic_val" / "1.png", quarters(30, 20))
    dataset = CocoPanoptic(folder.root, "val", 16)
    with pytest.raises(DataError, match=r"0\.png: the map is 31x20, its picture 30x20$"):
        dataset[0]
    with pytest.raises(DataError, match=r"1\.png.*rotated"):
        dataset[1]


def test_id_that_the_json_lacks(folder, quarters: MakeMap) -> None:
    folder.add(noise(20, 20), quarters(20, 20))
    folder.content["annotations"][0]["segments_info"].pop(0)
    folder.save()
    with pytest.raises(DataError, match=r"0\.png: segment id 5 is in the map but not in segments_info"):
        CocoPanoptic(folder.root, "val", 16)[0]


def test_folders_that_are_not_there(folder, quarters: MakeMap, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*not a folder"):
        CocoPanoptic(tmp_path / "nowhere", "val", 16)
    folder.add(noise(16, 16), quarters(16, 16))
    with pytest.raises(DataError, match=r"panoptic_train\.json does not exist; splits found.*: val"):
        CocoPanoptic(folder.root, "train", 16)
    shutil.rmtree(folder.root / "val")
    with pytest.raises(DataError, match="no folder with pictures"):
        CocoPanoptic(folder.root, "val", 16)
    (folder.root / "Val").mkdir()
    with pytest.raises(DataError, match=r"no folder with pictures: .*Val is there: upper and lower case differ"):
        CocoPanoptic(folder.root, "val", 16)
    (folder.root / "val").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"1 of 1 pictures .*0\.jpg.*ldmseg data check"):
        CocoPanoptic(folder.root, "val", 16)


def test_json_without_its_png(folder, quarters: MakeMap) -> None:
    folder.add(noise(16, 16), quarters(16, 16))
    folder.add(noise(16, 16), quarters(16, 16))
    (folder.root / "panoptic_val" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 maps .*panoptic_val.*1\.png"):
        CocoPanoptic(folder.root, "val", 16)


def test_empty_split_and_broken_json(folder) -> None:
    folder.save()
    with pytest.raises(DataError, match=r"panoptic_val\.json: the split is empty"):
        CocoPanoptic(folder.root, "val", 16)
    folder.json.write_text(json.dumps(folder.content)[:-5])
    with pytest.raises(DataError, match=r"panoptic_val\.json: not a JSON file"):
        CocoPanoptic(folder.root, "val", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 8, "num_slots": 300}, "num_slots=300"),
        ({"size": 8, "id_assignment": "best"}, "best"),
        ({"size": 8, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_options(scenes: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoPanoptic(scenes, "val2017", **options)


def test_real_coco(shared: Path) -> None:
    root = shared / "data" / "coco_mini"
    dataset = CocoPanoptic(root, "val2017", 128)
    assert len(dataset) == 18
    for item in dataset:
        assert 1 <= item["num_segments"] == item["segment_ids"].max()
    assert len(CocoPanoptic(root, "val2017_classes", 128).categories) == 133
    trained = CocoPanoptic(root, "train2017", 64, train=True, limit=20, augmentation=Augmentation(0.5, 0.5, 0.3))
    assert all(item["image"].shape == (3, 64, 64) for item in trained)


def test_real_bsds(shared: Path) -> None:
    """Up to three maps of one picture: items of their own, with the picture in common."""
    dataset = CocoPanoptic(shared / "data" / "bsds500", "val", 64)
    assert len(dataset) == 300
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])
    assert not torch.equal(dataset[0]["segment_ids"], dataset[1]["segment_ids"])
    assert len({dataset.image_id(index) for index in range(300)}) == 300
    assert (dataset[0]["segment_ids"] > 0).all(), "every pixel of BSDS is labelled"
