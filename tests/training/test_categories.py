"""Training with categories: the loss, every stage, the log, and what does not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import LossConfig, load_config
from ldmseg_fast.data.scenes import CATEGORIES, write_scenes
from ldmseg_fast.errors import ConfigError, DataError
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.training.loop import train
from ldmseg_fast.training.losses import mask_losses, share_num_labelled
from tests.training.helpers import TINY, losses, metrics

PARTS = {"ce", "bce", "dice", "category"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("training") / "scenes", 24, 32, 0, workers=1)


@pytest.fixture
def settings(scenes, tmp_path):
    def make(name, *overrides):
        fixed = [f"data.root={scenes}", f"output_dir={tmp_path / name}", "train.threads=1", "train.steps=4"]
        return load_config(str(TINY), [*fixed, "train.validate_every=4", "mask_vae.num_categories=19", *overrides])

    return make


def test_category_loss_is_the_cross_entropy_where_something_is_labelled():
    """On a map of one colour a half, sampled where the logits are flat, it is the plain mean."""
    ids = torch.zeros(1, 16, 16, dtype=torch.uint8)
    ids[:, :, 8:] = 3
    categories = (ids > 0).to(torch.int16) * 300
    slots, logits = torch.randn(1, 5, 1, 1).expand(1, 5, 8, 8), torch.randn(1, 301, 1, 1).expand(1, 301, 8, 8)
    logits = logits.clone().requires_grad_(True)
    config = LossConfig(num_points=256, category=0.5)
    generator = [torch.Generator().manual_seed(0)]
    found = mask_losses(slots, ids, config, generator, category_logits=logits, category_ids=categories)
    plain = mask_losses(slots, ids, config, [torch.Generator().manual_seed(0)])
    assert plain.category is None and plain.parts().keys() == PARTS - {"category"}
    for name, value in plain.parts().items():
        assert torch.equal(getattr(found, name), value)
    # a sample within half a pixel of the border is dimmed by the zeros outside
    expected = F.cross_entropy(logits[..., 0, 0], torch.tensor([300]))
    assert found.category.item() == pytest.approx(expected.item(), rel=0.2)
    assert found.total.item() == pytest.approx(plain.total.item() + 0.5 * found.category.item(), rel=1e-6)
    found.category.backward()
    assert logits.grad[0, 300].sum() < 0 and logits.grad[0, 5].sum() > 0
    assert logits.grad[..., :3].abs().sum() == 0, "void has no gradient"


@pytest.mark.parametrize("size", [1, 2])
def test_weighted_parts_of_a_batch_add_up_to_it(size):
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (4, 16, 16), generator=numbers).to(torch.uint8)
    ids[1, 3:] = 0  # parts differ in their share of void
    slots, logits = torch.randn(4, 6, 8, 8, generator=numbers), torch.randn(4, 5, 8, 8, generator=numbers)
    weights, config = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0]), LossConfig(num_points=64)

    def total(size, weights):
        given, found = logits.clone().requires_grad_(), 0.0
        places = [range(at, at + size) for at in range(0, 4, size)]
        batches = [{"images": place, "segment_ids": ids[list(place)]} for place in places]
        share_num_labelled(batches, config, generators)
        for batch in batches:
            part, own = list(batch["images"]), {"category_logits": given[list(batch["images"])]}
            own |= {"category_ids": ids[part], "category_weights": weights, "num_labelled": batch["num_labelled"]}
            loss = mask_losses(slots[part], ids[part], config, generators(batch), **own).category / len(batches)
            loss.backward()
            found += loss.item()
        return found, given.grad

    def generators(batch):
        return [torch.Generator().manual_seed(image) for image in batch["images"]]

    whole, parts = total(4, weights), total(size, weights)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert torch.allclose(parts[1], whole[1], rtol=1e-5, atol=1e-9)
    assert total(4, torch.ones(5))[0] == pytest.approx(total(4, None)[0], rel=1e-6) != whole[0]


def test_void_only_has_no_loss():
    ids, logits = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.randn(1, 4, 8, 8)
    found = mask_losses(logits, ids, LossConfig(num_points=16), category_logits=logits, category_ids=ids)
    assert found.total.item() == 0.0 and found.category.item() == 0.0


def test_without_categories_networks_are_what_they_were():
    config = load_config(str(TINY)).mask_vae
    torch.manual_seed(0)
    vae = MaskVAE(config)
    assert type(vae.decoder) is torch.nn.Sequential
    assert not any("category" in name for name in vae.state_dict())
    assert vae.encoder[0].in_channels == config.num_bits
    latents = torch.randn(1, config.latent_channels, 4, 4)
    both = vae.decode_both(latents)
    assert both[1] is None and torch.equal(both[0], vae.decoder(latents))


def test_every_stage_trains_and_its_model_names_segments(settings, scenes, tmp_path):
    autoencoder = train("autoencoder", settings("autoencoder", "train.best=class_pq", "loss.drop_blocks=0.5"))
    log = [json.loads(line) for line in (autoencoder / "logs" / "log.jsonl").read_text().splitlines()]
    assert PARTS | {"kl"} <= log[0].keys()
    assert {"val/pq", "val/class_pq", "val/class_pq_things", "val/class_pq_stuff"} <= metrics(autoencoder)[-1].keys()
    own = f"model.mask_vae={autoencoder}"
    diffusion = train("diffusion", settings("diffusion", own, "diffusion.task_loss=0.1", "diffusion.inpainting=0.5"))
    start = f"model.init_from={diffusion}"
    one_step = train("one_step", settings("one_step", start, "few_step.train_decoder=true", "diffusion.inpainting=0.5"))
    log = [json.loads(line) for line in (one_step / "logs" / "log.jsonl").read_text().splitlines()]
    assert log[0].keys() >= PARTS
    distilled = train("distillation", settings("distillation", start))
    tables = [(folder / "categories.json").read_bytes() for folder in (autoencoder, diffusion, one_step, distilled)]
    assert len(set(tables)) == 1
    assert [c["name"] for c in json.loads(tables[0])] == [c["name"] for c in CATEGORIES[2]]
    pipe = LDMSegPipeline.from_pretrained(one_step)
    picture = np.zeros((32, 40, 3), np.uint8)
    for segment in pipe(picture)[0].segments_info:
        assert segment["name"] and segment["category_id"] == segment["label_id"]


def test_categories_are_trained(settings):
    """Their part of the loss falls, and the head's weights move."""
    folder = train(
        "autoencoder", settings("longer", "train.steps=60", "train.validate_every=1000", "train.learning_rate=0.01")
    )
    log = [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]
    values = [record["category"] for record in log if "category" in record]
    assert np.mean(values[-10:]) < 0.92 * np.mean(values[:10])


