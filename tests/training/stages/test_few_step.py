"""Training for few steps: what the loss sees is what the sampler does, and it learns; matching of slots."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component, load_index
from ldmseg_fast.config import LossConfig, load_config
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.diffusion.inpainting import KnownLatents
from ldmseg_fast.diffusion.sampler import ddim, image_noise
from ldmseg_fast.diffusion.solvers import sample
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.kernels.point_loss import point_logits
from ldmseg_fast.training.loop import train
from ldmseg_fast.training.slot_matching import match_slots, matching_costs
from ldmseg_fast.training.stages import AutoencoderStage, DiffusionStage, DistillationStage, OneStepStage
from tests.conftest import NARROW

SMALL = [*NARROW, "train.ema=0", "train.warmup=1", "data.val_limit=4", "train.validate_every=1000"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(model_dir):
    def make(*overrides):
        fixed = [f"model.init_from={model_dir}", "few_step.matching=none"]
        return load_config("tiny", [*SMALL, *fixed, *overrides])

    return make


@pytest.fixture(scope="module")
def batch(scenes):
    dataset = CocoPanoptic(scenes, "train2017", 64, num_slots=32, id_assignment="position")
    return collate([dataset[index] for index in range(4)])


def descend(stage, batch, steps, rate=2e-3):
    """Losses of `steps` Adam steps on one batch with one draw of noise."""
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = stage(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_unrolling_is_what_the_sampler_does(settings, batch, steps):
    stage = OneStepStage(settings(f"few_step.steps={steps}")).eval()
    noise = image_noise(0, batch["image_id"], (4, 16, 16))
    image_latents = stage.encode_images(batch["image"])
    expected = ddim(stage.unet, noise, image_latents, stage.scheduler, steps, stage.self_condition)
    torch.testing.assert_close(stage.unroll(noise, image_latents, steps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_unrolling_with_a_part_given_is_what_the_sampler_does(settings, batch, steps):
    stage = OneStepStage(settings(f"few_step.steps={steps}", "diffusion.inpainting=1")).eval()
    noise = image_noise(0, batch["image_id"], (4, 16, 16))
    image_latents = stage.encode_images(batch["image"])
    known = stage.known_latents(batch, stage.given_pixels(batch, 0))
    constraint = KnownLatents(*known, stage.scheduler)
    expected = sample(
        stage.unet, noise, image_latents, stage.scheduler, steps, stage.self_condition, constraint=constraint
    )
    unrolled = stage.unroll(noise, image_latents, steps, known)
    torch.testing.assert_close(unrolled, expected, rtol=1e-4, atol=1e-5)
    cells = known[1].expand_as(noise)
    assert cells.any() and torch.equal(unrolled[cells], known[0][cells])


def test_structure_comes_from_the_model_and_not_from_the_settings(model_dir):
    stage = OneStepStage(
        load_config("tiny", [f"model.init_from={model_dir}", "few_step.steps=2", "few_step.matching=none"])
    )
    saved = load_component(model_dir, "unet").state_dict()
    for name, value in stage.unet.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0)
    assert stage.mask_vae.config == load_component(model_dir, "mask_vae").config  # latents are scaled once
    assert stage.config.num_inference_steps == 2


@pytest.mark.parametrize(
    "overrides", [(), ("few_step.steps=2", "few_step.latent_loss=0.1", "few_step.train_decoder=true")]
)
def test_the_task_loss_falls(settings, batch, overrides):
    stage = OneStepStage(settings(*overrides)).train()
    decoder = [p.clone() for p in stage.mask_vae.decoder.parameters()]
    losses = descend(stage, batch, 25)
    assert losses[-1] < 0.95 * losses[0]
    moved = any(not torch.equal(a, b) for a, b in zip(decoder, stage.mask_vae.decoder.parameters()))
    assert moved == bool(overrides)
    assert all(p.grad is None for p in stage.mask_vae.encoder.parameters())


def test_random_ids_are_matched(settings, batch):
    """Whatever the slots of the annotation, the loss is the same, and it falls."""
    pytest.importorskip("scipy")
    stage = OneStepStage(settings("few_step.matching=hungarian")).train()
    other = batch | {"table": torch.where(batch["table"] > 0, 32 - batch["table"], 0).to(batch["table"].dtype)}
    assert float(stage(batch, 3)["loss"].detach()) == float(stage(other, 3)["loss"].detach())
    losses = descend(stage, batch, 15)
    assert losses[-1] < losses[0]


def test_matching_costs_least():
    """Against every assignment there is."""
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 5, 8, 8, generator=generator)
    segment_ids = torch.randint(0, 4, (1, 16, 16), generator=generator)
    config = LossConfig()
    points = torch.rand(1, 300, 2, generator=generator)
    table = match_slots(logits, segment_ids, points, config)[0]
    assert table[0] == 0 and not table[4:].any() and len(set(table[1:4].tolist()) - {0}) == 3
    dense = segment_ids[0, (points[0, :, 1] * 16).long(), (points[0, :, 0] * 16).long()]
    costs = matching_costs(point_logits(logits, points)[0], dense, 3, config)
    every = {
        slots: sum(float(costs[m, q]) for m, q in enumerate(slots)) for slots in itertools.permutations(range(4), 3)
    }
    assert tuple((table[1:4] - 1).tolist()) == min(every, key=every.get)


def test_perfect_logits_are_matched_perfectly():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    segment_ids = torch.from_numpy(np.kron(np.arange(6).reshape(2, 3), np.ones((8, 8), int)))[None]
    naming = torch.from_numpy(np.concatenate([[0], 1 + rng.permutation(9)[:5]]))
    logits = 20.0 * torch.nn.functional.one_hot(naming[segment_ids], 10).permute(0, 3, 1, 2).float()
    table = match_slots(logits, segment_ids, torch.rand(1, 2000, 2), LossConfig())
    assert table[0, :6].tolist() == naming.tolist()
    nothing = match_slots(logits, torch.zeros_like(segment_ids), torch.rand(1, 9, 2), LossConfig())
    assert not nothing.any()


def test_given_slots_stay_given():
    """Logits that fit another naming better: the told segments keep theirs, the others share what is left."""
    pytest.importorskip("scipy")
    segment_ids = torch.from_numpy(np.kron(np.arange(1, 7).reshape(2, 3), np.ones((8, 8), int)))[None]
    logits = 20.0 * torch.nn.functional.one_hot(segment_ids, 10).permute(0, 3, 1, 2).float()
    given = torch.zeros(1, 256, dtype=torch.int64)
    given[0, 2], given[0, 5] = 5, 9
    table = match_slots(logits, segment_ids, torch.rand(1, 2000, 2), LossConfig(), given)[0]
    assert (table[2], table[5]) == (5, 9)
    assert table[[1, 3, 4, 6]].tolist() == [1, 3, 4, 6]


@torch.no_grad()
def test_given_segments_go_by_the_models_own_slots(settings, batch):
    """Those that matching gives them in the draft, for what is seen only."""
    pytest.importorskip("scipy")
    stage = OneStepStage(settings("diffusion.inpainting=1", "few_step.matching=hungarian")).eval()
    image_latents = stage.encode_images(batch["image"])
    noise = image_noise(0, batch["image_id"], (4, 16, 16))
    points = torch.rand(4, 500, 2)
    given = torch.zeros_like(batch["segment_ids"], dtype=torch.bool)
    given[:, :32] = True
    table = stage.given_slots(batch, given, noise, image_latents, points)
    draft = stage.mask_vae.decode_latents(ddim(stage.unet, noise, image_latents, stage.scheduler, 1, True))
    own = match_slots(draft, batch["segment_ids"], points, stage.config.loss)
    for ids, slots, expected in zip(batch["segment_ids"], table, own):
        seen = sorted(set(ids[:32].unique().tolist()) - {0})
        assert slots.nonzero().flatten().tolist() == seen
        assert torch.equal(slots[seen], expected[seen])
    assert not stage.given_slots(batch, torch.zeros_like(given), noise, image_latents, points).any()


def test_completing_maps_is_learnt(settings, batch):
    """One step, all images with a part given; the model says that it was trained for it."""
    pytest.importorskip("scipy")
    stage = OneStepStage(settings("few_step.matching=hungarian", "diffusion.inpainting=1")).train()
    losses = descend(stage, batch, 15)
    assert losses[-1] < losses[0]


def test_distillation_does_not_complete_maps(settings):
    with pytest.raises(ConfigError, match=r"diffusion\.inpainting"):
        DistillationStage(settings("diffusion.inpainting=0.5"))


@torch.no_grad()
def test_a_distilled_step_ends_where_the_teachers_steps_end(settings, batch):
    """x~ put into one DDIM step gives the teacher's z_s; at the end it is the teacher's estimate."""
    from ldmseg_fast.training.stages.few_step import ddim_update

    stage = DistillationStage(settings("few_step.steps=2", "few_step.teacher_steps=8")).eval()
    image_latents = stage.encode_images(batch["image"])
    noise = image_noise(0, batch["image_id"], (4, 16, 16))
    times, previous = (torch.tensor(values) for values in stage.step_times())
    states = []
    ddim(stage.unet, noise, image_latents, stage.scheduler, 8, True, lambda *state: states.append(state[1:]))
    first = torch.ones(4, 1, 1, 1, dtype=torch.bool)
    time, after = times[0].expand(4), previous[0].expand(4)
    target = stage.teach(batch, noise, image_latents, time, after, first)
    end = ddim_update(noise, target, stage.alpha(time, noise), stage.alpha(after, noise))
    torch.testing.assert_close(end, states[3][1], rtol=1e-3, atol=1e-4)  # after 4 of 8 steps
    last = stage.teach(batch, end, image_latents, times[1].expand(4), previous[1].expand(4), ~first)
    assert previous[1] == -1 and last.shape == noise.shape and torch.isfinite(last).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_distillation_learns_and_leaves_the_teacher_alone(settings, batch, steps):
    stage = DistillationStage(settings(f"few_step.steps={steps}", "few_step.teacher_steps=4")).train()
    teacher = [p.clone() for p in stage.teacher.parameters()]
    losses = descend(stage, batch, 20)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher, stage.teacher.parameters()))


@pytest.mark.parametrize("stage", ["one_step", "distillation"])
def test_a_run_is_resumed_to_the_same_bits_and_saves_its_steps(stage, settings, scenes, tmp_path):
    fixed = [f"data.root={scenes}", "few_step.steps=2", "train.ema=0.9", "train.save_every=2", "train.log_every=1"]
    runs = {}
    for name, stops in {"whole": [4], "parts": [2, 4]}.items():
        for steps in stops:
            overrides = [*fixed, f"output_dir={tmp_path / name}", f"train.steps={steps}", "train.schedule=constant"]
            train(stage, settings(*overrides), resume=steps != stops[0])
        lines = (tmp_path / name / "logs" / "log.jsonl").read_text().splitlines()
        runs[name] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert runs["whole"] == runs["parts"] and len(runs["whole"]) == 4
    folder = tmp_path / "parts"
    assert load_index(folder)["num_inference_steps"] == 2
    assert f"| stage | {stage} |" in (folder / "README.md").read_text()
    report = evaluate(folder, scenes, EvaluationOptions(limit=2, baselines=False))
    assert report["num_inference_steps"] == 2


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (OneStepStage, ["model.init_from="], "model.init_from is missing"),
        (OneStepStage, ["few_step.steps=0"], "few_step.steps=0"),
        (DistillationStage, ["few_step.steps=4", "few_step.teacher_steps=6"], "a multiple of few_step.steps=4"),
        (DistillationStage, ["few_step.steps=4", "few_step.teacher_steps=4"], "at least twice"),
        (DistillationStage, ["train.zero_stage=3"], "train.zero_stage=2"),
        (DistillationStage, ["few_step.new_autoencoder=true"], "a teacher's latents are its own"),
        (OneStepStage, ["few_step.new_autoencoder=true"], "name the auto-encoder's MODEL_DIR"),
    ],
)
def test_mistakes_are_named(settings, stage, overrides, message):
    with pytest.raises(ConfigError, match=message):
        stage(settings(*overrides))


@pytest.mark.parametrize("apart", ["false", "true"])
def test_a_new_auto_encoder_takes_the_place_of_the_models(settings, scenes, apart, tmp_path):
    """Only the convolutions from and to its latents, of another number of channels, start anew."""
    autoencoder, model = tmp_path / "autoencoder", tmp_path / "model"
    vae = ["mask_vae.latent_channels=6", "mask_vae.num_slots=24", "data.id_assignment=area"]
    vae += ["unet.in_channels=20", "unet.out_channels=6"]
    AutoencoderStage(load_config("tiny", [*SMALL, *vae])).save(autoencoder)
    old = OneStepStage(settings("train.ema=0"))
    if apart == "true":
        parts = [f"model.init_from={old.config.model.init_from}", f"model.mask_vae={old.config.model.mask_vae}"]
        old = DiffusionStage(
            load_config("tiny", [*SMALL, *parts, "unet.separate_conv_in=true", "unet.image_channels=8"])
        )
    old.save(model)
    exchange = ["few_step.new_autoencoder=true", f"model.mask_vae={autoencoder}", f"data.root={scenes}"]
    stage = OneStepStage(settings(f"model.init_from={model}", *exchange))
    assert stage.config.mask_vae.num_slots == 24 and stage.config.data.id_assignment == "area"
    assert stage.unet.config.out_channels == 6
    for name, value in old.unet.state_dict().items():
        if not name.startswith(("conv_in.", "conv_out.")):
            assert torch.equal(value, stage.unet.state_dict()[name]), name
    image = old.config.image_encoder.latent_channels
    if apart == "true":
        assert torch.equal(stage.unet.conv_in.parts[1].weight, old.unet.conv_in.parts[1].weight)
    else:
        assert torch.equal(stage.unet.conv_in.weight[:, 6 : 6 + image], old.unet.conv_in.weight[:, 4 : 4 + image])
    for name, value in load_component(autoencoder, "mask_vae").state_dict().items():
        assert torch.equal(value, stage.mask_vae.state_dict()[name])
    stage.save(tmp_path / "saved")
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "saved")
    assert pipe(Image.new("RGB", (70, 50)))[0].segmentation.shape == (50, 70)


def test_another_autoencoder_brings_its_categories(settings, scenes, tmp_path):
    autoencoder = tmp_path / "autoencoder"
    categories = ["mask_vae.num_categories=2", f"data.root={scenes}"]  # the start has none
    trained = AutoencoderStage(load_config("tiny", [*SMALL, *categories]))
    trained.categories = CategoryTable((Category(7, "tree", True, (0, 255, 3)), Category(3, "sky", False, (9, 9, 9))))
    trained.save(autoencoder)
    exchange = ["few_step.new_autoencoder=true", f"model.mask_vae={autoencoder}", *categories]
    stage = OneStepStage(settings(*exchange))
    assert stage.categories == trained.categories
    with pytest.raises(ConfigError, match=r"mask_vae.num_categories=7: model.mask_vae=.* has 2 categories"):
        OneStepStage(settings(*exchange, "mask_vae.num_categories=7"))


def test_an_auto_encoder_is_no_start(settings, model_dir):
    with pytest.raises(CheckpointError, match="without image_vae, scheduler, unet"):
        OneStepStage(settings(f"model.init_from={model_dir}-autoencoder"))


def test_matching_needs_scipy(settings, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match="pip install"):
        OneStepStage(settings("few_step.matching=hungarian"))
