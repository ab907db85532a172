"""transformers' Trainer and PEFT train the model as they train any other."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import dlm
from tests.helpers.commandline import STORY, checkpoint, tokenizer  # noqa: F401  fixtures
from tests.helpers.toys import tiny_model


def trainer(folder, model, tokenizer, **changes):  # noqa: F811
    rows = [{"input_ids": tokenizer(text)["input_ids"], "note": 1} for text in STORY.split(". ") * 4]
    if not changes.get("remove_unused_columns", True):
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    settings = {
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": 0, "logging_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings | changes)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
    return Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows[:8])


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("remove", [True, False], ids=["unused columns removed", "kept"])
def test_trainer_learns_and_evaluates(tmp_path, checkpoint, tokenizer, remove):  # noqa: F811
    model, _ = dlm.load(checkpoint)
    run = trainer(tmp_path, model, tokenizer, remove_unused_columns=remove, gradient_accumulation_steps=2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    again, _ = dlm.load(tmp_path / "checkpoint-4")
    assert torch.equal(weights(again), weights(model))


@pytest.mark.filterwarnings("ignore")
def test_trainer_goes_on(tmp_path, checkpoint, tokenizer):  # noqa: F811
    """From a checkpoint in the middle, to steps that begin from its weights."""
    first = trainer(tmp_path, dlm.load(checkpoint)[0], tokenizer)
    first.train()
    second = trainer(tmp_path, dlm.load(checkpoint)[0], tokenizer)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == 4
    middle = weights(dlm.load(tmp_path / "checkpoint-2")[0])
    assert not torch.equal(weights(second.model), middle)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_peft_adapters_train_save_and_load(tmp_path, task):
    peft = pytest.importorskip("peft")
    base = tiny_model(1, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model, _ = dlm.load(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2))
    trained = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"q_proj", "v_proj"} or {"q_proj", "v_proj"} == {
        part for name, w in model.named_parameters() if w.requires_grad for part in name.split(".") if "proj" in part
    }
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.3)
    ids, mask = torch.tensor([[1, 2, 39], [3, 39, 38]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    more = {} if task == "FEATURE_EXTRACTION" else {"labels": torch.tensor([[-100, -100, 5], [-100, 6, -100]])}
    out = model(input_ids=ids, attention_mask=mask, **more)
    if more:
        out.loss.backward()
        assert all(w.grad is not None for n, w in model.named_parameters() if w.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    merged, _ = dlm.load(tmp_path / "adapter")
    with torch.inference_mode():
        want = model(input_ids=ids, attention_mask=mask).logits
        assert type(merged) is dlm.LLaDAModelLM
        assert torch.allclose(merged(ids, mask).logits[mask.bool()], want[mask.bool()], atol=1e-5)
        assert not torch.allclose(want, base(ids, mask).logits, atol=1e-2)
    config = dlm.SamplingConfig(gen_length=4)
    answer = dlm.generate(merged, [[1, 2]], config).sequences
    assert torch.equal(dlm.generate(model, [[1, 2]], config).sequences, answer)
    if task == "CAUSAL_LM":
        assert torch.equal(model.generate(input_ids=ids[:1, :2], gen_length=4)[:, 2:], answer)
