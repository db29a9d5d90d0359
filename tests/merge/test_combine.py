"""Several adapters as one, and one at a lower rank: what comes out is what the formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_lab import cli
from lora_lab.adapters import deltas
from lora_lab.adapters.deltas import Delta, Deltas
from lora_lab.base import load
from lora_lab.config import compose
from lora_lab.config.merge import MergeConfig
from lora_lab.errors import AdapterError, ConfigError
from lora_lab.merge import combine, shrink
from lora_lab.merge.combine import combined
from lora_lab.run import pipeline, run_dir
from lora_lab.runtime import storage
from tests.conftest import make_base

pytestmark = pytest.mark.usefixtures("reload_here")


@pytest.fixture
def trained(config_of, tmp_path, rows_file):
    """Train a run of its own folder: `trained('a', 'adapter.r=8')`. Random rows can only be learned by heart, so they are the
    held-out ones as well."""

    def start(name: str, *more: str) -> str:
        settings = (
            f"data.eval={rows_file}",
            "data.check=off",
            "train.max_steps=3",
            f"run_dir={tmp_path}/{name}",
            *more,
        )
        return str(pipeline.train(config_of(*settings)).path)

    return start


def adapter_of(folder: str) -> Deltas:
    run = run_dir.open_existing(folder)
    base = Path(compose.load(run.config).model.path)
    return deltas.read(run.adapter, load.skeleton(base, load.ModelKind()))


def dense(adapter: Deltas) -> dict[str, torch.Tensor]:
    return {name: update.up @ update.down for name, update in adapter.layers.items()}


LOOSE = ("export.dtype=float32", "merge.max_loss_increase=9")
UNLIKE = [
    ("adapter.r=4",),
    ("adapter=rslora", "adapter.r=8", "adapter.alpha_pattern={q_proj: 7}", "adapter.rank_pattern={v_proj: 2}"),
    ("adapter.r=2", "adapter.target_modules=[q_proj,down_proj]", "seed=5"),
]


@pytest.mark.parametrize("shape", [(10, 6, 4), (3, 6, 4), (6, 6, 4)])
def test_a_rank_above_a_layers_smaller_side_is_filled_with_zeros(shape):
    rank, read, given = shape
    update = Delta(torch.randn(rank, read), torch.randn(given, rank))
    same, kept = update.truncated(rank)
    assert (same.rank, kept) == (rank, pytest.approx(1))
    torch.testing.assert_close(same.up @ same.down, update.up @ update.down, rtol=1e-5, atol=1e-5)


def test_an_update_read_from_files_is_pefts_own(trained, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for number, settings in enumerate(UNLIKE):
        folder = trained(f"run{number}", *settings)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, f"{folder}/adapter")
        found = dense(adapter_of(folder))
        assert found
        for name, delta in found.items():
            layer = model.get_base_model().get_submodule(name)
            torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_the_default_is_the_true_weighted_sum(trained, tmp_path):
    """Of adapters of unlike ranks, scales and layers; the new run is evaluated and merged like any other."""
    folders = [trained(f"run{number}", *settings) for number, settings in enumerate(UNLIKE)]
    weights = [0.5, -0.25, 2.0]
    out = tmp_path / "out"
    pipeline.combine(
        folders, [f"merge.adapters=[{','.join(folders)}]", f"merge.weights={weights}", f"run_dir={out}", *LOOSE]
    )
    parts = [dense(adapter_of(folder)) for folder in folders]
    found = dense(adapter_of(str(out)))
    assert set(found) == set().union(*parts)
    for name, delta in found.items():
        expected = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True) if name in part)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-7)
    assert (out / "merged/config.json").exists()
    report = json.loads((out / "combination.json").read_text())
    assert [one["weight"] for one in report["adapters"]] == weights
    for folder in folders:  # alone: as the run itself measured it
        measured = json.loads((tmp_path / folder / "result.json").read_text())["tuned"]["loss"]
        assert report["held_out"][folder]["alone"]["loss"] == pytest.approx(measured, rel=1e-5)
    evaluation = pipeline.evaluate(str(out), [])
    assert evaluation["tuned"]["loss"] == pytest.approx(report["held_out"][folders[0]]["combined"]["loss"], rel=1e-5)
    again = pipeline.combine([str(out), folders[0]], [f"run_dir={tmp_path}/again", *LOOSE])  # one merge after another
    assert again["refused"] == []
    assert compose.load(out / "config.yaml").merge.adapters == []
    assert "run1 x -0.25" in (out / "merged/README.md").read_text()
    before = storage.sha256(out / "adapter/adapter_model.safetensors")
    pipeline.resume(str(out), [])  # there is nothing to train
    assert storage.sha256(out / "adapter/adapter_model.safetensors") == before


def random_adapters(count: int, rank: int = 4) -> list[Deltas]:
    torch.manual_seed(0)
    return [
        Deltas({name: Delta(torch.randn(rank, 24), torch.randn(16, rank)) for name in ("a", "b")}, {})
        for _ in range(count)
    ]


def test_svd_is_the_best_of_its_rank():
    adapters = random_adapters(2)
    found, kept = combined(adapters, [0.3, 0.7], MergeConfig(method="svd"), 3)
    share = []
    for name, delta in dense(found).items():
        exact = 0.3 * dense(adapters[0])[name] + 0.7 * dense(adapters[1])[name]
        u, s, v = torch.linalg.svd(exact)
        torch.testing.assert_close(delta, u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-4)
        share.append(s[:3].square().sum() / s.square().sum())
    assert kept == pytest.approx(float(sum(share) / 2), rel=1e-5)


def by_ties(parts: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """The three steps of arXiv:2306.01708, section 3, number by number."""
    trimmed = []
    for part in parts:
        least = part.abs().flatten().sort(descending=True).values[int(density * part.numel()) - 1]
        trimmed.append(torch.where(part.abs() >= least, part, 0))
    sign = torch.where(sum(trimmed) >= 0, 1, -1)
    total, count = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(trimmed, weights, strict=True):
        agrees = part.sign() == sign
        total += torch.where(agrees, weight * part, 0)
        count += agrees
    return total / count.clamp_min(1)


def by_magnitude(parts: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    kept = [
        torch.where(p.abs() >= p.abs().flatten().sort(descending=True).values[int(density * p.numel()) - 1], p, 0)
        for p in parts
    ]
    return sum(weight * part for weight, part in zip(weights, kept, strict=True))


@pytest.mark.parametrize(("method", "reference"), [("ties", by_ties), ("magnitude_prune", by_magnitude)])
def test_pruning_works_on_the_updates(method, reference):
    adapters, weights = random_adapters(3), [1.0, 0.5, 2.0]
    found, kept = combined(adapters, weights, MergeConfig(method=method, density=0.4), 16)  # rank of the whole layer
    assert kept == pytest.approx(1.0, abs=1e-5)
    for name, delta in dense(found).items():
        expected = reference([dense(adapter)[name] for adapter in adapters], weights, 0.4)
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_by_a_seed_and_keeps_the_mean(method):
    adapters = random_adapters(2)
    merge = MergeConfig(method=method, density=0.5)
    one, again, other = (dense(combined(adapters, [1.0, 1.0], merge, 16, seed)[0])["a"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    if method == "dare_linear":
        many = [dense(combined(adapters, [1.0, 1.0], merge, 16, seed)[0])["a"] for seed in range(200)]
        exact = sum(dense(adapter)["a"] for adapter in adapters)
        spread = torch.stack(many).std(0) / len(many) ** 0.5
        assert ((torch.stack(many).mean(0) - exact).abs() <= 5 * spread + 1e-4).all()


def test_dora_is_converted_and_says_what_is_lost(trained, tmp_path, capsys):
    folders = [trained("dora", "adapter=dora", "adapter.r=2"), trained("lora", "adapter.r=2")]
    combine.combine(
        folders,
        [
            "merge.weights=[1.0,0.0]",
            f"merge.adapters=[{','.join(folders)}]",
            f"run_dir={tmp_path}/out",
        ],
    )
    assert "DoRA to LoRA of twice its rank" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/combination.json").read_text())["held_out"][folders[0]]
    learned = report["base"]["loss"] - report["alone"]["loss"]
    assert report["combined"]["loss"] - report["alone"]["loss"] < 0.3 * learned


def test_weights_are_searched_on_held_out_rows(trained, tmp_path):
    folders = [
        trained("good", "train.max_steps=8"),
        trained("bad", "optim.lr=0.1", "train.max_steps=8", "train.keep_best=false"),
    ]
    combine.combine(
        folders,
        [
            "merge.search_trials=8",
            f"merge.adapters=[{','.join(folders)}]",
            f"run_dir={tmp_path}/out",
        ],
    )
    report = json.loads((tmp_path / "out/combination.json").read_text())
    found = report["held_out"][folders[0]]
    combine.combine(folders, [f"merge.adapters=[{','.join(folders)}]", f"run_dir={tmp_path}/even"])
    even = json.loads((tmp_path / "even/combination.json").read_text())["held_out"][folders[0]]
    assert found["combined"]["loss"] <= even["combined"]["loss"] + 1e-6


def test_what_cannot_be_combined_is_refused(trained, tmp_path, capsys):
    other = make_base(tmp_path / "other", seed=9)
    one, two = trained("one"), trained("two", f"model.path={other}")
    assert cli.main(["merge", f"merge.adapters=[{one},{two}]", f"run_dir={tmp_path}/out"]) == 2
    assert "Name the base that it was trained on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for words, says in (
        ([f"merge.adapters=[{one}]"], "ame two or more"),
        ([f"merge.adapters=[{one},{one}]"], "two or more different"),
        ([f"merge.adapters=[{one},{two}]", "merge.weights=[1.0]"], "1 weights for 2 adapters"),
        ([f"merge.adapters=[{one},{two}]", "merge.rank=4"], "no effect with merge.method=cat"),
        ([f"merge.adapters=[{one},{two}]", f"run={one}"], "names the runs already"),
        ([f"run={one}", "merge.method=ties"], "merge.method: no effect without merge.adapters"),
        ([f"run={one}", "merge.correction_rank=8"], "no effect without merge.base=corrected"),
        ([f"merge.adapters=[{one},{tmp_path}/none]"], "no run there"),
        ([f"merge.adapters=[{one},{two}]", f"run_dir={one}"], "not empty"),
    ):
        assert cli.main(["merge", *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config, tensors: config.update(r=8), "has rank 4, and adapter_config.json says 8"),
        (lambda config, tensors: config.update(peft_type="NONE"), "lora_lab does not train it"),
        (lambda config, tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)), "has lora_A only"),
    ],
    ids=["rank", "method", "half"],
)
def test_an_adapter_that_contradicts_itself_is_refused(tmp_path, trained, base, change, says):
    from safetensors.torch import load_file, save_file

    adapter = run_dir.open_existing(trained("run", "train.max_steps=1")).adapter
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=says):
        deltas.read(adapter, load.skeleton(base, load.ModelKind()))


def test_heads_cannot_be_summed(config_of, tmp_path):
    from tests.conftest import write_jsonl

    rows = write_jsonl(
        tmp_path / "labels.jsonl", [{"text": f"red {i}", "label": "a" if i % 2 else "b"} for i in range(12)]
    )
    folders = [
        str(
            pipeline.train(
                config_of(
                    "task=classification", f"data.train={rows}", "train.max_steps=1", f"run_dir={tmp_path}/{name}"
                )
            ).path
        )
        for name in ("one", "two")
    ]
    with pytest.raises(AdapterError, match="has a head of its own"):
        combine.combine(folders, [f"run_dir={tmp_path}/out"])


@pytest.mark.parametrize(
    "adapter",
    [[], *(pytest.param([f"adapter={name}"], marks=pytest.mark.long) for name in ("rslora", "dora"))],
    ids=["lora", "rslora", "dora"],
)
def test_shrinking_saves_the_lowest_rank_within_tolerance(trained, tmp_path, adapter):
    folder = trained("run", "adapter.r=8", "train.max_steps=8", *adapter)
    new = shrink.shrink(folder, ["shrink.ranks=[4,2,1]", "shrink.tolerance=2"])
    report = json.loads((tmp_path / "run/shrink.json").read_text())
    figures = {row["rank"]: row for row in report["ranks"]}
    own = json.loads((tmp_path / "run/result.json").read_text())["tuned"]["loss"]
    assert figures[8]["loss"] == pytest.approx(own, rel=1e-4)  # uncut, by other factors
    assert figures[8]["kept"] == pytest.approx(1.0)
    assert 1 > figures[4]["kept"] > figures[2]["kept"] > figures[1]["kept"] > 0
    for row in figures.values():
        assert row["rise"] == pytest.approx(row["loss"] - figures[8]["loss"], abs=1e-9)
    good = [rank for rank in (4, 2, 1) if figures[rank]["rise_at_most"] <= 2]
    assert report["chosen"] == min(good)
    assert compose.load(new.config).adapter.r == min(good)
    evaluation = pipeline.evaluate(str(new.path), [])
    assert evaluation["tuned"]["loss"] == pytest.approx(figures[min(good)]["loss"], rel=1e-4)
    assert pipeline.merge(str(new.path), ["export.dtype=float32"])["refused"] == []


@pytest.mark.long
def test_what_few_rows_cannot_tell_is_no_equal_loss(trained, tmp_path, capsys):
    folder = trained("run", "adapter.r=4", "train.max_steps=8")
    assert shrink.shrink(folder, ["shrink.ranks=[1]", "shrink.tolerance=0"]) is None
    _, row = json.loads((tmp_path / "run/shrink.json").read_text())["ranks"]
    assert row["rise_at_most"] > max(0, row["rise"])
    between = (max(0, row["rise"]) + row["rise_at_most"]) / 2  # the measured loss is within it, the true one may not be
    capsys.readouterr()
    assert shrink.shrink(folder, ["shrink.ranks=[1]", f"shrink.tolerance={between}"]) is None
    assert "so few rows allow up to" in " ".join(capsys.readouterr().out.split())
    assert shrink.shrink(folder, ["shrink.ranks=[1]", f"shrink.tolerance={row['rise_at_most'] * 1.01}"]) is not None


def test_the_margin_of_a_loss_is_that_of_paired_rows():
    import numpy as np
    from scipy import stats

    from lora_lab.tasks.metrics import paired_margin

    draw = np.random.default_rng(0)
    whole, lower = draw.random((2, 30))
    rows = [f"row {number}" for number in range(30)]
    sums = [np.stack([losses, np.ones(30)], axis=1) for losses in (lower, whole)]
    interval = stats.ttest_rel(lower, whole).confidence_interval(0.9)  # two-sided
    expected = interval.high - (lower - whole).mean()
    assert paired_margin(*sums, rows, 0.95) == pytest.approx(expected)
    # pieces of one row are no rows of their own, and tokens count as they do in the mean
    halves = [np.repeat(each / 2, 2, axis=0) for each in sums]
    assert paired_margin(*halves, [one for one in rows for _ in range(2)], 0.95) == pytest.approx(expected)
    assert paired_margin(*(each * 7 for each in sums), rows, 0.95) == pytest.approx(expected)
    assert paired_margin(sums[0][:1], sums[1][:1], rows[:1], 0.95) == np.inf


def test_nothing_is_saved_where_no_rank_is_as_good(trained, tmp_path):
    folder = trained("run", "adapter.r=4", "train.max_steps=8")
    assert shrink.shrink(folder, ["shrink.ranks=[1]", "shrink.tolerance=0"]) is None
    assert not (tmp_path / "run/shrunk").exists()
    for given, says in (("[4]", "must all be below"), ("[8,1]", "must all be below")):
        with pytest.raises(ConfigError, match=says):
            shrink.shrink(folder, [f"shrink.ranks={given}"])
