"""`ldmseg push` and `push_to_hub`: what is sent, what is not, and the model card."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from ldmseg_fast import LDMSegPipeline, cli
from ldmseg_fast.checkpoints.hub_card import CardFacts, card_of, split_card
from ldmseg_fast.checkpoints.hub_push import PushSettings, push
from ldmseg_fast.checkpoints.shipped import SHIPPED
from ldmseg_fast.errors import ArgumentError, CheckpointError, HubError
from tests.checkpoints.test_hub import content_of, say_one_line

pytestmark = pytest.mark.serial  # servers


@pytest.fixture
def account(hub, monkeypatch):
    """The server, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def run_dir(model_dir, tmp_path):
    """A training run's folder: the model among what else a run leaves, and things of the user's."""
    folder = shutil.copytree(model_dir, tmp_path / "runs" / "mine")
    (folder / "logs").mkdir(exist_ok=True)
    records = [{"step": 5, "loss": 1.0}, {"step": 10, "val/pq": 41.237, "val/sq": 70.5, "val/rq": 58.0}]
    (folder / "logs" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "checkpoints" / "10").mkdir(parents=True)
    for name in ("checkpoints/10/optimizer.pt", "secret.env", "unet/notes.txt", "unet/old.bin", "settings.txt"):
        (folder / name).write_bytes(b"not the model's")
    settings = {"stage": "diffusion", "data": {"root": "/home/me/coco/", "val_split": "val2017"}}
    settings["model"] = {"init_from": "hf://CompVis/stable-diffusion-v1-4@" + "0" * 40, "mask_vae": "/home/me/ae"}
    (folder / "config.json").write_text(json.dumps(settings))
    card = (
        "# Mine\n\n| | |\n|---|---|\n| data | /home/me/coco |\n\n```\ndata.root=/home/me/coco\noutput_dir=/home/me/x/\n"
    )
    (folder / "README.md").write_text(card + "model.init_from=hf://CompVis/stable-diffusion-v1-4@00\n```\n")
    return folder


def files_at(hub, name="me/model", branch="main"):
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


class TestWhatIsSent:
    def test_the_models_files_and_nothing_else(self, account, run_dir, capsys):
        assert cli.main(["push", str(run_dir), "me/model", "--private"]) == 0
        said = capsys.readouterr().out
        sent = files_at(account)
        assert set(sent) - {".gitattributes"} == {
            *("README.md", "model_index.json", "image_vae/config.json", "image_vae/model.safetensors"),
            *(
                "mask_vae/config.json",
                "mask_vae/model.safetensors",
                "scheduler/config.json",
                "unet/config.json",
                "scheduler/scheduler_config.json",
            ),
            "unet/model.safetensors",
        }
        assert account.repositories["me/model"].private and account.messages[0]["summary"] == "Upload model at step 10"
        assert "unet/model.safetensors" in said and re.search(
            r"me/model \(new\): 10 files of [\d.]+ [kM]B to send", said
        )
        assert said.strip().splitlines()[-1].startswith(f"{account.url}/me/model/commit/")
        assert LDMSegPipeline.from_pretrained("me/model").info.image_size == 64

    def test_again_sends_what_has_changed(self, account, run_dir, capsys):
        address = push(run_dir, "me/model")
        count = len(account.messages)
        assert push(run_dir, "me/model") == f"{account.url}/me/model" != address
        assert len(account.messages) == count and "nothing to send, all 10 files are there" in capsys.readouterr().out
        index = json.loads((run_dir / "model_index.json").read_text())
        (run_dir / "model_index.json").write_text(json.dumps(index | {"num_inference_steps": 7}))
        account.requests.clear()
        push(run_dir, "me/model", PushSettings(message="seven steps"))
        assert (
            account.messages[-1]["files"] == ["model_index.json"] and account.messages[-1]["summary"] == "seven steps"
        )
        assert not any("/lfs/" in request for request in account.requests)

    def test_branches_and_pull_requests(self, account, run_dir):
        push(run_dir, "me/model")
        assert cli.main(["push", str(run_dir), "me/model", "--branch", "v2", "--license", "mit"]) == 0
        assert account.messages[-1]["branch"] == "v2" and b"license: mit" in files_at(account, branch="v2")["README.md"]
        assert b"license: mit" not in files_at(account)["README.md"]
        address = push(run_dir, "me/model", PushSettings(create_pr=True, facts=CardFacts(license="cc-by-4.0")))
        assert address == f"{account.url}/me/model/discussions/1" and account.messages[-1]["branch"] == "refs/pr/1"
        with pytest.raises(ArgumentError, match="a pull request is made against main"):
            push(run_dir, "me/model", PushSettings(create_pr=True, revision="v2"))

    def test_a_dry_run_sends_nothing(self, account, run_dir, capsys):
        assert cli.main(["push", str(run_dir), "me/model", "--dry-run"]) == 0
        assert "10 files of" in capsys.readouterr().out and "me/model" not in account.repositories

    def test_from_the_pipeline(self, account, model_dir):
        pipe = LDMSegPipeline.from_pretrained(model_dir)
        address = pipe.push_to_hub("me/model", private=True, message="from Python")
        assert (
            address.startswith(f"{account.url}/me/model/commit/") and account.messages[-1]["summary"] == "from Python"
        )

    def test_weights_arrive_bit_for_bit(self, account, run_dir):
        push(run_dir, "me/model")
        own = content_of(run_dir)
        sent = files_at(account)
        assert all(sent[name] == own[name] for name in sent if name not in ("README.md", ".gitattributes"))


