"""Which words are names of the Hub, and which files of a repository are fetched."""

import re
from pathlib import Path

import pytest

from ldmseg_fast.checkpoints.hub_names import (
    DIFFUSERS,
    FOLDERS,
    GRAPHS,
    MODEL,
    VAE,
    HubName,
    files_of,
    hub_name,
    missing_in,
    shown_name,
)
from ldmseg_fast.checkpoints.shipped import resolve_engine_dir, resolve_model_dir
from ldmseg_fast.errors import ArgumentError, CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        (f"owner/name@{COMMIT}", HubName("owner/name", COMMIT)),
        ("CompVis/stable-diffusion-v1-4@refs/pr/12", HubName("CompVis/stable-diffusion-v1-4", "refs/pr/12")),
        ("hf://runs/x", HubName("runs/x")),
        ("hf://owner/name@v1", HubName("owner/name", "v1")),
    ],
)
def test_names(word, name):
    assert hub_name(word) == name


@pytest.mark.parametrize(
    "word",
    [
        *("./foo/bar", "../x", "/abs/x", "~/x", "a/b/c", "runs/x", "models/x", "weights/y", "owner/", "/name", "name"),
        *("owner/model.safetensors", "owner/model.pt", "owner--x/name", "a..b/name", "-a/name", "owner/name.git", ""),
        *("C:\\models\\x", "https://huggingface.co/owner/name", "o w/n", "bücher/x", "a/" + "b" * 97),
    ],
)
def test_paths(word):
    assert hub_name(word) is None


@pytest.mark.parametrize(
    "word", ["hf://", "hf://x", "hf://a/b/c", "hf://a/b@", "a/b@", "a/b@../c", "a/b@x y", "a/b@/x"]
)
def test_names_that_cannot_be(word):
    with pytest.raises(ArgumentError) as caught:
        hub_name(word)
    assert "\n" not in str(caught.value)


def test_the_guide_lists_the_names_of_folders():
    text = (Path(__file__).resolve().parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `runs/x`"))
    assert set(FOLDERS) == {word.removesuffix("/x") for word in re.findall(r"`([^`]+)`", row)}


def test_a_folder_of_the_owners_name_makes_it_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("mine/x") == HubName("mine/x")
    (tmp_path / "mine").mkdir()
    assert hub_name("mine/x") is None
    with pytest.raises(CheckpointError, match=r"mine/x: no such model folder; a model of the Hub.*hf://owner/name"):
        from ldmseg_fast import LDMSegPipeline

        LDMSegPipeline.from_pretrained("mine/x")
    (tmp_path / "mine" / "x").mkdir()
    assert resolve_model_dir("mine/x") == Path("mine/x")
    assert resolve_model_dir(Path("other/x")) == Path("other/x")  # a Path is a path


def test_a_revision_belongs_to_a_name(tmp_path):
    assert hub_name("a/b", "v1") == HubName("a/b", "v1") == hub_name("a/b@v1", "v1")
    with pytest.raises(ArgumentError, match="leave one of them out"):
        hub_name("a/b@v2", "v1")
    for word in ("tiny", str(tmp_path), "./a/b"):
        with pytest.raises(ArgumentError, match="no name of the Hub"):
            resolve_model_dir(word, "v1")


OURS = [
    *("model_index.json", "README.md", "LICENSE", "categories.json", "unet/config.json", "unet/model.safetensors"),
    *("mask_vae/config.json", "mask_vae/model.safetensors", "scheduler/config.json", "conditioning/tokenizer/t.json"),
]
FOREIGN = [
    *(".gitattributes", "pytorch_model.bin", "unet/model.bin", "unet/pickle.pkl", "run.py", "checkpoints/1/optim.pt"),
    *("unet/../../evil.json", "/etc/passwd.json", "logs/log.jsonl", "unet/more.safetensors", "huge.safetensors"),
]


def test_of_a_model_json_safetensors_and_the_card(tmp_path):
    assert files_of(HubName("a/b"), OURS + FOREIGN, (MODEL,)) == [name for name in OURS if name != "LICENSE"]
    with pytest.raises(CheckpointError, match=r"a/b: a model folder .* expected, and its files are \.gitattributes"):
        files_of(HubName("a/b"), FOREIGN, (MODEL,))


def stable_diffusion(*unet: str, vae=("diffusion_pytorch_model.safetensors",)) -> list[str]:
    others = ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "text_encoder/model.safetensors", "tokenizer/vocab.json"]
    others += ["safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"]
    others += ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    return [*others, *(f"unet/{name}" for name in unet), *(f"vae/{name}" for name in vae)]