def test_losses_do_not_depend_on_accumulation(settings):
    whole = train("autoencoder", settings("whole", "train.validate_every=1000"))
    parts = train("autoencoder", settings("parts", "train.validate_every=1000", "train.accumulation=2"))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_balanced_categories_survive_accumulation_and_a_resume(settings):
    """0 leaves every bit as it was; another balance is the same for parts of a batch and of a run."""
    balanced = ["train.validate_every=1000", "loss.category_balance=0.5"]
    whole = losses(train("autoencoder", settings("whole", *balanced)))
    plain = losses(train("autoencoder", settings("plain", "train.validate_every=1000")))
    off = losses(train("autoencoder", settings("off", "train.validate_every=1000", "loss.category_balance=0")))
    assert plain == off != whole
    assert losses(train("autoencoder", settings("parts", *balanced, "train.accumulation=2"))) == pytest.approx(
        whole, rel=1e-5
    )
    steady = [*balanced, "train.schedule=constant"]
    train("autoencoder", settings("resumed", *steady, "train.steps=2"))
    resumed = losses(train("autoencoder", settings("resumed", *steady), resume=True))
    assert resumed == losses(train("autoencoder", settings("steady", *steady)))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["mask_vae.num_categories=18"], ConfigError, "has 19 categories; set mask_vae.num_categories=19"),
        (["mask_vae.num_categories=20"], ConfigError, "has 19 categories; set mask_vae.num_categories=19"),
        (["mask_vae.num_categories=4096"], ConfigError, "mask_vae.num_categories"),
        (["mask_vae.num_categories=0", "loss.category_balance=0.5"], ConfigError, "loss.category_balance=0.5"),
        (["loss.category_balance=1.5"], ConfigError, "loss.category_balance"),
        (["mask_vae.num_categories=0", "train.best=class_pq"], ConfigError, "train.best=class_pq"),
    ],
)
def test_settings_that_do_not_fit(settings, overrides, error, message):
    with pytest.raises(error) as raised:
        train("autoencoder", settings("wrong", *overrides))
    assert message in str(raised.value)


