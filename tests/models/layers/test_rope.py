import math

import jax.numpy as jnp
import numpy as np
import pytest

from hcp_jax.models.layers.rope import RopeScaling, Rotation, rotate, rotation

H, THETA = 16, 10_000.0
LINEAR = RopeScaling("linear", 4.0)
LLAMA3 = RopeScaling("llama3", 8.0, original_max_position_embeddings=64)
YARN = RopeScaling("yarn", 16.0, original_max_position_embeddings=2048)
BETWEEN = RopeScaling("yarn", 16.0, original_max_position_embeddings=2048, truncate=False)


def frequencies_by_the_book(scaling):
    """One pair at a time, in Python floats, as the papers and configs state them."""
    result = []
    for i in range(H // 2):
        f = THETA ** (-2 * i / H)
        if scaling is None:
            pass
        elif scaling.kind == "linear":
            f = f / scaling.factor
        elif scaling.kind == "llama3":
            context, wavelength = scaling.original_max_position_embeddings, 2 * math.pi / f
            if wavelength > context / scaling.low_freq_factor:
                f = f / scaling.factor
            elif wavelength > context / scaling.high_freq_factor:
                smooth = context / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                f = (1 - smooth) * f / scaling.factor + smooth * f
        else:
            context = scaling.original_max_position_embeddings
            pair = [
                H * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(THETA))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            ]
            if scaling.truncate:
                pair = [math.floor(pair[0]), math.ceil(pair[1])]
            low, high = max(pair[0], 0), min(pair[1], H - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            f = f / scaling.factor * ramp + f * (1 - ramp)
        result.append(f)
    return result


def rotated_by_the_book(x, positions, scaling):
    y = np.array(x, np.float64)
    factor = 0.1 * math.log(scaling.factor) + 1 if scaling and scaling.kind == "yarn" else 1.0
    for t, position in enumerate(positions):
        for i, f in enumerate(frequencies_by_the_book(scaling)):
            turn = np.exp(1j * position * f) * factor
            pair = (x[0, t, :, i] + 1j * x[0, t, :, i + H // 2]) * turn
            y[0, t, :, i], y[0, t, :, i + H // 2] = pair.real, pair.imag
    return y


@pytest.mark.parametrize(
    "scaling",
    [None, LINEAR, LLAMA3, YARN, BETWEEN],
    ids=["none", "linear", "llama3", "yarn", "yarn-between"],
)
def test_rotation_follows_the_formula_in_float64(scaling):
    positions = np.array([0, 1, 2, 63, 500, 1023, 1024, 4097, 5], np.int32)
    x = np.random.default_rng(0).normal(size=(1, positions.size, 2, H))
    turn = rotation(jnp.asarray(positions)[None], H, THETA, scaling)
    out = rotate(jnp.asarray(x, jnp.float32), turn)
    np.testing.assert_allclose(out, rotated_by_the_book(x, positions, scaling), atol=2e-4)
    near = positions < 64
    error = np.abs(out - rotated_by_the_book(x, positions, scaling))[:, near]
    assert error.max() < 1e-5


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_scalings_keep_fast_pairs_stretch_slow_ones_and_blend_between(scaling):
    ratio = np.array(frequencies_by_the_book(scaling)) / frequencies_by_the_book(None)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / scaling.factor)
    assert np.any((ratio < 0.99) & (ratio > 1.01 / scaling.factor))


def test_angles_stay_exact_at_a_million_tokens():
    positions = np.array([2**20 - 1, 2**20, 1_234_567], np.int32)
    turn = rotation(jnp.asarray(positions)[None], H, THETA)
    angle = positions[:, None].astype(np.float64) * frequencies_by_the_book(None)
    np.testing.assert_allclose(turn.cos[0, :, 0], np.cos(angle), atol=1e-3)
    np.testing.assert_allclose(turn.sin[0, :, 0], np.sin(angle), atol=1e-3)


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, H))

    def score(i, j):
        turns = [rotation(jnp.full((1, 1), p, jnp.int32), H, THETA, YARN) for p in (i, j)]
        rotated = [rotate(jnp.asarray(x), turn) for x, turn in zip((q, k), turns, strict=True)]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(7, 3) == pytest.approx(score(3007, 3003), abs=1e-3)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2


def test_rotation_is_applied_in_float32_whatever_the_input():
    turn = Rotation(jnp.full((1, 1, 1, 1), 0.6), jnp.full((1, 1, 1, 1), 0.8))
    x = jnp.asarray([[[[3.0, 1.0]]]], jnp.bfloat16)
    exact = np.array([3 * 0.6 - 0.8, 0.6 + 3 * 0.8])
    out = rotate(x, turn)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0, 0, 0], exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "ntk", "factor": 2.0}, "linear, llama3, yarn or longrope"),
        ({"kind": "linear", "factor": 0.5}, "at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        (
            {
                "kind": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "low_freq_factor": 4.0,
            },
            "high_freq_factor > low_freq_factor",
        ),
    ],
)
def test_impossible_scalings_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        RopeScaling(**arguments)
