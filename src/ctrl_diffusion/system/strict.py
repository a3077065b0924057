"""Check settings: an unknown key is an error, and what is checked does not change."""

from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from .files import one_line


class Strict(BaseModel):
    """Hold checked, frozen settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_values(cls, values: Any, source: str = "settings") -> Self:
        """Check values of a `source`; a ValueError is one line on each wrong key, and the nearest to an unknown one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(map(cls._line_of, error.errors()))
            raise ValueError(f"{source}: {wrong}. A fresh run's config.yaml shows every key.") from error

    def with_(self, **changes: Any) -> Self:
        """Return a checked copy with some values changed; of a group by a dict of the keys that change."""
        return type(self).from_values(merged(self.model_dump(), changes))

    @classmethod
    def _line_of(cls, error: Any) -> str:
        """Say in one line what is wrong with a key."""
        *groups, key = error["loc"] or ("file",)
        near: list[str] = []
        if error["type"] == "extra_forbidden":
            model: Any = cls
            for group in groups:
                if isinstance(group, str):  # else the place in a list
                    kind = model.model_fields[group].annotation
                    model = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Strict))
            near = get_close_matches(str(key), model.model_fields, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        message = error["msg"].removeprefix("Value error, ")
        return f"{'.'.join(map(str, (*groups, key)))}: {message}, got {one_line(repr(error['input']), 200)}{hint}"


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with `changes` over them, group by group."""
    out = dict(values)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def with_key(values: Any, keys: list[str], value: Any) -> Any:
    """Return nested settings with the value at a path of keys replaced, or added."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(values, list):
        if not key.isdecimal() or int(key) >= len(values):
            raise ValueError(f"{key} must be a number from 0 to {len(values) - 1}, the place in a list.")
        return [with_key(row, rest, value) if i == int(key) else row for i, row in enumerate(values)]
    group = values if isinstance(values, dict) else {}
    return {**group, key: with_key(group.get(key), rest, value)}
