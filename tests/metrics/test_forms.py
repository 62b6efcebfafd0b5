"""PanopticQuality over every form of map: the PNG path's numbers bit for bit, on any batch and any ranks."""

import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.metrics import PanopticQuality, evaluate_files, mask_maps, matching
from ldmseg_fast.panoptic import coco_masks
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons, rle_of_mask
from ldmseg_fast.panoptic.format import ids_to_rgb, write_panoptic_png

CATEGORIES = [{"id": k, "name": f"c{k}", "isthing": int(k < 3)} for k in range(1, 4)]
ANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


def runs(ids, segments, compressed=True, **more):
    """One annotation with run lengths for each segment."""
    annotations = []
    for segment in segments:
        rle = rle_of_mask(ids == segment["id"])
        if not compressed:
            flat = np.concatenate([[False], (ids == segment["id"]).T.ravel()])
            ends = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [ids.size]])
            rle["counts"] = np.diff(ends).tolist()
        annotations.append({key: value for key, value in segment.items() if key != "id"} | {"segmentation": rle} | more)
    return annotations


def write_files(folder, image):
    """The same image as PNGs with JSONs and as JSONs of masks: (gt, pred) paths of both."""
    gt, gt_segments, pred, pred_segments = image
    height, width = gt.shape
    shared = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": height, "width": width}],
        "categories": CATEGORIES,
    }
    for kind, ids, segments in (("gt", gt, gt_segments), ("pred", pred, pred_segments)):
        (folder / kind).mkdir(exist_ok=True)
        write_panoptic_png(folder / kind / "7.png", ids)
        entry = {"image_id": 7, "file_name": "7.png", "segments_info": segments}
        (folder / f"{kind}.json").write_text(json.dumps(shared | {"annotations": [entry]}))
        masks = runs(ids, segments, compressed=kind == "gt", image_id=7, score=0.5)
        (folder / f"{kind}_masks.json").write_text(json.dumps(shared | {"annotations": masks}))
        (folder / f"{kind}_list.json").write_text(json.dumps(masks))
    return folder


TOLD = ("seconds", "threads", "missing", "ignored", "interval", "worst_images", "per_image")


def numbers(result):
    return {key: value for key, value in result.items() if key not in TOLD}


def computed(preds, target, **options):
    stat = PanopticQuality(CATEGORIES, **options)
    stat.update(preds, target)
    return stat.compute()


@ANY
@given(data=st.data(), class_agnostic=st.booleans())
def test_every_form_gives_the_numbers_of_pngs(panoptic_images, data, class_agnostic):
    image = data.draw(panoptic_images)
    gt, gt_segments, pred, pred_segments = image
    options = {"class_agnostic": class_agnostic, "boundary": True}
    with tempfile.TemporaryDirectory() as name:
        folder = write_files(Path(name), image)

        def score(gt_file, pred_file):
            return numbers(evaluate_files(folder / gt_file, folder / pred_file, replicates=0, num_threads=1, **options))

        expected = score("gt.json", "pred.json")
        truths = ["gt.json", *(["gt_masks.json"] if gt_segments else [])]  # a file without annotations is refused
        predictions = ["pred.json", *(["pred_masks.json", "pred_list.json"] if pred_segments else [])]
        pairs = [(truth, prediction) for truth in truths for prediction in predictions]
        for pair in pairs:
            assert score(*pair) == expected, pair
        targets = {
            "arrays": {"segmentation": gt, "segments_info": gt_segments},
            "tuple": (torch.from_numpy(gt), gt_segments),
            "picture": {"segmentation": Image.fromarray(ids_to_rgb(gt)), "segments_info": gt_segments},
            "png": {"label": folder / "gt" / "7.png", "segments_info": gt_segments},
            "row": [
                {"image_id": 7, "image": None, "label": Image.fromarray(ids_to_rgb(gt)), "segments_info": gt_segments}
            ],
            "batch": (gt[None].astype(np.int64), [gt_segments]),
            "masks": {"annotations": runs(gt, gt_segments), "height": gt.shape[0], "width": gt.shape[1]},
        }
        minus = [{"id": s["id"], "label_id": s["category_id"], "score": 0.9} for s in pred_segments]
        preds = {
            "arrays": {"segmentation": pred.astype(np.uint32), "segments_info": pred_segments},
            "transformers": {"segmentation": torch.from_numpy(np.where(pred == 0, -1, pred)), "segments_info": minus},
            "masks": [runs(pred, pred_segments, compressed=False)],
            "columns": {
                "segmentation": pred,
                "segments_info": {key: [s[key] for s in pred_segments] for key in ("id", "category_id")},
            },
        }
        for one, target in targets.items():
            assert computed(preds["arrays"], target, **options) == expected, one
        for one, predicted in preds.items():
            assert computed(predicted, targets["arrays"], **options) == expected, one


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_numpy_twins_of_the_mask_path(panoptic_images, data):
    gt, gt_segments, pred, pred_segments = data.draw(panoptic_images)
    size = {"height": gt.shape[0], "width": gt.shape[1]}
    given = [{"annotations": runs(pred, pred_segments), **size}, {"annotations": runs(gt, gt_segments), **size}]
    fast = computed(*given, boundary=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (coco_masks, mask_maps, matching):
            patch.setattr(module, "_C", None)
        assert computed(*given, boundary=True) == fast


overlapping = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(0, 14), st.integers(0, 14), st.booleans()), max_size=9
)


