"""Data module of shards, and runs that train on it."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from shard_writing import sample, write_shard, write_shards
from tiny_models import text_config

import main
from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]
CROP = [
    {"target": "torchvision.transforms.Resize", "params": {"size": 16, "interpolation": 3}},
    {"target": "torchvision.transforms.RandomCrop", "params": {"size": 16}},
]


def data_config(folder, **params):
    train = {"shards": "{00000..00002}.tar", "shuffle": 100, "image_key": "jpg", "image_transforms": CROP}
    validation = {"shards": "{00000..00000}.tar", "image_key": "jpg", "image_transforms": CROP}
    params = {
        "tar_base": str(folder),
        "batch_size": 4,
        "num_workers": 0,
        "multinode": True,
        "min_size": 200,
        "train": train,
        "validation": validation,
        **params,
    }
    return {"target": "ldm.data.laion.WebDataModuleFromConfig", "params": params}


def build(folder, **params):
    module = instantiate_from_config(data_config(folder, **params))
    module.prepare_data()
    module.setup()
    return module


def test_batches_have_the_published_entries(tmp_path):
    names = write_shards(tmp_path)
    module = build(tmp_path)
    batches = list(module.train_dataloader())
    assert [len(batch["txt"]) for batch in batches] == [4, 4, 4]
    first = batches[0]
    assert set(first) == {"__key__", "__url__", "jpg", "txt", "json"}
    assert first["jpg"].shape == (4, 16, 16, 3) and first["jpg"].dtype == torch.float32
    assert first["txt"] == [f"a caption of {key}" for key in first["__key__"]]
    assert first["json"][0]["key"] == first["__key__"][0] and first["json"][0]["error_message"] is None
    assert sorted(key for batch in batches for key in batch["__key__"]) == names


def test_entries_that_some_samples_lack_are_left_out_of_a_batch(tmp_path):
    write_shard(tmp_path / "00000.tar", {"a": {**sample("a"), "cls": b"3"}, "b": sample("b"), "c": sample("c")})
    module = build(tmp_path, train={"shards": "*.tar", "image_transforms": CROP}, batch_size=3)
    (batch,) = module.train_dataloader()
    assert "cls" not in batch and len(batch["json"]) == 3


def test_validation_has_its_own_batches_and_keeps_its_order(tmp_path):
    names = write_shards(tmp_path)
    module = build(tmp_path, val_batch_size=3, val_num_workers=0)
    for _ in range(2):
        assert [batch["__key__"] for batch in module.val_dataloader()] == [names[:3], names[3:4]]


def test_filters_hold_for_all_data_sets_and_can_be_set_for_one(tmp_path, caplog):
    write_shards(tmp_path)
    module = build(tmp_path, min_size=300, train={"shards": "*.tar", "image_transforms": CROP, "min_size": 100})
    assert len(list(module.train_dataloader())) == 3
    with pytest.raises(UserError, match="ImageShards returned no item; check its files and filters"):
        list(module.val_dataloader())
    assert "data.params.validation: 4 samples read, left out: 4 smaller than min_size 300" in caplog.messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"shards": "*.tar", "shufle": 3}}, 'has no parameter "shufle" .did you mean "shuffle"'),
        ({"tar_base": "absent"}, 'data.params.train: there is no folder "absent"'),
        ({"batch_size": 0}, "data.params.batch_size must be an integer of at least 1"),
    ],
)
def test_unsuitable_parameters_raise_user_error(change, message, tmp_path):
    write_shards(tmp_path)
    with pytest.raises(UserError, match=message):
        build(tmp_path, **change)


def test_shown_configuration_reads_shards(tmp_path, repo_root):
    page = (repo_root / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, flags=re.S) if "laion" in text)
    config = OmegaConf.to_container(OmegaConf.create(block))["data"]
    write_shard(tmp_path / "00331.tar", {str(i): sample(str(i), original_height=256) for i in range(8)})
    config["params"] |= {"tar_base": str(tmp_path), "num_workers": 0}
    config["params"]["train"]["shards"] = "{00331..00331}.tar"
    module = instantiate_from_config(config)
    module.setup()
    batches = list(module.train_dataloader())
    assert [batch["masked_image"].shape for batch in batches] == [(4, 512, 512, 3)] * 2


class TwoProcesses:
    world_size, global_rank, overfit_batches, limit_train_batches = 2, 1, 0, None


def test_several_processes_need_multinode(tmp_path):
    write_shards(tmp_path)
    module = build(tmp_path, multinode=False)
    module.trainer = TwoProcesses()
    with pytest.raises(UserError, match="multinode: false is for one process, and the run has 2"):
        module.train_dataloader()


def test_each_process_reads_its_own_samples(tmp_path):
    names = write_shards(tmp_path, shards=3, size=4)
    seen = []
    for rank in range(2):
        module = build(tmp_path)
        module.trainer = TwoProcesses()
        module.trainer.global_rank = rank
        loader = module.train_dataloader()
        loader.replicas = 1  # no other process takes part
        own = [key for batch in loader for key in batch["__key__"]]
        assert len(own) == 6
        seen += own
    assert sorted(seen) == names


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains a tiny model on shards and returns the exit status."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards")

    def start(*words, **data):
        model = text_config(first_stage_key="jpg", cond_stage_key="txt", monitor="val/loss_simple_ema", use_ema=True)
        config = {"model": {"base_learning_rate": 1e-4, **model}, "data": data_config(tmp_path / "shards", **data)}
        OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
        return main.main(["-b", "tiny.yaml", "-t", "-n", "shards", *QUIET, *words])

    return start


def last_checkpoint(folder):
    (path,) = folder.glob("logs/*_shards/checkpoints/last.ckpt")
    return path


def test_model_trains_on_shards_and_resumes(train, tmp_path, capsys):
    assert train("--max_epochs", "1", num_workers=1) == 0
    path = last_checkpoint(tmp_path)
    checkpoint = read_checkpoint(path)
    assert checkpoint["global_step"] == 3
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values() if value.is_floating_point())
    assert list(path.parent.glob("epoch=*.ckpt"))
    words = ["-r", str(path.parents[1]), "-t", *QUIET, "--max_epochs", "2"]
    assert main.main(words) == 0
    assert read_checkpoint(path)["global_step"] == 6


def test_number_of_steps_ends_a_run_in_the_middle_of_an_epoch(train, tmp_path):
    assert train("--max_steps", "2") == 0
    assert read_checkpoint(last_checkpoint(tmp_path))["global_step"] == 2


def test_run_without_any_usable_sample_is_an_error_of_one_line(train, capsys):
    assert train("--max_steps", "2", min_size=5000) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: data.params.validation: ImageShards returned no item; check its files and filters"]