class TestWhatIsRefused:
    def test_no_token(self, hub, model_dir, capsys):
        line = say_one_line(capsys, "push", str(model_dir), "me/model")
        assert "me/model: no token of the Hub here; log in with `hf auth login`, or set HF_TOKEN" in line
        assert hub.requests == []

    def test_a_wrong_token(self, hub, model_dir, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(HubError, match=r"does not take the token \(401\)"):
            push(model_dir, "me/model")

    def test_offline(self, account, model_dir, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            push(model_dir, "me/model")

    @pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "me/x.git", "../x", "me/"])
    def test_a_name_that_cannot_be(self, account, model_dir, name):
        with pytest.raises(ArgumentError, match="write owner/name"):
            push(model_dir, name)
        assert account.requests == []

    def test_private_is_not_promised_of_a_public_repository(self, account, model_dir):
        push(model_dir, "me/model")
        with pytest.raises(ArgumentError, match="public already"):
            push(model_dir, "me/model", PushSettings(private=True))

    def test_a_damaged_model(self, account, run_dir):
        weights = run_dir / "unet" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="damaged safetensors"):
            push(run_dir, "me/model")
        with pytest.raises(CheckpointError, match="no model_index"):
            push(run_dir / "logs", "me/model")
        assert account.requests == []

    @pytest.mark.parametrize(
        ("request_line", "status", "words"),
        [
            ("POST /api/repos/create", 403, r"forbids it \(403\); use a token that may write"),
            ("POST /api/models/me/model/commit", 412, "has changed meanwhile; run the command again"),
            ("POST /api/models/me/model/commit", 503, r"busy or out of order \(503\)"),
            ("POST /api/models/me/model/commit", 413, "the Hub answers 413"),
        ],
    )
    def test_what_the_hub_refuses_is_one_line(self, account, model_dir, request_line, status, words, capsys):
        account.failures = [(request_line, status, {})]
        line = say_one_line_on_stderr(capsys, "push", str(model_dir), "me/model")
        assert re.search(words, line)
        assert cli.main(["push", str(model_dir), "me/model"]) == 0  # and the next one succeeds

    def test_an_upload_that_fails_for_good(self, account, model_dir, capsys):
        account.failures = [("PUT /lfs/", 503, {})] * 30
        line = say_one_line_on_stderr(capsys, "push", str(model_dir), "me/model")
        assert "503" in line
        assert not account.messages  # nothing is half there

    def test_somebody_commits_meanwhile(self, account, run_dir):
        push(run_dir, "me/model")
        repository = account.repositories["me/model"]
        account.moves.append(
            ("POST /api/models/me/model/preupload", lambda: repository.commit({"README.md": b"theirs"}))
        )
        with pytest.raises(HubError, match="has changed meanwhile; run the command again"):
            push(run_dir, "me/model", PushSettings(facts=CardFacts(license="mit")))
        assert files_at(account) == {"README.md": b"theirs"}


