"""Everything needed to run again; an unknown key is an error."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .files import write_text


class Strict(BaseModel):
    """Settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class WeightedSettings(Strict):
    """`learn/weighted.py`; `cache` is the number of prior samples for each of the prior's conditions."""

    updates: int = Field(1200, ge=1)
    batch: int = Field(128, ge=1)
    lr_embedding: float = Field(5e-2, gt=0)
    lr_adapter: float = Field(2e-3, gt=0)
    cache: int = Field(1000, ge=1)


class AdjointSettings(Strict):
    """`learn/adjoint.py`."""

    updates: int = Field(850, ge=1)
    batch: int = Field(160, ge=1)
    lr_embedding: float = Field(1e-2, gt=0)
    lr_adapter: float = Field(1e-3, gt=0)
    regressed: int = Field(5, ge=1)
    reuse: int = Field(4, ge=1)
    clip: float = Field(60.0, gt=0)


class EvaluationSettings(Strict):
    """Samples of the prior for each of its conditions, and paths of the policy over all (c, y)."""

    prior_samples: int = Field(1000, ge=8)
    paths: int = Field(2000, ge=1)
    probes: int = Field(10, ge=1)


class Config(Strict):
    """Everything needed to run again."""

    prior: Literal["digits"] = "digits"
    control: Literal["ink"] = "ink"
    seed: int = Field(0, ge=0, lt=2**32)
    gamma: float = Field(1.0, ge=0)
    steps: int = Field(20, ge=1)
    sigma_end: float = Field(0.1, gt=0, lt=1)
    rank: int = Field(64, ge=1)
    learners: list[Literal["weighted", "adjoint"]] = Field(["weighted", "adjoint"], min_length=1)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    weighted: WeightedSettings = WeightedSettings()
    adjoint: AdjointSettings = AdjointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @classmethod
    def of(cls, values: Any, source: str = "settings") -> "Config":
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

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read a config.yaml; raises ValueError as `of` does."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        return cls.of(values, str(path))

    def quick(self) -> "Config":
        """A smoke test of the same job: a twentieth of the training, fewer samples."""
        values = self.model_dump()
        for learner in ("weighted", "adjoint"):
            values[learner]["updates"] = max(1, values[learner]["updates"] // 20)
        values["weighted"]["cache"] //= 10
        values["evaluation"] = {"prior_samples": 200, "paths": 160, "probes": 2}
        return Config.of(values)

    def write(self, path: Path) -> None:
        """Write it whole."""
        write_text(path, yaml.safe_dump(self.model_dump(), sort_keys=False))
