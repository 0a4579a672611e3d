"""Streams with one coordinate less: against the authors' weights, on real architectures, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from regauge.api import load, rewrite, rewrite_module
from regauge.certify import certify
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, Refused
from regauge.hf import checkpoint_names, load_meta
from regauge.interpret import op_name
from regauge.modeling_regauge import Norm, chart
from regauge.moves.narrow import FORMS, narrowed
from test_end_to_end import build
from test_patches import distance, outputs
from zoo import NAMES, move, original, specimen
from zoo import distance as apart

GOLDEN = Path(__file__).parent / "data" / "crmsnorm_golden.pt"
MODELS = ("gpt2", "opt", "neox", "bloom", "vit", "whisper")
FOLDS = ("add-bias", "fold-shifts", "fold-scales")
LAYER_NORM = "aten.layer_norm"
SURE = {"mean_without_shift", "mean_and_bias", "tied_head_with_mean", "gpt2", "opt"}
"""Members of the zoo whose stream can be narrowed."""


def recipe(model: Any, form: str) -> list[Any]:
    shared = [id(p) for p in model.state_dict(keep_vars=True).values()]
    tied = ["untie"] if len(set(shared)) < len(shared) else []
    narrow = any(name in type(model).__name__ for name in ("ViT", "Bert"))
    return [*tied, *FOLDS[narrow:], {"name": "center", "norm": form}]


# --- the algebra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_what_a_reader_sees_stays(form: str) -> None:
    """w' · x' = w · x for every w and every x of mean zero, along any axis."""
    x, w = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    x = x - x.mean(0)
    found = narrowed(w, 0, form, True).T @ narrowed(x, 0, form, False)
    assert torch.allclose(found, w.T @ x, rtol=0, atol=1e-13)
    assert torch.equal(narrowed(w.T, 1, form, True), narrowed(w, 0, form, True).T)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_the_chart_is_an_orthogonal_matrix_without_the_ones(size: int) -> None:
    u = torch.full((size,), size**-0.5, dtype=torch.float64)
    v = -u
    v[-1] += 1
    q = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)
    assert torch.allclose(q.T @ q, torch.eye(size, dtype=torch.float64))
    assert torch.allclose(q[:, -1], u)
    x = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose(chart(x), x @ q[:, :-1], rtol=0, atol=1e-14)


# --- the authors' model -------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(16, elementwise_affine=False) for _ in range(2))
        self.att_in, self.att_out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp_in, self.mlp_out = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.att_in(self.first(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.att_out(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.second(x))))


class VisionTransformer(nn.Module):
    """The Pre-LN example of the authors' repository, its weights read from the reference."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.patch, self.head = nn.Linear(48, 16), nn.Linear(16, 5)
        self.places, self.token = nn.Parameter(held["pos_embedding"]), nn.Parameter(held["cls_token"])
        self.layers = nn.Sequential(Layer(), Layer())
        self.last = nn.LayerNorm(16, elementwise_affine=False)
        self.double()
        for name, key in (("patch", "patch"), ("head", "cls_head")):
            self._put(name, held, f"{key}_linear", None)
        for i in range(2):
            for name in ("att_in", "att_out", "mlp_in", "mlp_out"):
                self._put(f"layers.{i}.{name}", held, f"{name}_linear", i)

    def _put(self, path: str, held: dict[str, torch.Tensor], key: str, i: int | None) -> None:
        for leaf in ("weight", "bias"):
            value = held[f"{key}_{leaf}"]
            self.get_submodule(path).get_parameter(leaf).data = value if i is None else value[i]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x) + self.places
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.last(self.layers(x))[:, 0])


@pytest.fixture(scope="module")
def authors() -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN, weights_only=True)["example_vit"]


