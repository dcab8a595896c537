"""The report page: what it says is what the files say, names are text, and a real browser shows it without a word of complaint."""

import html.parser
import io
import json
import math
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from browser import Seen, chromium
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from test_cli import CALIB, MODEL, SMALL, assert_refused, content, invoke

from sparsekit import bench, tune
from sparsekit.analysis import charts
from sparsekit.analysis import html as numbers
from sparsekit.analysis.curves import Curve
from sparsekit.analysis.forecast import Forecast, Row
from sparsekit.analysis.known import split_name
from sparsekit.analysis.page import make_page, write_page
from sparsekit.analysis.published import Published
from sparsekit.analysis.quality import Probe
from sparsekit.analysis.sensitivity import Loss, Sensitivity
from sparsekit.plan import Plan

HOSTILE = "</td></script><script>window.broken=1</script><img src=x onerror=window.broken=1>\"' {{script}}"


class Parts(html.parser.HTMLParser):
    """The text of a page, the elements that it is made of, and whether each is closed where it should be."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.names, self.values, self.said = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.values += [value for _, value in attrs if value]
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """kjv1m at 2:4, with a few tokens; nothing beside its report."""
    folder = tmp_path_factory.mktemp("page") / "kjv-2-4"
    done = invoke("prune", MODEL, "--calib", CALIB, "--out", folder, *SMALL)
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def folder(pruned, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(pruned, tmp_path / pruned.name))


def change_report(folder: Path, change) -> dict:
    found = json.loads((folder / "report.json").read_text())
    change(found)
    (folder / "report.json").write_text(json.dumps(found))
    return found


def add_all(folder: Path) -> None:
    """Every file that the page knows, in the form in which the commands write them."""
    report = json.loads((folder / "report.json").read_text())
    names = [row["name"] for row in report["linears"]]
    patterns = {name: "4:8" if i % 3 else "dense" for i, name in enumerate(names)}
    Plan(patterns, {row["name"]: row["shape"] for row in report["linears"]}).save(folder / "plan.yaml")
    levels = ("30%", "50%", "2:4", "70%")
    curves = [
        Curve(row["name"], tuple(row["shape"]), levels, tuple(row["output_error"] * i for i in (0.3, 0.8, 1, 3)))
        for row in report["linears"]
    ]
    losses = [Loss(name, "2:4", 2.7 + i / 1000) for i, name in enumerate(names)]
    rows = (
        Row("2:4", 0.5, 19.25, 18.0, 21.0, 1_162_312, 1_850_000, {1: 1.25, 512: 0.75, 2048: None}, "from 5 probes"),
        Row("99%", 0.99, 99.0, 50.0, math.inf, 9, 9, {}, "far out"),
        Row("99.9%", 0.999, math.inf, 80.0, math.inf, 9, 9, {}, "beyond"),
    )
    papers = (Published("OPT-125M", "sparsegpt", "50%", 27.66, 36.85, "arXiv:2301.00774"),)
    beside = {
        "sensitivity": Sensitivity(256, curves, unit="linear", losses=losses, dense_loss=2.7, spearman=0.8125).to_dict(),
        "forecast": Forecast(14.9, 256, 0.8, (Probe("50%", 0.1, 0.3, 16.25, 16.5),), rows, papers, {}).to_dict(),
        "eval": {"perplexity": 20.125, "tokens": 2032, "seconds": 1.0},
        "eval-dense": {"perplexity": 14.875, "tokens": 2032, "seconds": 1.0},
    }
    for name, found in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(found))


# ---- what it says ----


def test_the_command_writes_one_page(folder):
    before = content(folder)
    done = invoke("report", folder)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"wrote {folder / 'report.html'}\n", "")
    assert content(folder) == {**before, "report.html": (folder / "report.html").read_bytes()}
    elsewhere = folder.parent / "page.html"
    said = json.loads(invoke("report", folder, "--out", elsewhere, "--json").stdout)
    assert said == {"page": str(elsewhere), "bytes": elsewhere.stat().st_size}
    assert elsewhere.read_text() == (folder / "report.html").read_text()


def test_every_figure_of_a_matrix_is_that_of_the_report(pruned):
    page, report = make_page(pruned), json.loads((pruned / "report.json").read_text())
    table = re.search(r'id="matrices">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table):
        name, *cells = re.findall(r'<td(?: data-v="([^"]*)")?[^>]*>([^<]*)</td>', row)
        rows[name[1]] = cells
    assert list(rows) == [row["name"] for row in report["linears"]]
    for row in report["linears"]:
        shape, holds, zeros, error, masked, damping, tokens, inputs, _, nbytes, share = rows[row["name"]]
        assert shape[1] == "{} x {}".format(*row["shape"]) and holds[1] == "2:4" and inputs[1] == "own"
        assert [float(cell[0]) for cell in (zeros, error, masked, damping)] == [
            row[key] for key in ("sparsity", "output_error", "output_error_masked", "damping")
        ]
        assert error[1] == f"{100 * row['output_error']:.2f}%"
        assert int(tokens[0]) == row["tokens"] == 256
        n, k = row["shape"]
        assert int(nbytes[0]) == n * k + n * k // 8 and share[1] == "56.2%"  # fp16: half the values, and a bit a weight


def test_the_sections_of_a_folder_with_everything_beside_it(folder):
    bare = Parts(make_page(folder))
    for absent in ("Sensitivity", "Forecast", "Perplexity", "The plan"):
        assert absent not in bare.text
    assert "every pruned matrix has the same share of zeros, 50.0%" in bare.text.lower()
    add_all(folder)
    text = Parts(make_page(folder)).text
    for said in (
        "dense 14.88, +35.3%",  # 20.125 / 14.875
        "20.1250", "Over 2,032 tokens",
        "Rank correlation (Spearman) of the measured losses with the layers' errors: 0.81",
        "Loss with one alone pruned, over 2.7000 of the dense model", "2.7270 at 2:4",
        "19.2 (18 to 21)", "99 (50 to beyond)", "more than 80", "1 token: 1.25x; 512 tokens: 0.75x, not faster", "from 5 probes",
        "16.2", "16.5", "OPT-125M", "36.9", "arXiv:2301.00774",
        "10 matrices,", "18 matrices,",  # of 28 every third is dense
        "embedding", "output layer",
        "forward", "gram",
    ):  # fmt: skip
        assert said in text, said


def test_other_files_are_taken_where_they_are_told(folder, tmp_path):
    add_all(folder)
    for name in ("sensitivity", "forecast", "eval", "eval-dense"):
        (folder / f"{name}.json").rename(tmp_path / f"other-{name}.json")
    assert "Forecast" not in make_page(folder)
    options = [part for name in ("sensitivity", "forecast", "eval") for part in (f"--{name}", tmp_path / f"other-{name}.json")]
    assert invoke("report", folder, *options, "--dense-eval", tmp_path / "other-eval-dense.json").exit_code == 0
    text = Parts((folder / "report.html").read_text()).text
    assert all(said in text for said in ("Sensitivity", "Forecast", "dense 14.88, +35.3%"))


def test_speed_is_what_was_measured_here_or_not_measured(pruned, monkeypatch, tmp_path):
    monkeypatch.setattr(tune.env, "CACHE", tmp_path)
    tune.forget()
    text = Parts(make_page(pruned)).text
    assert "Not measured on this machine: 384 x 128, 128 x 384, 128 x 128, 64 x 128" in text and "2x" not in text
    key = bench.key(bench.torch.device("cpu"))
    rows = [
        ("float32", 1, 384, 128, kernel, 0, 0, us) for kernel, us in (("dense", 30.0), ("linear24_cpu", 20.0), ("expand", 90.0))
    ]
    rows += [("float32", 64, 384, 128, kernel, 0, 0, us) for kernel, us in (("dense", 30.0), ("linear24_cpu", 40.0))]
    rows += [("float32", 64, 512, 512, kernel, 0, 0, us) for kernel, us in (("dense", 30.0), ("linear24_cpu", 10.0))]
    tune.write(key, [tune.Row(*row) for row in rows])
    text = Parts(make_page(pruned)).text
    tune.forget()
    assert "1.50x" in text and "0.75x, not faster" in text and key in text and "dense product, measured on this machine" in text
    assert "3.00x" not in text, "a weight that the model does not have"
    assert "Not measured on this machine: 128 x 384, 128 x 128, 64 x 128" in text
    monkeypatch.setattr(tune, "measured_on", lambda device: "on another H200, 2026-01-01, as shipped")
    text = Parts(make_page(pruned)).text
    assert "dense product, measured on another H200, 2026-01-01, as shipped" in text and "on this machine" not in text


def test_a_structured_report_is_shown_whole(folder):
    steps = [
        {"part": "layers", "removed": [5, 1], "importance": [0.0625, 0.125], "seconds": 1.5},
        {
            "part": "heads", "method": "taylor", "removed": [[2], []], "importance": [[1.0, 2.0, 1.0], [3.0, 1.0, 1.0]],
            "output_error_plain": [0.25, None], "output_error": [0.125, None], "damping": [0.01, None], "seconds": 2,
        },
        {"part": "ffn", "removed": [list(range(100, 120)), [7]], "importance": [0.375, 0.5], "seconds": 2},
    ]  # fmt: skip
    found = {
        "structured": True, "asked": {"layers": 2, "heads": 0.25}, "parameters_before": 900_000, "parameters": 675_000,
        "steps": steps, "seconds": 6.5, "format": "dense",
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(found))
    text = " ".join(Parts(make_page(folder)).text.split())
    for said in (
        "Asked for: layers: 2, heads: 0.25.", "675,000", "of 900,000, -25.0%",
        "layers, 1.5 s", "1 5 0.0625 2 1 0.125",  # in the order in which they went
        "heads, taylor, 2 s", "0 1 2 25.0% 25.00% 12.50% 1 0 none 0.0% - -",
        "0 20 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115 and 4 more 37.5% 1 1 7 50.0%",
    ):  # fmt: skip
        assert said in text, said
    # In a form of another's making, as what it says.
    found = {"structured": {"heads": {"model.layers.0": [1, 3]}, "layers": [{"name": "model.layers.2", "influence": 0.0625}]}}
    (folder / "report.json").write_text(json.dumps(found))
    text = Parts(make_page(folder)).text
    assert all(said in text for said in ("What was taken out whole", "heads", "1, 3", "model.layers.2", "0.0625"))


def test_experts_share_a_cell_that_tells_mean_and_most(folder):
    def change(found):
        row = found["linears"][0]
        names = [f"model.layers.0.mlp.experts.gate_up_proj[{i}]" for i in range(3)]
        found["linears"] = [{**row, "name": name, "output_error": i / 10} for i, name in enumerate(names)]

    change_report(folder, change)
    page = make_page(folder)
    assert "3 matrices\noutput error 10.00%, most 20.00%: model.layers.0.mlp.experts.gate_up_proj[2]" in page


def test_a_table_of_very_many_matrices_keeps_those_with_the_largest_errors(folder):
    def change(found):
        row = found["linears"][0]
        found["linears"] = [{**row, "name": f"model.layers.0.mlp.experts.up[{i}]", "output_error": i / 1e5} for i in range(2500)]

    change_report(folder, change)
    page = make_page(folder)
    table = re.search(r'id="matrices">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    assert table.count("<tr>") == 2000 and "up[2499]" in table and "up[600]" in table and "up[100]<" not in table
    assert "The 2,000 with the largest errors of 2,528; report.json holds the others." in page


def test_names_are_text(folder):
    def change(found):
        found["linears"][3]["name"] = HOSTILE
        found["skipped"][HOSTILE] = HOSTILE
        found["method"] = found["pattern"] = HOSTILE

    change_report(folder, change)
    add_all(folder)
    hostile = Path(folder.rename(folder.parent / HOSTILE.replace("/", "|")))
    (hostile / "plan.yaml").unlink()
    page = make_page(hostile)
    parts = Parts(page)
    assert parts.names.count("script") == 1 and "img" not in parts.names
    assert HOSTILE in parts.text.replace("  ", " ") or HOSTILE in parts.said
    assert any(HOSTILE in value for value in parts.values), "the tip of a mark"


def test_it_names_no_address(folder):
    add_all(folder)
    page = make_page(folder)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=", page.replace("arXiv:", ""))
    assert re.search(
        r"content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[\w+/=]{44}'; img-src data:\"", page
    )


@pytest.mark.parametrize(
    "name, block, role",
    [
        ("model.layers.12.self_attn.q_proj", "12", "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", "0", "attn.c_attn"),
        ("model.layers.1.mlp.experts.gate_up_proj[17]", "1", "mlp.experts.gate_up_proj[*]"),  # a fused expert
        ("model.layers.1.mlp.experts.3.w1", "1", "mlp.experts.*.w1"),  # an expert of its own
        ("head", "", "head"),  # outside any block
    ],
)
def test_a_name_is_a_block_and_a_role(name, block, role):
    assert split_name(name, ["model.layers.1"]) == (block, role)  # of that block, and where the report names none


# ---- what is refused ----


def test_a_folder_without_a_report(tmp_path):
    page = tmp_path / "page.html"
    assert_refused(invoke("report", MODEL, "--out", page), "must hold the report.json of its pruning, and has none; prune it")
    assert_refused(invoke("report", tmp_path / "nothing", "--out", page), "the model must be a folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("report.json", "{", "report.json must be a JSON file that can be read"),
        ("report.json", "[]", "report.json must be a JSON object, got a list"),
        ("report.json", "{}", "report.json must be the report of a pruning, and names neither"),
        ("report.json", '{"linears": []}', "report.json must be the report of a pruning by this version of sparsekit"),
        ("eval.json", '{"tokens": 3}', "eval.json must be what sparsekit eval --json prints, and has no perplexity"),
        ("eval-dense.json", "{}", "eval-dense.json must be what sparsekit eval"),
        ("sensitivity.json", '{"curves": [{"levels": []}]}', "sensitivity.json must be what sparsekit sensitivity wrote"),
        ("forecast.json", '{"rows": [{}]}', "forecast.json must be what sparsekit forecast writes"),
        ("forecast.json", '{"linears": [], "tokens": 3}', "forecast.json must be what sparsekit forecast writes, and has no rows"),
        ("plan.yaml", "linears: 3", 'a plan must hold "linears"'),
    ],
)
def test_a_file_that_is_another_thing(folder, name, text, says):
    (folder / name).write_text(text)
    before = content(folder)
    assert_refused(invoke("report", folder), re.escape(says))
    assert content(folder) == before


def test_a_page_that_cannot_be_written(folder, tmp_path):
    assert_refused(invoke("report", folder, "--out", tmp_path), "the page must be a file in a folder that is there")
    assert_refused(invoke("report", folder, "--out", tmp_path / "no" / "page.html"), "the page must be a file in a folder")
    assert_refused(invoke("report", folder, "--forecast", tmp_path / "no.json"), "no.json must be a JSON file that can be read")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# ---- numbers and scales ----


def test_numbers_as_people_read_them():
    assert [numbers.size(n) for n in (0, 999, 1000, 999_499, 1_162_312, 8 << 40)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1.16 MB", "8.8 TB"
    ]  # fmt: skip
    assert [numbers.duration(s) for s in (0.0123, 5.94, 59.94, 61, 3599.9, 3661)] == [
        "12.3 ms", "5.94 s", "59.9 s", "1 min 1 s", "1 h 0 min", "1 h 1 min"
    ]  # fmt: skip
    assert [numbers.number(x) for x in (None, 0, 0.0279, 14.876, 992.4, 12345.6, float("inf"))] == [
        "-", "0", "0.0279", "14.9", "992", "12,346", "inf"
    ]  # fmt: skip


@given(st.lists(st.floats(1e-9, 1e9), min_size=1), st.booleans())
def test_a_scale_keeps_order_and_its_ticks_lie_within(values, log):
    scale = charts.Scale(values, log).widened(0.05)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places) and 0 <= places[0] and places[-1] <= 1
    ticks = scale.ticks()
    assert ticks == sorted(set(ticks)) and len(ticks) <= 40
    assert all(scale.low * (1 - 1e-6) - 1e-9 <= tick <= scale.high * (1 + 1e-6) for tick in ticks)
    assert all(abs(scale.at(place) - value) <= 1e-6 * abs(scale.high) for place, value in zip(places, sorted(values)))


def test_points_lie_where_their_errors_are():
    # One on the line y = x, one with half of its x: below the line, and further right is further right.
    svg = charts.scatter([(0.1, 0.1, 0, "same"), (0.2, 0.05, 1, "less")], "x", "y", "both")
    (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    left, bottom, right, top = map(
        float, re.search(r'<line x1="(\d+)" y1="(\d+)" x2="(\d+)" y2="(\d+)" class="same"', svg).groups()
    )
    assert (x1 - left) / (right - left) == pytest.approx((bottom - y1) / (bottom - top), abs=1e-3)
    assert x2 > x1 and y2 > y1


def test_bars_are_as_long_as_their_values():
    widths = re.findall(r"width:([\d.]+)%", charts.bars([("a", [(3, "c0", ""), (1, "c1", "")], "4"), ("b", [(2, "c0", "")], "2")]))
    assert list(map(float, widths)) == [75, 25, 50]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(pruned, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(pruned, tmp_path_factory.mktemp("whole") / pruned.name))
    add_all(folder)
    return write_page(folder)


@pytest.mark.parametrize("width", [1280, 400], ids=["wide", "narrow"])
def test_light_and_dark_in_a_browser(browser, page, width):
    looks = {}
    for scheme in ("light", "dark"):
        with Seen(browser, page, width, scheme) as seen:
            assert seen.view.title() == "kjv-2-4: sparsekit report"
            for text in ("Summary", "Error by layer", "Sensitivity", "Forecast", "Every matrix", "model.layers.3.mlp.down_proj"):
                assert seen.view.get_by_text(text, exact=True).first.is_visible(), text
            across = seen.view.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert across[0] <= across[1], "it must not scroll sideways"
            picture = imread(io.BytesIO(seen.view.screenshot()), format="png")[..., :3]
            looks[scheme] = picture
            assert (seen.errors, seen.requests) == ([], [])
    for picture in looks.values():
        assert picture.shape[:2] == (900, width)
        assert picture.reshape(-1, 3).std(0).min() > 0.02, "a blank picture"
    corner = {scheme: picture[-2, 1].mean() for scheme, picture in looks.items()}
    assert corner["light"] > 0.9 and corner["dark"] < 0.2


def test_text_can_be_read_in_light_and_dark(browser, page):
    """WCAG's contrast of at least 4.5 between every text and what it stands on."""
    script = """() => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgb = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
                                return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const bad = [];
        const texts = "h1, h2, h3, p, td, th button, dt, b, strong, a, code, figcaption, text, .ends span";
        for (const node of document.querySelectorAll(texts)) {
            if (!node.textContent.trim()) continue;
            const style = getComputedStyle(node);
            const ink = light(rgb(node.closest("svg") ? style.fill : style.color));
            let ground = node, paint = [0, 0, 0, 0];
            if (node.classList.contains("in")) paint = rgb(getComputedStyle(node.previousElementSibling).fill);
            for (; ground && paint[3] === 0; ground = ground.parentElement) paint = rgb(getComputedStyle(ground).backgroundColor);
            const under = light(paint), contrast = (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05);
            if (contrast < 4.5) bad.push([node.tagName, node.getAttribute("class"), node.textContent.slice(0, 30), contrast]);
        }
        return bad;
    }"""
    for scheme in ("light", "dark"):
        with Seen(browser, page, scheme=scheme) as seen:
            assert seen.view.evaluate(script) == [], scheme


