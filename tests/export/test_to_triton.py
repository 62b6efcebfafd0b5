"""`to_triton.py`: configurations that the published schema takes, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from ldmseg_fast.backends.graphs.seal import sealed
from ldmseg_fast.export import to_triton
from tests.export.triton_double import read_configs


def test_configurations_follow_the_schema(repository, model_config):
    configs = read_configs(repository, model_config)
    assert set(configs) == {path.name for path in repository.iterdir() if path.is_dir()} and len(configs) == 7
    for name, config in configs.items():
        assert config.name == name and (repository / name / "1").is_dir()
        assert all(0 not in tensor.dims for tensor in (*config.input, *config.output))
    assert configs["ldmseg_image_encoder"].platform == "onnxruntime_onnx"
    assert (repository / "ldmseg_image_encoder" / "1" / "model.onnx").stat().st_size > 10_000
    assert configs["ldmseg_sampler"].dynamic_batching.max_queue_delay_microseconds == 2000
    for name in ("preprocess", "sampler", "head"):
        parameters = {entry.key: entry.value.string_value for entry in configs[f"ldmseg_{name}"].parameters}
        assert parameters["FORCE_CPU_ONLY_INPUT_TENSORS"] == "no"


def test_every_graph_is_warmed_up_with_inputs_that_it_takes(repository, model_config, triton):
    configs = read_configs(repository, model_config)
    for name in ("image_encoder", "denoiser", "mask_decoder"):
        config = configs[f"ldmseg_{name}"]
        assert not config.optimization.cuda.graphs  # TensorRT's
        assert [warmup.name for warmup in config.model_warmup][:1] == ["batch of 1"]
        for warmup in config.model_warmup:
            inputs = {}
            for entry in warmup.inputs:
                shape = (*([warmup.batch_size] if config.max_batch_size else []), *entry.value.dims)
                kind = {"TYPE_UINT8": torch.uint8, "TYPE_INT64": torch.int64}.get(
                    model_config.DESCRIPTOR.file.enum_types_by_name["DataType"]
                    .values_by_number[entry.value.data_type]
                    .name,
                    torch.float32,
                )
                if entry.value.input_data_file:
                    content = (repository / config.name / "warmup" / entry.value.input_data_file).read_bytes()
                    inputs[entry.key] = torch.from_numpy(np.frombuffer(content, "<i8").copy())
                else:
                    inputs[entry.key] = torch.zeros(shape, dtype=kind)
            height, width = inputs.get("size", torch.zeros(2)).tolist()
            found = triton.run_graph(name, inputs, height=int(height), width=int(width))
            assert all(values.numel() for values in found.values())


def test_the_readme_says_how_to_start_and_to_ask(repository, engines, tmp_path):
    text = (repository / "README.md").read_text()
    assert "--gpus" not in text and "tritonserver --model-repository=/models\n" in text and "TensorRT" not in text
    docker = (repository / "Dockerfile").read_text()
    assert docker.count("FROM nvcr.io/nvidia/tritonserver:") == 1
    assert "docker build -t ldmseg-triton .\n" in text  # it copies from the folder
    assert "COPY Dockerfile *.whl /wheels/\n" in docker
    assert to_triton.main([str(engines), "--out", str(tmp_path / "r"), "--image", "registry/server:1"]) == 0
    text = (tmp_path / "r" / "README.md").read_text()
    assert "docker run --rm --gpus all" in text and "TensorRT 11.4.0.1 exactly" in text
    assert "FROM registry/server:1\n" in (tmp_path / "r" / "Dockerfile").read_text()
    compile((tmp_path / "r" / "client.py").read_text(), "client.py", "exec")


def test_other_models_of_a_repository_are_left_alone(graphs, tmp_path, capsys):
    (tmp_path / "r" / "resnet").mkdir(parents=True)
    arguments = [str(graphs), "--out", str(tmp_path / "r")]
    assert to_triton.main(arguments) == 2
    assert "holds something that is no export (resnet)" in capsys.readouterr().err
    (tmp_path / "r" / "resnet").rmdir()
    assert to_triton.main(arguments) == 0 and to_triton.main(arguments) == 0
    (tmp_path / "r" / "resnet").mkdir()
    assert to_triton.main(arguments) == 2 and (tmp_path / "r" / "resnet").is_dir()


def test_a_folder_with_files_of_these_names_is_left_alone(graphs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("of my own")
    assert to_triton.main([str(graphs), "--out", str(tmp_path / "mine")]) == 2
    assert "holds something that is no export (README.md)" in capsys.readouterr().err
    assert (tmp_path / "mine" / "README.md").read_text() == "of my own"


def test_graphs_that_are_links_are_served_themselves(graphs, tmp_path):
    """As the Hub's downloads are, whose links lead nowhere from another folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(graphs, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert to_triton.main([str(snapshot), "--out", str(tmp_path / "r")]) == 0
    for name in ("image_encoder", "denoiser", "mask_decoder"):
        served = tmp_path / "r" / f"ldmseg_{name}" / "1" / "model.onnx"
        assert not served.is_symlink() and served.read_bytes() == (graphs / f"{name}.onnx").read_bytes()


