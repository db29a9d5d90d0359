"""The merged checkpoint is the model that was trained, or it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_lab import cli
from lora_lab.base.weights import Weights
from lora_lab.config import compose
from lora_lab.config.merge import MergeConfig
from lora_lab.errors import ConfigError, MergeError
from lora_lab.merge import stream
from lora_lab.run import pipeline, run_dir
from lora_lab.run.prepared import Trained, prepare
from lora_lab.runtime import storage
from lora_lab.verify import parity
from tests.conftest import make_tokenizer, write_jsonl
from tests.tasks.test_tasks import make_encoder_tokenizer


@pytest.fixture
def trained(config_of, tmp_path, eval_file):
    def start(*more: str):
        return pipeline.train(config_of(f"data.eval={eval_file}", "train.max_steps=4", *more))

    return start


PLAIN_LOAD = """
import importlib.util, sys
missing = [name for name in ("peft", "bitsandbytes", "accelerate", "lora_lab") if importlib.util.find_spec(name) is None]
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "red cat"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
generated = model.generate(**ids, max_new_tokens=4, do_sample=False)
print(len(missing), generated.shape[0], model.dtype, model.generation_config.eos_token_id)
"""


def python_without(packages: tuple[str, ...], folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code where the named packages are not installed: a folder of links to all the others stands in for site-packages."""
    folder.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith((*packages, "_editable", "__editable")) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.long
def test_quantized_training_sharded_merge_and_plain_loading(trained, tmp_path):
    # random weights feel quantization far more than trained ones do
    loose = ("merge.base=full_precision", "merge.max_loss_increase=9", "merge.min_top1_agreement=0.5", "merge.max_kl=1")
    folder = trained("quant=nf4", "model.dtype=bfloat16", "export=merged", "export.max_shard_size=100KB", *loose).path
    merged = folder / "merged"
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    assert (merged / "chat_template.jinja").exists()
    absent = ("peft", "bitsandbytes", "accelerate", "lora_lab", "datasets", "hydra", "pydantic")
    done = python_without(absent, tmp_path / "site", PLAIN_LOAD, str(merged))
    assert done.stdout.split() == ["4", "1", "torch.bfloat16", "2"], done.stderr[-2000:]
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["trained_on"] == "nf4"
    # quantization is what the two gaps differ by
    assert report["merged_vs_model_as_trained"]["kl"] > report["merged_vs_base_and_adapter"]["kl"]


@pytest.mark.usefixtures("reload_here")
def test_a_refused_merge_keeps_the_trained_run(trained, tmp_path):
    with pytest.raises(MergeError, match="loss"):
        trained("quant=nf4", "model.dtype=bfloat16", "export=merged", "merge.max_loss_increase=1e-9")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tuned"]["loss"] < result["base"]["loss"]
    assert result["merge"]["refused"]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "run/merged").exists()


@pytest.mark.usefixtures("reload_here")
def test_a_merge_that_differs_is_refused_and_not_published(trained, tmp_path, capsys, monkeypatch):
    folder = trained().path
    real = parity.reloaded_outputs

    def other(*args):
        return [{name: row * 1.5 for name, row in outputs.items()} for outputs in real(*args)]

    monkeypatch.setattr(parity, "reloaded_outputs", other)
    assert cli.main(["merge", f"run={folder}", "export.dtype=float32"]) == 4
    message = capsys.readouterr().err
    assert "not published, because max |logit difference|" in message
    assert not (folder / "merged").exists()
    assert json.loads((folder / "merge_report.json").read_text())["refused"]
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    monkeypatch.undo()
    assert cli.main(["merge", f"run={folder}", "export.dtype=float32"]) == 0
    assert (folder / "merged/config.json").exists()


@pytest.mark.long
def test_checkpoint_that_does_not_load_is_refused(tmp_path, base):
    import shutil

    from lora_lab.verify.parity import Probe

    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(MergeError, match="plain transformers cannot load .*does not load cleanly"):
        parity.reloaded_logits(broken, "AutoModelForCausalLM", Probe([], [], None), torch.device("cpu"))


def gap(**changes) -> parity.Gap:
    values = {"max_logit_diff": 0.0, "kl": 0.0, "top1_agreement": 1.0, "reference_loss": 1.0, "loss": 1.0}
    return parity.Gap(**{**values, **changes})


@pytest.mark.parametrize(
    ("arithmetic", "trained", "dtype", "says"),
    [
        (gap(max_logit_diff=0.1), gap(), "float32", "max |logit difference|"),
        (gap(max_logit_diff=float("nan")), gap(), "float32", "max |logit difference|"),
        (gap(kl=0.5), gap(), "bfloat16", "KL"),
        (gap(kl=float("nan")), gap(), "bfloat16", "KL"),
        (gap(top1_agreement=0.5), gap(), "bfloat16", "top-1"),
        (gap(), gap(loss=1.2), "bfloat16", "loss +0.2"),
        (gap(), gap(loss=float("nan")), "bfloat16", "loss"),
    ],
)
def test_each_limit_refuses(arithmetic, trained, dtype, says):
    assert parity.judge(gap(), gap(), MergeConfig(), dtype) == []
    assert says in " ".join(parity.judge(arithmetic, trained, MergeConfig(), dtype))


