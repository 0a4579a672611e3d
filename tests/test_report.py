"""The report: its figures are those of numpy, its text is harmless, its bytes do not vary, and it works."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

import browser
import regauge
from regauge.cli import app
from regauge.errors import BadInput
from regauge.report import gather, render
from regauge.report.activations import sampled
from regauge.report.charts import charts
from regauge.report.figures import gram_error, relative_error, spread_of
from regauge.report.markup import Markup, data, h
from regauge.report.names import layer, role, shown
from regauge.report.weights import chosen
from regauge.show import rows

LAYERS = 3
RECIPE = {"moves": ["fold-scales", {"name": "rotate", "style": "hadamard"}, "permute"], "seed": 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with norm scales that are not one, and a weight that stands out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 2.0
    path = tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def turned(llama: Path) -> Path:
    """Scales folded, then turned and permuted."""
    regauge.rewrite(llama, llama.parent / "turned", RECIPE)
    return llama.parent / "turned"


@pytest.fixture(scope="module")
def permuted(llama: Path) -> Path:
    regauge.rewrite(llama, llama.parent / "permuted", {"moves": ["permute"]})
    return llama.parent / "permuted"


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GPT-NeoX, and the same with other norms and without the parameters that do nothing then."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = tmp_path_factory.mktemp("models") / "neox"
    model.save_pretrained(path)
    regauge.rewrite(path, path.parent / "out", {"moves": ["fold-shifts", "fold-scales", "strip"]})
    return path, path.parent / "out"


@pytest.fixture(scope="module")
def page(llama: Path, turned: Path) -> Path:
    out = llama.parent / "page.html"
    assert regauge.report(turned, out, source=llama) == out
    return out


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )
    assert found is not None
    return json.loads(found[1])


def figures(chart: dict[str, Any], key: str, series: str) -> dict[str, float | None]:
    metric = next(metric for metric in chart["metrics"] if metric["key"] == key)
    return dict(zip(chart["names"], metric["values"][series], strict=True))


class Reader(HTMLParser):
    """Start tags with attributes, and the text of each element by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append((self.tags[-1][0] if self.tags else "", data))


# --- figures -----------------------------------------------------------------------------------------


def test_weights_have_the_figures_of_numpy(page: Path, llama: Path, turned: Path) -> None:
    chart = embedded(page)["weights"]
    for series, path in (("before", llama), ("after", turned)):
        stored = {name: x.astype(np.float64) for name, x in load_file(path / "model.safetensors").items()}
        matrices = {name: x for name, x in stored.items() if x.ndim > 1}
        assert set(chart["names"]) == set(matrices)
        for name, x in matrices.items():
            rms, centred = np.sqrt((x**2).mean()), x - x.mean()
            assert figures(chart, "rms", series)[name] == pytest.approx(rms, rel=1e-5)
            assert figures(chart, "outlier", series)[name] == pytest.approx(np.abs(x).max() / rms, rel=1e-5)
            kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
            assert figures(chart, "kurtosis", series)[name] == pytest.approx(kurtosis, rel=1e-5)
    names = chart["names"]
    assert names.index("model.layers.0.mlp.up_proj.weight") < names.index("model.layers.2.mlp.up_proj.weight")


def test_spectra_are_those_of_numpy(llama: Path, turned: Path) -> None:
    report = gather(turned, llama)
    stored = [load_file(path / "model.safetensors") for path in (llama, turned)]
    assert len(report.spectra) == 9
    for spectrum in report.spectra:
        for values, tensors in ((spectrum.before, stored[0]), (spectrum.after, stored[1])):
            singular = np.linalg.svd(tensors[spectrum.name].astype(np.float64), compute_uv=False)
            np.testing.assert_allclose(values, singular[np.array(spectrum.index) - 1], rtol=1e-5)


