"""Options that must not change what is learned do not, and those that must do what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmseg_fast.commands.runs import find_runs
from ldmseg_fast.config import Config, TrainConfig
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.kernels.backend import KERNELS, get_backend
from ldmseg_fast.reports.run_page import read_log
from ldmseg_fast.training.deepspeed_settings import deepspeed_config, merge_user_config, read_user_config
from ldmseg_fast.training.loop import Run, learning_rate, train
from ldmseg_fast.training.optimizer import LossScale
from ldmseg_fast.training.stages.base import parameter_kinds
from tests.training.helpers import losses

Settings = Callable[..., Config]
STEPS = ["train.steps=5", "train.save_every=100", "data.val_limit=1"]


@pytest.fixture(scope="module")
def plain(scenes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of five steps of each stage without any option."""
    from ldmseg_fast.config import load_config
    from tests.training.helpers import TINY

    torch.set_num_threads(1)
    found = {}
    for stage in ("autoencoder", "diffusion"):
        folder = tmp_path_factory.mktemp("plain") / stage
        fixed = [f"data.root={scenes}", f"output_dir={folder}", "train.threads=1", f"model.mask_vae={autoencoder}"]
        found[stage] = losses(train(stage, load_config(str(TINY), [*fixed, *STEPS])))
    return found


@pytest.mark.parametrize(
    ("stage", "options", "tolerance"),
    [
        ("autoencoder", ["data.num_workers=1"], 0.0),
        ("autoencoder", ["data.num_workers=3"], 0.0),
        ("autoencoder", ["data.cache=false"], 0.0),
        ("autoencoder", ["train.channels_last=false"], 1e-4),
        ("autoencoder", ["train.checkpointing=all"], 0.0),
        ("autoencoder", ["train.compile=model", "train.compile_backend=aot_eager"], 1e-4),
        ("autoencoder", ["train.precision=bf16"], 2e-2),
        ("autoencoder", ["model.kernels=false"], 1e-5),
        # rounding decides which of two points is the more uncertain, so that curves part a little after some steps
        ("autoencoder", ["train.accumulation=2"], 2e-3),
        ("autoencoder", ["train.accumulation=4"], 2e-3),
        ("diffusion", ["train.channels_last=false"], 1e-4),
        ("diffusion", ["train.checkpointing=blocks"], 0.0),
        ("diffusion", ["train.checkpointing=all"], 0.0),
        ("diffusion", ["train.compile=blocks", "train.compile_backend=aot_eager"], 1e-4),
        ("diffusion", ["train.accumulation=2"], 1e-4),
        ("diffusion", ["train.accumulation=4"], 1e-4),
        ("diffusion", ["train.precision=bf16"], 2e-2),
        ("diffusion", ["train.precision=fp16"], 2e-2),
        ("diffusion", ["model.attention=sdpa"], 1e-4),
    ],
)
def test_the_loss_curve_stays(
    stage: str, options: list[str], tolerance: float, plain: dict, settings: Settings, autoencoder: Path
) -> None:
    folder = train(stage, settings("run", *STEPS, f"model.mask_vae={autoencoder}", *options))
    if tolerance == 0.0:
        assert losses(folder) == plain[stage]
    else:
        assert losses(folder) == pytest.approx(plain[stage], rel=tolerance)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_inductor_keeps_the_loss_curve(mode: str, plain: dict, settings: Settings, autoencoder: Path) -> None:
    folder = train("diffusion", settings("run", *STEPS, f"model.mask_vae={autoencoder}", f"train.compile={mode}"))
    assert losses(folder) == pytest.approx(plain["diffusion"], rel=1e-3)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(
    stage: str, parts: int, settings: Settings, autoencoder: Path
) -> None:
    """After one step AdamW's first moment is a tenth of the gradient. Without the small segments the pictures' void is
    very unequal."""
    gradients = []
    for accumulation in (1, parts):
        options = [f"train.accumulation={accumulation}", "train.clip=0", f"model.mask_vae={autoencoder}"]
        options += ["loss.latent_noise=0.3", "loss.drop_blocks=0.5", "loss.drop_block_size=8", "data.min_area=700"]
        run = Run(stage, settings("run", *options), Interrupt())
        run.take_step()
        gradients.append({shard.name: shard.moments["exp_avg"].clone() for shard in run.optimizer.shards})
        run.close()
    whole, accumulated = gradients
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(accumulated[name], gradient, rtol=1e-3, atol=1e-5 * scale + 1e-9), name


def test_a_factor_of_zero_freezes(settings: Settings, autoencoder: Path) -> None:
    factors = "train.lr_factors=unet:0,unet.conv_out:2"
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", factors), Interrupt())
    trained = {name for name, p in run.stage.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("unet.")} == {"unet.conv_out.weight", "unet.conv_out.bias"}
    before = {name: p.clone() for name, p in run.stage.named_parameters()}
    run.take_step()
    assert {name for name, p in run.stage.named_parameters() if not torch.equal(p, before[name])} <= trained
    run.close()


