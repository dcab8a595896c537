"""Forecasts: the interval against chance, bytes against files that are written, speed against rows, perplexity against prunings
that are really done."""

import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from models import build, token_batches
from test_cli import CALIB, MODEL, TEST, assert_refused, invoke

import sparsekit
from benchmarks import forecast as benchmark
from sparsekit import NM, PairNM, Pattern, SparsekitError, bench, checkpoint, data, env, tune
from sparsekit.analysis import Curve, Sensitivity, error_curves
from sparsekit.analysis import quality as quality_module
from sparsekit.analysis.costs import holds_24, size_of, speed_of
from sparsekit.analysis.forecast import Forecast, forecast, recommend, subject_of
from sparsekit.analysis.quality import SHARES, Damages, Harm, Probe, Quality, error_at, probe_plans, restored
from sparsekit.analysis.regression import Line, student_quantile
from sparsekit.plan import Plan
from sparsekit.tune import Row

RESULT = Path(__file__).resolve().parents[1] / "benchmarks/results/quality/forecast.json"
CPU = torch.device("cpu")


# ---- the line and its interval ----


@pytest.mark.parametrize(
    "probability, freedom, quantile",  # Abramowitz and Stegun, table 26.10
    [(0.9, 1, 3.078), (0.9, 2, 1.886), (0.9, 3, 1.638), (0.9, 4, 1.533), (0.975, 5, 2.571), (0.975, 8, 2.306), (0.995, 30, 2.750)],
)
def test_students_quantile(probability, freedom, quantile):
    assert student_quantile(probability, freedom) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("count, at", [(3, 0.5), (6, 0.5), (6, 3.0)], ids=["fewest", "among the points", "far out"])
def test_the_interval_holds_the_next_point_as_often_as_it_says(count, at):
    chance, inside = random.Random(0), 0
    for _ in range(4000):
        x = [chance.random() for _ in range(count)]
        line = Line.through(x, [2 - 3 * one + chance.gauss(0, 0.7) for one in x])
        middle, reach = line.predict(at, 0.8)
        inside += abs(2 - 3 * at + chance.gauss(0, 0.7) - middle) <= reach
    assert inside / 4000 == pytest.approx(0.8, abs=0.02)  # three standard deviations of the count


def test_a_line_through_points_on_a_line():
    line = Line.through([1, 2, 4, 8], [3, 5, 9, 17])
    assert line.predict(100, 0.8) == pytest.approx((201, 0), abs=1e-9)


@pytest.mark.parametrize("x, says", [([1, 2], "at least 3 points, got 2"), ([1, 1, 1], "at different places, got 3 at 1")])
def test_no_line(x, says):
    with pytest.raises(SparsekitError, match=says):
        Line.through(x, x)


# ---- damage ----

CURVE = Curve("a", (8, 8), ("10%", "4:8", "2:4", "50%", "90%"), (0.01, 0.03, 0.05, 0.04, 0.64))


def test_errors_as_measured_and_between():
    assert [error_at(CURVE, Pattern.parse(text)) for text in CURVE.levels] == list(CURVE.errors)
    assert error_at(CURVE, Pattern.parse("70%")) == pytest.approx(0.16)  # halfway from 0.04 to 0.64 by ratio
    assert [error_at(CURVE, Pattern.parse(text)) for text in ("0%", "100%")] == [0, 1]


@pytest.mark.parametrize("text", ["1:4", "5%", "95%", "block:2x2@50%"])
def test_an_error_that_was_not_measured(text):
    with pytest.raises(SparsekitError, match=f"must be measured at {text}, and that of a is at 10%"):
        error_at(CURVE, Pattern.parse(text))


def damages(count: int = 4) -> Damages:
    """Of matrices that cost the more the later they come."""
    errors = tuple(0.6 * (i / 10) ** 2.5 for i in range(1, 10))
    curves = {f"m{i}": Curve(f"m{i}", (16, 16 * (i + 1)), SHARES, errors) for i in range(count)}
    return Damages(curves, {name: 0.5 * (i + 1) for i, name in enumerate(curves)})


