"""Names become components, and every mistake names the choices."""

import re
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated

import pytest
from pydantic import BaseModel

from fasttrain.registry import Registry, nearest

FRUIT = Registry("fruit")


@FRUIT.register("apple")
@dataclass(frozen=True)
class Apple:
    weight: float = 0.2
    sweet: bool = True


@FRUIT.register("pear")
@dataclass(frozen=True)
class Pear:
    def __post_init__(self) -> None:
        raise ValueError("pears are out of season")


FRUIT.preset("big-apple", "apple", weight=0.5)


class Basket(BaseModel):
    fruit: Annotated[object, *FRUIT.field()]


def test_a_name_or_a_mapping_builds():
    assert FRUIT.build("apple") == Apple()
    assert FRUIT.build({"name": "apple", "weight": 1, "sweet": False}) == Apple(1.0, False)


def test_a_preset_is_a_name_with_defaults_that_can_be_overridden():
    assert FRUIT.build("big-apple") == Apple(0.5)
    assert FRUIT.build({"name": "big-apple", "weight": 0.7}) == Apple(0.7)
    assert FRUIT.names() == ["apple", "big-apple", "pear"]


def test_spec_builds_the_same_again():
    apple = Apple(0.3, False)
    assert FRUIT.spec(apple) == {"name": "apple", "weight": 0.3, "sweet": False}
    assert FRUIT.build(FRUIT.spec(apple)) == apple


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("aple", "unknown fruit 'aple'; did you mean 'apple'? the choices are: apple, big-apple, pear"),
        ({"weight": 1}, "fruit: give a name, one of: apple, big-apple, pear"),
        ({"name": "apple", "wieght": 1}, "fruit 'apple' has no parameter 'wieght'; did you mean 'weight'?"),
        ({"name": "apple", "weight": "heavy"}, "fruit 'apple': weight: "),
        ("pear", "pears are out of season"),
    ],
)
def test_mistakes_name_the_remedy(spec, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        FRUIT.build(spec)


def test_components_do_not_change():
    with pytest.raises(FrozenInstanceError):
        FRUIT.build("apple").weight = 2


def test_as_a_pydantic_field_it_reads_and_writes_specs():
    basket = Basket(fruit="big-apple")
    assert basket.fruit == Apple(0.5)
    assert basket.model_dump() == {"fruit": {"name": "apple", "weight": 0.5, "sweet": True}}
    assert Basket(**basket.model_dump()) == basket
    assert Basket(fruit=Apple()).fruit == Apple()


def test_nearest_lists_all_where_none_is_near():
    assert nearest("xyz", ["b", "a"]) == "the choices are: a, b"
