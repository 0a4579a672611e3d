"""Hugging Face models on the meta device: no weight is ever allocated or read.

The configuration is read to build the model and its inputs, for nothing else.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from regauge import modeling_regauge
from regauge.errors import BadInput, CheckpointError, Refused, TraceError
from regauge.inputs import example_inputs
from regauge.modeling_regauge import KEY, MODEL_TYPE, auto_names, config_class, model_class, stock
from regauge.patch_schema import check_patches
from regauge.patches import merged

LARGE = 1 << 16
"""Elements above which ``torch.empty`` gives a tensor without storage while a model is built."""


@dataclass(frozen=True)
class HFModel:
    """A model without weights, and what is needed to trace and to run it.

    Attributes:
        model: module on the meta device, in eval mode, with caches off.
        inputs: example keyword inputs on the meta device.
        config: its configuration (a deep copy; the caller's is left as it is).
        class_name: name of the model class.
        stored_buffers: buffer name -> real value, see :meth:`buffers`.
    """

    model: nn.Module
    inputs: Mapping[str, torch.Tensor]
    config: Any
    class_name: str
    stored_buffers: Mapping[str, torch.Tensor]

    def buffers(self) -> dict[str, torch.Tensor]:
        """Real values of the buffers that no checkpoint has to carry.

        Non-persistent ones (rotary frequencies, masks) and persistent ones that are not
        floating-point, as the model's own constructor computes them, on the CPU.
        """
        return dict(self.stored_buffers)

    def real_inputs(self, *, batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
        """Random inputs on the CPU with the same names; see :func:`regauge.inputs.example_inputs`."""
        return example_inputs(self.model, self.config, batch=batch, length=length, device="cpu", seed=seed)


def load_meta(
    source: str | Path | Mapping[str, Any] | Any,
    *,
    batch: int = 3,
    length: int = 7,
    experts: str = "batched_mm",
    dtype: torch.dtype | None = None,
) -> HFModel:
    """Build a model on the meta device from a directory, a config as plain data, or a config object.

    Args:
        source: directory with ``config.json``; or the content of one; or a ``PreTrainedConfig``.
        batch, length: sizes of the example inputs; distinct small primes keep accidental equalities
            of sizes out of views.
        experts: implementation of expert layers where the model offers a choice; ``batched_mm`` and
            ``grouped_mm`` can be traced, the latter needs less memory to run.
        dtype: dtype of the parameters if the config does not state one (transformers then takes the
            one of the checkpoint); default float32.

    Raises:
        BadInput: no config, a damaged one, an unknown model type, or quantised weights.
        TraceError: the class cannot be built, or an example input cannot be made.
    """
    config = load_config(source)
    if config.dtype is None:
        config.dtype = dtype
    cls = model_class_of(config)
    model, config = _build(cls, config, experts)
    with torch.no_grad():
        stored = _buffers_to_meta(model)
    inputs = example_inputs(model, config, batch=batch, length=length, device="meta")
    return HFModel(model, inputs, config, cls.__name__, stored)


def load_config(source: Any) -> Any:
    """The configuration of a directory, of the content of its ``config.json``, or itself, copied.

    Raises:
        BadInput: missing, damaged, of an unknown type, or of quantised weights.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        content = read_config(Path(source))
    if content.get("quantization_config") is not None:
        raise BadInput(
            "the weights are stored quantised",
            expected="weights in a floating-point dtype",
            found="config.json has a quantization_config",
            way_out="dequantise the checkpoint first",
        )
    check_patches(content)
    name = content.get("model_type")
    if not isinstance(name, str):
        raise BadInput("config.json has no model_type", way_out="use a directory saved by transformers")
    try:
        with _quiet():
            if name == MODEL_TYPE:
                content = stock(copy.deepcopy(content))
                return config_class(CONFIG_MAPPING[content["model_type"]])(**content)
            return AutoConfig.for_model(**copy.deepcopy(content))
    except Exception as error:
        raise BadInput(
            "transformers cannot read this config",
            found=f"{type(error).__name__}: {_first_lines(error)}",
            way_out="use a model type that the installed transformers knows",
        ) from error


def dtype_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """Entries of ``config.json`` that say how weights are stored, under the names that ``config`` has."""
    old = "torch_dtype" in config
    return dict.fromkeys(("dtype", "torch_dtype")[: 1 + old], str(dtype).removeprefix("torch."))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises ``BadInput`` if it is missing or not a JSON object."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"{directory} has no config.json", way_out="give a directory saved by save_pretrained"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read", found=f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object", found=type(content).__name__)
    return content


def resolved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a configuration with every default of its class filled in."""
    return dict(load_config(dict(config)).to_dict())


def model_class_of(config: Any) -> Any:
    """The model class that a configuration stands for, with its structure patches if it has any.

    Raises:
        BadInput: transformers has no such class.
    """
    stock_class = _stock_class(config)
    return model_class(stock_class) if getattr(config, KEY, None) else stock_class


def patched_config(config: Mapping[str, Any], patches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Changes to the top level of ``config.json`` after which the model has these modules replaced."""
    before = config.get(KEY) or {"stock_type": config["model_type"], "patches": []}
    held = merged(before["patches"], patches)
    cls = _stock_class(load_config(dict(config)))
    names = {"AutoConfig": config_class(cls.config_class).__name__}  # type: ignore[attr-defined]
    names |= dict.fromkeys(auto_names(cls), cls.__name__)
    return {
        "architectures": [cls.__name__],
        "model_type": MODEL_TYPE,
        "auto_map": {
            auto: f"{modeling_regauge.__name__.rpartition('.')[2]}.{name}" for auto, name in names.items()
        },
        KEY: {"format": 1, "stock_type": before["stock_type"], "patches": [dict(patch) for patch in held]},
    }


def _stock_class(config: Any) -> type[nn.Module]:
    import transformers

    named = config.architectures or ()
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
        raise BadInput("'architectures' is not a list of class names", found=repr(named)[:100])
    for name in named:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module) and getattr(cls, "config_class", None):
            return cls
    if config.architectures:
        raise BadInput(
            "transformers has no model class of this name",
            found=", ".join(config.architectures),
            way_out="install the transformers version that wrote the checkpoint; remote code is not run",
        )
    names = ["AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModel"]
    if getattr(config, "is_encoder_decoder", False):
        names = ["AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", *names]
    elif getattr(config, "is_decoder", False):
        names = ["AutoModelForCausalLM", *names]
    for name in names:
        mapping = getattr(transformers, name)._model_mapping
        kind = next((kind for kind in type(config).__mro__ if kind in mapping), None)
        if kind is not None:
            cls = mapping[kind]
            return cls[0] if isinstance(cls, (list, tuple)) else cls
    raise BadInput(
        "no model class is known for this config",
        expected="a config with 'architectures'",
        found=type(config).__name__,
    )


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` of a large size, with no device given, allocates nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() >= LARGE:
                return made
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta(*, spare_empty: bool) -> Generator[None]:
    """While open, every parameter registered on any module is replaced by one on the meta device."""

    def hook(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.device.type == "meta":
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)
    try:
        if spare_empty:
            with _EmptyOnMeta():
                yield
        else:
            yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Generator[None]:
    """No warnings and no log lines from building a model; both as before afterwards."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _build(cls: type[nn.Module], config: Any, experts: str) -> tuple[nn.Module, Any]:
    """The model with parameters on meta and buffers real, and the config it was built from."""
    reasons: list[str] = []
    for attention in ("sdpa", "eager"):
        for choice, spare_empty in ((experts, True), (experts, False), (None, True), (None, False)):
            attempt = copy.deepcopy(config)
            _switch_caches_off(attempt)
            attempt._experts_implementation = choice
            try:
                with (
                    _quiet(),
                    torch.random.fork_rng(devices=[]),
                    _parameters_on_meta(spare_empty=spare_empty),
                ):
                    model: nn.Module = cls._from_config(attempt, attn_implementation=attention)  # type: ignore[attr-defined]
            except Exception as error:
                reasons.append(f"{attention}: {type(error).__name__}: {_first_lines(error)}")
                continue
            if spare_empty and any(buffer.device.type == "meta" for buffer in model.buffers()):
                continue
            for module in model.modules():
                module.training = False
            return model, attempt
    raise TraceError(
        f"{cls.__name__} cannot be built from this config",
        found="; ".join(dict.fromkeys(reasons)),
        way_out="check the config, or another version of transformers",
    )


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:2])[:300]


def _switch_caches_off(config: Any) -> None:
    """No key-value cache in the output; nested configs included. Nothing else is changed."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for key in getattr(config, "sub_configs", None) or {}:
        section = getattr(config, key, None)
        if section is not None and not isinstance(section, Mapping):
            _switch_caches_off(section)


def _buffers_to_meta(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move every buffer to meta, keeping shared ones shared; return the values of those to be kept."""
    persistent = set(model.state_dict(keep_vars=True))
    kept: dict[str, torch.Tensor] = {}
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        real, meta = pairs.setdefault(id(buffer), (buffer, buffer.to("meta")))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, meta)
        if name not in persistent or not real.is_floating_point():
            kept[name] = real.detach()
    return kept


def checkpoint_names(hf: HFModel, names_in_checkpoint: Iterable[str]) -> dict[str, str]:
    """Match the model's parameters with the tensors of a checkpoint, one to one.

    Names may differ as far as transformers' own loader renames them: the prefix under which a model
    holds its base model, and older spellings. A tied tensor may be stored once. Buffers that the
    constructor computes need not be stored. Tensors that the model does not use are left out.

    Returns:
        state-dict name of the model -> tensor name in the checkpoint. Tied names that are stored
        once map to the same tensor.

    Raises:
        CheckpointError: a parameter has no tensor, and no tensor is left over.
        Refused: the checkpoint is laid out in another way (for example one tensor per expert, fused
            when transformers loads it).
    """
    model = hf.model
    stored = list(dict.fromkeys(names_in_checkpoint))
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    owner = {name: identity for identity, names in groups.items() for name in names}
    needed = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers() if b.is_floating_point()}

    found: dict[str, str] = {}
    spare: list[str] = []
    converted: list[str] = []
    for tensor_name, name, changed in _loaded_as(model, stored):
        if changed:
            converted.append(tensor_name)
        elif name in owner and name not in found:
            found[name] = tensor_name
        else:
            spare.append(tensor_name)
    result: dict[str, str] = {}
    missing: list[str] = []
    for identity, names in groups.items():
        mine = [name for name in names if name in found]
        if mine:
            result.update({name: found.get(name, found[mine[0]]) for name in names})
        elif identity in needed:
            missing.append(names[0])
    if missing and not converted and not spare:
        raise CheckpointError(
            "the checkpoint lacks tensors that the model needs",
            parameter=missing[0],
            expected=f"a tensor for each of {len(missing)} names such as {', '.join(missing[:3])}",
            found="no tensor that could be one of them",
            way_out="save the model again, or correct config.json",
        )
    if missing or converted:
        raise Refused(
            "the checkpoint stores its tensors in another layout than the model holds them",
            parameter=missing[0] if missing else converted[0],
            expected=f"a tensor for each of {len(missing)} names such as " + ", ".join(missing[:3]),
            found=", ".join([*converted, *spare][:3]) or "nothing else in the checkpoint",
            way_out="tensors that transformers converts when it loads them (such as experts stored one by"
            " one) are not rewritten: load the model and save its state_dict() as safetensors",
        )
    return result


def _loaded_as(model: nn.Module, stored: Iterable[str]) -> list[tuple[str, str, bool]]:
    """What transformers' own loader does: (stored name, name in the model, whether values change)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model_names = model.state_dict(keep_vars=True)
    mapping: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings: list[Any] = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    prefix = getattr(model, "base_model_prefix", None) or None
    result: list[tuple[str, str, bool]] = []
    for tensor_name in stored:
        name, pattern = rename_source_key(tensor_name, renamings, converters, prefix, model_names)
        if name not in model_names and tensor_name in model_names:
            name, pattern = rename_source_key(tensor_name, [], [], prefix, model_names)
        result.append((tensor_name, name, pattern is not None and name in model_names))
    return result
