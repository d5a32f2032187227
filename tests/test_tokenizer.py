"""Chat templates write what the reference implementations write; word tokenizers round-trip."""

import pytest

from jaxmllm.data.templates import CHATML, LLAMA3, PLAIN, TOY, VICUNA_V1
from jaxmllm.data.tokenizer import load_tokenizer, train_word_tokenizer
from tests.records import WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_word_tokenizer([WORDS], tmp_path_factory.mktemp("words"))


def test_templates_write_what_the_references_write():
    turns = [("hi <image>", "yes"), ("more", "no")]
    text = lambda template: "".join(piece.text for piece in template.pieces(turns))
    assert text(VICUNA_V1).endswith(
        "answers to the user's questions. USER: <image>\nhi ASSISTANT: yes</s>USER: more ASSISTANT: no</s>"
    )
    assert text(PLAIN) == "<s><image>yes\nno\n"
    assert text(TOY) == "<user>hi <image><assistant>yes<end><user>more<assistant>no<end>"
    assert text(LLAMA3).endswith(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    )
    assert "<|im_start|>user\n<image>\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>" in text(CHATML)


def test_a_records_system_text_replaces_the_templates():
    text = lambda template: "".join(piece.text for piece in template.pieces([("hi", "yes")], "Be brief."))
    assert text(VICUNA_V1) == "<s>Be brief. USER: hi ASSISTANT: yes</s>"
    assert text(CHATML).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    header = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    assert text(LLAMA3).startswith(f"{header}Be brief.<|eot_id|><|start_header_id|>user")
    assert text(TOY) == "Be brief.<user>hi<assistant>yes<end>"


def test_only_a_single_picture_is_moved_to_the_front():
    text = lambda template, question: "".join(p.text for p in template.pieces([(question, "yes")]) if not p.own)
    for template in (VICUNA_V1, LLAMA3, CHATML):
        written = text(template, "Before: <image> After: <image> What changed?")
        assert written.endswith("Before: <image> After: <image> What changed?yes")
        assert text(template, "What is this? <image>").endswith("<image>\nWhat is this?yes")
        assert text(template, "<image>").endswith("<image>yes")
    assert text(PLAIN, "Before: <image> After: <image>") == "<image><image>yes"
    assert text(TOY, "a <image> b") == "a <image> byes"


def test_word_tokenizer(tokenizer):
    text = "how many frogs? it's\n a  pond."
    assert tokenizer.decode(tokenizer.encode(text)) == "how many frogs? it's a pond."
    assert tokenizer.decode(tokenizer.encode("<user>how?<assistant>three<end>")) == "how? three"
    assert tokenizer.encode("<image>") == [tokenizer.id("<image>")] == [2]
    assert tokenizer.encode("zebra") == [tokenizer.id("<unk>")]
    # The special tokens, the words and punctuation marks, and the blank that stands alone.
    assert tokenizer.size == 6 + len(set(WORDS.replace("it's", "it ' s").split())) + 1


def test_word_tokenizer_opens_in_transformers(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path, local_files_only=True)
    for text in ("how many frogs? it's a pond.", "<user>how<assistant>three<end>"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (theirs.pad_token_id, theirs.eos_token) == (0, "<end>")


def test_tokenizer_errors(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no token '<zebra>'"):
        tokenizer.id("<zebra>")
