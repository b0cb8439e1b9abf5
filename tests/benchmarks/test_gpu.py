"""The GPU kit on a machine without one: what it plans, runs, says, and refuses to say."""

import json
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import child, measure, model, report, streams
from benchmarks.gpu.rows import ROWS, chosen, obstacle
from mpp.memory.linear import QuantisedLinear
from mpp.memory.link import GpuLink, Slot
from mpp.models.families.wan import Wan
from tests.memory.simulated_gpu import Gpu


def case(kind, **changes):
    row = next(row for row in ROWS if row.kind == kind)
    return measure.Case(replace(row, rounds=2, **changes), "cpu", tiny=True)


# ---------------------------------------------------------------- the plan


def test_rows_have_names_of_their_own_and_kinds_that_can_be_measured():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.kind for row in ROWS} == child.KINDS.keys()
    assert ROWS[0].kind == "environment"
    assert all(row.size in model.SIZES and row.shape in model.SHAPES for row in ROWS)


def test_only_takes_names_and_kinds_and_the_environment_comes_first():
    assert chosen([]) == [row for row in ROWS if not row.asked]
    assert len(chosen(["stream"])) == 1 + 2 * 3 * 4  # shapes, bases, numbers of resident blocks
    assert [row.name for row in chosen(["train_1.3b"])] == ["environment", "train_1.3b"]
    assert {row.kind for row in chosen(["gradients", "syncs"])} == {"environment", "gradients", "syncs"}
    with pytest.raises(ValueError, match=r"--only=time_70b: there is no such row; there are environment, correct"):
        chosen(["time_70b"])


def test_what_needs_a_gpu_or_more_time_than_is_left_is_not_begun():
    draws = random.Random(0)
    for _ in range(200):
        row, left = draws.choice(ROWS), draws.uniform(0, 500)
        cuda, tiny = draws.random() < 0.5, draws.random() < 0.5
        why = obstacle(row, left, cuda=cuda, tiny=tiny)
        hindered = not cuda and row.kind != "environment" and (row.cuda or not tiny)
        assert (why == "needs CUDA") == hindered
        if not hindered:
            assert (why is None) == (left >= row.seconds)
            assert why is None or why == f"skipped: may take {row.seconds} s, {round(left)} s are left"


# ---------------------------------------------------------------- the parent


@pytest.fixture
def child_program(tmp_path, monkeypatch):
    """Stands for Python: what a row's process does, as lines of a shell script with its arguments."""

    def write(*lines):
        program = tmp_path / "python"
        program.write_text("\n".join(["#!/bin/sh", *lines]))
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return write