PLAIN, HALF, EMA = (f"diffusion_pytorch_model{infix}.safetensors" for infix in ("", ".fp16", ".non_ema"))
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        ([PLAIN, HALF, EMA], [PLAIN]),
        ([HALF], [HALF]),
        ([HALF, EMA], [HALF]),
        ([*SHARDS, INDEX], [*SHARDS, INDEX]),
        ([*SHARDS, INDEX, HALF], [*SHARDS, INDEX]),
    ],
    ids=["full precision", "half alone", "half before others", "shards", "shards before half"],
)
def test_of_stable_diffusion_one_variant_of_two_networks(there, fetched):
    found = files_of(HubName("a/b"), stable_diffusion(*there), (MODEL, DIFFUSERS))
    expected = {"README.md", "model_index.json", "unet/config.json", "vae/config.json", f"vae/{PLAIN}"}
    assert set(found) == expected | {"scheduler/scheduler_config.json"} | {f"unet/{name}" for name in fetched}
    vae = files_of(HubName("a/b"), stable_diffusion(*there), (VAE,))
    assert set(vae) == {"README.md", "vae/config.json", f"vae/{PLAIN}"}


def test_refusals_before_anything_is_fetched():
    name = HubName("a/b")
    with pytest.raises(CheckpointError, match="pickles are not fetched"):
        files_of(name, stable_diffusion(), (DIFFUSERS,))
    with pytest.raises(CheckpointError, match=r"a model folder .* expected, and it is a Stable Diffusion model"):
        files_of(name, stable_diffusion(PLAIN), (MODEL,))
    with pytest.raises(CheckpointError, match="exported ONNX graphs"):
        files_of(name, OURS, (GRAPHS,))
    graphs = ["export.json", "denoiser.onnx", "denoiser.onnx.data", "denoiser.engine", "x.py"]
    assert files_of(name, graphs, (GRAPHS,)) == graphs[:3]
    bare = ["config.json", PLAIN, "diffusion_pytorch_model.bin"]
    assert files_of(name, bare, (VAE,)) == bare[:2]


def test_engines_are_not_taken_from_the_hub():
    with pytest.raises(ArgumentError, match="owner/engines: no such folder, and engines are not taken from the Hub"):
        resolve_engine_dir("owner/engines", "tensorrt")
    assert resolve_engine_dir("./engines", "tensorrt") == Path("engines")


def test_a_snapshot_tells_what_it_lacks_and_its_name(tmp_path, model_dir):
    assert missing_in(model_dir, (MODEL,)) == []
    assert missing_in(tmp_path, (MODEL,)) == ["model_index.json"]
    snapshot = tmp_path / "models--own--na--me" / "snapshots" / COMMIT
    (snapshot / "mask_vae").mkdir(parents=True)
    for name in ("model_index.json", "mask_vae/config.json"):
        (snapshot / name).write_bytes((model_dir / name).read_bytes())
    assert "unet/model.safetensors" in missing_in(snapshot, (MODEL,))
    assert shown_name(snapshot) == f"own/na--me@{COMMIT}"
    assert shown_name(model_dir) == model_dir.name


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("owner/name:v1-5.safetensors", HubName("owner/name", file="v1-5.safetensors")),
        ("owner/name@v1:sub/a b.safetensors", HubName("owner/name", "v1", "sub/a b.safetensors")),
        ("hf://runs/x:a.safetensors", HubName("runs/x", file="a.safetensors")),
        ("runs/x:a.safetensors", None),
    ],
)
def test_names_of_one_file(word, name):
    assert hub_name(word) == name
    if name is not None:
        assert hub_name(f"hf://{name}") == name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "owner/name:v1-5.ckpt",
            "v1-5.ckpt is a pickle, which can run code; one file of the Hub is written owner/name",
        ),
        ("owner/name:", "no safetensors file"),
        ("owner/name:../x.safetensors", "no safetensors file"),
        ("owner/name:/x.safetensors", "no safetensors file"),
        ("owner/name:a.gguf", "no safetensors file"),
    ],
)
def test_names_of_files_that_are_not_taken(word, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        hub_name(word)
    assert "\n" not in str(caught.value)


def test_one_file_is_no_model():
    name = HubName("a/b", file="x.safetensors")
    assert files_of(name, ["unet/config.json", "x.safetensors"], (MODEL, DIFFUSERS)) == ["x.safetensors"]
    with pytest.raises(CheckpointError, match=r"a/b:x\.safetensors: no such file; there are y\.safetensors"):
        files_of(name, ["y.safetensors", "sub/z.safetensors", "x.ckpt"], (VAE,))
    with pytest.raises(CheckpointError, match=r"will do as model\.init_from or as an image VAE; .*leave out :x"):
        files_of(name, ["x.safetensors"], (MODEL,))
