"""Padded rows that lie end to end between a model's first and last layer, so that nothing is computed of padding.

The first layer takes the padding out, the last one puts it back (zeros), and attention gives rows of like length their own places for a
moment.
What is padding is read from the attention mask that the layers are called with; it carries the places along, so that layers which are
computed again in a backward pass find them. Layers that look beside a token, or at shapes, do not pass the trial and stay padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_lab.data.collate import of_like_length
from lora_lab.fast.routing import Routing, current, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "unpadded"  # of what a mask carries
_WIDTH = 16  # numbers that a processor works on at once: a softmax of so many costs a fifth of one of 13
_ENOUGH_TOKENS = 256  # attended to at once, that another call beside is worth its start


def in_widths(length: int) -> int:
    """The places that a row of so many tokens gets where it is attended to."""
    return -(-length // _WIDTH) * _WIDTH


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the tokens of B padded rows of T places lie.

    There are as many as `whole` says; in a pass that several members share each has as many, N / K, so that their products can be made at
    once: the last one is there again and again, for nobody to read.
    """

    places: torch.Tensor  # [N] int64, of B * T
    shape: tuple[int, int]  # B, T
    mask: torch.Tensor  # [B, 1, 1, T] bool: no padding
    members: tuple[int, ...] = ()  # how many rows each member has in a pass that several share
    standing: torch.Tensor | None = (
        None  # [N] of such a pass: the token that each one is, which is another's place if it is there again
    )
    numbers: torch.Tensor | None = None  # [B] of a group: which of all rows they are
    sources: torch.Tensor | None = (
        None  # [B * T] of a group: the token of all N that each place gets; padding: one of its own row
    )

    @functools.cached_property
    def alike(self) -> list[tuple[torch.Tensor, Rows]]:
        """The rows in groups of like length, for what is padded after all: which of the N tokens are a group's, and where these lie
        among its own padded rows. `back` has the tokens' places behind one another."""
        return self._groups(range(len(self.mask)))

    @functools.cached_property
    def alike_of_members(self) -> list[list[tuple[torch.Tensor, Rows]]]:
        """The groups that each member's rows have in a pass of its own; `back_of_members` goes with them."""
        ends = [0, *itertools.accumulate(self.members)]
        return [self._groups(range(start, end)) for start, end in itertools.pairwise(ends)]

    def _groups(self, rows: range) -> list[tuple[torch.Tensor, Rows]]:
        lengths = self.mask.flatten(1).sum(-1)
        starts, widths = self.starts, [in_widths(length) for length in lengths.tolist()]
        found = []
        for places in of_like_length(widths[rows.start : rows.stop], len(rows), _ENOUGH_TOKENS):
            group = [rows[place] for place in places]
            own = lengths[group]
            within = torch.arange(max(widths[row] for row in group), device=own.device)
            mask = within < own[:, None]
            sources = starts[group][:, None] + within.minimum(own[:, None] - 1)
            numbers = torch.tensor(group, device=own.device)
            filled, seen = mask.flatten().nonzero().flatten(), mask[:, None, None]
            alike = Rows(filled, (len(mask), mask.shape[1]), seen, numbers=numbers, sources=sources.flatten())
            found.append((sources[mask], alike))
        return found

    @functools.cached_property
    def back(self) -> torch.Tensor:
        """[N] int64: where each token lies when the groups of `alike` come one behind another."""
        return self._back(self.alike)

    @functools.cached_property
    def back_of_members(self) -> torch.Tensor:
        """[N] int64, as `back`."""
        return self._back([group for groups in self.alike_of_members for group in groups])

    def _back(self, groups: list[tuple[torch.Tensor, Rows]]) -> torch.Tensor:
        tokens = torch.cat([tokens for tokens, _ in groups])
        if self.standing is None:
            return tokens.argsort()
        found = torch.empty_like(self.standing)
        found[tokens] = torch.arange(len(tokens), device=tokens.device)
        return found[self.standing]

    @functools.cached_property
    def read(self) -> torch.Tensor | None:
        """[M] int64: the tokens that are not there again; None: all."""
        if self.standing is None:
            return None
        return (self.standing == torch.arange(len(self.standing), device=self.standing.device)).nonzero().flatten()

    @property
    def starts(self) -> torch.Tensor:
        """[B] int64: where the first token of each row lies among all of them."""
        lengths = self.mask.flatten(1).sum(-1)
        starts = lengths.cumsum(0) - lengths
        return starts if self.read is None else self.read[starts]

    def first(self) -> Rows:
        """The first token of each row."""
        return dataclasses.replace(self, places=self.places[self.starts], standing=None)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Of a group: [1, N, ...], all tokens, -> [B, T, ...], its own; padding repeats a token of its row."""
        assert self.sources is not None
        return x[0].index_select(0, self.sources).unflatten(0, self.shape)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [1, N, ...]"""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, T, ...], zeros for padding."""
        whole, tokens, places = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:]), x[0], self.places
        if self.read is not None:
            tokens, places = tokens.index_select(0, self.read), places[self.read]
        return whole.index_copy(0, places, tokens).unflatten(0, self.shape)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The encoder's layers, one after another; none if they are not in one list."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    alike = [list(one) for one in found if len({type(layer) for layer in one}) == 1 and _attends(one[0])]
    return alike[0] if len(alike) == 1 else []


def _attends(layer: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in layer.modules())


def forward_of(layers: list[nn.Module], place: int, first_only: bool = False) -> Callable[..., Any]:
    """What replaces the forward of one of the layers.

    Args:
        first_only: the last layer gives the first token of each row only, see `attention_of`.
    """
    plain, first, last = layers[place].forward, place == 0, place == len(layers) - 1

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = _mask(args, kwargs)
        rows = _found(mask) if first else found_in(mask)
        if rows is None:
            return plain(hidden_states, *args, **kwargs)
        out = plain(rows.take(hidden_states) if first else hidden_states, *args, **kwargs)
        if not last:
            return out
        rows = rows.first() if first_only else rows
        return (rows.put(out[0]), *out[1:]) if isinstance(out, tuple) else rows.put(out)

    return forward


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a layer in BERT's manner: `output` comes behind it, and is called with what it gave and what it read."""
    attention = getattr(layer, "attention", None)
    output = getattr(attention, "output", None)
    fitting = isinstance(output, nn.Module) and {"dense", "LayerNorm"} <= {name for name, _ in output.named_children()}
    return attention if fitting else None


