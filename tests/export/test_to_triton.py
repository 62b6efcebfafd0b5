"""`to_triton.py`: configurations that the published schema takes, and models that give the pipeline's maps."""

import io
import json
import shutil
import struct
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import to_onnx, to_triton, triton_models

# The part of triton-inference-server/common's protobuf/model_config.proto that a repository like this one can use:
# (field, number, type), "*" repeated; a map is a repeated message of key and value.
SCHEMA = {
    "ModelParameter": [("string_value", 1, "string")],
    "ParameterEntry": [("key", 1, "string"), ("value", 2, "ModelParameter")],
    "NameEntry": [("key", 1, "string"), ("value", 2, "string")],
    "ModelInput": [
        ("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 4, "int64*"), ("is_shape_tensor", 6, "bool"),
        ("allow_ragged_batch", 7, "bool"), ("optional", 8, "bool"),
    ],
    "ModelOutput": [
        ("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 3, "int64*"), ("label_filename", 4, "string"),
        ("is_shape_tensor", 6, "bool"),
    ],
    "ModelInstanceGroup": [
        ("name", 1, "string"), ("count", 2, "int32"), ("gpus", 3, "int32*"), ("kind", 4, "Kind"),
        ("profile", 5, "string*"),
    ],
    "Shape": [("dim", 1, "int64*")],
    "ShapeEntry": [("key", 1, "string"), ("value", 2, "Shape")],
    "GraphSpec": [("batch_size", 1, "int32"), ("input", 2, "ShapeEntry*")],
    "Cuda": [("graphs", 1, "bool"), ("busy_wait_events", 2, "bool"), ("graph_spec", 3, "GraphSpec*")],
    "ModelOptimizationPolicy": [("cuda", 3, "Cuda")],
    "WarmupInput": [
        ("data_type", 1, "DataType"), ("dims", 2, "int64*"), ("zero_data", 3, "bool"), ("random_data", 4, "bool"),
        ("input_data_file", 5, "string"),
    ],
    "WarmupEntry": [("key", 1, "string"), ("value", 2, "WarmupInput")],
    "ModelWarmup": [("name", 1, "string"), ("batch_size", 2, "uint32"), ("inputs", 3, "WarmupEntry*")],
    "ModelDynamicBatching": [
        ("preferred_batch_size", 1, "int32*"), ("max_queue_delay_microseconds", 2, "uint64"),
        ("preserve_ordering", 3, "bool"),
    ],
    "Step": [
        ("model_name", 1, "string"), ("model_version", 2, "int64"), ("input_map", 3, "NameEntry*"),
        ("output_map", 4, "NameEntry*"),
    ],
    "ModelEnsembling": [("step", 1, "Step*")],
    "ModelConfig": [
        ("name", 1, "string"), ("platform", 2, "string"), ("backend", 17, "string"), ("max_batch_size", 4, "int32"),
        ("input", 5, "ModelInput*"), ("output", 6, "ModelOutput*"), ("dynamic_batching", 11, "ModelDynamicBatching"),
        ("ensemble_scheduling", 15, "ModelEnsembling"), ("instance_group", 7, "ModelInstanceGroup*"),
        ("default_model_filename", 8, "string"), ("parameters", 14, "ParameterEntry*"),
        ("optimization", 12, "ModelOptimizationPolicy"), ("model_warmup", 16, "ModelWarmup*"),
    ],
}  # fmt: skip
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
                 "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING",
                 "TYPE_BF16"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model_config():
    field_type = descriptor_pb2.FieldDescriptorProto
    kinds = {
        name: getattr(field_type, f"TYPE_{name.upper()}")
        for name in ("string", "int64", "int32", "bool", "uint64", "uint32")
    }
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        file.enum_type.add(name=name, value=[{"name": v, "number": i} for i, v in enumerate(values)])
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            label = field_type.LABEL_REPEATED if kind.endswith("*") else field_type.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            item = message.field.add(name=field, number=number, label=label)
            if kind in kinds:
                item.type = kinds[kind]
            else:
                item.type = field_type.TYPE_ENUM if kind in ENUMS else field_type.TYPE_MESSAGE
                item.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def read_configs(folder, model_config):
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config()) for path in folder.glob("*/config.pbtxt")
    }


