"""YAML of strangers: one clear error in no time, whatever it holds."""

import time
from dataclasses import replace

import pytest
import yaml

from ldmseg_fast.config import PRESETS, load_config, to_dict
from ldmseg_fast.config.yaml_file import parse_yaml
from ldmseg_fast.errors import ConfigError

LAUGHS = "a0: &a0 [1, 1]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n"
    for n in range(1, 40)
)


def test_a_preset_written_out_is_the_preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(to_dict(PRESETS["tiny"])))
    assert load_config(str(path)) == load_config("tiny")


def test_aliases_and_merges_that_stay_small_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: &train {steps: 7}\nloss: {kl: &kl 0.5, bce: *kl}\n")
    config = load_config(str(path))
    assert config == replace(config, train=replace(config.train, steps=7), loss=replace(config.loss, kl=0.5, bce=0.5))
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "f") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"its aliases \(\*NAME\) make over 10000 values"),
        ("train: &a\n  steps: [*a]", "an alias inside the value that it names"),
        ("[" * 20_000, "lists in lists without end|not readable"),
        ("train: {steps: 1}\n---\ntrain: {steps: 2}", "expected a single document"),
        ("train:\n  steps: 1\n  seed: 2\n  steps: 3", "line 4: steps is there twice"),
        ("train: {steps: 1}\ntrain: {seed: 1}", "line 2: train is there twice"),
        ("train: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("train: {stepz: 1}", "unknown setting train.stepz; did you mean train.steps"),
        ("trains: {steps: 1}", "unknown setting trains; did you mean train"),
        ("train: [1, 2]", r"train: a group of settings, not \[1, 2\]"),
        ("train: null", "a group of settings"),
        ("train: {steps: {a: 1}}", "train.steps=.*a whole number expected"),
        ("train: {steps: .nan}", "a whole number expected"),
        ("train: {learning_rate: .inf}", "train.learning_rate=inf"),
        ("train: {steps: 0x" + "f" * 9000 + "}", "train.steps"),
        ("train: {steps: " + "9" * 9000 + "}", "not readable|train.steps"),
        ("mask_vae: {widths: [" + "1, " * 5_000 + "1]}", "mask_vae.widths"),
        ("output_dir: " + "x" * 50_000 + "\0", "not readable"),
        ("a" * (2 << 20), "2048 KiB of settings"),
        ("a" * (1 << 17), "128 KiB of settings"),
        ("? [a]\n: 1", "not readable"),
        ("3", "a mapping of settings expected"),
        ("", "a mapping of settings expected"),
        ("a: 'open", "not readable"),
        ("train: {steps: !!int ''}", "does not fit its tag"),
        ("train: {learning_rate: !!float ''}", "does not fit its tag"),
        ("train: {steps: !!bool maybe}", "does not fit its tag"),
        ("train: {steps: !!timestamp x}", "does not fit its tag"),
    ],
)
def test_hostile_files(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path))
    assert "run.yaml" in str(error.value)
    assert time.process_time() - begun < 5
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
