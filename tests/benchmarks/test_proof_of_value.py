"""The proof of value sees every change of a number, and refuses what could show none."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import proof_of_value
from benchmarks.measuring.proof_records import ProofError, differences, digest, documents, losses, maps, plain
from benchmarks.proof_of_value import Checkout
from ldmseg_fast.distributed.ending import run_command

ROOT = Path(__file__).resolve().parents[2]
LOG = {"step": 1, "loss": 2.5, "ce": 1.0, "kl": 3.0, "lr": 1e-3, "images_per_s": 9.0, "data_wait": 0.1}


def test_equal_things_have_no_differences():
    found = {"a": {"b": [1, 2.5, None]}, "c": [math.nan]}
    assert differences(found, json.loads(json.dumps(found))) == []


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({"a": 1.0}, {"a": 1}, "x: a: 1.0 -> 1"),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 4}}, "x: a b: 1 -> 3, and 1 more"),
        ({"a": None}, {}, "x: a: there -> gone"),
        ({}, {"a": None}, "x: a: not there -> new"),
        ([{"loss": 1.0}, {"loss": 2.0}], [{"loss": 1.0}, {"loss": 2.5}], "x: [1] loss: 2.0 -> 2.5"),
        ([1], [1, 2], "x: length: 1 -> 2"),
        ([0.0], [-0.0], "x: [0]: 0.0 -> -0.0"),
        (1.0, math.nan, "x: the value: 1.0 -> NaN"),
        ({"a": 1}, [1], 'x: the value: {"a": 1} -> [1]'),
    ],
)
def test_each_difference_is_named_with_its_place(before, after, line):
    assert differences({"x": before, "same": 1}, {"x": after, "same": 1}) == [line]


def test_what_only_one_side_has_is_named():
    assert differences({"a": {"b": 1}}, {"c": None}) == ["a: only before", "c: only after"]


def test_only_exact_keys_of_times_are_left_out(tmp_path):
    report = {
        "seconds": 1.0, "seconds_per_image": 1.0, "sometimes": 1, "seconds_in_all": 2, "memory": 3, "version": "1",
        "updated": True, "rows": [{"seconds": 1.0, "path": f"{tmp_path}/maps"}],
    }  # fmt: skip
    kept = {"sometimes": 1, "seconds_in_all": 2, "memory": 3, "version": "1", "updated": True}
    assert plain(report, tmp_path) == kept | {"rows": [{"path": "WORK/maps"}]}


def write_log(folder, *records):
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_part_of_a_loss_is_compared(tmp_path):
    write_log(tmp_path, LOG, LOG | {"step": 2, "loss": 2.0, "skipped": 1}, {"step": 2, "val/pq": 50.0})
    found = losses(tmp_path)
    assert found[0] == {"step": 1, "loss": 2.5, "ce": 1.0, "kl": 3.0, "lr": 1e-3}
    assert found[1]["skipped"] == 1 and found[2] == {"step": 2, "val/pq": 50.0}


@pytest.mark.parametrize("records", [(), (LOG, LOG), ({"step": 2, "val/pq": 50.0},)])
def test_a_log_that_could_show_no_change_is_refused(tmp_path, records):
    write_log(tmp_path, *records)
    with pytest.raises(ProofError, match=r"log\.jsonl: no two losses differ"):
        losses(tmp_path)


def test_files_are_compared_by_their_bytes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(b"a")
    (tmp_path / "b.json").write_text(json.dumps({"seconds": 1, "path": str(tmp_path)}))
    before = digest(tmp_path)
    assert set(before) == {"deep/a.png", "b.json"} and set(digest(tmp_path, "*/*.png")) == {"deep/a.png"}
    (tmp_path / "deep" / "a.png").write_bytes(b"b")
    (line,) = differences({"maps": before}, {"maps": digest(tmp_path)})
    assert line.startswith("maps: deep/a.png: ")
    assert documents(tmp_path, tmp_path, "*.json") == {"b.json": {"path": "WORK"}}
    with pytest.raises(ProofError, match=r"no file \*\.safetensors"):
        digest(tmp_path, "*.safetensors")


def test_maps_that_could_show_no_change_are_refused(tmp_path):
    for name, content in (("1.png", b"a"), ("2.png", b"a"), ("1_overlay.png", b"b"), ("1.json", b"c")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ProofError, match="all maps are the same"):
        maps(tmp_path)
    (tmp_path / "2.png").write_bytes(b"d")
    assert len(maps(tmp_path)) == 4


@pytest.fixture
def prove(tmp_path, monkeypatch):
    """`prove({"before": ..., "after": ...}, *options)`: the exit code where the checkouts made these numbers."""

    def start(numbers, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(proof_of_value, "measure", lambda root, work, quick: _made(work, numbers[str(root)]))
        return run_command(lambda: proof_of_value.main(["before", "after", "--work", "work", *options]))

    return start


def _made(work, numbers):
    assert work.is_absolute()
    work.mkdir(parents=True, exist_ok=True)
    return numbers


def test_exit_codes(prove, tmp_path, capsys):
    assert prove({"before": {"losses": [1.0]}, "after": {"losses": [1.0]}}) == 0
    assert "equal: 1 things" in capsys.readouterr().out
    (tmp_path / "work" / "after" / "found.json").unlink()
    assert prove({"after": {"losses": [1.5]}}) == 1  # what was found before is read back
    out = capsys.readouterr().out
    assert "before: measured before" in out and "losses: [0]: 1.0 -> 1.5" in out


def test_a_record_of_another_protocol_is_refused(prove, tmp_path, capsys):
    assert prove({"before": {"a": 1}, "after": {"a": 1}}) == 0
    assert prove({}, "--quick") == 2
    err = capsys.readouterr().err
    assert "error:" in err and "delete the folder" in err
    record = tmp_path / "work" / "before" / "found.json"
    record.write_text('{"a": 1}')  # without a fingerprint
    assert prove({}) == 2


def test_what_fails_is_shown(tmp_path):
    with pytest.raises(ProofError, match="no checkout of ldmseg_fast"):
        Checkout(tmp_path, tmp_path / "work")
    tree = Checkout(ROOT, tmp_path / "work")
    assert tree.run("-c", "print('out')") == "out\n"
    with pytest.raises(ProofError, match=r"exit code 3 of .*(?s:.)*why it failed"):
        tree.run("-c", "import sys; print('why it failed', file=sys.stderr); sys.exit(3)")


def test_another_package_in_its_place_is_refused(tmp_path):
    """A tree that Python does not import from would be compared with itself."""
    (tmp_path / "ldmseg_fast").mkdir()
    (tmp_path / "ldmseg_fast" / "train.py").touch()
    (tmp_path / "ldmseg_fast" / "__init__.py").write_text("__path__.append('elsewhere'); __file__ = '/elsewhere/x.py'")
    (tmp_path / "ldmseg_fast" / "native.py").write_text("_C = 1")
    with pytest.raises(ProofError, match=r"Python imports /elsewhere/x\.py"):
        Checkout(tmp_path, tmp_path / "work")


def test_all_settings_of_a_preset_are_read(tmp_path):
    found = Checkout(ROOT, tmp_path).defaults("tiny")
    assert found["loss.kl"] == "1e-06" and found["num_inference_steps"] == "10"
    assert found["DeepSpeed"]["zero_optimization"]["stage"] == 0


@pytest.mark.soak
def test_a_checkout_equals_itself(script, tmp_path):
    done = script("proof_of_value", ROOT, ROOT, "--quick", "--work", tmp_path, timeout=1800)
    assert done.returncode == 0 and "equal:" in done.stdout, done.stderr
