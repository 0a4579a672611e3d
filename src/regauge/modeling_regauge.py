"""Models of transformers with a few of their modules replaced, as ``config.json`` says under "regauge".

regauge writes a copy of this file beside a checkpoint whose structure it has changed, so that the checkpoint
can be loaded without regauge: ``AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)``.
With regauge installed ``regauge.load(DIRECTORY)`` does the same and runs no code from the directory. The file
needs torch, transformers and ``norms_regauge.py``, which lies beside it, and nothing else.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .norms_regauge import MODULES as NORMS

KEY = "regauge"
PREFIX = "Regauge"
MODEL_TYPE = "regauge"
"""Model type on the disk: stock transformers must not take the checkpoint for one of its own."""


class Norm(nn.Module):
    """y[…, c] = g[c] · z[…, c] / sqrt(s + eps) + b[c]; g or b may be absent.

    ======== ============= ===================================== ====================================
    form     z             s                                     x
    ======== ============= ===================================== ====================================
    layer    x − mean(x)   mean(z²)                              any
    rms      x             mean(x²)                              any
    crms     x             (Σ x² + (Σ x)²) / (n + 1)             n of n + 1 entries that sum to zero
    chart    x             Σ x² / (n + 1)                        n coordinates of n + 1 such entries
    ======== ============= ===================================== ====================================

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers (arXiv 2305.14858, section 3).

    Args:
        form: row of the table.
        size: entries of the last axis of x, and of y.
        eps: added to s.
        weight, bias: whether g and b exist.
    """

    def __init__(
        self,
        form: str,
        size: int,
        eps: float,
        weight: bool = False,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if form not in ("layer", "rms", "crms", "chart"):
            raise ValueError(f"unknown form of norm: {form}")
        self.form, self.size, self.eps = form, size, eps
        here = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(size, **here)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size, **here)) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        if self.form == "layer":
            y = functional.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        elif self.form == "rms":
            y = functional.rms_norm(x, (self.size,), self.weight, self.eps)
            y = y if self.bias is None else y + self.bias
        else:
            z = x.to(torch.promote_types(x.dtype, torch.float32))
            total = z.square().sum(-1, keepdim=True)
            if self.form == "crms":
                total = total + z.sum(-1, keepdim=True).square()
            y = (z * torch.rsqrt(total / (self.size + 1) + self.eps)).to(x.dtype)
            y = y if self.weight is None else y * self.weight
            y = y if self.bias is None else y + self.bias
        return y

    def extra_repr(self) -> str:
        has = [name for name in ("weight", "bias") if getattr(self, name) is not None]
        return f"{self.form}, {self.size}, eps={self.eps}" + "".join(f", {name}" for name in has)


class TransposedLinear(nn.Module):
    """y[…, o] = Σ_i x[…, i] W[i, o] + b[o]; W is stored [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((inputs, outputs), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


def linear(
    inputs: int, outputs: int, bias: bool, transposed: bool = False, device: Any = None, dtype: Any = None
) -> nn.Module:
    """y[…, o] = Σ_i x[…, i] W[o, i] + b[o]; W is stored [out, in], or [in, out] if ``transposed``."""
    kind: Any = TransposedLinear if transposed else nn.Linear
    return kind(inputs, outputs, bias, device=device, dtype=dtype)


class ComplexLinear(nn.Module):
    """y = U z + W conj(z) + b, where z = x[…, :n] + i·x[…, n:] and y, b are halved alike; n = inputs / 2.

    With m = outputs / 2, j < n and o < m:

        y[…, o] = Σ_j (u_re + w_re)[o, j] x[…, j] + (w_im − u_im)[o, j] x[…, n + j] + b[o]
        y[…, m + o] = Σ_j (u_im + w_im)[o, j] x[…, j] + (u_re − w_re)[o, j] x[…, n + j] + b[m + o]
    """

    u_re: nn.Parameter
    u_im: nn.Parameter
    w_re: nn.Parameter
    w_im: nn.Parameter

    def __init__(self, inputs: int, outputs: int, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if inputs % 2 or outputs % 2:
            raise ValueError(f"{inputs} inputs and {outputs} outputs do not make complex numbers")
        shape = (outputs // 2, inputs // 2)
        for name in ("u_re", "u_im", "w_re", "w_im"):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            nn.init.normal_(getattr(self, name), std=0.02)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = input.unflatten(-1, (2, input.shape[-1] // 2))
        u_re, u_im, w_re, w_im = (
            functional.linear(parts, weight).unbind(-2)
            for weight in (self.u_re, self.u_im, self.w_re, self.w_im)
        )
        top = u_re[0] + w_re[0] + (w_im[1] - u_im[1])
        bottom = u_im[0] + w_im[0] + (u_re[1] - w_re[1])
        y = torch.cat([top, bottom], -1)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> torch.Tensor:
        """The real matrix, [outputs, inputs], computed; for code that asks for its dtype."""
        u_re, u_im, w_re, w_im = self.u_re, self.u_im, self.w_re, self.w_im
        return torch.cat([torch.cat([u_re + w_re, w_im - u_im], 1), torch.cat([u_im + w_im, u_re - w_re], 1)])

    def extra_repr(self) -> str:
        return f"{2 * self.u_re.shape[1]}, {2 * self.u_re.shape[0]}, bias={self.bias is not None}"


class Convolution(nn.Module):
    """y = x ∗ W + b over one, two or three axes of positions; W: [out, in / groups, …].

    Around x stand zeros, or, if ``pad``, the number p[c] of each channel: what y[c] = a[c] x[c] + h[c] folded
    into W leaves outside, where p = −h / a stands for y = 0.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        bias: bool,
        pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (outputs, inputs // groups, *kernel)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.pad = nn.Parameter(torch.zeros(inputs, device=device, dtype=dtype)) if pad else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        positions = self.weight.dim() - 2
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[positions - 1]
        x, padding = input, self.padding
        if self.pad is not None:
            sides = [size for size in reversed(self.padding) for _ in range(2)]
            outside = functional.pad(x.new_zeros(x.shape[-positions:]), sides, value=1.0)
            x = functional.pad(x, sides) + outside * self.pad.reshape(-1, *(1,) * positions)
            padding = [0] * positions
        return convolve(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        pad = "" if self.pad is None else ", pad"
        return f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}{pad}"


class Affine(nn.Module):
    """y[n, c, …] = g[c] · x[n, c, …] + b[c], or y[…, c] = g[c] · x[…, c] + b[c] if ``last``; g or b may be
    absent."""

    def __init__(
        self,
        size: int,
        weight: bool,
        bias: bool,
        device: Any = None,
        dtype: Any = None,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (-1, *(1,) * (0 if self.last else input.dim() - 2))
        y = input if self.weight is None else input * self.weight.reshape(shape)
        y = y if self.bias is None else y + self.bias.reshape(shape)
        return y if y.dtype == input.dtype else y.to(input.dtype)


class Identity(nn.Module):
    """y = x."""

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        super().__init__()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def embedding(rows: int, size: int, padding: int | None, device: Any = None, dtype: Any = None) -> nn.Module:
    """y[…, c] = W[x[…], c]; W: [rows, size]; row ``padding`` gets no gradient."""
    if padding is not None and padding >= rows:
        raise ValueError(f"row {padding} of {rows} for padding")
    return nn.Embedding(rows, size, padding, device=device, dtype=dtype)


MODULES: dict[str, Any] = {
    **NORMS,
    "norm": Norm,
    "linear": linear,
    "complex-linear": ComplexLinear,
    "convolution": Convolution,
    "affine": Affine,
    "affine-last": functools.partial(Affine, last=True),
    "identity": Identity,
    "embedding": embedding,
}


def center_input(module: nn.Module, args: Any) -> Any:
    """x[…, c] ← x[…, c] − mean_c x[…, c] for the first positional argument."""
    x = _stream(args)
    return (x - x.mean(-1, keepdim=True), *args[1:])


def crms_input(module: nn.Module, args: Any) -> Any:
    """x[…, c] ← x[…, c] − mean_c x[…, c], all entries but the last, for the first positional argument."""
    x = _stream(args)
    return (x[..., :-1] - x.mean(-1, keepdim=True), *args[1:])


def chart_input(module: nn.Module, args: Any) -> Any:
    """x ← Qᵀ x without the last entry (see :func:`chart`), for the first positional argument."""
    return (chart(_stream(args)), *args[1:])


def chart(x: torch.Tensor) -> torch.Tensor:
    """y[…, j] = (Qᵀ x)[j] = x[…, j] + (x[…, d] − Σ_i x[…, i] / √d) / (√d − 1) for j < d.

    Q = 1 − 2 v vᵀ / vᵀv with v = e_d − u is symmetric and orthogonal; its last column is u = (1, …) / √d.
    """
    root = x.shape[-1] ** 0.5
    return x[..., :-1] + (x[..., -1:] - x.sum(-1, keepdim=True) / root) / (root - 1.0)


def _stream(args: Any) -> torch.Tensor:
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        raise TypeError("the module is not called with a floating-point tensor as its first argument")
    return args[0]


HOOKS: dict[str, Any] = {
    "center-input": center_input,
    "crms-input": crms_input,
    "chart-input": chart_input,
}


def replace_parameter(model: nn.Module, path: str, shape: Any) -> None:
    """Another shape for one parameter, under all its names, or for one buffer such as a running mean; the
    modules are otherwise left as they are."""
    parent, _, leaf = path.rpartition(".")
    owner = dict(model.named_modules()).get(parent)
    buffer = None if owner is None else dict(owner.named_buffers(recurse=False)).get(leaf)
    old = buffer if owner is None else dict(owner.named_parameters(recurse=False)).get(leaf, buffer)
    if owner is None or old is None:
        raise PatchError(f"{path}: no such parameter")
    try:
        new = torch.zeros(tuple(shape), device=old.device, dtype=old.dtype)
    except (TypeError, RuntimeError) as error:
        raise PatchError(f"{path}: {error}") from error
    if buffer is not None:
        setattr(owner, leaf, new)
        return
    changed = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if held is old:
                setattr(module, name, changed)
                if isinstance(module, nn.Embedding):
                    module.num_embeddings, module.embedding_dim = new.shape


def set_attributes(module: nn.Module, values: Any) -> None:
    """Give plain numbers of a module, such as a number of heads, other values of the same type."""
    for name, value in values.items():
        held = vars(module).get(name)
        if name.startswith("_") or type(held) not in (int, float) or type(held) is not type(value):
            raise TypeError(f"the module has no number {name} to be set to {value!r}")
        setattr(module, name, value)


def set_buffers(module: nn.Module, values: Any) -> None:
    """Give numbers and lists of numbers that a module keeps as buffers, such as rotary frequencies, other
    values; lists may have another length."""
    buffers = dict(module.named_buffers(recurse=False))
    for name, numbers in values.items():
        held = buffers.get(name)
        if held is None or held.dim() > 1 or not held.is_floating_point():
            raise TypeError(f"the module has no list of numbers {name}")
        new = torch.tensor(numbers, dtype=held.dtype, device=held.device)
        setattr(module, name, new if held.dim() else new.reshape(()))


SETTERS: dict[str, Any] = {"attributes": set_attributes, "buffers": set_buffers}
KEEPS = (*HOOKS, *SETTERS)
"""What leaves the module where it is."""


def apply_patches(model: nn.Module, patches: Any) -> nn.Module:
    """Replace modules of ``model`` in place; new ones have the device and dtype of those they replace.

    Args:
        model: any module.
        patches: mappings with ``path``, ``module`` (a key of ``MODULES`` with its arguments, of ``HOOKS``:
            what is done to the input of the module at ``path``, or of ``SETTERS``; or "parameter":
            ``path`` is one, ``shape`` its new shape).
    """
    modules = dict(model.named_modules())
    for patch in patches:
        options = dict(patch)
        path, kind = options.pop("path"), options.pop("module")
        if kind == "parameter":
            replace_parameter(model, path, options["shape"])
            continue
        if not path or path not in modules or (kind not in MODULES and kind not in KEEPS):
            raise PatchError(f"{path}: unknown replacement {kind}, or no such module")
        old = modules[path]
        if kind in HOOKS:
            old.register_forward_pre_hook(HOOKS[kind])
            continue
        if kind in SETTERS:
            try:
                SETTERS[kind](old, **options)
            except (TypeError, AttributeError) as error:
                raise PatchError(f"{path}: {error}") from error
            continue
        if any(getattr(old, held) for held in ("_forward_hooks", "_forward_pre_hooks")):
            raise PatchError(f"{path}: the module has hooks, which its replacement would not run")
        like = next(iter((*old.parameters(), *old.buffers(), *model.parameters())), None)
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        try:
            new = MODULES[kind](**options, **where)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PatchError(f"{path}: {error}") from error
        held = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(name not in held or held[name].requires_grad)
        new.train(old.training)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


class PatchError(ValueError):
    """A patch that cannot be applied to this model."""


@functools.cache
def config_class(base: Any) -> Any:
    """The configuration class ``base``, read from and written to directories under another model type."""

    def get_config_dict(cls: Any, name: Any, **kwargs: Any) -> Any:
        content, rest = base.get_config_dict.__func__(cls, name, **kwargs)
        return stock(content), rest

    def to_dict(self: Any) -> Any:
        content = base.to_dict(self)
        return {**content, "model_type": MODEL_TYPE} if content.get(KEY) else content

    def to_diff_dict(self: Any) -> Any:
        content = base.to_diff_dict(self)
        return {**content, "model_type": MODEL_TYPE} if content.get(KEY) else content

    body = {
        "get_config_dict": classmethod(get_config_dict),
        "to_dict": to_dict,
        "to_diff_dict": to_diff_dict,
        "_auto_class": "AutoConfig",
        "__module__": __name__,
    }
    # Another name than that of ``base``: what transformers knows of ``base`` must not be found for this one.
    return type(f"{PREFIX}{base.__name__}", (base,), body)


@functools.cache
def model_class(base: Any) -> Any:
    """The model class ``base`` with the patches of its configuration in place."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        apply_patches(self, getattr(config, KEY)["patches"])
        self.all_tied_weights_keys = untied(self, self.all_tied_weights_keys)

    def get_expanded_tied_weights_keys(self: Any, *args: Any, **kwargs: Any) -> Any:
        return untied(self, base.get_expanded_tied_weights_keys(self, *args, **kwargs))

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = base.from_pretrained.__func__(cls, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        # Loading computes buffers that are not stored anew, as the class without patches would.
        patches = getattr(model.config, KEY)["patches"]
        apply_patches(model, [patch for patch in patches if patch["module"] == "buffers"])
        return found

    body = {
        "__init__": __init__,
        "get_expanded_tied_weights_keys": get_expanded_tied_weights_keys,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": config_class(base.config_class),
        "_auto_class": next(iter(auto_names(base)), "AutoModel"),
        # Tensors stored under older names are renamed as they are for ``base``.
        "is_custom_code": classmethod(lambda cls: False),
        "__module__": __name__,
        "__qualname__": base.__name__,
    }
    return type(base.__name__, (base,), body)


def untied(model: Any, tied: Any) -> Any:
    """Without the pairs (name -> name it is tied to) of which one is a parameter of a replaced module:
    such a module has parameters of its own."""
    patches = getattr(model.config, KEY)["patches"]
    replaced = tuple(f"{patch['path']}." for patch in patches if patch["module"] in MODULES)
    return {
        name: to for name, to in tied.items() if not (name.startswith(replaced) or to.startswith(replaced))
    }


def stock(content: Any) -> Any:
    """The content of ``config.json`` under the model type it had before its structure was changed."""
    if content.get("model_type") != MODEL_TYPE:
        return content
    return {**content, "model_type": content[KEY]["stock_type"]}


@functools.cache
def _auto_classes() -> tuple[str, ...]:
    import transformers

    return tuple(sorted(name for name in dir(transformers) if name.startswith("AutoModel")))


def auto_names(base: Any) -> list[str]:
    """Auto classes of transformers that stand for this model class, among others."""
    import transformers

    found: list[str] = []
    for name in _auto_classes():
        mapping: Any = getattr(getattr(transformers, name), "_model_mapping", None)
        values: Any = () if mapping is None else mapping._model_mapping.values()
        if any(base.__name__ in ((value,) if isinstance(value, str) else value) for value in values):
            found.append(name)
    return found


def __getattr__(name: str) -> Any:
    """``auto_map`` names classes of transformers; what is found here is the patched one."""
    import transformers

    base = None if name.startswith("_") else getattr(transformers, name.removeprefix(PREFIX), None)
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return config_class(base) if issubclass(base, transformers.PreTrainedConfig) else model_class(base)
