from __future__ import annotations

import os

import pytest

from mixtral.threads import CALM, calm_idle_threads


def test_a_users_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = CALM
    monkeypatch.setenv(name, "7")
    calm_idle_threads()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    calm_idle_threads()
    assert os.environ[name] == CALM[name]
