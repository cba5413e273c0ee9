"""A table of config.toml, and the kinds of values that many of them have."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

YEARS = 100  # no setting in minutes, hours or days means longer
_MOST = 2**31 - 1  # of whatever is counted: far beyond any use, and no library breaks on it

Share = Annotated[float, Field(ge=0, lt=1)]
Natural = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(gt=0, le=_MOST)]
Minutes = Annotated[int, Field(gt=0, le=YEARS * 366 * 24 * 60)]


class Section(BaseModel):
    """A table of config.toml."""

    # Strict: `max_drop = true` must not become 1.0 and open the gate.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False
    )
