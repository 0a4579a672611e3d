"""The graph runner: as traced it is the eager model; in float64 nothing inside is computed in less."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from regauge.certify.lazy import LazyWeight, apply_lazily
from regauge.certify.run import held_bytes, run, run_in_parts
from regauge.errors import BadInput, TraceError
from regauge.trace import Trace, trace

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**TEXT, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {
        **TEXT,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    "gpt_neox": TEXT,
    "bert": TEXT,
    "t5": {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "mixtral": {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4},
    "whisper": {
        "vocab_size": 61,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
    },
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class Made:
    """A model of transformers with random weights, its trace on meta, and inputs."""

    def __init__(self, name: str, experts: str = "grouped_mm") -> None:
        from regauge.hf import load_meta

        held = load_meta({"model_type": name, **CONFIGS[name]}, experts=experts)
        self.trace = trace(held.model, kwargs=held.inputs)
        self.buffers = held.buffers()
        self.inputs = held.real_inputs(batch=3, length=7, seed=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model: nn.Module = getattr(transformers, held.class_name)(held.config).eval()
            with torch.no_grad():
                for parameter in dict.fromkeys(self.model.parameters()):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.state = {n: t.detach() for n, t in self.model.state_dict(keep_vars=True).items()}

    def run(self, **options: Any) -> Tensor:
        return run(self.trace, self.state.__getitem__, self.buffers, self.inputs, **options)[0]


@pytest.fixture(scope="module")
def llama() -> Made:
    return Made("llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_is_the_eager_model_in_float32_and_in_float64(name: str) -> None:
    made = Made(name)
    with torch.no_grad():
        eager = made.model(**made.inputs).logits
        assert relative(made.run(dtype="stored"), eager) < 1e-5
        assert relative(made.run(dtype="stored", block=64), eager) < 1e-5
        lifted = made.run()
        assert lifted.dtype is torch.float64
        assert relative(made.run(block=64), lifted) < 1e-13
        if name == "mixtral":  # eager experts have no float64 kernel
            assert relative(lifted, eager) < 1e-5
            assert relative(Made(name, experts="batched_mm").run(), lifted) < 1e-13
            return
        inputs = {n: t.double() if t.is_floating_point() else t for n, t in made.inputs.items()}
        double = copy.deepcopy(made.model).double()(**inputs).logits
        # Where the model itself casts to float32 inside, the double model is the worse one.
        assert relative(lifted, double) < 1e-6


@pytest.mark.parametrize("scaled", [("v_proj", "o_proj"), ("up_proj", "down_proj")])
def test_a_power_of_two_moved_between_two_maps_is_exact(llama: Made, scaled: tuple[str, str]) -> None:
    up, down = scaled
    before = llama.run()
    made = copy.copy(llama)
    made.state = {n: t * 2 if up in n else t / 2 if down in n else t for n, t in llama.state.items()}
    assert relative(made.run(), before) < 1e-13
    made.state = {n: t * 2 if up in n else t for n, t in llama.state.items()}
    assert relative(made.run(), before) > 1e-2


def test_float64_is_not_spoilt_by_casts_inside_the_model(llama: Made) -> None:
    """A rotation of the value space by an irrational angle: 1e-14 here, and not in a double model."""
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()).Q
    made = copy.copy(llama)
    made.state = {n: t.double() for n, t in llama.state.items()}
    before = made.run()
    for name, t in made.state.items():
        if "v_proj" in name:
            made.state[name] = (turn.T @ t.reshape(2, 8, -1)).reshape(t.shape)
        if "o_proj" in name:
            made.state[name] = (t.reshape(-1, 4, 8) @ turn).reshape(t.shape)
    assert relative(made.run(), before) < 1e-13


# -- everything that makes floats inside a graph, against numpy ----------------------------------------


class Body(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.1, 1.3, 5))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.w)


def np_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


BODIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "float": (lambda x, w: (x.float() / 3).to(x.dtype) * w, lambda x, w: x / 3 * w),
    "half": (lambda x, w: (x.half() / 3).float() * w, lambda x, w: x / 3 * w),
    "type_as": (lambda x, w: (x.double() / 3).type_as(w) * w, lambda x, w: x / 3 * w),
    "arange": (
        lambda x, w: x * torch.arange(0.0, 0.5, 0.1, device=x.device) * w,
        lambda x, w: x * np.array([0.0, 0.1, 0.2, 0.3, 0.4]) * w,
    ),
    "full": (lambda x, w: x * torch.full((5,), 0.1, dtype=torch.float32) * w, lambda x, w: x * 0.1 * w),
    "ones": (lambda x, w: torch.ones(5, device=x.device) / 3 * x * w, lambda x, w: x * w / 3),
    "new": (lambda x, w: x.new_full((5,), 0.7, dtype=torch.float32) * x * w, lambda x, w: 0.7 * x * w),
    "integers": (
        lambda x, w: x * (torch.arange(1, 6, device=x.device) / 7) * w,
        lambda x, w: x * np.arange(1, 6) / 7 * w,
    ),
    "powers": (
        lambda x, w: x * torch.pow(0.9, torch.arange(1, 6, device=x.device)) * w,
        lambda x, w: x * 0.9 ** np.arange(1, 6) * w,
    ),
    "softmax": (lambda x, w: F.softmax(x, -1, dtype=torch.float32) * w, lambda x, w: np_softmax(x) * w),
    "sum": (
        lambda x, w: x.sum(-1, dtype=torch.float32, keepdim=True) * w,
        lambda x, w: x.sum(-1)[..., None] * w,
    ),
    "mean": (lambda x, w: x.mean(-1, True, dtype=torch.float32) * w, lambda x, w: x.mean(-1)[..., None] * w),
    "cumsum": (lambda x, w: x.cumsum(-1, dtype=torch.float32) * w, lambda x, w: x.cumsum(-1) * w),
    "where": (
        lambda x, w: torch.where(x > 0, 0.1, 0.3) * w,
        lambda x, w: np.where(x > 0, 0.1, 0.3) * w,
    ),
    "autocast": (lambda x, w: _under_autocast(x, w), lambda x, w: (x * w)[..., None] @ w[None] / 3),
    "dropout": (lambda x, w: F.dropout(x, 0.5, training=True) * w, lambda x, w: x * w),
    "complex": (
        lambda x, w: torch.polar(x.abs().float(), (x * w).float()).real,
        lambda x, w: np.abs(x) * np.cos(x * w),
    ),
    "rms": (
        lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5)).to(x.dtype),
        lambda x, w: w * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5),
    ),
}


def _under_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.matmul((x * w)[..., None], w[None]) / 3


@pytest.mark.parametrize("name", BODIES)
def test_every_float_made_inside_is_a_float64(name: str) -> None:
    body, reference = BODIES[name]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    model = Body(body)
    traced = trace(model, (x,))
    (result,) = run(traced, lambda _: model.w.detach(), {}, {"x": x})
    expected = torch.from_numpy(np.asarray(reference(x.double().numpy(), model.w.detach().double().numpy())))
    assert result.dtype is torch.float64
    assert relative(result, expected) < 1e-15


def test_given_constants_and_buffers_keep_their_values() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.tensor([0.1, 0.2]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((2,), torch.finfo(torch.float32).min)
            return torch.stack([x * self.table, mask])

    traced = trace(Model(), (torch.ones(2),))
    table = torch.tensor([0.1, 0.2])
    (result,) = run(traced, _none, {"table": table}, {"x": torch.ones(2)})
    assert result[0].tolist() == table.double().tolist() != [0.1, 0.2]
    assert result[1].tolist() == [torch.finfo(torch.float32).min] * 2


def _none(name: str) -> Tensor:
    raise AssertionError(name)


# -- weights --------------------------------------------------------------------------------------------


def chain(depth: int, width: int = 16) -> tuple[Trace, dict[str, Tensor], Tensor]:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items()}
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(3))
    return trace(model, (x,)), state, x


@pytest.mark.parametrize("dtype", [torch.float64, "stored"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_weight_is_fetched_when_needed_and_dropped_after(block: int, dtype: Any) -> None:
    traced, state, x = chain(6)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        made = state[name].numpy().copy()  # lives as long as any tensor that shares its memory
        alive.append(weakref.ref(made))
        return torch.from_numpy(made)

    run(traced, fetch, {}, {"input": x}, block=block, dtype=dtype)
    gc.collect()
    assert len(alive) == 6
    assert most <= 1
    assert all(ref() is None for ref in alive)


class ByRows:
    """Weights that count what is asked of them; whole ones only up to ``limit`` elements."""

    def __init__(self, state: dict[str, Tensor], limit: int) -> None:
        self.state, self.limit, self.largest = state, limit, 0

    def __call__(self, name: str) -> Tensor:
        assert self.state[name].numel() <= self.limit, name
        return self.state[name]

    def rows(self, name: str, index: Tensor) -> Tensor:
        found = self.state[name][index]
        self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_large_weight_is_only_ever_read_by_rows(name: str) -> None:
    made = Made(name)
    weights = ByRows(made.state, limit=512)
    result = run(made.trace, weights, made.buffers, made.inputs, block=512)[0]
    assert relative(result, made.run()) < 1e-13
    per_expert = made.state["model.layers.0.mlp.experts.gate_up_proj"][0].numel() if name == "mixtral" else 0
    assert weights.largest <= max(21 * 32, per_expert)


def test_weights_are_not_changed(llama: Made) -> None:
    before = {n: t.clone() for n, t in llama.state.items()}
    for dtype in (torch.float64, "stored"):
        llama.run(dtype=dtype, block=64)
    assert all(torch.equal(t, before[n]) for n, t in llama.state.items())


def test_axes_of_an_unread_weight_follow_permutations() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    weight = LazyWeight("w", (2, 3, 4), lambda _: tensor, torch.float64)
    moved = weight.permuted((2, 0, 1)).permuted((1, 0, 2))
    assert torch.equal(moved.whole(), tensor.double().permute(2, 0, 1).permute(1, 0, 2))


# -- what cannot be run ---------------------------------------------------------------------------------


def test_wrong_inputs_weights_and_buffers_are_refused(llama: Made) -> None:
    args = (llama.trace, llama.state.__getitem__, llama.buffers)
    with pytest.raises(BadInput, match="another shape than was traced"):
        run(*args, {"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
    with pytest.raises(BadInput, match="not the inputs that were traced"):
        run(*args, {})
    with pytest.raises(BadInput, match="without values"):
        run(*args, {"input_ids": torch.zeros(3, 7, dtype=torch.int64, device="meta")})
    with pytest.raises(BadInput, match="buffer"):
        run(llama.trace, llama.state.__getitem__, {}, llama.inputs)
    with pytest.raises(BadInput, match="weight has another shape"):
        run(llama.trace, lambda name: torch.zeros(1), llama.buffers, llama.inputs)
    with pytest.raises(BadInput, match="float64 or as stored"):
        llama.run(dtype=torch.float32)


def test_an_operation_that_fails_is_named() -> None:
    model = nn.Embedding(5, 2)
    traced = trace(model, (torch.tensor([1]),))
    with pytest.raises(TraceError, match=r"aten\.embedding"):
        run(traced, lambda _: model.weight.detach(), {}, {"input": torch.tensor([7])})


def test_a_bit_pattern_is_not_lifted() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.view(torch.int32) + 1).view(torch.float32)

    traced = trace(Model(), (torch.ones(2),))
    with pytest.raises(TraceError, match="bit pattern"):
        run(traced, _none, {}, {"x": torch.ones(2)})
    stored = run(traced, _none, {}, {"x": torch.ones(2)}, dtype="stored")[0]
    assert torch.equal(stored, torch.ones(2).nextafter(torch.tensor(2.0)))


def test_the_default_dtype_is_as_before_even_after_an_error(llama: Made) -> None:
    llama.run()
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(BadInput):
        run(llama.trace, lambda name: torch.zeros(1), llama.buffers, llama.inputs)
    assert torch.get_default_dtype() is torch.float32


# -- outputs in parts --------------------------------------------------------------------------------


class Head(nn.Module):
    """A product with a large weight, then entrywise operations; and one output that is none of this."""

    def __init__(self, cap: bool) -> None:
        super().__init__()
        self.cap = cap
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(x).relu()
        logits = self.outer(x)
        return (torch.tanh(logits / 3.0) * 3.0 if self.cap else logits), x


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, "stored"])
def test_an_output_in_parts_is_the_output(cap: bool, dtype: Any) -> None:
    model, x = Head(cap).eval(), torch.randn(2, 3, 6)
    traced = trace(model, (x,))
    state: list[tuple[str, int]] = []

    class Rows:
        def __call__(self, name: str) -> Tensor:
            state.append((name, -1))
            return model.state_dict()[name]

        def rows(self, name: str, index: Tensor) -> Tensor:
            state.append((name, len(index)))
            return model.state_dict()[name][index]

    whole = run(traced, model.state_dict().__getitem__, {}, {"x": x}, dtype=dtype)
    parts = run_in_parts(traced, Rows(), {}, {"x": x}, dtype=dtype, block=100)
    assert not any(name == "outer.weight" for name, _ in state)
    assert [part.shape for part in parts] == [(2, 3, 50), (2, 3, 8)]
    for part, value in zip(parts, whole, strict=True):
        found = torch.cat(
            [part.columns(i, min(i + 7, value.shape[-1])) for i in range(0, value.shape[-1], 7)], 1
        )
        assert found.dtype == value.dtype
        assert_close(
            found.reshape(value.shape), value, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=1e-6
        )
    assert max(rows for name, rows in state if name == "outer.weight") == 7
    assert torch.get_default_dtype() is torch.float32
    assert (held_bytes(traced, 100), held_bytes(traced)) == (8 * 6 * 8, 8 * 6 * 58)


class Parts:
    """Weights of which only parts along some axes come cheap; the whole is recorded."""

    def __init__(self, tensor: Tensor, axes: tuple[int, ...]) -> None:
        self.tensor, self.axes, self.read = tensor, axes, list[int]()

    def __call__(self, name: str) -> Tensor:
        self.read.append(self.tensor.numel())
        return self.tensor

    def cuts(self, name: str) -> tuple[int, ...]:
        return self.axes

    def read_rows(self, name: str, start: int, stop: int, axis: int = 0) -> Tensor:
        assert axis in self.axes
        self.read.append(self.tensor.narrow(axis, start, stop - start).numel())
        return self.tensor.narrow(axis, start, stop - start)

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self.tensor[index]


@pytest.mark.parametrize("stored", [(30, 20), (20, 30)])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), ()])
@pytest.mark.parametrize("exact", [True, False])
def test_a_weight_is_cut_along_an_axis_that_allows_it(
    stored: tuple[int, int], axes: tuple[int, ...], exact: bool
) -> None:
    tensor, x = torch.randn(stored, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    source = Parts(tensor, axes)
    weight = LazyWeight("w", stored, source, torch.float64, (1, 0) if stored[0] == 30 else None)
    done, found = apply_lazily("aten.mm.default", (x, weight), {}, 100, exact=exact)
    summed = {(30, 20): 1, (20, 30): 0}[stored] == weight.axis()
    assert done is (exact or not summed)
    if done:
        assert_close(found, x @ (tensor.T if stored[0] == 30 else tensor))
        assert max(source.read) <= (100 if axes else 600)
        assert len(source.read) > 1 or not axes
