"""The life of a model: it ends with the block that loaded it, before anything else is loaded."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch

from lora_lab.base import load
from lora_lab.config import compose
from lora_lab.errors import MergeError
from lora_lab.merge import bases, combine, shrink
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from lora_lab.training.cohort import Member


class Loads:
    """Every model that is loaded, and how many of the earlier ones were still there at each time."""

    def __init__(self):
        self.models: list[weakref.ref] = []
        self.still_there: list[int] = []

    def watch(self, monkeypatch, *modules) -> None:
        for module in modules:
            monkeypatch.setattr(module, "load_model", self._watched(module.load_model))
        initialize = Member.__init__

        def member(one, *given):
            initialize(one, *given)
            self.models += [weakref.ref(one), weakref.ref(one.optimizer)]

        monkeypatch.setattr(Member, "__init__", member)

    def _watched(self, real):
        def load_model(*given):
            self.still_there.append(sum(one() is not None for one in self.models))
            model = real(*given)
            self.models.append(weakref.ref(model))
            return model

        return load_model


@pytest.fixture
def loads(monkeypatch) -> Loads:
    """Python looks for circles only where it is told to, so that nothing is gone by chance."""
    gc.collect()
    gc.disable()
    found = Loads()
    found.watch(monkeypatch, load, bases)
    yield found
    gc.enable()


@pytest.fixture
def done(config_of, eval_file):
    return pipeline.train(config_of(f"data.eval={eval_file}", "train.max_steps=2"))


MERGED = ("export=merged", "export.dtype=float32", "merge.max_loss_increase=9")


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("quant", ["none", pytest.param("nf4", marks=pytest.mark.long)])
def test_what_was_trained_is_gone_before_the_merge_loads(loads, config_of, eval_file, quant):
    pipeline.train(config_of(f"data.eval={eval_file}", "train.max_steps=2", f"quant={quant}", *MERGED))
    assert loads.still_there == [0] * (2 if quant == "none" else 3)


@pytest.mark.usefixtures("reload_here")
def test_a_refused_merge_leaves_nothing_either(loads, config_of, eval_file):
    more = ("export.targets=[hf,adapter]", "export.dtype=float32", "merge.max_logit_diff=1e-12")
    with pytest.raises(MergeError):
        pipeline.train(config_of(f"data.eval={eval_file}", "train.max_steps=2", *more))
    assert loads.still_there == [0] * 3


@pytest.mark.long
@pytest.mark.usefixtures("reload_here")
def test_what_was_measured_is_gone_before_anything_else_loads(loads, done):
    loads.still_there.clear()
    pipeline.evaluate(str(done.path), [])
    pipeline.merge(str(done.path), ["export.dtype=float32"])
    loose = ["merge.min_top1_agreement=0.01", "merge.max_kl=9", "merge.max_loss_increase=9"]
    pipeline.export(str(done.path), ["export.targets=[hf,adapter]", *loose])  # in another type, so it is merged again
    assert loads.still_there == [0] * 6


@pytest.mark.usefixtures("reload_here")
@pytest.mark.long
def test_nothing_stays_of_adapters_that_were_made_of_others(loads, done, tmp_path):
    folders = [done.path, shutil.copytree(done.path, tmp_path / "other")]
    loads.still_there.clear()
    new = combine.combine([str(folder) for folder in folders], [f"run_dir={tmp_path}/sum"])
    shrink.shrink(str(new.path), ["shrink.ranks=[2]", "shrink.tolerance=9"])
    pipeline.merge(str(new.path), ["export.dtype=float32"])
    assert loads.still_there == [0] * 4


@pytest.mark.long
def test_groups_of_a_sweep_follow_each_other(loads, config_of, overrides, tmp_path):
    configs = [
        compose.compose([*overrides, "train.max_steps=1", *own, f"run_dir={tmp_path}/{place}"])
        for place, own in enumerate((["seed=1"], ["seed=2"], ["model.dtype=bfloat16"]))
    ]
    found = jobs.jobs_of(configs)
    cohort.train(found)
    assert [job.error for job in found] == [None] * 3
    assert loads.still_there == [0, 0]


def test_nothing_is_handed_out_after_the_block(config_of):
    setup = prepare(config_of())
    with setup.loaded() as live:
        view = live.seen_by(setup)
        assert view.model is live.model
        alive = weakref.ref(live.model)
    assert alive() is None
    for one in (live, view):
        with pytest.raises(RuntimeError, match="let go"):
            _ = one.model
    with setup.loaded() as again:  # the setup itself is as it was
        assert isinstance(again.model, torch.nn.Module)


def test_a_block_that_fails_lets_go_too(config_of):
    with pytest.raises(ValueError, match="inside"), prepare(config_of()).loaded() as live:
        alive = weakref.ref(live.model)
        raise ValueError("inside")
    gc.collect()
    assert alive() is None