@settings(max_examples=300, deadline=None)
@given(overlapping)
def test_overlaps_follow_the_rule(boxes):
    """Stuff and crowds below, the smaller over the larger, the later over the earlier of equal ones."""
    masks = np.zeros((len(boxes), 30, 31), bool)
    for mask, (top, left, height, width, _) in zip(masks, boxes):
        mask[top : top + height, left : left + width] = True
    above = [box[-1] for box in boxes]
    expected = np.zeros((30, 31), np.int32)
    for k in sorted(range(len(boxes)), key=lambda k: (above[k], -masks[k].sum())):
        expected[masks[k]] = k + 1
    encoded = [rle_of_mask(mask) for mask in masks]
    painted = []
    for extension in {coco_masks._C, None}:
        with pytest.MonkeyPatch.context() as patch:
            for module in (coco_masks, mask_maps):
                patch.setattr(module, "_C", extension)
            painted.append(mask_maps.paint_masks(encoded, above, (30, 31), str))
    for one in painted:
        assert (one.ids() == expected).all()
        assert one.gone == [k for k in range(len(boxes)) if k + 1 not in expected]
        assert one.hidden == masks.sum() - np.count_nonzero(expected)


def test_polygons_are_the_masks_that_they_draw():
    outline = [[2.0, 2.0, 20.0, 3.0, 17.5, 14.0, 4.0, 12.0]]
    mask = mask_of_polygons(outline, 20, 30, "x")
    target = {"annotations": [{"category_id": 1, "segmentation": outline}], "height": 20, "width": 30}
    ids = mask.astype(np.int32)
    assert computed((ids, [{"id": 1, "category_id": 1}]), target)["All"]["pq"] == 1.0
    del target["height"]
    assert computed((ids, [{"id": 1, "category_id": 1}]), target)["All"]["pq"] == 1.0, "the other side tells the size"
    with pytest.raises(PanopticFormatError, match="image 0: ground truth: polygons do not tell the image's size"):
        computed([target["annotations"]], [target["annotations"]])


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), rows=st.integers(1, 3))
def test_category_and_instance_arrays(panoptic_images, data, rows):
    """torchmetrics' form: all pixels of a stuff category are one segment."""
    gt, gt_segments, pred, pred_segments = data.draw(panoptic_images)
    sides = []
    for ids, segments in ((pred, pred_segments), (gt, gt_segments)):
        category = np.zeros(ids.shape, np.int64)
        merged = np.zeros_like(ids)
        for segment in segments:
            category[ids == segment["id"]] = segment["category_id"]
            merged[ids == segment["id"]] = segment["id"] if segment["category_id"] < 3 else 2**24 - 5
        listed = {int(i): int(category[merged == i][0]) for i in np.unique(merged[merged > 0])}
        stacked = np.stack([category, ids], -1)[None].repeat(rows, 0)
        sides.append(
            (torch.from_numpy(stacked), [(merged, [{"id": i, "category_id": c} for i, c in listed.items()])] * rows)
        )
    (preds, pred_maps), (target, gt_maps) = sides
    expected = computed(pred_maps, gt_maps)
    assert computed(preds, target) == expected
    assert computed(preds[:, None], target[None]) == expected, "any shape in front"
    assert computed(preds, gt_maps) == expected, "mixed"


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        gt = np.kron(rng.integers(0, 5, (4, 5)), np.ones((6, 7), int)).astype(np.int32)
        pred = np.where(rng.random(gt.shape) < 0.2, 0, gt).astype(np.int32)
        yield [
            (ids, [{"id": int(i), "category_id": int(i) % 3 + 1} for i in np.unique(ids[ids > 0])])
            for ids in (pred, gt)
        ]