def test_kernels_can_be_switched_off(settings: Settings) -> None:
    for kernels, backend in (("false", "torch"), ("true", "auto")):
        Run("autoencoder", settings("run", f"model.kernels={kernels}"), Interrupt()).close()
        assert {get_backend(kernel) for kernel in KERNELS} == {backend}


def test_parameter_groups(settings: Settings, autoencoder: Path) -> None:
    options = ["train.lr_factors=unet.conv_in:10,unet:0.5", "train.weight_decay=0.1", "model.freeze=time_embedding"]
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", *options), Interrupt())
    run.optimizer.set_learning_rate(1e-3)
    group_of = {id(p): group for group in run.optimizer.adamw.param_groups for p in group["params"]}
    kinds = parameter_kinds(run.stage)
    trained = {name: p for name, p in run.stage.named_parameters() if p.requires_grad}
    assert group_of.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        factor = 10 if name.startswith("unet.conv_in") else 0.5 if name.startswith("unet") else 1.0
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(1e-3 * factor)
        assert group["weight_decay"] == (0.0 if kinds[name] in ("norm", "bias") else 0.1)
    assert kinds["unet.conv_norm_out.weight"] == "norm" and kinds["unet.conv_in.bias"] == "bias"
    assert not any(name.startswith(("unet.time_embedding", "mask_vae")) for name in trained)
    before = {name: p.clone() for name, p in run.stage.named_parameters()}
    run.take_step()
    changed = {name for name, p in run.stage.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= trained.keys() and len(changed) > 0.9 * len(trained)
    run.close()


@pytest.mark.parametrize("factors", ["unet.conv_in", "unet.conv_in:fast", "unet.nothing:2"])
def test_wrong_factors(factors: str, settings: Settings, autoencoder: Path) -> None:
    with pytest.raises(ConfigError, match="lr_factors"):
        Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", f"train.lr_factors={factors}"), Interrupt())


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.compile=blocks", "train.zero_stage=3"],
        ["train.offload=true", "train.zero_stage=0"],
        ["train.no_decay=norms"],
        ["train.compile=true"],
        ["train.log_every=0"],
        ["data.bad_items=2"],
    ],
)
def test_settings_that_cannot_be(overrides: list[str], settings: Settings) -> None:
    with pytest.raises(ConfigError, match=overrides[0].split("=")[0]):
        settings("run", *overrides)


