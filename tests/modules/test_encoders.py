"""Tests of the conditioning encoders: recorded values, published names and the tokenizer."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest
import torch
from parity_cases import PARITY, build, load_case
from parity_replay import assert_replayed

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.modules.encoders.modules import (
    AbstractEncoder,
    BERTEmbedder,
    BERTTokenizer,
    ClassEmbedder,
    IdentityEncoder,
    SpatialRescaler,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "dog", "!", ",", "face"]
MODULES = "ldm.modules.encoders.modules"
# Conditioning stages of the published configurations.
PUBLISHED = {
    "configs/latent-diffusion/cin-ldm-vq-f8.yaml": ("ClassEmbedder", {"embed_dim": 512, "key": "class_label"}),
    "configs/latent-diffusion/cin256-v2.yaml": ("ClassEmbedder", {"n_classes": 1001, "embed_dim": 512}),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": ("BERTEmbedder", {"n_embed": 1280, "n_layer": 32}),
    "models/ldm/text2img256/config.yaml": ("BERTEmbedder", {"n_embed": 640, "n_layer": 32}),
    "models/ldm/layout2img-openimages256/config.yaml": (
        "BERTEmbedder",
        {"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False},
    ),
    "models/ldm/semantic_synthesis256/config.yaml": (
        "SpatialRescaler",
        {"n_stages": 2, "in_channels": 182, "out_channels": 3},
    ),
}


@pytest.fixture
def vocab(tmp_path):
    """Return a folder with a small vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["bert_embedder", "transformer_embedder"])
def test_token_encoders_match_the_recorded_values(name):
    assert_replayed(name)


def test_class_embedder_matches_the_recorded_values():
    assert_replayed("class_embedder")
    case = load_case("class_embedder")
    model, labels = build(case), case.inputs["labels"]
    assert torch.equal(model({"other": labels}, key="other"), model({"class_label": labels}))


def test_spatial_rescaler_matches_the_recorded_values():
    assert_replayed("spatial_rescaler")


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_names_and_shapes_match_the_published_ones(name):
    with gzip.open(PARITY / "state_dicts.json.gz") as file:
        entries = json.load(file)["models"][name]
    prefix = "cond_stage_model."
    expected = {key[len(prefix) :]: shape for key, shape in entries.items() if key.startswith(prefix)}
    target, params = PUBLISHED[name]
    with torch.device("meta"):
        model = instantiate_from_config({"target": f"{MODULES}.{target}", "params": params})
    assert {key: list(entry.shape) for key, entry in model.state_dict().items()} == expected


def test_defaults_match_the_published_ones():
    assert ClassEmbedder(4).embedding.num_embeddings == 1000
    assert ClassEmbedder(4).key == "class"
    assert BERTTokenizer().max_length == 77
    rescaler = SpatialRescaler()
    assert rescaler(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 4, 4)
    assert not list(rescaler.parameters())


def test_spatial_rescaler_methods():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert SpatialRescaler(method="nearest")(x).flatten().tolist() == [0, 2, 8, 10]
    assert SpatialRescaler(method="area")(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert SpatialRescaler(n_stages=1, multiplier=2.0)(x).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match=r"method .cubic. is unknown.*bicubic"):
        SpatialRescaler(method="cubic")


def test_abstract_and_identity_encoders():
    assert IdentityEncoder().encode("x") == "x"
    with pytest.raises(NotImplementedError, match="AbstractEncoder"):
        AbstractEncoder().encode("x")


