"""All errors of a configuration are reported together, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_models import class_config, inpainting_config, map_config, text_config, unconditional_config

import main
from ldm.config.channels import channel_faults
from ldm.errors import ErrorCollector, UserError, UserErrors
from ldm.training.configuration_check import configuration_faults

ROOT = Path(__file__).parents[2]
UNET, STAGE = "model.params.unet_config.params", "model.params.first_stage_config"
EMOJI = {"target": "ldm.data.emoji.EmojiTrain", "params": {"size": 16}}
CONFIGURATIONS = sorted(
    path
    for pattern in ("configs/**/*.yaml", "models/**/config.yaml")
    for path in ROOT.glob(pattern)
    if "\n  target:" in path.read_text(encoding="utf-8").partition("\ndata:")[0]
)


def full_config(model=None):
    params = {"batch_size": 2, "num_workers": 0, "train": dict(EMOJI)}
    data = {"target": "main.DataModuleFromConfig", "params": params}
    return {"model": {"base_learning_rate": 1e-4, **(model or text_config())}, "data": data}


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Return `train(*words)`, which starts a run of a tiny model and returns its error lines; it must write nothing."""
    monkeypatch.chdir(tmp_path)

    def start(*words):
        OmegaConf.save(OmegaConf.create(full_config()), "tiny.yaml")
        assert main.main(["-b", "tiny.yaml", "-t", "--max_steps", "1", *words]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
        return capsys.readouterr().err.splitlines()

    return start


FAULTS = [
    ("unknown key of the model", ["model.params.cond_stage_kye=caption"], '(did you mean "cond_stage_key"?)'),
    ("unknown key of the network", [f"{UNET}.num_res_block=1"], '"num_res_block" (did you mean "num_res_blocks"?)'),
    ("unknown key of the data", ["data.params.train.params.sise=8"], '"sise" (did you mean "size"?)'),
    ("unknown key of the first stage", [f"{STAGE}.params.ddconfig.ch_mlut=1"], '"ch_mlut" (did you mean "ch_mult"?)'),
    ("unreachable module", ["data.params.train.target=ldm.data.emojy.EmojiTrain"], '"ldm.data.emojy"'),
    ("unreachable class", [f"{STAGE}.target=ldm.models.autoencoder.AutoencoderLK"], '(did you mean "AutoencoderKL"?)'),
    ("missing weights", [f"{STAGE}.params.ckpt_path=nowhere.ckpt"], 'there is no file or folder "nowhere.ckpt"'),
    ("missing vocabulary", ["model.params.cond_stage_config.params.vocab=nowhere.txt"], '"nowhere.txt"; check'),
    ("latents of another width", [f"{STAGE}.params.embed_dim=4"], "embed_dim is 4, and the U-Net and model.params"),
    ("input of the network", [f"{UNET}.in_channels=4"], f"{UNET}.in_channels is 4 and does not fit the first stage"),
    ("width of the context", [f"{UNET}.context_dim=64"], "context_dim is 64 and the conditioning has 32 channels"),
    ("unknown argument of the trainer", ["lightning.trainer.max_stesp=1"], '"max_stesp" (did you mean "max_steps"?)'),
    ("missing value", ["model.params.ignore_keys=???"], "needs a value for model.params.ignore_keys"),
    ("text for a number", ["data.params.batch_size=many"], "needs a number as \"batch_size\", got: 'many'"),
    ("unknown role of a stage", ["model.params.cond_stage_config=__is_frist_stage__"], 'mean "__is_first_stage__"?'),
]


@pytest.mark.parametrize(("words", "cause"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_last_line_names_the_cause(words, cause, train):
    lines = train(*words)
    assert lines[-1].startswith("error: ") and cause in lines[-1], lines
    assert sum(line.startswith("error: ") for line in lines) == 1


def test_independent_errors_are_reported_together(train):
    lines = train(
        "model.params.cond_stage_kye=caption",
        f"{UNET}.in_channels=4",
        f"{STAGE}.params.ckpt_path=nowhere.ckpt",
        "data.params.train.target=ldm.data.emoji.EmojiTrian",
        "data.params.batchsize=3",
        "lightning.trainer.max_stpes=1",
        "lightning.trainer.presicion=32",
    )
    keys = ['"max_stpes"', '"presicion"', "cond_stage_kye", '"batchsize"']
    causes = [*keys, "nowhere.ckpt", "EmojiTrian", "in_channels is 4"]
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == len(causes)
    assert all(any(cause in line for line in lines) for cause in causes)


def test_values_and_callbacks_are_reported_with_the_model(train):
    lines = train(
        f"{UNET}.in_channels=4",
        "model.base_learning_rate=fast",
        "lightning.callbacks.image_logger.params.batch_freq=3",
    )
    assert len(lines) == 3
    assert "base_learning_rate" in lines[0] and "in_channels is 4" in lines[1] and "batch_freq" in lines[2]


def test_errors_of_several_files_are_reported_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("modle: {}\n")
    OmegaConf.save(OmegaConf.create(full_config()), "tiny.yaml")
    assert main.main(["-b", "tiny.yaml", "other.yaml", "nowhere.yaml", "-t"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "modle" in lines[0] and "nowhere.yaml" in lines[1]


@pytest.mark.parametrize("config", [text_config, class_config, unconditional_config, inpainting_config, map_config])
def test_valid_models_have_no_faults(config):
    assert list(configuration_faults(full_config(config()))) == []


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=[str(path.relative_to(ROOT)) for path in CONFIGURATIONS])
def test_shipped_configurations_lack_nothing_but_files(path):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    config = config if isinstance(config.get("model"), dict) and "target" in config["model"] else {}
    faults = [fault for fault in configuration_faults(config) if "there is no file or folder" not in fault]
    assert faults == []


def test_channels_of_a_concatenated_conditioning_are_counted():
    for config, channels in ((inpainting_config(), 7), (map_config(), 6), (unconditional_config(), 3)):
        config["params"]["unet_config"]["params"]["in_channels"] = 5
        (fault,) = channel_faults(config)
        assert fault.endswith(f"set {channels}"), fault


@pytest.mark.parametrize(("key", "value"), [("out_channels", 4), ("in_channels", 9)])
def test_a_single_number_of_the_network_that_does_not_fit_is_named(key, value):
    config = text_config()
    config["params"]["unet_config"]["params"][key] = value
    (fault,) = channel_faults(config)
    assert fault.startswith(f"model.params.unet_config.params.{key} is {value} and does not fit")
    (fault,) = channel_faults(text_config(channels=5))
    assert fault.startswith("model.params.channels is 5 and does not fit")


def test_channels_of_the_images_are_compared():
    stage = text_config()["params"]["first_stage_config"]
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 0}}
    stage["params"] |= {"lossconfig": loss, "ddconfig": {**stage["params"]["ddconfig"], "in_channels": 1, "out_ch": 1}}
    (fault,) = channel_faults(stage)
    assert fault.endswith("set disc_in_channels: 1")
    stage["params"]["ddconfig"]["out_ch"] = 3
    assert "out_ch is 3 and in_channels is 1" in next(channel_faults(stage))


def test_parts_of_other_packages_are_not_compared():
    config = text_config()
    config["params"]["first_stage_config"]["target"] = "mine.Autoencoder"
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    assert list(channel_faults(config)) == []


def test_collector_raises_one_or_several_errors():
    errors = ErrorCollector()
    errors.check()
    with errors.collecting():
        raise UserError("one")
    with pytest.raises(UserError, match=r"^one$") as raised:
        errors.check()
    assert not isinstance(raised.value, UserErrors)
    with errors.collecting():
        raise UserErrors(["two", "one"])
    with pytest.raises(UserErrors) as several:
        errors.check()
    assert several.value.messages == ("one", "two")
