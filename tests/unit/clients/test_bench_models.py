"""The size of a KV block follows from a model's shape."""

from __future__ import annotations

import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import Place
from xferd.clients.bench._models import model_shape
from xferd.clients.bench._options import cases_of, parser


@pytest.mark.parametrize(
    ("text", "token_nbytes", "block_nbytes"),
    [
        ("layers=30,kv_heads=3,head_dim=64,dtype=fp32,page=1", 46_080, 1536),  # SmolLM2-135M
        ("layers=32,kv_heads=8,head_dim=128", 131_072, 65_536),  # 8B models with grouped queries
        ("layers=32,kv_heads=8,head_dim=128,tp=4,page=64", 32_768, 65_536),
        ("layers=61,latent=512,rope=64,page=64,tp=8", 70_272, 73_728),  # latent attention
    ],
)
def test_sizes_are_those_of_known_models(text, token_nbytes, block_nbytes):
    shape = model_shape(text)
    assert (shape.token_nbytes, shape.block_nbytes) == (token_nbytes, block_nbytes)
    assert str(token_nbytes) in str(shape)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layers=32",
        "layers=32,kv_heads=8,head_dim=x",
        "layers=0,kv_heads=8,head_dim=128",
        "layers=32,kv_heads=8,head_dim=128,dtype=fp3",
        "layers=32,kv_heads=8,head_dim=128,tp=3",
        "layers=32,kv_heads=8,head_dim=128,latent=512",
    ],
)
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(InvalidArgument):
        model_shape(text)


def test_a_shape_sets_the_block_size_of_a_sweep():
    arguments = ["--model-shape", "layers=32,kv_heads=8,head_dim=128", "--batch", "32,64"]
    moves = [case for case in cases_of(parser().parse_args(arguments)) if case.place is Place.LOCAL]
    assert [(case.block_nbytes, case.batch) for case in moves] == [(65_536, 32), (65_536, 64)]
    with pytest.raises(InvalidArgument, match="--block beside --model-shape"):
        cases_of(parser().parse_args([*arguments, "--block", "4KiB"]))
