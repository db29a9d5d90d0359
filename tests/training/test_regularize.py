"""What NEFTune and FGM compute of packed rows, on tensors without content: nothing there depends on values, so a card is not waited for."""

import dataclasses

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab.data.collate import pack
from lora_lab.data.encode import Example
from lora_lab.training import regularize

LENGTHS = (5, 3, 9)


def test_packed_rows_are_told_apart_without_waiting_for_a_card():
    batch = pack([Example(np.arange(length), np.ones(length, dtype=np.float32), "row") for length in LENGTHS])
    with FakeTensorMode() as mode:
        batch = dataclasses.replace(batch, position_ids=mode.from_tensor(batch.position_ids))
        embedded = torch.empty(1, sum(LENGTHS), 8)
        assert regularize._lengths(batch, embedded).shape == (1, sum(LENGTHS), 1)
        assert regularize._adversarial(embedded, 0.5, batch).shape == embedded.shape


def test_they_are_told_apart_rightly():
    batch = pack([Example(np.arange(length), np.ones(length, dtype=np.float32), "row") for length in LENGTHS])
    gradient = torch.randn(1, sum(LENGTHS), 8)
    expected = [float(length) for length in LENGTHS for _ in range(length)]
    assert regularize._lengths(batch, gradient)[0, :, 0].tolist() == expected
    shifts = regularize._adversarial(gradient, 0.5, batch)[0].split(LENGTHS)
    torch.testing.assert_close(torch.stack([shift.norm() for shift in shifts]), torch.full((3,), 0.5))
