"""The model behaves as transformers' models do: forward, loss, pipelines, resizing, saving, generate, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, pipeline

import dlm
from tests.helpers.commandline import checkpoint, tokenizer  # noqa: F401  fixtures
from tests.helpers.toys import MASK, tiny_model

TEXTS = ["The fox walked along the beach", "She"]


@pytest.fixture
def opened(checkpoint):  # noqa: F811
    return dlm.load(checkpoint)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns_is_what_the_model_takes(opened, side):
    """Padding changes nothing, on either side: rotary positions are relative."""
    model, tokenizer = opened  # noqa: F811
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", padding_side=side)
    with torch.inference_mode():
        out = model(**inputs)
        assert out.loss is None and out.hidden_states is None
        for row, text in enumerate(TEXTS):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert torch.allclose(out.logits[row][inputs["attention_mask"][row].bool()], alone, atol=1e-5)
    assert torch.equal(model.predict(inputs["input_ids"][:1]), model(inputs["input_ids"][:1]).logits)


def test_labels_by_hand():
    model, ids = tiny_model(2), torch.tensor([[1, MASK, 3], [MASK, 5, 6]])
    labels = torch.tensor([[-100, 7, -100], [9, -100, 6]])
    logits = model(ids).logits
    want = [F.cross_entropy(logits[r, p], labels[r, p]) for r, p in ((0, 1), (1, 0), (1, 2))]
    assert torch.allclose(model(ids, labels=labels).loss, sum(want) / 3)
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=torch.tensor(12)).loss, sum(want) / 12)
    assert model(ids, labels=torch.full_like(labels, -100)).loss == 0
    loss, first = model(ids, labels=labels, return_dict=False)
    assert torch.allclose(loss, sum(want) / 3) and torch.equal(first, logits)


@pytest.mark.parametrize(
    ("changes", "pairs"),  # (row, place of the label, place of its prediction)
    [
        ({"shift_logits": True}, [(0, 1, 0), (1, 0, 0), (1, 2, 1)]),
        ({"objective": "autoregressive"}, [(0, 1, 0), (1, 2, 1)]),  # the first token has no prediction
    ],
)
def test_labels_of_a_model_that_predicts_the_next_place(changes, pairs):
    """Was: the loss of Trainer compared every label with the prediction for the place after it."""
    model, ids = tiny_model(2, **changes), torch.tensor([[1, MASK, 3], [MASK, 5, 6]])
    labels = torch.tensor([[-100, 7, -100], [9, -100, 6]])
    logits = model(ids).logits
    want = [F.cross_entropy(logits[r, at], labels[r, place]) for r, place, at in pairs]
    assert torch.allclose(model(ids, labels=labels).loss, sum(want) / len(want))


def test_hidden_states_and_embeddings():
    model, ids = tiny_model(3), torch.tensor([[1, 2, 3]])
    out = model(ids, output_hidden_states=True)
    table = model.get_input_embeddings()
    assert len(out.hidden_states) == model.config.n_layers + 1 and torch.equal(out.hidden_states[0], table(ids))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(inputs_embeds=table(ids)).logits, out.logits)
    assert torch.equal(model.base_model(ids).last_hidden_state, out.hidden_states[-1])
    moved = model(ids, position_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.allclose(moved, out.logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.zeros(1, 2)}, "labels"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "use_cache": True}, "use_cache"),
    ],
)
def test_forward_refuses(tiny, arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


def test_a_typo_is_an_error(tiny):
    with pytest.raises(TypeError, match="attention_msk"):
        tiny(torch.zeros(1, 2, dtype=torch.int64), attention_msk=None)


def test_gradient_checkpointing_changes_no_gradient():
    ids, labels, found = torch.tensor([[1, MASK, 3]]), torch.tensor([[-100, 7, -100]]), []
    for checkpointing in (False, True):
        model = tiny_model(4).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=labels).loss.backward()
        found.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert torch.allclose(*found, atol=1e-12) and found[0].abs().sum() > 0


# ---------------------------------------------------------------- loading, pipelines


@pytest.mark.filterwarnings("ignore")
def test_fill_mask_is_the_models_argmax(checkpoint, opened):  # noqa: F811
    model, tokenizer = opened  # noqa: F811
    text = f"The fox {tokenizer.mask_token} along the beach"
    best = pipeline("fill-mask", model=str(checkpoint), tokenizer=tokenizer, device="cpu")(text)[0]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        p = model(ids).logits[ids == tokenizer.mask_token_id].softmax(-1)[0]
    assert best["token"] == int(p.argmax()) and best["score"] == pytest.approx(float(p.max()), rel=1e-4)


def test_from_pretrained_places_and_types(tmp_path):
    model = tiny_model(5, dtype=torch.float32)
    model.save_pretrained(tmp_path, variant="fp16")
    for options in ({"dtype": torch.bfloat16}, {"dtype": "float32", "device_map": "cpu"}, {"device_map": "auto"}):
        again = AutoModelForMaskedLM.from_pretrained(tmp_path, variant="fp16", **options)
        assert again.dtype == (torch.bfloat16 if options.get("dtype") is torch.bfloat16 else torch.float32)
        assert not again.training
    assert torch.equal(again.predict(torch.tensor([[1, 2]])), model.predict(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_resized_saved_and_loaded_the_logits_are_the_same(tmp_path, tied, multiple):
    model, ids = tiny_model(6, weight_tying=tied), torch.tensor([[1, MASK, 3]])
    before = model(ids).logits
    model.resize_token_embeddings(45, pad_to_multiple_of=multiple, mean_resizing=False)
    rows = 45 if multiple is None else 48
    after = model(ids).logits
    assert after.shape[-1] == rows and torch.allclose(after[..., :40], before)
    assert (model.config.vocab_size, model.config.embedding_size) == (45, rows)
    assert (model.get_output_embeddings() is model.get_input_embeddings()) is tied
    model.save_pretrained(tmp_path)
    again, _ = dlm.load(tmp_path)
    assert torch.equal(again(ids).logits, after) and again.config.vocab_size == 45
    out = dlm.generate(again, [[1, 2]], dlm.SamplingConfig(gen_length=4))
    assert int(out.sequences.max()) < 45


def test_sampling_defaults_survive_saving(tmp_path):
    model = tiny_model(7)
    model.generation_config.dlm = {"gen_length": 6, "steps": 3, "chat": False}
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    opened = dlm.load(tmp_path / "two")[0]
    assert opened.generation_config.dlm == {"gen_length": 6, "steps": 3, "chat": False}
    want = dlm.generate(model, [[1, 2]], dlm.SamplingConfig(gen_length=6, steps=3)).sequences
    assert torch.equal(opened.generate(torch.tensor([[1, 2]]))[:, 2:], want)


# ---------------------------------------------------------------- generate


def test_generate_returns_prompt_and_answer(opened):
    """A padded batch gives what each prompt gives alone."""
    model, tokenizer = opened  # noqa: F811
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", padding_side="left")
    out = model.generate(**inputs, gen_length=4)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"])
    want = dlm.generate(model, TEXTS, dlm.SamplingConfig(gen_length=4), tokenizer=tokenizer).sequences
    assert torch.equal(out[:, width:], want)
    with pytest.raises(ValueError, match=r"max_new_tokens.*gen_length"):
        model.generate(**inputs, max_new_tokens=4)
    with pytest.raises(ValueError, match="gen_lenght"):
        model.generate(**inputs, gen_lenght=4)


def test_generate_of_an_autoregressive_model():
    model = tiny_model(8, objective="autoregressive")
    out = model.generate(torch.tensor([[1, 2]]), gen_length=3)
    assert out.shape == (1, 5) and out[0, :2].tolist() == [1, 2]
    with pytest.raises(ValueError, match="steps is for diffusion"):
        model.generate(torch.tensor([[1, 2]]), steps=3)


def test_mappings_are_prompts_and_not_their_keys(opened):
    """The keys of a tokenizer's output were read as two texts."""
    model, tokenizer = opened  # noqa: F811
    config = dlm.SamplingConfig(gen_length=4)
    want = dlm.generate(model, TEXTS, config, tokenizer=tokenizer).sequences
    for more in ({}, {"padding": True, "return_tensors": "pt"}, {"padding": True, "padding_side": "left"}):
        assert torch.equal(dlm.generate(model, tokenizer(TEXTS, **more), config).sequences, want)
    template = "{{ messages[0]['content'] }}"
    given = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[0]}], chat_template=template)
    alone = dlm.generate(model, tokenizer(TEXTS[0], add_special_tokens=False), config).sequences
    assert torch.equal(dlm.generate(model, given, config, tokenizer=tokenizer).sequences, alone)
    for wrong, words in (
        ({"ids": [1]}, "input_ids"),
        ([{"role": "user", "content": "hi"}], "apply_chat_template"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "gap"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, "shape"),
    ):
        with pytest.raises(ValueError, match=words):
            dlm.generate(model, wrong, config, tokenizer=tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_refused(opened, side):
    """It was read as prompt."""
    model, tokenizer = opened  # noqa: F811
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt", padding_side=side)["input_ids"]
    for given in (ids, {"input_ids": ids}, ids.numpy()):
        with pytest.raises(ValueError, match=r"row 1 .*attention_mask"):
            dlm.generate(model, given, dlm.SamplingConfig(gen_length=2), tokenizer=tokenizer)
