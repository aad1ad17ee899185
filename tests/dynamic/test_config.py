"""What cannot be is refused as a config is read, in words that say what can."""

import pytest

from hcp_jax.dynamic.config import DynamicConfig


def config(**words):
    return DynamicConfig(enabled=True, **{"max_tokens_per_device": 64, **words})


def test_megatrons_word_is_understood():
    words = {"max_tokens_per_device": None, "max_seqlen_per_dp_cp_rank": 96}
    assert config(**words).tokens == config(max_tokens_per_device=96).tokens == 96


def test_what_is_not_enabled_need_not_be_complete():
    assert DynamicConfig(max_tokens_per_device=None).enabled is False
    with pytest.raises(ValueError, match="max_tokens_per_device must be at least 1, got -1"):
        DynamicConfig(max_tokens_per_device=-1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_tokens_per_device": None}, "needs max_tokens_per_device.*neither is given"),
        ({"max_seqlen_per_dp_cp_rank": 32}, "both are given, and differ"),
        ({"max_tokens_per_device": 0}, "max_tokens_per_device must be at least 1, got 0"),
        ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
        ({"max_cp_size": 0}, "max_cp_size must be at least 1, got 0"),
        ({"menu": 0}, "menu must be at least 1, got 0"),
        ({"menu": []}, "menu holds no width"),
    ],
)
def test_values_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        config(**words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"menu": [8, 3]}, "dynamic.menu has the width 3; programs may have 1, 2, 4, 8 devices"),
        ({"menu": [8, 4], "max_cp_size": 4}, "dynamic.menu has the width 8; programs may have"),
        ({"min_cp_size": 4, "max_cp_size": 2}, "min_cp_size=4 is more than max_cp_size=2"),
        ({"min_cp_size": 5, "max_cp_size": 6}, "no program has a width from min_cp_size=5 to"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        config(**words).check_sizes(8)
