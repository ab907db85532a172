"""Fine-tuning: which tokens carry loss, columns that are found, errors with the line, mixtures, and whole runs."""

import json
import lzma
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import dlm
from dlm.data.conversations import ChatFormat, chat_source, load_chats
from dlm.data.documents import join, load_documents
from dlm.data.examples import Example, Examples, Stream, drop_prompts, fetch, fill_with_end, pack
from dlm.data.sources import Source, parse_sources, read_documents
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.tokenizer import train_tokenizer
from train.sft import main, parse

ROWS = [{"question": f"How many is {a} and {b}?", "answer": f"It is {a + b}."} for a in range(6) for b in range(4)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it one?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Many."},
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{row['question']} {row['answer']}" for row in ROWS], 300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder with a tiny model, its tokenizer, and nothing learned."""
    torch.manual_seed(0)
    size = len(tokenizer)
    config = LLaDAConfig(
        d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=64, vocab_size=size, max_sequence_length=64,
        weight_tying=False, mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, init_fn="normal",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LLaDAModelLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(path, tokenizer, **changes):
    return load_chats(path, tokenizer, ChatFormat(**{"chat": True, "length": 64, **changes}))


def shown(tokenizer, part, number=0):
    """(all of the text, what carries loss) of a document."""
    own = slice(part.starts[number], part.starts[number + 1])
    return tokenizer.decode(part.tokens[own]), tokenizer.decode(part.tokens[own][part.target[own]])


def test_every_answer_carries_loss_and_nothing_else(tmp_path, tokenizer):
    part = documents(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer, length=200)
    text, learned = shown(tokenizer, part)
    assert learned == "It is.<|eot_id|>Many.<|eot_id|><|endoftext|>"
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False) + "<|endoftext|>"
    # the prompt has the tokens that generation gives it
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert part.tokens[: len(prompt)].tolist() == prompt and not part.target[: len(prompt)].any()
    assert part.counts == {"rows": 1, "truncated": 0, "skipped": 0, "without_answer": 0}
    assert part.bytes == len("It is.Many.")


def test_plain_format_is_prompt_separator_response(tmp_path, tokenizer):
    part = documents(jsonl(tmp_path / "a.jsonl", ROWS[:1]), tokenizer, chat=False, separator=" ")
    text, learned = shown(tokenizer, part)
    assert text == "<|startoftext|>How many is 0 and 0? It is 0.<|endoftext|>" and learned == "It is 0.<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ({"prompt": "a", "response": "b"}, {}),
        ({"question": "a", "answer": "b", "id": 3}, {}),
        ({"instruction": "a", "input": "", "output": "b"}, {}),
        ({"ask": "a", "reply": "b", "prompt": "c"}, {"prompt": "ask", "response": "reply"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}),
        ({"talk": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"messages": "talk"}),
    ],
)
def test_columns_are_found_or_named(tmp_path, tokenizer, row, changes):
    text, learned = shown(tokenizer, documents(jsonl(tmp_path / "a.jsonl", [row]), tokenizer, **changes))
    assert learned == "b<|eot_id|><|endoftext|>" and "user<|end_header_id|>\n\na<|eot_id|>" in text


def test_reasoning_traces_are_written_as_d1_writes_them(tmp_path, tokenizer):
    row = {"question": "1 + 1?", "thinking_trajectories": ["One more.", "Or so."], "attempt": "2", "solution": "two"}
    part = documents(jsonl(tmp_path / "a.jsonl", [row]), tokenizer, length=200, preface="Think first.")
    text, learned = shown(tokenizer, part)
    assert learned == "<reasoning>One more.</reasoning>\n<answer>2</answer><|eot_id|><|endoftext|>"
    assert "user<|end_header_id|>\n\nThink first.\n\n1 + 1?<|eot_id|>" in text
    assert part.counts["not used: column solution"] == 1
    named = documents(jsonl(tmp_path / "b.jsonl", [row]), tokenizer, prompt="question", response="attempt")
    assert shown(tokenizer, named)[1] == "2<|eot_id|><|endoftext|>"
    bad = {**row, "thinking_trajectories": []}
    with pytest.raises(ValueError, match=r"line 1: column 'thinking_trajectories' must be a list of texts"):
        documents(jsonl(tmp_path / "c.jsonl", [bad]), tokenizer)


