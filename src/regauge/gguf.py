"""GGUF files as input: a file transformers can read becomes an ordinary Hugging Face directory, in a cache.

Quantised weights are unpacked to float32. Transformers does the reading; what it would silently leave out
is put back or refused here: weights of the model that the file has not, weights of the file that the model
has not, and a scaling of rotary positions that the configuration does not carry.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regauge.errors import CheckpointError
from regauge.gguf_header import Header, check_length, read_header
from regauge.packaged.cache import cache_root, cached, sha256

if TYPE_CHECKING:
    import torch

_FORMAT = 1
"""Raised whenever the same file would become something else, so that old cache entries are not reused."""

_ROTARY = "rope_freqs.weight"
_ALONE = "model.gguf"


def open_gguf(path: Path, cache: Path | None = None) -> Path:
    """The Hugging Face directory (float32 safetensors, config, tokenizer if the file has one) of a GGUF file.

    Converted on first use and kept under ``cache``, keyed by the SHA-256 of the file. Treat it as read-only.

    Args:
        path: the file.
        cache: cache directory; default as for :mod:`regauge.packaged`.

    Raises:
        CheckpointError: not a GGUF file, cut short, an architecture or a feature transformers cannot
            read, or the ``gguf`` extra is not installed.
        BadInput: the cache cannot be written.
    """
    path = Path(path)
    header = read_header(path)
    digest = sha256(path)
    record = {
        "format": _FORMAT,
        "name": str(header.metadata.get("general.name", "not stated in the file")),
        "dtype": "float32",
        "licence": str(header.metadata.get("general.license", "not stated in the file")),
        "sources": {"gguf": digest},
    }
    place = (cache or cache_root()) / "gguf" / digest[:32]
    return cached(place, record, lambda into: convert(path, into))


def convert(path: Path, into: Path, dtype: torch.dtype | None = None) -> None:
    """Write a GGUF file as a Hugging Face directory into the existing directory ``into``.

    Args:
        path: the file.
        into: an existing directory.
        dtype: how weights are stored; default float32.

    Raises:
        CheckpointError: as :func:`open_gguf`.
    """
    header = read_header(path)
    absent = [name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None]
    if absent:
        raise CheckpointError(
            "reading GGUF needs an extra that is not installed",
            expected="transformers, gguf and accelerate",
            found=f"no {' and no '.join(absent)}",
            way_out="pip install regauge[gguf]",
        )
    from gguf import GGML_QUANT_SIZES

    check_length(path, header, {int(kind): block for kind, block in GGML_QUANT_SIZES.items()})
    with tempfile.TemporaryDirectory(prefix="regauge-") as alone:  # files beside it must not take part
        (Path(alone) / _ALONE).symlink_to(path.resolve())
        _convert(path, header, {"pretrained_model_name_or_path": alone, "gguf_file": _ALONE}, into, dtype)


def _convert(
    path: Path, header: Header, place: Mapping[str, str], into: Path, dtype: torch.dtype | None
) -> None:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(**place)
        _set_rotary(path, header, config)
        options: dict[str, Any] = {"config": config, "output_loading_info": True}
        options["dtype"] = torch.float32 if dtype is None else dtype
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, report = _loader(transformers, config).from_pretrained(**place, **options)
        dense = _dense(model)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read {path}",
            expected="an architecture it can convert from GGUF",
            found=f"architecture {header.metadata.get('general.architecture', 'none')}; "
            f"{type(error).__name__}: {str(error)[:300]}",
            way_out="convert the original checkpoint, or use a newer transformers",
        ) from error
    _check_complete(path, header, dense, report)
    dense.save_pretrained(into)
    if "tokenizer.ggml.tokens" in header.metadata:
        try:
            transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(into)
        except Exception as error:
            warnings.warn(
                f"the tokenizer of {path} was not converted: {type(error).__name__}: {error}", stacklevel=3
            )


def _loader(transformers: Any, config: Any) -> Any:
    """The class to load with: what the file's configuration names, else a language model of either kind."""
    names = getattr(config, "architectures", None) or []
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    for mapping, loader in (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
    ):
        if type(config) in mapping:
            return loader
    return transformers.AutoModel


