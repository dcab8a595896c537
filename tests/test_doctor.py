"""The doctor: each way to break a pruned model is found, by its name and nothing else, and a healthy one has no finding."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import build, token_batches
from safetensors.torch import load_file, save_file
from test_cli import CALIB, MODEL, TEST, assert_refused, content, invoke
from typer.main import get_command

import sparsekit
from sparsekit import SparsekitError, bench, checkpoint, data, tune
from sparsekit.analysis.checks import CHECKS
from sparsekit.analysis.doctor import diagnose, summarise, to_dict
from sparsekit.analysis.patient import FINDING, NOT_MADE, SEVERITIES, TREES
from sparsekit.cli import app

ENOUGH = ("--samples", "16", "--seq-len", "64", "--device", "cpu")  # 1024 tokens for matrices of up to 384 inputs
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def prune(tmp_path_factory):
    """A function of options: kjv1m pruned with them, once for all tests that ask for the same."""
    made = {}

    def pruned(*options) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("doctor") / "pruned"
            sampling = () if "--samples" in options else ENOUGH
            done = invoke("prune", MODEL, "--calib", CALIB, "--out", made[options], *sampling, *options)
            assert done.exit_code == 0, done.stderr
        return made[options]

    return pruned


@pytest.fixture
def broken(prune, tmp_path):
    """A function: a copy of a healthy folder (or of one pruned with those options) that may be broken."""
    return lambda *options: Path(shutil.copytree(prune(*options), tmp_path / "broken"))


@pytest.fixture(scope="module")
def text() -> list[torch.Tensor]:
    tokens = data.read_tokens(TEST, checkpoint.load_tokenizer(MODEL))
    return data.calibration_batches(tokens, 16, 64)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    """No rows of this machine decide what is found."""
    monkeypatch.setattr(tune.env, "CACHE", tmp_path / "cache")
    tune.forget()
    yield
    tune.forget()


def found(folder, **how) -> dict:
    """The findings by name."""
    return {check.name: check for check in diagnose(folder, device="cpu", **how) if check.result == FINDING}


def change_report(folder: Path, change) -> None:
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))


def change_weights(folder: Path, change) -> None:
    """change(name, tensor) of each tensor in the folder's files."""
    for path in folder.glob("*.safetensors"):
        with sparsekit.checkpoint.reading.open_weights(path) as tensors:
            metadata = tensors.metadata()
        save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata)


# ---- a healthy model ----


def test_a_healthy_model_has_no_finding(prune, text):
    checks = diagnose(prune(), dense=MODEL, batches=text, perplexities=(15.0, 16.0), device="cpu")
    assert [check.name for check in checks if check.result == FINDING] == []
    # Rows of this machine and measured losses alone are missing.
    assert [check.name for check in checks if check.result == NOT_MADE] == ["kernels", "sensitive"]
    assert summarise(checks) == "no finding in 14 checks, 2 could not be made"


def test_every_check_says_what_it_looked_at_and_findings_what_to_do(prune):
    for folder in (prune(), prune("--method", "magnitude", "--pattern", "60%"), MODEL):
        checks = diagnose(folder, device="cpu")
        assert [check.name for check in checks] == [check.__name__ for check in CHECKS]
        assert [check.tree for check in checks] == sorted((check.tree for check in checks), key=TREES.index)
        for check in checks:
            assert check.checked and check.found
            assert (check.result == FINDING) == (check.severity in SEVERITIES) == bool(check.do)


def test_what_cannot_be_checked_is_not_called_well(prune, tmp_path):
    bare = Path(shutil.copytree(prune(), tmp_path / "bare"))
    (bare / "report.json").unlink()
    checks = {check.name: check for check in diagnose(bare, device="cpu")}
    made = {name for name, check in checks.items() if check.result != NOT_MADE}
    assert made == {"pattern", "finite", "stored", "hardware"}
    assert "no report.json" in checks["calibration"].found and "--dense and --eval" in checks["perplexity"].found
    assert not any(check.result == FINDING for check in checks.values())


def test_parts_taken_out_whole_are_no_lost_mask(tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "narrow"))
    (folder / "report.json").write_text(json.dumps({"structured": True, "steps": []}))
    assert set(found(folder)) == set()