def test_activations_are_those_of_hooks_and_numpy(page: Path, llama: Path, turned: Path) -> None:
    from regauge.hf import load_meta

    found: list[dict[str, np.ndarray[Any, Any]]] = []
    inputs = load_meta(turned, batch=2, length=48).real_inputs(batch=2, length=48, seed=3)
    for path in (llama, turned):
        model, held = regauge.load(path, dtype=torch.float32).eval(), dict[str, Any]()

        def keep(name: str, held: dict[str, Any] = held) -> Any:
            return lambda _module, _inputs, value: held.update({name: value.double().numpy()})

        for name in ("model.layers.1", "model.layers.1.mlp.up_proj", "lm_head"):
            model.get_submodule(name).register_forward_hook(keep(name))
        with torch.no_grad():
            model(**inputs)
        found.append(held)
    chart, errors = embedded(page)["activations"], embedded(page)["errors"]
    for series, held in zip(("before", "after"), found, strict=True):
        for name, x in held.items():
            outlier = np.abs(x).max() / np.sqrt((x**2).mean())
            assert figures(chart, "outlier", series)[name] == pytest.approx(outlier, rel=1e-4)
    for name in found[0]:
        a, b = (held[name].reshape(96, -1) for held in found)
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        gram = np.linalg.norm(a @ a.T - b @ b.T) / np.linalg.norm(a @ a.T)
        # The errors at the outputs are rounding, which differs from run to run.
        loose = {"rel": 1e-3} if error > 1e-3 else {"abs": 1e-4}
        assert figures(errors, "error", "error")[name] == pytest.approx(error, **loose)
        assert figures(errors, "error", "turned")[name] == pytest.approx(gram, abs=1e-4)
    assert figures(errors, "error", "error")["output logits"] < 1e-5
    assert figures(errors, "error", "error")["model.layers.1"] > 0.1
    assert figures(errors, "error", "turned")["model.layers.1"] < 1e-5


def test_a_permutation_leaves_every_figure_as_it_is(llama: Path, permuted: Path) -> None:
    report = gather(permuted, llama)
    assert len(report.activations) > 10 * LAYERS
    for item in (*report.weights, *report.activations):
        for key in ("rms", "outlier", "kurtosis"):
            assert getattr(item.before, key) == pytest.approx(getattr(item.after, key), rel=1e-3), item.name
    for item in report.activations:
        assert item.turned is not None
        assert item.turned < 1e-4, item.name
    for spectrum in report.spectra:
        assert spectrum.after == pytest.approx(spectrum.before, rel=1e-5, abs=1e-6)
    assert any(item.error is not None and item.error > 0.1 for item in report.activations)


def test_what_the_manifest_says_is_on_the_page(stripped: tuple[Path, Path], tmp_path: Path) -> None:
    source, made = stripped
    page = regauge.report(made, tmp_path / "out.html", source=source).read_text()
    manifest = json.loads((made / "regauge.json").read_text())
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    for item in manifest["recipe"]:
        assert item["move"] in text
    assert manifest["parameters"]["dropped"]
    for name in manifest["parameters"]["dropped"]:
        assert name in text
    assert manifest["patches"]
    for patch in manifest["patches"]:
        assert patch["path"] in text
    certificate = manifest["certificate"]
    assert certificate["reason"] in text
    assert f"{certificate['evidence']['exact']['relative']:.2e}" in text
    assert f"{certificate['b']['parameters']:,}" in text
    for path in stripped:
        assert f'title="{(path / "model.safetensors").stat().st_size:,}"' in page
    for row in rows(regauge.inspect(made)):
        assert row.label in text


def test_without_a_source_nothing_is_compared(turned: Path) -> None:
    report = gather(turned, None)
    assert all(item.before is None for item in report.weights)
    assert all(item.error is None and item.before is None for item in report.activations)
    found = charts(report)
    assert "errors" not in found
    assert [series["key"] for series in found["weights"]["series"]] == ["after"]
    assert report.before.tensor_bytes == json.loads((turned / "regauge.json").read_text())["source"]["bytes"]
    render(report)