def test_a_run_goes_on_with_the_numbers_it_has(settings, tmp_path):
    """The same data set with its categories in another order keeps its names."""
    root = write_scenes(tmp_path / "own", 24, 32, workers=1)
    own = [f"data.root={root}", "train.save_every=2", "train.validate_every=1000"]
    folder = train("autoencoder", settings("run", *own, "train.steps=2"))
    table = (folder / "categories.json").read_bytes()
    for path in (root / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"categories": content["categories"][::-1]}))
    train("autoencoder", settings("run", *own), resume=True)
    assert (folder / "categories.json").read_bytes() == table
    whole = train("autoencoder", settings("whole", *own[1:], f"data.root={root}"))
    assert json.loads((whole / "categories.json").read_text())[0]["name"] == "tiles"


def test_another_data_set_is_refused_by_name(settings, scenes, tmp_path):
    autoencoder = train("autoencoder", settings("first", "train.steps=1", "train.validate_every=1000"))
    other = write_scenes(tmp_path / "other", 8, 32, workers=1, version=1)
    with pytest.raises(DataError, match="no category 'ellipse'"):
        train("diffusion", settings("second", f"model.mask_vae={autoencoder}", f"data.root={other}"))
    quick = ["train.steps=1", "train.validate_every=1000"]
    diffusion = train("diffusion", settings("third", *quick, f"model.mask_vae={autoencoder}"))
    with pytest.raises(DataError, match=r"no category 'ellipse'.*new_autoencoder=true\), .*agnostic=other\)"):
        train("one_step", settings("fourth", f"model.init_from={diffusion}", f"data.root={other}"))


def test_categories_that_contradict_the_start_are_refused(settings, tmp_path):
    """Another number in the settings, and another table in one of two folders; 0 takes what the folders have."""
    quick = ["train.steps=1", "train.validate_every=1000"]
    autoencoder = train("autoencoder", settings("autoencoder", *quick))
    own = [*quick, f"model.mask_vae={autoencoder}"]
    for number in (1, 18):
        with pytest.raises(ConfigError, match=rf"num_categories={number}: model.mask_vae=.* has 19 categories"):
            train("diffusion", settings("wrong", *own, f"mask_vae.num_categories={number}"))
    diffusion = train("diffusion", settings("diffusion", *own, "mask_vae.num_categories=0"))
    start = [*quick, f"model.init_from={diffusion}"]
    for stage in ("diffusion", "one_step", "distillation"):
        with pytest.raises(ConfigError, match=r"num_categories=18: model\.\w+=.* has 19 categories; leave"):
            train(stage, settings("wrong", *start, "mask_vae.num_categories=18"))
    plain = train("autoencoder", settings("plain", *quick, "mask_vae.num_categories=0"))
    with pytest.raises(ConfigError, match=r"num_categories=19: model.mask_vae=.* has no categories"):
        train("diffusion", settings("wrong", *quick, f"model.mask_vae={plain}"))

    other = tmp_path / "other"
    shutil.copytree(autoencoder, other)
    table = json.loads((other / "categories.json").read_text())
    table[0]["name"], table[1]["name"] = table[1]["name"], table[0]["name"]
    (other / "categories.json").write_text(json.dumps(table))
    for stage in ("diffusion", "one_step"):
        with pytest.raises(ConfigError, match=r"model\.\w+=.* and model\.\w+=.* have other categories: number 1 is"):
            train(stage, settings("wrong", *start, f"model.mask_vae={other}"))
    assert not (tmp_path / "wrong" / "model_index.json").exists()


def test_an_auto_encoder_of_another_reduction_is_refused(settings):
    coarse = [
        "mask_vae.widths=8,16,16,16",
        "image_encoder.downsampling=8",
        "train.steps=1",
        "train.validate_every=1000",
    ]
    fine = load_config(str(TINY)).mask_vae.downsampling
    assert fine != 8
    autoencoder = train("autoencoder", settings("coarse", *coarse))
    with pytest.raises(ConfigError, match=r"latents of 1/8 of the side, image_encoder.downsampling is"):
        train("diffusion", settings("wrong", "train.steps=1", f"model.mask_vae={autoencoder}"))