def test_damage_is_the_weighed_sum_of_what_is_pruned():
    of = damages(3)
    plan = Plan({"m0": "50%", "m1": None, "m2": "90%"}, {name: curve.shape for name, curve in of.curves.items()})
    each = 0.5 * of.curves["m0"].errors[4], 1.5 * of.curves["m2"].errors[8]
    assert of.of(plan) == of.harm(plan).damage == pytest.approx(sum(each))
    assert of.harm(plan).amplitude == pytest.approx(sum(one * one**0.5 for one in each) / sum(each))
    nothing = Plan(dict.fromkeys(of.curves), plan.shapes)
    assert of.harm(nothing) == Harm(0.0, 0.0)


def test_probes_spread_over_what_is_asked():
    of, groups = damages(), [["m0", "m1"], ["m2", "m3"]]
    for asked, wanted in (([0.1, 1.0], (0.1, 1.0)), ([0.3], (0.3 / 10**0.5, 0.3 * 10**0.5)), ([], (0.01, 0.1))):
        plans = list(probe_plans(of, groups, asked, 5, seed=3))
        done = [of.of(plan) for plan in plans]
        steps = [wanted[0] * (wanted[1] / wanted[0]) ** ((i + 0.5) / 5) for i in range(5)]
        assert done == pytest.approx(steps, rel=0.05)  # shares are rounded to a thousandth
        assert all(len(set(plan.patterns.values())) > 1 for plan in plans), "a probe differs from a uniform pruning"
    # What no probe can reach is left to the line: they end below 90 % everywhere, and differ.
    reach = of.of(Plan(dict.fromkeys(of.curves, "90%"), {name: curve.shape for name, curve in of.curves.items()}))
    done = [of.of(plan) for plan in probe_plans(of, groups, [reach, 3 * reach], 5, seed=3)]
    assert done == pytest.approx([reach / 10 * 10 ** ((i + 0.5) / 5) for i in range(5)], rel=0.05)
    again = list(probe_plans(of, groups, [], 5, seed=3))
    assert again == plans and list(probe_plans(of, groups, [], 5, seed=4)) != plans


# ---- from damage to perplexity ----


def settled(probes: list[tuple[float, float]], at: float = 0.1, slope: float = 2.0) -> Quality:
    """By probes of these damages and amplitudes, whose log(rise / damage) lies on a line, or 0.01 beside it, in turn."""
    done = []
    for i, (damage, amplitude) in enumerate(probes):
        rise = damage * math.exp(at + slope * amplitude + 0.01 * (-1) ** i)
        done.append((str(i), Harm(damage, amplitude), 10 * math.exp(rise)))
    return Quality(10.0, 99, damages(2), *quality_module._settled(10.0, done))


PROBED = [(0.01, 0.05), (0.02, 0.2), (0.05, 0.1), (0.1, 0.3), (0.2, 0.25), (0.4, 0.5)]


def harmful(of: Damages, first: float, second: float) -> Plan:
    """A plan whose linears do these damages."""
    shares = []
    for name, wanted in zip(of.curves, (first, second)):
        low, high = 0.1, 0.9
        for _ in range(50):
            middle = (low + high) / 2
            over = of.weights[name] * error_at(of.curves[name], Pattern.parse(f"{100 * middle:.10g}%")) > wanted
            low, high = (low, middle) if over else (middle, high)
        shares.append(f"{100 * low:.10g}%" if wanted else None)
    return Plan(dict(zip(of.curves, shares)), {name: curve.shape for name, curve in of.curves.items()})


def test_of_two_plans_of_one_damage_the_one_in_fewer_linears_costs_more():
    quality = settled(PROBED)
    for each in ((0.05, 0.05), (0.1, 0)):
        plan, amplitude = harmful(quality.damages, *each), sum(one**1.5 for one in each) / 0.1
        found, wanted = quality.expected(plan), 10 * math.exp(0.1 * math.exp(0.1 + 2 * amplitude))
        assert found.perplexity == pytest.approx(wanted, rel=2e-3) and found.low < wanted < found.high
    assert amplitude == pytest.approx(0.1**0.5) and not quality.beyond(plan)


