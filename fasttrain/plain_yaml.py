"""YAML as plain data, and nothing else: no tag builds an object, no key is given twice, no text of a few lines becomes gigabytes.

PyYAML's safe loader builds no objects of its own accord. But it lets the last of two equal keys win in silence, follows nested aliases to
any size, follows nesting until Python's stack ends, and lets the errors of Python's constructors through.
"""

from typing import Any

import yaml

from fasttrain.registry import shown

# A config is a few kilobytes and five levels deep. PyYAML reads about a tenth of a megabyte a second.
LONGEST = 1 << 17
DEEPEST = 40
MOST_NODES = 20_000


def read_yaml(text: str) -> Any:
    """The data in a YAML document.

    Raises:
        ValueError: not plain YAML, a key given twice, or more than a config can be; one line that says where.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text):,} characters are more than the {LONGEST:,} that a config may have")
    try:
        return yaml.load(text, _Plain)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position + 1}: {error.reason}") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # What PyYAML's constructors do not catch: `2020-13-45`, `0x_`, `!!bool maybe`, a number of 10,000 digits.
        raise ValueError(f"a value that its YAML type cannot have ({type(error).__name__}: {str(error)[:80]})") from None


class _Plain(yaml.SafeLoader):
    """The safe loader with each key once, and with limits on depth and on the size that aliases unfold to."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, measured as if every alias in it were written out."""
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        if self._depth >= DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an anchor that contains itself", problem_mark=mark)
        if self._sizes[id(node)] > MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"aliases that unfold to more than {MOST_NODES:,} values", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping whose keys differ. Merged ones (`<<`) may be given again: that is what merging is for."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {shown(key.value)} is given twice: remove one", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def _size(self, node: Any) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        return 1 + sum(self._sizes[id(part)] for part in parts)
