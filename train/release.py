"""Turn a trained model into the folder that ships: weights, sampling defaults, measured bound, samples, model card.

    python -m train.release --model runs/stories-2/export --before runs/stories-1/model \\
        --output dlm/assets/llama-stories-6m --card train/configs/card_stories.md \\
        --valid data/valid/stories.txt.xz --credits data/childrens_ccby.jsonl

The card's words come from the template; every number and sample in it is measured here or read from the run's notes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import dlm
from dlm.training.config import TrainingConfig
from dlm.utils.files import whole_folder, write_json
from dlm.utils.settings import OptionParser

LN2 = math.log(2.0)


def measure(model, tokenizer, paths: list[str], length: int, passes: int, rows: int | None = None) -> dict:
    """The bound on held-out text: `passes` draws of noise for every example, with the standard error over documents.

    rows: of packed text that are looked at, None for all.

    Of an autoregressive model the likelihood itself, in one pass, since no noise is drawn.
    """
    from dlm.data.documents import load_documents
    from dlm.data.examples import Examples
    from dlm.training.accelerator import make_accelerator
    from dlm.training.validation import validate

    causal = model.config.objective == "autoregressive"
    passes = 1 if causal else passes
    parts = [load_documents(path, tokenizer) for path in paths]
    examples = Examples(parts, length)
    settings = TrainingConfig(output=".", max_steps=1, precision="no", sample_every=0)
    losses = validate(
        model,
        examples,
        make_accelerator(settings),
        objective="autoregressive" if causal else "diffusion",
        estimator="count",
        mask_id=model.config.mask_token_id,
        pad_id=model.config.pad_token_id,
        seed=1,
        micro_batch=16,
        passes=passes,
        rows=rows,
    )
    targets = sum(int((part.tokens != part.bos_id).sum()) for part in parts) - (len(examples) if causal else 0)
    size = sum(part.bytes for part in parts) * losses.tokens / targets  # of the tokens that were scored
    return {
        "nats_per_token": losses.bound,
        "standard_error": losses.error,
        "perplexity": math.exp(losses.bound),
        "bits_per_byte": losses.bound * losses.tokens / size / LN2,
        "bits_per_byte_error": losses.error * losses.tokens / size / LN2,
        "evaluations": losses.examples,
        "documents": sum(len(part) for part in parts),
        "tokens": losses.tokens // passes,
        "cross_entropy_by_mask_rate": losses.buckets,
    }


def samples(source: Path, prompts: list[str], config: dlm.SamplingConfig) -> list[str]:
    """One text a prompt, seeds from config.seed up, unedited, by the model of either kind in `source`."""
    from dlm.evaluation.generations import open_writer, write
    from dlm.tokenizer import decode, encode_prompt

    writer = open_writer(source, dtype="float32", device="cpu")
    rows = write(writer, [encode_prompt(writer.tokenizer, prompt, writer.mask_id) for prompt in prompts], config)
    return [prompt + decode(writer.tokenizer, row) for prompt, row in zip(prompts, rows, strict=True)]


def read_notes(folder: Path) -> dict:
    """What train/pretrain.py wrote about a run."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def quote(text: str) -> str:
    """A text as a quotation in Markdown, line for line."""
    return "\n".join(f"> {line}".rstrip() + ("  " if line else "") for line in text.split("\n"))


def numbered(texts: list[str]) -> str:
    """Texts as quotations, each under the seed that it has in its batch."""
    return "\n\n".join(f"Seed {seed}:\n\n{quote(text)}" for seed, text in enumerate(texts))


def credits(path: Path) -> str:
    """`Title` by Author, one entry a text, from a JSONL file with title, author and licence."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(row["license"].strip("[]"), []).append(f"*{row['title']}* by {row['author']}")
    return "\n\n".join(f"**{kind}** ({len(entries)}): " + "; ".join(entries) + "." for kind, entries in kinds.items())


def main(argv: list[str]) -> int:
    parser = OptionParser("dlm train release", __doc__)
    parser.add_argument("--model", required=True, help="folder that train/pretrain.py exported")
    parser.add_argument("--before", help="folder of the first stage's model, where there were two")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--card", required=True, help="template of the model card: text with {fields}")
    parser.add_argument("--valid", required=True, help="held-out text, comma separated files")
    parser.add_argument("--credits", help="JSONL with title, author and license of texts to be credited")
    parser.add_argument("--passes", type=int, default=4, help="draws of noise for each example (default: 4)")
    parser.add_argument("--rows", type=int, help="packed rows of the held-out text to score (default: all)")
    args = parser.parse(argv)
    import yaml

    source, template = Path(args.model), Path(args.card).read_text(encoding="utf-8")
    notes = read_notes(source)
    before = read_notes(Path(args.before)) if args.before else {}
    front = yaml.safe_load(template.split("---")[1])
    defaults, prompts, chat = front.pop("sampling"), front.pop("samples"), front.pop("chat")
    more = front.pop("more_samples", {})  # name of a further set of samples: the settings that differ in it
    model, tokenizer = dlm.load(source, dtype="float32", device="cpu")
    bound = measure(model, tokenizer, args.valid.split(","), notes["recipe"]["sequence_length"], args.passes, args.rows)
    config = dlm.SamplingConfig(**defaults)
    texts = samples(source, prompts, config)
    further = {name: samples(source, prompts, dlm.SamplingConfig(**{**defaults, **own})) for name, own in more.items()}
    fields = {
        **{key: value for key, value in notes.items() if not isinstance(value, dict)},
        **notes["recipe"],
        **model.config.to_dict(),  # the shape that was trained, not what the recipe would make anew
        **bound,
        **{f"before_{key}": value for key, value in before.items()},
        "minutes": (notes["seconds"] + before.get("seconds", 0)) / 60,
        "all_tokens": notes.get("tokens_seen", 0) + before.get("tokens_seen", 0),
        "sampling": ", ".join(f"`{key}` {value}" for key, value in defaults.items()),
        "samples": numbered(texts),
        **{f"{name}_samples": numbered(written) for name, written in further.items()},
        "reading": front.pop("reading", ""),
        "credits": credits(Path(args.credits)) if args.credits else "",
    }
    card = "---\n" + yaml.safe_dump(front, sort_keys=False) + "---" + template.split("---", 2)[2].format_map(fields)
    with whole_folder(args.output) as folder:
        for file in source.iterdir():
            if file.name != "training.json":
                shutil.copy(file, folder / file.name)
        if model.config.objective != "autoregressive":  # the sampler's defaults
            write_json(folder / "generation_config.json", {"dlm": {**defaults, "chat": chat}}, indent=2)
        write_json(folder / "training.json", {**notes, "before": before, "validation": bound}, indent=2)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {args.output}: {bound['nats_per_token']:.4f} ± {bound['standard_error']:.4f} nats/token")
    for text in texts:
        print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