def test_the_recipe_for_reasoning_traces_reads_its_rows(tmp_path, tokenizer):
    """The YAML on a file of s1K's columns: its settings parse, and the answer is preceded by the format it asks for."""
    recipe = parse(["--config", "train/configs/sft_reasoning.yaml"])
    assert (recipe.sequence_length, recipe.epochs, recipe.eos_padding) == (4096, 20, "longest")
    row = {"question": "1 + 1?", "thinking_trajectories": ["One more."], "attempt": "2"}
    part = documents(jsonl(tmp_path / "a.jsonl", [row]), tokenizer, length=400, preface=recipe.preface)
    text = shown(tokenizer, part)[0]
    assert "\n\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>" in text
    assert "</answer>\n\n1 + 1?<|eot_id|>" in text


def test_alpacas_two_parts_are_one_prompt(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"instruction": "add", "input": "1 2", "output": "3"}])
    assert "\n\nadd\n\n1 2<|eot_id|>" in shown(tokenizer, documents(path, tokenizer))[0]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', {}, r"a\.jsonl, line 2: not JSON"),
        ('{"title": "a", "body": "b"}\n', {}, "no text for the prompt.*the columns are body, title.*--prompt-column"),
        ('{"prompt": "a", "body": "b"}\n', {}, "line 1: no text for the response"),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"response": "reply"},
            "response in column 'reply'; the columns are answer",
        ),
        ('{"messages": "hello"}\n', {}, "no messages in column 'messages'"),
        ('{"messages": [{"text": "a"}]}\n', {}, "is not an object with role and content"),
        (
            '{"prompt": "a <|mdm_mask|>", "response": "b"}\n',
            {},
            "line 1: the text holds the special token <|mdm_mask|>",
        ),
        ("", {}, "no example with an answer in 0 rows"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', {}, r"1 without an answer"),
        (
            '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}\n',
            {"chat": False},
            "system, user, assistant.*takes one prompt and one response",
        ),
    ],
)
def test_errors_name_the_line_and_the_columns(tmp_path, tokenizer, content, changes, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|") if "<|" in message else message):
        documents(tmp_path / "a.jsonl", tokenizer, **changes)


def test_long_examples_are_truncated_or_skipped_and_counted(tmp_path, tokenizer):
    long = {"prompt": "a", "response": "b " * 60}
    lost = {"prompt": "a " * 90, "response": "b"}
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, long, lost])
    cut = documents(path, tokenizer)
    assert len(cut) == 2 and np.diff(cut.starts).max() == 64
    assert cut.counts == {"rows": 3, "truncated": 2, "skipped": 0, "without_answer": 1}
    left = documents(path, tokenizer, overlong="skip")
    assert len(left) == 1 and left.counts == {"rows": 3, "truncated": 0, "skipped": 2, "without_answer": 0}
    again = documents(path, tokenizer, overlong="skip")  # from the cache
    assert again.counts == left.counts and (again.target == left.target).all() and again.target.dtype == bool


