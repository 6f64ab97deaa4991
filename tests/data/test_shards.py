"""Streams of shards: names, samples, filters, shares, and data that cannot be read."""

import io
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from file_server import Answer, running
from images_on_disk import pixels
from shard_writing import encoded, sample, write_shard, write_shards

from ldm.config import targets
from ldm.config.instantiate import instantiate_from_config
from ldm.data import shards
from ldm.data.shard_files import expand, find_shards
from ldm.data.shards import ImageShards, shuffled
from ldm.errors import UserError
from ldm.training.loader import ResumableLoader, StreamWorkerInit

NAME = "data.params.train"


def stream(folder, pattern="*.tar", **params):
    return ImageShards(pattern, str(folder), name=NAME, **params)


def keys(dataset):
    return [item["__key__"] for item in dataset]


def rewrite(path, change):
    """Write a shard again with members that `change(name, content)` returns; None leaves one out."""
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            changed = change(name, content)
            if changed is not None:
                info = tarfile.TarInfo(name)
                info.size = len(changed)
                archive.addfile(info, io.BytesIO(changed))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{000000..000002}.tar", ["000000.tar", "000001.tar", "000002.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{03..01}", ["03", "02", "01"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("{odd}.tar", ["{odd}.tar"]),
    ],
)
def test_braces_stand_for_several_names(pattern, names):
    assert expand(pattern) == names


def test_published_pattern_stands_for_all_shards():
    names = expand("{000000..231317}.tar")
    assert (len(names), names[0], names[-1]) == (231318, "000000.tar", "231317.tar")


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_too_many_names_are_an_error(pattern):
    with pytest.raises(UserError, match="stands for more than 10,000,000 shards"):
        expand(pattern)


def test_items_have_the_published_entries(tmp_path):
    write_shards(tmp_path, shards=1, size=2)
    first, second = stream(tmp_path)
    assert set(first) == {"__key__", "__url__", "jpg", "txt", "json"}
    assert first["__key__"] == "000000000" and first["__url__"] == str(tmp_path / "00000.tar")
    assert first["jpg"].shape == (24, 36, 3) and first["jpg"].dtype == torch.float32
    assert second["txt"] == "a caption of 000000001"
    assert second["json"]["original_width"] == 360 and second["json"]["error_message"] is None


def test_pixels_are_those_of_torchvision(tmp_path):
    from torchvision.transforms.functional import to_tensor

    write_shard(tmp_path / "0.tar", {"a": {**sample("a"), "png": encoded(kind="PNG")}})
    (item,) = stream(tmp_path, image_key="png")
    expected = to_tensor(pixels()) * 2.0 - 1.0
    assert torch.equal(item["png"], expected.permute(1, 2, 0))
    every = np.arange(256, dtype=np.uint8)[None, :, None]
    assert torch.equal(torch.from_numpy(shards.to_values(every)), (to_tensor(every) * 2.0 - 1.0).permute(1, 2, 0))


def test_grey_images_have_one_channel(tmp_path):
    write_shards(tmp_path, shards=1, size=1)
    (item,) = stream(tmp_path, image_transforms=[{"target": "torchvision.transforms.Grayscale"}])
    assert item["jpg"].shape == (24, 36, 1)


def test_transforms_are_applied_in_order(tmp_path):
    write_shards(tmp_path, shards=1, size=1)
    transforms = [
        {"target": "torchvision.transforms.Resize", "params": {"size": 16, "interpolation": 3}},
        {"target": "torchvision.transforms.CenterCrop", "params": {"size": 12}},
    ]
    (item,) = stream(tmp_path, image_transforms=transforms)
    assert item["jpg"].shape == (12, 12, 3) and item["jpg"].abs().max() <= 1


def test_large_jpegs_are_decoded_at_a_reduced_size_on_request(tmp_path):
    write_shard(tmp_path / "0.tar", {"a": {**sample("a"), "jpg": encoded(400, 600)}})
    sides = {None: (400, 600, 3), 100: (100, 150, 3), 101: (200, 300, 3)}
    for side, shape in sides.items():
        assert next(iter(stream(tmp_path, draft_side=side)))["jpg"].shape == shape


@pytest.mark.parametrize("name", ["Lambda", "Compose", "functional.resize", "ToTensor"])
def test_other_names_of_torchvision_are_refused(name):
    with pytest.raises(UserError, match="is refused"):
        instantiate_from_config({"target": f"torchvision.transforms.{name}"})


