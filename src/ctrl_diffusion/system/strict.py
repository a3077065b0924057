"""Check settings: an unknown key is an error."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self


class Strict(BaseModel):
    """Settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, values: Any, source: str = "settings") -> Self:
        """Checked settings; `source` is what an error calls them.

        Raises:
            ValueError: one line that names each wrong key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            )
            raise ValueError(f"{source}: {wrong}. A fresh run's config.yaml shows every key.") from error
