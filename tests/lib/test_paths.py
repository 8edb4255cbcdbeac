"""Where things are kept."""

import pwd

from lib.paths import ROOT, user_cache


def test_a_user_without_a_home_has_a_cache_too(monkeypatch):
    """An ordinary case in containers: no HOME, and a number that no file of users knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(user_cache()) == "/somewhere/kablate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert str(user_cache()) == "/home/ada/.cache/kablate"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert user_cache() == ROOT / ".cache"
