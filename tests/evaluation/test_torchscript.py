"""Features from TorchScript files that follow the call convention of FID's Inception file."""

import hashlib
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttrain.errors import UserError
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.torchscript import TorchScriptFile

CPU = torch.device("cpu")


class Inception(nn.Module):
    """uint8 [n, 3, H, W] -> features [n, 6] or logits [n, 2], as `inception-2015-12-05.pt` chooses between the two."""

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        x = img.to(torch.float32)
        features = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return features if return_features else features[:, :2]


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).mean(dim=(2, 3))


class FourDimensional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32)


class SixtyFour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[3] == 64
        return x.to(torch.float32).mean(dim=(2, 3))


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def images(count: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), np.uint8)


def opened(path: Path) -> Features:
    return TorchScriptFile(str(path)).open(CPU)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_the_file_and_grey_is_given_three_times(tmp_path: Path, channels: int):
    features, given = opened(saved(Inception(), tmp_path / "f.pt")), images(150, channels)
    found, pixels = features(given), np.repeat(given, 3 // channels, axis=3).astype(float)
    assert found.dtype == np.float64 and found.shape == (150, 6)
    assert np.allclose(found[:, :3], pixels.mean(axis=(1, 2)), rtol=1e-6) and np.array_equal(found[:, 3:], pixels.max(axis=(1, 2)))


def test_a_score_keeps_the_digests_and_how_the_file_was_called(tmp_path: Path):
    path = saved(Inception(), tmp_path / "f.pt")
    told = opened(path).told
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (told["name"], told["file"], told["arguments"]) == ("torchscript", "f.pt", {"return_features": True})
    assert opened(saved(Plain(), tmp_path / "p.pt")).told["arguments"] == {}


def test_a_file_without_that_argument_is_called_without_it(tmp_path: Path):
    assert opened(saved(Plain(), tmp_path / "p.pt"))(images(3, 3)).shape == (3, 3)


def test_a_pickled_python_object_in_it_is_not_run(tmp_path: Path):
    """torch's own reader of these archives knows no Python."""
    sound, evil, mark = saved(Plain(), tmp_path / "sound.pt"), tmp_path / "evil.pt", tmp_path / "run"

    class Runs:
        def __reduce__(self):
            return Path.touch, (mark,)

    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(Runs(), protocol=2) if name.endswith("/data.pkl") else source.read(name))
    with pytest.raises(UserError, match=r"evil\.pt: not a TorchScript file"):
        opened(evil)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "told"),
    [(FourDimensional(), r"makes \(2, 3, 8, 8\) of 2 images; it must take images uint8"), (SixtyFour(), r"fails on images \(2, 3, 8, 8\)")],
)
def test_a_file_of_another_convention_is_refused(tmp_path: Path, module: nn.Module, told: str):
    with pytest.raises(UserError, match=told):
        opened(saved(module, tmp_path / "f.pt"))(images(2, 3))


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"f.pt: not a TorchScript file .*inception"):
        opened(tmp_path / "f.pt")


def test_torchs_word_of_deprecation_is_not_the_users(tmp_path: Path):
    path = saved(Plain(), tmp_path / "f.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(path)