def test_parquet_xz_and_local_data_sets_give_the_same(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write(path.read_text())
    (tmp_path / "set").mkdir()
    for place in (tmp_path / "c.parquet", tmp_path / "set" / "train.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), place)
    first = documents(path, tokenizer)
    for other in (tmp_path / "b.jsonl.xz", tmp_path / "c.parquet"):
        assert (documents(other, tokenizer).tokens == first.tokens).all()
    assert list(read_documents(tmp_path / "c.parquet", "answer"))[:2] == ["It is 0.", "It is 1."]
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"d\.parquet: not a Parquet file"):
        documents(tmp_path / "d.parquet", tokenizer)


def test_a_data_set_of_the_hub_or_a_folder_comes_through_datasets(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    part = load_chats(f"hf:{tmp_path / 'set'}", tokenizer, ChatFormat(chat=True, length=64))
    assert (part.tokens == documents(jsonl(tmp_path / "a.jsonl", ROWS), tokenizer).tokens).all()
    streamed = chat_source([f"hf:{tmp_path / 'set'}"], tokenizer, ChatFormat(chat=True, length=64), "train").read(20)
    assert np.array_equal(np.concatenate([ids for _, ids, _ in streamed]), part.tokens[part.starts[20] :])
    with pytest.raises(ValueError, match="the data set cannot be loaded"):
        load_chats(f"hf:{tmp_path / 'set'}", tokenizer, ChatFormat(chat=True, length=64), split="nosplit")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the library datasets"):
        load_documents("hf:some/thing", tokenizer)


def test_a_list_of_sources():
    assert parse_sources("a.jsonl, b.txt") == [Source("a.jsonl"), Source("b.txt")]
    assert parse_sources("a.jsonl:0.7,hf:x/y:0.3") == [Source("a.jsonl", 0.7), Source("hf:x/y", 0.3)]
    assert parse_sources("hf:x/y") == [Source("hf:x/y")]
    with pytest.raises(ValueError, match=r"b\.txt has no weight"):
        parse_sources("a.jsonl:1,b.txt")
    with pytest.raises(ValueError, match="a weight is a share, above 0"):
        parse_sources("a.jsonl:0,b.txt:1")


def made_of(count, mark):
    return join([np.full(4, mark, dtype=np.uint16) for _ in range(count)], None, None, count)


def test_a_mixture_has_its_shares_and_meets_all_before_it_repeats():
    """20 of one, 5 of another, half each: 13 + 12 examples an epoch, so the small one comes round 2.4 times."""
    examples = Examples([made_of(20, 1), made_of(5, 2)], 4, [1.0, 1.0])
    stream = Stream(examples, seed=0)
    met = [pair for row in stream.take(250) for pair in row]  # ten epochs of one example a row
    assert stream.epoch == 9
    large, small = ([pair for pair in met if (pair[1] < 20) == first] for first in (True, False))
    assert len(large) == 130 and len(small) == 120
    assert len(set(met)) == 250  # (visit, index) names the noise: never the same twice
    for visit in range(24):
        assert sorted(index for turn, index in small if turn == visit) == list(range(20, 25))
    again = Stream(examples, seed=0, position=(4, 7))
    assert again.take(9) == [[pair] for pair in met[4 * 25 + 7 :][:9]]
    with_weights = Examples([made_of(20, 1), made_of(5, 2)], 4, [20.0, 5.0])
    assert sorted(index for row in Stream(with_weights, 0).take(25) for _, index in row) == list(range(25))


def test_end_of_text_padding_is_part_of_the_answer():
    example = Example(np.array([7, 8, 9]), np.array([False, False, True]), 3)
    filled = fill_with_end(example, 5, 1)
    assert filled.tokens.tolist() == [7, 8, 9, 1, 1] and filled.target.tolist() == [False, False, True, True, True]
    data = Examples([join([np.arange(3, dtype=np.uint16), np.arange(5, dtype=np.uint16)], None, None, 1)], 16)
    batch = fetch(data, [[(0, 0)], [(0, 1)]], 0, width=5, end_id=9)
    assert batch.tokens.tolist() == [[0, 1, 2, 9, 9], [0, 1, 2, 3, 4]] and (batch.segments[0] == 0).all()


def test_a_dropped_prompt_is_all_masks_and_belongs_to_the_example():
    examples = [Example(np.arange(6), np.arange(6) > 2, index) for index in range(200)]
    batch = pack([[(0, examples[i]), (0, examples[i + 1])] for i in range(0, 200, 2)], 14, 50)
    dropped = drop_prompts(batch, 0.25, 7, mask_id=99)
    masked = dropped.tokens == 99
    assert (masked == (dropped.tokens != batch.tokens)).all() and not (masked & batch.target).any()
    assert not masked[batch.segments == -1].any()
    of = {int(batch.index[e]): int(masked[batch.segments == e].sum()) for e in range(200)}
    assert set(of.values()) == {0, 3} and 30 < sum(count == 3 for count in of.values()) < 70
    alone = drop_prompts(pack([[(0, examples[9])]], 14, 50), 0.25, 7, mask_id=99)
    assert int((alone.tokens == 99).sum()) == of[9]
    assert drop_prompts(batch, 0.0, 7, 99) is batch


def run(base, tmp_path, name, *options, rows=ROWS):
    AcceleratorState._reset_state(reset_partial_state=True)
    data = jsonl(tmp_path / "data.jsonl", rows)
    return main([
        "--model", str(base), "--data", str(data), "--output", str(tmp_path / name), "--max-steps", "3",
        "--batch-size", "4", "--precision", "no", "--ema", "0.5", *options,
    ])  # fmt: skip


def weights(folder):
    model, _ = dlm.load(folder, device="cpu", dtype="float32")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--format", "plain", "--no-packing"),
        ("--no-packing", "--eos-padding", "longest", "--dropout-prompt", "0.3"),
        ("--objective", "block_diffusion", "--block-length", "8", "--valid-every", "2"),
        ("--activation-checkpointing", "--accumulation", "2", "--optimizer", "muon"),
    ],
)
def test_a_fine_tune_is_a_model_that_answers(base, tmp_path, capsys, options):
    export = tmp_path / "export"
    valid = ["--valid", str(jsonl(tmp_path / "valid.jsonl", ROWS[:4]))] if "--valid-every" in options else []
    assert run(base, tmp_path, "run", "--export", str(export), *valid, *options) == 0
    assert "24 rows, 0 truncated, 0 skipped, 0 without answer" in capsys.readouterr().out
    model, tokenizer = dlm.load(export, device="cpu")
    chat = [{"role": "user", "content": "How many is 1 and 2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    out = dlm.generate(model, [prompt], dlm.SamplingConfig(gen_length=8, steps=4), tokenizer=tokenizer)
    assert out.sequences.shape == (1, 8)
    assert not torch.equal(
        weights(export)["model.transformer.ff_out.weight"], weights(base)["model.transformer.ff_out.weight"]
    )
    notes = json.loads((export / "training.json").read_text())
    assert notes["command"].startswith("dlm train sft ") and ("validation" in notes) == bool(valid)


@pytest.mark.parametrize("shape", [{"block_length": 4, "full_attention": True}, {"block_length": 4}, {}])
def test_a_fine_tune_keeps_the_visibilities_of_its_model(base, tmp_path, capsys, shape):
    """A regression test: a model with blocks was tuned under full attention and came out without them, unsaid."""
    start, file = tmp_path / "start", tmp_path / "start" / "config.json"
    shutil.copytree(base, start)
    plain = json.loads(file.read_text())
    kind = {"objective": "block_diffusion"} if shape else {}
    file.write_text(json.dumps(plain | shape | kind))
    assert run(start, tmp_path, "run") == 0
    after = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    names = ("objective", "block_length", "full_attention")
    assert [after.get(name) for name in names] == [(plain | shape | kind).get(name) for name in names]
    assert "trains and exports it without" not in capsys.readouterr().out
    if shape:
        assert run(start, tmp_path, "full", "--objective", "diffusion", "--max-steps", "1") == 0
        assert "knows blocks of 4, and this run trains and exports it without: --objective model" in (
            capsys.readouterr().out
        )


def test_accumulation_does_not_change_padding_or_dropped_prompts(base, tmp_path):
    options = ("--no-packing", "--eos-padding", "longest", "--dropout-prompt", "0.5", "--estimator", "stratified")
    assert (
        run(base, tmp_path, "one", *options) == 0 and run(base, tmp_path, "four", *options, "--accumulation", "4") == 0
    )
    one, four = weights(tmp_path / "one" / "model"), weights(tmp_path / "four" / "model")
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-6


def test_lora_trains_adapters_alone_and_exports_the_merged_model(base, tmp_path, capsys):
    pytest.importorskip("peft")
    assert run(base, tmp_path, "run", "--lora", "4", "--learning-rate", "1e-2", "--activation-checkpointing") == 0
    assert "of them trained" in capsys.readouterr().out
    before, after = weights(base), weights(tmp_path / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".blocks." in name and "norm" not in name}
    for name in ("q_proj", "up_proj"):
        difference = (
            after[f"model.transformer.blocks.0.{name}.weight"] - before[f"model.transformer.blocks.0.{name}.weight"]
        )
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 4
    state = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert (state / "trainer.json").is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(base, tmp_path, "run", "--lora", "4", "--learning-rate", "1e-2", "--resume", "--max-steps", "4") == 0
    assert run(base, tmp_path, "bad", "--lora", "4", "--lora-targets", "qproj") == 2
    assert "lora_targets has 'qproj'" in capsys.readouterr().err


def test_lora_without_peft_says_what_to_install(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(base, tmp_path, "run", "--lora", "4") == 2
    assert "pip install 'dlm[lora]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eos-padding", "longest"], "use --no-packing"),
        (["--eos-paddin", "longest"], "did you mean --eos-padding?"),
        (["--format", "chatml"], "format is 'chatml'"),
        (["--overlong", "cut"], "overlong is 'cut'"),
        (["--sequence-length", "128"], "the model was made for at most 64 tokens"),
        (["--base-dtype", "bfloat16"], "use --lora"),
        (["--objective", "autoregressive", "--dropout-prompt", "0.1"], "never meets"),
        (["--tokenizer", "nowhere/at/all"], "nowhere/at/all"),
        (["--messages-column", "a", "--prompt-column", "b"], "are both named"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(base, tmp_path, capsys, options, message):
    assert run(base, tmp_path, "run", *options) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_a_recipe_runs_without_a_config():
    recipe = parse(["--data", "a.jsonl"])
    assert recipe.model and recipe.format == "auto" and recipe.lora_targets[0] == "q_proj"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (['{"prompt": "a", "response": "b"}', '{"question": 1}'], "column names don't match"),
        (['{"prompt": "a", "response": "b"}\n{nope'], "JSON parse error"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_says_why(base, tmp_path, capsys, monkeypatch, files, message):
    """Fault: "An error occurred while generating the dataset", whatever it was."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for number, text in enumerate(files):
        (tmp_path / "set" / f"{number}.jsonl").write_text(text + "\n")
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--model", str(base), "--data", f"hf:{tmp_path / 'set'}", "--output", str(tmp_path / "run")]
    assert main([*words, "--max-steps", "1", "--precision", "no"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("sft: hf:") and message in told
