"""YAML as plain data: what it may not be is told in one line, at once, and nothing of it is executed."""

import time
from pathlib import Path

import pytest

from benchmarks.config_mutants import run_configs
from fasttrain.plain_yaml import LONGEST, read_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 2, c: 3}", "line 2: the key 'c' is given twice"),
        ("a: 1\nb: 2\n'a': 3", "line 3: the key 'a' is given twice"),
        (BOMB, "aliases that unfold to more than"),
        ("a: &a [*a]", "an anchor that contains itself"),
        ("[" * 100_000, "nested deeper than"),
        ("? " * 50_000, "nested deeper than"),
        ("x" * (LONGEST + 1), "characters are more than"),
        ("a: 2020-13-45", "month must be in"),
        ("a: 0x_", "a value that its YAML type cannot have"),
        ("a: !!bool maybe", "a value that its YAML type cannot have"),
        ("a: " + "9" * 10_000, "a value that its YAML type cannot have"),
        ("a: \0", "special characters are not allowed"),
        ("--- 1\n--- 2", "another document"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
    ids=lambda value: value[:20].strip(),
)
def test_what_is_not_plain_is_told_in_one_line_at_once(text, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(text)
    assert time.process_time() - began < 2
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("tag", ["object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"])
def test_tags_execute_nothing(tag, tmp_path):
    canary = tmp_path / "canary"
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(f"a: !!python/{tag} ['touch {canary}']")
    assert not canary.exists()


def test_merged_keys_may_be_given_again():
    assert read_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a}") == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 1},
    }


def test_our_own_configs_are_plain():
    paths = run_configs(Path(__file__).resolve().parents[1] / "configs")
    assert len(paths) > 5 and all("run_dir" in read_yaml(path.read_text()) for path in paths)