def test_sorting_and_finding(browser, page):
    with Seen(browser, page) as seen:
        names = "[...document.querySelectorAll('#matrices tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].textContent)"
        first = seen.view.evaluate(names)
        report = {row["name"]: row for row in json.loads((page.parent / "report.json").read_text())["linears"]}
        falling = sorted(first, key=lambda name: -report[name]["output_error"])
        head = seen.view.locator("#matrices th", has_text="error").first
        head.get_by_role("button").click()
        assert seen.view.evaluate(names) == falling and head.get_attribute("aria-sort") == "descending"
        head.get_by_role("button").press("Enter")
        assert seen.view.evaluate(names) == falling[::-1] and head.get_attribute("aria-sort") == "ascending"
        by_name = seen.view.locator("#matrices th", has_text="matrix").first
        by_name.get_by_role("button").click()
        assert seen.view.evaluate(names) == sorted(first) and head.get_attribute("aria-sort") == "none"
        seen.view.get_by_label("Find").fill("2.MLP.")
        assert seen.view.evaluate(names) == [f"model.layers.2.mlp.{part}_proj" for part in ("down", "gate", "up")]
        assert seen.errors == []


def test_a_mark_says_what_it_stands_for(browser, page):
    with Seen(browser, page) as seen:
        row = json.loads((page.parent / "report.json").read_text())["linears"][0]
        tip = seen.view.locator("#tip")
        assert tip.is_hidden()
        seen.view.locator("#errors .cell").first.hover()
        assert tip.is_visible() and tip.inner_text() == f"{row['name']}\noutput error {100 * row['output_error']:.2f}%"
        seen.view.keyboard.press("Escape")
        assert tip.is_hidden()
        others = seen.view.locator("#errors .dot.dim")
        assert others.count() == 0
        seen.view.locator("#errors .legend button").first.hover()
        assert others.count() == 24  # of 28 points the four of one kind stay
        assert seen.errors == []


def test_a_hostile_name_in_a_browser(browser, folder):
    change_report(folder, lambda found: found["linears"][3].update(name=HOSTILE))
    with Seen(browser, write_page(folder)) as seen:
        assert seen.view.evaluate("window.broken") is None
        assert (seen.errors, seen.requests) == ([], [])
        assert HOSTILE in seen.view.locator("#matrices td", has_text="window.broken").first.inner_text()


def test_printed_it_holds_the_whole_table(browser, page):
    with Seen(browser, page) as seen:
        seen.view.emulate_media(media="print")
        box = seen.view.evaluate(
            "(() => { const r = document.querySelector('#matrices .rows'); return [r.scrollHeight, r.clientHeight]; })()"
        )
        assert box[0] <= box[1] + 1 and not seen.view.locator("nav").is_visible()


def test_what_the_page_is_made_of_is_installed():
    here = files("sparsekit.analysis")
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    for name in ("page.html", "page.js"):
        assert (here / name).is_file() and f'"{name}"' in text