def test_a_model_without_some_parts_is_compared_with_the_whole_one_by_perplexity_alone(tmp_path, text):
    folder, thin = tmp_path / "narrow", tmp_path / "thin"
    for out, part in ((folder, "ffn=25%"), (thin, "layers=1")):
        done = invoke("prune", MODEL, "--calib", CALIB, "--out", out, *ENOUGH, "--structured", part)
        assert done.exit_code == 0, done.stderr
    checks = {check.name: check for check in diagnose(folder, dense=MODEL, perplexities=(15.0, 30.0), device="cpu")}
    assert "dense 15" in checks["perplexity"].found and checks["perplexity"].result == FINDING
    with pytest.raises(SparsekitError, match=r"parts were taken whole out of those of .*narrow; leave --calib out"):
        diagnose(folder, dense=MODEL, batches=text, device="cpu")
    # Pruned further, it came from what was left: its layers have other numbers in the whole model, and the same shapes.
    done = invoke("prune", thin, "--calib", CALIB, "--out", tmp_path / "sparse", *ENOUGH)
    assert done.exit_code == 0, done.stderr
    with pytest.raises(SparsekitError, match=r"that .*sparse was pruned from, and model\.layers\.3.* in one of them"):
        diagnose(tmp_path / "sparse", dense=MODEL, device="cpu")
    assert diagnose(tmp_path / "sparse", dense=thin, device="cpu")


# ---- quality dropped ----


def test_a_mask_that_training_lost(broken):
    folder = broken("--format", "dense")
    assert set(found(folder)) == {"stored"}
    change_weights(folder, lambda name, t: t + 0.01 if name == f"{FIRST}.weight" else t)
    findings = found(folder)
    assert set(findings) == {"stored", "pattern"}
    assert f"not in 1 matrix, the first {FIRST}, where row 0, columns 0 to 3 hold 4 non-zeros" in findings["pattern"].found
    assert findings["pattern"].severity == "error"


def test_nothing_was_pruned():
    findings = found(MODEL)
    assert set(findings) == {"pattern"}
    assert "nothing was pruned" in findings["pattern"].found


def test_weights_that_are_not_finite(broken):
    folder = broken()

    def spoil(name, tensor):
        if name == f"{FIRST}.values":
            tensor[3, 5] = float("nan")
        return tensor

    change_weights(folder, spoil)
    findings = found(folder)
    assert set(findings) == {"finite"} and FIRST in findings["finite"].found


def test_pruned_by_magnitude(prune, text):
    folder = prune("--method", "magnitude")
    assert set(found(folder)) == {"method"}
    # On a text the loss shows too.
    assert set(found(folder, dense=MODEL, batches=text)) == {"method", "fit"}


def test_too_few_tokens(prune):
    findings = found(prune("--samples", "4", "--seq-len", "64"))
    assert set(findings) == {"calibration"}
    # Of 384 inputs the four down_proj saw 256 tokens, all others have 128 inputs.
    assert "fewer tokens than inputs in 4 matrices" in findings["calibration"].found
    assert "384 inputs and saw 256 tokens" in findings["calibration"].found


def test_few_tokens_are_enough_for_what_keeps_no_gram_matrix(prune):
    assert set(found(prune("--samples", "4", "--seq-len", "64", "--method", "wanda"))) == set()


def test_experts_that_saw_too_few_tokens(tmp_path):
    model = build("qwen3_moe")
    # 16 tokens, each to 2 of 4 experts: some see fewer than 8, a quarter of the 32 inputs.
    report = sparsekit.prune(model, token_batches((2, 8)), "sparsegpt", "2:4")
    by = {kind: sum(row.statistics == kind for row in report.linears) for kind in ("layer", "magnitude")}
    assert all(by.values())
    checkpoint.save(model, tmp_path / "experts", report=report)
    findings = found(tmp_path / "experts")
    # Written from Python without compress, so dense; and 16 tokens are too few for the attention's matrices as well.
    assert set(findings) - {"outliers"} == {"experts", "calibration", "stored"}
    said = findings["experts"].found
    assert f"{by['layer']} matrices by the inputs of all experts" in said and f"{by['magnitude']} matrices by magnitude" in said