@pytest.mark.parametrize("named", [True, False])
def test_ranks_and_states(named):
    images = list(batches(9))

    def part(chosen):
        stat = PanopticQuality(CATEGORIES, boundary=True)
        for k in chosen:
            stat.update(*([each] for each in images[k]), image_ids=[k] if named else None)
        return stat

    whole = part(range(9)).compute()
    for ranks in (2, 3):
        parts = [part(range(rank, 9, ranks)) for rank in range(ranks)]
        states = [json.loads(json.dumps(p.state(), default=np.ndarray.tolist)) for p in parts]
        for how in (
            parts,
            [PanopticQuality.from_state(p.state()) for p in parts],
            [PanopticQuality.from_state(state) for state in states],
            pickle.loads(pickle.dumps(parts)),
        ):
            merged = PanopticQuality(CATEGORIES, boundary=True)
            for each in how:
                merged.merge(each)
            assert merged.compute() == whole
            assert sorted(merged.image_ids) == list(range(9))
    again = part(range(9))
    again.reset()
    assert again.compute()["images"] == 0
    with pytest.raises(ArgumentError, match="with and without boundary"):
        PanopticQuality(CATEGORIES).merge(part([0]))


@pytest.mark.parametrize("state", [{}, {"categories": 1}, None, []])
def test_what_is_no_state(state):
    with pytest.raises(ArgumentError, match="no state of"):
        PanopticQuality.from_state(state)


ONE = (np.ones((2, 3), np.int32), [{"id": 1, "category_id": 1}])
RLE = rle_of_mask(np.ones((2, 3), bool))


@pytest.mark.parametrize(
    ("preds", "message"),
    [
        ((ONE[0], [{"id": 1, "category_id": 9}]), r"image 0: prediction: category ids \[9\] are not among"),
        ((ONE[0], [{"id": 1, "label_id": 9}]), r"prediction: category ids \[9\] are not among"),
        ((ONE[0], [{"id": 1}]), "segment 1 has no usable `category_id` or `label_id`, got None"),
        ((ONE[0], [{"id": 1, "category_id": "1"}]), "got '1'"),
        ((ONE[0], [{"id": 1.0, "category_id": 1}]), r"segments_info\[0\] has no usable `id`"),
        ((ONE[0], [{"category_id": 1}]), "has no usable `id`"),
        ((ONE[0], [7]), "has no usable `id`"),
        ((ONE[0], 7), "expected a list of segments"),
        ((ONE[0], [{"id": 1, "category_id": 1, "iscrowd": 2}]), "`iscrowd` must be 0 or 1"),
        ((ONE[0].astype(float), ONE[1]), r"expected integer ids \[H, W\], got \[2, 3\] float64"),
        ((ONE[0] - 5, ONE[1]), "segment ids must lie in"),
        ((ONE[0], []), "ids in the map but not in segments_info: 1"),
        ((ONE[0][:1], ONE[1]), "sizes must be equal"),
        (ONE[0], "has no categories; give its `segments_info`"),
        (np.full((2, 3, 2), 9), r"prediction: category ids \[9\] are not among the categories, nor void \(-1, 0\)"),
        (np.ones((2, 3, 2)), "expected integers"),
        (7, "a int is no panoptic map"),
        ("maps", "a str is no panoptic map"),
        ({"x": 1}, "no map among the keys x"),
        ({"segmentation": RLE, "category_id": 1}, "one annotation is no image"),
        ([[{"segmentation": RLE, "category_id": 8}]], r"category ids \[8\]"),
        ([[{"segmentation": {"size": [2, 3], "counts": "1"}, "category_id": 1}]], "annotation 0: `counts` covers 1 of"),
        (
            [[{"segmentation": {"size": [2**31, 2**31], "counts": [2**62]}, "category_id": 1}]],
            "annotation 0: `size` must",
        ),
        ([[{"segmentation": rle_of_mask(np.ones((5, 5), bool)), "category_id": 1}]], "sizes must be equal"),
        ({"segmentation": Image.new("RGBA", (3, 2)), "segments_info": []}, "a picture of mode RGBA"),
        ((ONE[0][None].repeat(2, 0), [ONE[1]]), "2 maps need as many lists"),
        ({"annotations": [{"category_id": 1}]}, "annotation 0 has no `segmentation`"),
    ],
)
def test_malformed_sides_are_one_clear_error(preds, message):
    with pytest.raises(PanopticFormatError, match=message) as caught:
        computed(preds, ONE)
    assert "prediction" in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_images_must_agree():
    stat = PanopticQuality(CATEGORIES)
    with pytest.raises(ArgumentError, match="the predictions have more images"):
        stat.update([ONE, ONE], [ONE])
    with pytest.raises(ArgumentError, match="the ground truth have more images"):
        stat.update([ONE], [ONE, ONE])
    for ids in ([1], [1, 2, 3]):
        with pytest.raises(ArgumentError, match="image_ids"):
            stat.update([ONE, ONE], [ONE, ONE], image_ids=ids)
        stat.reset()


