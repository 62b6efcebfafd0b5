"""An edited `export.json` is one clear error, whichever field it is; options that a backend cannot use are refused."""

import json

import pytest

from ldmseg_fast.backends.graphs.manifest import GraphFile, Manifest, read_manifest
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.config import to_dict
from ldmseg_fast.errors import BackendError

EDITS = {
    "no inputs": lambda v: v["graphs"]["image_encoder"]["spec"].update(inputs=[]),
    "is_shape": lambda v: v["graphs"]["image_encoder"]["spec"]["inputs"][0].update(is_shape="x"),
    "no axes": lambda v: v["graphs"]["denoiser"]["spec"]["inputs"][0].update(shape=[]),
    "kind": lambda v: v["graphs"]["denoiser"]["spec"].update(kind="sampler"),
    "steps": lambda v: v["model"].update(num_inference_steps=None),
    "scheduler": lambda v: v.update(scheduler={"x": 1}),
    "model": lambda v: v.update(model=None),
    "dtype": lambda v: v["options"].update(dtype=3),
    "versions": lambda v: v.update(versions=[]),
    "graphs": lambda v: v.update(graphs={}),
    "sampler_steps": lambda v: v["options"].update(sampler_steps=None),
    "categories": lambda v: v["model"].update(categories=[1]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    info, out = read_model_info("tiny"), tmp_path_factory.mktemp("manifest")
    options = GraphOptions(image_size=64)
    graphs = {name: GraphFile(spec, f"{name}.onnx", None, "0") for name, spec in graph_specs(info, options).items()}
    model = {key: value for key, value in info.index.items() if not key.startswith("_")}
    facts = {"model": model, "scheduler": to_dict(info.scheduler)}
    Manifest("", "fp32", 21, 64, 4, 8, options, graphs, {}, "", **facts).write(out)
    return out


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_field_is_one_clear_error(folder, tmp_path, edit):
    assert read_manifest(folder).precision == "fp32"
    values = json.loads((folder / "export.json").read_text())
    EDITS[edit](values)
    (tmp_path / "export.json").write_text(json.dumps(values))
    with pytest.raises(BackendError, match=r"export\.json: .*export again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "option", [{"lanes": 2}, {"threads": 2}, {"profile": 0}], ids=lambda option: next(iter(option))
)
def test_options_that_a_backend_cannot_use(option):
    with pytest.raises(BackendError, match=f"{next(iter(option))}=.*backend=torch cannot use it"):
        load_backend("tiny", **option)
