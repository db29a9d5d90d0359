"""Several runs at once."""

from typing import Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section


@section
class SweepConfig:
    """Several runs at once (`train -m`): how they share a base, what they may spend, how they are compared."""

    execution: Annotated[
        Literal["auto", "batched", "interleaved"],
        Field(
            description="batched: runs on one base share passes; interleaved: they take turns step by step; auto: batched where it is exact"
        ),
    ] = "auto"
    joint_tokens: Annotated[int, Field(ge=1, description="tokens of a shared pass, about and at most")] = 4096
    strategy: Annotated[
        Literal["grid", "halving"], Field(description="train all runs to their end, or stop poor ones early")
    ] = "grid"
    eta: Annotated[int, Field(ge=2, description="halving: after each rung one in this many runs continues")] = 3
    rungs: Annotated[
        int | None, Field(ge=2, description="halving: rungs, the last one's end included; null: until one run is left")
    ] = None
    budget: Annotated[
        str | None,
        Field(
            pattern=r"^[1-9]\d*(steps|tokens|minutes)$",
            description="of all runs together: 2000steps, 5000000tokens, 30minutes",
        ),
    ] = None
    metric: Annotated[str, Field(min_length=1, description="held-out metric that runs are ranked by")] = "loss"
    top: Annotated[int, Field(ge=2, description="how many of the best runs are repeated over seeds")] = 2
    seeds: Annotated[int, Field(ge=0, description="further seeds of each of them: the noise floor; 0: none")] = 0