def say_one_line_on_stderr(capsys, *arguments):
    assert cli.main([*arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


class TestTheCard:
    def test_says_what_was_measured(self, run_dir):
        card = card_of(run_dir, "me/model", CardFacts())
        values, text = split_card(card, "card")
        assert values["library_name"] == "ldmseg_fast" and values["pipeline_tag"] == "image-segmentation"
        assert values["base_model"] == "CompVis/stable-diffusion-v1-4" and values["datasets"] == ["coco"]
        assert values["widget"][0]["src"].startswith("http://images.cocodataset.org/")
        (model,) = values["model-index"]
        (result,) = model["results"]
        assert result["dataset"] == {"type": "coco", "name": "coco", "split": "val2017"}
        assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
            ("pq", 41.24), ("sq", 70.5), ("rq", 58.0)
        ]  # fmt: skip
        assert "license" not in values  # nobody has said one
        assert "/home/me" not in card and "data.root=coco\noutput_dir=x\n" in text and "| data | coco |" in text
        assert "model.init_from=hf://CompVis" in text

    def test_is_what_the_hubs_own_library_reads(self, run_dir):
        card = ModelCard(card_of(run_dir, "me/model", CardFacts(license="apache-2.0", widget=["http://x/y.png"])))
        assert card.data.license == "apache-2.0" and card.data.base_model == "CompVis/stable-diffusion-v1-4"
        assert [result.metric_value for result in card.data.eval_results] == [41.24, 70.5, 58.0]
        assert card.data.widget == [{"src": "http://x/y.png"}]

    def test_of_the_shipped_model(self):
        values, text = split_card(card_of(SHIPPED / "tiny", "me/tiny", CardFacts()), "card")
        assert values["license"] == "apache-2.0" and "widget" not in values and "base_model" not in values
        metrics = {each["type"]: each["value"] for each in values["model-index"][0]["results"][0]["metrics"]}
        assert metrics == {"pq": 57.06, "class_pq": 51.73}
        assert 'from_pretrained("me/tiny")' in text

    def test_numbers_that_are_not_there_are_not_claimed(self, model_dir, tmp_path):
        folder = shutil.copytree(model_dir, tmp_path / "x", ignore=shutil.ignore_patterns("logs", "README.md"))
        values, _ = split_card(card_of(folder, "me/model", CardFacts()), "card")
        assert "model-index" not in values and "metrics" not in values

    def test_of_the_repository_stays(self, run_dir):
        theirs = {
            "license": "mit",
            "language": ["en"],
            "model-index": [
                {
                    "name": "their name",
                    "results": [
                        {
                            "task": {"type": "image-segmentation"},
                            "dataset": {"type": "coco", "name": "COCO", "split": "val2017"},
                            "metrics": [{"type": "pq", "value": 1.0}, {"type": "their_own", "value": 2}],
                        },
                        {"task": {"type": "x"}, "dataset": {"type": "y", "name": "y"}, "metrics": []},
                    ],
                }
            ],
        }
        existing = f"---\n{yaml.safe_dump(theirs)}---\n# Their text\n\nwords\n"
        card = card_of(run_dir, "me/model", CardFacts(), existing)
        values, text = split_card(card, "card")
        assert text.strip() == "# Their text\n\nwords" and values["license"] == "mit" and values["language"] == ["en"]
        model = values["model-index"][0]
        assert model["name"] == "their name" and len(model["results"]) == 2
        metrics = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
        assert metrics == {"pq": 41.24, "sq": 70.5, "rq": 58.0, "their_own": 2}
        assert card_of(run_dir, "me/model", CardFacts(), card) == card  # once more changes nothing
        given = card_of(run_dir, "me/model", CardFacts(license="apache-2.0"), existing)
        assert split_card(given, "card")[0]["license"] == "apache-2.0"

    @pytest.mark.parametrize(
        "index", [3, [], [1], [{}], [{"results": 5}], [{"results": [{"task": 1, "metrics": [2]}]}]]
    )
    def test_any_model_index_is_taken(self, run_dir, index):
        card = card_of(run_dir, "me/model", CardFacts(), f"---\n{yaml.safe_dump({'model-index': index})}---\ntext")
        metrics = split_card(card, "card")[0]["model-index"][0]["results"][-1]["metrics"]
        assert {metric["type"] for metric in metrics} == {"pq", "sq", "rq"}

    def test_several_sets_are_all_named(self, tmp_path):
        root = "/home/me/msrc,/home/me/camvid:train:test"
        (tmp_path / "config.json").write_text(json.dumps({"data": {"root": root}}))
        text = f"| | |\n|---|---|\n| data | {root} |\n\n```\ndata.root={root}\n```\n"
        (tmp_path / "README.md").write_text(text)
        card = card_of(tmp_path, "me/x", CardFacts())
        assert ModelCard(card).data.datasets == ["msrc", "camvid"]
        assert "| data | msrc,camvid:train:test |" in card and "data.root=msrc,camvid:train:test\n" in card
        assert "/home/me" not in card

    @pytest.mark.parametrize("config", ["[]", '{"data": 3, "model": null}', '{"data": {"root": 5}}'])
    def test_any_config_is_taken(self, run_dir, config):
        (run_dir / "config.json").write_text(config)
        (run_dir / "README.md").write_bytes(b"\xff")
        assert split_card(card_of(run_dir, "me/model", CardFacts()), "card")[0]["library_name"] == "ldmseg_fast"

    @pytest.mark.parametrize("front", ["a: [", "- a\n- b", "a: b: c", "\t- x"])
    def test_with_damaged_front_matter_is_one_line(self, run_dir, front):
        with pytest.raises(HubError, match=r"README\.md of me/model: its front matter") as caught:
            card_of(run_dir, "me/model", CardFacts(), f"---\n{front}\n---\ntext")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content", ["", "text", "---\n---\ntext", "---\n\n---\n", "a\n---\nb\n---\n", "\ufeff---\na: 1\n---\n"]
    )
    def test_any_card_is_split(self, content):
        values, text = split_card(content, "card")
        assert values in ({}, {"a": 1}) and "---\n---" not in text


def test_a_run_on_several_sets_names_them_all(tmp_path):
    from ldmseg_fast.checkpoints.hub_card import front_matter

    (tmp_path / "config.json").write_text('{"data": {"root": "/home/me/first, /home/me/second:train:"}}')
    found = front_matter(tmp_path, "me/model", "| SQ | 70.0 |")
    assert found["datasets"] == ["first", "second"]
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == "first, second"