def test_a_factor_that_needed_more_damping(broken):
    folder = broken()
    change_report(folder, lambda report: report["linears"][5].update(damping=1.0))
    findings = found(folder)
    assert set(findings) == {"damping"}
    assert "1 matrix needed up to 1 of the mean diagonal: model.layers.0.mlp.up_proj" in findings["damping"].found


def test_a_dead_update_by_its_errors(broken):
    folder = broken()

    def change(report):
        for row in report["linears"]:
            row["output_error"] = row["output_error_masked"]

    change_report(folder, change)
    assert set(found(folder)) == {"update"}


def test_a_dead_update_by_its_weights(prune, tmp_path):
    # The mask of the healthy folder on the dense weights, under the healthy report.
    folder, sparse = tmp_path / "masked", checkpoint.load(prune(), device="cpu")
    model = checkpoint.load(MODEL, device="cpu")
    for name, module in sparse.named_modules():
        if isinstance(module, sparsekit.SparseLinear):
            model.get_submodule(name).weight.data *= module.to_linear().weight != 0
    sparsekit.compress(model)
    checkpoint.save(model, folder)
    shutil.copy(prune() / "report.json", folder)
    assert set(found(folder)) == set(), "the report alone does not show it"
    findings = found(folder, dense=MODEL)
    assert set(findings) == {"update"} and "0% of its kept weights differ" in findings["update"].found


def test_a_matrix_that_loses_far_more_than_its_kind(broken):
    folder = broken()

    def change(report):
        row = report["linears"][-1]
        row.update(output_error=10 * row["output_error"], output_error_masked=12 * row["output_error"])

    change_report(folder, change)
    findings = found(folder)
    assert set(findings) == {"outliers"}
    assert "--skip model.layers.3.mlp.down_proj;" in findings["outliers"].do


def test_calibrated_on_another_kind_of_text(prune, text, tmp_path):
    model, noise = checkpoint.load(MODEL, device="cpu"), torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    batches = [torch.randint(vocabulary, (8, 128), generator=noise)]
    report = sparsekit.prune(model, batches, "sparsegpt", "2:4", stored=torch.float16)
    model.to(torch.float16)
    sparsekit.compress(model)
    checkpoint.save(model, tmp_path / "noise", report=report)
    assert set(found(tmp_path / "noise")) == set()
    findings = found(tmp_path / "noise", dense=MODEL, batches=text)
    assert "fit" in findings and set(findings) <= {"fit", "levels"}


def test_perplexity_that_rose(prune):
    assert set(found(prune(), perplexities=(14.0, 17.4))) == set()
    findings = found(prune(), perplexities=(14.0, 17.6))
    assert set(findings) == {"perplexity"} and "17.6, dense 14: +25.7%" in findings["perplexity"].found


# ---- no speed-up ----


def test_zeros_written_out(prune):
    findings = found(prune("--format", "dense"))
    assert set(findings) == {"stored"} and "28 matrices hold 2:4 and are stored dense" in findings["stored"].found


def test_a_pattern_that_no_kernel_runs(prune):
    findings = found(prune("--pattern", "50%"))
    assert set(findings) == {"hardware"} and findings["hardware"].do.startswith("prune to 2:4")


@pytest.mark.parametrize("gpu, says", [("T4", "7.5 has no sparse tensor cores"), ("7.0", "7.0 has no sparse tensor cores")])
def test_hardware_without_sparse_units(prune, gpu, says):
    findings = found(prune(), gpu=gpu)
    assert set(findings) == {"hardware"} and says in findings["hardware"].found
    assert set(found(prune(), gpu="H100")) == set()


def measure(shapes: dict, m: int = 1) -> None:
    """Keeps rows: of each shape microseconds of the dense product, of the kernel, and of the weight written out."""
    rows = [
        tune.Row("float16", m, *shape, kernel, 0, 0, us)
        for shape, times in shapes.items()
        for kernel, us in zip((tune.DENSE, "linear24_cpu", tune.EXPAND), times)
    ]
    tune.write(bench.key(torch.device("cpu")), rows)