def test_a_row_that_hangs_or_dies_says_so_and_the_others_go_on(child_program, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kit"])
    answer = 'echo \'{"status": "ok", "cuda": true, "value": 1.5}\' > "$4"'
    child_program(
        "echo said", f'case "$3" in environment) {answer};; syncs) exit 3;; correct) sleep 60;; *) {answer};; esac'
    )
    rows = [replace(row, seconds=1) for row in ROWS if row.name in ("environment", "correct", "syncs", "train_1.3b")]
    found = kit.run(rows, tmp_path / "out", 60, tiny=False)
    assert [row["status"] for row in found] == ["ok", "timed out", "died", "ok"]
    assert "exit code 3" in found[2]["reason"]
    assert found[3]["value"] == 1.5
    assert [json.loads(text) for text in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()] == found
    assert (tmp_path / "out" / "logs" / "syncs.txt").read_text() == "said\n"
    assert "2 ok, 1 timed out, 1 died" in report.table(found)


def test_the_process_that_starts_the_others_never_imports_torch():
    code = "import sys; import benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=kit.ROOT, check=False).returncode == 0


def test_rows_that_no_longer_fit_are_said(child_program, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kit"])
    child_program('echo \'{"status": "ok", "cuda": true}\' > "$4"')
    found = kit.run(ROWS[:3], tmp_path, 100, tiny=False)
    assert [row["status"].partition(":")[0] for row in found] == ["ok", "skipped", "ok"]


# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize(
    "name",
    [
        "environment",
        pytest.param("correct", marks=pytest.mark.slow),
        *(row.name for row in ROWS if row.kind == "gradients"),
    ],
)
def test_checks_hold_at_tiny_size(name):
    found = child.answer(name, tiny=True)
    assert found["status"] == "ok", found
    json.dumps(found)


@pytest.mark.slow  # three seconds
def test_a_teacher_with_its_adapter_on_is_wrong(monkeypatch):
    monkeypatch.setattr("mpp.training.teacher.adapters_off", lambda _: nullcontext())
    found = child.answer("correct", tiny=True)
    assert found["status"] == "wrong"
    wrong = {name for name, value in found.items() if value is False}
    assert wrong == {
        "good",
        "unchanged_lockstep",  # which switches adapters off by itself
        *(f"{n}_{k}" for n in ("teacher_is_base", "adds_up") for k in ("keep", "checkpoint", "offload")),
    }


def test_a_layer_that_hands_on_no_gradient_is_wrong(monkeypatch):
    good = QuantisedLinear.forward
    monkeypatch.setattr(QuantisedLinear, "forward", lambda self, x: good(self, x.detach()) + 0 * x.sum())
    found = child.answer("gradients_fp8", tiny=True)
    assert (found["status"], found["good"]) == ("wrong", False)
    assert found["worst_error"] == pytest.approx(1)


@pytest.mark.slow  # three seconds
def test_times_come_with_their_control_and_the_ratio_of_flops():
    found = measure.timing(case("time"))
    assert found["half_flops"] - 1 == pytest.approx((found["prior_flops"] - 1) / 2)
    assert found["verdict"] == ("measured" if abs(found["control"] - 1) <= 0.03 else "inconclusive")
    assert "attention" in found["attention"]


def test_each_round_begins_with_another_action(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "seconds_of", lambda action, device: action() or 1.0)
    actions = {name: lambda name=name: order.append(name) for name in "abc"}
    assert measure.by_turns(actions, 3, "cpu") == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abcbcacab"


@pytest.fixture
def gpu_stand_in(monkeypatch):
    """What the rows that need a GPU ask of torch."""
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 * 2**30)
    for name in ("reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    monkeypatch.setattr("mpp.training.module.compile_blocks", lambda _: None)


@pytest.mark.usefixtures("gpu_stand_in")
def test_rows_that_need_a_gpu_run_through():
    assert measure.syncs(case("syncs")) == {"both_syncs": 0, "both_where": "", "half_syncs": 0, "half_where": ""}
    assert measure.memory(case("memory", base="fp8"))["resident_gib"] == 3
    assert measure.compiled(case("compile"))["compiled_prior_s"] > 0


# ---------------------------------------------------------------- blocks that wait in the CPU's memory


@pytest.mark.slow  # ten seconds
@pytest.mark.parametrize("name", ["stream_14b_480p81_nf4_2", "fits_qwen_1024_12gib"])
def test_rows_of_waiting_blocks_run_through_at_tiny_size(name):
    found = child.answer(name, tiny=True)
    assert found["status"] == "ok", found
    assert (found["resident"], found["forecast_gib"] > 0) == (2, True)
    if found.get("apart_s"):
        assert (found["apart_loads"], found["lockstep_loads"]) == (2, 1)  # of three passes, and of two
        assert {found[name] for name in ("gb_per_s", "apart_overlap", "lockstep_transfer_s")} == {"-"}


@pytest.mark.slow  # two seconds
def test_a_link_that_brings_another_block_is_wrong(monkeypatch):
    whole, calls = streams.link_to(torch.device("cpu")).__class__.fetch, []

    def fetch(self, kept, slot):
        calls.append(kept)
        return whole(self, calls[len(calls) // 2], slot)

    monkeypatch.setattr("mpp.memory.link.Link.fetch", fetch)
    found = dict(streams.unchanged(case("stream", size="1.3b")))
    assert found == {"repeats": True, "unchanged_apart": False, "unchanged_lockstep": False}


def test_copies_that_are_wholly_or_not_at_all_hidden_have_an_overlap_of_one_and_none():
    draws = random.Random(0)
    for _ in range(50):
        coming = [draws.randint(1, 9) for _ in range(draws.randint(1, 5))]
        rounds, speed, alone = draws.randint(1, 3), draws.uniform(1, 9), draws.uniform(1, 9)
        way, copies = streams.Way(coming, 0, speed), rounds * sum(coming) / speed
        for seconds, overlap in ((max(alone, copies), 1), (alone + copies, 0)):
            told = way.told(rounds * len(coming), seconds, alone)
            assert told == {
                "loads": rounds,
                "transfer_s": pytest.approx(copies),
                "overlap": pytest.approx(overlap, abs=1e-9),
            }
    assert streams.Way([], 0, speed).told(0, 1, 1) == {"loads": 0, "transfer_s": 0, "overlap": "-"}


def test_copies_are_timed_and_left_out_by_the_link_of_training(monkeypatch):
    gpu, weights = Gpu().install(monkeypatch), [torch.randn(64, 4)]

    class Event:
        def __init__(self, **_):
            self.copies = None

        def record(self, stream):
            self.copies = len(gpu.copied)

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return (later.copies - self.copies) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(streams, "link_to", lambda _: GpuLink(torch.device("cpu")))
    with gpu:
        assert streams.bytes_per_second(weights, "cuda") == 64 * 4 * 4  # a second each
        link, slot = GpuLink(torch.device("cpu")), Slot(64 * 4 * 4)
        kept, copies = link.keep(weights), len(gpu.copied)
        link.fetch(kept, slot)
        with streams.nothing_copied():
            (there,) = link.fetch(kept, slot)
        assert len(gpu.copied) == copies + 1
    assert torch.equal(there, weights[0])


@pytest.mark.parametrize(("size", "billions"), [("1.3b", 1.42), ("14b", 14.29), ("qwen", 20.43)])  # of published ones
def test_sizes_are_those_of_the_published_models(size, billions):
    skeleton = model.SIZES[size].family("cpu").skeleton()
    assert round(sum(p.numel() for p in skeleton.parameters()) / 1e9, 2) == billions
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_random_weights_have_the_precisions_that_diffusers_loads_them_in(tmp_path):
    drawn = case("time").architecture().load_transformer()
    drawn.save_pretrained(tmp_path / "transformer")
    loaded = Wan(pretrained=str(tmp_path)).load_transformer()
    assert {n: p.dtype for n, p in drawn.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in drawn.named_parameters())
    assert all(torch.equal(b, loaded.get_buffer(n)) for n, b in drawn.named_buffers())


# ---------------------------------------------------------------- what is said


def measured():
    where = {
        "row": "environment", "kind": "environment", "status": "ok", "cuda": True, "tiny": False, "card": "a card",
        "memory_gib": 24.0, "driver": "1.2", "torch": "2.13", "python": "3.11", "attention": "flash", "date": "today",
        "commit": "abc", "command": "python -m benchmarks.gpu",
    }  # fmt: skip
    return [
        where,
        {
            "row": "memory_a",
            "kind": "memory",
            "status": "ok",
            "base": "fp8",
            "activations": "checkpoint",
            "plain_s": 1.25,
            "resident_gib": 7.123456,
        },
        {"row": "memory_b", "kind": "memory", "status": "does not fit", "base": "bf16", "peak_gib": 23.0},
        {"row": "correct", "kind": "correct", "status": "wrong", "adds_up_keep": False, "good": False},
        {"row": "stream_a", "kind": "stream", "status": "ok", "base": "nf4", "resident": 8, "lockstep_overlap": 0.9375},
    ]


def test_the_page_says_where_it_was_measured_and_what_was_not():
    page = report.page(measured())
    for part in ("a card with 24 GiB, driver 1.2, torch 2.13", "on today at commit abc", "`python -m benchmarks.gpu`"):
        assert part in page
    assert "| memory_a | fp8 | checkpoint | 7.123 |" in page
    assert "memory_b: does not fit" in page
    assert "| correct (WRONG) | no |" in page
    assert "| stream_a | nf4 | 8 |" in page
    assert "| lockstep overlap |\n" in page
    assert "| 0.9375 |\n" in page


@pytest.mark.parametrize("changes", [{"cuda": False}, {"tiny": True}, {"cuda": None}])
def test_the_page_is_not_written_from_anything_but_a_gpu_at_real_sizes(changes):
    where, *rest = measured()
    with pytest.raises(ValueError, match="--write-docs: what was measured without a GPU, or with --tiny"):
        report.page([{**where, **changes}, *rest])


@pytest.mark.slow  # a process for each row
def test_the_kit_runs_from_end_to_end_without_a_gpu(tmp_path, monkeypatch, capsys):
    words = ["kit", "--tiny", "--only", "correct,syncs,train_1.3b,fits_14b_480p81_24gib", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        kit.main()
    assert not ended.value.code
    rows = {row["row"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "environment": "ok",
        "correct": "ok",
        "syncs": "needs CUDA",
        "train_1.3b": "ok",
        "fits_14b_480p81_24gib": "ok",
    }
    assert rows["train_1.3b"]["tensors"] == 40  # two factors of ten layers of two blocks
    assert "4 ok, 1 needs CUDA" in capsys.readouterr().out
