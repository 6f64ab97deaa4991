"""Overrides of configuration values on the command line."""

from __future__ import annotations

from ldm.config.overrides import split_overrides


def test_overrides_are_separated_from_other_words():
    overrides = ["model.params.image_size=32", "data.params.train.target=a.B=c", "lightning.trainer.max-epochs=3"]
    others = ["-t", "--scale=3", "prompt", "a=b", "x.y", "../model.ckpt", "--base=a.b=c"]
    mixed = [word for pair in zip(others, [*overrides, *others[3:]], strict=True) for word in pair]
    found, rest = split_overrides(mixed)
    assert found == overrides and [word for word in mixed if word not in overrides] == rest


def test_removals_are_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["~data.params.latent_cache", "~lightning", "-n", "~a.b", "~/models", "~user/x.y", "~a.b=1", "~"]
    assert split_overrides(words, ["-n"]) == (words[:2], words[2:])
    (tmp_path / "~lightning").touch()
    assert split_overrides(words[:2]) == (words[:1], ["~lightning"])
