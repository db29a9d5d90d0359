"""What of a base goes before it is deployed or trained (`lora-lab trim`)."""

from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section


@section
class TrimConfig:
    """A smaller base (`lora-lab trim`): tokens and layers that go."""

    vocabulary: Annotated[
        str | list[str] | None,
        Field(
            description="keep the tokens that these texts use, named as in data.train, and what makes them; null: all tokens"
        ),
    ] = None
    min_count: Annotated[int, Field(ge=1, description="how often a token must be used to be kept")] = 1
    layers: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"],
        Field(
            description="layers to drop, one after another, each time the one whose loss on data.train is least; auto: as many as "
            "trim.max_loss_increase allows"
        ),
    ] = 0
    max_loss_increase: Annotated[
        float, Field(gt=0, description="layers=auto: most loss that they may add together, in nats per token")
    ] = 0.1
    calibration_rows: Annotated[int, Field(ge=1, description="rows of data.train that layers are compared on")] = 32