def test_schedules() -> None:
    cosine = TrainConfig(steps=110, warmup=10, learning_rate=1.0, min_lr=0.1, schedule="cosine")
    rates = [learning_rate(step, cosine) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    step = TrainConfig(steps=100, warmup=0, learning_rate=1.0, schedule="step")
    assert [learning_rate(at, step) for at in (0, 89, 90, 99)] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert learning_rate(99, TrainConfig(steps=100, warmup=0, learning_rate=1.0, schedule="constant")) == 1.0
    assert learning_rate(60, cosine, 0.2) == rates[60] and learning_rate(20, cosine, 0.5) == pytest.approx(0.55)
    assert learning_rate(20, cosine, 1.5) == pytest.approx(0.1)


def test_loss_scale_follows_overflows() -> None:
    scale = LossScale(True, start=8.0, patience=2)
    scale.update(True)
    assert scale.value == 4.0
    for _ in range(4):
        scale.update(False)
    assert scale.value == 16.0
    for _ in range(40):
        scale.update(True)
    assert scale.value == 1.0
    off = LossScale(False)
    off.update(True)
    assert off.value == 1.0


def test_an_fp16_overflow_halves_the_scale(settings: Settings) -> None:
    run = Run("autoencoder", settings("run", "train.precision=fp16"), Interrupt())
    run.optimizer.scale.value = 2.0**120
    run.take_step()
    assert run.progress.skipped == 1 and run.optimizer.scale.value == 2.0**119
    run.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_self_conditioning_in_a_share_of_steps(share: float, settings: Settings, autoencoder: Path) -> None:
    """Counted by the denoiser's calls: two in a step with it."""
    options = [f"diffusion.self_condition={share}", f"unet.in_channels={16 if share else 12}"]
    run = Run("diffusion", settings("run", f"model.mask_vae={autoencoder}", *options), Interrupt())
    calls: list[int] = []
    run.stage.unet.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(12):
        run.take_step()
    assert len(calls) - 12 in ({0.0: [0], 1.0: [12]}.get(share, range(3, 10)))
    run.close()


def test_averages_are_what_is_validated_and_saved(settings: Settings) -> None:
    from safetensors.torch import load_file

    run = Run("autoencoder", settings("run", "train.ema=0.5"), Interrupt())
    for _ in range(3):
        run.take_step()
    trained = {shard.name: shard.weight.clone() for shard in run.optimizer.shards}
    run.save()
    saved = load_file(run.folder / "mask_vae" / "model.safetensors")
    averages = dict(zip(trained, run.optimizer.averages.values))
    for name, weight in trained.items():
        assert torch.equal(saved[name.removeprefix("mask_vae.")], averages[name])
        assert torch.equal(dict(run.stage.named_parameters())[name], weight)
    assert any(not torch.equal(averages[name], weight) for name, weight in trained.items())
    run.close()


def test_deepspeed_configuration(settings: Settings, tmp_path: Path) -> None:
    config = settings("run", "train.zero_stage=2", "train.batch_size=8", "train.accumulation=2", "train.clip=3")
    derived = deepspeed_config(config, 2, 1000)
    assert derived["train_micro_batch_size_per_gpu"] == 2 and derived["gradient_clipping"] == 3.0
    file = tmp_path / "ds.json"
    user = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 3.0,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500, "round_robin_gradients": True},
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(user))
    merged = merge_user_config(derived, read_user_config(file), 3.0)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 500 and merged["wall_clock_breakdown"] is True
    assert merged["train_batch_size"] == 8 and merged["zero_optimization"]["stage"] == 2
    wrong = {
        "train_batch_size": 64,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "Adam"},
        "bf16": {"enabled": True},
    }
    with pytest.raises(ConfigError) as caught:
        merge_user_config(derived, wrong, 3.0)
    for word in (
        "train_batch_size is 64 there and 8 here",
        "train.zero_stage",
        "train.learning_rate",
        "train.precision",
    ):
        assert word in str(caught.value)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"ds\.json"):
        read_user_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimisation": {}}', "no setting zero_optimisation; the nearest that it has is zero_optimization"),
        ('{"zero_optimization": {"overlap_com": true}}', r"zero_optimization\.overlap_com;.*\.overlap_comm"),
        ('{"zero_optimization": 3}', r"zero_optimization=3: a section \{\.\.\.\} expected"),
        ('{"zero_optimization": {"reduce_bucket_size": "big"}}', "reduce_bucket_size='big': a number"),
        ('{"zero_optimization": {"reduce_bucket_size": {"a": 1}}}', "reduce_bucket_size=.*: a number"),
        ('{"zero_optimization": {"offload_param": 1}}', r"offload_param=1: a section"),
        ('{"wall_clock_breakdown": {"a": 1}}', "wall_clock_breakdown=.*: true or false"),
        ('{"wall_clock_breakdown": true, "wall_clock_breakdown": false}', "wall_clock_breakdown is there twice"),
        ('{"gradient_clipping": NaN}', "NaN is no setting"),
        ('{"tensorboard": {"enabled": 3}}', "tensorboard.enabled=3"),
        ("[" * 100_000, "no JSON"),
        ('{"steps_per_print": ' + "9" * 9000 + "}", "no JSON"),
        ("[]", "a JSON object expected"),
    ],
)
def test_a_deepspeed_file_with_unknown_or_wrong_entries(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_user_config(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 500


def test_the_clock_ends_a_run(settings: Settings) -> None:
    """As its last step would: validated, exported, finished; with more time it goes on."""
    timed = ["train.steps=1000", "train.validate_every=1000", "data.val_limit=2"]
    folder = train("autoencoder", settings("run", *timed, "train.max_minutes=0.000001"))
    assert len(losses(folder)) == 1 and "val/pq" in read_log(folder)[-1]
    assert (folder / "mask_vae" / "model.safetensors").is_file() and find_runs(folder)[0].state == "finished"
    train("autoencoder", settings("run", *timed, "train.max_minutes=0.000001"), resume=True)
    assert len(losses(folder)) == 1
    seconds = read_log(folder)[0]["seconds"]
    longer = settings("run", *timed, f"train.max_minutes={(seconds + 0.5) / 60}")
    train("autoencoder", longer, resume=True)
    records = [record for record in read_log(folder) if "loss" in record]
    assert len(records) > 1 and records[-1]["seconds"] >= seconds + 0.5
    for before, record in itertools.pairwise(records):  # the schedule ends with the time
        share = before["seconds"] / (60 * longer.train.max_minutes)
        assert record["lr"] == pytest.approx(learning_rate(before["step"], longer.train, share), rel=1e-6)


def test_best_and_pictures(settings: Settings) -> None:
    folder = train("autoencoder", settings("best", "train.validate_every=2", "train.steps=4", "data.val_limit=2"))
    assert (folder / "best" / "mask_vae" / "model.safetensors").is_file()
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["step-00000002.png", "step-00000004.png"]


def test_the_faster_resize_is_close(scenes: Path) -> None:
    from ldmseg_fast.data.coco_panoptic import CocoPanoptic

    items = [CocoPanoptic(scenes, "train2017", 48, train=True, resize=resize)[0, 3] for resize in ("pillow", "torch")]
    difference = (items[0]["image"].int() - items[1]["image"].int()).abs()
    assert difference.max() <= 4 and difference.float().mean() < 0.1
    assert torch.equal(items[0]["segment_ids"], items[1]["segment_ids"])
