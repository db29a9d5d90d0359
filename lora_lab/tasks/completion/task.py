"""Continue pretraining: next-token loss on every token of plain documents, measured by perplexity."""

from __future__ import annotations

import numpy as np

from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.tasks.causal_lm.task import DecoderTask
from lora_lab.tasks.completion.config import CompletionConfig


class DocumentEncoder(Encoder):
    """Documents with the tokenizer's own marks around them, in pieces of at most `data.max_tokens`.

    A piece begins with the last token of the one before it, so that every token but the document's first is predicted
    exactly once. Short pieces share a row of the batch (see `Dataset.in_blocks`), and never see each other.
    """

    blocks = True

    def example(self, record: Record, origin: str) -> Encoded:
        ids = self.tokenizer(self.cleaned(promised(record.text)), verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        ids = np.asarray(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=np.int64)
        if len(ids) < 2 or not self._all_but_first(ids).any():
            raise RowError("masked", "a single token, so there is nothing to predict. Remove the row.")
        step = self.config.max_tokens - 1
        pieces = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        examples = [Example(piece, self._all_but_first(piece), origin) for piece in pieces]
        return Encoded([example for example in examples if example.weights.any()])

    def _all_but_first(self, ids: np.ndarray) -> np.ndarray:
        """Weights of a piece's tokens: the beginning of a text, wherever a row puts it, is nothing to say either."""
        weights = 1 - np.isin(ids, self.marks.unlearned).astype(np.float32)
        weights[0] = 0
        return weights


class Completion(DecoderTask[CompletionConfig]):
    """`task=completion`."""

    encoder_class = DocumentEncoder