def test_compare_measures_what_it_says():
    targets = [torch.tensor([0]), torch.tensor([1])]  # two rows of one position
    rows = parity.Probe(
        targets, [], SimpleNamespace(config=SimpleNamespace(vectors=False), compared_targets=lambda example: example)
    )
    reference = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    shifted = reference + 5.0  # a shift of all logits changes no distribution
    same = parity.compare(reference.split(1), shifted.split(1), rows)
    assert (same.kl, same.top1_agreement, same.max_logit_diff) == (pytest.approx(0, abs=1e-6), 1.0, 5.0)
    other = torch.tensor([[2.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    p, q = reference.softmax(-1), other.softmax(-1)
    different = parity.compare(reference.split(1), other.split(1), rows)
    assert different.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert different.top1_agreement == 0.5
    assert different.loss == pytest.approx(-q.log()[[0, 1], [0, 1]].mean().item(), rel=1e-5)


def test_adapter_folder_is_plain_peft(trained, base, eval_file):
    """peft alone loads it, without a warning, and gives the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = trained().path
    mine = Trained(run_dir.open_existing(str(folder)), prepare(compose.load(folder / "config.yaml"))).loaded().model
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "adapter"
    ).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, mine.eval()(input_ids=ids).logits, rtol=0, atol=1e-4)
        with plain.disable_adapter():
            assert not torch.allclose(plain(input_ids=ids).logits, mine(input_ids=ids).logits, atol=1e-2)


@pytest.mark.usefixtures("reload_here")
def test_serving_the_merged_folder_renders_what_was_trained(trained):
    """The template that travels with the checkpoint gives the tokens that stand before every trained answer."""
    from transformers import AutoTokenizer

    from lora_lab.run import prepared

    done = trained("export=merged", "export.dtype=float32")
    tokenizer = AutoTokenizer.from_pretrained(done.merged)
    config = compose.load(done.config)
    for example in prepared.build_data(config, prepared.find_base(config))[0].train:
        ids = tokenizer.apply_chat_template(example.messages[:-1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert example.input_ids[: len(ids)].tolist() == ids
        assert example.supervised[len(ids) :].any()
        assert not example.supervised[: len(ids)].any()


@pytest.mark.parametrize("method", ["nf4", *(pytest.param(one, marks=pytest.mark.long) for one in ("fp4", "int8"))])
@pytest.mark.usefixtures("reload_here")
def test_what_to_merge_into_is_measured(trained, method):
    folder = trained(
        "export=merged", "export.dtype=float32", f"quant={method}", "train.max_steps=8", "merge.max_loss_increase=9"
    ).path
    report = json.loads((folder / "merge_report.json").read_text())
    losses = {name: gap["loss"] for name, gap in report["bases"].items()}
    assert set(losses) == {"full_precision", "dequantized"}
    assert report["base"] == min(losses, key=losses.get)
    assert report["merged_vs_model_as_trained"]["loss"] == pytest.approx(losses[report["base"]], rel=1e-5)
    if method != "int8":  # which rounds its inputs as well; 4 bits read back are what training computed with
        assert report["bases"]["dequantized"]["kl"] < 1e-6 < report["bases"]["full_precision"]["kl"]


def test_a_correction_goes_towards_what_training_saw(config_of):
    from lora_lab.merge import bases
    from lora_lab.run.prepared import prepare

    def weights(policy: str, rank: int = 1) -> dict[str, torch.Tensor]:
        given = [f"merge.correction_rank={rank}"] if policy == "corrected" else []
        config = config_of("quant=nf4", f"merge.base={policy}", "export.dtype=float32", *given)
        return bases.load(policy, prepare(config)).state_dict()

    seen, published = weights("dequantized"), weights("full_precision")
    errors = {0: published, **{rank: weights("corrected", rank) for rank in (4, 16, 64)}}
    changed = [name for name in seen if not torch.equal(seen[name], published[name])]
    assert len(changed) == 28
    for name in changed:
        gaps = [float((found[name] - seen[name]).norm() / seen[name].norm()) for found in errors.values()]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[0] > 0.05
        if min(seen[name].shape) <= 64:
            assert gaps[-1] < 1e-5  # the layer's whole rank


def test_a_base_to_merge_into_without_effect_is_refused(config_of):
    with pytest.raises(ConfigError, match=r"merge\.base=dequantized: no effect with quant\.method=none"):
        config_of("merge.base=dequantized")


@pytest.mark.parametrize(
    ("tied", "adapter"),
    [
        pytest.param(False, [], marks=pytest.mark.long),
        pytest.param(True, ["adapter=rslora", "adapter.rank_pattern={v_proj: 8}"], marks=pytest.mark.long),
        pytest.param(True, ["adapter=dora"], marks=pytest.mark.long),
        pytest.param(True, [], marks=pytest.mark.long),
        pytest.param(False, ["adapter=dora"], marks=pytest.mark.long),
    ],
    ids=["untied", "tied-rslora", "tied-dora", "tied", "untied-dora"],
)
def test_float32_merge_equals_base_and_adapter(trained, base, tied_base, tied, adapter):
    """Written file by file: the same weights as peft's own merge; and, reloaded by plain transformers in a process of its own,
    the logits of this random model, which are large, equal to 2e-4."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = tied_base if tied else base
    settings = ["export=merged", "export.dtype=float32", "export.max_shard_size=100KB"]
    folder = trained(f"model.path={path}", *settings, *adapter).path
    report = json.loads((folder / "merge_report.json").read_text())
    limit = 5e-4 if "adapter=dora" in adapter else 2e-4  # DoRA divides by norms, live and merged in another order
    # trained on float32 as well, by functions that sum in another order
    for name in ("merged_vs_base_and_adapter", "merged_vs_model_as_trained"):
        assert report[name]["max_logit_diff"] <= limit
        assert report[name]["top1_agreement"] == 1.0
    assert report["refused"] == []
    assert report["written"] == "file by file"
    assert json.loads((folder / "merged/config.json").read_text())["tie_word_embeddings"] is tied

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload().state_dict()
    found = Weights(folder / "merged")
    assert set(found) == {name for name in expected if not (tied and name == "lm_head.weight")}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    shards = sorted((folder / "merged").glob("model-*.safetensors"))
    index = json.loads((folder / "merged/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert index["metadata"]["total_size"] == sum(found[name].nbytes for name in found)
    largest = max(found[name].nbytes for name in found)
    for shard in shards:
        storage.check_safetensors(shard)
        assert shard.stat().st_size <= max(100_000, largest) + 4096


@pytest.mark.usefixtures("reload_here")
def test_names_that_files_and_model_do_not_share_are_merged_in_memory(trained, base, tmp_path):
    """A checkpoint of the inner model alone: transformers finds its tensors by prefix, a copy name by name would not."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "inner")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(inner, folder / "model.safetensors", {"format": "pt"})
    done = trained(f"model.path={folder}", "export=merged", "export.dtype=float32").path
    report = json.loads((done / "merge_report.json").read_text())
    assert report["written"].startswith("from memory: the base's files have no tensor")
    assert report["refused"] == []


@pytest.mark.usefixtures("reload_here")
def test_what_was_there_is_kept(trained, monkeypatch, capsys):
    """A merge is never written onto its source, and a disk that fills up leaves the earlier checkpoint."""
    folder = trained("export=merged", "export.dtype=float32").path
    before = {file.name: file.read_bytes() for file in (folder / "merged").iterdir()}
    assert (
        cli.main(["merge", f"run={folder}", f"model.path={folder}/merged"]) == 2
    )  # merged twice: another base by its weights
    assert "Name the base that it was trained on" in capsys.readouterr().err
    real = stream._merged
    count = iter(range(10))

    def full(*args):
        if next(count) == 5:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(stream, "_merged", full)
    assert cli.main(["merge", f"run={folder}"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (folder / "merged").iterdir()} == before
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("nf4", "dequantized"),
        *(
            pytest.param(method, policy, marks=pytest.mark.long)
            for method, policy in [
                ("nf4", "corrected"),
                ("nf4", "auto"),
                ("int8", "dequantized"),
                ("int8", "corrected"),
                ("int8", "auto"),
            ]
        ),
    ],
)
def test_layers_that_quantizing_turned_are_turned_back(trained, tmp_path, policy, method):
    """GPT-2 keeps its weights the other way round, and bitsandbytes' layers do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = len(make_tokenizer(tmp_path / "base"))
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, initializer_range=0.1, **shape)).save_pretrained(tmp_path / "base")
    loose = ("merge.max_loss_increase=9", "merge.min_top1_agreement=0.5", "merge.max_kl=1")
    done = trained(
        f"model.path={tmp_path}/base", f"quant={method}", f"merge.base={policy}", "export=merged", "export.dtype=float32", *loose
    )  # fmt: skip
    report = json.loads(done.merge_report.read_text())
    assert report["refused"] == []
    assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 1e-3
    if policy == "dequantized" and method == "nf4":
        assert report["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    "kind", ["XLMRoberta", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("Camembert", "Roberta"))]
)
def test_a_tied_output_matrix_is_no_new_part(config_of, tmp_path, kind, capsys):
    """Masked-language heads whose decoder is the input embedding: trained through the adapter alone, and merged as one matrix."""
    import transformers

    folder = tmp_path / "base"
    folder.mkdir()
    size = len(make_encoder_tokenizer(folder))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=130,
        type_vocab_size=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"red cat {i} and two dogs"} for i in range(12)])
    done = pipeline.train(
        config_of(
            f"model.path={folder}",
            "task=masked_lm",
            f"data.train={rows}",
            "train.max_steps=4",
            "export=merged",
            "export.dtype=float32",
        )
    )
    assert "trained whole" not in capsys.readouterr().out
    assert json.loads(done.merge_report.read_text())["refused"] == []
