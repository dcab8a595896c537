"""Several processes on one machine that prune one model over gloo, against one process."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, checkpoint
from sparsekit.cli import app
from sparsekit.pipeline import prune, world
from sparsekit.pipeline.world import World, share_out

HERE = Path(__file__).parent
MODEL, CALIB = HERE / "data" / "kjv1m", HERE.parent / "examples" / "data" / "kjv.calib.txt"


def environment(**variables) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(Path(sparsekit.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}


def launch(size: int, *command, **variables) -> list[subprocess.CompletedProcess]:
    """``size`` processes of the command, each a rank, and what became of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [
        subprocess.Popen([sys.executable, *map(str, command)], env=environment(RANK=rank, LOCAL_RANK=rank, **variables), **pipes)
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(command, process.returncode, *texts) for process, texts in zip(started, said)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    done = launch(3, HERE / "ranks.py", "alike", folder)
    assert [rank.returncode for rank in done] == [0] * 3, [rank.stderr for rank in done]
    return folder


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Up to the rounding of sums in another order: of fp32, magnified by the condition of a Hessian of k inputs with 1 % of its
    mean diagonal added, k / 0.01 at most; or a place of the weight's own dtype."""
    if not theirs.is_floating_point() or not theirs.numel():
        assert torch.equal(ours, theirs), name
        return
    apart = (ours.float() - theirs.float()).abs().max() / theirs.abs().max()
    assert apart <= max(2**-24 * theirs.shape[-1] / 0.01, torch.finfo(theirs.dtype).eps), f"{name} differs by {apart}"


@pytest.mark.parametrize("case", ranks.CASES)
def test_three_processes_prune_as_one_does(case, three):
    build, batches, method, pattern, group = ranks.CASES[case]
    alone = build()
    wanted = prune(alone, batches(), method, pattern, group=group).to_dict()
    states = [load_file(three / f"{case}.{rank}.safetensors") for rank in range(3)]
    reports = [json.loads((three / f"{case}.{rank}.json").read_text()) for rank in range(3)]
    for name, tensor in alone.state_dict().items():
        assert all(torch.equal(state[name], states[0][name]) for state in states[1:]), f"ranks differ in {name}"
        assert torch.equal(states[0][name] == 0, tensor == 0), f"another mask in {name}"
        assert_near(states[0][name], tensor, name)
    assert [report.pop("told") > 0 for report in reports] == [True, False, False]
    for report in reports:
        for timed in ("phases", "blocks", "peak_memory"):
            report.pop(timed)
        for timed in (report, *report["linears"]):
            timed.pop("seconds")
        for row in report["linears"]:
            row.pop("peak_memory")
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["tokens"] == wanted["tokens"]
    assert [row["name"] for row in reports[0]["linears"]] == [row["name"] for row in wanted["linears"]]
    for ours, theirs in zip(reports[0]["linears"], wanted["linears"]):
        assert ours["sparsity"] == theirs["sparsity"] and ours["damping"] == theirs["damping"]
        assert [ours[what] for what in ("statistics", "tokens")] == [theirs[what] for what in ("statistics", "tokens")]
        assert ours["output_error"] == (theirs["output_error"] and pytest.approx(theirs["output_error"], rel=1e-3))
    if case == "experts":
        found = {row["statistics"] for row in wanted["linears"]}
        assert found == {"own", "layer", "magnitude"}, "an expert of each kind"


@pytest.mark.parametrize("how", ["at one go", "saved"])
@pytest.mark.parametrize("name", ranks.SETTINGS)
def test_three_processes_that_train_together_prune_by_the_gradients_of_all(name, how, three):
    alone = ranks.trained(ranks.SETTINGS[name], World())
    masks = [load_file(three / f"{name}, {how}.{rank}.safetensors") for rank in range(3)]
    for linear, mask in alone.items():
        assert all(torch.equal(held[linear], mask) for held in masks), linear


DIFFERS = "all ranks must run with the same settings, and "
HASHES = "is '[0-9a-f]{16}' on rank {} but '[0-9a-f]{16}' on rank 0"
REFUSED = {
    "too few batches": "each of 3 processes needs a calibration batch, got 2; give more samples or start fewer",
    "pattern": DIFFERS + "pattern is '4:8' on rank 1 but '2:4' on rank 0",
    "criterion": DIFFERS + "state of the criterion is 'p = 3.0' on rank 1 but 'p = 2.0' on rank 0",
    "batches": DIFFERS + "the hash of the calibration batches " + HASHES.replace("{}", "2"),
    "weights": DIFFERS + "the hash of the weights outside the blocks " + HASHES.replace("{}", "1"),
    "a broken weight": "(rank 1 failed: )?weights must be finite, got NaN or Inf in blocks.1.up",
}


def test_every_rank_is_refused_alike_and_the_world_goes_on(three):
    said = [json.loads((three / f"refusals.{rank}.json").read_text()) for rank in range(3)]
    for name, text in REFUSED.items():
        for rank in range(3):
            assert re.fullmatch(text, said[rank][name]), (name, rank)
    assert [rank for rank in range(3) if said[rank]["a broken weight"].startswith("rank 1")] == [0, 2]


@pytest.mark.parametrize(
    ("size", "rank", "way", "says"),
    [
        (3, 1, "kill", "rank 1 is gone without a word: killed, or cut off"),
        (2, 0, "kill", "rank 0 is gone without a word: killed, or cut off"),
        (3, 1, "raise", "rank 1 failed: RuntimeError: no more of this"),
        (2, 0, "interrupt", "rank 0 was interrupted"),
    ],
    ids=["killed", "who holds the store killed", "raises", "interrupted"],
)
def test_a_rank_that_fails_ends_the_others(size, rank, way, says, tmp_path):
    done = launch(size, HERE / "ranks.py", "failing", tmp_path, FAILING_RANK=rank, FAILING=way)
    failed = float((tmp_path / "failed").read_text())
    for other in {*range(size)} - {rank}:
        assert done[other].returncode == 1
        assert done[other].stderr.rstrip().endswith(f"RankLost: {says}"), done[other].stderr
        assert float((tmp_path / f"ended.{other}").read_text()) - failed < 10
    assert done[rank].returncode == (-9 if way == "kill" else -2 if way == "interrupt" else 1)


def test_work_is_shared_out_by_cost():
    # 8 here, 5 and 3 there, and then of equals the lowest.
    assert share_out([1, 8, 5, 3], 2) == [0, 0, 1, 1]
    assert share_out([2, 2, 2], 3) == [0, 1, 2]
    assert share_out([4], 3) == [0]
    assert share_out([], 2) == []


def test_parts_are_neighbours_and_cover_all():
    for size, count in ((1, 0), (1, 5), (2, 2), (3, 8), (5, 7)):
        parts = [World(rank, size).part(list(range(count))) for rank in range(size)]
        assert [item for part in parts for item in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "two"}, "the world's WORLD_SIZE must be an integer, got 'two'"),
        ({}, "the world's RANK must be an integer, got None"),
        ({"RANK": "2"}, "RANK must be 0 to 1 in a world of 2, got 2"),
        ({"RANK": "0"}, "a world of 2 needs MASTER_ADDR, and it is not set"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "cannot meet the others at 127.0.0.1:99999: "),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "rank 0 of 2 cannot meet the others at 127.0.0.1:0: "),
    ],
    ids=["not a number", "no rank", "a rank too high", "no address", "no port", "alone"],
)
def test_a_world_that_cannot_come_about(variables, says, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "ARRIVAL", 1.0)
    with pytest.raises(SparsekitError, match=re.escape(says)):
        World.from_environment("cpu")


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("auto", "each process needs a GPU of its own, got 1 and LOCAL_RANK 1; start 1 a machine"),
        ("cuda", "each process needs a GPU"),
    ],
)
def test_two_processes_on_one_gpu(device, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SparsekitError, match=says):
        World.from_environment(device)


