"""Every config under configs/ is one that a start accepts: it loads, and dry-runs on shards of the kind it names."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.config_mutants import run_configs
from fasttrain.checkpoint import Manifest
from fasttrain.cli import _parse, main
from fasttrain.config import load_config
from fasttrain.data.index import read_index
from fasttrain.engine.deepspeed import read_settings, zero_stage
from fasttrain.models.memory import count_parameters
from fasttrain.run import resolve
from tests.commands import fasttrain
from tests.data.text.tiny_encoder import write_tiny_encoder
from tests.runs import plain_config
from tests.shards import write_random

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [path.relative_to(ROOT) for path in run_configs(ROOT / "configs")]
SETTINGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs" / "deepspeed").glob("*.json"))

# What a config's data are: kind, stored shape, classes; by its folder, or by its own name where a folder's configs differ.
LATENTS = ("latent", (2, 2, 4, 32, 32), 1000)
DATA = {
    "imagenet256": LATENTS,
    "imagenet64": ("image", (3, 64, 64), 1000),
    "celeba64": ("image", (3, 64, 64), 1),
    "cifar10": ("image", (3, 32, 32), 10),
    "cifar10/mmdit-8.yaml": ("image", (3, 8, 8), 10),
    "cifar10/mmdit-16.yaml": ("image", (3, 16, 16), 10),
    "digits": ("image", (3, 8, 8), 10),
    "digits/flow.yaml": ("image", (1, 8, 8), 10),
    "digits/text.yaml": ("image", (3, 8, 8), 10),
    "text": LATENTS,
    "text/512.yaml": ("latent", (2, 2, 4, 64, 64), 1000),
    "configs": ("image", (1, 8, 8), 10),
}
# Their sets have text, of their class names.
CAPTIONED = ("text", "text/512.yaml", "digits/text.yaml")
AVERAGED = [path for path in CONFIGS if "0.9999 a step of" in (ROOT / path).read_text()]
# Parameters as the papers' architectures have them, time and class tables included (the Min-SNR paper prints them without).
PARAMETERS = {
    "imagenet256/vit-b.yaml": 89.11e6,
    "imagenet256/vit-xl-x0.yaml": 452.39e6,
    "imagenet256/vit-xl-eps.yaml": 452.39e6,
    "imagenet256/vit-xl-v.yaml": 452.39e6,
    "imagenet256/dit-xl.yaml": 675.11e6,
    "imagenet256/mmdit-xl.yaml": 790.24e6,  # its table A1 has 792.44 and 679.09, with columns that look swapped
    "imagenet64/vit-l.yaml": 269.98e6,
    "celeba64/vit-s.yaml": 43.20e6,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    made = {name: write_random(root / name.replace("/", "-"), *what) for name, what in DATA.items()}
    encoder = write_tiny_encoder(root / "encoder")
    for name in CAPTIONED:
        assert main(["prepare", "text", str(made[name]), "--encoder", str(encoder), "--template", "a photo of a {}"]) == 0
    return made


def data_of(path: Path) -> str:
    """Which of DATA a config reads."""
    named = f"{path.parent.name}/{path.name}"
    return named if named in DATA else path.parent.name


@pytest.fixture(autouse=True)
def _in_the_project_folder(monkeypatch: pytest.MonkeyPatch):
    """Paths in configs start there."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_dry_runs(path, shards, tmp_path, capsys):
    run_dir = tmp_path / "run"
    # There is no network to begin from here.
    overrides = [f"run_dir={run_dir}", f"data.train={shards[data_of(path)]}", "data.held_out=2", "init_from=null"]
    assert main(["train", str(path), "--dry-run", *overrides]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "dry run done: nothing was written" in told and "trained parameters" in told
    assert not run_dir.exists()


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_models_have_the_published_sizes(name, parameters, shards):
    path = Path("configs", name)
    folder = shards[data_of(path)]
    model = resolve(load_config(path, [f"data.train={folder}"]), read_index(folder)).model
    assert count_parameters(model).total == pytest.approx(parameters, abs=0.006e6)


@pytest.mark.parametrize("path", AVERAGED, ids=str)
def test_the_papers_average_is_0_9999_a_step(path):
    config = load_config(path)
    (average,) = config.optimizer.ema
    for step in (1, 1000, config.training.steps):
        images = config.training.global_batch
        assert average.decay(step * images, images) == pytest.approx(0.9999, abs=1e-7)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name != "configs"], ids=str)
def test_a_config_opens_with_what_to_expect(path):
    text = path.read_text()
    opening = "\n".join(line for line in text[: text.index("run_dir:")].splitlines() if line.startswith("#"))
    for words in (f"fasttrain train {path}", "fasttrain prepare ", "# Hardware: ", "# Time: ", "# Score: "):
        assert words in opening, words
    folder = yaml.safe_load(text)["data"]["train"]
    assert re.search(rf"fasttrain prepare .* {folder}\b", opening), "it prepares the folder it reads"


@pytest.mark.parametrize("path", SETTINGS, ids=str)
def test_deepspeed_settings_train_a_step(path, digits, tmp_path):
    stage = zero_stage(read_settings(str(path)))
    assert path.name == f"zero{stage}.json"
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(plain_config(tmp_path / "run", digits, training={"steps": 1, "precision": "bf16"}, deepspeed=str(path)))
    )
    done = fasttrain("train", config)
    assert done.status == 0, done.err
    assert Manifest.read(tmp_path / "run" / "checkpoints" / "step-00000001").zero_stage == stage


def test_there_is_a_file_for_every_stage():
    assert [path.name for path in SETTINGS] == [f"zero{stage}.json" for stage in range(4)]


def test_the_launch_files_are_what_their_readers_take():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile("configs/launch/hosts") == {"node-0": 8, "node-1": 8}
    subprocess.run(["bash", "-n", "configs/launch/slurm.sh"], check=True)


def _typed(config: Path) -> list[list[str]]:
    """The arguments of every `fasttrain` in a config's head, with continued lines joined and remarks in parentheses behind it left out."""
    head = "\n".join(line[1:].strip() for line in (ROOT / config).read_text().splitlines() if line.startswith("#"))
    found = re.findall(r"^(?:deepspeed .*?--module )?fasttrain (.*?)(?:\s{2,}\(.*)?$", head.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize(("config", "arguments"), [(config, typed) for config in CONFIGS for typed in _typed(config)], ids=str)
def test_the_commands_in_its_head_are_understood(config: Path, arguments: list[str]):
    args = _parse(arguments)
    if args.command == "train":
        assert args.config == config
        load_config(config, args.overrides)


def _rows(config: Path) -> list[list[str]]:
    """The overrides of every row of a table in a config's head: `#   1.81  + what   key=value 'key={...}'   (remarks)`."""
    head = re.findall(r"^#   \d+\.\d+  (.*?)(?:\s{2,}\(.*)?$", (ROOT / config).read_text(), re.MULTILINE)
    return [words for row in head if (words := [word.rstrip(",") for word in shlex.split(row) if re.match(r"[a-z_.]+=", word)])]


@pytest.mark.parametrize(("config", "overrides"), [(config, row) for config in CONFIGS for row in _rows(config)], ids=str)
def test_the_rows_in_its_head_are_accepted(config: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    load_config(config, overrides)
