"""peft's types that are not trained here: each is refused with a sentence, and the sentence is true of the peft that is installed."""

from __future__ import annotations

import json
import tempfile

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lora_lab.adapters import ADAPTERS, NOT_TRAINED, files
from lora_lab.errors import AdapterError
from tests.conftest import fails

_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 5, 12, 6, 13, 7]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def adapted(name: str, base=None, **settings):
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    return peft.get_peft_model(base or llama(), kind(task_type="CAUSAL_LM", **settings)).eval()


def trained(model) -> set[str]:
    return {name for name, one in model.named_parameters() if one.requires_grad}


def xlora() -> None:
    """It trains a classifier alone, beside adapters that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
        model = adapted("XLORA", hidden_size=32, adapters={"0": folder})
    assert all("xlora_classifier" in name for name in trained(model))


def poly() -> None:
    model = adapted("POLY", target_modules=["q_proj"], n_tasks=2)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(input_ids=IDS)


def multitask() -> None:
    model = adapted("MULTITASK_PROMPT_TUNING", num_virtual_tokens=4, num_tasks=2)
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model(input_ids=IDS)


def cpt() -> None:
    """Its loss is not the cross-entropy of its logits."""
    told = {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
    assert not plain_loss(adapted("CPT", **told))


def adaption_prompt() -> None:
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'qwen2'"):
        adapted("ADAPTION_PROMPT", Qwen2ForCausalLM(Qwen2Config(**_SIZES)), adapter_len=4, adapter_layers=2)


def shadow() -> None:
    model = adapted("SHADOW")
    assert sum(one.numel() for name, one in model.named_parameters() if "shadow" in name) > 10_000
    assert not plain_loss(model.train())


def cartridge() -> None:
    """It is a prefix in the cache, and peft makes it of a text; nothing in it is trained by that text."""
    model = adapted("CARTRIDGE", num_virtual_tokens=4)
    assert model(input_ids=IDS).logits.shape[1] == IDS.shape[1]
    assert hasattr(peft, "initialize_kv_prefix_from_text")


def plain_loss(model) -> bool:
    found = model(input_ids=IDS, labels=IDS)
    logits = found.logits[:, -IDS.shape[1] : -1]
    return torch.allclose(found.loss, cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


TRIED = {
    "XLORA": xlora, "POLY": poly, "MULTITASK_PROMPT_TUNING": multitask, "CPT": cpt, "ADAPTION_PROMPT": adaption_prompt, "SHADOW": shadow,
    "CARTRIDGE": cartridge,
}  # fmt: skip


def test_each_is_a_type_of_peft_that_no_method_is_of():
    assert NOT_TRAINED.keys() == TRIED.keys() <= peft.PeftType.__members__.keys()
    assert not NOT_TRAINED.keys() & {section.peft_type for section in ADAPTERS.values()}


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_the_reason_is_true_and_said(name, tmp_path, capsys):
    TRIED[name]()
    said = f"lora_lab does not train it, because {NOT_TRAINED[name]}"
    assert f"adapter={name.lower()}: no such adapter. {said}." in fails(["train", f"adapter={name.lower()}"], capsys)
    (tmp_path / files.CONFIG).write_text(json.dumps({"peft_type": name}))
    with pytest.raises(AdapterError) as error:
        files.settings(tmp_path)
    assert f"peft_type={name}: {said}. There are: LORA" in str(error.value)
