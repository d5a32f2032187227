"""Tables of tokens with more rows than a folder has: added tokens, and padding, which exports leave out."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from jaxmllm import mesh as meshes
from jaxmllm.data.build import sample_spec
from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.eval.verify import verify
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.mesh import Mesh
from jaxmllm.objectives.next_token import Chunks, losses, next_token
from jaxmllm.train.setup import abstract_batch, stage_program
from jaxmllm.weights.export import export
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.safetensors import open_folder, write_folder
from jaxmllm.weights.tables import TABLES
from tests import init_case, llava_case
from tests.conftest import jaxmllm
from tests.hf_files import write
from tests.run_case import abstract_of, random_of, run_of, save
from tests.test_export import llava, text_only

OLD, ADDED = 259, ("<|im_start|>", "<|im_end|>")


def write_llama_tokenizer(folder):
    """A tokenizer of bytes with Llama's control tokens and none of ChatML's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == OLD


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """-> (a folder with a Llama, its model, its parameters)."""
    folder, model = tmp_path_factory.mktemp("llm"), text_only(OLD, tied=request.param)
    run = run_of(model, folder)
    params = random_of(run)
    write_folder(folder, init_case.llama(model, params))
    write_llama_tokenizer(folder)
    text = init_case.TEXT | {"vocab_size": OLD, "tie_word_embeddings": request.param}
    return write(folder, text), model, params


def grown_run(base, **llm):
    folder, model, _ = base
    run = run_of(model.clone(llm=model.llm.clone(vocab=OLD + 2, **llm)), folder)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, added_tokens=ADDED, image_slots=0))


def loaded(run, folder):
    arrays, reports = load_parts(run.model, {"llm": str(folder)}, abstract_of(run))
    return {path: np.asarray(x) for path, x in arrays.items()}, str(reports[0])


@pytest.mark.parametrize("multiple, rows", [(1, 261), (64, 320)])
def test_new_rows_are_the_mean_of_the_old(base, multiple, rows):
    folder, model, params = base
    run = grown_run(base, table_multiple=multiple)
    found, said = loaded(run, folder)
    assert said.endswith(f"tables of 259 tokens grown to {rows} rows, the new ones their mean")
    assert found.keys() == params.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(found[path][: len(x)], x)
        if path in TABLES:
            assert found[path].shape == (rows, 16)
            np.testing.assert_allclose(found[path][OLD:], np.broadcast_to(x.mean(0), (rows - OLD, 16)), atol=1e-7)
    tokens = np.random.default_rng(0).integers(0, OLD, (2, 12), dtype=np.int32)
    before, after = (
        llava_case.outputs(m, p, llava_case.text_batch_of(m, tokens))[0]
        for m, p in ((model, params), (run.model, found))
    )
    np.testing.assert_allclose(after[..., :OLD], before, rtol=0, atol=1e-7)  # sums of another size of product
    np.testing.assert_allclose(after[..., OLD], before.mean(-1), atol=1e-6)  # the mean's logit


