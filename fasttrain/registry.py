"""Names in a config become components: a registry of frozen dataclasses, validated, with the choices listed on a mistake."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

T = TypeVar("T", bound=type)


def shown(given: Any) -> str:
    """A value from outside as it can be printed: escaped, and cut where it is long."""
    try:
        text = repr(given)
    except (ValueError, RecursionError):  # Python refuses to write integers of many thousand digits
        text = f"a {type(given).__name__}"
    return text if len(text) < 80 else text[:77] + "..."


def printable(name: Any) -> str:
    """A name from outside as it stands where it can be printed, and `shown` where it cannot or is long."""
    text = str(name)
    return text if text.isprintable() and len(text) < 200 else shown(name)


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known one, and all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(str(name)[:80], choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}the choices are: {', '.join(choices)}"


class Registry:
    """Named choices of one kind (weighting, schedule, model ...), each a frozen dataclass of its parameters."""

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type] = {}
        self._presets: dict[str, dict[str, Any]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: makes a frozen dataclass known under `name`."""

        def add(cls: T) -> T:
            self._classes[name] = cls
            return cls

        return add

    def preset(self, alias: str, name: str, **params: Any) -> None:
        """Makes `alias` stand for the registered `name` with these parameters as defaults."""
        self._presets[alias] = {"name": name, **params}

    def names(self) -> list[str]:
        """All names a config may use, presets included."""
        return sorted([*self._classes, *self._presets])

    def build(self, spec: str | Mapping[str, Any]) -> Any:
        """A component from its name, or from a mapping of `name` and parameters.

        Raises:
            ValueError: unknown name or parameter (with the nearest known one), or a value of the wrong type.
        """
        given = {"name": spec} if not isinstance(spec, Mapping) else dict(spec)
        if not isinstance(given.get("name"), str):
            raise ValueError(f"{self.kind}: give a name, one of: {', '.join(self.names())}")
        if given["name"] in self._presets:
            alias = given.pop("name")
            given = {**self._presets[alias], **given}
        name = given.pop("name")
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {shown(name)}; {nearest(name, self.names())}")
        return self._validate(name, given)

    def spec(self, component: Any) -> dict[str, Any]:
        """The mapping that builds this component again."""
        name = next(n for n, cls in self._classes.items() if cls is type(component))
        return {"name": name, **dataclasses.asdict(component)}

    def field(self) -> tuple[PlainValidator, PlainSerializer]:
        """Pydantic annotations: `Annotated[Weighting, *WEIGHTINGS.field()]` accepts a spec and serialises to one."""
        return (
            PlainValidator(lambda value: value if type(value) in self._classes.values() else self.build(value)),
            PlainSerializer(self.spec),
        )

    def _validate(self, name: str, params: dict[str, Any]) -> Any:
        cls = self._classes[name]
        known = [f.name for f in dataclasses.fields(cls)]
        for key in params:
            if key not in known:
                raise ValueError(f"{self.kind} {name!r} has no parameter {shown(key)}; {nearest(key, known)}")
        try:
            return TypeAdapter(cls).validate_python(params)
        except ValidationError as error:
            # A check of the whole component has no key of its own: its message names the keys.
            told = "; ".join(": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors())
            raise ValueError(f"{self.kind} {name!r}: {told}") from None
