"""Classes of the data in the configuration of a model: the null class is added, and names are saved."""

from __future__ import annotations

import pytest
from images_on_disk import write
from omegaconf import OmegaConf
from tiny_models import class_config, text_config

import main
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.class_names import Classes
from ldm.training.classes import add_classes, check_same_classes, class_count, class_names_of, has_classes

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    """Leave informative log lines out, also after a test that asked for them."""
    caplog.set_level("WARNING", "ldm")


class Data:
    """Data set with the labels 0 to `count` - 1."""

    def __init__(self, count, names=()):
        self.labels, self.class_names = {"class_label": [0, *range(count)]}, names


class Wrapper:
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return index


class_names = ["cat", "dog"]
Data.__getitem__ = Wrapper.__getitem__


def changed(config, data):
    model = OmegaConf.create(config)
    add_classes(model, data)
    return model.params


@pytest.mark.parametrize("data", [Data(2), Wrapper(Data(2))])
def test_null_class_is_added_to_the_classes_of_the_data(data, caplog):
    caplog.set_level("INFO", "ldm")
    params = changed(class_config(2, cond_dropout=0.1), data)
    assert params.cond_stage_config.params.n_classes == 3
    assert caplog.messages == [
        "n_classes of the model is 3: the 2 classes of the data and the null class of cond_dropout"
    ]


@pytest.mark.parametrize(
    ("labels", "dropout", "count"), [(3, 0.1, 2), (1001, 0.1, 1000), (2, 0.0, 2), (1000, 0.0, 1000), (9, 0.1, 2)]
)
def test_sufficient_number_of_labels_stays(labels, dropout, count):
    params = changed(class_config(labels, cond_dropout=dropout), Data(count))
    assert params == OmegaConf.create(class_config(labels, cond_dropout=dropout)).params


@pytest.mark.parametrize(("dropout", "expected"), [(0.1, 3), (0.0, 2)])
def test_number_that_is_not_stated_follows_the_named_classes(dropout, expected):
    config = class_config(2, cond_dropout=dropout)
    del config["params"]["cond_stage_config"]["params"]["n_classes"]
    assert changed(config, Data(2, class_names)).cond_stage_config.params.n_classes == expected
    assert "n_classes" not in changed(config, Data(2)).cond_stage_config.params, "the published default stays"


def test_labels_of_the_unet_get_a_null_class():
    config = text_config(cond_stage_key="class_label", cond_dropout=0.1, conditioning_key="adm")
    config["params"]["cond_stage_config"] = {"target": "torch.nn.Identity"}
    config["params"]["unet_config"]["params"]["num_classes"] = 4
    assert changed(config, Data(4)).unet_config.params.num_classes == 5


@pytest.mark.parametrize(("dropout", "needed"), [(0.1, 6), (0.0, 5)])
def test_too_few_labels_raise_user_error(dropout, needed):
    with pytest.raises(UserError) as raised:
        changed(class_config(3, cond_dropout=dropout), Data(5))
    assert str(raised.value) == f"n_classes of the model is 3, and the data has 5 classes; set n_classes to {needed}"


def test_names_of_the_data_are_saved(caplog):
    params = changed(class_config(3, cond_dropout=0.1), Data(2, class_names))
    assert params.class_names == class_names
    classes = Classes.of(ModelInfo("x", {"params": OmegaConf.to_container(params)}))
    assert (classes.count, classes.guidable, classes.parse(["dog"])) == (2, True, [1])
    assert changed(class_config(3, class_names=class_names), Data(2, class_names)).class_names == class_names
    assert not caplog.records


def test_other_names_are_a_warning(caplog):
    params = changed(class_config(3, class_names=["dog", "cat"]), Data(2, class_names))
    assert params.class_names == ["dog", "cat"]
    (message,) = caplog.messages
    assert message.startswith(
        "class_names of the model differ from those of the data (dog, cat and cat, dog); sampling"
    )


def test_models_without_classes_are_not_changed():
    assert has_classes(OmegaConf.create(class_config()))
    assert not has_classes(OmegaConf.create(text_config()))
    assert not has_classes(OmegaConf.create({**class_config(), "target": "mine.Model"}))
    assert (class_count(object()), class_names_of(object())) == (0, [])


def test_data_sets_with_other_classes_raise_user_error():
    check_same_classes({"train": Data(2, class_names), "validation": Wrapper(Data(2, class_names)), "test": Data(9)})
    with pytest.raises(UserError) as raised:
        check_same_classes({"train": Data(2, class_names), "validation": Data(1, ["dog"])})
    assert str(raised.value) == (
        "data.params.validation has other classes than data.params.train (1 and 2; cat); set class_names of both to "
        "one file"
    )


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cats/a.png", "cats/b.png", "dogs/c.png", "dogs/d.png")):
        write(tmp_path / "images" / name, height=16, width=16, seed=number)
    return tmp_path


def test_run_on_class_folders_saves_its_classes_and_resumes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    data = {"target": "ldm.data.folder.FolderTrain", "params": {"data_root": "images", "size": 16, "label": "folder"}}
    config = {
        "model": {"base_learning_rate": 1e-4, **class_config(2, cond_dropout=0.5)},
        "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, "train": data}},
    }
    OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
    assert main.main(["-b", "tiny.yaml", "-t", "--max_epochs", "1", *QUIET]) == 0
    (run,) = (folder / "logs").iterdir()
    (saved,) = run.glob("configs/*-project.yaml")
    params = OmegaConf.load(saved).model.params
    assert params.cond_stage_config.params.n_classes == 3 and params.class_names == ["cats", "dogs"]
    assert main.main(["-b", "tiny.yaml", "-t", "--resume", str(run), "--max_epochs", "2", *QUIET]) == 0
