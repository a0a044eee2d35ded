"""Networks of other libraries by name, and weights from a file. Nothing is unpickled.

Tests: tests/test_pretrained.py.
"""

import hashlib
import importlib
import zipfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from halfpass.errors import InputError, near_miss, reason


def from_library(place: str, name: str, sample_shape: Any, outputs: int, *, pretrained: bool) -> nn.Module:
    """`timm:resnet50`, `torchvision:resnet50` or `hf:FOLDER_OR_ID`, with so many outputs, by that library's own loader.

    `pretrained` takes its published weights, which it looks for in its cache and then on its hub. Raises InputError
    where the library is not installed, or does not know the name.
    """
    library, _, own = name.partition(":")
    module, extra, build = LIBRARIES[library]
    try:
        found = importlib.import_module(module)
    except Exception as error:  # importing runs their code
        remedy = f"pip install 'halfpass[{extra}]'"
        raise InputError(place, f"{module} to be installed", reason(error), remedy) from error
    try:
        return build(found, own, sample_shape, outputs, pretrained)
    except Exception as error:  # whatever they raise
        remedy = "check the name, and whether its weights are here or can be fetched"
        raise InputError(place, f"a network that {module} can build", reason(error), remedy) from error


def _timm(timm: Any, name: str, sample_shape: Any, outputs: int, pretrained: bool) -> nn.Module:
    return timm.create_model(name, pretrained=pretrained, num_classes=outputs, in_chans=_channels(sample_shape))


def _torchvision(torchvision: Any, name: str, sample_shape: Any, outputs: int, pretrained: bool) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    new: nn.Module = models.get_model(name, weights=None, num_classes=outputs)
    if pretrained:
        known: nn.Module = models.get_model(name, weights="DEFAULT")
        _take(new, known.state_dict())
    return new


def _hugging_face(transformers: Any, name: str, sample_shape: Any, outputs: int, pretrained: bool) -> nn.Module:
    of_text = isinstance(sample_shape, dict) and "input_ids" in sample_shape
    auto = transformers.AutoModelForSequenceClassification if of_text else transformers.AutoModelForImageClassification
    if pretrained:
        return auto.from_pretrained(name, num_labels=outputs, ignore_mismatched_sizes=True, use_safetensors=True)
    return auto.from_config(transformers.AutoConfig.from_pretrained(name, num_labels=outputs))


def _channels(sample_shape: Any) -> int:
    return int(sample_shape[0]) if isinstance(sample_shape, tuple) and len(sample_shape) == 3 else 3


LIBRARIES: dict[str, tuple[str, str, Callable[..., nn.Module]]] = {  # prefix → module, extra, builder
    "timm": ("timm", "timm", _timm),
    "torchvision": ("torchvision", "torchvision", _torchvision),
    "hf": ("transformers", "hf", _hugging_face),
}


def load_weights(place: str, model: nn.Module, file: str) -> tuple[dict[str, Tensor], list[str]]:
    """Loads what a file has of the network's weights and buffers, by name; returns those, and a line for each kind that
    did not match. A safetensors file, or one of PyTorch that holds tensors alone.

    Raises InputError where it cannot be read, or nothing in it is of this network.
    """
    state = _read(place, Path(file).expanduser())
    known = model.state_dict()
    for name, value in state.items():
        if name in known:
            _check_dense(f"{place} {file}, {name!r}", value)
    matching = {
        name: value.detach().resolve_conj().resolve_neg()
        for name, value in state.items()
        if name in known and known[name].shape == value.shape
    }
    for name, value in matching.items():
        _check_values(f"{place} {file}, {name!r}", value, known[name])
    if not matching:
        name = next(iter(state), "")
        remedy = near_miss(name, known, "see what the file was made of")
        found = f"{len(state)} other names, such as {name!r}"
        raise InputError(f"{place} {file}", f"weights of the network, such as {next(iter(known), '')!r}", found, remedy)
    _take(model, matching)
    others = {
        "of another shape": [n for n, v in state.items() if n in known and n not in matching],
        "not in the file": [name for name in known if name not in state],
        "not in the network": [name for name in state if name not in known],
    }
    notes = [f"{place} {file}: {len(names)} {kind}: {', '.join(names[:5])}" for kind, names in others.items() if names]
    return matching, notes