def _dense(model: Any) -> Any:
    """The same weights in a model whose configuration does not speak of quantisation: it can be saved."""
    import torch

    plain = {
        k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    with torch.device("meta"):
        dense = type(model)(type(model.config).from_dict(plain))
    dense.load_state_dict(model.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = model.generation_config
    return dense.eval()


def _check_complete(path: Path, header: Header, model: Any, report: Mapping[str, Any]) -> None:
    """Every weight of the model came from the file, and every weight of the file is in the model."""
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(
                f"{path} does not hold the whole model",
                expected=f"every weight of {type(model).__name__}",
                found=f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, report[kind]))[:4])}",
            )
    stored = sum(math.prod(t.shape) for t in header.tensors if t.name != _ROTARY)
    held = sum(p.numel() for p in model.parameters())
    if stored != held:
        raise CheckpointError(
            f"transformers would not use {path} as a whole",
            expected=f"{stored} weights, as the file stores",
            found=f"{held} weights in {type(model).__name__}",
            way_out="convert the original checkpoint instead",
        )
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path} has weights that are not finite", parameter=bad[0])


def _set_rotary(path: Path, header: Header, config: Any) -> None:
    """Put a scaling of rotary positions that the file states into the configuration, or refuse.

    Transformers reads neither the metadata ``*.rope.scaling.*`` of most architectures nor the tensor of
    frequency divisors; without them the model would be another function.
    """
    stated = {k.split(".rope.scaling.")[1]: v for k, v in header.metadata.items() if ".rope.scaling." in k}
    scaled = stated.get("type", "none") != "none" and stated.get("factor", 0.0) != 1.0
    stored = next((t for t in header.tensors if t.name == _ROTARY), None)
    known = dict(getattr(config, "rope_parameters", None) or {})
    nested = [v for v in known.values() if isinstance(v, Mapping)] or [known]
    default = all(rope.get("rope_type", "default") == "default" for rope in nested)
    if stored is None and (not scaled or not default):
        return
    if stored is not None and not scaled and "rope_theta" in known and default and stored.type == 0:
        count = math.prod(stored.shape)
        divisors = np.fromfile(path, dtype="<f4", count=count, offset=stored.start).astype(np.float64)
        fitted = llama3_scaling(divisors, float(known["rope_theta"]))
        if fitted is not None:
            config.rope_parameters = {**known, **fitted}
            return
    raise CheckpointError(
        f"{path} scales rotary positions in a way that would be lost",
        expected="no scaling, or frequency divisors of the kind of Llama 3",
        found=f"rope.scaling {stated}"
        if stored is None
        else f"the tensor {_ROTARY}, and rope.scaling {stated}",
        way_out="convert the original checkpoint instead",
    )


def llama3_scaling(divisors: np.ndarray[Any, Any], theta: float) -> dict[str, Any] | None:
    """The ``rope_parameters`` of type ``llama3`` that give these frequency divisors, if there are any.

    Long waves are divided by a factor f, short ones by 1, and in between 1/divisor is linear in the
    frequency: ``(1 - s)/f + s`` with ``s = (n - low)/(high - low)``, where n is how many waves fit into
    the original context. Only the ratios of low, high and context count, so low is taken as 1.

    Args:
        divisors: (head size / 2,), by decreasing frequency, in float64.
        theta: base of the rotary frequencies.

    Returns:
        The parameters, found by a linear fit and checked against every divisor to a relative 1e-5,
        or ``None``.
    """
    factor = float(divisors.max(initial=1.0))
    middle = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if factor <= 1 or middle.sum() < 2:
        return None
    waves = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)  # waves per position
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(waves[middle], share[middle], 1)
    if slope <= 0 or offset >= -1e-3:
        return None
    context, high = round(-slope / offset), round(float(1 - 1 / offset), 3)
    factor = round(factor, 4)
    if high <= 1:
        return None
    smooth = np.clip((waves * context - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / divisors, (1 - smooth) / factor + smooth, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
