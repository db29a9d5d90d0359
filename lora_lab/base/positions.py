"""Which tokens a model can read: how many it has positions for, and how many it has embeddings of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lora_lab.errors import BaseModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def check_lengths(config: PretrainedConfig) -> None:
    """Refuse a base that can be trained on rows of one length alone.

    Raises:
        BaseModelError: its positions are the sum of two tables' (Reformer), which training reads whole.
    """
    shape = getattr(config, "axial_pos_shape", None)
    if shape and getattr(config, "axial_pos_embds", False):
        raise BaseModelError(
            f"model.path: {config.model_type} can be trained on rows of exactly {math.prod(shape)} tokens alone (axial_pos_shape "
            f"{list(shape)} in config.json), and rows have the lengths that their texts have. Use another base."
        )


def embedded(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding of.

    Raises:
        BaseModelError: it has no table of them (CANINE hashes characters), so that nothing says which ids it reads.
    """
    try:
        table: Any = model.get_input_embeddings()
        return table.weight.shape[0]
    except NotImplementedError as error:
        raise BaseModelError(
            f"model.path: {model.config.model_type} has no table of embeddings, so nothing says which tokens it can read. Use "
            "another base."
        ) from error


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that the model can read; None where nothing limits it.

    Some tables of positions are longer than what rows can use: RoBERTa and those after it count from behind the padding's place,
    OPT and BART from an offset. The table says so itself.

    Args:
        model: its content does not matter, so it may be on the meta device.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:  # XLNet says -1
        return None
    return min([stated, *(room for table in _tables(model, stated) if (room := _room(table)) > 0)])


def _tables(model: PreTrainedModel, stated: int) -> list[nn.Module]:
    """The model's tables of absolute positions; smaller ones are another tower's."""
    return [
        module
        for name, module in model.named_modules()
        if "pos" in name.rpartition(".")[2] and (getattr(module, "num_embeddings", None) or 0) >= stated
    ]


def _room(table: Any) -> int:
    offset = getattr(table, "offset", None)
    if not isinstance(offset, int):
        padding = getattr(table, "padding_idx", None)
        offset = 0 if padding is None else padding + 1
    return table.num_embeddings - offset