def test_tokens_match_transformers(vocab):
    transformers = pytest.importorskip("transformers")
    captions = ["A red cat, dogs!!", "réd  CATS", "a zebra", "", "a cat " * 10]
    reference = transformers.BertTokenizerFast.from_pretrained(vocab)
    expected = reference(captions, truncation=True, max_length=8, padding="max_length", return_tensors="pt")
    actual = BERTTokenizer(max_length=8, version=str(vocab))(captions)
    assert torch.equal(actual, expected["input_ids"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_vocabularies_are_split_at_line_ends_only(vocab, encoding):
    expected = BERTTokenizer(max_length=8, version=str(vocab))(["a red cat", "dogs!"])
    other = vocab / "other.txt"
    other.write_bytes("\r\n".join([*WORDS, "a\u2028b", "\x85"]).encode(encoding))
    assert torch.equal(BERTTokenizer(max_length=8, version=str(other))(["a red cat", "dogs!"]), expected)


def test_tokens_are_framed_truncated_and_padded(vocab):
    tokenizer = BERTTokenizer(max_length=5, version=str(vocab / "vocab.txt"))
    tokens = tokenizer(["a cats", "a a a a a a", "zebra"])
    assert tokens.tolist() == [[2, 5, 7, 8, 3], [2, 5, 5, 5, 3], [2, 1, 3, 0, 0]]
    assert tokens.dtype == torch.int64
    assert tokenizer("a cat").tolist() == [[2, 5, 7, 3, 0]]
    assert BERTTokenizer(device="meta", version=str(vocab))(["a"]).device.type == "meta"


def test_tokenizer_has_the_interface_of_a_first_stage_model(vocab):
    tokenizer = BERTTokenizer(max_length=4, version=str(vocab))
    quantized, loss, (perplexity, encodings, ids) = tokenizer.encode(["a"])
    assert (quantized, loss, perplexity, encodings) == (None, None, None, None)
    assert ids.tolist() == [[2, 5, 3, 0]]
    assert tokenizer.decode("a") == "a"
    assert torch.equal(BERTTokenizer(vq_interface=False, max_length=4, version=str(vocab)).encode(["a"]), ids)


def test_unknown_words_are_not_tokens_of_the_vocabulary(vocab):
    tokenizer = BERTTokenizer(version=str(vocab))
    assert tokenizer.unknown_words("A réd Zebra, cats! and a ZEBRA face") == ["zebra", "cats", "and"]
    assert tokenizer.unknown_words("") == []


def test_relative_vocabularies_are_searched_in_the_current_folder_and_the_repository(vocab, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(vocab)
    assert BERTTokenizer(version="vocab.txt")("a")[0, 1] == 5
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("ldm.config.assets.ROOT", vocab)
    assert BERTTokenizer(version="vocab.txt")("a")[0, 1] == 5


def test_missing_vocabulary_raises_user_error(tmp_path):
    for name in (str(tmp_path / "vocab.txt"), "data/no/vocabulary", "./vocabulary", "words.txt"):
        with pytest.raises(UserError, match="does not exist"):
            BERTTokenizer(version=name)


def test_vocabulary_without_special_tokens_raises_user_error(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("[PAD]\n[UNK]\nred\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks \[CLS\], \[SEP\]"):
        BERTTokenizer(version=str(path))


def test_failed_download_of_a_vocabulary_raises_user_error_on_first_use():
    tokenizer = BERTTokenizer(version="nobody/no-such-vocabulary")
    with pytest.raises(UserError, match=r"cannot download .*nobody/no-such-vocabulary.*local vocab\.txt"):
        tokenizer(["a cat"])


def test_vocabulary_is_downloaded_on_first_use(vocab, monkeypatch):
    requests = []

    def download(name, filename, local_files_only=False):
        requests.append((name, local_files_only))
        if local_files_only:
            raise FileNotFoundError
        return str(vocab / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = BERTTokenizer(max_length=4, version="someone/words")
    assert requests == []
    assert tokenizer(["cat"]).tolist() == tokenizer(["cat"]).tolist() == [[2, 7, 3, 0]]
    assert requests == [("someone/words", True), ("someone/words", False)]


def test_bert_embedder_encodes_captions(vocab, seed):
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=13, max_seq_len=6, vocab=str(vocab)).eval()
    context = model.encode(["a red cat", "a dog"])
    assert context.shape == (2, 6, 16)
    by_token = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=13, max_seq_len=6, use_tokenizer=False).eval()
    by_token.load_state_dict(model.state_dict())
    assert torch.equal(by_token(model.tknz_fn(["a red cat", "a dog"])), context)


def test_bert_embedder_has_embedding_dropout_in_training(vocab, seed):
    model = BERTEmbedder(16, 1, vocab_size=13, max_seq_len=6, embedding_dropout=0.5, vocab=str(vocab))
    assert not torch.equal(model(["a cat"]), model(["a cat"]))


def test_vocabulary_larger_than_the_embedding_raises_user_error(vocab):
    with pytest.raises(UserError, match="has 13 tokens; raise vocab_size from 12"):
        BERTEmbedder(16, 1, vocab_size=12, vocab=str(vocab))


def test_bert_embedder_can_be_pickled(vocab, seed):
    model = BERTEmbedder(16, 1, vocab_size=13, max_seq_len=6, vocab=str(vocab)).eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(["a cat"]), model(["a cat"]))


def test_tokens_are_moved_to_the_device_of_the_weights(vocab):
    model = BERTEmbedder(16, 1, vocab_size=13, max_seq_len=6, vocab=str(vocab)).to("meta")
    assert model(["a cat"]).device.type == "meta"
