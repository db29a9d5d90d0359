"""The base model's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base import inspect, overruled
from lora_lab.errors import BaseModelError
from lora_lab.runtime import console
from lora_lab.runtime.reading import read_json, reading

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

# Used, and said aloud, for a tokenizer that has no chat template. It travels with the merged checkpoint.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
MAX_TEMPLATE = 2**20  # characters; the longest of known models has some 30,000
# How a base's files are read, because a run keeps what it was trained with. 1: tokens as transformers' class makes them; 2: as the files
# say; 3: as 2, and a GGUF file's numbers as they are, where a run computes in float32.
READER = 3
TOKENS_AS_WRITTEN, NUMBERS_AS_WRITTEN = 2, 3
_DEFAULT = "default"  # transformers' name for the template that is used when none is named


def load_tokenizer(folder: Path, chat: bool = True, reader: int = READER) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a pad token, and for `chat` with a chat template.

    Args:
        reader: see `READER`; 1: as transformers' class makes it, which is how runs were trained once.

    Raises:
        BaseModelError: the folder has no tokenizer, one that cannot be trusted, or one that cannot tell where in the text a token
            lies.
    """
    tokenizer = read_tokenizer(folder, reader)
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder}: its tokenizer gives no character offsets, which exact masks need.")
    tokenizer.chat_template = chosen_template(folder, tokenizer.chat_template)
    if not chat:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise BaseModelError(f"{folder}: its tokenizer has neither a padding nor an end-of-sequence token.")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"{folder}: its tokenizer has no end-of-sequence token, so answers could never end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only pads prompts in generation; labels never depend on it
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def pad_within(tokenizer: PreTrainedTokenizerBase, size: int | None, folder: Path) -> None:
    """Choose another padding token where the model has no embedding for the tokenizer's own: some tokenizers got one afterwards.

    What is padded is masked, so the choice changes nothing that is learned.

    Args:
        size: rows of the model's embedding; None: not known yet.

    Raises:
        BaseModelError: no other token can be used for it.
    """
    own, number = tokenizer.pad_token, tokenizer.pad_token_id
    if size is None or number is None or number < size:
        return
    for other, token in ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.unk_token, tokenizer.unk_token_id)):
        if other is not None and token is not None and token < size:
            tokenizer.pad_token = other
            console.say(
                "padding",
                f"{other!r} pads, because {own!r} has id {number} and the model's embedding has {size} rows; what is padded is masked",
            )
            return
    raise BaseModelError(
        f"{folder}: its padding token {own!r} has id {number}, and the model's embedding has {size} rows; so do its "
        "end-of-sequence and unknown tokens. The tokenizer does not belong to this model: take the model's own, or resize the model."
    )


def read_tokenizer(folder: Path, reader: int = READER) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder as its files say.

    Args:
        reader: see `load_tokenizer`.

    Raises:
        BaseModelError: there is none, it cannot be read, or it names files outside the folder.
    """
    from transformers import AutoTokenizer

    inspect.check_files(folder)
    with reading(f"{folder}: its tokenizer", BaseModelError):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **_own_files(folder)
        )
        _try(tokenizer)
    if reader < TOKENS_AS_WRITTEN:
        return tokenizer
    tokenizer, said = overruled.as_written(folder, tokenizer)
    if said:
        console.say("tokenizer", said)
        with reading(f"{folder}: its tokenizer", BaseModelError):
            _try(tokenizer)
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Settings of a wrong kind are not noticed before they are used."""
    encoded = tokenizer(["a", "a b"], padding=tokenizer.pad_token_id is not None)
    tokenizer.decode(encoded["input_ids"][0])


def _own_files(folder: Path) -> dict[str, None]:
    """The files that `tokenizer_config.json` names, to be taken from the folder instead: many note where they once lay.

    Raises:
        BaseModelError: a version of the tokenizer's file that is outside the folder.
    """
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    config = read_json(file, BaseModelError)
    versions = config.get("fast_tokenizer_files", [])
    for name in versions if isinstance(versions, list) else [versions]:
        if not isinstance(name, str) or Path(name).name != name:
            raise BaseModelError(
                f"{file}: fast_tokenizer_files names {str(name)[:200]!r}, which is outside the folder. The folder is not trusted."
            )
    return dict.fromkeys(key for key in config if key.endswith("_file"))


def chosen_template(source: Path, templates: Any) -> str | None:
    """The one chat template that is used, and saved with merges: the default of several. None where there is none.

    Args:
        source: where they come from, for messages.

    Raises:
        BaseModelError: several without a default, something that is no text, or too long.
    """
    if isinstance(templates, dict):
        if _DEFAULT not in templates:
            raise BaseModelError(
                f"{source}: its tokenizer has the chat templates {', '.join(map(str, templates)) or '(none)'}, and none is called "
                f"'{_DEFAULT}'. Give the one to use this name in a copy of the folder."
            )
        others = [str(name) for name in templates if name != _DEFAULT]
        if others:
            console.say(
                "template", f"'{_DEFAULT}' is used of the tokenizer's chat templates; not used: {', '.join(others)}"
            )
        templates = templates[_DEFAULT]
    if templates is None:
        return None
    if not isinstance(templates, str):
        raise BaseModelError(f"{source}: its chat template must be text, not {type(templates).__name__}.")
    if len(templates) > MAX_TEMPLATE:
        raise BaseModelError(f"{source}: its chat template has {len(templates):,} characters, above {MAX_TEMPLATE:,}.")
    return templates


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save tokenizer and chat template beside a model, so that it is the same to whoever loads it.

    Raises:
        BaseModelError: it would be another.
    """
    overruled.write(tokenizer, folder, overruled.KNOWN_TO_ALL)
    overruled.check_reloads(folder, tokenizer)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int] | np.ndarray, **options: Any) -> str:
    """The text of one row of token ids. transformers' own `decode` takes several rows as well."""
    text = tokenizer.decode(ids, **options)
    assert isinstance(text, str)
    return text