def test_figures_that_do_not_exist_are_none() -> None:
    assert spread_of(torch.zeros(4)).outlier is None
    assert spread_of(torch.full((4,), 3.0)).outlier == 1.0
    assert spread_of(torch.full((4,), 3.0)).kurtosis is None
    assert spread_of(torch.tensor([1.0, float("nan")])).rms is None
    assert spread_of(torch.empty(0)).rms is None
    assert relative_error(torch.zeros(2), torch.ones(2)) is None
    assert relative_error(torch.ones(2), torch.full((2,), float("nan"))) is None


def test_errors_see_what_they_should() -> None:
    torch.manual_seed(0)
    a = torch.randn(20, 8)
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert gram_error(a, a[:, torch.randperm(8)]) == 0
    assert gram_error(a.double(), a.double() @ q) == 0
    assert (gram_error(a, a * torch.tensor([2.0] + [1.0] * 7)) or 0) > 0.01
    assert relative_error(a, 1.5 * a) == pytest.approx(0.5)


def test_channels_may_lie_along_any_axis() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 6, 500)
    b = a[:, torch.randperm(6).flip(0)]
    samples = [sampled(x) for x in (a, b)]
    assert set(samples[0]) == {1, 2}
    assert samples[0][1].shape == (128, 6)
    assert torch.equal(samples[0][1][0], a[0, :, 0])
    assert torch.equal(samples[0][1][-1], a[-1, :, -1])
    assert gram_error(samples[0][1], samples[1][1]) == 0
    assert (gram_error(samples[0][2], samples[1][2]) or 0) > 0.1


def test_names_are_taken_apart_at_their_numbers() -> None:
    assert role("model.layers.10.fc1.weight") == "model.layers.*.fc1.weight"
    assert role("is scaled by layers.3.norm") == "is scaled by layers.*.norm"
    assert layer("model.layers.10.experts.3.weight") == ("model.layers", 10)
    assert layer("0.weight") == ("", 0)
    assert layer("conv1.weight") == ("", None)


def test_the_choice_of_spectra_depends_on_names_and_shapes_alone() -> None:
    shapes = {f"layers.{i}.{name}.weight": (8, 8) for i in range(5) for name in ("a", "b")}
    shapes |= {"wide.weight": (4096, 4096), "long.weight": (50_000, 64), "kernel.weight": (8, 8, 3)}
    assert chosen(shapes) == ("long.weight", "layers.2.a.weight", "layers.2.b.weight")
    assert chosen(shapes, limit=1) == ("long.weight",)


# --- the file ----------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes(page: Path, llama: Path, turned: Path, tmp_path: Path) -> None:
    shutil.copytree(turned, tmp_path / "turned")
    again = regauge.report(tmp_path / "turned", source=llama)
    assert again == tmp_path / "turned-report.html"
    assert again.read_bytes() == page.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["turned", "turned-report.html"]


def test_the_page_asks_nobody_for_anything(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"[a-z]+://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form", "video", "audio")
        assert "src" not in attributes
        assert "style" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(key.startswith("on") for key in attributes)
    for word in ("fetch(", "XMLHttpRequest", "innerHTML", "eval(", "import(", "@import", "url("):
        assert word not in text


