"""What measures a card, without one: all of it at tiny shapes on the CPU; interrupted and continued; what travels; what the page says."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import speed_worker
from benchmarks.gpu import __main__ as bench_gpu
from benchmarks.gpu import cells, report, runner, shapes, slices, wheels
from benchmarks.gpu.slices import SCALES, Workload

TINY = dataclasses.replace(
    SCALES["tiny"], workloads=(Workload("tiny", 2, 48, True),), others=(), left_out=("without fused MLP",)
)  # fmt: skip


def here(work: Path):
    """Measure in this process, which has no other tools: their warnings would be errors here."""

    def launch(kind, given, seconds, group):
        told = cells.measured(kind, given, cells.Place(work, "cpu", seconds))
        if kind == "stamp":
            for name in wheels.PEERS:
                told["found"]["versions"].pop(name, None)
        return told

    return launch


def bench(folder: Path, launch, scale=TINY, seconds=460.0, **more) -> runner.Bench:
    return runner.Bench(folder / "out", folder / "work", scale, launch, seconds, **more)


def told(own: runner.Bench, number: int) -> dict[str, dict]:
    return {cell["name"]: cell for cell in own.cells(number)}


def errors(own: runner.Bench) -> dict[str, str]:
    return {name: one["error"] for number in slices.TITLES for name, one in told(own, number).items() if "error" in one}


# -- end to end ---------------------------------------------------------------------------------------------------------


FEW = (
    "matrix products", "tiny 2 x 48 checkpointed: lora_lab", "profile", "ladder", "longest row offloaded", "2 joint", "one run", "rows of 16 + 4,",
)  # fmt: skip


def test_all_of_it_interrupted_and_continued(tmp_path, reload_here):
    """A cell of every kind that starts no process of its own."""
    scale, asked = dataclasses.replace(TINY, longest=64), []
    measure = here(tmp_path / "work")

    def stopped(kind, *given):
        asked.append(kind)
        if asked.count("run"):
            raise KeyboardInterrupt
        return measure(kind, *given)

    with pytest.raises(KeyboardInterrupt):
        for number in (2, 3):
            bench(tmp_path, stopped, scale, only=FEW).run(number)
    own = bench(tmp_path, measure, scale, only=FEW)
    before = told(own, 2)
    for number in (2, 3, 4, 5):
        assert own.run(number) == []
    assert errors(own) == {}
    assert told(own, 2) == before
    assert {cell["kind"] for number in slices.TITLES for cell in told(own, number).values()} == {
        "products", "train", "profile", "run", "context", "sweep", "generation"
    }  # fmt: skip
    page = report.page(tmp_path / "out", scale)
    row = next(line for line in page.splitlines() if line.startswith("| 2 x 32 | "))
    assert "not measured" in row  # in turns
    assert row.count("not measured") == 1
    assert "| without fused MLP | not measured |" in page
    assert "A step of " in page


@pytest.mark.long
def test_slices_at_tiny_shapes(tmp_path, reload_here):
    own = bench(tmp_path, here(tmp_path / "work"))
    for number in (2, 3, 4, 5):
        assert own.run(number) == []
    assert errors(own) == {}
    second, third, fourth, fifth = (told(own, number) for number in (2, 3, 4, 5))
    for number in (2, 3, 4, 5):
        assert list(told(own, number)) == [cell.name for cell in slices.of(number, TINY)]
        for cell in told(own, number).values():
            assert cell["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
            assert {"card", "driver", "commit", "sources", "when"} <= cell.keys()

    rows = json.loads((tmp_path / "work" / TINY.workloads[0].rows / "spec.json").read_text())["rows"]
    assert {len(row["input_ids"]) for row in rows} == {48}
    losses = [one["found"]["losses"] for name, one in second.items() if "lora_lab" in name or "fused" in name]
    assert len(losses[0]) == TINY.steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # the same rows and adapter
    assert second["tiny: matrix products"]["found"]["gflops_per_second"] > 0
    assert second["tiny 2 x 48 checkpointed: unsloth"]["absent"] == "unsloth not installed"

    assert third["1 GiB: longest row"]["found"]["fits_tokens"] == TINY.longest
    assert third["1 GiB: ladder, 4 x 48"]["found"]["fits"]
    assert third["1 GiB: merge"]["found"]["merge_seconds"] > 0
    assert third["1 GiB: merge, unquantized base"]["found"]["merge_seconds"] > 0
    assert len(fourth["32 tokens: 2 joint"]["found"]["losses"]) == 2
    assert fifth["generation: 2 rows of 16 + 4"]["found"]["new_tokens_per_second"] > 0

    page = report.page(tmp_path / "out", TINY)
    assert "which only shows that the harness runs" in page
    assert "Failed:" not in page
    assert "| `make test-gpu` | not measured |" in page


@pytest.mark.long
def test_one_command_runs_everything(tmp_path, capsys):
    """Each cell in a process of its own, the tests on a card among them, of which none runs here."""
    words = ["--shapes", "tiny", "--work", str(tmp_path)]
    assert bench_gpu.main([*words, "--slices", "1,2", "--seconds", "400"]) == 0
    assert bench_gpu.main([*words, "--slices", "3,4,5"]) == 0
    first = {name: json.loads((tmp_path / "tiny" / f"slice_{n}.json").read_text()) for n, name in enumerate("abcde", 1)}
    assert [cell["error"] for one in first.values() for cell in one["cells"] if "error" in cell] == []
    [tests] = first["a"]["cells"]
    assert tests["found"]["skipped"] > 10
    assert tests["found"]["failed"] == []
    assert bench_gpu.main(words) == 0  # nothing is left
    again = [json.loads((tmp_path / "tiny" / f"slice_{n}.json").read_text()) for n in range(1, 6)]
    assert [cell["when"] for one in again for cell in one["cells"] if "found" in cell] == [
        cell["when"] for one in first.values() for cell in one["cells"] if "found" in cell
    ]
    assert "docs/gpu.md" not in capsys.readouterr().out


@pytest.mark.long
def test_dry_runs_stand_in_the_page_as_such(tmp_path):
    given = {**next(cell for cell in slices.of(2, TINY) if cell.kind == "train").given, "free": 0}
    found = cells.measured("plan", given, cells.Place(tmp_path, "cpu", 100))["found"]
    assert found["load"] < found["train"]
    one = {"name": "tiny 2 x 48 checkpointed: lora_lab", "card": None, "commit": "abc", "versions": {}, "when": "now"}
    runner.write(tmp_path / "plans.json", [{**one, "found": found}])
    page = report.page(tmp_path, TINY)
    assert "**Nothing on this page has been measured: no card was at hand.** Dry runs are of commit abc" in page
    assert f"| lora_lab | not measured | – | – | not measured | not measured | {found['train']:.2f} | – |" in page


@pytest.mark.long
def test_a_dry_run_of_members_stands_beside_what_is_measured(tmp_path):
    [(name, given)] = slices.joint_steps(TINY)
    place = cells.Place(tmp_path, "cpu", 100)
    found, alone = (
        cells.measured("plan", {**given, "free": 0, "members": count}, place)["found"]
        for count in (given["members"], 1)
    )
    assert found["train"] > alone["train"]
    one = {"name": name, "card": None, "commit": "abc", "versions": {}, "when": "now"}
    runner.write(tmp_path / "plans.json", [{**one, "found": found}])
    page = report.page(tmp_path, TINY)
    assert (
        f"| 2 members, a row of 32 tokens each: times turns | >= 1.4, within 20 GiB | not measured | {found['train']:.2f} GiB |"
        in page
    )
    assert f"| not measured | not measured | {found['train']:.2f} |" in page


# -- bases and rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "weights"),
    [("llama-3.1-8b", 8030261248), ("qwen3-4b", 4022468096), ("qwen3-14b", 14768307200), ("qwen3-32b", 32762123264)],
)
def test_shapes_are_the_models_own(shape, weights):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config_of(shape, "none"))
    assert sum(one.numel() for one in model.parameters()) == weights
    assert shapes.weights_of(shape, "none") == pytest.approx(2 * weights, rel=1e-3)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_that_is_written_is_loaded_whole(tmp_path, monkeypatch, quant, tied):
    from transformers import AutoModelForCausalLM

    kind, settings = shapes._qwen_3(64, 128, 2, 4, tied)
    settings |= {"vocab_size": 300, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(shapes.SHAPES, "small", (kind, settings))
    monkeypatch.setattr(shapes, "_SHARD", 2**15)
    size = shapes.write_base("small", tmp_path / "base", quant)
    files = list((tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 1
    assert size <= sum(file.stat().st_size for file in files) <= size + 10000 * len(files)
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kinds = {type(one).__name__ for one in model.modules() if isinstance(one, torch.nn.Linear)}
    assert kinds == ({"Linear", "Linear4bit"} if quant == "nf4" else {"Linear"})
    other = speed_worker._model({"model": str(tmp_path / "base"), "quant": "published"}, "bfloat16")  # for other tools
    assert [type(one) for one in other.modules()] == [type(one) for one in model.modules()]
    loss = model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss
    assert 0.5 * torch.tensor(300).log() < loss < 2 * torch.tensor(300).log()


def test_rows_shorter_than_their_template_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 10 tokens: the chat template has "):
        shapes.write_rows(tmp_path / "rows.jsonl", 10, 1)


# -- the order of things ------------------------------------------------------------------------------------------------


class Machine:
    """Measures nothing, and takes as long as it is told."""

    def __init__(self, work: Path, seconds: float = 10.0):
        self.work, self.seconds, self.now, self.asked = work, seconds, 0.0, []
        self.answers: dict[str, dict] = {}
        self.versions = {"torch": "2", "trl": "1", "liger-kernel": "1", "unsloth": "1"}

    def clock(self) -> float:
        return self.now

    def __call__(self, kind, given, seconds, group):
        if kind == "stamp":
            return {"found": {"card": "Card", "card_gib": 24, "driver": "1.0", "versions": self.versions}}
        self.asked.append((kind, given, seconds))
        self.now += min(self.seconds, seconds)
        if self.seconds > seconds:
            return {"error": f"stopped after {seconds:.0f} s"}
        if kind in self.answers:
            return self.answers[kind]
        if kind in ("base", "rows"):
            (self.work / given["path"]).mkdir(parents=True)
        rate = {"gflops_per_second": 1.0, "gflop_per_token": 1.0}
        return {"found": {"tokens_per_second": 1.0, "free": 0, **rate, **cells.parts({}, 1, 1.0)}}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "work")


def test_what_was_measured_is_not_measured_again(tmp_path, machine):
    own = bench(tmp_path, machine, clock=machine.clock)
    assert own.run(2) == []
    count = len(machine.asked)
    assert count == len(slices.of(2, TINY)) + 3  # a base, and two kinds of rows
    again = bench(tmp_path, machine, clock=machine.clock)
    assert again.run(2) == []
    assert len(machine.asked) == count


def test_an_interrupted_slice_goes_on_where_it_stopped(tmp_path, machine):
    def broken(kind, given, seconds, group):
        if len(machine.asked) == 5:
            raise KeyboardInterrupt
        return machine(kind, given, seconds, group)

    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, broken, clock=machine.clock).run(2)
    own = bench(tmp_path, machine, clock=machine.clock)
    assert 0 < len(own.cells(2)) < len(slices.of(2, TINY))
    assert own.run(2) == []
    assert len(machine.asked) == len(slices.of(2, TINY)) + 3
    assert all("found" in cell for cell in own.cells(2))


def test_another_card_is_measured_beside_the_first(tmp_path, machine):
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(1)
    other = bench(
        tmp_path, lambda *given: {"found": {**machine(*given)["found"], "card": "Other"}}, clock=machine.clock
    )
    other.run(1)
    assert [cell["card"] for cell in own.cells(1)] == ["Card", "Other"]
    page = report.page(tmp_path / "out", TINY)
    assert "Measured on: Card, Other." in page
    assert page.index("## Card") < page.index("## Other")


def test_only_cells_that_are_named_are_measured(tmp_path, machine):
    own = bench(tmp_path, machine, clock=machine.clock, only=["in turns", "one run"])
    assert own.run(4) == []
    assert list(told(own, 4)) == ["32 tokens: one run", "32 tokens: 2 in turns"]


def test_a_cell_begins_only_where_its_share_of_time_is_left(tmp_path, machine):
    machine.seconds = 100.0
    own = bench(tmp_path, machine, clock=machine.clock)
    later = own.run(4)  # a base of 100 s, three sweeps of 120 at most
    assert [cell.name for cell in later] == []
    machine.asked.clear()
    own = bench(tmp_path / "other", machine, seconds=250.0, clock=machine.clock)
    machine.work = tmp_path / "other" / "work"
    later = own.run(4)
    assert [kind for kind, _, _ in machine.asked] == ["base", "sweep"]
    assert [cell.name for cell in later] == ["32 tokens: 2 joint", "32 tokens: 2 in turns"]
    assert machine.now <= 1000
    assert own.run(4) == []


def test_a_cell_takes_no_more_than_its_share(tmp_path, machine):
    machine.seconds = 130.0
    machine.work.joinpath(TINY.workloads[0].base).mkdir(parents=True)
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(4)
    assert {seconds for _, _, seconds in machine.asked} == {120}
    assert set(errors(own).values()) == {"stopped after 120 s"}


def test_a_long_cell_that_is_cut_short_is_not_a_failure(tmp_path, machine):
    machine.seconds = 430.0
    own = bench(tmp_path, machine, seconds=300.0, clock=machine.clock)
    assert [cell.name for cell in own.run(1)] == ["tests"]
    assert own.cells(1) == []


def test_a_failure_is_written_and_measured_again_if_asked(tmp_path, machine):
    machine.answers["sweep"] = {"error": "RuntimeError: no"}
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(4)
    assert set(errors(own).values()) == {"RuntimeError: no"}
    page = report.page(tmp_path / "out", TINY)
    assert "| 2 x 32 | failed | failed | failed | – | – | failed | failed |" in page
    assert "- 32 tokens: 2 joint: RuntimeError: no" in page
    machine.asked.clear()
    bench(tmp_path, machine, clock=machine.clock).run(4)
    assert machine.asked == []
    del machine.answers["sweep"]
    own = bench(tmp_path, machine, clock=machine.clock, retry=True)
    own.run(4)
    assert errors(own) == {}


def test_what_cannot_be_prepared_is_tried_once(tmp_path, machine):
    machine.answers["base"] = {"error": "OSError: No space left on device"}
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(2)
    assert [kind for kind, _, _ in machine.asked] == ["base"]
    assert len(errors(own)) == len(slices.of(2, TINY))
    assert all("bases/tiny-nf4 cannot be made: OSError: No space left" in one for one in errors(own).values())


def test_another_tool_that_is_not_there_is_absent_until_it_is(tmp_path, machine):
    machine.versions = {"torch": "2", "trl": "1"}
    bench(tmp_path, machine, clock=machine.clock).run(2)
    own = bench(tmp_path, machine, clock=machine.clock)
    name = "tiny 2 x 48 checkpointed"
    lacks = {peer: told(own, 2)[f"{name}: {peer}"].get("absent") for peer in slices.PEERS}
    assert lacks == {"trl": None, "trl_liger": "liger-kernel not installed", "unsloth": "unsloth not installed"}
    assert "| unsloth | absent | – | – | absent | absent |" in report.page(tmp_path / "out", TINY)
    machine.versions |= {"unsloth": "2"}
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(2)
    assert "found" in told(own, 2)[f"{name}: unsloth"]


def test_bases_that_nothing_needs_any_more_are_removed(tmp_path, machine):
    own = bench(tmp_path, machine, clock=machine.clock)
    own.run(4)
    own.clean([4, 5])
    assert (tmp_path / "work" / TINY.workloads[0].base).exists()
    own.clean([4])
    assert not (tmp_path / "work" / TINY.workloads[0].base).exists()


def test_every_cell_of_the_full_size_has_a_name_of_its_own_and_can_be_prepared():
    for number in slices.TITLES:
        every = slices.of(number, SCALES["full"])
        assert len({cell.name for cell in every}) == len(every)
        for cell in every:
            assert cell.kind in cells.KINDS
            assert cell.seconds < 480
            assert all(slices.prepared(path, SCALES["full"]).seconds < 240 for path in cell.needs)
            json.dumps(cell.given)


def test_a_process_of_its_own_is_ended_with_its_time(tmp_path):
    launch = runner.by_process(tmp_path, "cpu", sys.executable, {})
    found = launch("stamp", {}, 60, "own")["found"]
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["card"] is None
    assert launch("no such kind", {}, 60, "own") == {"error": "KeyError: 'no such kind'"}
    assert launch("stamp", {}, 0.01, "own") == {"error": "stopped after 0 s"}
    gone = runner.by_process(tmp_path, "cpu", "false", {})
    assert gone("stamp", {}, 60, "own") == {"error": "the process ended with 1: "}


@pytest.mark.parametrize(
    ("holds", "most", "found"), [(70000, 131072, 70000), (5, 131072, 5), (0, 1024, 0), (10**9, 131072, 131072)]
)
def test_the_longest_row_is_found_by_halving(holds, most, found):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= holds

    low, high = cells.bisect(fits, 1024, most, lambda: True)
    assert low <= found
    assert max(tried) <= most
    assert len(tried) == len(set(tried)) <= 16
    if high is None:
        assert low == most
    else:
        assert low <= holds < high
        assert high - low <= max(high // 32, 1)


def test_the_search_for_the_longest_row_ends_with_its_time():
    left = iter([True, True, True, False])
    assert cells.bisect(lambda tokens: tokens < 3000, 1024, 131072, lambda: next(left)) == (2048, 4096)


def test_a_row_that_does_not_fit_is_a_failed_allocation(tmp_path, monkeypatch):
    from lora_lab.training import cohort

    real = cohort.learn

    def learn(shares, place, accelerator):
        if shares[0].batches.batches[place].num_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(shares, place, accelerator)

    monkeypatch.setattr(cohort, "learn", learn)
    shapes.write_base("tiny", tmp_path / "base", "nf4")
    given = {"base": "base", "cap": 8, "offload": False, "longest": 256}
    found = cells.measured("context", given, cells.Place(tmp_path, "cpu", 100))["found"]
    assert 96 < found["fits_tokens"] <= 100 < found["too_many_tokens"] <= 104


def test_kernels_are_told_apart_by_their_names():
    names = {
        "matrix products": "sm90_xmma_gemm_bf16bf16_bf16f32_tn_n_tilesize128x128x64", "attention": "flash::flash_bwd_kernel<true>",
        "dequantizing": "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "norms, SwiGLU, RoPE": "_rms_norm_forward_kernel",
        "loss": "at::native::cunn_SoftMaxForward", "copies": "Memcpy DtoH (Device -> Pageable)",
        "optimizer": "at::native::multi_tensor_apply_kernel<FusedAdam>", "other": "at::native::vectorized_elementwise_kernel",
    }  # fmt: skip
    found = cells.parts(dict.fromkeys(names.values(), 0.2), 2, 1.0)
    assert found["parts"] == dict.fromkeys(found["parts"], 0.1)
    assert set(found["parts"]) == set(names)
    assert found["no_kernel"] == pytest.approx(0.2)


def test_what_pytest_says_is_counted():
    said = "tests/a.py::one PASSED [ 10%]\ntests/a.py::two[x y] FAILED [ 20%]\ntests/a.py::three SKIPPED (why) [ 30%]\n"
    found = {"passed": 1, "skipped": 1, "failed": ["tests/a.py::two[x y]"]}
    assert cells.told_by_pytest(said, 1) == {**found, "finished": True}
    assert cells.told_by_pytest(said, None) == {**found, "finished": False}
    with pytest.raises(RuntimeError, match="pytest ended with 4: ERROR: no such file"):
        cells.told_by_pytest("ERROR: no such file\n", 4)


# -- what travels -------------------------------------------------------------------------------------------------------


def test_the_pinned_versions_fit_what_every_library_asks_for():
    """So a machine that has only torch needs this list of wheels, resolved without a network."""
    pins = wheels.pins()
    have = {
        name: dataclasses.replace(one, version=pins.get(name, one.version)) for name, one in wheels._installed().items()
    }
    found = wheels.resolve(wheels.requirements(), have)
    assert {"torch", "transformers", "bitsandbytes", "pytest", "submitit"} <= {wheels.plain(one.name) for one in found}
    assert len(found) > 60
    assert {one.name for one in found if not one.fits} <= {"liger-kernel"}


def test_requirements_of_requirements_are_asked_for():
    have = {
        "a": wheels._Distribution("1.5", ("b>=2", "c; sys_platform == 'never'", "d[e]>1")),
        "b": wheels._Distribution("1.0", ()),
    }
    found = {one.name: str(one) for one in wheels.resolve([Requirement("a>=1")], have)}
    assert found == {
        "a": "a 1.5: installed",
        "b": "b 1.0: installed, but a needs >=2",
        "d": "d>1: missing (needed by a)",
    }  # fmt: skip


def test_extras_of_requirements_are_asked_for_as_well():
    have = {
        "a": wheels._Distribution("1", ("c", "b[fast]")),
        "b": wheels._Distribution("1", ("d; extra == 'fast'", "e; extra == 'other'", "f; python_version < '3.9'")),
        "c": wheels._Distribution("1", ("b",)),
    }
    for python, more in ((None, set()), ("3.8", {"f"})):
        found = wheels.resolve([Requirement("a")], have, python=python)
        assert {one.name for one in found if not one.fits} == {"d"} | more


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """What `--check` says, and its exit code."""
    monkeypatch.setattr(
        wheels, "requirements", lambda card=True: [Requirement("packaging"), Requirement("never-made>=2")]
    )
    monkeypatch.setattr(bench_gpu, "_TORCH", """print('["2.11.0", "13.0", null, "No CUDA GPUs are available"]')""")
    answers = {"ready": {"found": {"problems": []}}}
    monkeypatch.setattr(runner, "by_process", lambda *_: lambda kind, *given: answers[kind])

    def check(*more: str, **told: dict) -> tuple[int, str]:
        answers.update(told)
        code = bench_gpu.main(["--check", "--work", str(tmp_path), *more])
        return code, capsys.readouterr().out

    return check


def test_a_missing_wheel_is_named_before_any_minute_is_spent(checked, tmp_path):
    code, said = checked("--shapes", "tiny")
    assert code == 1
    assert "MISSING never-made>=2: missing (needed by lora_lab)" in said
    assert "1 missing: never-made>=2" in said
    assert "absent  unsloth: unsloth>=2026.10: missing" in said
    own = tmp_path / "wheels" / "own"
    own.mkdir(parents=True)
    wheels._stub(own, "never-made", "1.9")
    assert "1 missing: never-made 1.9+there: wheel never_made-1.9+there-py3-none-any.whl, but lora_lab needs >=2" in checked("--shapes", "tiny")[1]  # fmt: skip
    next(own.iterdir()).unlink()
    wheels._stub(own, "never-made", "2.1")
    code, said = checked("--shapes", "tiny")
    assert code == 0
    assert said.endswith("nothing is missing\n")


def test_a_missing_card_is_named(checked, tmp_path):
    code, said = checked()
    assert code == 1
    assert "a card: torch 2.11.0 sees none (No CUDA GPUs are available; driver " in said
    assert "--shapes tiny runs everything on the CPU" in said


def test_what_only_shows_in_a_process_is_named_too(checked, monkeypatch):
    monkeypatch.setattr(wheels, "requirements", lambda card=True: [Requirement("packaging")])
    monkeypatch.setattr(wheels, "PEERS", {"trl": "packaging", "unsloth": "never-made"})
    broken = {"error": "ImportError: no"}
    code, said = checked("--shapes", "tiny", imported=broken)
    assert code == 0
    assert "BROKEN  trl: ImportError: no" in said
    assert "absent  unsloth" in said
    code, said = checked("--shapes", "tiny", ready={"found": {"problems": ["bitsandbytes: no library"]}})
    assert code == 1
    assert said.endswith("1 missing: bitsandbytes: no library\n")
    assert checked("--shapes", "tiny", ready={"error": "stopped after 120 s"})[0] == 1


def test_a_library_that_quantizes_wrongly_and_little_memory_are_named(tmp_path, monkeypatch):
    import bitsandbytes.functional

    place = cells.Place(tmp_path, "cpu", 60)
    assert cells.measured("ready", {"shape": "tiny"}, place) == {"found": {"problems": []}}
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    monkeypatch.setattr(shapes, "_LIBRARIES", 2**60)
    first, second = cells.measured("ready", {"shape": "tiny"}, place)["found"]["problems"]
    assert "come back from 4 bits as others on cpu" in first
    assert second.startswith("memory: ")

    def missing(*_, **__):
        raise RuntimeError("Configured CUDA binary\nnot found at libbitsandbytes_cuda130.so")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", missing)
    first = cells.measured("ready", {"shape": "tiny"}, place)["found"]["problems"][0]
    assert first == "bitsandbytes on cpu: Configured CUDA binary not found at libbitsandbytes_cuda130.so"


def test_wheels_of_another_python_are_named(tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("a-1-py3-none-any", "b-1-cp27-cp27m-manylinux1_x86_64", "c-1-2-py2.py3-none-any"):
        (tmp_path / "own" / f"{name}.whl").touch()
    [wrong] = wheels.misfits(tmp_path)
    assert wrong.startswith("b-1-cp27-cp27m-manylinux1_x86_64.whl: not for this machine with Python 3.")


def test_nothing_is_measured_where_something_is_missing(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "_bench", None)
    assert bench_gpu.main(["--work", str(tmp_path)]) == 1


def test_disk_is_looked_at_by_the_bases_of_each_slice(tmp_path):
    gib = [bench_gpu._bytes(number, SCALES["full"], tmp_path) / 2**30 for number in slices.TITLES]
    assert gib == pytest.approx([0, 5.3, 35.3, 5.3, 35.1], abs=1)


def test_wheels_are_unpacked_once_and_stand_before_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "requirements", lambda card=True: [Requirement("never-made>=2")])
    for group, name in (("own", "never-made"), ("unsloth", "other")):
        (tmp_path / "wheels" / group).mkdir(parents=True)
        wheels._stub(tmp_path / "wheels" / group, name, "2.1")
    sites = tmp_path / "site"
    paths = wheels.unpack(tmp_path / "wheels", sites)
    assert paths == {"own": [sites / "own"], "trl": [sites / "own"], "unsloth": [sites / "unsloth", sites / "own"]}
    assert wheels._installed(*paths["unsloth"])["never-made"].version == "2.1+there"
    mark = sites / "own" / "mark"
    mark.touch()
    wheels.unpack(tmp_path / "wheels", sites)
    assert mark.exists()
    wheels._stub(tmp_path / "wheels" / "own", "more", "1")
    wheels.unpack(tmp_path / "wheels", sites)
    assert not mark.exists()


def test_wheels_are_not_unpacked_over_libraries_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "requirements", lambda card=True: [Requirement("packaging")])
    assert wheels.unpack(tmp_path / "wheels", tmp_path / "site")["own"] == []


def test_bitsandbytes_travels_with_one_library(tmp_path):
    names = [f"libbitsandbytes_{one}.so" for one in ("cpu", "cuda124", "cuda130", "rocm72", "xpu2026")]
    file, info = tmp_path / "bitsandbytes-1-py3-none-any.whl", "bitsandbytes-1.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(f"bitsandbytes/{name}", name)
        archive.writestr(f"{info}/RECORD", "old")
    wheels.keep_one_library(file, "130")
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == [f"bitsandbytes/{names[0]}", f"bitsandbytes/{names[2]}", f"{info}/RECORD"]
        line = archive.read(f"{info}/RECORD").decode().splitlines()[1]
    digest = base64.urlsafe_b64encode(hashlib.sha256(names[2].encode()).digest()).rstrip(b"=").decode()
    assert line == f"bitsandbytes/{names[2]},sha256={digest},{len(names[2])}"
    with pytest.raises(RuntimeError, match="no library for CUDA 118; there are 130"):
        wheels.keep_one_library(file, "118")


def test_unsloth_travels_without_its_pages(tmp_path):
    file = tmp_path / "unsloth-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("unsloth/models.py", "studio/frontend/page.html", "unsloth-1.dist-info/RECORD"):
            archive.writestr(name, name)
    wheels._rewrite(file, wheels.without_pages)
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["unsloth/models.py", "unsloth-1.dist-info/RECORD"]


@pytest.mark.parametrize("target", report.targets(bench_gpu._OUT), ids=lambda one: f"{len(one['there'])} there")
def test_every_wheel_that_travels_has_a_reason(target):
    """lora_lab or the comparison asks for it, or something that travels; nothing goes along that belongs to a torch for a card."""
    named = {group: {one["name"]: one["needed_by"] for one in files} for group, files in target["groups"].items()}
    asked = {wheels.plain(one.name) for one in wheels.requirements()}
    assert {name for name, why in named["own"].items() if why == "lora_lab"} <= asked
    assert asked <= named["own"].keys() | set(map(wheels.plain, target["there"]))
    for group, reasons in named.items():
        reason = {"lora_lab"} if group == "own" else {"the comparison"}
        assert {wheels.plain(str(why)) for why in set(reasons.values()) - reason} <= {*named["own"], *reasons}
        assert not [name for name in reasons if name in ("torch", "triton") or name.startswith(("nvidia", "cuda"))]
    assert {peer: named[peer][peer] for peer in wheels.PEERS} == dict.fromkeys(wheels.PEERS, "the comparison")


@pytest.mark.long
def test_the_wheel_list_resolves(tmp_path):
    """Where the index is reached: versions that fit together, for a Python that is not this one."""
    target = wheels.Target("3.12", there={"torch": "2.11.0", "triton": "3.6.0"})
    try:
        manifest = wheels.collect(tmp_path, target)
    except RuntimeError as error:
        if "No matching distribution" in str(error) or "Could not" in str(error):
            pytest.skip(f"the package index is not reached: {error}")
        raise
    sizes = wheels.sizes(manifest)
    assert 100 < sizes["own"] < 400
    assert 0 < sizes["trl"] < 5
    assert 10 < sizes["unsloth"] < 200
    assert all(one["needed_by"] for files in manifest["groups"].values() for one in files)


@pytest.mark.long
def test_another_tool_trains_the_same_rows_to_the_same_losses(tmp_path):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: make bench installs it in .bench, which PYTHONPATH can name")
    there = Path(importlib.util.find_spec("trl").origin).parents[1]
    launch = runner.by_process(tmp_path / "work", "cpu", sys.executable, {"trl": [there]})
    own = bench(tmp_path, launch, only=["2 x 48 checkpointed: lora_lab", "2 x 48 checkpointed: trl"])
    own.run(2)
    found = {name.partition(": ")[2]: one.get("found") for name, one in told(own, 2).items()}
    assert found["trl"]["losses"] == pytest.approx(found["lora_lab"]["losses"], rel=1e-3)  # both in bfloat16


def test_versions_of_another_machine_are_read_as_pip_writes_them(tmp_path):
    file = tmp_path / "freeze.txt"
    file.write_text("torch==2.11.0+cu130\nnumpy==2.5.2\n-e somewhere\n")
    assert bench_gpu._versions(str(file)) == {"torch": "2.11.0", "numpy": "2.5.2"}
    assert bench_gpu._versions("torch==2.11.0,triton==3.6.0") == {"torch": "2.11.0", "triton": "3.6.0"}


def test_what_is_there_stays_where_nobody_asks_for_another_version():
    there = {"torch": "2.11.0", "numpy": "1.0", "fsspec": "3.0", "rich": "14.0"}
    asked = ["numpy>=2.2", "fsspec<3", "rich<14; python_version < '3.9'", "rich<14; extra == 'old'", "scipy>9"]
    kept = wheels._as_asked(there, map(Requirement, asked), "3.12")
    assert kept == {"torch": "2.11.0", "rich": "14.0"}


@pytest.mark.parametrize("wrong", [["--slices", "6"], ["--seconds", "480"], ["--seconds", "0"], ["--shapes", "huge"]])
def test_wrong_words_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main(wrong)
    assert "error: " in capsys.readouterr().err


# -- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_is_made_of_what_was_measured():
    made = report.page(bench_gpu._OUT, SCALES["full"])
    assert (bench_gpu.ROOT / "docs" / "gpu.md").read_text() == made, "make it: python -m benchmarks.gpu --report"


def test_the_plan_is_compared_with_the_card_that_it_was_made_for(tmp_path):
    scale, name = SCALES["full"], "llama-3.1-8b 2 x 2,048 checkpointed"
    stamp = {"card": "Card", "card_gib": 24, "driver": "1", "versions": {}, "commit": "c", "sources": "s", "when": "w"}
    found = {"tokens_per_second": 3000.0, "peak_gib": 8.0, "peak_reserved_gib": 10.0, "losses": [2.0, 1.0]}
    own = {**stamp, "name": f"{name}: lora_lab", "group": "own", "given": {}, "found": found}
    other = {**own, "name": f"{name}: trl", "group": "trl", "found": {**found, "tokens_per_second": 1000.0}}
    runner.write(tmp_path / "slice_2.json", [own, other])
    plan = {"name": own["name"], "commit": "c", "when": "w", "versions": {}}
    runner.write(
        tmp_path / "plans.json",
        [{**plan, "card": None, "found": {"train": 7.0}}, {**plan, "card": "Card", "found": {"train": 9.9}}],
    )
    page = report.page(tmp_path, scale)
    assert "| lora_lab | 3,000 | 1.00 | – | 8.00 | 10.00 | 9.90 | 0.99 | 2.0000 | 1.0000 |" in page
    assert "| trl | 1,000 | 0.33 | – | 8.00 | 10.00 | – | – | 2.0000 | 1.0000 |" in page
    assert "| 2 x 2,048: tokens/s, times those of TRL + peft, both at their best | >= 2.0 | 3.00 | – |" in page
    assert "| plan, times the reserved peak | 0.95 to 1.10 | 0.99 to 0.99 (1 cells) | – |" in page
    assert "| 2 x 2,048: tokens/s, times those of Unsloth, both at their best | >= 1.0 | not measured | – |" in page
