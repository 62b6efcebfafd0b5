"""Only regular files are read: what would wait or never end is refused at once, by name."""

import os
import socket
import time
from pathlib import Path

import pytest

from ldmseg_fast.checkpoints.safe_pickle import load_torch_file
from ldmseg_fast.checkpoints.tensors import load_weights
from ldmseg_fast.config import load_config
from ldmseg_fast.data.folders import read_dense_map
from ldmseg_fast.data.pictures import read_picture
from ldmseg_fast.errors import CheckpointError, ConfigError, DataError, PanopticFormatError, UserError
from ldmseg_fast.files import open_file, read_file, read_json, read_text, require_file, sha256
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.format import load_panoptic_json, read_panoptic_png
from ldmseg_fast.training.deepspeed_settings import read_user_config


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path / "pipe.png"


def test_what_is_no_regular_file(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, what in (
            (pipe, "a named pipe"),
            (tmp_path / "link", "a named pipe"),
            (tmp_path / "socket", "a socket"),
            (tmp_path, "a folder"),
            ("/dev/zero", "a device"),
            ("/dev/null", "a device"),
        ):
            for read in (require_file, open_file, read_file, read_text):
                with pytest.raises(ConfigError, match=f"{path}: {what}, not a readable file"):
                    read(path, ConfigError)


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    require_file(path)
    (tmp_path / "link").symlink_to(path)
    assert read_file(tmp_path / "link") == path.read_bytes()
    assert read_text(str(path)) == "[1]" and read_json(path) == [1]
    with pytest.raises(DataError, match=r"file\.json: 6 bytes, over 5 bytes"):
        read_file(path, max_bytes=5)
    for read in (require_file, open_file, read_file):
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            read(tmp_path / "none.json")
        with pytest.raises(DataError, match=r"'a.x00b': a null character in the name of a file"):
            read("a\0b")


def test_every_reader_refuses_a_pipe_at_once(pipe: Path) -> None:
    started = time.monotonic()
    for read, kind in (
        (read_panoptic_png, PanopticFormatError),
        (lambda path: read_dense_map(path, [1]), PanopticFormatError),
        (load_panoptic_json, PanopticFormatError),
        (index_annotations, PanopticFormatError),
        (lambda path: evaluate_files(path, path), PanopticFormatError),
        (read_json, CheckpointError),
        (sha256, CheckpointError),
        (load_weights, CheckpointError),
        (lambda path: load_config(str(path)), ConfigError),
        (read_user_config, ConfigError),
    ):
        with pytest.raises(kind, match=r"pipe\.png") as error:
            read(pipe)
        assert isinstance(error.value, UserError)
    assert time.monotonic() - started < 30


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    """A clone without `git lfs pull` has pointers in the place of pictures, maps, annotations and weights."""
    path = tmp_path / "file"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
    for read in (read_picture, read_panoptic_png, load_panoptic_json, load_torch_file, load_weights, read_json):
        with pytest.raises(UserError, match=r"file: a pointer of Git LFS.*`git lfs pull`"):
            read(path)
