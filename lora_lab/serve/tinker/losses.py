"""Losses of training requests, as sums over all tokens of all data: nothing is divided, so that calls add up.

Each is a function of log-probabilities `p` of target tokens as the model gives them now and of what the request says beside them
(https://tinker-docs.thinkingmachines.ai/losses): `q`, the log-probabilities with which the tokens were sampled; `a`, advantages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from lora_lab.errors import nearest
from lora_lab.schema.sections import shown
from lora_lab.serve.tinker.wire import Datum, Learn
from lora_lab.serve.wishes import RequestError

Inputs: TypeAlias = Mapping[str, torch.Tensor]
Settings: TypeAlias = Mapping[str, float]
TARGETS = "target_tokens"
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}  # of the ratio itself


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a loss is given, and how it is computed of one datum."""

    call: Callable[[torch.Tensor, Inputs, Settings], torch.Tensor]  # p [N] or [N, K] float32 -> scalar
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()  # inputs that may be missing: then 1
    settings: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # None: must be said
    wide: bool = False  # whether a place may have several targets


def _cross_entropy(p: torch.Tensor, given: Inputs, _: Settings) -> torch.Tensor:
    return -(given["weights"] * p).sum() if "weights" in given else -p.sum()


def _importance_sampling(p: torch.Tensor, given: Inputs, _: Settings) -> torch.Tensor:
    return -((p - given["logprobs"]).exp() * given["advantages"]).sum()


def _clipped(ratio: torch.Tensor, settings: Settings) -> torch.Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


def _pessimistic(ratio: torch.Tensor, a: torch.Tensor, settings: Settings) -> torch.Tensor:
    return -torch.minimum(ratio * a, _clipped(ratio, settings) * a).sum()


def _ppo(p: torch.Tensor, given: Inputs, settings: Settings) -> torch.Tensor:
    return _pessimistic((p - given["logprobs"]).exp(), given["advantages"], settings)


def _cispo(p: torch.Tensor, given: Inputs, settings: Settings) -> torch.Tensor:
    ratio = (p.detach() - given["logprobs"]).exp()
    return -(_clipped(ratio, settings) * p * given["advantages"]).sum()


def _dro(p: torch.Tensor, given: Inputs, settings: Settings) -> torch.Tensor:
    apart = p - given["logprobs"]
    return -(p * given["advantages"] - settings["beta"] / 2 * apart.square()).sum()


def _gspo(p: torch.Tensor, given: Inputs, settings: Settings) -> torch.Tensor:
    mask = given["sequence_ratio_mask"]
    mean = ((p.detach() - given["logprobs"]) * mask).sum() / mask.sum().clamp_min(1)
    return _pessimistic(mean.exp() * (p - p.detach()).exp(), given["advantages"], settings)


_OFF_POLICY = ("logprobs", "advantages")
LOSSES = {
    "cross_entropy": Loss(_cross_entropy, takes=("weights",), wide=True),
    "importance_sampling": Loss(_importance_sampling, _OFF_POLICY),
    "ppo": Loss(_ppo, _OFF_POLICY, settings=_CLIP),
    "cispo": Loss(_cispo, _OFF_POLICY, settings=_CLIP),
    "dro": Loss(_dro, _OFF_POLICY, settings={"beta": None}),
    "gspo": Loss(_gspo, (*_OFF_POLICY, "sequence_ratio_mask"), settings=_CLIP),
}


def check(asked: Learn, vocabulary: int, positions: int | None, most: int) -> Learn:
    """The request with what its loss reads, and nothing else, once all of it fits.

    Args:
        vocabulary: tokens that the model knows.
        positions: tokens that a datum may have; None: any number.
        most: data of one request.

    Raises:
        RequestError: naming what does not.
    """
    loss = LOSSES.get(asked.loss)
    if loss is None:
        raise RequestError(
            400, f"loss_fn={shown(asked.loss)}: not here.{nearest(asked.loss, LOSSES)} There are: {', '.join(LOSSES)}."
        )
    if not 0 < len(asked.data) <= most:
        raise RequestError(400, f"data: {len(asked.data)} of them, and a request may have 1 to {most}.")
    settings = _settings(asked, loss)
    data = [_datum(place, one, asked.loss, loss, vocabulary, positions) for place, one in enumerate(asked.data)]
    return dataclasses.replace(asked, data=data, settings=settings)


def _settings(asked: Learn, loss: Loss) -> dict[str, Any]:
    for name, value in asked.settings.items():
        if name not in loss.settings:
            known = f"takes {', '.join(loss.settings)}" if loss.settings else "takes none"
            raise RequestError(400, f"loss_fn_config.{shown(name)}: {asked.loss} {known}.")
        if isinstance(value, str) or not np.isfinite(value):
            raise RequestError(400, f"loss_fn_config.{name}={shown(value)}: must be a finite number.")
    found = {**loss.settings, **asked.settings}
    missing = next((name for name, value in found.items() if value is None), None)
    if missing is not None:
        raise RequestError(400, f"loss_fn_config.{missing}: {asked.loss} needs it.")
    return found


def _datum(place: int, one: Datum, name: str, loss: Loss, vocabulary: int, positions: int | None) -> Datum:
    what, count = f"data[{place}]", len(one.tokens)
    if not count:
        raise RequestError(400, f"{what}.model_input: has no tokens.")
    if positions is not None and count > positions:
        raise RequestError(400, f"{what}.model_input: {count} tokens, and the model has {positions} positions.")
    _check_tokens(f"{what}.model_input", one.tokens, vocabulary)
    needed = (TARGETS, *loss.needs)
    missing = [key for key in needed if key not in one.inputs]
    if missing:
        raise RequestError(
            400, f"{what}.loss_fn_inputs: {name} needs {missing[0]}. It reads: {', '.join((*needed, *loss.takes))}."
        )
    found = {key: value for key, value in one.inputs.items() if key in (*needed, *loss.takes)}
    targets = found[TARGETS]
    if targets.dtype != np.int64:
        raise RequestError(400, f"{what}.loss_fn_inputs.{TARGETS}: must be int64.")
    wide = targets.ndim == 2 and loss.wide and targets.shape[1] > 0
    if targets.shape[:1] != (count,) or not (targets.ndim == 1 or wide):
        raise RequestError(
            400,
            f"{what}.loss_fn_inputs.{TARGETS}: its shape is {list(targets.shape)}, and the input has {count} tokens.",
        )
    _check_tokens(f"{what}.loss_fn_inputs.{TARGETS}", targets, vocabulary)
    for key, value in found.items():
        if value.shape != targets.shape:
            raise RequestError(
                400,
                f"{what}.loss_fn_inputs.{key}: its shape is {list(value.shape)}, and that of {TARGETS} is {list(targets.shape)}.",
            )
        if key != TARGETS:
            found[key] = value.astype(np.float32)
            if not np.isfinite(found[key]).all():
                raise RequestError(400, f"{what}.loss_fn_inputs.{key}: holds NaN or infinity.")
    return Datum(one.tokens, found)


def _check_tokens(what: str, tokens: np.ndarray, vocabulary: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.size:
        raise RequestError(400, f"{what}: token {int(wrong.flat[0])}: the model's tokens are 0 to {vocabulary - 1}.")


def of_datum(name: str, p: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """The loss of one datum, a scalar in float32.

    Args:
        p: log-probabilities of its targets, [N] or [N, K].
        inputs: what `check` let pass beside the targets.
    """
    return LOSSES[name].call(p, inputs, settings)