def _check_dense(place: str, value: Tensor) -> None:
    """Raises InputError for a tensor that has no values of its own, or not all of them, or no shape."""
    if value.is_meta:
        raise InputError(place, "values", "a meta tensor, which has none", "save it from where it was trained")
    if value.is_nested or value.layout != torch.strided:
        found = "a nested tensor" if value.is_nested else f"{value.layout}"
        raise InputError(place, "a dense tensor", found, "save it as .to_dense()")


def _check_values(place: str, value: Tensor, known: Tensor) -> None:
    """Raises InputError for what loads, and is then something else, or spoils the training."""
    kinds = [_kind(tensor) for tensor in (known, value)]
    if kinds[0] != kinds[1]:
        raise InputError(place, kinds[0], kinds[1], "see what the file was made of")
    try:
        taken = value.to(known.dtype)  # in which 1e300 may be infinity, and narrower types can be looked at
    except RuntimeError:
        expected = f"values that convert to {known.dtype}"
        raise InputError(place, expected, f"{value.dtype}", "save it in the network's own type") from None
    if taken.isnan().any() or (taken.isinf() & ~known.isinf()).any():
        expected = f"finite values of {known.dtype}"
        raise InputError(place, expected, "NaN or infinity", "take weights of a training that went well")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating point"
    return "complex numbers" if tensor.is_complex() else "truth values" if tensor.dtype == torch.bool else "integers"


def digest(loaded: dict[str, Tensor], half: nn.Module) -> str | None:
    """Of those of the loaded weights that are the half's; None where none is."""
    own = [name for name in half.state_dict() if name in loaded]
    if not own:
        return None
    found = hashlib.sha256()
    for name in sorted(own):
        found.update(name.encode() + loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _read(place: str, file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _refuse_compressed(f"{place} {file}", file)
        read = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(place, "a file of weights", f"none at {file}", "check the path") from None
    except InputError:
        raise
    except Exception as error:  # of either format, or pickle's of a file that holds more than tensors
        expected = "safetensors, or PyTorch's tensors alone"
        raise InputError(f"{place} {file}", expected, reason(error), "convert it") from None
    if isinstance(read, dict) and isinstance(read.get("state_dict"), dict):
        read = read["state_dict"]
    if not isinstance(read, dict) or not all(isinstance(value, Tensor) for value in read.values()):
        raise InputError(f"{place} {file}", "tensors by name", type(read).__name__, "save model.state_dict()")
    return {str(name): value for name, value in read.items()}


def _refuse_compressed(place: str, file: Path) -> None:
    """PyTorch writes its archives as they are, but reads compressed ones too: a few kilobytes may state gigabytes."""
    with file.open("rb") as content:
        if content.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(content) as archive:
            parts, size = archive.infolist(), file.stat().st_size
    if sum(part.file_size for part in parts) > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        expected, found = f"at most its own {size} bytes in it", "compressed or overlapping parts"
        raise InputError(place, expected, found, "save it with torch.save, or as safetensors")


def _take(model: nn.Module, state: dict[str, Tensor]) -> None:
    known = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in known and known[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)


def freeze(place: str, model: nn.Module, patterns: str) -> None:
    """Freezes the parameters whose names match one of the patterns, separated by commas, such as `stem.*, stage_1.*`.

    Raises InputError where a pattern matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    given = [pattern for pattern in map(str.strip, patterns.split(",")) if pattern]
    if not given:
        raise InputError(place, "patterns of names, separated by commas", repr(patterns), "leave it out to freeze none")
    for pattern in given:
        matching = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not matching:
            expected, remedy = f"parameters such as {', '.join(names[:3])}", near_miss(pattern, names, "check the name")
            raise InputError(place, expected, f"none that matches {pattern!r}", remedy)
        for name in matching:
            model.get_parameter(name).requires_grad_(False)
