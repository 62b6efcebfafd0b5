"""Stands in for a Triton server: the schema of its configurations, and its Python module over ONNX Runtime."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image

from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.export import to_triton

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
