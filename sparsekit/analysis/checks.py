"""What the doctor checks, one function each: in the trees' order, from what it knows of the patient to what to do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from .. import bench, catalog, tune
from ..criteria import CRITERIA, Gram
from ..errors import listed
from ..inspection import DENSE_BELOW
from ..linear import NM24
from ..ops import linear as product
from ..pipeline.observe import OWN
from .costs import near
from .html import change, faster, plural, share
from .known import split_name
from .patient import FINDING, LEVELS, NOT_MADE, OK, QUALITY, SEMI, SPEED, Check, Checker, Patient

# A rise of perplexity that is worth a look. Published, Llama-2-7B by SparseGPT: 50 % rises by 27 %, 2:4 by 99 %.
ROSE = 0.25
# What follows is set by the shipped model, pruned well: its figure stands behind each.
OUTLIER = 4.0  # times the median error of its kind: 3.2
DEAD = 0.98  # share of the mask's error that the update leaves: 0.69
UNCHANGED = 0.01  # share of kept weights that differ from the dense ones: 0.99
UNLIKE = 1.5  # times the error that SparseGPT makes of it on the text that is asked about: 1.06, on other chapters
FREER = 1.5  # times the error of 4:8: 1.33
FEW = 0.1  # of the matrices, that make up half of all loss

_NO_REPORT = "there is no report.json of a pruning within matrices in the folder"


def _ok(tree: str, name: str, checked: str, found: str) -> Check:
    return Check(tree, name, OK, checked, found)


def _not_made(tree: str, name: str, checked: str, why: str) -> Check:
    return Check(tree, name, NOT_MADE, checked, why)


def _finding(tree: str, name: str, severity: str, checked: str, found: str, do: str) -> Check:
    return Check(tree, name, FINDING, checked, found, severity, do)


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return listed(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def _count(names: list, what: str = "matrix", many: str = "matrices") -> str:
    return plural(len(names), what, many)


# ---- quality dropped ----


def pattern(patient: Patient) -> Check:
    about = QUALITY, "pattern"
    if not patient.rows:
        checked = f"the zeros of {_count(patient.matrices)}"
        pruned = [matrix for matrix in patient.matrices if matrix.sparsity >= DENSE_BELOW]
        if patient.structured and not pruned:
            return _not_made(*about, checked, "parts were taken out whole, and nothing was pruned within matrices")
        if pruned:
            return _ok(*about, checked, f"{len(pruned)} hold zeros; without a report nobody says which pattern was asked for")
        return _finding(
            *about, "error", checked, "no matrix holds zeros: nothing was pruned, or training has filled them since",
            "prune it with `sparsekit prune`, and look at what it says was not pruned",
        )  # fmt: skip
    checked = f"whether each of {_count(patient.rows)} holds the pattern that the report says"
    lost = [matrix for matrix in patient.matrices if matrix.broken]
    if not lost:
        return _ok(*about, checked, f"all hold {_some(dict.fromkeys(each.brief for each in patient.patterns))}")
    return _finding(
        *about, "error", checked, f"not in {_count(lost)}, the first {lost[0].name}, where {lost[0].broken}: the mask was lost",
        "prune it anew, and train it afterwards under GradualPruner.fixed or as SparseLinear, which keep the zeros",
    )  # fmt: skip


def finite(patient: Patient) -> Check:
    checked = f"{_count(patient.matrices)} for NaN and Inf"
    broken = [matrix.name for matrix in patient.matrices if not matrix.finite]
    if not broken:
        return _ok(QUALITY, "finite", checked, "none")
    do = "prune it anew from weights that are finite; the dense model may hold them too"
    return _finding(QUALITY, "finite", "error", checked, f"{_some(broken)} hold NaN or Inf", do)


def perplexity(patient: Patient) -> Check:
    about = QUALITY, "perplexity"
    checked = "perplexity against the dense model's"
    if patient.perplexities is None:
        return _not_made(*about, checked, "it takes the dense model and a text; give --dense and --eval")
    dense, now = patient.perplexities
    said = f"perplexity {now:.4g}, dense {dense:.4g}: {change(now, dense)}"
    if now <= (1 + ROSE) * dense:
        return _ok(*about, checked, said)
    return _finding(
        *about, "warning", checked, said,
        "see the other findings; then prune less (`sparsekit forecast` says what that would cost), spend the zeros where they hurt "
        "least (`sparsekit plan`), or recover by training under GradualPruner.fixed",
    )  # fmt: skip


def method(patient: Patient) -> Check:
    about = QUALITY, "method"
    checked = "what chose the weights"
    if not patient.rows:
        return _not_made(*about, checked, _NO_REPORT)
    if patient.report.method != "magnitude":
        return _ok(*about, checked, patient.report.method)
    return _finding(
        *about, "warning", checked, "magnitude, which looks at no inputs",
        "calibrate: `sparsekit prune MODEL --calib TEXT --method sparsegpt`",
    )  # fmt: skip


def calibration(patient: Patient) -> Check:
    about = QUALITY, "calibration"
    checked = "tokens calibrated on against the inputs of each matrix"
    if not patient.rows:
        return _not_made(*about, checked, _NO_REPORT)
    by = patient.report.method
    gathers = CRITERIA[by].statistics if by in CRITERIA else Gram
    if gathers is not Gram:
        return _not_made(*about, checked, f"{by} keeps no Gram matrix: no number of tokens is too few for it to be of full rank")
    few = [row for row in patient.rows if row.statistics == OWN and row.tokens < row.shape[1]]
    least = min((row.tokens / row.shape[1] for row in patient.rows if row.statistics == OWN), default=0)
    if not few:
        return _ok(*about, checked, f"{patient.report.tokens:,} tokens, at least {least:.3g} for each input")
    worst = min(few, key=lambda row: row.tokens / row.shape[1])
    said = f"{worst.name} has {worst.shape[1]:,} inputs and saw {worst.tokens:,} tokens"
    return _finding(
        *about, "warning", checked, f"fewer tokens than inputs in {_count(few)}: {said}, so its Gram matrix is not of full rank",
        "calibrate on more: --samples 128 --seq-len 2048 is common, of text as the model will see it",
    )  # fmt: skip


def experts(patient: Patient) -> Check:
    about = QUALITY, "experts"
    checked = "whose inputs each matrix was pruned by"
    if not patient.rows:
        return _not_made(*about, checked, _NO_REPORT)
    if not patient.report.tokens:
        return _not_made(*about, checked, f"{patient.report.method} looks at none")
    others = [row for row in patient.rows if row.statistics != OWN]
    if not others:
        return _ok(*about, checked, "each by its own")
    by = {kind: [row.name for row in others if row.statistics == kind] for kind in dict.fromkeys(row.statistics for row in others)}
    ways = {"layer": "the inputs of all experts of their layer", "magnitude": "magnitude"}
    said = "; ".join(f"{_count(names)} by {ways[kind]}: {_some(names, 2)}" for kind, names in by.items())
    do = "calibrate on more tokens, or on text that reaches these experts, or leave them alone with --skip"
    return _finding(*about, "warning", checked, f"too few tokens of their own: {said}", do)


def damping(patient: Patient) -> Check:
    about = QUALITY, "damping"
    checked = f"the damping of each factor, {Gram.DAMPING_LADDER[0]} unless that was not enough"
    used = [row for row in patient.rows if row.damping is not None]
    if not used:
        return _not_made(*about, checked, "no matrix has a factor" if patient.rows else _NO_REPORT)
    higher = [row for row in used if row.damping > Gram.DAMPING_LADDER[0]]
    if not higher:
        return _ok(*about, checked, f"{Gram.DAMPING_LADDER[0]} everywhere")
    most = max(row.damping for row in higher)
    said = f"{_count(higher)} needed up to {most:g} of the mean diagonal: {_some(row.name for row in higher)}"
    do = "calibrate on more and more varied tokens; a Gram matrix that near to singular says little of its inputs"
    return _finding(*about, "warning", checked, said, do)


def update(patient: Patient) -> Check:
    about = QUALITY, "update"
    checked = "whether what is left was updated to make up for what went"
    if not patient.rows:
        return _not_made(*about, checked, _NO_REPORT)
    if patient.report.method != "sparsegpt":
        return _not_made(*about, checked, f"{patient.report.method} updates nothing; sparsegpt does")
    pruned = {row.name for row in patient.rows if row.statistics != "magnitude"}
    ratios = [row.output_error / row.output_error_masked for row in patient.rows if row.output_error_masked]
    changed = [matrix.changed for matrix in patient.matrices if matrix.changed is not None and matrix.name in pruned]
    if not ratios and not changed:
        return _not_made(*about, checked, "no error is known, and no dense model to compare with; give --dense")
    said = []
    if ratios:
        said.append(f"the median matrix keeps {share(statistics.median(ratios), 0)} of the error of its mask alone")
    if changed:
        said.append(f"{share(statistics.median(changed), 0)} of its kept weights differ from the dense ones")
    dead = (ratios and statistics.median(ratios) > DEAD) or (changed and statistics.median(changed) < UNCHANGED)
    if not dead:
        return _ok(*about, checked, "; ".join(said))
    do = "prune it anew with this version; if it stays so the inputs are independent of one another, and wanda does as well"
    return _finding(*about, "error", checked, f"the update is dead: {'; '.join(said)}", do)


def outliers(patient: Patient) -> Check:
    about = QUALITY, "outliers"
    checked = f"each matrix's output error against the median of its kind, {OUTLIER:g} times being an outlier"
    known = [row for row in patient.rows if row.output_error is not None]
    if not known:
        return _not_made(*about, checked, "no error is known: the method keeps no Gram matrix" if patient.rows else _NO_REPORT)
    blocks = [block.name for block in patient.report.blocks]
    kinds: dict[str, list] = {}
    for row in known:
        kinds.setdefault(split_name(row.name, blocks)[1], []).append(row)
    middle = {kind: statistics.median(row.output_error for row in rows) for kind, rows in kinds.items()}
    far = [row for kind, rows in kinds.items() for row in rows if row.output_error > OUTLIER * middle[kind]]
    far.sort(key=lambda row: -row.output_error)
    if not far:
        worst = max(known, key=lambda row: row.output_error)
        return _ok(*about, checked, f"none; the largest is {share(worst.output_error)}, of {worst.name}")
    weights = sum(math.prod(row.shape) for row in far) / sum(math.prod(row.shape) for row in patient.rows)
    said = _some(f"{row.name} ({share(row.output_error)})" for row in far)
    skips = " ".join(f"--skip {row.name}" for row in far[:3])
    return _finding(
        *about, "warning", checked, f"{_count(far)} {'loses' if len(far) == 1 else 'lose'} far more than their kind: {said}",
        f"leave them dense ({skips}; all of them are {share(weights)} of the weights), or let `sparsekit plan` spend less on them",
    )  # fmt: skip


def fit(patient: Patient) -> Check:
    about = QUALITY, "fit"
    checked = "the output errors on the text given, against SparseGPT at 2:4 calibrated on it"
    if not patient.errors:
        return _not_made(*about, checked, "it takes the dense model and a text; give --dense and --calib")
    if patient.patterns != [NM24]:
        return _not_made(*about, checked, "it compares 2:4 with 2:4, and the folder holds another pattern")
    ratios = {name: own / best[-1] for name, (own, best) in patient.errors.items() if best[-1] > 0}
    if not ratios:
        return _not_made(*about, checked, "no matrix has an error on that text")
    middle = statistics.median(ratios.values())
    said = f"the median matrix loses {middle:.2f} times as much"
    if middle < UNLIKE:
        return _ok(*about, checked, said)
    worst = sorted(ratios, key=lambda name: -ratios[name])
    do = "calibrate on text like that which the model is for: `sparsekit prune --calib` with it, --method sparsegpt"
    return _finding(
        *about, "warning", checked, f"{said}, most of all {_some(worst)}: it was pruned by other inputs, or by none", do
    )


# ---- no speed-up ----


def stored(patient: Patient) -> Check:
    about = SPEED, "stored"
    checked = f"how {_count(patient.matrices)} are stored"
    dense = [matrix for matrix in patient.matrices if matrix.holds24 and matrix.saves and not matrix.compressed]
    sparse = [matrix for matrix in patient.matrices if matrix.compressed]
    if not dense:
        return _ok(*about, checked, f"{len(sparse)} compressed" if sparse else "none holds 2:4, so that none could be compressed")
    return _finding(
        *about, "warning", checked, f"{_count(dense)} hold 2:4 and are stored dense: the same size, the same products",
        "`sparsekit prune --format compressed`, or in Python load it, sparsekit.compress(model), sparsekit.save(model, OUT)",
    )  # fmt: skip


def hardware(patient: Patient) -> Check:
    about = SPEED, "hardware"
    where = patient.gpu or ("this machine's CPU" if patient.device.type == "cpu" else "this machine's GPU")
    checked = f"whether a kernel runs the pattern on {where}"
    if not patient.patterns:
        return _not_made(*about, checked, "nothing is pruned to a pattern that is known")
    found = [catalog.entry(each, patient.gpu or patient.device) for each in patient.patterns]
    without = [entry for entry in found if entry.kernel is None]
    if not without:
        return _ok(*about, checked, "; ".join(f"{entry.pattern}: {entry.kernel}" for entry in found))
    reasons: dict[str, list[str]] = {}
    for entry in without:
        reasons.setdefault(entry.unless, []).append(entry.pattern.brief)
    said = "; ".join(f"{_some(dict.fromkeys(patterns))}: {reason}" for reason, patterns in reasons.items())
    able = catalog.entry("2:4", patient.gpu or patient.device).kernel
    do = "prune to 2:4" if able else "nothing within a matrix is faster there; a freer pattern costs less quality for as many zeros"
    return _finding(*about, "warning", checked, said, f"{do}, or take out whole heads, neurons or layers, which is faster anywhere")


def kernels(patient: Patient) -> Check:
    about = SPEED, "kernels"
    checked = f"which kernel runs each product with {plural(patient.batch, 'token')}, by measured rows"
    sparse = [matrix for matrix in patient.matrices if matrix.compressed]
    if not sparse:
        return _not_made(*about, checked, "no matrix is stored compressed, so that every product is the dense one")
    if patient.gpu is not None:
        return _not_made(*about, checked, f"they are of this machine, and {patient.gpu} was asked about; run it there")
    if patient.device.type == "cuda" and not product.gpu_kernels(patient.device.index or 0):
        do = "build sparsekit with nvcc there, with its architecture in SPARSEKIT_CUDA_ARCHS"
        return _finding(*about, "error", checked, "this build has no kernel for this GPU: each call expands the weight", do)
    if patient.device.type == "cuda" and patient.dtype not in product.GPU_DTYPES:
        do = "in Python load it, model.bfloat16(), sparsekit.save(model, OUT)"
        said = f"a GPU has no kernel for {_name(patient.dtype)} weights: each call expands the weight"
        return _finding(*about, "warning", checked, said, do)
    if patient.compute != patient.dtype:
        said = f"{_name(patient.compute)} activations over {_name(patient.dtype)} weights are not measured"
        return _not_made(*about, checked, f"{said}; --dtype {_name(patient.dtype)} is what rows are of")
    key, shapes = bench.key(patient.device), {matrix.shape: [] for matrix in sparse}
    checked += f" ({tune.measured_on(key)})"
    for matrix in sparse:
        shapes[matrix.shape].append(matrix.name)
    slow, fast, missing = [], [], []
    for (n, k), names in shapes.items():
        times = tune.times(key, _name(patient.dtype), patient.batch, n, k)
        if times is None or not near(times, patient.batch, n, k):
            missing.append(f"{n}x{k}")
            continue
        gain = times.dense / times.sparse
        (fast if gain > 1 else slow).append(f"{n}x{k} {faster(gain)} ({_count(names)})")
    if slow:
        do = "ask with the --batch that it will run at; leave those dense with --skip, or run fewer tokens at a time"
        return _finding(*about, "warning", checked, f"not faster than the dense product: {_some(slow, 6)}", do)
    if missing:
        how = f"`sparsekit bench {patient.folder} --tokens {patient.batch} --dtype {_name(patient.dtype)} --tune` measures it"
        return _not_made(*about, checked, f"not measured near {_some(missing)}; {how}")
    return _ok(*about, checked, _some(fast, 6))


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def skipped(patient: Patient) -> Check:
    about = SPEED, "skipped"
    checked = "what was left dense, and why"
    if not patient.rows:
        return _not_made(*about, checked, _NO_REPORT)
    left = [name for name, why in patient.report.skipped.items() if why in ("asked for", "dense in the plan")]
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in patient.matrices}
    pruned = sum(math.prod(row.shape) for row in patient.rows)
    alone = sum(size for name, size in sizes.items() if any(name == each or name.startswith(f"{each}[") for each in left))
    usual = f"{plural(len(patient.report.skipped) - len(left), 'module')} as usual (embeddings, output layer, routers)"
    if not alone:
        return _ok(*about, checked, f"{usual}, none asked for")
    of_all = alone / (alone + pruned)
    said = f"{usual}, and as asked for {_some(left)}: {share(of_all)} of the weights in the blocks"
    if of_all < 0.1:
        return _ok(*about, checked, said)
    do = "what stays dense bounds the whole: skip less, or see by `sparsekit sensitivity` which of them need it"
    return _finding(*about, "note", checked, said, do)


# ---- 2:4 hurts ----


def levels(patient: Patient) -> Check:
    about = SEMI, "levels"
    checked = "what 2:4 loses against 4:8 and 50%, with as many zeros"
    if NM24 not in patient.patterns:
        return _not_made(*about, checked, "the folder does not hold 2:4")
    found = [best for _, best in patient.errors.values()] or _from_curves(patient)
    if not found:
        return _not_made(*about, checked, "it takes --dense and --calib, or a sensitivity.json with these levels")
    middle = [statistics.median(errors[i] for errors in found) for i in range(len(LEVELS))]
    said = ", ".join(f"{level} {share(error)}" for level, error in zip(LEVELS, middle))
    _, half, tight = middle
    if tight <= FREER * half:
        return _ok(*about, checked, f"output error of the median matrix: {said}")
    do = "prune to 4:8 where quality counts more than speed (no kernel here runs it), or plan with --choices dense,4:8,2:4"
    return _finding(*about, "note", checked, f"output error of the median matrix: {said}; the pattern itself is what costs", do)


def _from_curves(patient: Patient) -> list[tuple[float, ...]]:
    curves = patient.sensitivity.curves if patient.sensitivity else []
    held = [dict(zip(curve.levels, curve.errors)) for curve in curves]
    return [tuple(errors[level] for level in LEVELS) for errors in held if set(LEVELS) <= set(errors)]


def sensitive(patient: Patient) -> Check:
    about = SEMI, "sensitive"
    checked = "whether a few parts carry the loss, by measured losses with one alone pruned to 2:4"
    if NM24 not in patient.patterns:
        return _not_made(*about, checked, "the folder does not hold 2:4")
    found = patient.sensitivity
    losses = [row for row in found.losses if row.level == str(NM24)] if found else []
    if not losses or found.dense_loss is None:
        return _not_made(*about, checked, "not measured; `sparsekit sensitivity MODEL --eval TEXT` does, into sensitivity.json")
    more = sorted(((max(row.loss - found.dense_loss, 0.0), row.name) for row in losses), reverse=True)
    whole, carried, few = sum(loss for loss, _ in more), 0.0, []
    for loss, name in more:
        if whole <= 0 or carried >= whole / 2:
            break
        carried += loss
        few.append(name)
    said = f"{len(few)} of {len(more)} make up half of it"
    if not few or len(few) > FEW * len(more):
        return _ok(*about, checked, said)
    do = f"leave them dense: {' '.join(f'--skip {name}' for name in few[:3])}, or `sparsekit plan --choices dense,2:4`"
    return _finding(*about, "note", checked, f"{said}: {_some(few)}", do)


CHECKS: tuple[Checker, ...] = (
    pattern, finite, perplexity, method, calibration, experts, damping, update, outliers, fit,
    stored, hardware, kernels, skipped,
    levels, sensitive,
)  # fmt: skip