FAST = dict.fromkeys([(384, 128), (128, 384), (128, 128), (64, 128)], (30.0, 20.0, 90.0))


def test_products_that_are_not_faster(prune):
    measure(FAST)
    assert set(found(prune(), dtype=torch.float16)) == set()
    checks = {check.name: check for check in diagnose(prune(), dtype=torch.float16, device="cpu")}
    assert checks["kernels"].result == "ok" and "384x128 1.50x (8 matrices)" in checks["kernels"].found
    measure({**FAST, (64, 128): (30.0, 40.0, 31.0)})  # by the fastest of the kernels, the weight written out
    findings = found(prune(), dtype=torch.float16)
    assert set(findings) == {"kernels"} and "64x128 0.97x, not faster (8 matrices)" in findings["kernels"].found


def test_rows_far_away_say_nothing(prune):
    measure({(4096, 4096): (30.0, 40.0, 50.0)})
    checks = {check.name: check for check in diagnose(prune(), dtype=torch.float16, device="cpu")}
    assert checks["kernels"].result == NOT_MADE and "not measured near" in checks["kernels"].found
    measure({shape: (30.0, 40.0, 50.0) for shape in FAST}, m=2048)
    checks = {check.name: check for check in diagnose(prune(), dtype=torch.float16, device="cpu", batch=1)}
    assert checks["kernels"].result == NOT_MADE
    assert set(found(prune(), dtype=torch.float16, batch=2048)) == {"kernels"}


def test_fp32_weights_on_a_gpu(monkeypatch):
    """No kernel takes them, and none can be measured."""
    from sparsekit.analysis.patient import Matrix, Patient

    monkeypatch.setattr("sparsekit.ops.linear.gpu_kernels", lambda index: ["linear24_sm80"])
    monkeypatch.setattr(bench, "key", lambda device: "a GPU")
    check = next(check for check in CHECKS if check.__name__ == "kernels")
    matrix, found = Matrix("q", (128, 128), 0.5, True, None, True, True, True, None), {}
    for dtype in (torch.float32, torch.float16):
        found[dtype] = check(Patient(Path(), None, [matrix], "compressed", dtype, dtype, torch.device("cuda"), None, 1))
    assert found[torch.float32].result == FINDING and "no kernel for float32 weights" in found[torch.float32].found
    assert found[torch.float16].result == NOT_MADE and "--dtype float16 --tune` measures it" in found[torch.float16].found


def test_much_was_left_dense(prune):
    assert set(found(prune("--skip", FIRST))) == set()  # 2 % of the weights
    findings = found(prune("--skip", "model.layers.1"))
    assert set(findings) == {"skipped"} and "25.0% of the weights" in findings["skipped"].found


# ---- 2:4 hurts ----


def write_sensitivity(folder: Path, half: float, losses: list[float]) -> None:
    names = [row["name"] for row in json.loads((folder / "report.json").read_text())["linears"]]
    curves = [{"name": n, "shape": [4, 4], "levels": ["50%", "4:8", "2:4"], "errors": [0.04, half, 0.1]} for n in names]
    rows = [{"name": name, "level": "2:4", "loss": 2.0 + loss} for name, loss in zip(names, losses)]
    told = {"tokens": 1, "curves": curves, "losses": rows, "dense_loss": 2.0 if rows else None, "spearman": None}
    (folder / "sensitivity.json").write_text(json.dumps(told))


def test_the_pattern_itself_is_what_costs(broken):
    folder = broken()
    write_sensitivity(folder, 0.07, [])
    assert set(found(folder)) == set()
    write_sensitivity(folder, 0.05, [])
    findings = found(folder)
    assert set(findings) == {"levels"} and "50% 4.0%, 4:8 5.0%, 2:4 10.0%" in findings["levels"].found


def test_a_few_matrices_carry_the_loss(broken):
    folder = broken()
    write_sensitivity(folder, 0.08, [0.01] * 28)
    assert set(found(folder)) == set()
    write_sensitivity(folder, 0.08, [0.01] * 26 + [0.2, 0.2])
    findings = found(folder)
    assert set(findings) == {"sensitive"} and "2 of 28 make up half of it" in findings["sensitive"].found
    assert "model.layers.3.mlp.down_proj" in findings["sensitive"].do


