"""Tokenizers: no text becomes a control token, and the tokens around a document are the right ones."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from hcp_jax.train.data.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "turns end with <|im_end|>, lines with </s> and texts with <|endoftext|><|endoftext|>."


def saved(made, folder, **config):
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture
def byte_level(tmp_path):
    """A byte-level BPE with the special tokens of a chat model, as Qwen's is."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    template = "{{ '<|im_start|>' + message.content + '<|im_end|>' }}"
    return saved(made, tmp_path, eos_token="<|im_end|>", chat_template=template)


def ids_of(tokenizer, *texts):
    return [ids.tolist() for ids in tokenizer(text.encode() for text in texts)]


def test_text_that_spells_a_special_token_stays_text(byte_level):
    text = Tokenizer(byte_level)
    [ids] = ids_of(text, TEXT)
    assert not set(ids) & {0, 1, 2}
    assert tokenizers.Tokenizer.from_file(str(byte_level)).decode(ids) == TEXT
    control = Tokenizer(byte_level, special_tokens="control")
    [ids] = ids_of(control, TEXT)
    assert [i for i in ids if i < 3] == [2, 0, 0]
    assert "is encoded as text" in text.describe()[1]
    assert "becomes that token" in control.describe()[1]


def test_a_token_that_the_model_itself_knows_is_cut(tmp_path):
    # As in T5: "</s>" is a word of the model, with the best score of all.
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *((x, -3.0) for x in "abdehinstw<>/ ,.|_")]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=1))
    made.add_special_tokens(["</s>", "<unk>"])
    path = saved(made, tmp_path, eos_token="</s>")
    text = "this </s></s> ends"
    [ids, plain, unknown] = ids_of(Tokenizer(path), text, "a and b", "a Z <unk>")
    vocabulary = made.get_vocab()
    assert ids == [vocabulary[x] for x in text]
    assert plain == [vocabulary[x] for x in "a and b"]
    assert 1 in unknown  # a word that is not known may be so
    [ids] = ids_of(Tokenizer(path, special_tokens="control"), text)
    assert ids.count(0) == 2


def test_an_end_that_the_file_does_not_call_special_is_kept_from_texts_too(tmp_path):
    words = {w: i for i, w in enumerate(["<unk>", "a", "b", "<", "/s>", "<end>"])}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens([AddedToken("<end>", special=False), AddedToken("~", special=True)])
    path = saved(made, tmp_path, eos_token="<end>")
    assert ids_of(Tokenizer(path), "a <end> b", "a b") == [[1, 3, 0, 2], [1, 2]]
    # A token of one character cannot be cut, and this model has no other way to write it.
    assert ids_of(Tokenizer(path), "a ~ b") == [[1, 0, 2]]
    # An ordinary word may be chosen, and texts may have it.
    chosen = Tokenizer(path, eos="b")
    assert ids_of(chosen, "a b") == [[1, 2]]
    assert chosen.describe()[-1] == "'b' is an ordinary word, which texts may have"


def test_the_end_of_a_turn_is_not_the_end_of_a_document(byte_level):
    tokenizer = Tokenizer(byte_level)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eos_id) == ("<|endoftext|>",) * 2 + (0,)
    assert (
        "instead of '<|im_end|>', with which the chat template ends a turn"
        in (tokenizer.describe()[0])
    )
    assert Tokenizer(byte_level, eos="<|im_end|>").eos == "<|im_end|>"
    config = byte_level.with_name("tokenizer_config.json")
    config.write_text('{"eos_token": "<|im_end|>"}')  # no chat: it is what it says
    assert Tokenizer(byte_level).eos == "<|im_end|>"
    byte_level.with_name("chat_template.jinja").write_text("{{ message + eos_token }}")
    assert Tokenizer(byte_level).eos == "<|endoftext|>"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[]", "must hold keys and values, got list"),
        (b'{"eos_token": 5}', "eos_token in the tokenizer_config.json .* got 5"),
        (b'{"eos_token": {"content": ["x"]}}', "must be a token"),
        (b'{"eos_token": "<gone>"}', "has no token '<gone>'"),
        (b"[" * 99_999, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(byte_level, config, message):
    byte_level.with_name("tokenizer_config.json").write_bytes(config)
    with pytest.raises(ValueError, match=message):
        Tokenizer(byte_level)


def test_a_config_with_a_byte_order_mark_is_read(byte_level):
    byte_level.with_name("tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token": "!"}')
    assert Tokenizer(byte_level).eos == "!"


def test_ids_have_the_smallest_dtype_that_holds_them(byte_level):
    assert next(Tokenizer(byte_level)([b"a"])).dtype == np.uint16