def test_an_export_has_the_new_tokens_and_no_padding(base, tmp_path):
    run = grown_run(base, table_multiple=64)
    params = loaded(run, base[0])[0]
    rng = np.random.default_rng(0)
    params |= {path: rng.standard_normal(params[path].shape).astype(np.float32) for path in TABLES if path in params}
    save(run, params, tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == OLD + 2
    np.testing.assert_array_equal(
        open_folder(tmp_path / "out")["model.embed_tokens.weight"], params[TABLES[0]][: OLD + 2]
    )
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened.convert_tokens_to_ids(list(ADDED)) == [OLD, OLD + 1]
    assert opened("a<|im_end|>")["input_ids"] == [*load_tokenizer(str(base[0])).encode("a"), OLD + 1]
    found = verify(str(tmp_path / "run"), str(tmp_path / "out"))
    assert found.equal() and all(a == b for a, b in found.hashes.values()), found


@pytest.mark.parametrize("chunk", [320, 100, 16])
def test_padding_is_never_predicted(chunk):
    """Nor trained: whatever its rows hold, loss and gradients are those of the table without it."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (2, 6, 16)), jax.random.normal(keys[1], (300, 16))
    labels = jax.random.randint(keys[2], (2, 6), 0, 300)
    padded = jnp.concatenate([table, 1e3 * jnp.ones((20, 16))])

    def loss(hidden, table, vocab=None):
        term, hit = next_token(hidden, table, labels, chunk, vocab=vocab)
        return term.values.sum(), hit

    (expected, hits), (dx, dtable) = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, table)
    (found, found_hits), (px, ptable) = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, padded, 300)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found_hits, hits)
    np.testing.assert_allclose(px, dx, atol=1e-5)
    np.testing.assert_allclose(ptable[:300], dtable, atol=1e-5)
    assert not ptable[300:].any()


@pytest.mark.parametrize("chunk", [320, 100])
def test_padding_of_a_table_that_four_devices_hold(chunk):
    """The last of four parts has 60 tokens and 20 rows of padding; the loss tells them apart by their place."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (2, 6, 16)), jax.random.normal(keys[1], (320, 16))
    labels = jax.random.randint(keys[2], (2, 6), 0, 300)
    nll, _ = losses(hidden, table.reshape(4, 80, 16), labels, Chunks.of(80, chunk / 4, 300), None)
    logits = hidden @ table[:300].T
    expected = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_the_model_gives_padding_to_its_objective():
    padded = text_only(41, table_multiple=16)
    params = random_of(run_of(padded, "none"))
    whole = {path: x[:41] if path in TABLES else x for path, x in params.items()}
    params |= {path: np.concatenate([whole[path], np.full((7, 16), 9, np.float32)]) for path in TABLES}
    batch = llava_case.text_batch_of(padded, np.arange(24, dtype=np.int32).reshape(2, 12))
    batch = dataclasses.replace(batch, labels=np.arange(17, 41, dtype=np.int32).reshape(2, 12))
    losses = [llava_case.outputs(m, p, batch)[1] for m, p in ((padded, params), (text_only(41), whole))]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_padding_makes_a_table_divide():
    """A step of training on a mesh whose tensor axis the tokens do not divide over."""
    sizes = (1, 1, 1, 2, 1)
    abstract = AbstractMesh(sizes, meshes.AXES, axis_types=(AxisType.Explicit,) * len(sizes))

    def traced(**llm):
        run = run_of(text_only(41, **llm), "none", mesh=Mesh(fsdp=1, tensor=2))
        with jax.sharding.use_abstract_mesh(abstract):
            params, new_state, step = stage_program(run, run.stages[0], abstract)
            return step.trace(jax.eval_shape(new_state, params), abstract_batch(run, run.stages[0], abstract))

    with pytest.raises(ValueError, match="vocab, 41.* or pad the table with model.llm.table_multiple=2"):
        traced()
    state = traced(table_multiple=16).out_info[0]
    assert state.trainable["llm/lm_head/embedding"].shape == (48, 16)


def test_growth_on_a_mesh(tmp_path):
    """A folder of ours is read onto a mesh that its table without padding would not divide over."""
    model = llava(41, MMFuser(4, 2), taps=(1, 3), llm={"table_multiple": 16})
    write_llama_tokenizer(tmp_path)
    run = run_of(model, tmp_path)
    save(run, random_of(run), tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert open_folder(tmp_path / "out")["lm_head.weight"].shape == (41, 16)
    done = jaxmllm("verify", tmp_path / "run", tmp_path / "out", "--mesh", "fsdp=2", "tensor=2", devices=4)
    assert done.stdout.endswith("\nequal\n")


def test_what_a_run_needs_is_said(base):
    run = grown_run(base)
    spec = sample_spec(run)
    assert [spec.tokenizer.id(token) for token in ADDED] == [OLD, OLD + 1]
    small = dataclasses.replace(run, model=base[1])
    with pytest.raises(ValueError, match="has 261 tokens, but model.llm.vocab is 259; model.llm.vocab=261 makes"):
        sample_spec(small)
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, added_tokens=()))
    with pytest.raises(ValueError, match=r"data.added_tokens gives it tokens, such as \('<\|im_start\|>',\)"):
        sample_spec(without)


def test_a_smaller_table_or_other_sizes_are_refused(base):
    folder, model, _ = base
    for llm, says in ((model.llm.clone(vocab=OLD - 1), "vocab 258"), (model.llm.clone(vocab=300, mlp=25), "vocab 300")):
        run = run_of(
            model.clone(llm=llm),
            folder,
        )
        with pytest.raises(ValueError, match=f"vocab_size 259 there, {says} here"):
            loaded(run, folder)
