"""An edited `export.json` or passport is one clear error, whichever field it is; unused options are refused."""

import json
from dataclasses import replace

import pytest

from ldmseg_fast.backends.graphs.manifest import GraphFile, Manifest, read_manifest
from ldmseg_fast.backends.graphs.seal import sealed
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.trt.passport import Passport, read_passport
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
def test_a_value_that_no_export_has_is_one_clear_error(folder, tmp_path, edit):
    assert read_manifest(folder).precision == "fp32"
    values = json.loads((folder / "export.json").read_text())
    EDITS[edit](values)
    (tmp_path / "export.json").write_text(json.dumps(sealed(values)))
    with pytest.raises(BackendError, match=r"export\.json: .*export again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("precision", "dtype", "least"),
    [("fp32", "float32", 1), ("fp16", "float16", 5), ("int8", "float16", 6), ("int8", "float32", 6)],
)
def test_graphs_of_former_rules_are_made_again(precision, dtype, least, folder):
    manifest = read_manifest(folder)
    manifest = replace(manifest, precision=precision, options=replace(manifest.options, dtype=dtype))
    assert not replace(manifest, rules=least).is_outdated
    assert least == 1 or replace(manifest, rules=least - 1).is_outdated


def edits(value):
    """Each way to change one value, or to leave it out, wherever it is in a JSON: functions that change a copy."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield lambda copy, key=key: copy.pop(key)
            others = (None, "", "x", -1, 2, 1.5, [], {}, True)
            for other in (*others, inner + 1 if type(inner) is int else 0):
                if (type(other), other) != (type(inner), inner):
                    yield lambda copy, key=key, other=other: copy.__setitem__(key, other)
            for edit in edits(inner):
                yield lambda copy, key=key, edit=edit: edit(copy[key])


def refused(path, read):
    """How many edits of a JSON there are, all of which `read` refuses."""
    text, count = path.read_text(), 0
    read()
    for edit in edits(json.loads(text)):
        values = json.loads(text)
        edit(values)
        path.write_text(json.dumps(values))
        with pytest.raises(BackendError) as error:
            read()
        assert path.name in str(error.value) and "again" in str(error.value)
        count += 1
    return count


def test_every_edit_of_every_field_is_one_clear_error(folder, tmp_path):
    path = tmp_path / "export.json"
    path.write_bytes((folder / "export.json").read_bytes())
    assert refused(path, lambda: read_manifest(tmp_path)) > 2000
    passport = Passport(
        "denoiser", "0", 12, "tensorrt", "11.4.0.1", "NVIDIA H100 PCIe", "9.0", "580.65", ("same",), "0", "0", "fp16",
        64, ({"batch": (1, 1, 8)},), False, False, "0", 1.5, "2026-11-29T00:00:00Z", "python export/to_trt.py",
        {"maps": 1.0}, "engine", {"CONVOLUTION": 3},
    )  # fmt: skip
    passport.write(tmp_path)
    assert read_passport(tmp_path, "denoiser") == passport
    assert refused(tmp_path / "denoiser.passport.json", lambda: read_passport(tmp_path, "denoiser")) > 200


def test_a_json_that_was_only_laid_out_anew_is_read(folder, tmp_path):
    values = json.loads((folder / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert read_manifest(tmp_path) == read_manifest(folder)


def test_exports_of_before_there_were_seals_are_read(folder, tmp_path):
    values = json.loads((folder / "export.json").read_text()) | {"format_version": 1}
    del values["seal"], values["lora"]
    (tmp_path / "export.json").write_text(json.dumps(values))
    assert read_manifest(tmp_path) == read_manifest(folder)
    (tmp_path / "export.json").write_text(json.dumps(values | {"precision": "x"}))
    with pytest.raises(BackendError, match=r"export\.json: damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "option", [{"lanes": 2}, {"threads": 2}, {"profile": 0}], ids=lambda option: next(iter(option))
)
def test_options_that_a_backend_cannot_use(option):
    with pytest.raises(BackendError, match=f"{next(iter(option))}=.*backend=torch cannot use it"):
        load_backend("tiny", **option)
