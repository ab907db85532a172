"""The one door to a checkpoint: what it says of itself, what is lazy, and the same answer from every command."""

import json
import shutil

import pytest
import torch

import dlm
from dlm.checkpoints import pretrained
from dlm.checkpoints.files import TWIN
from dlm.checkpoints.pretrained import load_pretrained
from dlm.cli.main import main
from dlm.evaluation.generations import open_writer
from dlm.evaluation.judge import open_judge
from dlm.evaluation.perplexity import open_scorer
from dlm.kernels.packed import Packed
from dlm.kernels.packing import packed
from tests.helpers import commandline, recipes
from tests.helpers.commandline import make_checkpoint
from tests.helpers.toys import tiny_model

tokenizer, checkpoint, run, fresh = commandline.tokenizer, commandline.checkpoint, commandline.run, recipes.fresh


def change(folder, name="config.json", **fields):
    """Fields of a JSON file of a checkpoint, changed; None takes one out."""
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    content |= fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


# ---------------------------------------------------------------- what it is


def test_what_a_checkpoint_says_of_itself(checkpoint, tokenizer):
    opened = load_pretrained(checkpoint)
    assert (opened.name, opened.family, opened.objective) == ("tiny-fox", "llada", "diffusion")
    assert opened.block_length is None
    assert (opened.mask_id, opened.end_ids) == (tokenizer.mask_token_id, (tokenizer.eos_token_id,))
    assert opened.has_end and not opened.autoregressive and opened.max_length == 128 and opened.defaults == {}
    assert opened.chat_template == tokenizer.chat_template and opened.tensors.parameters == sum(
        weight.numel() for weight in opened.model.parameters()
    )


def test_parts_are_made_when_they_are_asked_for(checkpoint, monkeypatch):
    opened, made, kept = load_pretrained(checkpoint), [], pretrained.open_model
    monkeypatch.setattr(pretrained, "open_model", lambda *words: made.append(1) or kept(*words))
    assert opened.objective == "diffusion" and opened.digest.startswith("sha256:") and not made
    assert opened.model is opened.model and opened.predictor is opened.predictor and len(made) == 1


def test_load_is_the_model_and_the_tokenizer_of_the_door(checkpoint):
    model, words = dlm.load(checkpoint)
    assert type(model) is dlm.LLaDAModelLM and not model.training and words.mask_token
    with pytest.raises(TypeError, match="detype"):
        dlm.load(checkpoint, detype="float32")


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({}, "diffusion"),
        ({"block_length": 4}, "block_diffusion"),
        ({"objective": "autoregressive"}, "autoregressive"),
    ],
)
def test_the_objective_stands_in_config_json(tmp_path, tokenizer, changes, objective):
    """Also where training.json says another: it says how a model was trained, not what it is."""
    folder = make_checkpoint(tmp_path / "m", tokenizer, **changes)
    (folder / "training.json").write_text(json.dumps({"recipe": {"objective": "something else"}}))
    assert json.loads((folder / "config.json").read_text())["objective"] == objective
    assert load_pretrained(folder).objective == objective


def test_checkpoints_of_before_have_the_objective_of_their_attention(tmp_path, tokenizer):
    folder = change(make_checkpoint(tmp_path / "m", tokenizer, block_length=4), objective=None)
    assert load_pretrained(folder).objective == "block_diffusion"
    with pytest.raises(ValueError, match="objective='diffusion' and block_length=4"):
        load_pretrained(change(folder, objective="diffusion"))


def test_the_digest_is_of_what_is_in_the_folder(tmp_path, tokenizer):
    folder = make_checkpoint(tmp_path / "m", tokenizer)
    before = load_pretrained(folder).digest
    assert load_pretrained(folder).digest == before
    assert load_pretrained(change(folder, rope_theta=77.0)).digest != before


# ---------------------------------------------------------------- autoregressive models


