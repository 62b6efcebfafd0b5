"""JSON and YAML as Windows programs write them: UTF-8 with a byte order mark is read, UTF-16 is named."""

import codecs
import json
import shutil

import pytest

from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.config.presets import load_config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import CheckpointError, ConfigError, DataError
from ldmseg_fast.files import read_json, read_text, text_of
from ldmseg_fast.training.deepspeed_settings import read_user_config

VALUES = {"train": {"steps": 7}}


def test_the_mark_of_utf_8_is_no_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(VALUES).encode())
    assert read_text(path) == json.dumps(VALUES)
    assert read_json(path) == VALUES
    assert load_config(str(path), []).train.steps == 7
    path.write_bytes(codecs.BOM_UTF8 + b'{"steps_per_print": 7}')
    assert read_user_config(path) == {"steps_per_print": 7}
    assert text_of(b"") == "" and text_of("ä\r\n".encode()) == "ä\r\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(VALUES).encode(encoding))
    readers = ((read_json, CheckpointError), (read_user_config, ConfigError), (load_config, ConfigError))
    for read, error in readers:
        with pytest.raises(error, match=r"a\.json.*the file is UTF-(16|32).*save it as UTF-8"):
            read(path)


def test_a_model_folder_and_a_data_set_with_marks(model_dir, scenes, tmp_path):
    model, data = (shutil.copytree(folder, tmp_path / name) for folder, name in ((model_dir, "m"), (scenes, "d")))
    for path in (model / "model_index.json", data / "annotations" / "panoptic_val2017.json"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert load_index(model) == load_index(model_dir)
    assert len(CocoPanoptic(data, "val2017", 64)) == len(CocoPanoptic(scenes, "val2017", 64))
    path.write_bytes(path.read_bytes()[3:].decode().encode("utf-16"))
    with pytest.raises(
        DataError, match=r"panoptic_val2017\.json: not a JSON file .*the file is UTF-16: save it as UTF-8"
    ):
        CocoPanoptic(data, "val2017", 64)
