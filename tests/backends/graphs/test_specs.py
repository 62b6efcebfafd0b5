"""One place per graph: the specs fit the modules, their samples fit the specs, and misfits are named."""

import json
from dataclasses import replace

import pytest
import torch

from ldmseg_fast.backends.graphs.modules import build_graph
from ldmseg_fast.backends.graphs.specs import (
    GraphOptions,
    GraphSpec,
    TensorSpec,
    graph_specs,
    mask_decoder,
    sample_inputs,
    schedule,
)
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError

SIZES = {"batch": 2, "latent_height": 16, "latent_width": 8, "height": 20, "width": 30}


@pytest.fixture(scope="module")
def info(model_dir):
    return read_model_info(model_dir)


@pytest.mark.parametrize(
    "options",
    [
        GraphOptions(image_size=64, head="both", sampler_steps=(2,)),
        GraphOptions(head="panoptic"),
        GraphOptions(batch=2, image_size=64, head="logits"),
    ],
)
def test_specs_say_what_the_modules_do(info, options):
    networks = {name: load_component(info.folder, name) for name in ("unet", "mask_vae", "image_vae")}
    for spec in graph_specs(info, options).values():
        inputs = sample_inputs(spec, info, SIZES)
        assert spec.sizes(inputs).items() <= SIZES.items()
        with torch.inference_mode():
            outputs = build_graph(spec, info, networks, options.head)(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert len(outputs) == len(spec.outputs)
        for output, tensor in zip(outputs, spec.outputs):
            assert output.dtype == tensor.torch_dtype, tensor.name
            assert tuple(output.shape) == tensor.resolve(SIZES), tensor.name


def test_a_spec_survives_json(info):
    for spec in graph_specs(info, GraphOptions(head="both", sampler_steps=(1, 4))).values():
        assert GraphSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_exports_that_name_no_kind_are_read(info):
    for spec in graph_specs(info, GraphOptions(sampler_steps=(4,))).values():
        older = {key: value for key, value in spec.to_dict().items() if key != "kind"}
        assert GraphSpec.from_dict(older) == spec


def test_without_self_condition(info):
    specs = graph_specs(replace(info, self_condition=False), GraphOptions(image_size=64))
    assert [tensor.name for tensor in specs["denoiser"].inputs] == [
        "noisy_latents",
        "image_latents",
        "timesteps",
        "coefficients",
    ]


def test_the_schedule_is_the_samplers(info):
    times, table = schedule(info, 4)
    assert times.tolist() == Scheduler(info.scheduler).timesteps(4)[0] and table.shape == (4, 4)
    assert table[-1].tolist()[2:] == [1.0, 0.0]  # the last step returns the estimate itself


def test_misfits_are_named(info):
    spec = graph_specs(info, GraphOptions(image_size=64))["denoiser"]
    good = sample_inputs(spec, info, {"batch": 3})
    cases = [
        ({"noisy_latents": torch.zeros(2, 4, 16, 16)}, r"denoiser\.image_latents: shape \(3, 8, 16, 16\)"),
        ({"timesteps": torch.zeros(3)}, r"denoiser\.timesteps: torch\.float32 given, this graph takes int64"),
        ({"coefficients": torch.zeros(5)}, r"denoiser\.coefficients: shape \(5,\)"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            spec.sizes(good | change)
    with pytest.raises(ValueError, match="denoiser: no condition given; inputs: noisy_latents"):
        spec.sizes({name: value for name, value in good.items() if name != "condition"})


def test_multiples_of_an_axis():
    spec = GraphSpec("g", "image_encoder", (TensorSpec("images", "uint8", ("batch", 3, "h*4", "w*4")),), ())
    assert spec.axes == ("batch", "h", "w")
    assert spec.sizes({"images": torch.zeros(1, 3, 8, 20, dtype=torch.uint8)}) == {"batch": 1, "h": 2, "w": 5}
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 21\)"):
        spec.sizes({"images": torch.zeros(1, 3, 8, 21, dtype=torch.uint8)})


def test_more_slots_than_a_byte_names(info):
    wide = replace(info, mask_vae=replace(info.mask_vae, num_slots=257))
    with pytest.raises(ValueError, match="num_slots=257: the exported head labels 256 slots at most"):
        mask_decoder(wide, GraphOptions())


def test_the_size_multiple(info):
    assert info.size_multiple == 8  # 4 pixels a cell, two levels of the UNet


def test_unknown_backends(model_dir):
    with pytest.raises(BackendError, match="backend='magic': one of torch, compile, onnxruntime, tensorrt"):
        load_backend(model_dir, "magic")
    with pytest.raises(BackendError, match=r"backend=tensorrt needs engine_dir.*to_trt\.py"):
        load_backend(model_dir, "tensorrt")