def test_every_weight_is_that_of_the_authors(authors: dict[str, torch.Tensor]) -> None:
    model = VisionTransformer(authors)
    assert torch.allclose(model(authors["x"]), authors["pre_ln_result"], rtol=0, atol=1e-13)
    moves = {"moves": [{"name": "center", "norm": "crms"}]}
    changed, certificate = rewrite_module(model, (authors["x"],), moves)
    assert certificate.evidence.float64.relative < 1e-12
    assert torch.allclose(changed(authors["x"]), authors["pre_crms_result"], rtol=0, atol=1e-13)
    wanted = {"patch.weight": authors["compressed_patch_linear_weight"]}
    wanted |= {"patch.bias": authors["compressed_patch_linear_bias"]}
    wanted |= {"places": authors["compressed_pos_embedding"], "token": authors["compressed_cls_token"]}
    wanted |= {"head.weight": authors["compressed_cls_head_linear_weight"]}
    for i in range(2):
        for name in ("att_in.weight", "att_out.weight", "att_out.bias", "mlp_in.weight", "mlp_out.weight",
                     "mlp_out.bias"):  # fmt: skip
            key = f"compressed_{name.replace('.', '_linear_')}"
            wanted[f"layers.{i}.{name}"] = authors[key][i]
    for name, value in wanted.items():
        assert torch.allclose(changed.get_parameter(name), value, rtol=0, atol=1e-14), name
    assert {(m.form, m.size) for m in changed.modules() if isinstance(m, Norm)} == {("crms", 15)}
    with torch.no_grad():
        changed.get_parameter("head.weight")[0, 0] += 1e-9
    assert not torch.allclose(changed(authors["x"]), authors["pre_crms_result"], rtol=0, atol=1e-13)


# --- models of transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(name, form) for name in MODELS for form in FORMS], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, form = request.param
    path = tmp_path_factory.mktemp(f"{name}_{form}")
    model = build(name)
    model.save_pretrained(path / "source")
    result = rewrite(path / "source", path / "out", {"moves": recipe(model, form)}, seed=1)
    return model, form, path / "source", path / "out", result


def test_the_stream_has_one_coordinate_less(case: Any) -> None:
    model, form, source, out, result = case
    assert result.certificate.evidence.exact.relative < 1e-12
    assert certify(source, out).passed
    again = load(out).eval()
    found = [module for module in again.modules() if isinstance(module, Norm) and module.form != "layer"]
    before = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    # The norm after BLOOM's embeddings writes to the stream.
    assert len(found) == len(before) - (type(model).__name__ == "BloomForCausalLM")
    assert {(m.form, m.size) for m in found} == {(form, before[0].normalized_shape[0] - 1)}
    assert distance(outputs(model, source), outputs(again, source)) < 1e-5
    manifest = json.loads((out / "regauge.json").read_text())
    with Checkpoint.open(out) as files:
        names = checkpoint_names(load_meta(out), files.names)
        made = manifest["parameters"]["made"]
        assert made
        assert all(again.get_parameter(name).shape == files.shape(names[name]) for name in made)


def test_loads_as_remote_code_and_saves_again(case: Any, tmp_path: Path) -> None:
    model, form, source, out, _ = case
    auto = json.loads((out / "config.json").read_text())["auto_map"]
    name = next(name for name in auto if name != "AutoConfig")
    place = shutil.copytree(out, tmp_path / f"narrow_{type(model).__name__.lower()}_{form}")
    again = getattr(transformers, name).from_pretrained(place, trust_remote_code=True).eval()
    assert distance(outputs(load(out), source), outputs(again, source)) < 1e-6
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(again, source), outputs(load(tmp_path / "saved"), source))


def test_generates_the_same(case: Any) -> None:
    model, _, _, out, _ = case
    if not model.can_generate():
        return
    again = load(out).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if type(model).__name__.startswith("Whisper"):
        c = model.config
        inputs = {"input_features": torch.randn(1, c.num_mel_bins, 2 * c.max_source_positions)}
        inputs["decoder_input_ids"] = torch.tensor([[5]])
    else:
        inputs = {"input_ids": torch.tensor([[5, 7, 11]])}
        options["pad_token_id"] = 0
    assert torch.equal(model.generate(**inputs, **options), again.generate(**inputs, **options))


