"""A second, slow implementation of the transformer and of every decoding method, to compare the library with.

One row at a time, float64, plain loops, no code shared with the library: it says what the answer is, never how to get
it fast. T slots of one row, V vocabulary, K block length.
"""

import math
from dataclasses import dataclass, field

import torch


class Network:
    """LLaDA's transformer read from a state dict; keys and values of slots not recomputed come from a memory."""

    def __init__(self, state, config):
        self.weights = {name: tensor.double() for name, tensor in state.items()}
        self.config = config
        self.heads = config["n_heads"]
        self.kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else self.heads)
        self.width = config["d_model"] // self.heads
        self.block_length = config.get("block_length")  # not None: block-causal visibility

    @classmethod
    def of(cls, model):
        return cls(model.state_dict(), model.config.to_dict())

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name] if name in self.weights else x * scale

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def rotate(self, x, slots):
        """RoPE as rotation of the pairs (i, i + width/2) of each head, by slot * theta^(-2i/width)."""
        half = self.width // 2
        speed = self.config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.tensor(slots, dtype=torch.float64)[:, None, None] * speed
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def sees(self, q, k):
        return self.block_length is None or k // self.block_length <= q // self.block_length

    def __call__(self, tokens, slots, memory):
        """Logits (len(slots), V) of the slots named; `memory` (a dict) keeps every layer's keys and values."""
        total = len(tokens)
        prefix = "model.transformer."
        x = self.weights[prefix + "wte.weight"][torch.tensor([tokens[s] for s in slots])]
        for n in range(self.config["n_layers"]):
            block = f"{prefix}blocks.{n}."
            h = self.norm(x, block + "attn_norm.weight")
            q, k, v = (self.linear(h, block + name) for name in ("q_proj", "k_proj", "v_proj"))
            if block + "q_norm.weight" in self.weights:
                q, k = self.norm(q, block + "q_norm.weight"), self.norm(k, block + "k_norm.weight")
            q = self.rotate(q.view(-1, self.heads, self.width), slots)
            k = self.rotate(k.view(-1, self.kv_heads, self.width), slots)
            v = v.view(-1, self.kv_heads, self.width)
            keys, values = memory.setdefault(n, ({}, {}))
            for i, s in enumerate(slots):
                keys[s], values[s] = k[i], v[i]
            known = sorted(keys)
            assert len(known) <= total
            all_k = torch.stack([keys[s] for s in known]).repeat_interleave(self.heads // self.kv_heads, 1)
            all_v = torch.stack([values[s] for s in known]).repeat_interleave(self.heads // self.kv_heads, 1)
            score = torch.einsum("qhd,khd->hqk", q, all_k) / math.sqrt(self.width)
            hidden = torch.tensor([[not self.sees(s, t) for t in known] for s in slots])
            attention = score.masked_fill(hidden, -math.inf).softmax(-1)
            x = x + self.linear(
                torch.einsum("hqk,khd->qhd", attention, all_v).reshape(len(slots), -1), block + "attn_out"
            )
            h = self.norm(x, block + "ff_norm.weight")
            gate = self.linear(h, block + "ff_proj")
            x = x + self.linear(gate * torch.sigmoid(gate) * self.linear(h, block + "up_proj"), block + "ff_out")
        x = self.norm(x, prefix + "ln_f.weight")
        if prefix + "ff_out.weight" in self.weights:
            return self.linear(x, prefix + "ff_out")
        return x @ self.weights[prefix + "wte.weight"].T


@dataclass
class Settings:
    """What the oracle needs of a sampling configuration (temperature 0)."""

    gen_length: int
    steps: int
    block_length: int
    method: str = "none"
    commit: str = "quota"
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    confidence: str = "probability"
    cfg_scale: float = 0.0
    window: int = 16
    eos: tuple = ()
    vocab_size: int | None = None


@dataclass
class Answer:
    tokens: list
    commit_step: list
    nfe: int
    passes: list = field(default_factory=list)  # the slots recomputed in each pass


def score(logits, mask_id, settings):
    """(token, confidence, entropy) of one slot; confidence under the whole softmax, the mask token never proposed."""
    log_p = logits - torch.logsumexp(logits, -1)
    p = log_p.exp()
    allowed = p.clone()
    allowed[mask_id] = -1
    if settings.vocab_size is not None:
        allowed[settings.vocab_size :] = -1
    token = int(allowed.argmax())
    entropy = float(-(p * log_p).sum())
    if settings.confidence == "probability":
        confidence = float(p[token])
    elif settings.confidence == "margin":
        top = allowed.sort(descending=True).values
        confidence = float(top[0] - top[1])
    else:
        confidence = -entropy
    return token, confidence, entropy


def choose(scores, quota, settings):
    """Which of {slot: (token, confidence, entropy)} to commit."""
    order = sorted(scores, key=lambda s: (-scores[s][1], s))
    if settings.commit == "quota":
        return order[:quota]
    if settings.commit == "threshold":
        return [s for s in order if scores[s][1] >= settings.threshold] or order[:1]
    if settings.commit == "factor":
        n = len(order)
        while n > 1 and (n + 1) * (1 - scores[order[n - 1]][1]) >= settings.factor:
            n -= 1
        return order[:n]
    order = sorted(scores, key=lambda s: (scores[s][2], s))
    chosen, total = [], 0.0
    for s in order:
        total += scores[s][2]
        if chosen and total - scores[s][2] > settings.entropy_bound:
            break
        chosen.append(s)
    return chosen


def share(total, parts):
    """Largest remainder over equal parts: the first parts get one more."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def generate(network, prompt, mask_id, settings):
    """Decode one row and return an Answer; block_length divides gen_length, and steps >= blocks."""
    start, total = len(prompt), len(prompt) + settings.gen_length
    tokens = list(prompt) + [mask_id] * settings.gen_length
    answer = Answer([], [0] * settings.gen_length, 0)
    memories = ({}, {})

    def run(slots):
        answer.nfe += 1
        answer.passes.append(list(slots))
        logits = network(tokens, slots, memories[0])
        if settings.cfg_scale > 0:
            blind = [mask_id] * start + tokens[start:]
            other = network(blind, slots, memories[1])
            logits = other + (settings.cfg_scale + 1) * (logits - other)
        return {s: score(row, mask_id, settings) for s, row in zip(slots, logits, strict=True) if tokens[s] == mask_id}

    def write(scores, chosen):
        assert chosen
        for s in chosen:
            tokens[s] = scores[s][0]
            answer.commit_step[s - start] = answer.nfe

    blocks = settings.gen_length // settings.block_length
    assert blocks * settings.block_length == settings.gen_length
    shares = share(settings.steps, blocks)
    for index in range(blocks):
        everything = list(range(total))
        first = settings.block_length * index + start
        block = list(range(first, first + settings.block_length))
        scores = run(everything)
        if settings.method == "c2f":
            real = {s: v for s, v in scores.items() if v[0] not in settings.eos}
            size = min(settings.block_length, len(scores))
            pool = real if len(real) >= size else scores
            block = sorted(sorted(pool, key=lambda s: (-pool[s][1], s))[:size])
        again = {
            "none": everything,
            "prefix": list(range(first, total)),
            "dual": block,
            "c2f": block,
            "vicinity": list(range(max(0, first - settings.window), min(total, block[-1] + 1 + settings.window))),
        }[settings.method]
        quotas = share(len(block), shares[index])
        while True:
            inside = {s: scores[s] for s in block if tokens[s] == mask_id}
            write(scores, choose(inside, quotas.pop(0) if quotas else 0, settings))
            if not any(tokens[s] == mask_id for s in block):
                break
            scores = run(again)
    answer.tokens = tokens[start:]
    return answer
