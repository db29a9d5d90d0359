"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that the model can read; None where nothing limits it.

    Some tables of positions are longer than what rows can use: RoBERTa and those after it count from behind the padding's place,
    OPT and BART from an offset. The table says so itself.

    Args:
        model: its content does not matter, so it may be on the meta device.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    return min([stated, *(room for table in _tables(model, stated) if (room := _room(table)) > 0)])


def _tables(model: PreTrainedModel, stated: int) -> list[nn.Module]:
    """The model's tables of absolute positions; smaller ones are another tower's."""
    return [
        module
        for name, module in model.named_modules()
        if "pos" in name.rpartition(".")[2] and (getattr(module, "num_embeddings", None) or 0) >= stated
    ]


def _room(table: nn.Module) -> int:
    offset = getattr(table, "offset", None)
    if not isinstance(offset, int):
        padding = getattr(table, "padding_idx", None)
        offset = 0 if padding is None else padding + 1
    return table.num_embeddings - offset