def test_shards_of_webdataset_are_read(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write(
                {"__key__": f"dir/{number:03}", "jpg": pixels(seed=number), "txt": f"text {number}", "cls": number}
            )
    items = list(stream(tmp_path))
    assert [(item["__key__"], item["txt"], item["cls"]) for item in items] == [
        (f"dir/{number:03}", f"text {number}", number) for number in range(7)
    ]


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_never_loaded(tmp_path, caplog):
    array = io.BytesIO()
    np.save(array, np.arange(3))
    bomb = io.BytesIO()
    np.save(bomb, np.array([Bomb()], dtype=object), allow_pickle=True)
    harmless = {**sample("a"), "pyd": pickle.dumps(Bomb()), "pth": b"zip", "npy": array.getvalue()}
    write_shard(tmp_path / "0.tar", {"a": harmless, "b": {**sample("b"), "npy": bomb.getvalue()}})
    with caplog.at_level(logging.INFO):
        (item,) = stream(tmp_path, max_unreadable=0.5)
    assert set(item) == {"__key__", "__url__", "jpg", "txt", "json", "npy"}
    assert item["npy"].tolist() == [0, 1, 2]
    assert f"{NAME}: files .pth, .pyd of the shards are not read" in caplog.messages


@pytest.mark.parametrize(
    ("base", "pattern", "message"),
    [
        ("pipe:aws s3 cp s3://bucket", "{0..9}.tar -", "runs a shell command"),
        ("s3://bucket", "{0..9}.tar", 'cannot read "s3://bucket/0.tar"; give a folder, or an address with https://'),
        ("https:///x", "0.tar", "is not a web address"),
        ("absent", "{0..9}.tar", 'there is no folder "absent"; check tar_base and shards'),
        (".", "*.tar", "no file matches"),
    ],
)
def test_addresses_that_cannot_be_read_are_an_error_of_one_line(base, pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        find_shards(pattern, base, NAME, 0.01)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", [None, 5, "", [], ["0.tar", None]])
def test_shards_without_a_pattern_raise_user_error(pattern, tmp_path):
    with pytest.raises(UserError, match=r'^data.params.train: shards must be a pattern such as "\{00000..00331\}.tar"'):
        stream(tmp_path, pattern)


def test_commands_run_only_if_they_are_allowed(tmp_path):
    write_shards(tmp_path, shards=1, size=3)
    mark = tmp_path / "mark"
    command = f"pipe:touch {mark}; cat {tmp_path}/00000.tar"
    with pytest.raises(UserError, match="give --allow-target pipe"):
        ImageShards(command, name=NAME)
    assert not mark.exists()
    with targets.allowing("pipe"):
        dataset = ImageShards(command, name=NAME)
    assert keys(dataset) == ["000000000", "000000001", "000000002"] and mark.exists()


def test_command_that_fails_is_named(tmp_path, caplog):
    write_shards(tmp_path, shards=1, size=3)
    with targets.allowing("pipe"):
        dataset = ImageShards(f"pipe:cat {tmp_path}/00000.tar; exit 3", name=NAME, max_unreadable=1)
    assert len(keys(dataset)) == 3
    assert "the command failed with exit status 3" in caplog.text


@pytest.fixture
def server():
    with running() as server:
        yield server


def test_shards_are_read_from_a_server(tmp_path, server, caplog):
    names = write_shards(tmp_path, shards=2, size=3)
    server.files = {f"/set/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    dataset = ImageShards("{00000..00001}.tar", f"{server.url}/set", name=NAME)
    assert keys(dataset) == names and not caplog.messages
    del server.files["/set/00000.tar"]
    assert keys(dataset) == keys(dataset) == names[3:]
    assert caplog.messages == [f'{NAME}: skipping damaged data: "{server.url}/set/00000.tar" HTTP Error 404: Not Found']


def test_connection_that_ends_early_keeps_the_samples_before(tmp_path, server, caplog):
    names = write_shards(tmp_path, shards=1, size=3)
    server.files = {"/00000.tar": (tmp_path / "00000.tar").read_bytes()}
    dataset = ImageShards("00000.tar", server.url, name=NAME)
    server.answers = [Answer(cut=server.files["/00000.tar"].index(f"{names[2]}.jpg".encode()) + 700)]
    assert keys(dataset) == names[:2]
    assert names[2] in caplog.messages[0] and "skipping damaged data" in caplog.messages[0]


def test_absent_shards_are_named_and_left_out(tmp_path, caplog):
    names = write_shards(tmp_path, shards=3, size=2)
    assert keys(stream(tmp_path, "{00000..00003}.tar", max_unreadable=0.25)) == names
    assert caplog.messages == [
        f"{NAME}: 1 of 4 shards do not exist: {tmp_path}/00003.tar; they are left out",
    ]
    with pytest.raises(UserError, match=r"^data.params.train: 97 of 100 shards do not exist: .*; correct the range"):
        stream(tmp_path, "{00000..00099}.tar")


def test_damaged_image_is_named_once_skipped_and_counted(tmp_path, caplog):
    names = write_shards(tmp_path, shards=2, size=4)
    bad = names[2]
    rewrite(tmp_path / "00000.tar", lambda name, data: b"\xff\xd8\xff junk" if name == f"{bad}.jpg" else data)
    dataset = stream(tmp_path, max_unreadable=0.2)
    good = [name for name in names if name != bad]
    assert keys(dataset) == good
    reason = f'"{tmp_path}/00000.tar: {bad}" it is not an image, or is damaged'
    expected = [f"{NAME}: skipping damaged data: {reason}", f"{NAME}: 8 samples read, left out: 1 damaged"]
    assert caplog.messages == expected
    assert keys(dataset) == good and caplog.messages == expected


def test_too_many_damaged_samples_stop_the_run_before_training(tmp_path):
    names = write_shards(tmp_path, shards=1, size=4)
    rewrite(tmp_path / "00000.tar", lambda name, data: data[:50] if name == f"{names[1]}.jpg" else data)
    with pytest.raises(
        UserError, match=r"1 of 4 samples read at the start are damaged, more than max_unreadable \(0.01\)"
    ):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "content", "reason"),
    [
        ("txt", b"caf\xe9", "is not valid UTF-8"),
        ("json", b'{"width": ', "Expecting value"),
        ("json", b"[" * 100_000, "recursion"),
    ],
)
def test_other_damaged_files_skip_their_sample(suffix, content, reason, tmp_path, caplog):
    names = write_shards(tmp_path, shards=1, size=3)
    rewrite(tmp_path / "00000.tar", lambda name, data: content if name == f"{names[0]}.{suffix}" else data)
    assert keys(stream(tmp_path, max_unreadable=0.5)) == names[1:]
    assert reason in caplog.text


def test_shard_that_ends_early_keeps_its_first_samples(tmp_path, caplog):
    names = write_shards(tmp_path, shards=2, size=4)
    path = tmp_path / "00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(f"{names[2]}.jpg".encode()) + 600])
    assert keys(stream(tmp_path, max_unreadable=0.5)) == [*names[:2], *names[4:]]
    assert f"{path}: {names[2]}.jpg" in caplog.text and "is cut short" in caplog.text


def test_file_that_is_no_archive_is_named(tmp_path, caplog):
    names = write_shards(tmp_path, shards=2, size=2)
    (tmp_path / "00000.tar").write_text("<html>not found</html>" * 100)
    assert keys(stream(tmp_path, max_unreadable=0.5)) == names[2:]
    assert f'skipping damaged data: "{tmp_path}/00000.tar" is not a tar archive' in caplog.text


def test_shards_that_cannot_be_read_at_all_are_an_error(tmp_path):
    (tmp_path / "00000.tar").write_text("<html>not found</html>" * 100)
    with pytest.raises(
        UserError, match=r"no shard at the start can be read; the first: .*00000.tar\" is not a tar archive"
    ):
        stream(tmp_path, max_unreadable=1)


def test_many_damaged_samples_are_counted_and_not_all_named(tmp_path, caplog):
    write_shard(tmp_path / "0.tar", {f"{i:03}": {**sample(str(i)), "jpg": b"junk"} for i in range(30)})
    assert keys(stream(tmp_path, max_unreadable=1)) == []
    assert len(caplog.messages) == shards.NAMED + 1
    assert caplog.messages[-1] == f"{NAME}: 30 samples read, left out: 30 damaged"


def test_samples_without_image_or_text_are_counted(tmp_path, caplog):
    names = write_shards(tmp_path, shards=1, size=4)
    rewrite(
        tmp_path / "00000.tar",
        lambda name, data: None if name in (f"{names[0]}.txt", f"{names[1]}.jpg") else data,
    )
    assert keys(stream(tmp_path)) == names[2:]
    assert caplog.messages[-1] == f"{NAME}: 4 samples read, left out: 1 without .txt, 1 without .jpg"
    assert keys(stream(tmp_path, caption_key=None)) == [names[0], *names[2:]]


def test_wrong_image_key_is_an_error_that_names_the_suffixes(tmp_path):
    write_shards(tmp_path, shards=1, size=2)
    with pytest.raises(UserError, match=r"no sample has .png and .txt; .* have jpg, json, txt; set image_key"):
        stream(tmp_path, image_key="png")


@pytest.mark.parametrize(
    ("params", "kept", "reason"),
    [
        ({"min_size": 256}, "bcde", "1 smaller than min_size 256"),
        ({"max_pwatermark": 0.8}, "acd", "1 with pwatermark above 0.8, 1 without pwatermark in the record"),
        ({"max_punsafe": 0.5}, "abce", "1 with punsafe above 0.5"),
        ({"min_size": 600}, "", "5 smaller than min_size 600"),
    ],
)
def test_records_filter_samples(params, kept, reason, tmp_path, caplog):
    size = {"original_width": 512, "original_height": 300}
    records = {
        "a": {},
        "b": {**size, "pwatermark": 0.9},
        "c": {"original_width": None, "original_height": None, "width": 512, "height": 256},
        "d": {**size, "punsafe": 0.99},
        "e": {**size, "pwatermark": None},
    }
    if "max_punsafe" in params:
        records["e"]["punsafe"] = 0.5
    write_shard(tmp_path / "0.tar", {key: sample(key, **values) for key, values in records.items()})
    dataset = stream(tmp_path, **params)
    caplog.clear()
    assert "".join(keys(dataset)) == kept
    assert caplog.messages == [f"{NAME}: 5 samples read, left out: {reason}"]


def test_names_choose_the_entries_of_a_configuration(tmp_path):
    write_shards(tmp_path, shards=1, size=1)
    (item,) = stream(tmp_path, names={"image": "jpg", "caption": "txt"})
    assert set(item) == {"__key__", "image", "caption"}
    with pytest.raises(UserError, match='names asks for "cls"'):
        list(stream(tmp_path, names={"class_label": "cls"}))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shuffle", [0, 5])
@pytest.mark.parametrize("number", [1, 5])
def test_shares_hold_each_sample_once(number, shuffle, count, tmp_path):
    names = write_shards(tmp_path, shards=number, size=5)
    seen = []
    for index in range(count):
        share = stream(tmp_path, shuffle=shuffle)
        share.take_share(index, count)
        share.set_epoch(2, 23)
        own = keys(share)
        assert abs(len(own) - len(names) / count) < 5
        seen += own
    assert sorted(seen) == names


@pytest.mark.parametrize("shuffle", [0, 4])
def test_two_processes_with_two_workers_read_each_sample_once(shuffle, tmp_path):
    names = write_shards(tmp_path, shards=6, size=3)
    seen = []
    for rank in range(2):
        init = StreamWorkerInit(rank, 2, 4)
        loader = ResumableLoader(stream(tmp_path, shuffle=shuffle), 4, num_workers=2, worker_init_fn=init)
        loader.collate_fn = keys
        seen += [key for batch in loader for key in batch]
    assert sorted(seen) == names


def test_order_changes_with_epoch_seed_and_resumption(tmp_path):
    names = write_shards(tmp_path, shards=4, size=4)
    dataset = stream(tmp_path, shuffle=8)
    orders = []
    for order in [(0, 1), (1, 1), (0, 2), (0, 1, 5), (0, 1)]:
        dataset.set_epoch(*order)
        orders.append(keys(dataset))
    assert all(sorted(order) == names for order in orders)
    assert orders[0] == orders[4] and len({tuple(order) for order in orders}) == 4
    assert keys(stream(tmp_path)) == names


def test_loader_announces_epochs_and_resumed_runs(tmp_path):
    write_shards(tmp_path, shards=4, size=4)

    def loader():
        made = ResumableLoader(stream(tmp_path, shuffle=8), 4, seed=3)
        made.collate_fn = keys
        return made

    first = loader()
    batches = iter(first)
    taken = [next(batches), next(batches)]
    assert first.dataset.order == (3, 0, 0)
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed)
    assert resumed.dataset.order == (3, 0, 2) and rest[:2] != taken
    again = loader()
    again.load_state_dict({**first.state_dict(), "resumed_at": 7})
    next(iter(again))
    assert again.dataset.order == (3, 0, 9)
    list(resumed)
    assert resumed.dataset.order == (3, 1, 0)


def test_shuffle_buffer_keeps_all_items_and_starts_early():
    taken = []
    source = (taken.append(i) or i for i in range(5000))
    mixed = shuffled(source, 1000, np.random.default_rng(0))
    first = next(mixed)
    assert len(taken) <= shards.FIRST_FILL + 2
    rest = list(mixed)
    assert sorted([first, *rest]) == list(range(5000))
    distance = np.abs(np.array([first, *rest]) - np.arange(5000))
    assert 200 < distance.mean() < 2000
    assert list(shuffled(range(5), 0, np.random.default_rng(0))) == list(range(5))