# ---- the page of documentation ----

DOCS = (Path(__file__).parents[1] / "docs/report.md").read_text(encoding="utf-8")


def test_the_page_names_the_checks_in_their_order(prune):
    rows = re.findall(r"^\| ([\w :-]*)\| `(\w+)` \|", DOCS, re.MULTILINE)
    tree, told = "", []
    for named, check in rows:
        tree = named.strip() or tree
        told.append((tree, check))
    assert told == [(check.tree, check.name) for check in diagnose(prune(), device="cpu")]


def test_the_code_of_the_page(prune, capsys):
    exec(re.search(r"(?m)^```python\n(.*?)^```", DOCS, re.S)[1], {"folder": prune(), "dense": MODEL})
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize("command", ["report", "doctor"])
def test_the_options_of_the_page_are_those_of_the_command(command):
    told = re.search(rf"^sparsekit {command} DIR (\[.*?)^```", DOCS, re.MULTILINE | re.DOTALL)[1]
    options = {option for parameter in get_command(app).commands[command].params for option in parameter.opts if option[:2] == "--"}
    assert set(re.findall(r"--[\w-]+", told)) == options - {"--device", "--dtype"}


# ---- the command, and what is refused ----


def test_the_command(prune):
    folder = prune()
    before = content(folder)
    done = invoke("doctor", folder, "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.endswith("?")] == [f"{tree}?" for tree in TREES]
    assert "  ok        pattern: all hold 2:4" in lines and lines[-1].startswith("no finding in ")
    options = ("--dense", MODEL, "--calib", TEST, "--eval", TEST, "--samples", "8", "--seq-len", "64", "--max-tokens", "1024")
    said = json.loads(invoke("doctor", folder, *options, "--gpu", "T4", "--json").stdout)
    assert said["counts"] == {result: sum(row["result"] == result for row in said["checks"]) for result in said["counts"]}
    by_name = {row["name"]: row for row in said["checks"]}
    assert by_name["fit"]["result"] == by_name["levels"]["result"] == "ok"
    assert {name for name, row in by_name.items() if row["result"] == FINDING} - {"perplexity"} == {"hardware"}
    assert "dense" in by_name["perplexity"]["found"]
    assert content(folder) == before


def test_its_findings_stand_on_the_page(broken):
    folder = broken()
    change_report(folder, lambda report: report["linears"][5].update(damping=1.0))
    (folder / "doctor.json").write_text(invoke("doctor", folder, "--device", "cpu", "--json").stdout)
    assert invoke("report", folder).exit_code == 0
    page = (folder / "report.html").read_text()
    assert "What the doctor found" in page and "needed up to 1 of the mean diagonal" in page
    (folder / "doctor.json").write_text("{}")
    assert_refused(invoke("report", folder), "doctor.json must be what sparsekit doctor --json prints")


@pytest.mark.parametrize(
    "options, says",
    [
        (("--calib", CALIB), "none is given; give --dense"),
        (("--eval", TEST), "none is given; give --dense"),
        (("--batch", "0"), "the batch must be at least one token, got 0"),
        (("--gpu", "Voodoo 2"), "the GPU must be a capability"),
        (("--dense", CALIB), "the model must be a folder"),
        (("--dtype", "int8"), "the dtype must be"),
    ],
)
def test_what_is_refused(prune, options, says):
    assert_refused(invoke("doctor", prune(), *options, "--device", "cpu"), says)


def test_another_model_for_the_dense_one(prune, tmp_path):
    checkpoint.save(build("llama"), tmp_path / "other")
    assert_refused(
        invoke("doctor", prune(), "--dense", tmp_path / "other", "--device", "cpu"), "must be the model that .* was pruned from"
    )
    assert_refused(invoke("doctor", tmp_path / "nothing"), "the model must be a folder")


def test_a_report_of_other_weights(broken):
    folder = broken()
    change_report(folder, lambda report: report["linears"][0].update(name="model.layers.9.q"))
    assert_refused(invoke("doctor", folder), "must be of its weights, and model.layers.9.q is not among them")
    assert to_dict([])["counts"] == {"ok": 0, "finding": 0, "not made": 0}