def test_the_policy_admits_the_scripts_of_the_page_and_no_others(page: Path) -> None:
    reader = Reader(page.read_text())
    metas = [attributes for tag, attributes in reader.tags if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy") or ""
    assert {"name": "generator", "content": "regauge report"} in metas
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    scripts = [text for tag, text in reader.text if tag == "script" and text.strip()]
    styles = [text for tag, text in reader.text if tag == "style"]
    assert len(scripts) == 2
    for rule, inline in (("script-src", scripts[1]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


HOSTILE = "<script>alert(1)<!-- \"'&amp;<img src=x onerror=alert(2)>\N{RIGHT-TO-LEFT OVERRIDE}\n"


def test_hostile_names_are_text(llama: Path, permuted: Path, tmp_path: Path) -> None:
    place = tmp_path / HOSTILE
    shutil.copytree(permuted, place)
    manifest = json.loads((place / "regauge.json").read_text())
    manifest["recipe"].append(
        {"move": "</script><script>alert(3)</script>", "x": "</style><b onclick=alert(4)>"}
    )
    manifest["certificate"]["a"]["name"] = manifest["certificate"]["reason"] = (
        "</title><script>alert(5)</script>"
    )
    manifest["software"] = {"<i>": "<u>"}
    (place / "regauge.json").write_text(json.dumps(manifest))
    reader = Reader(regauge.report(place, tmp_path / "out.html").read_text())
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert not {"img", "i", "u"} & {tag for tag, attributes in reader.tags if not attributes.get("class")}
    assert not any(key.startswith("on") for _, attributes in reader.tags for key in attributes)
    heading = next(text for tag, text in reader.text if tag == "bdi")
    assert heading == HOSTILE.replace("\N{RIGHT-TO-LEFT OVERRIDE}", "\ufffd").replace("\n", "\ufffd")
    json.loads(next(text for tag, text in reader.text if tag == "script"))


def test_a_path_that_is_no_text(permuted: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    assert shown(place) == "caf\ufffd"
    try:
        shutil.copytree(permuted, place)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    with pytest.raises(BadInput, match="cannot be loaded and run"):  # safetensors cannot open it
        regauge.report(place, tmp_path / "out.html")


def test_markup_escapes() -> None:
    assert h("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
    assert h("p", h("b", "x"), hidden=True, class_=None) == "<p hidden><b>x</b></p>"
    text = data({"</script>": "<!-- & \u2028"})
    assert isinstance(text, Markup)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": "<!-- & \u2028"}


def test_the_files_of_the_page_are_in_the_package() -> None:
    for name in ("chart.js", "strip.js", "report.js", "report.css"):
        assert resources.files("regauge.report").joinpath(name).is_file()


# --- what cannot be used -----------------------------------------------------------------------------


def test_what_is_no_rewritten_directory_is_refused(llama: Path, tmp_path: Path) -> None:
    for path in (llama, tmp_path / "none", llama / "config.json"):
        with pytest.raises(BadInput, match=r"nothing to report on(.|\n)*regauge rewrite"):
            regauge.report(path, tmp_path / "out.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "[" * 100_000, "\x00"])
def test_a_damaged_manifest_is_refused(text: str, permuted: Path, tmp_path: Path) -> None:
    shutil.copytree(permuted, tmp_path / "copy")
    (tmp_path / "copy" / "regauge.json").write_text(text)
    with pytest.raises(BadInput, match=r"regauge\.json"):
        regauge.report(tmp_path / "copy", tmp_path / "out.html")


def test_weights_that_the_manifest_does_not_certify_are_refused(permuted: Path, tmp_path: Path) -> None:
    shutil.copytree(permuted, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match="not the weights of the certificate"):
        regauge.report(tmp_path / "copy", tmp_path / "out.html")


def test_another_source_is_refused(permuted: Path, turned: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not the weights of the source"):
        regauge.report(permuted, tmp_path / "out.html", source=turned)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(permuted: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere")
    for name in ("mine.html", "link.html"):
        with pytest.raises(BadInput, match="nothing is overwritten"):
            regauge.report(permuted, tmp_path / name)
    with pytest.raises(BadInput, match="no such directory"):
        regauge.report(permuted, tmp_path / "none" / "out.html")
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "mine.html"]


def test_the_command(permuted: Path, llama: Path, tmp_path: Path) -> None:
    def run(*args: object) -> Any:
        return CliRunner(env={"COLUMNS": "150", "NO_COLOR": "1"}).invoke(app, ["report", *map(str, args)])

    done = run(permuted, "--source", llama, "--out", tmp_path / "out.html", "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "out.html").stat().st_size
    again = run(permuted, "--out", tmp_path / "out.html")
    assert again.exit_code == 2
    assert "nothing is overwritten" in again.stderr
    assert "Traceback" not in again.stderr


# --- in a browser ------------------------------------------------------------------------------------

PROGRAM = browser.find()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(browser.NAMES)} is installed")


def column(page: browser.Browser, number: int) -> list[str]:
    return page.run(
        "[...document.querySelectorAll('#weights tbody tr')]"
        f".map(r => r.cells[{number}].dataset.v ?? r.cells[{number}].textContent)"
    )


@needs_browser
def test_the_page_in_a_browser(page: Path) -> None:
    assert PROGRAM is not None
    with browser.Browser(PROGRAM) as shown:
        shown.open(page)
        dots = "document.querySelectorAll('[data-chart=weights] [data-series={}] circle').length"
        matrices = len(embedded(page)["weights"]["names"])
        for series in ("before", "after"):
            assert shown.run(dots.format(series)) == matrices

        # A click in the legend takes a series away, and another brings it back.
        legend = "[data-chart=weights] .legend button:first-child"
        shown.click(legend)
        assert shown.run(dots.format("before")) == 0
        assert shown.run(dots.format("after")) == matrices
        assert shown.run(f"document.querySelector('{legend}').getAttribute('aria-pressed')") == "false"
        shown.click(legend)
        assert shown.run(dots.format("before")) == matrices

        # Logarithmic and linear axes, another figure, one kind of matrix.
        circles = "[...document.querySelectorAll('[data-chart=weights] .dot circle')]"
        place = f"{circles}.map(c => c.getAttribute('cy'))"
        first = shown.run(place)
        shown.click("[data-chart=weights] [aria-label=scale] button:last-child")
        assert shown.run(place) != first
        shown.click("[data-chart=weights] [aria-label=figure] button:nth-child(2)")
        shown.run(
            "(() => { const s = document.querySelector('[data-chart=weights] select');"
            " s.value = 'model.layers.*.mlp.up_proj.weight'; s.dispatchEvent(new Event('change')); })()"
        )
        assert shown.run(dots.format("after")) == LAYERS

        # The keyboard steps through the points; the tooltip has the figures of the data.
        shown.run("document.querySelector('[data-chart=weights] svg').focus({preventScroll: true})")
        shown.press("Home")
        shown.press("ArrowRight")
        tip = shown.run("document.getElementById('tip').textContent")
        name = "model.layers.1.mlp.up_proj.weight"
        assert name in tip
        for series in ("before", "after"):
            assert str(figures(embedded(page)["weights"], "kurtosis", series)[name]) in tip
        assert name in shown.run("document.getElementById('aloud').textContent")
        shown.press("Escape")
        assert shown.run("document.getElementById('tip').hidden")

        # A click on a heading sorts by its column, numbers as numbers; another turns the order.
        shown.run("document.querySelector('#weights details').open = true")
        names = column(shown, 0)
        shown.click("#weights th:nth-child(3) button")
        values = [float(value) for value in column(shown, 2)]
        assert values == sorted(values, reverse=True)
        shown.click("#weights th:nth-child(3) button")
        assert [float(value) for value in column(shown, 2)] == sorted(values)
        assert shown.run("document.querySelector('#weights th:nth-child(3)').ariaSort") == "ascending"
        shown.click("#weights th:nth-child(1) button")
        assert sorted(column(shown, 0)) == sorted(names)

        assert shown.errors == []
        assert shown.requests == [page.resolve().as_uri()]


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_the_page_fits_every_screen(page: Path, width: int) -> None:
    assert PROGRAM is not None
    with browser.Browser(PROGRAM, width=width, dark=True) as shown:
        shown.open(page)
        assert shown.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        ground = shown.run("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", ground))) < 60
        assert shown.run("document.querySelectorAll('[data-chart] svg > *').length") > 50
        assert shown.errors == []


@needs_browser
def test_the_policy_stops_what_is_put_into_the_page(page: Path, tmp_path: Path) -> None:
    assert PROGRAM is not None
    text = page.read_text().replace("<footer>", "<footer><script>document.title = 'broken'</script>")
    (tmp_path / "changed.html").write_text(text)
    with browser.Browser(PROGRAM) as shown:
        shown.open(tmp_path / "changed.html")
        assert shown.run("document.title") != "broken"
        assert any("Content Security Policy" in error for error in shown.errors)