@pytest.fixture(scope="module")
def twin(tmp_path_factory, tokenizer):
    """An autoregressive checkpoint in LLaDA's layout, without the notes of its training."""
    return make_checkpoint(tmp_path_factory.mktemp("twin") / "twin", tokenizer, objective="autoregressive")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tokenizer):
    """A tiny checkpoint of an autoregressive family."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


REFUSAL = "predicts the next token, and cannot fill in masks: give a diffusion model"


@pytest.mark.parametrize("kind", ["twin", "qwen"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "x", "--model"],
        ["infill", "a ___", "--model"],
        ["chat", "--model"],
        ["train", "sft", "--data", "{data}", "--output", "{out}", "--model"],
        ["train", "pretrain", "--data", "{data}", "--output", "{out}", "--model"],
        ["bench", "grid", "--judge", "none", "--out", "{out}.json", "--model"],
        ["bench", "speed", "--model"],
        ["eval", "harness", "--tasks", "x", "--model_args", "pretrained={model}"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_command_refuses_an_autoregressive_model_in_the_same_words(
    request, kind, words, tmp_path, capsys, monkeypatch
):
    """`dlm train sft` trained on a qwen2 folder that `dlm generate` refused; the twin without training.json wrote
    "naeeallyallye" with exit code 0."""
    if words[1] == "harness":
        pytest.importorskip("lm_eval")
    folder = request.getfixturevalue(kind)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "The cat", "response": "sat.", "text": "The cat sat."}\n' * 4)
    words = [word.format(data=data, out=tmp_path / "out", model=folder) for word in words]
    code = main([*words, *([str(folder)] if words[-1] == "--model" else [])])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and f"{folder.name} {REFUSAL}" in error, error


def test_what_scores_and_writes_takes_autoregressive_models(twin, qwen, checkpoint):
    for folder in (twin, qwen):
        scorer = open_scorer(str(folder))
        assert scorer.exact and scorer.digest.startswith("sha256:") and scorer.dtype == "float32"
        assert open_judge(str(folder)).score([("The cat", " sat on the mat.")])[0].nll > 0
    assert open_writer(twin).autoregressive and not open_writer(checkpoint).autoregressive
    assert not open_scorer(str(checkpoint)).exact


def test_the_twin_that_ships_needs_no_notes(capsys):
    assert load_pretrained(TWIN).autoregressive
    assert main(["generate", "x", "--model", str(TWIN)]) == 2 and REFUSAL in capsys.readouterr().err


# ---------------------------------------------------------------- the predictor


def test_the_predictor_holds_the_weights_once(checkpoint):
    """A predictor that nobody asks the model of lets the model's own weights go as it packs them."""
    opened = load_pretrained(checkpoint)
    predictor = opened.predictor
    assert type(predictor) is Packed and "model" not in vars(opened)
    ids = torch.arange(6)[None]
    kept = packed(opened.model)
    assert torch.equal(predictor(ids), kept(ids)) and opened.device == opened.model.device


