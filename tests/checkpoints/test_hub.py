"""Models come from the Hub: from its cache laid out by hand, and from a server that speaks its API."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download

from ldmseg_fast import LDMSegPipeline, cli
from ldmseg_fast.checkpoints import hub as hub_module
from ldmseg_fast.checkpoints import hub_errors
from ldmseg_fast.checkpoints.hub_names import DIFFUSERS, MODEL, VAE
from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.commands.data_cache import load_encoder
from ldmseg_fast.config import load_config
from ldmseg_fast.errors import CheckpointError, HubError
from ldmseg_fast.training.inputs import pin_hub_names
from tests.checkpoints.hub_server import HubServer, Repository
from tests.checkpoints.test_init_from import SD15, write_stable_diffusion
from tests.checkpoints.test_single_file import make_networks, write

pytestmark = pytest.mark.serial  # servers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lay_out(cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT, branch: str = "main") -> Path:
    """Writes a repository into a cache as huggingface_hub documents it: refs, snapshots of links, blobs."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for number, (file, content) in enumerate(files.items()):
        blob, link = folder / "blobs" / f"{number:040x}", folder / "snapshots" / commit / file
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def repository(hub: HubServer, model_dir: Path) -> Repository:
    """me/model, with more in it than a model needs."""
    made = hub.repositories["me/model"] = Repository()
    made.commit(content_of(model_dir) | {"pytorch_model.bin": b"pickle", "unet/x.pt": b"p", "run.py": b"import os"})
    return made