def test_an_image_counts_once():
    stat = PanopticQuality(CATEGORIES)
    stat.update([ONE], [ONE], image_ids=[7])
    with pytest.raises(ArgumentError, match="image 7 was counted before"):
        stat.update([ONE], [ONE], image_ids=[7])
    again = PanopticQuality.from_state(stat.state())
    with pytest.raises(ArgumentError, match="image 7 was counted before"):
        again.update([ONE], [ONE], image_ids=[7])
    with pytest.raises(ArgumentError, match="`image_ids` lists an image twice"):
        PanopticQuality.from_state(stat.state() | {"image_ids": [7, 7]})
    stat.update([ONE, ONE], [ONE, ONE])  # without ids: other images
    assert len(stat.image_ids) == 3


def test_categories_need_ids():
    for categories in (3, "12", {"id": 1}):
        with pytest.raises(PanopticFormatError, match="expected a list of COCO entries"):
            PanopticQuality(categories)
    for categories in ([{}], [{"id": 1}, {"id": 1}], ["x"], [{"id": "1"}]):
        with pytest.raises(PanopticFormatError, match=r"categories\["):
            PanopticQuality(categories)


def test_class_agnostic_maps_need_no_segments():
    ids = np.array([[0, 1, 1, 5]])
    stat = PanopticQuality(class_agnostic=True)
    stat.update(ids[None], torch.from_numpy(ids))
    assert stat.compute()["class_agnostic"]["tp"] == 2


def test_ids_from_zero():
    """transformers' instance form counts from 0, and void is -1."""
    segments = [{"id": 0, "label_id": 1}, {"id": 1, "label_id": 2}]
    ids = np.array([[-1, 0, 0, 1]])
    assert computed((ids, segments), (ids, segments))["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 2}


def test_lrp_by_hand():
    """Two matches of IoU 1 and 0.75 and one false positive: LRP = (0 + 0.25 / 0.5 + 1) / 3."""
    gt = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3, 3]])
    pred = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}, {"id": 3, "category_id": 2}]
    other = [segments[0], segments[1], {"id": 3, "category_id": 1}]
    errors = computed((pred, other), (gt, segments))["lrp"]
    assert errors["per_category"]["1"] == {"lrp": (0.5 + 1) / 3, "lrp_loc": 0.125, "lrp_fp": 1 / 3, "lrp_fn": 0.0}
    assert errors["per_category"]["2"] == {"lrp": 1.0, "lrp_loc": None, "lrp_fp": None, "lrp_fn": 1.0}
    assert errors["All"] == {"lrp": 0.75, "lrp_loc": 0.125, "lrp_fp": 1 / 3, "lrp_fn": 0.5}
    assert errors["Stuff"]["lrp"] == 0.0
