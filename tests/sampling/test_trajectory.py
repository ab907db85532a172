"""Recordings: what is written is what was denoised, and what is damaged or foreign is refused in one line."""

import json

import pytest
import torch

import dlm
from dlm import Canvas, SamplingConfig, denoise
from dlm.cli.main import main
from dlm.cli.replay import page, states
from dlm.sampling.trajectory import Recorder, read_recordings
from tests.helpers.toys import MASK, tiny_model


def recorded(path, config, rows=([1, 2, 3], [4])):
    canvas = Canvas.from_prompts(rows, 6, MASK)
    with Recorder(path) as recorder:
        found = list(recorder.follow(denoise(tiny_model(1), canvas, config, likely=3), canvas, {"seed": 1}))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "c2f", "steps": 4},
        {"revise": "edit", "edit_threshold": 0.1},
        {"revise": "remask", "remask_eta": 0.5},
    ],
)
def test_a_recording_gives_the_states_back(tmp_path, options):
    config = SamplingConfig(gen_length=6, block_length=3, **options)
    want = recorded(tmp_path / "run.jsonl", config)
    [recording] = read_recordings(tmp_path / "run.jsonl")
    got = list(states(recording))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        valid = b.canvas.valid
        assert torch.equal(a.canvas.tokens[valid], b.canvas.tokens[valid])
        assert torch.equal(a.canvas.masked, b.canvas.masked)
        assert torch.equal(a.nfe, b.nfe)
        kept = b.committed & ~b.canvas.masked
        assert torch.allclose(a.confidence[kept], b.confidence[kept].float(), atol=1e-5)


def test_likely_tokens_are_the_models(tmp_path):
    recorded(tmp_path / "run.jsonl", SamplingConfig(gen_length=6, block_length=6))
    [recording] = read_recordings(tmp_path / "run.jsonl")
    for turn in recording.passes:
        for _, _, changes in turn.rows.values():
            for change in changes:
                first, probability = change.likely[0]
                assert len(change.likely) == 3
                if first == change.token:
                    assert probability == pytest.approx(change.confidence, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("hello\n", "no recording"),
        ('{"a": 1}\n', "no recording"),
        ("[1]\n", "no recording"),
        ('{"format": "dlm-recording", "version": 9, "rows": []}\n', "version 9"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, said):
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_recordings(tmp_path / "run.jsonl")


@pytest.mark.parametrize("damage", ["cut", "slot", "row"])
def test_damage_names_the_line(tmp_path, damage):
    path = tmp_path / "run.jsonl"
    recorded(path, SamplingConfig(gen_length=6, block_length=3))
    lines = path.read_text().splitlines()
    if damage == "cut":
        lines[2] = lines[2][:20]
    else:
        line = json.loads(lines[2])
        if damage == "slot":
            line["rows"][0]["changes"][0][0] = 99
        else:
            line["rows"][0]["row"] = 7
        lines[2] = json.dumps(line)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"run\.jsonl:3: (not JSON .*: )?the recording is damaged"):
        read_recordings(path)


def test_commands_record_and_replay(tmp_path, capsys):
    path, out = tmp_path / "run.jsonl", tmp_path / "run.html"
    command = ["generate", "Once upon a time", "--gen-length", "8", "--seed", "3"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--record", str(path)]) == 0
    assert capsys.readouterr().out == text  # recording changes nothing
    assert main(["replay", str(path)]) == 0
    assert capsys.readouterr().out == text
    assert main(["replay", str(path), "--html", str(out)]) == 0
    html = out.read_text()
    assert "http" not in html.replace("http-equiv", "")  # self-contained
    assert '"mask": ' in html
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_text_of_the_page_cannot_end_its_script(tmp_path):
    model, tokenizer = dlm.load()
    ids = tokenizer("</script><b>", add_special_tokens=False)["input_ids"]
    canvas = Canvas.from_prompts([ids], 2, tokenizer.mask_token_id)
    with Recorder(tmp_path / "run.jsonl", tokenizer) as recorder:
        list(recorder.follow(denoise(model, canvas, SamplingConfig(gen_length=2)), canvas, {"note": "</script>"}))
    assert page(read_recordings(tmp_path / "run.jsonl")).count("</script>") == 1