def say_one_line(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Runs a command that the user has to mend, and returns its line."""
    assert cli.main([*arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


class TestFromTheCache:
    def test_without_a_network(self, cache, model_dir, monkeypatch, capsys):
        snapshot = lay_out(cache, "me/model", content_of(model_dir))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("me/model", "hf://me/model", f"me/model@{COMMIT}", "me/model@main"):
            assert LDMSegPipeline.from_pretrained(name).info.folder == snapshot
        assert LDMSegPipeline.from_pretrained("me/model", revision=COMMIT).info.folder == snapshot
        assert f"me/model: commit {COMMIT}, from the cache" in capsys.readouterr().err

    def test_a_wrong_name_is_one_line(self, cache, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
        line = say_one_line(capsys, "predict", "me/modle", "x.png", "--out", str(tmp_path / "out"))
        assert (
            "me/modle: no such folder here, HF_HUB_OFFLINE is set, and the cache" in line and "check the name" in line
        )

    def test_part_of_a_model_is_none(self, cache, model_dir, monkeypatch):
        files = content_of(model_dir)
        del files["unet/model.safetensors"]
        snapshot = lay_out(cache, "me/model", files)
        (snapshot / "mask_vae" / "config.json").resolve().unlink()  # the link leads nowhere
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"has it without mask_vae/config\.json, unet/model\.safetensors"):
            resolve_model_dir("me/model")

    def test_no_answer_takes_the_branchs_last_commit_and_says_so(self, cache, model_dir, capsys):
        snapshot = lay_out(cache, "me/model", content_of(model_dir))
        assert resolve_model_dir("me/model") == snapshot
        said = capsys.readouterr().err
        assert "no connection to http://127.0.0.1:9" in said and f"taking commit {COMMIT} from the cache" in said
        with pytest.raises(HubError, match="me/other: no connection to"):
            resolve_model_dir("me/other")

    def test_an_own_folder_goes_first(self, cache, model_dir):
        lay_out(cache, "me/model", {"model_index.json": b"{}"})
        shutil.copytree(model_dir, "me/model")
        assert LDMSegPipeline.from_pretrained("me/model").info.folder == Path("me/model")

    def test_environment_variables_reach_a_command(self, cache, model_dir, scenes, tmp_path):
        lay_out(tmp_path / "home" / "hub", "me/model", content_of(model_dir))
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment = {key: value for key, value in environment.items() if key != "HF_HUB_CACHE"}
        picture = next((scenes / "val2017").glob("*.png"))
        command = [sys.executable, "-m", "ldmseg_fast.cli", "predict", "me/model", str(picture), "--out", "out"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        assert (Path("out") / f"{picture.stem}.json").is_file()


class TestFromAServer:
    def test_only_what_a_model_needs(self, hub, repository, model_dir, capsys):
        pipe = LDMSegPipeline.from_pretrained("me/model")
        said = capsys.readouterr().err
        assert hub.downloads() == sorted(set(content_of(model_dir)) - {"logs/log.jsonl"})
        assert f"me/model: commit {repository.branches['main']}, " in said and "downloading" in said and "MB" in said
        image = torch.zeros(1, 64, 64, 3, dtype=torch.uint8).numpy()[0]
        own = LDMSegPipeline.from_pretrained(model_dir)
        assert torch.equal(
            pipe([image], 2, output_type="logits"), own([image], 2, output_type="logits")
        )  # the same weights
        hub.requests.clear()
        assert resolve_model_dir("me/model") == pipe.info.folder
        assert hub.downloads() == [] and "from the cache" in capsys.readouterr().err

    def test_a_revision_is_a_branch_or_a_commit(self, hub, repository, model_dir):
        old = repository.branches["main"]
        new = repository.commit(content_of(model_dir) | {"README.md": b"new"}, "v2")
        assert resolve_model_dir("me/model", "v2").name == new
        assert resolve_model_dir(f"me/model@{old}").name == old
        hub.requests.clear()
        assert resolve_model_dir(f"me/model@{old}").name == old
        assert hub.requests == []  # a commit never changes
        with pytest.raises(HubError, match="me/model@v3: the repository has no such branch, tag or commit"):
            resolve_model_dir("me/model@v3")

    def test_a_branch_that_moves_gives_one_commit_at_a_time(self, hub, repository, model_dir, monkeypatch):
        old = repository.branches["main"]
        files = content_of(model_dir)

        def move() -> None:
            repository.commit(files | {"unet/config.json": b"{}", "model_index.json": b"{}"})

        hub.moves.append((r"GET /api/models/me/model/tree", move))
        folder = resolve_model_dir("me/model")
        assert folder.name == old and content_of(folder)["unet/config.json"] == files["unet/config.json"]
        assert LDMSegPipeline.from_pretrained(f"me/model@{old}")
        assert resolve_model_dir("me/model").name == repository.branches["main"] != old
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_model_dir("me/model").name == repository.branches["main"]  # the branch is remembered

    def test_a_cut_download_goes_on(self, hub, repository, model_dir, monkeypatch, capsys):
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        hub.cuts["unet/model.safetensors"] = 1
        folder = resolve_model_dir("me/model")
        assert content_of(folder)["unet/model.safetensors"] == content_of(model_dir)["unet/model.safetensors"]
        assert len(hub.ranges) == 1 and hub.ranges[0].startswith("unet/model.safetensors bytes=")
        assert len(capsys.readouterr().err.strip().splitlines()) == 1

    def test_a_connection_that_is_cut_again_and_again_is_one_line(self, hub, repository, capsys, tmp_path):
        hub.cuts["unet/model.safetensors"] = 100
        arguments = ("predict", "me/model", "x.png", "--out", str(tmp_path / "out"))
        assert cli.main([*arguments]) == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert "error: me/model: no connection to" in line and "run it again" in line
        hub.cuts.clear()
        hub.requests.clear()
        resolve_model_dir("me/model")
        assert "unet/config.json" not in hub.downloads()  # what was whole stays

    @pytest.mark.parametrize(("status", "headers"), [(503, {}), (429, {"Retry-After": "3"}), (502, {})])
    def test_a_busy_hub_is_asked_again(self, hub, repository, status, headers, monkeypatch):
        waited = []
        monkeypatch.setattr(hub_errors.time, "sleep", waited.append)
        hub.failures = [("GET /api/models", status, headers)] * 2
        assert resolve_model_dir("me/model").name == repository.branches["main"]
        assert waited == ([3.0, 3.0] if headers else [1.0, 2.0])

    def test_a_hub_that_stays_busy_is_one_line(self, hub, repository, capsys, tmp_path):
        hub.failures = [("GET /api/models", 503, {})] * 3
        line = say_one_line(capsys, "predict", "me/model", "x.png", "--out", str(tmp_path / "out"))
        assert "is busy or out of order (503); try again later" in line

    def test_what_is_no_hub_is_one_line(self, hub, monkeypatch, capsys, tmp_path):
        for answer in (b"<html>", b"\xff", b"[]", b"{}", b'{"id": "me/model", "sha": null}'):
            hub.repositories["me/model"] = Repository(branches={"main": COMMIT}, commits={COMMIT: {}})
            hub.raw = answer
            line = say_one_line(capsys, "predict", "me/model", "x.png", "--out", str(tmp_path / "out"))
            assert f"me/model: {hub.url} does not answer as a Hub does; check HF_ENDPOINT" in line

    def test_a_file_that_fails_is_asked_for_again(self, hub, repository):
        hub.failures = [("GET /me/model/resolve/.*/model_index.json", 503, {})]
        assert resolve_model_dir("me/model").name == repository.branches["main"]

    def test_a_part_is_not_taken_for_the_whole(self, hub, repository, cache, model_dir):
        commit = repository.branches["main"]
        lay_out(cache, "me/model", {"model_index.json": content_of(model_dir)["model_index.json"]}, commit)
        hub.failures = [("GET /api/models/me/model/tree", 503, {})] * 9
        with pytest.raises(HubError, match=r"did not come; run it again"):
            resolve_model_dir("me/model")

    def test_a_full_disk_is_one_line(self, hub, repository, monkeypatch, cache):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(file_download, "http_get", full)
        with pytest.raises(HubError, match=rf"me/model: no space left in {cache}; free some, or set HF_HOME"):
            resolve_model_dir("me/model")

    @pytest.mark.parametrize("name", ["me/modle", "nobody/model"])
    def test_a_wrong_name(self, hub, repository, name, capsys, tmp_path):
        line = say_one_line(capsys, "evaluate", name, "--data", str(tmp_path))
        assert (
            f"{name}: no such folder here, and {hub.url} has no model of this name, or it is private; check the name"
            in line
        )

    def test_private_repositories_ask_for_a_token(self, hub, repository, monkeypatch):
        repository.private = True
        with pytest.raises(HubError, match=r"or it is private; .* log in with `hf auth login`, or set HF_TOKEN"):
            resolve_model_dir("me/model")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(HubError, match=r"does not take the token \(401\)"):
            resolve_model_dir("me/model")
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert resolve_model_dir("me/model").name == repository.branches["main"]

    def test_gated_repositories_ask_for_consent(self, hub, repository):
        repository.gated = True
        with pytest.raises(
            HubError, match=rf"me/model: gated; accept its conditions at {hub.url}/me/model, then log in"
        ):
            resolve_model_dir("me/model")

    def test_other_repositories_are_refused_before_a_download(self, hub, repository):
        hub.repositories["me/bert"] = Repository()
        hub.repositories["me/bert"].commit({"config.json": b"{}", "model.safetensors": b"x"})
        with pytest.raises(CheckpointError, match=r"me/bert: a model folder .* its files are config.json"):
            resolve_model_dir("me/bert")
        assert hub.downloads() == []

    def test_files_beside_the_model_cannot_leave_the_cache(self, hub, repository, model_dir, cache):
        repository.commit(content_of(model_dir) | {"unet/../../../../evil.json": b"x", "/evil.json": b"x"})
        resolve_model_dir("me/model")
        assert not list(cache.parent.rglob("evil.json"))

    def test_a_missing_package_is_one_line(self, cache, monkeypatch, capsys, tmp_path):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        line = say_one_line(capsys, "predict", "me/model", "x.png", "--out", str(tmp_path / "out"))
        assert "pip install 'ldmseg_fast[hub]'" in line

    def test_commands_take_names(self, hub, repository, scenes, tmp_path, capsys):
        picture = str(next((scenes / "val2017").glob("*.png")))
        assert cli.main(["predict", "me/model", picture, "--out", "results", "--steps", "1"]) == 0
        old = repository.branches["main"]
        arguments = [
            "evaluate",
            "me/model",
            "--revision",
            old,
            "--data",
            str(scenes),
            "--limit",
            "2",
            "--json",
            "r.json",
        ]
        assert cli.main([*arguments, "--steps", "1", "--no-baselines"]) == 0
        assert f'"model": "me/model@{old}"' in Path("r.json").read_text()


class TestStableDiffusion:
    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory):
        """A small Stable Diffusion repository with all that such repositories have beside unet/ and vae/."""
        files = content_of(write_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd", SD15))
        weights = files["unet/diffusion_pytorch_model.safetensors"]
        return files | {
            "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
            "unet/diffusion_pytorch_model.non_ema.safetensors": weights,
            "unet/diffusion_pytorch_model.bin": b"pickle",
            "text_encoder/model.safetensors": b"text",
            "safety_checker/pytorch_model.bin": b"pickle",
            "v1-5-pruned.ckpt": b"pickle",
            "v1-5-pruned.safetensors": b"whole",
        }

    def test_the_needed_files_start_a_training(self, hub, files, tmp_path):
        made = hub.repositories["me/sd"] = Repository()
        made.commit(files)
        folder = resolve_model_dir("me/sd", kinds=(MODEL, DIFFUSERS))
        assert hub.downloads() == [
            *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"),
            *("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
        ]
        settings = ["mask_vae.latent_channels=4", "image_encoder.kind=autoencoder_kl"]
        start = resolve_start(load_config("coco", [*settings, "model.init_from=me/sd"]))
        assert start.unet == folder / "unet" and start.config.unet.block_out_channels == (8, 16)

    def test_the_image_vae_alone(self, hub, files):
        made = hub.repositories["me/sd"] = Repository()
        made.commit(files)
        folder = resolve_model_dir("me/sd", kinds=(VAE,))
        assert hub.downloads() == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        hub.requests.clear()
        assert resolve_model_dir("me/sd", kinds=(MODEL, DIFFUSERS)) == folder  # and then the rest of the commit
        assert "unet/diffusion_pytorch_model.safetensors" in hub.downloads()

    def test_a_repository_of_a_vae_and_the_vae_of_a_model(self, hub, files):
        hub.repositories = {"me/sd": Repository(), "me/vae": Repository()}
        hub.repositories["me/sd"].commit(files)
        own = {name.removeprefix("vae/"): data for name, data in files.items() if name.startswith("vae/")}
        hub.repositories["me/vae"].commit(own | {"diffusion_pytorch_model.bin": b"pickle"})
        for name in ("me/vae", "me/sd"):
            start = resolve_start(
                load_config("coco", ["image_encoder.kind=autoencoder_kl", f"image_encoder.path={name}"])
            )
            assert start.config.image_encoder.scaling_factor == 0.25
            encoder, settings = load_encoder(name, 64)  # of `ldmseg data cache`
            assert settings.scaling_factor == 0.25 and not encoder.training
        assert not any(name.startswith("unet/") or name.endswith(".bin") for name in hub.downloads())

    def test_pickles_alone_are_refused(self, hub, files):
        made = hub.repositories["me/sd"] = Repository()
        made.commit({name: data for name, data in files.items() if not name.endswith(".safetensors")})
        with pytest.raises(CheckpointError, match="me/sd: no safetensors files in unet, and pickles are not fetched"):
            resolve_model_dir("me/sd", kinds=(MODEL, DIFFUSERS))
        assert hub.downloads() == []


def test_ranks_agree_on_the_first_ranks_commit(hub, repository, model_dir, monkeypatch):
    from torch.distributed import HashStore, distributed_c10d

    old = repository.branches["main"]
    store = HashStore()
    monkeypatch.setattr(hub_module.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    assert resolve_model_dir("me/model").name == old
    repository.commit(content_of(model_dir) | {"README.md": b"moved"})
    assert resolve_model_dir("me/model").name == old


def test_a_dry_run_fetches_no_weights_and_the_run_after_it_does(hub, model_dir):
    from ldmseg_fast import train

    files = content_of(write_stable_diffusion(Path("sd").absolute(), SD15))
    hub.repositories["me/sd"] = Repository()
    commit = hub.repositories["me/sd"].commit(files)
    hub.repositories["me/model"] = Repository()
    hub.repositories["me/model"].commit(content_of(model_dir))
    settings = ["mask_vae.latent_channels=4", "image_encoder.kind=autoencoder_kl", f"model.init_from=me/sd@{commit}"]
    assert train.main(["diffusion", "--config", "coco", "--dry-run", *settings]) == 0
    assert train.main(["one_step", "--dry-run", "model.init_from=me/model"]) == 0
    assert hub.downloads() and not any(name.endswith(".safetensors") for name in hub.downloads())
    for name, kinds in ((f"me/sd@{commit}", (MODEL, DIFFUSERS)), (f"me/sd@{commit}", (VAE,)), ("me/model", (MODEL,))):
        folder = resolve_model_dir(name, kinds=kinds)
        found = folder / ("vae" if kinds == (VAE,) else "unet")
        assert list(found.glob("*.safetensors"))


def test_graphs_for_triton_and_the_image_vae_of_a_checkpoint(hub, tmp_path, monkeypatch):
    from export import to_triton
    from ldmseg_fast.checkpoints import original
    from ldmseg_fast.checkpoints.shipped import resolve_image_vae
    from ldmseg_fast.export import triton_repository

    hub.repositories["me/graphs"] = Repository()
    hub.repositories["me/graphs"].commit({"export.json": b"{}", "unet.onnx": b"graph", "unet.plan": b"code"})
    taken = []
    monkeypatch.setattr(triton_repository, "write_repository", lambda source, *rest: taken.append(source) or [])
    assert to_triton.main(["me/graphs", "--out", "repository"]) == 0
    assert sorted(path.name for path in taken[0].iterdir()) == ["export.json", "unet.onnx"]
    files = content_of(write_stable_diffusion(Path("sd").absolute(), SD15))
    hub.repositories["me/sd"] = Repository()
    hub.repositories["me/sd"].commit(files)
    assert resolve_image_vae("vae.json") == Path("vae.json") and resolve_image_vae("./me/sd") == Path("me/sd")
    seen = []
    monkeypatch.setattr("ldmseg_fast.checkpoints.safe_pickle.load_torch_file", lambda _: {"unet": {}})
    monkeypatch.setattr(original, "_model", lambda *words: seen.append(words[3]) or ([], {}))
    assert cli.main(["convert", "x.pt", "--out", str(tmp_path / "made"), "--image-vae", "me/sd"]) == 0
    assert (seen[0] / "vae" / "config.json").is_file() and not (seen[0] / "unet").exists()


def test_training_starts_from_one_file_of_the_hub(hub, tmp_path, monkeypatch, capsys):
    """Alone of a repository's files it is fetched, a run's records name its commit, and the cache does for the next."""
    write(tmp_path / "file", make_networks())
    content = (tmp_path / "file" / "model.safetensors").read_bytes()
    made = hub.repositories["me/sd"] = Repository()
    commit = made.commit({"sub/v1.safetensors": content, "v1.ckpt": b"pickle", "unet/config.json": b"{}"})
    settings = [
        "unet.norm_groups=32",
        "unet.num_heads=8,8",
        "unet.block_out_channels=32,64",
        "unet.attention=true,false",
    ]
    config = load_config("coco", [*settings, "model.init_from=me/sd:sub/v1.safetensors", "data.root=x"])
    pinned = pin_hub_names(config, None)
    assert pinned.model.init_from == f"hf://me/sd@{commit}:sub/v1.safetensors"
    start = resolve_start(pinned)
    assert start.unet is not None and start.unet.read_bytes() == content and start.image_vae == start.unet
    assert hub.downloads() == ["sub/v1.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_start(config).unet == start.unet
    assert f"me/sd@{commit}:sub/v1.safetensors: commit {commit}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"leave out :sub/v1\.safetensors"):
        resolve_model_dir("me/sd:sub/v1.safetensors")
