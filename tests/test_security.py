"""Nothing from outside is executed: pickles, tags, commands; and secrets of the environment end in no file, output or command line.

Mutated configs and checkpoints are watched for what they execute in tests/test_mutations.py; stores and their logins in tests/data/remote.
"""

import ast
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash
import yaml

from benchmarks.checkpoint_mutants import pickled
from benchmarks.checkpoint_scene import Scene
from tests.commands import fasttrain
from tests.runs import plain_config
from tests.test_architecture import ROOT, SOURCES

SECRETS = {
    name: f"{name.lower()}-that-must-not-be-seen" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
}

# Calls that run or unpickle what they are given, and the files that may make them, each for a reason.
FORBIDDEN = {
    "eval": (),
    "exec": (),
    "compile": (),
    "__import__": (),
    "os.system": (),
    "os.popen": (),
    "yaml.load": ("fasttrain/plain_yaml.py",),  # with a SafeLoader that knows no tags of objects
    "yaml.full_load": (),
    "yaml.unsafe_load": (),
    "torch.load": (),
    "importlib.import_module": (
        "fasttrain/cli.py",  # the commands' own modules, by a table
        "fasttrain/models/attention.py",  # flash-attention's packages, by a table
    ),
}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "codeop"}
SHELL = ("fasttrain/data/remote/pipes.py",)  # `pipe:` addresses, only where data.allow_pipe says so


def _calls() -> Iterator[tuple[str, int, str, ast.Call]]:
    """(file, line, dotted name, call) of every call in the sources."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), node.lineno, ast.unparse(node.func), node


def _trusts(name: str, given: dict[str | None, str]) -> bool:
    """Whether transformers may run a model's own Python files: its Auto classes ask the user, unless they are told not to."""
    auto = name.startswith(("AutoConfig", "AutoModel", "AutoTokenizer")) and name.endswith(".from_pretrained")
    return given.get("trust_remote_code", "unsaid" if auto else "False") != "False"


def test_no_source_evaluates_or_unpickles():
    faults = [f"{path}:{line}: {name}" for path, line, name, _ in _calls() if path not in FORBIDDEN.get(name, (path,))]
    for path, line, name, call in _calls():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if given.get("shell", "False") != "False" and path not in SHELL:
            faults.append(f"{path}:{line}: {name} through a shell")
        if given.get("allow_pickle", "False") != "False" or given.get("weights_only", "True") != "True" or _trusts(name, given):
            faults.append(f"{path}:{line}: {name} may run what it reads")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            faults += [f"{path.relative_to(ROOT)}:{node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "line", ["exec(text)", "torch.load(path)", "subprocess.run(command, shell=True)", "import pickle", "AutoConfig.from_pretrained(name)"]
)
def test_the_search_finds_what_it_looks_for(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planted = tmp_path / "planted.py"
    planted.write_text(line + "\n")
    monkeypatch.setitem(globals(), "SOURCES", [planted])
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"planted\.py:1"):
        test_no_source_evaluates_or_unpickles()


class _Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def _config(folder: Path, shards: Path | str, **sections: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plain_config(folder / "run", shards, **sections)))
    return path


def _refused(folder: Path, *arguments: str | Path, named: str) -> None:
    done = fasttrain(*arguments)
    assert done.status == 2 and "Traceback" not in done.err and named in done.err, done
    assert not list(folder.rglob("canary"))


def test_tags_and_commands_in_a_config_execute_nothing(tmp_path: Path, digits: Path):
    canary = tmp_path / "canary"
    config = _config(tmp_path, digits)
    config.write_text(config.read_text() + f"extra: !!python/object/apply:os.system ['touch {canary}']\n")
    _refused(tmp_path, "train", config, named="could not determine a constructor")
    _refused(tmp_path, "train", _config(tmp_path, f"pipe:touch {canary}"), named="allow_pipe")


def test_a_pickle_among_the_labels_is_not_unpickled(tmp_path: Path, digits: Path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in digits.iterdir():
        (shards / path.name).symlink_to(path)
    content = io.BytesIO()
    np.save(content, np.array([_Command(f"touch {tmp_path / 'canary'}")] * 3, dtype=object), allow_pickle=True)
    _replace(shards / "labels.npy", content.getvalue())
    index = json.loads((shards / "index.json").read_text())
    index["labels_xxh3"] = xxhash.xxh3_128_hexdigest(content.getvalue())
    _replace(shards / "index.json", json.dumps(index).encode())
    _refused(tmp_path, "train", _config(tmp_path, shards), named="labels.npy")


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_the_pickle_of_these_tests_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(_Command(f"touch {tmp_path / 'canary'}")))
    assert (tmp_path / "canary").exists()


def test_secrets_are_written_nowhere_and_a_pickled_checkpoint_is_refused(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch):
    config = _config(tmp_path, digits, training={"steps": 4}, log={"tensorboard": True}, checkpoint={"every": 2})
    source = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "fasttrain", "train", str(config)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = set[str]()
    while process.poll() is None:
        seen |= _command_lines(process.pid)
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 6 and seen
    written = {str(path): path.read_bytes() for path in files} | {"output": output.encode(), "argv": "\n".join(seen).encode()}
    assert not [(where, name) for where, content in written.items() for name, secret in SECRETS.items() if secret.encode() in content]

    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    for folder in (newest, newest.with_name("step-00000002")):
        pickled(random.Random(0), Scene(folder, folder, folder))
    monkeypatch.chdir(tmp_path)
    _refused(tmp_path, "sample", tmp_path / "run", named="no checkpoint of")


def _command_lines(pid: int) -> set[str]:
    try:
        process = psutil.Process(pid)
        return {" ".join(each.cmdline()) for each in [process, *process.children(recursive=True)]}
    except psutil.Error:
        return set()
