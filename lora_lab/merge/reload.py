"""Run a saved checkpoint on given rows with plain transformers: python reload.py FOLDER ROWS LOGITS

Started in a process of its own and importing neither lora_lab nor peft, so that it sees what a deployment would see.

FOLDER: a transformers model folder. ROWS: safetensors with, for row i, `ids.i` [T] int64 and `positions.i` [S] int64.
LOGITS: where to write the logits [sum of S, V], float32, as tensor `logits`.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(folder: str, rows_file: str, logits_file: str, device: str) -> None:
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        sys.exit(f"the checkpoint does not load cleanly: {problems}")
    model = model.to(device).eval()
    rows = load_file(rows_file)
    pieces = []
    with torch.no_grad():
        for i in range(len(rows) // 2):
            ids, positions = rows[f"ids.{i}"].to(device), rows[f"positions.{i}"].to(device)
            pieces.append(model(input_ids=ids[None]).logits[0, positions].float().cpu())
    save_file({"logits": torch.cat(pieces)}, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
