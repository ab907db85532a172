"""A second, slow implementation of every family's transformer: from what their authors wrote down, no code shared.

One row, float64, plain loops over tokens and experts. Tensors have the authors' names. T slots, E experts.
"""

import math

import torch
import torch.nn.functional as F


def logits(state, config, tokens, block=None):
    """Logits (T, V) of ids `tokens`: state, name -> tensor; config, the fields of config.json; block, the length of the
    blocks of a block-causal model, 1 for a causal one, None for full attention."""
    return Network(state, config)(tokens, block)


class Network:
    def __init__(self, state, config):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.config, self.kind = config, config["model_type"]
        self.heads, self.kv = config["num_attention_heads"], config.get("num_key_value_heads")
        self.kv = self.heads if self.kv is None else self.kv
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        part = config.get("partial_rotary_factor")
        self.turned = int(self.size * (0.5 if part is None and self.kind == "llada2_moe" else part or 1))
        self.llada2 = self.kind == "llada2_moe"

    def linear(self, x, name):
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, x, name):
        mean = (x * x).mean(-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.state[f"{name}.weight"]

    def frequencies(self, length):
        """(turned / 2,) radians a slot, and what multiplies cos and sin."""
        r, theta = self.turned, self.config["rope_theta"]
        plain = [theta ** (-2 * i / r) for i in range(r // 2)]
        scaling = self.config.get("rope_scaling") or {}
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind == "linear":
            return [f / factor for f in plain], 1.0
        if kind == "dynamic":
            most = self.config["max_position_embeddings"]
            if length > most:
                theta = theta * (factor * length / most - (factor - 1)) ** (r / (r - 2))
            return [theta ** (-2 * i / r) for i in range(r // 2)], 1.0
        if kind == "llama3":
            old, low, high = (
                scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            out = []
            for f in plain:
                wave = 2 * math.pi / f
                if wave < old / high:
                    out.append(f)
                elif wave > old / low:
                    out.append(f / factor)
                else:
                    smooth = (old / wave - low) / (high - low)
                    out.append((1 - smooth) * f / factor + smooth * f)
            return out, 1.0
        if kind == "yarn":
            old = scaling.get("original_max_position_embeddings") or self.config["max_position_embeddings"]

            def place(turns):
                return r * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

            low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), r - 1)
            out = []
            for i, f in enumerate(plain):
                ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
                out.append(f / factor * ramp + f * (1 - ramp))
            return out, 0.1 * math.log(factor) + 1
        return plain, 1.0

    def rotate(self, x):
        """x (T, H, D): the pair (i, i + R/2) of the first R dimensions turns by slot times frequency."""
        speeds, scale = self.frequencies(len(x))
        out, half = x.clone(), self.turned // 2
        for slot in range(len(x)):
            for i, speed in enumerate(speeds):
                c, s = scale * math.cos(slot * speed), scale * math.sin(slot * speed)
                a, b = x[slot, :, i], x[slot, :, i + half]
                out[slot, :, i], out[slot, :, i + half] = a * c - b * s, b * c + a * s
        return out

    def attention(self, x, layer, block):
        length = len(x)
        if self.llada2:
            p, q_norm, k_norm, out = f"{layer}.attention", "query_layernorm", "key_layernorm", "dense"
            fused = self.linear(x, f"{p}.query_key_value")
            n = self.heads * self.size
            q, k, v = fused[:, :n], fused[:, n : n + self.kv * self.size], fused[:, n + self.kv * self.size :]
        else:
            p, q_norm, k_norm, out = f"{layer}.self_attn", "q_norm", "k_norm", "o_proj"
            q, k, v = (self.linear(x, f"{p}.{name}_proj") for name in "qkv")
        q, k, v = (y.reshape(length, -1, self.size) for y in (q, k, v))
        if f"{p}.{q_norm}.weight" in self.state:
            q, k = self.norm(q, f"{p}.{q_norm}"), self.norm(k, f"{p}.{k_norm}")
        turned = self.config.get("no_rope_layers")
        if turned is None or turned[int(layer.rsplit(".", 1)[1])]:
            q, k = self.rotate(q), self.rotate(k)
        joined = torch.zeros(length, self.heads, self.size, dtype=torch.float64)
        for head in range(self.heads):
            mine = head // (self.heads // self.kv)
            scores = q[:, head] @ k[:, mine].T / math.sqrt(self.size)
            for i in range(length):
                for j in range(length):
                    if block is not None and j // block > i // block:
                        scores[i, j] = -math.inf
            joined[:, head] = scores.softmax(-1) @ v[:, mine]
        return self.linear(joined.reshape(length, -1), f"{p}.{out}")

    def feed(self, x, name):
        return self.linear(
            F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def mixture(self, x, layer):
        config, out = self.config, torch.zeros_like(x)
        for t, token in enumerate(x):
            raw = self.state[f"{layer}.mlp.gate.weight"] @ token
            if self.llada2:
                weight = 1 / (1 + (-raw).exp())
                choosing = weight + self.state[f"{layer}.mlp.gate.expert_bias"]
                groups = choosing.reshape(config.get("n_group") or 1, -1)
                score = groups.sort(descending=True).values[:, :2].sum(-1)
                kept = score.argsort(descending=True)[: config.get("topk_group") or 1].tolist()
                size = groups.shape[1]
                open_ones = [e for e in range(len(choosing)) if e // size in kept]
            else:
                weight = raw.softmax(-1)
                if f"{layer}.mlp.expert_bias" in self.state:
                    weight = weight + self.state[f"{layer}.mlp.expert_bias"]
                choosing, open_ones = weight, list(range(len(raw)))
            k = config["num_experts_per_tok"]
            chosen = sorted(open_ones, key=lambda e: -float(choosing[e]))[:k]
            total = sum(float(weight[e]) for e in chosen) + 1e-20
            for e in chosen:
                w = float(weight[e])
                if self.llada2:
                    w = (w / total if k > 1 else w) * config["routed_scaling_factor"]
                elif self.kind in ("rnd1", "sdar_moe") and config["norm_topk_prob"]:
                    w = w / total
                out[t] += w * self.feed(token[None], f"{layer}.mlp.experts.{e}")[0]
        shared = f"{layer}.mlp.shared_experts" if self.llada2 else f"{layer}.shared_expert"
        return out + self.feed(x, shared) if f"{shared}.gate_proj.weight" in self.state else out

    def __call__(self, tokens, block):
        table = "model.word_embeddings.weight" if self.llada2 else "model.embed_tokens.weight"
        x = self.state[table][torch.tensor(tokens)]
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), layer, block)
            y = self.norm(x, f"{layer}.post_attention_layernorm")
            mixed = f"{layer}.mlp.gate.weight" in self.state
            x = x + (self.mixture(y, layer) if mixed else self.feed(y, f"{layer}.mlp"))
        x = self.norm(x, "model.norm")
        return x @ self.state.get("lm_head.weight", self.state[table]).T