@pytest.fixture(scope="module")
def repository(graphs, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "repository"
    assert to_triton.main([str(graphs), "--out", str(out), "--steps", "3", "--device", "cpu"]) == 0
    return out


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
    assert (repository / "Dockerfile").read_text().count("FROM nvcr.io/nvidia/tritonserver:") == 1
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
        path.write_text(json.dumps(values | {"profiles": [few, many]}))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 0
    configs = read_configs(tmp_path / "r", model_config)
    assert configs["ldmseg_denoiser"].instance_group[0].profile == ["0", "1"]
    assert configs["ldmseg"].max_batch_size == 8
    path.write_text(json.dumps(values | {"profiles": [few, {**many, "batch": [4, 4, 8]}]}))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 2
    assert "image_encoder.engine: no profile takes 3 of the 8 pictures" in capsys.readouterr().err


class FakeTensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values

    def is_cpu(self):
        return True

    def to_dlpack(self):
        return torch.utils.dlpack.to_dlpack(torch.from_numpy(self.values))

    @staticmethod
    def from_dlpack(name, values):
        assert hasattr(values, "__dlpack__")  # of a bare capsule the server does not wait for the stream
        return FakeTensor(name, torch.from_dlpack(values).numpy())


@pytest.fixture
def triton(model_dir, graphs, monkeypatch):
    """The server's Python module, with the repository's graphs behind its model calls."""
    return stand_in(model_dir, graphs, monkeypatch)


def stand_in(model_dir, graphs, monkeypatch):
    backend = load_onnx_backend(read_model_info(model_dir), graphs, "cpu")

    def get(message, name):
        return next((item for item in message.tensors if item.name == name), None)

    class Request:
        def __init__(self, model_name, requested_output_names, inputs):
            self.graph, self.names, self.tensors = model_name.removeprefix("ldmseg_"), requested_output_names, inputs

        def exec(self):
            inputs = {item.name: torch.from_numpy(item.values) for item in self.tensors}
            size = inputs.get("size", torch.zeros(2)).tolist()
            found = backend.run_graph(self.graph, inputs, height=int(size[0]), width=int(size[1]))
            tensors = [FakeTensor(name, found[name].numpy()) for name in self.names]
            return SimpleNamespace(has_error=lambda: False, tensors=tensors)

    def response(output_tensors, error=None):
        return SimpleNamespace(tensors=output_tensors, error=error)

    module = SimpleNamespace(
        Tensor=FakeTensor, InferenceRequest=Request, InferenceResponse=response, TritonError=str,
        get_input_tensor_by_name=get, get_output_tensor_by_name=get,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return backend


def start(repository, model_config, name):
    """The model as the server starts it: through its model.py and the JSON of its configuration."""
    scope = {}
    exec((repository / name / "1" / "model.py").read_text(), scope)
    config = read_configs(repository, model_config)[name]
    parameters = {entry.key: {"string_value": entry.value.string_value} for entry in config.parameters}
    model = scope["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return model


def request(**values):
    return SimpleNamespace(tensors=[FakeTensor(name, value) for name, value in values.items()])


def as_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(repository, model_config, triton, pixels):
    """What the server answers to pictures, each with its place as the seed: by output's name."""
    preprocess, sampler, head = (
        start(repository, model_config, f"ldmseg_{name}") for name in ("preprocess", "sampler", "head")
    )
    requests = [
        request(image=np.array([[as_png(each)]], object), seed=np.array([[index]])) for index, each in enumerate(pixels)
    ]
    prepared = [{item.name: item.values for item in response.tensors} for response in preprocess.execute(requests)]
    for each in prepared:
        each["image_latents"] = triton.encode_image(torch.from_numpy(each["images"])).numpy()
    sampled = sampler.execute([request(noise=e["noise"], image_latents=e["image_latents"]) for e in prepared])
    results = head.execute(
        [request(mask_latents=s.tensors[0].values, size=e["size"]) for s, e in zip(sampled, prepared)]
    )
    assert [result.error for result in results] == [None] * len(pixels)
    return [{item.name: item.values for item in result.tensors} for result in results]


def test_requests_give_the_pipelines_maps(model_dir, repository, model_config, triton):
    pixels = [generate_scene(64, 0, index, version=1)[0][: 64 - 8 * index] for index in range(3)]
    pipe = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    for index, (found, picture) in enumerate(zip(ask(repository, model_config, triton, pixels), pixels)):
        expected = pipe([picture], 3, seed=index, image_ids=[0])[0]
        assert found["segmentation"].shape == (1, *picture.shape[:2])
        assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
        assert len(json.loads(found["segments_info"][0, 0])) == len(expected.segments_info)


def test_requests_get_categories(category_model, model_config, tmp_path, monkeypatch):
    graphs, repository = tmp_path / "graphs", tmp_path / "repository"
    category_model = shutil.copytree(category_model, tmp_path / "model")
    index = json.loads((category_model / "model_index.json").read_text())
    index["postprocess"] = {"mask_threshold": 0.0, "count_threshold": 1, "overlap_threshold": 0.0}  # random weights
    (category_model / "model_index.json").write_text(json.dumps(index))
    assert to_onnx.main([str(category_model), "--out", str(graphs), "--no-parity"]) == 0
    assert to_triton.main([str(graphs), "--out", str(repository), "--steps", "2", "--device", "cpu"]) == 0
    pixels = [generate_scene(64, 0, index)[0][: 64 - 8 * index] for index in range(2)]
    server = stand_in(category_model, graphs, monkeypatch)
    pipe = LDMSegPipeline.from_pretrained(category_model, device="cpu")
    for index, (found, picture) in enumerate(zip(ask(repository, model_config, server, pixels), pixels)):
        expected = pipe([picture], 2, seed=index, image_ids=[0])[0]
        assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
        segments = json.loads(found["segments_info"][0, 0])
        keys = ("id", "name", "category_id", "isthing", "was_fused")
        assert segments and [[s[k] for k in keys] for s in segments] == [
            [s[k] for k in keys] for s in expected.segments_info
        ]


def test_a_bad_request_fails_alone(repository, model_config, triton):
    preprocess = start(repository, model_config, "ldmseg_preprocess")
    good = request(image=np.array([[as_png(np.zeros((8, 8, 3), np.uint8))]], object))
    bad = request(image=np.array([[b"no picture"]], object))
    first, second = preprocess.execute([bad, good])
    assert "cannot identify image file" in first.error and second.error is None
    assert triton_models.array(SimpleNamespace(tensors=second.tensors), "size").tolist() == [[8, 8]]


def test_large_pictures_go_through_the_logits(model_dir, repository, model_config, triton, monkeypatch):
    """Beyond what the head in the graph holds, as `GraphBackend` does."""
    pixels = np.asarray(Image.fromarray(generate_scene(64, 0, 1, version=1)[0]).resize((160, 96)))
    pipe = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    expected = pipe([pixels], 3, seed=0, image_ids=[0])[0]
    names = []
    call = triton_models.call
    monkeypatch.setattr(triton_models, "call", lambda model, *rest: names.append(rest[1]) or call(model, *rest))
    monkeypatch.setattr(triton_models.Limits, "fit_head", lambda self, height, width: height * width <= 4096)
    found = ask(repository, model_config, triton, [pixels])[0]
    assert ("mask_logits",) in names
    assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
    assert len(json.loads(found["segments_info"][0, 0])) == len(expected.segments_info)


def bomb(width, height):
    """A small PNG that claims to be large: it is grey, and its rows compress to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    content = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def test_pictures_that_are_too_large_are_refused_by_their_header(graphs, repository, model_config, triton, tmp_path):
    preprocess = start(repository, model_config, "ldmseg_preprocess")
    large = bomb(12000, 9000)  # 108 million pixels
    assert len(large) < 315_000
    images = np.array([[as_png(np.zeros((8, 8, 3), np.uint8))], [large]], object)
    before = time.process_time()
    error = preprocess.execute([request(image=images)])[0].error
    assert "picture 1 of the request" in error and "12000x9000 is over 33554432 pixels" in error
    assert time.process_time() - before < 0.2  # to decode it takes longer
    two = np.array([[as_png(np.zeros((8, side, 3), np.uint8))] for side in (8, 9)], object)
    assert "several sizes in one request" in preprocess.execute([request(image=two)])[0].error
    preprocess.facts["limits"] = {"max_pixels": 10**6, "head_pixels": 100, "head_side": 9, "logits": False}
    error = preprocess.execute([request(image=two[1:])])[0].error
    assert error is None
    wide = np.array([[as_png(np.zeros((8, 10, 3), np.uint8))]], object)
    error = preprocess.execute([request(image=wide)])[0].error
    assert "10x8 is too large for the server's graphs" in error and "sides of up to 9" in error


def test_the_servers_tensorrt_is_checked(monkeypatch):
    def has(version):
        def load(name):
            if name != f"libnvinfer.so.{version // 10000}":
                raise OSError(name)
            return SimpleNamespace(getInferLibVersion=lambda: version)

        monkeypatch.setattr(triton_models.ctypes, "CDLL", load)

    has(101302)
    triton_models.check_tensorrt("10.13.2.6", False)
    triton_models.check_tensorrt("", False)
    with pytest.raises(BackendError, match=r"need TensorRT 11\.4\.0\.1, and this server has no libnvinfer\.so\.11"):
        triton_models.check_tensorrt("11.4.0.1", True)
    with pytest.raises(BackendError, match=r"need TensorRT 10\.12\.0\.3, and this server has 10\.13\.2"):
        triton_models.check_tensorrt("10.12.0.3", False)
    triton_models.check_tensorrt("10.12.0.3", True)
    with pytest.raises(BackendError, match=r"this server has 10\.13\.2"):
        triton_models.check_tensorrt("10.14.0.3", True)


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
    shutil.copytree(engines, tmp_path / "e")
    path = tmp_path / "e" / "denoiser.passport.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flavour": "rtx"}))
    assert to_triton.main([str(tmp_path / "e"), "--out", str(tmp_path / "r")]) == 2
    assert "the server takes whole TensorRT engines" in capsys.readouterr().err
    shutil.copytree(graphs, tmp_path / "g")
    path = tmp_path / "g" / "export.json"
    values = json.loads(path.read_text())
    values["options"]["head"] = "logits"
    path.write_text(json.dumps(values))
    assert to_triton.main([str(tmp_path / "g"), "--out", str(tmp_path / "r")]) == 2
    assert "--head panoptic or both" in capsys.readouterr().err
