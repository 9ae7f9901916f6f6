"""Block sizes from the shape of a model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from xferd.api.errors import InvalidArgument

DTYPE_NBYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
_FIELDS = "layers, kv_heads and head_dim (or latent and rope), dtype, page, tp"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a token of a model's KV cache consists of.

    Attributes:
        layers: of the model.
        values: numbers a token and layer on one worker: keys and values of its heads, or the latent ones of MLA.
        value_nbytes: bytes of one.
        page: tokens a block.
    """

    layers: int
    values: int
    value_nbytes: int
    page: int

    @property
    def token_nbytes(self) -> int:
        """Bytes a token, all layers."""
        return self.layers * self.values * self.value_nbytes

    @property
    def block_nbytes(self) -> int:
        """Bytes a block: a page of tokens of one layer."""
        return self.page * self.values * self.value_nbytes

    def __str__(self) -> str:
        return (
            f"{self.token_nbytes} bytes a token in {self.layers} layers; "
            f"{self.block_nbytes} bytes a block of {self.page} tokens of one layer"
        )


def model_shape(text: str) -> ModelShape:
    """Return the shape that a text like ``layers=32,kv_heads=8,head_dim=128,dtype=bf16,page=16,tp=2`` describes.

    A model with multi-head latent attention gives ``latent`` and ``rope`` in place of ``kv_heads`` and ``head_dim``;
    its latent values are not split among workers. ``dtype`` is bf16, ``page`` 16 and ``tp`` 1 unless given.

    Raises:
        InvalidArgument: a field that is unknown, missing or no number, or heads that ``tp`` does not divide.
    """
    given = dict(part.partition("=")[::2] for part in text.split(",") if part)
    dtype = given.pop("dtype", "bf16")
    if dtype not in DTYPE_NBYTES:
        raise InvalidArgument(f"dtype {dtype!r}", limit=", ".join(DTYPE_NBYTES), remedy="choose one of these")
    numbers = {"page": 16, "tp": 1} | {name: _number(name, value) for name, value in given.items()}
    page, tp = numbers.pop("page"), numbers.pop("tp")
    match sorted(numbers):
        case ["head_dim", "kv_heads", "layers"]:
            if numbers["kv_heads"] % tp:
                raise InvalidArgument(
                    f"{numbers['kv_heads']} KV heads on {tp} workers", remedy="choose a tp that divides them"
                )
            values = 2 * numbers["kv_heads"] // tp * numbers["head_dim"]
        case ["latent", "layers", "rope"]:
            values = numbers["latent"] + numbers["rope"]
        case known:
            raise InvalidArgument(f"a model with {', '.join(known)}", limit=_FIELDS, remedy="give all of these")
    return ModelShape(numbers["layers"], values, DTYPE_NBYTES[dtype], page)


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise InvalidArgument(f"{name}={value!r}", limit="numbers of at least 1", remedy=f"the fields are {_FIELDS}")
    return int(value)
