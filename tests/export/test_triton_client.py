"""The client that lies in a Triton repository, over a stand-in for `tritonclient`."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.export import triton_client


class RefusedError(Exception):
    """What `tritonclient.utils` calls InferenceServerException."""


class Tensor:
    def __init__(self, name, shape=(), kind=""):
        self.name, self.shape, self.kind = name, shape, kind

    def set_data_from_numpy(self, values):
        assert list(values.shape) == self.shape
        self.values = values


@pytest.fixture
def server(monkeypatch):
    """A server whose map of a picture is as large as its file's text says, and full of the seed."""
    requests = []

    def answer(inputs):
        image, seed = ({item.name: item for item in inputs}[name] for name in ("image", "seed"))
        assert (image.kind, seed.kind) == ("BYTES", "INT64")
        requests.append([bytes(content) for content in image.values[:, 0]])
        if b"bad" in requests[-1]:
            raise RefusedError("picture 0 of the request: cannot identify image file")
        sizes = [tuple(map(int, content.split())) for content in requests[-1]]
        maps = np.stack([np.full(size, value, np.int32) for size, value in zip(sizes, seed.values[:, 0])])
        infos = np.array([[json.dumps([{"id": 1}]).encode()] for _ in sizes], object)
        return SimpleNamespace(as_numpy={"segmentation": maps, "segments_info": infos}.__getitem__)

    class Http:
        def __init__(self, url, concurrency, network_timeout):
            self.url = url

        def async_infer(self, model, inputs, outputs):
            return SimpleNamespace(get_result=lambda: answer(inputs))

    class Grpc:
        def __init__(self, url):
            self.url = url

        def async_infer(self, model, inputs, callback, outputs, client_timeout):
            try:
                callback(answer(inputs), None)
            except RefusedError as error:
                callback(None, error)

    modules = {"http": {"InferenceServerClient": Http}, "grpc": {"InferenceServerClient": Grpc}}
    modules["utils"] = {"InferenceServerException": RefusedError}
    for name, members in modules.items():
        module = ModuleType(f"tritonclient.{name}")
        vars(module).update(members, InferInput=Tensor, InferRequestedOutput=Tensor)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    return requests


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{name}.jpg" for name in ("a", "b", "c")]
    for path, text in zip(paths, ("2 3", "4 5", "2 3")):
        path.write_text(text)
    return [str(path) for path in paths]


@pytest.mark.parametrize("option", [[], ["--grpc"]], ids=["http", "grpc"])
def test_one_and_many(server, pictures, tmp_path, capsys, option):
    assert triton_client.main([pictures[0], *option]) == 0
    assert capsys.readouterr().out == f"{pictures[0]}: 3x2, 1 segments\n"
    assert triton_client.main([*pictures, *option, "--seed", "7", "--out", str(tmp_path / "maps")]) == 0
    assert [len(request) for request in server] == [1, 1, 1, 1]
    assert np.array(Image.open(tmp_path / "maps" / "b_map.png")).tolist() == [[7] * 5] * 4
    assert triton_client.main([pictures[0], pictures[2], *option, "--together"]) == 0
    assert server[-1] == [b"2 3", b"2 3"]


@pytest.mark.parametrize("option", [[], ["--grpc"]], ids=["http", "grpc"])
def test_many_more_than_at_a_time(server, tmp_path, option):
    client = triton_client.Client("127.0.0.1:1", bool(option))
    sizes = [(1, 1 + index) for index in range(3 * triton_client.AT_A_TIME)]
    contents = (f"{height} {width}".encode() for height, width in sizes)
    assert [found.shape for found, _ in client.segment_many(contents)] == sizes


@pytest.mark.parametrize("option", [[], ["--grpc"]], ids=["http", "grpc"])
def test_what_goes_wrong_is_one_line(server, pictures, tmp_path, capsys, option):
    (tmp_path / "bad.jpg").write_text("bad")
    assert triton_client.main([str(tmp_path / "bad.jpg"), *option]) == 1
    assert capsys.readouterr().err == "client.py: picture 0 of the request: cannot identify image file\n"
    assert triton_client.main([str(tmp_path / "none.jpg"), *option]) == 1
    assert "none.jpg" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit):
        triton_client.main([pictures[0], str(tmp_path / "other" / "a.png"), *option, "--out", str(tmp_path / "maps")])
    assert "two pictures of one name" in capsys.readouterr().err