def test_packing_alone_gives_the_same_logits():
    model = tiny_model(3, dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        want = packed(model)(ids)
    alone = Packed(model, release=True)
    assert torch.equal(alone(ids), want)
    assert model.model.transformer.blocks[0].q_proj.weight.is_meta


def test_a_predictor_that_is_given_is_used(checkpoint):
    opened, calls = load_pretrained(checkpoint), []

    def predictor(*words, **asked):
        calls.append(1)
        return opened.predictor(*words, **asked)

    canvas = dlm.Canvas.from_prompts([[1, 2]], 4, opened.mask_id)
    config = dlm.SamplingConfig(gen_length=4, steps=4)
    states = list(dlm.denoise(predictor, canvas, config))
    assert len(calls) == 4 and states[-1].nfe.tolist() == [4]


def test_an_open_checkpoint_generates(checkpoint, tokenizer):
    opened, config = load_pretrained(checkpoint), dlm.SamplingConfig(gen_length=4, steps=2)
    model, words = dlm.load(checkpoint)
    want = dlm.generate(model, ["The cat"], config, tokenizer=words)
    assert torch.equal(dlm.generate(opened, ["The cat"], config).sequences, want.sequences)


# ---------------------------------------------------------------- hub ids


def test_a_hub_id_is_a_folder_of_the_cache(tmp_path, tokenizer, monkeypatch):
    """Its files are fetched once, and then read as those of a folder are; the commit names them."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--fox--tiny"
    make_checkpoint(cache / "snapshots" / commit, tokenizer)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opened = load_pretrained("fox/tiny")
    assert (opened.name, opened.digest, opened.folder) == ("tiny", commit, cache / "snapshots" / commit)
    assert opened.model.config.d_model == 32 and opened.tokenizer.mask_token_id == opened.mask_id
    with pytest.raises(OSError, match="fox/other is no folder here, and the hub did not give it"):
        load_pretrained("fox/other")


def test_answers_may_have_sampling_options_of_their_own(checkpoint, tmp_path):
    """The shipped model's answers take 150 to 230 tokens, and `dlm chat` cut them at the 128 of a continued text."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)

    def write(entry):
        (folder / "generation_config.json").write_text(json.dumps({"dlm": entry}))
        return load_pretrained(folder)

    opened = write({"gen_length": 8, "temperature": 0.5, "chat": {"gen_length": 16}})
    assert opened.defaults["gen_length"] == 8
    assert (opened.chat_defaults["gen_length"], opened.chat_defaults["temperature"]) == (16, 0.5)
    assert write({"gen_length": 8, "chat": True}).chat_defaults["gen_length"] == 8
    with pytest.raises(ValueError, match="entry 'gen_lenght'"):
        write({"chat": {"gen_lenght": 16}}).chat_defaults  # noqa: B018
    opened = write({"chat": {"gen_length": 16, "turns": 2}})
    assert opened.chat_turns == 2 and opened.chat_defaults == {"chat": opened.defaults["chat"], "gen_length": 16}
    assert write({"chat": True}).chat_turns is None and write({}).chat_turns is None
    for wrong in (0, "1", True):
        with pytest.raises(ValueError, match='"chat" has turns'):
            write({"chat": {"turns": wrong}}).chat_turns  # noqa: B018
    with pytest.raises(ValueError, match="gen_length '16'"):
        write({"chat": {"gen_length": "16"}}).chat_defaults  # noqa: B018


def test_without_a_config_the_defaults_are_the_checkpoints(tmp_path, tokenizer):
    """Fault: `dlm.generate(opened, texts)` took dlm's own defaults, and `dlm generate` those of the checkpoint."""
    folder = make_checkpoint(tmp_path / "own", tokenizer)
    own = {"gen_length": 5, "steps": 3, "method": "dual", "chat": {"gen_length": 7}}
    (folder / "generation_config.json").write_text(json.dumps({"dlm": own}))
    opened = dlm.load_pretrained(folder)
    assert opened.sampling() == dlm.SamplingConfig(gen_length=5, steps=3, method="dual")
    assert opened.sampling(gen_length=9).steps is None and opened.sampling("answers").gen_length == 7
    want = dlm.generate(opened, ["The cat"], opened.sampling())
    got = [dlm.generate(opened, ["The cat"]), dlm.generate(opened.model, ["The cat"], tokenizer=tokenizer)]
    assert all(torch.equal(out.sequences, want.sequences) and int(out.nfe) == 3 for out in got)
    assert dlm.infill(opened, "The ___{2} cat").nfe == 2


def test_what_is_no_setting_is_said_in_one_line(checkpoint):
    """Faults: a dict ended in an AttributeError; an unknown use was taken for text; the repr named every tensor."""
    opened = load_pretrained(checkpoint)
    for call in (dlm.generate, dlm.infill):
        with pytest.raises(TypeError, match=r"config is a dict: give dlm\.SamplingConfig"):
            call(opened, "The ___ cat", {"gen_length": 4})
    with pytest.raises(ValueError, match="use is 'chat', which is not known"):
        opened.sampling("chat")
    assert repr(opened).endswith(f"tiny-fox: llada, diffusion, {opened.tensors.parameters:,} parameters>")