def test_a_narrow_directory_is_a_source(case: Any, tmp_path: Path) -> None:
    _, _, source, out, _ = case
    moves = {"moves": [{"name": "permute", "space": "hidden"}]}
    result = rewrite(out, tmp_path / "again", moves, seed=5)
    assert result.certificate.evidence.exact.relative < 1e-12
    assert certify(source, tmp_path / "again").passed


# --- one plan, many moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_steps_before_and_after_are_kept(form: str, tmp_path: Path) -> None:
    """Moves before and after in one recipe give the tensors that they give one directory at a time."""
    model = build("gpt2")
    model.save_pretrained(tmp_path / "source", max_shard_size="3KB")
    before = ["untie", *FOLDS, "rotate", "permute", {"name": "rescale", "mode": "random"}]
    middle = [{"name": "center", "norm": form}]
    after = [
        *("fold-value-bias", "drop-key-bias"),
        {"name": "permute", "mode": "sorted", "space": "hidden"},
    ]
    result = rewrite(tmp_path / "source", tmp_path / "whole", {"moves": [*before, *middle, *after]}, seed=3)
    assert result.certificate.evidence.exact.relative < 1e-12
    rewrite(tmp_path / "source", tmp_path / "a", {"moves": before}, seed=3, dtype=torch.float64)
    rewrite(tmp_path / "a", tmp_path / "b", {"moves": middle})
    rewrite(tmp_path / "b", tmp_path / "c", {"moves": after})
    with Checkpoint.open(tmp_path / "whole") as one, Checkpoint.open(tmp_path / "c") as other:
        assert set(one.names) == set(other.names)
        for name in one.names:
            assert torch.allclose(one.read(name).double(), other.read(name), rtol=1e-6, atol=1e-6), name
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2


def test_bfloat16_is_cast_once(tmp_path: Path) -> None:
    model = build("neox").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": recipe(model, "crms")})
    assert str(result.certificate.verdict) == "equivalent"
    assert result.certificate.evidence.exact.relative < 1e-12
    with Checkpoint.open(tmp_path / "out") as files:
        assert {files.dtype(name) for name in files.names} == {torch.bfloat16}


def _zoo() -> list[str]:
    """Members with a LayerNorm, whose stream could be narrowed."""
    return [name for name in NAMES if any(op_name(n) == LAYER_NORM for n in specimen(name).trace.graph.nodes)]


@pytest.mark.parametrize("form", FORMS)
def test_on_the_zoo(form: str) -> None:
    """Everything untied and folded that can be: the move keeps the function, or is refused."""
    done: set[str] = set()
    for name in _zoo() if form == "crms" else SURE:
        moves = list[Any](["untie"] if specimen(name).gauge.tied else [])
        for what in (*FOLDS, {"name": "center", "norm": form}):
            try:
                found = move(name, *moves, what)
            except Refused:
                continue
            moves.append(what)
            if isinstance(what, dict):
                done.add(name)
                assert apart(original(name), found.output) < 1e-12, name
                assert any(p["module"] == "norm" and p["form"] == form for p in found.plan.patches)
    assert done >= SURE


# --- plain modules, and what is refused ---------------------------------------------------------------------

D = 6


def plain() -> nn.LayerNorm:
    return nn.LayerNorm(D, elementwise_affine=False)


