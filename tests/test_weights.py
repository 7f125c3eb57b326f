"""Weight files are read and written without running code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from scalenet_ray.models.weights import load_weights, save_weights


def test_safetensors_give_back_tensors_and_metadata(tmp_path: Path) -> None:
    path = str(tmp_path / "net.safetensors")
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
    save_weights(tensors, {"detector": "x"}, path)
    loaded, metadata = load_weights(path)
    assert metadata == {"detector": "x"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_weights_go_to_s3_and_come_back(s3_bucket: str) -> None:
    save_weights({"a": torch.ones(2)}, {"detector": "x"}, f"{s3_bucket}/nets/net.safetensors")
    loaded, metadata = load_weights(f"{s3_bucket}/nets/net.safetensors")
    assert loaded["a"].tolist() == [1, 1]
    assert metadata == {"detector": "x"}


def test_tensors_that_share_memory_or_are_transposed_are_written(tmp_path: Path) -> None:
    path = str(tmp_path / "net.safetensors")
    shared = torch.arange(6.0).reshape(2, 3)
    save_weights({"a": shared, "b": shared.T}, {}, path)
    loaded, _ = load_weights(path)
    assert torch.equal(loaded["b"], shared.T)


def test_a_pickled_state_dict_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "net.pth")
    loaded, metadata = load_weights(str(tmp_path / "net.pth"))
    assert loaded["a"].tolist() == [1, 1, 1]
    assert metadata == {}


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, write) -> None:
    path, proof = tmp_path / "net.pth", tmp_path / "proof"
    write({"a": _Touch(proof)}, path)
    with pytest.raises(ValueError, match=r"net\.pth must hold tensors alone, whole and without code"):
        load_weights(str(path))
    assert not proof.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_weights({"a": torch.ones(1000)}, {}, str(path))
    else:
        torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for length in (len(whole) - 500, len(whole) // 2, 100, 9, 1, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"net\{suffix} must .*whole"):
            load_weights(str(path))


@pytest.mark.parametrize("content", [{"model": {"a": torch.ones(1)}, "epoch": 3}, [torch.ones(1)]])
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"must be a state dict, tensors by name, got .*: save the model's state_dict"):
        load_weights(str(tmp_path / "net.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(str(tmp_path / "nowhere.pth"))


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a file that ends in \.safetensors, \.pth, \.pt, got '.*net\.bin'"):
        load_weights(str(tmp_path / "net.bin"))
