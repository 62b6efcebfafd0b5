"""Twenty healthy exports, of other sizes, options and precisions, in which the parity report finds no fault."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.scenes import CATEGORIES
from ldmseg_fast.export.model_export import ExportSettings, export_model
from tests.conftest import make_model

IMAGES = 2  # that each export is compared on
SHIPPED = None  # the trained model, in the place of settings of one with random weights
DEEP = ("unet.layers_per_block=2", "unet.transformer_layers=2", "unet.linear_projection=true")
HEADS = ("unet.block_out_channels=32,64", "unet.num_heads=2,2", "unet.attention=true,true")  # quantised ones in int8
WIDE = ("unet.block_out_channels=64,128", "unet.num_heads=4,8", "unet.norm_groups=16", "mask_vae.decoder_width=48")
ONE_LEVEL = ("unet.block_out_channels=48", "unet.attention=true", "unet.num_heads=3")
LARGE = ("data.image_size=96", "unet.sample_size=24")
NO_MEMORY = ("diffusion.self_condition=0", "unet.in_channels=12")
OTHER_VAE = ("mask_vae.num_bits=7", "mask_vae.num_slots=100", "mask_vae.num_upscalers=2", "mask_vae.bottleneck=tanh")
SCHEDULE = ("scheduler.prediction_type=v_prediction", "scheduler.beta_schedule=squaredcos_cap_v2")
EPSILON = ("scheduler.prediction_type=epsilon", "unet.mid_attention=false", "unet.norm_eps=1e-6")
SPLIT_INPUT = ("unet.separate_conv_in=true", "unet.image_channels=8")
QUERIES = ("unet.conditioning=learned", "unet.cross_attention_dim=12", "conditioning.num_queries=5")
PYRAMID = ("image_encoder.kind=efficientnet_lite", "image_encoder.path=random", "data.image_size=96")
FACTOR = ("image_encoder.scaling_factor=0.18215", "mask_vae.scaling_factor=0.50449")  # which no half type holds
NAMES = (f"mask_vae.num_categories={len(CATEGORIES[2])}",)

HEALTHY = {
    "shipped": (SHIPPED, ExportSettings("fp32", head="both")),
    "shipped-half": (SHIPPED, ExportSettings("fp16")),
    "shipped-bfloat": (SHIPPED, ExportSettings("bf16")),
    "narrow-int8": (SPLIT_INPUT, ExportSettings("int8", size="dynamic", sampler_steps="2")),
    "narrow-bfloat": ((), ExportSettings("bf16", size="dynamic")),
    "deep": (DEEP, ExportSettings("fp32", opset=18)),
    "deep-half": (DEEP, ExportSettings("fp16", opset=23, batch="2")),
    "deep-int8": ((*DEEP, *HEADS), ExportSettings("int8", runtime="tensorrt", sampler_steps="2")),
    "wide": (WIDE, ExportSettings("fp32", size="dynamic", head="logits")),
    "wide-bfloat": ((*WIDE, *FACTOR), ExportSettings("bf16", sampler_steps="2")),
    "wide-fp8": (WIDE, ExportSettings("fp8", size="dynamic")),
    "one-level-half": (ONE_LEVEL, ExportSettings("fp16", size="32")),
    "large": ((*LARGE, *SPLIT_INPUT), ExportSettings("fp32", batch="3", opset=20)),
    "large-half": ((*LARGE, *NO_MEMORY, *FACTOR), ExportSettings("fp16", head="both", sampler_steps="8")),
    "other-decoder-half": (OTHER_VAE, ExportSettings("fp16", opset=19)),
    "other-schedule": (SCHEDULE, ExportSettings("fp32", sampler_steps="3")),
    "other-schedule-bfloat": (EPSILON, ExportSettings("bf16", opset=23)),
    "queries-half": (QUERIES, ExportSettings("fp16", batch="1")),
    "pyramid-half": (PYRAMID, ExportSettings("fp16", size="64")),
    "categories": (NAMES, ExportSettings("fp32", head="both")),
}


def model(settings: tuple[str, ...] | None, folder: Path) -> Path:
    if settings is SHIPPED:
        return resolve_model_dir("tiny")
    table = CategoryTable.of_data_set(CATEGORIES[2], "scenes") if settings is NAMES else None
    return make_model(folder, settings, table)


@pytest.mark.soak
@pytest.mark.parametrize("name", HEALTHY)
def test_no_fault_is_found_in_a_healthy_export(name, tmp_path, record_property):
    settings, export = HEALTHY[name]
    export = replace(export, parity_images=IMAGES)
    report = export_model(model(settings, tmp_path / "model"), tmp_path / "graphs", export)
    record_property("comparisons", len(report.rows))
    record_property("false alarms", sum(not row.ok for row in report.rows))
    assert report.ok, report.table()


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.soak)])
def test_a_graph_in_half_does_not_round_the_latents_factors(precision, tmp_path):
    export = ExportSettings(precision, head="both", parity_images=1)
    report = export_model(make_model(tmp_path / "model", FACTOR), tmp_path / "graphs", export)
    assert report.ok, report.table()


def test_twenty_exports_are_listed():
    precisions = [export.precision for _, export in HEALTHY.values()]
    assert len(precisions) == 20 and set(precisions) == {"fp32", "fp16", "bf16", "fp8", "int8"}