class Step(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm or plain(), nn.Linear(D, 10), nn.Linear(10, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def sequence(*inside: nn.Module, stem: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    first = stem or (nn.Linear(4, D),)
    return nn.Sequential(*first, *inside, plain(), nn.Linear(D, 3)).double()


def narrow(model: nn.Module, form: str = "crms", *before: str, shape: tuple[int, ...] = (2, 5, 4)) -> Any:
    moves = {"moves": [*before, {"name": "center", "norm": form}]}
    changed, certificate = rewrite_module(model, (torch.randn(shape, dtype=torch.float64),), moves)
    assert certificate.evidence.float64.relative < 1e-12
    return changed


@pytest.mark.parametrize("form", FORMS)
def test_plain_modules_too(form: str) -> None:
    model = sequence(Step(), Step())
    changed = narrow(model, form)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    assert torch.allclose(model(x), changed(x), rtol=0, atol=1e-13)
    assert changed[0].out_features == changed[1].up.in_features == D - 1
    count = [sum(p.numel() for p in m.parameters()) for m in (model, changed)]
    # 4 + 1 of the stem, two blocks of 10 readers and 10 + 1 writers, 3 of the head
    assert count[0] - count[1] == 5 + 2 * (10 + 11) + 3


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_centred_comes_in_through_an_entrance(form: str) -> None:
    changed = narrow(sequence(Step(), Step(), stem=(nn.Linear(4, D), nn.GELU())), form)
    assert changed[0].out_features == D
    assert changed[2].up.in_features == changed[3].down.out_features == D - 1


class Two(nn.Module):
    """Two streams, one of which a sum over its entries sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = sequence(Step()), sequence(Step())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.b[:2](x).mean(-1, keepdim=True)


def test_one_of_two_streams() -> None:
    changed = narrow(Two())
    assert changed.get_submodule("a.0").out_features == D - 1
    assert changed.get_submodule("b.0").out_features == D
    assert isinstance(changed.get_submodule("b.2"), nn.LayerNorm)


class Shown(nn.Module):
    """The norm's output leaves the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(4, D).double(), plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stem(x))


class Reused(nn.Module):
    """The table that writes the stream reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(4, D).double()), plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ self.table) @ self.table.T


class Fixed(nn.Module):
    """The code knows the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, D).double(), plain(), nn.Linear(D, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x).reshape(-1, D)))


class Masked(nn.Module):
    """A constant that no parameter holds is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, D).double(), plain(), nn.Linear(D, 3).double()
        self.register_buffer("places", torch.randn(5, D).double(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x) + self.places))


class Own(nn.LayerNorm):
    """A norm of another class: its code is not known."""


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "output": (Shown(), "is the output of the network"),
    "two roles": (Reused(), "is read as well as written"),
    "width in the code": (Fixed(), "does not run with them replaced|this one has 6"),
    "gain": (sequence(Step(nn.LayerNorm(D, bias=False))), "has a gain[^$]*put fold-shifts"),
    "class": (sequence(Step(Own(D, elementwise_affine=False))), "takes the mean of the stream"),
    "constant": (Masked(), "whose input has mean zero"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    model, text = REFUSED[what]
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(Refused, match=text):
        narrow(model)


def test_tied_parameters_are_untied_first(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match="untie"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "center", "norm": "crms"}]})


@pytest.mark.parametrize("name", ["bert", "gemma3", "llama"])
def test_refused_where_the_mean_is_seen(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match=r"blind to the mean|one coordinate less"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "center", "norm": "chart"}]})
    assert not (tmp_path / "out").exists()


PATCH = {"path": "transformer.wpe.weight", "module": "parameter", "shape": [32, 24]}
TABLE = {"path": "transformer.wpe", "module": "embedding", "rows": 32, "size": 24, "padding": None}
BAD: dict[str, Any] = {
    "no parameter": PATCH | {"path": "transformer.wpe.nonsense"},
    "a module": PATCH | {"path": "transformer.wpe"},
    "no shape": PATCH | {"shape": 24},
    "negative": PATCH | {"shape": [-1, 24]},
    "ten axes": PATCH | {"shape": [1] * 10},
    "huge": PATCH | {"shape": [1 << 30] * 6},
    "row": TABLE | {"padding": 40},
    "padding": TABLE | {"padding": "first"},
}


@pytest.mark.parametrize("what", [*BAD, "good"])
def test_a_config_from_a_stranger(what: str, tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    patches = [BAD[what]] if what in BAD else [PATCH, {**TABLE, "path": "transformer.wte", "rows": 37}]
    config |= {"model_type": "regauge", "regauge": {"format": 1, "stock_type": "gpt2", "patches": patches}}
    path.write_text(json.dumps(config))
    if what == "good":
        load(tmp_path / "source")
        return
    with pytest.raises(BadInput):
        load(tmp_path / "source")