def test_beyond_the_probes_there_is_a_least_perplexity_and_no_number():
    quality, most = settled(PROBED), 0.4
    for each, told in (((0.2, 0.39), True), ((0.2, 0.41), False), ((0.0, 0.37), True), ((0.0, 0.38), False)):
        plan = harmful(
            quality.damages, *each
        )  # the last two by their amplitude: the probes' largest is 0.5, its reach the root of 0.375
        found = quality.expected(plan)
        assert math.isfinite(found.perplexity) == math.isfinite(found.high) == told, each
        capped = Harm(min(sum(each), most), min(sum(one**1.5 for one in each) / sum(each), 0.5))
        if not told:
            assert found.low == pytest.approx(quality_module._expected(10.0, quality.line, capped).low, rel=1e-6)
            assert 10 < found.low < 10 * math.exp(most * math.exp(0.1 + 2 * 0.5) * 1.01)


def test_by_some_of_the_probes_it_is_as_if_no_other_had_been_done():
    whole = settled(PROBED)
    some = whole.by(whole.probes[1:5])
    rises = [math.log(math.log(probe.measured / 10) / probe.damage) for probe in some.probes]
    assert some.line == Line.through([probe.amplitude for probe in some.probes], rises) and some.probes != whole.probes[1:5]


def test_what_was_pruned_comes_back_bit_for_bit():
    subject = subject_of(build("gpt2"))
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="midway"), restored(subject.flat):
        sparsekit.prune(subject.model, token_batches((2, 9)), pattern="2:4")
        assert any(not torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
        raise RuntimeError("midway")
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


# ---- size ----


def holds(pattern: NM | PairNM) -> bool:
    """Whether every mask of the pattern holds 2:4, by trying all masks of the groups that four neighbours lie in."""
    pair, period = isinstance(pattern, PairNM), math.lcm(4, pattern.m)
    width, n, m = (2, pattern.n // 2, pattern.m // 2) if pair else (1, pattern.n, pattern.m)
    group = [[bit for one in bits for bit in [one] * width] for bits in itertools.product([0, 1], repeat=m) if sum(bits) <= n]
    for left in range(0, period, 4):
        groups = sorted({column // pattern.m for column in range(left, left + 4)})
        for masks in itertools.product(group, repeat=len(groups)):
            held = dict(zip(groups, masks))
            if sum(held[column // pattern.m][column % pattern.m] for column in range(left, left + 4)) > 2:
                return False
    return True


def test_what_holds_2_4_by_its_pattern():
    for m in range(1, 7):
        for n in range(m + 1):
            assert holds_24(NM(n, m)) == holds(NM(n, m)), (n, m)
    for m in (2, 4, 6, 8):
        for n in range(0, m + 1, 2):
            assert holds_24(PairNM(n, m)) == holds(PairNM(n, m)), (n, m)
    assert holds_24(NM(2, 8)) and not holds_24(NM(3, 8)) and not holds_24(None) and not holds_24(Pattern.parse("75%"))


def stored(folder: Path) -> int:
    """Bytes of the tensors in a folder's weight files: all but the headers."""
    total = 0
    for path, _ in checkpoint.weight_files(folder):
        content = path.read_bytes()
        total += len(content) - 8 - int.from_bytes(content[:8], "little")
    return total


# llama: columns that are padded; tied and gpt2: weights that stand in two places, Conv1D; qwen3_moe: experts, which stay dense.
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "50%", "mixed"])
def test_bytes_are_those_of_the_folder(name, text, tmp_path):
    checkpoint.save(build(name, dtype=torch.float16), tmp_path / "dense", format="dense")
    subject = subject_of(tmp_path / "dense", device="cpu", dtype=torch.float32)
    plan = subject.plan("2:4" if text == "mixed" else text)
    if text == "mixed":
        turns = itertools.cycle([None, "2:4", "4:8", "60%", "1:2"])
        plan = Plan({target.name: next(turns) for target in subject.flat}, plan.shapes)
    found = size_of(subject.model, subject.flat, plan, subject.dtype_of)
    assert found.dense == stored(tmp_path / "dense")
    sparsekit.prune_folder(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern=plan, device="cpu")
    assert found.stored == stored(tmp_path / "out")
    assert found.bitmask <= found.stored <= found.dense and (found.stored < found.dense) == (text in ("2:4", "1:4", "mixed"))


def test_bytes_of_the_shipped_model(tmp_path):
    subject = subject_of(MODEL, device="cpu", dtype=torch.float32)
    found = size_of(subject.model, subject.flat, subject.plan("2:4"), subject.dtype_of)
    sparsekit.prune_folder(MODEL, tmp_path / "out", method="magnitude", pattern="2:4", device="cpu")
    assert (found.dense, found.stored) == (stored(MODEL), stored(tmp_path / "out"))
    pruned = sum(target.weight.numel() for target in subject.flat)
    assert found.dense - found.stored == pruned * 2 * 7 // 16  # 9/16 of a 16-bit weight is left


def test_a_matrix_too_narrow_to_gain_stays_dense(tmp_path):
    model = build("llama", dtype=torch.float16, intermediate_size=4)  # 4 columns are padded to 8, and 9 bytes are more than 8
    checkpoint.save(model, tmp_path / "dense")
    subject = subject_of(tmp_path / "dense", device="cpu")
    found = size_of(subject.model, subject.flat, subject.plan("2:4"), subject.dtype_of)
    sparsekit.prune_folder(tmp_path / "dense", tmp_path / "out", method="magnitude", pattern="2:4", device="cpu")
    assert found.stored == stored(tmp_path / "out")


def test_a_matrix_left_alone_is_looked_at():
    model = build("llama", dtype=torch.float16)
    subject = subject_of(model)
    dense = subject.plan("0%")
    plan = Plan(dict.fromkeys(dense.patterns), dense.shapes)
    before = size_of(model, subject.flat, plan).stored
    with torch.no_grad():
        subject.flat[0].weight.zero_()  # it holds 2:4 as it is, and will be stored so
    assert size_of(model, subject.flat, plan).stored < before


# ---- speed ----


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "CACHE", tmp_path)
    tune.forget()
    yield lambda *rows: tune.write(bench.key(CPU), [Row(*row) for row in rows])
    monkeypatch.undo()
    tune.forget()


def pair(m, n, k, dense, sparse):
    return ("float16", m, n, k, "dense", 0, 0, dense), ("float16", m, n, k, "linear24_cpu", 0, 0, sparse)


def speed(model, text="2:4", batch=1, place=CPU):
    subject = subject_of(model)
    plan = text if isinstance(text, Plan) else subject.plan(text)
    return speed_of(model, subject.flat, plan, batch, torch.float16, place)


def test_speed_is_that_of_the_rows(rows):
    model = build("llama", dtype=torch.float16, intermediate_size=64)  # a block: q, o 32x32, k, v 16x32, gate, up 64x32, down 32x64
    assert speed(model).times is None and "bench DIR --tokens 1 --dtype float16 --tune" in speed(model).said
    rows(*pair(1, 32, 32, 4.0, 2.0), *pair(1, 16, 32, 2.0, 4.0), *pair(1, 64, 32, 8.0, 5.0), *pair(1, 32, 64, 8.0, 5.0))
    dense, pruned = 2 * 4 + 2 * 2 + 2 * 8 + 8, 2 * 2 + 2 * 4 + 2 * 5 + 5
    assert speed(model).times == pytest.approx(dense / pruned) and speed(model).said.startswith("faster at 1 tokens")
    assert speed(model, batch=4).times == speed(model).times and speed(model, batch=5).times is None  # too many for these rows
    shapes = subject_of(model).plan("2:4").shapes
    half = speed(model, Plan({name: "2:4" if "mlp" in name else "50%" for name in shapes}, shapes))
    assert half.times == pytest.approx(dense / (2 * 4 + 2 * 2 + 2 * 5 + 5))
    assert speed(model, "50%").times == 1 and speed(model, "50%").said.startswith("not faster: no kernel")
    assert speed(model, place=None).times is None and "that machine" in speed(model, place=None).said


def test_slower_is_said_to_be(rows):
    model = build("llama", dtype=torch.float16, intermediate_size=64)
    rows(*pair(1, 32, 32, 4.0, 5.0), *pair(1, 32, 64, 8.0, 9.0))
    found = speed(model)
    # k, v by the row of 32x32 at half its time, gate and up by that at twice.
    assert found.times == pytest.approx((8 + 4 + 16 + 8) / (10 + 5 + 20 + 9)) and found.said.startswith("not faster at 1 tokens")


def test_rows_of_other_sizes_say_nothing(rows):
    rows(*pair(1, 4096, 4096, 100.0, 50.0))
    assert speed(build("llama", dtype=torch.float16)).times is None


# ---- perplexity ----


def test_held_out_prunings_of_the_shipped_model():
    """A small edition of benchmarks/forecast.py."""
    counts = {"by linear": 2, "by block": 1, "mixed": 2, "some blocks": 1}
    found = benchmark.run(2, 2048, ("40%", "70%", "2:4", "1:4"), counts, samples=8)
    assert found["held_out"] == len(found["rows"]) == 10
    assert found["spearman"]["least"] > 0.9
    assert found["coverage"] >= 0.5  # over both: twelve probes that scatter little by chance hold 40 % of the ten, the others 90 %


def test_the_figures_that_are_kept():
    kept = json.loads(RESULT.read_text())
    assert kept["machine"]["date"] and kept["held_out"] == len(kept["rows"]) >= 50 and kept["seeds"] >= 10
    assert kept["spearman"]["least"] > 0.9 and 0.7 <= kept["coverage"] <= 0.9
    assert kept["probes"] == 12 and kept["coverage of a seed"]["least"] > 0.6 and not any(s["beyond"] for s in kept["by_seed"])
    half = kept["by half of the probes"]
    assert half["probes"] == 6 and half["width"] > kept["width"] and half["spearman"]["least"] > 0.9
    first, rows = kept["by_seed"][0], kept["rows"]
    inside = [row["low"] <= row["measured"] <= row["high"] for row in rows]
    on_the_edge = sum(row["measured"] in (row["low"], row["high"]) for row in rows)  # of digits that are kept
    assert abs(sum(inside) / len(rows) - first["coverage"]) <= on_the_edge / len(rows) + 1e-9 and on_the_edge <= 2
    by_forecast, by_truth = (sorted(range(len(rows)), key=lambda i: rows[i][what]) for what in ("perplexity", "measured"))
    apart = sum((by_forecast.index(i) - by_truth.index(i)) ** 2 for i in range(len(rows)))
    assert 1 - 6 * apart / (len(rows) ** 3 - len(rows)) == pytest.approx(first["spearman"], abs=1e-3)  # ties by rounding
    assert kept["coverage"] == pytest.approx(sum(one["coverage"] for one in kept["by_seed"]) / kept["seeds"])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the command says of the shipped model, and the file it leaves."""
    out = tmp_path_factory.mktemp("forecast") / "forecast.json"
    small = ("--samples", 16, "--seq-len", 64, "--max-tokens", 2048, "--device", "cpu")
    asked = ("--pattern", "2:4", "--pattern", "50%", "--pattern", "90%", "--batch", 1, "--batch", 64)
    return invoke("forecast", MODEL, "--calib", CALIB, "--eval", TEST, *small, *asked, "--out", out, "--json"), out


def test_the_command(said):
    done, out = said
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text()) and [path.name for path in out.parent.iterdir()] == [out.name]
    assert [row["pattern"] for row in found["rows"]] == ["2:4", "50%", "90%"] and len(found["probes"]) == 12
    two, half, most = found["rows"]
    assert found["dense_perplexity"] < half["perplexity"] < two["perplexity"] < most["perplexity"]
    assert all(row["low"] < row["perplexity"] < (row["high"] or math.inf) for row in found["rows"])
    widths = [math.log(math.log(row["high"] / found["dense_perplexity"]) / math.log(row["low"] / found["dense_perplexity"]))
              for row in (two, most) if row["high"]]  # fmt: skip
    assert len(widths) < 2 or widths[1] > widths[0], "farther from the middle of the probes, and not clamped"
    assert set(two["speedup"]) == {"1", "64"} and half["speedup"] == {"1": 1.0, "64": 1.0}
    assert two["bytes"] < two["dense_bytes"] == half["bytes"]
    assert {row["pattern"] for row in found["published"]} == {"2:4", "50%"} and all(row["source"] for row in found["published"])
    assert found["machine"]["device"] == bench.key(CPU) and found["machine"]["dtype"] == "float16"


def test_what_the_others_forecast_of_a_probe_may_be_beyond_any_number():
    # Of three that lie close together the line runs away: a rise of more than 700 nats of the fourth.
    quality = settled([(0.1, 0.501), (0.5, 2.0), (0.1, 0.502), (0.1, 0.5)])
    assert math.isinf(max(probe.predicted for probe in quality.probes))
    found = Forecast(10.0, 99, 0.8, quality.probes, (), (), {}).to_dict()
    told = [probe["predicted"] for probe in json.loads(json.dumps(found, allow_nan=False))["probes"]]
    assert told.count(None) == 1 and len(told) == 4


# ---- what to choose ----


@pytest.fixture
def known(monkeypatch):
    """A model whose quality is known beforehand: it is not measured."""

    def settled(model, targets, batches, tokens, seq_len, plans, **how):
        curves = {t.name: Curve(t.name, tuple(t.weight.shape), ("50%", "4:8", "2:4", "1:4"), (0.02, 0.03, 0.04, 0.4))
                  for of in targets for t in of}  # fmt: skip
        weights = dict.fromkeys(curves, 1 / len(curves))
        line = Line.through([0.0, 0.5, 1.0, 0.5], [0.05, 0.02, -0.05, -0.02])  # a rise about as large as the damage
        return Quality(10.0, 99, Damages(curves, weights), (Probe("90%", 9.0, 3.0, 0.0, 0.0),), line)

    monkeypatch.setattr("sparsekit.analysis.forecast.calibrate", settled)
    monkeypatch.setattr(Quality, "beyond", lambda self, plan: False)
    return build("llama", dtype=torch.float16, intermediate_size=64)


def chosen(model, loss, **how):
    how = {"candidates": ("50%", "4:8", "2:4", "1:4"), "seq_len": 8, **how}
    return recommend(model, token_batches((1, 8)), torch.arange(64), max_quality_loss=loss, **how)


def test_the_smaller_one_within_the_limit(known, rows):
    found = chosen(known, 0.1)
    assert found.pattern == NM(2, 4) and found.row.perplexity == pytest.approx(10 * math.exp(0.04), rel=1e-2)
    assert "neither smaller nor faster" in found.rejected["4:8"] and "may reach" in found.rejected["1:4"]
    assert "not measured" in " ".join(found.why)
    assert json.loads(json.dumps(found.to_dict()))["recommended"]["pattern"] == "2:4"


@pytest.mark.parametrize("method", [None, "sparsegpt", "wanda"])
def test_a_plan_for_another_method_says_whose_perplexity_is_shown(method, known, rows):
    shapes = subject_of(known).plan("2:4").shapes
    plan = Plan(dict.fromkeys(shapes, "2:4"), shapes, method)
    (row,) = forecast(known, token_batches((1, 8)), torch.arange(64), [plan], seq_len=8).rows
    assert ("the plan is for wanda, and the perplexity is what SparseGPT would leave" in row.said) == (method == "wanda")


def test_a_limit_that_nothing_keeps(known, rows):
    found = chosen(known, 0.001)
    assert found.pattern is None and found.row is None and set(found.rejected) == {"50%", "4:8", "2:4", "1:4"}


def test_some_linears_stay_dense_where_all_would_lose_too_much(known, rows):
    found = chosen(known, 0.03)  # all of 2:4 loses 0.04
    held = [pattern for pattern in found.pattern.patterns.values() if pattern is not None]
    assert set(held) == {NM(2, 4)} and 0 < len(held) < len(found.pattern.patterns)
    assert found.row.high <= 10.3 and found.row.bytes < found.row.dense_bytes and "may reach" in found.rejected["2:4"]
    assert (
        found.row.pattern == f"2:4 in {len(held)} of 21 linears" and found.to_dict()["recommended"]["plan"] == found.plan.to_dict()
    )
    # A tenth more would be beyond the limit.
    assert found.pattern.sparsity < 0.5 and found.row.perplexity > 10 * math.exp(0.02)


def test_what_may_end_above_the_limit_is_rejected(known, rows):
    row = chosen(known, 1.0).row
    between = (row.perplexity + row.high) / 20 - 1
    assert row.perplexity < 10 * (1 + between) < row.high
    assert "may reach" in chosen(known, between).rejected["2:4"]


def test_of_two_as_small_the_better_one(known, rows):
    found = chosen(known, 1.0)
    assert found.pattern == NM(2, 4) and found.rejected["1:4"] == "2:4 is as small and as fast, and loses less"


def test_the_faster_one_by_rows(known, rows):
    rows(*pair(1, 32, 32, 4.0, 2.0), *pair(1, 64, 32, 8.0, 5.0), *pair(1, 32, 64, 8.0, 5.0))
    found = chosen(known, 0.1)
    assert found.row.speedup[1] > 1 and any("faster at 1 tokens" in why for why in found.why)
    # On a GPU without sparse units 2:4 is smaller, and that is all.
    old = chosen(known, 0.1, hardware="V100")
    assert old.pattern == NM(2, 4) and old.row.speedup[1] is None and "no sparse tensor cores" in " ".join(old.why)


@pytest.mark.parametrize("loss", [0, -1, math.nan, math.inf])
def test_a_limit_that_is_none(known, loss):
    with pytest.raises(SparsekitError, match="must be a share above 0"):
        chosen(known, loss)


def test_an_unknown_gpu(known):
    with pytest.raises(SparsekitError, match="got 'Abacus'"):
        chosen(known, 0.1, hardware="Abacus")


# ---- docs/forecast.md ----

PAGE = (Path(__file__).resolve().parents[1] / "docs/forecast.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs_and_the_model_stays_as_it_is(tmp_path, monkeypatch, capsys):
    made = []

    def once(model, *args, **how):  # the second call asks about the same
        if not made:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            made.append(quality_module.calibrate(model, *args, **{**how, "probes": 4}))
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return made[0]

    monkeypatch.setattr("sparsekit.analysis.forecast.calibrate", once)
    tokenizer = checkpoint.load_tokenizer(MODEL)
    calib, text = (data.read_tokens(path, tokenizer) for path in (CALIB, TEST))
    names = {"folder": MODEL, "batches": data.calibration_batches(calib, 16, 64, batch=16), "tokens": text[:1024]}
    for block in re.findall(r"(?m)^```python\n(.*?)^```", PAGE, re.S):
        exec(block.replace("seq_len=2048", "seq_len=64"), names)
    assert [row.pattern for row in names["found"].rows] == ["4:8", "2:4"] and capsys.readouterr().out.startswith("4:8 ")
    assert "4:8" in names["advice"].rejected  # neither smaller nor faster, whatever it may lose


def test_the_figures_of_the_page_are_those_on_file():
    kept = json.loads(RESULT.read_text())
    rows = dict(re.findall(r"(?m)^\| ([a-z ]+) \| (\d+ %) \|$", PAGE))
    assert rows == {kind: f"{100 * share:.0f} %" for kind, share in {**kept["coverage_by_kind"], "all": kept["coverage"]}.items()}
    said = re.search(
        r"(\d+) prunings held out, (\d+) sets of (\d+) probes: .* (0\.\d+); .* factor of (1\.\d+)", PAGE.replace("\n", " ")
    )
    factor = math.exp(kept["error"])
    wanted = kept["held_out"], kept["seeds"], kept["probes"], f"{kept['spearman']['mean']:.2f}", f"{factor:.2f}"
    assert said.groups() == tuple(map(str, wanted))
    for found in (kept, kept["by half of the probes"]):
        ends = found["coverage of a seed"]
        assert min(one["coverage"] for one in found["by_seed"]) == ends["least"]
        assert max(one["coverage"] for one in found["by_seed"]) == ends["most"]
        assert f"held {100 * ends['least']:.0f} to {100 * ends['most']:.0f} %" in PAGE
        assert f"{math.exp(found['width']):.2f} times" in PAGE
    assert f"(all: {100 * found['coverage']:.0f} %)" in PAGE


# ---- what is refused ----


def test_curves_of_another_model():
    model, batches = build("llama"), token_batches((2, 9))
    curves = error_curves(build("gpt2"), batches, SHARES)
    with pytest.raises(SparsekitError, match=r"must be those of this model, and model\.layers\.0\.\S+ is in one"):
        forecast(model, batches, torch.arange(64), ["50%"], seq_len=8, sensitivity=Sensitivity(0, curves))
    curves = error_curves(model, batches, SHARES)
    with pytest.raises(SparsekitError, match="curves must be measured at 2:4"):
        forecast(model, batches, torch.arange(64), ["2:4"], seq_len=8, sensitivity=Sensitivity(0, curves))
    curves = error_curves(model, batches, ("50%", "60%", "2:4"))
    known = Sensitivity(0, error_curves(model, batches, (*SHARES, "2:4")), weights={"model.layers.0.self_attn.q_proj": 1.0})
    with pytest.raises(SparsekitError, match=r"must have a weight of 0 or more, got None for model\.layers\.0\.self_attn\.k_proj"):
        forecast(model, batches, torch.arange(64), ["2:4"], seq_len=8, sensitivity=known)
    with pytest.raises(SparsekitError, match=r"probes take shares from 10% to 90%, .* was measured at 50%, 2:4 and 60%; measure"):
        forecast(model, batches, torch.arange(64), ["2:4"], seq_len=8, sensitivity=Sensitivity(0, curves))


def test_probes_that_cost_nothing_say_nothing():
    of = damages()
    plan = Plan(dict.fromkeys(of.curves, "50%"), {name: curve.shape for name, curve in of.curves.items()})
    with pytest.raises(SparsekitError, match="at least 4 probes must cost perplexity for an interval, and 1 of 6 did"):
        quality_module._settled(10.0, [(str(plan), of.harm(plan), 9.0 + 2 * (i == 3)) for i in range(6)])


COMMAND = ("forecast", MODEL, "--calib", CALIB, "--eval", TEST, "--device", "cpu")


@pytest.mark.parametrize(
    "options, says",
    [
        (("--probes", 3), "at least 4 probes, got 3"),
        (("--pattern", "2:5x"), "a pattern must be .* got '2:5x'"),
        (("--batch", 0), "at least one token, got 0"),
        (("--max-loss", 0.1, "--batch", 1, "--batch", 2), "chooses for one --batch, got 1, 2"),
        (("--max-loss", 0), "a share above 0"),
        (("--keep-plan", "plan.yaml"), "--keep-plan keeps what --max-loss recommends"),
        (("--max-tokens", 5), "at least one sequence of"),
        (("--sensitivity", CALIB), "the sensitivities .* must be JSON"),
        (("--sensitivity", "/nowhere"), "cannot be read"),
        (("--plan", "/nowhere"), "the plan /nowhere must be"),
        (("--out", "/nowhere/forecast.json"), "the output must be a file in a folder that is there"),
        (("--skip", "nobody"), "every skipped name must be a module"),
    ],
)
def test_what_the_command_refuses(options, says):
    assert_refused(invoke(*COMMAND, *options), says)


def test_a_plan_for_another_model(tmp_path):
    Plan({"a": "2:4"}, {"a": (4, 4)}).save(tmp_path / "plan.yaml")
    assert_refused(invoke(*COMMAND, "--plan", tmp_path / "plan.yaml"), "the plan must be for this model, and .* is of shape")


def test_a_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning")
    assert_refused(invoke(*COMMAND[:4], "--eval", tmp_path / "short.txt", "--seq-len", 64), "at least one sequence of 64 tokens")
