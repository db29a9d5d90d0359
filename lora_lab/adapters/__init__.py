"""Adapter methods: one file each, a section of the configuration that answers for itself (see `base.py`). Nothing here imports torch."""

from lora_lab.adapters.base import AdapterSection
from lora_lab.adapters.methods.adalora import AdaLoraAdapter
from lora_lab.adapters.methods.adamss import AdamssAdapter
from lora_lab.adapters.methods.beft import BeftAdapter
from lora_lab.adapters.methods.boft import BoftAdapter
from lora_lab.adapters.methods.bottleneck import BottleneckAdapter
from lora_lab.adapters.methods.c3a import C3aAdapter
from lora_lab.adapters.methods.deft import DeftAdapter
from lora_lab.adapters.methods.delora import DeloraAdapter
from lora_lab.adapters.methods.fourierft import FourierftAdapter
from lora_lab.adapters.methods.frod import FrodAdapter
from lora_lab.adapters.methods.glora import GloraAdapter
from lora_lab.adapters.methods.gralora import GraloraAdapter
from lora_lab.adapters.methods.hira import HiraAdapter
from lora_lab.adapters.methods.hra import HraAdapter
from lora_lab.adapters.methods.ia3 import Ia3Adapter
from lora_lab.adapters.methods.lily import LilyAdapter
from lora_lab.adapters.methods.ln_tuning import LnTuningAdapter
from lora_lab.adapters.methods.loha import LohaAdapter
from lora_lab.adapters.methods.lokr import LokrAdapter
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.adapters.methods.miss import MissAdapter
from lora_lab.adapters.methods.oft import OftAdapter
from lora_lab.adapters.methods.osf import OsfAdapter
from lora_lab.adapters.methods.p_tuning import PTuningAdapter
from lora_lab.adapters.methods.peanut import PeanutAdapter
from lora_lab.adapters.methods.prefix_tuning import PrefixTuningAdapter
from lora_lab.adapters.methods.prompt_tuning import PromptTuningAdapter
from lora_lab.adapters.methods.psoft import PsoftAdapter
from lora_lab.adapters.methods.pvera import PveraAdapter
from lora_lab.adapters.methods.randlora import RandloraAdapter
from lora_lab.adapters.methods.road import RoadAdapter
from lora_lab.adapters.methods.shira import ShiraAdapter
from lora_lab.adapters.methods.supertuning import SupertuningAdapter
from lora_lab.adapters.methods.tinylora import TinyloraAdapter
from lora_lab.adapters.methods.trainable_tokens import TrainableTokensAdapter
from lora_lab.adapters.methods.unilora import UniloraAdapter
from lora_lab.adapters.methods.vblora import VbloraAdapter
from lora_lab.adapters.methods.vera import VeraAdapter
from lora_lab.adapters.methods.waveft import WaveftAdapter

ADAPTERS: dict[str, type[AdapterSection]] = {
    "lora": LoraAdapter,
    "adalora": AdaLoraAdapter,
    "adamss": AdamssAdapter,
    "beft": BeftAdapter,
    "boft": BoftAdapter,
    "bottleneck": BottleneckAdapter,
    "c3a": C3aAdapter,
    "deft": DeftAdapter,
    "delora": DeloraAdapter,
    "fourierft": FourierftAdapter,
    "frod": FrodAdapter,
    "glora": GloraAdapter,
    "gralora": GraloraAdapter,
    "hira": HiraAdapter,
    "hra": HraAdapter,
    "ia3": Ia3Adapter,
    "lily": LilyAdapter,
    "ln_tuning": LnTuningAdapter,
    "loha": LohaAdapter,
    "lokr": LokrAdapter,
    "miss": MissAdapter,
    "oft": OftAdapter,
    "osf": OsfAdapter,
    "p_tuning": PTuningAdapter,
    "peanut": PeanutAdapter,
    "prefix_tuning": PrefixTuningAdapter,
    "prompt_tuning": PromptTuningAdapter,
    "psoft": PsoftAdapter,
    "pvera": PveraAdapter,
    "randlora": RandloraAdapter,
    "road": RoadAdapter,
    "shira": ShiraAdapter,
    "supertuning": SupertuningAdapter,
    "tinylora": TinyloraAdapter,
    "trainable_tokens": TrainableTokensAdapter,
    "unilora": UniloraAdapter,
    "vblora": VbloraAdapter,
    "vera": VeraAdapter,
    "waveft": WaveftAdapter,
}

# peft's types that are not trained here: a clause why not, and the nearest that is.
NOT_TRAINED: dict[str, str] = {
    "XLORA": "it trains how adapters that exist already are mixed at each token, and no adapter of its own (nearest: merge.adapters)",
    "POLY": "it needs the number of a task beside each row, which rows have not got (nearest: adapter=lora)",
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task beside each row, which rows have not got (nearest: adapter=prompt_tuning)",
    "CPT": "it learns by a loss of its own over the tokens of examples in its prompt, each marked by its kind (nearest: adapter=prompt_tuning)",
    "ADAPTION_PROMPT": "peft puts it into the attention of Llama, Mistral and GPT-2 alone (nearest: adapter=prefix_tuning)",
    "SHADOW": "it trains a second network beside the base, whose own loss is part of the model's (nearest: adapter=parallel)",
    "CARTRIDGE": "it is a prefix that stands for one long text and learns what the base says of that text (nearest: adapter=prefix_tuning)",
}


def reason_against(name: object) -> str:
    """Why a type of peft's is not trained here; empty if nothing is known of it."""
    return NOT_TRAINED.get(str(name).upper(), "")