@pytest.mark.parametrize("method", ["sparsegpt", "gradient"])
def test_torchrun_prunes_a_folder_as_one_process_does(method, tmp_path):
    # In fp32: weights that are rounded to 16 bits between two blocks turn what differs in the last place into what decides a tie.
    model = checkpoint.load(MODEL, device="cpu", dtype=torch.float32)
    model.config.dtype = torch.float32
    checkpoint.save(model, tmp_path / "model", format="dense", tokenizer=checkpoint.load_tokenizer(MODEL))
    arguments = (
        tmp_path / "model",
        "--calib",
        CALIB,
        "--samples",
        12,
        "--seq-len",
        32,
        "--device",
        "cpu",
        "--json",
        "--method",
        method,
    )  # three batches
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "sparsekit")
    command = [*map(str, (*run, "prune", *arguments, "--out", tmp_path / "two"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # of rank 0 alone
    assert report["processes"] == 2 and report["tokens"] == 12 * 32
    alone = CliRunner().invoke(app, [str(argument) for argument in ("prune", *arguments, "--out", tmp_path / "one")])
    assert alone.exit_code == 0, alone.stderr
    paths = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    assert paths == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*"))
    for path in paths:
        ours, theirs = tmp_path / "two" / path, tmp_path / "one" / path
        if path.suffix != ".safetensors":
            assert path.name == "report.json" or ours.read_bytes() == theirs.read_bytes(), path
            continue
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert name.endswith(".values") or torch.equal(ours[name], theirs[name]), name
            assert_near(ours[name], theirs[name], name)


def test_a_folder_is_resumed_by_all_to_the_same_bytes(tmp_path):
    done = launch(2, HERE / "ranks.py", "resuming", tmp_path)
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr for rank in done]
    whole = tmp_path / "whole"
    for path in whole.rglob("*"):
        for way in ("interrupted", "failed", "mistaken"):
            assert path.name == "report.json" or path.read_bytes() == (tmp_path / way / path.relative_to(whole)).read_bytes(), path
    assert not list(tmp_path.glob("*.partial"))
    said = [json.loads((tmp_path / f"said.{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert said[0]["kept"] == {"interrupted": 2, "failed": 3, "mistaken": 0}, "of four blocks"


def test_a_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = World.from_environment("cpu")
    assert (alone.rank, alone.size, alone.leads, alone.device) == (0, 1, True, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    with pytest.raises(SparsekitError, match="needs a process group, got none"):
        World.from_group()
