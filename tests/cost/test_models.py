"""The one list of models."""

import pytest

from hcp_jax.cost.models import MODELS, model_fields, model_shape
from hcp_jax.cost.shape import ModelShape
from hcp_jax.models.config import from_fields

WITHOUT_GATE = "gpt-12x2048"
# Billions of parameters, as published.
PUBLISHED = {
    "llama2-7b": 6.74,
    "llama3-8b": 8.03,
    "llama3-70b": 70.6,
    "llama3-405b": 405.8,
    "qwen3-0.6b": 0.6,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "mixtral-8x7b": 46.7,
    "gemma3-27b": 27.0,  # without its vision tower
}
# Those of which a config does not say all, and their billions of parameters in a token's products.
COUNTED = {
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "marin-535b-a23b": (535.3, 22.76),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_are_configs_of_the_published_size(name):
    config = from_fields(model_fields(name))
    assert config.head_dim == 128
    assert ModelShape.from_config(config) == model_shape(name.upper()) == model_shape(config)
    assert model_shape(name).params == pytest.approx(PUBLISHED[name] * 1e9, rel=0.01)


def test_every_model_of_the_list_is_checked_here():
    assert set(MODELS) == {*PUBLISHED, *COUNTED, WITHOUT_GATE}


@pytest.mark.parametrize("name", COUNTED)
def test_what_cannot_be_computed_has_the_published_counts_and_no_config(name):
    shape, (whole, active) = model_shape(name), COUNTED[name]
    assert shape.params == pytest.approx(whole * 1e9, rel=0.01)
    # gpt-oss counts the output head among a token's weights, marin does not.
    head = shape.head_params if "gpt" in name else 0
    assert shape.layers_params + head == pytest.approx(active * 1e9, rel=0.02)
    with pytest.raises(NotImplementedError, match="its experts"):
        model_fields(name)
    config = from_fields(MODELS[name])  # as far as a config can say
    assert ModelShape.from_config(config) == shape


def test_a_model_without_a_gate_has_a_shape_but_no_config():
    shape = model_shape(WITHOUT_GATE)
    assert shape.layer_params == 12 * 2048**2
    with pytest.raises(NotImplementedError, match="its MLP has no gate"):
        model_fields(WITHOUT_GATE)


def test_what_is_returned_is_a_copy():
    model_fields("llama3-8b")["num_layers"] = 1
    assert model_fields("llama3-8b")["num_layers"] == 32


def test_an_unknown_model_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llama3-8b'"):
        model_shape("llama3-8")
