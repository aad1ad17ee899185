"""Configs that come with the package are found by name."""

import pytest

from hcp_jax.base import shipped
from hcp_jax.train import config


def test_a_name_finds_its_config_from_any_folder_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in shipped.names()
    assert config.load("quickstart") == config.load(shipped.folder() / "quickstart.yaml")
    (tmp_path / "quickstart").write_text("steps: 7")
    assert config.load("quickstart").steps == 7


def test_what_is_neither_is_told_with_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in ("quickstrat", "configs/quickstart.yaml", "../quickstart"):
        with pytest.raises(FileNotFoundError, match=r"no config '.*a2a, .*quickstart"):
            config.load(wrong)