def test_the_ensemble_is_wired(repository, model_config):
    """Every tensor that a step reads was made before, under the types and sizes that its model declares."""
    configs = read_configs(repository, model_config)
    ensemble = configs["ldmseg"]
    made = {tensor.name: tensor for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert model.max_batch_size == ensemble.max_batch_size == 8
        inputs, outputs = ({t.name: t for t in side} for side in (model.input, model.output))
        assert {entry.key for entry in step.input_map} == set(inputs)
        for entry in step.input_map:
            source, target = made[entry.value], inputs[entry.key]
            assert (source.data_type, list(source.dims)) == (target.data_type, list(target.dims)), entry.key
        made |= {entry.value: outputs[entry.key] for entry in step.output_map}
    assert {tensor.name for tensor in ensemble.output} <= set(made)


def test_engines_make_plans(engines, model_config, tmp_path):
    assert to_triton.main([str(engines), "--out", str(tmp_path / "r"), "--queue-delay", "500"]) == 0
    configs = read_configs(tmp_path / "r", model_config)
    assert configs["ldmseg"].max_batch_size == 4  # the engines' own
    decoder = configs["ldmseg_mask_decoder"]
    assert decoder.platform == "tensorrt_plan" and [t.name for t in decoder.input if t.is_shape_tensor] == ["size"]
    assert (tmp_path / "r" / "ldmseg_denoiser" / "1" / "model.plan").is_file()
    assert not decoder.optimization.cuda.graphs  # the server captures no graph with a shape tensor
    encoder, denoiser = (configs[f"ldmseg_{name}"] for name in ("image_encoder", "denoiser"))
    for config in (encoder, denoiser, decoder):
        assert [group.profile for group in config.instance_group] == [["0"]]
    assert [spec.batch_size for spec in encoder.optimization.cuda.graph_spec] == [1, 2, 4]
    for spec, batch in zip(denoiser.optimization.cuda.graph_spec, (1, 2, 4), strict=True):
        shapes = {entry.key: list(entry.value.dim) for entry in spec.input}
        assert spec.batch_size == 0 and set(shapes) == {tensor.name for tensor in denoiser.input}
        assert shapes["noisy_latents"][0] == shapes["timesteps"][0] == batch and shapes["coefficients"] == [4]
    arguments = [str(engines), "--out", str(tmp_path / "r"), "--no-cuda-graph", "--max-batch", "2"]
    assert to_triton.main(arguments) == 0
    configs = read_configs(tmp_path / "r", model_config)
    assert not configs["ldmseg_denoiser"].optimization.cuda.graphs and configs["ldmseg"].max_batch_size == 2


def test_every_profile_is_named_and_every_batch_has_one(engines, model_config, tmp_path, capsys):
    shutil.copytree(engines, tmp_path / "e")
    for name in ("denoiser", "image_encoder"):
        path = tmp_path / "e" / f"{name}.passport.json"
        values = json.loads(path.read_text())
        few, many = ({**values["profiles"][0], "batch": batch} for batch in ([1, 1, 2], [3, 4, 8]))
        path.write_text(json.dumps(sealed(values | {"profiles": [few, many]})))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 0
    configs = read_configs(tmp_path / "r", model_config)
    assert configs["ldmseg_denoiser"].instance_group[0].profile == ["0", "1"]
    assert configs["ldmseg"].max_batch_size == 8
    path.write_text(json.dumps(sealed(values | {"profiles": [few, {**many, "batch": [4, 4, 8]}]})))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 2
    assert "image_encoder.engine: no profile takes 3 of the 8 pictures" in capsys.readouterr().err


def test_what_cannot_be_served(graphs, engines, tmp_path, capsys):
    assert to_triton.main([str(tmp_path), "--out", str(tmp_path / "r")]) == 2
    assert "no export.json in it" in capsys.readouterr().err
    assert to_triton.main([str(graphs), "--out", str(tmp_path / "r"), "--max-batch", "0"]) == 2
    assert "--max-batch 0: from 1 on" in capsys.readouterr().err
    assert to_triton.main([str(graphs), "--out", str(tmp_path / "r"), "--no-cuda-graph"]) == 2
    assert "--no-cuda-graph: of engines only" in capsys.readouterr().err
    assert to_triton.main([str(engines), "--out", str(tmp_path / "r"), "--device", "cpu"]) == 2
    assert "TensorRT engines, which run on GPUs" in capsys.readouterr().err
    assert to_triton.main([str(engines), "--out", str(tmp_path / "r"), "--max-batch", "5"]) == 2
    assert "was built for batches of up to 4" in capsys.readouterr().err
    assert to_triton.main([str(graphs), "--out", str(tmp_path / "r"), "--image", "server\nRUN x"]) == 2
    assert "--image 'server\\nRUN x': no name of a container" in capsys.readouterr().err
    shutil.copytree(engines, tmp_path / "e")
    path = tmp_path / "e" / "denoiser.engine"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 2
    assert "denoiser.engine does not fit: engine file:" in capsys.readouterr().err
    path.write_bytes(whole)
    path = tmp_path / "e" / "denoiser.passport.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"flavour": "rtx"})))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 2
    assert "the server takes whole TensorRT engines" in capsys.readouterr().err
    shutil.copytree(graphs, tmp_path / "g")
    path = tmp_path / "g" / "export.json"
    values = json.loads(path.read_text())
    for precision, message in (
        ("bf16", "which ONNX Runtime does not run; export with --precision fp16"),
        ("int8", "int8 for a CPU; add --device cpu"),
    ):
        path.write_text(json.dumps(sealed(values | {"precision": precision})))
        assert to_triton.main([str(tmp_path / "g"), "--out", str(tmp_path / "r")]) == 2
        assert message in capsys.readouterr().err
    values["options"]["head"] = "logits"
    path.write_text(json.dumps(sealed(values)))
    assert to_triton.main([str(tmp_path / "g"), "--out", str(tmp_path / "r")]) == 2
    assert "--head panoptic or both" in capsys.readouterr().err