def first_only_of(attention: nn.Module) -> Callable[..., Any]:
    """What replaces the forward of the last layer's attention: what is behind it computes the first token of each row only."""
    plain, output = attention.forward, attention.get_submodule("output")

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = found_in(_mask(args, kwargs))
        if rows is None:
            return plain(hidden_states, *args, **kwargs)
        with _only(output, rows.starts):  # here, where the layer's own forward is computed again with checkpointing
            return plain(hidden_states, *args, **kwargs)

    return forward


def _mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention mask among what a layer is called with, which is its second argument."""
    return kwargs["attention_mask"] if "attention_mask" in kwargs else args[0] if args else None


@contextlib.contextmanager
def _only(module: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Inside the block a module gets these places of everything that it is called with."""
    handle = module.register_forward_pre_hook(lambda _, inputs: tuple(one[:, places] for one in inputs))
    try:
        yield
    finally:
        handle.remove()


def found_in(mask: Any) -> Rows | None:
    """What a mask carries."""
    return getattr(mask, _NAME, None)


def _found(mask: Any) -> Rows | None:
    """Where tokens lie by a mask [B, 1, T, T] bool, if it tells padding and nothing else; noted on the mask."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if found_in(mask) is None:
        seen = mask[:, :, :1]
        if not (mask == seen).all():
            return None
        places = seen.flatten().nonzero().flatten()
        shape, shared = (seen.shape[0], seen.shape[-1]), current()
        found = _as_many(places, shape, seen, shared)
        setattr(mask, _NAME, found)
    return found_in(mask)


def _as_many(places: torch.Tensor, shape: tuple[int, int], seen: torch.Tensor, shared: Routing | None) -> Rows:
    """The rows of a pass of its own, or those of members, each of whom has as many tokens; see `whole`."""
    members = () if shared is None else tuple(shared.row_counts)
    counts = [len(places)] if shared is None else [route.tokens for route in shared.routes]
    ends = list(itertools.accumulate(counts))
    each, device = torch.arange(max(map(whole, counts)), device=places.device), places.device
    tokens = torch.cat([end - count + each.clamp(max=count - 1) for count, end in zip(counts, ends, strict=True)])
    within = torch.cat([each.clamp(max=count - 1) for count in counts])
    firsts = torch.arange(len(counts), device=device).repeat_interleave(len(each)) * len(each)
    return Rows(places[tokens], shape, seen, members, standing=firsts + within)
