"""The two official U-Nets written once more, straight from their description and with their key names.

Plain functions over a dictionary that draws a tensor when its name is first asked for: one call gives a state dict of
official style and the output that belongs to it. Nothing of the package is used.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """Random tensors by official names."""

    def __init__(self, seed=0):
        super().__init__()
        self.source = torch.Generator().manual_seed(seed)

    def get(self, name, *shape):
        if name not in self:
            fan = math.prod(shape[1:]) or 1
            self[name] = torch.randn(shape, generator=self.source) * fan**-0.5 + (1.0 if "norm" in name else 0.0)
        return self[name]

    def conv(self, name, x, channels, kernel=3, stride=1):
        weight = self.get(f"{name}.weight", channels, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.get(f"{name}.bias", channels), stride, kernel // 2)

    def conv1d(self, name, x, channels):
        return F.conv1d(x, self.get(f"{name}.weight", channels, x.shape[1], 1), self.get(f"{name}.bias", channels))

    def linear(self, name, x, size, bias=True):
        weight = self.get(f"{name}.weight", size, x.shape[1])
        return F.linear(x, weight, self.get(f"{name}.bias", size) if bias else None)

    def norm(self, name, x, groups):
        channels = x.shape[1]
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        scale, shift = self.get(f"{name}.weight", channels), self.get(f"{name}.bias", channels)
        return y.reshape(x.shape) * scale.view(-1, *[1] * (x.dim() - 2)) + shift.view(-1, *[1] * (x.dim() - 2))


def sinusoid(t, size):
    """Cosines first, frequencies 10000^(-k / (size / 2))."""
    w = torch.tensor([10000 ** (-k / (size // 2)) for k in range(size // 2)])
    return torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], dim=1)


def halved(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def doubled(x):
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def attend(q, k, v):
    """One head: (B, D, N) each."""
    weight = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=-1)  # (B, N, N)
    return v @ weight.transpose(1, 2)


# ---- guided diffusion ----


def adm_block(w, name, x, emb, channels, hyper, change=None):
    change = change or (lambda value: value)
    h = change(F.silu(w.norm(f"{name}.in_layers.0", x, 32)))
    h = w.conv(f"{name}.in_layers.2", h, channels)
    scale_shift = hyper.get("scale_shift", True)
    e = w.linear(f"{name}.emb_layers.1", F.silu(emb), channels * (2 if scale_shift else 1))[:, :, None, None]
    if scale_shift:
        h = w.norm(f"{name}.out_layers.0", h, 32) * (1 + e[:, :channels]) + e[:, channels:]
    else:
        h = w.norm(f"{name}.out_layers.0", h + e, 32)
    h = w.conv(f"{name}.out_layers.3", F.silu(h), channels)
    x = change(x)
    return h + (x if x.shape[1] == channels else w.conv(f"{name}.skip_connection", x, channels, 1))


def adm_attention(w, name, x, hyper):
    size, tokens = x.shape[1], x.flatten(2)
    width = hyper.get("head_channels") or size // hyper.get("num_heads", 4)
    heads = size // width
    qkv = w.conv1d(f"{name}.qkv", w.norm(f"{name}.norm", tokens, 32), 3 * size)
    results = []
    for head in range(heads):
        if hyper.get("qkv_order") == "kind":  # all q, all k, all v
            starts = [kind * size + head * width for kind in range(3)]
        else:  # a head's q, k and v lie together
            starts = [head * 3 * width + kind * width for kind in range(3)]
        results.append(attend(*(qkv[:, start : start + width] for start in starts)))
    return x + w.conv1d(f"{name}.proj_out", torch.cat(results, dim=1), size).reshape(x.shape)


def adm(w, x, t, hyper, label=None):
    """``x`` is the whole input, map included."""
    hidden, mults, blocks = hyper["hidden_size"], hyper["channel_mult"], hyper["num_blocks"]
    emb = w.linear("time_embed.0", sinusoid(t, hidden), 4 * hidden)
    emb = w.linear("time_embed.2", F.silu(emb), 4 * hidden)
    if label is not None:
        emb = emb + w.get("label_emb.weight", hyper["num_classes"], 4 * hidden)[label]
    h = w.conv("input_blocks.0.0", x, int(mults[0] * hidden))
    skips, place, factor = [h], 1, 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            h = adm_block(w, f"input_blocks.{place}.0", h, emb, int(mult * hidden), hyper)
            if factor in hyper["attention_factors"]:
                h = adm_attention(w, f"input_blocks.{place}.1", h, hyper)
            skips.append(h)
            place += 1
        if level < len(mults) - 1:
            if hyper.get("resblock_updown"):
                h = adm_block(w, f"input_blocks.{place}.0", h, emb, h.shape[1], hyper, halved)
            elif hyper.get("conv_resample", True):
                h = w.conv(f"input_blocks.{place}.0.op", h, h.shape[1], stride=2)
            else:
                h = halved(h)
            skips.append(h)
            place += 1
            factor *= 2
    h = adm_block(w, "middle_block.0", h, emb, h.shape[1], hyper)
    h = adm_attention(w, "middle_block.1", h, hyper)
    h = adm_block(w, "middle_block.2", h, emb, h.shape[1], hyper)
    place = 0
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(blocks + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            h = adm_block(w, f"output_blocks.{place}.0", h, emb, int(mult * hidden), hyper)
            index = 1
            if factor in hyper["attention_factors"]:
                h = adm_attention(w, f"output_blocks.{place}.1", h, hyper)
                index = 2
            if level and i == blocks:
                name = f"output_blocks.{place}.{index}"
                if hyper.get("resblock_updown"):
                    h = adm_block(w, name, h, emb, h.shape[1], hyper, doubled)
                else:
                    h = doubled(h)
                    h = w.conv(f"{name}.conv", h, h.shape[1]) if hyper.get("conv_resample", True) else h
                factor //= 2
            place += 1
    return w.conv("out.2", F.silu(w.norm("out.0", h, 32)), hyper["out_channels"])


# ---- EDM ----


def edm_norm(w, name, x):
    return w.norm(name, x, min(32, x.shape[1] // 4))


def edm_block(w, name, x, emb, channels, hyper, attention=False, change=None):
    h = F.silu(edm_norm(w, f"{name}.norm0", x))
    if change is not None:
        for part in ("conv0", "skip"):
            w[f"{name}.{part}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        h, x = change(h), change(x)
    h = w.conv(f"{name}.conv0", h, channels)
    e = w.linear(f"{name}.affine", emb, 2 * channels)[:, :, None, None]
    h = F.silu(edm_norm(w, f"{name}.norm1", h) * (1 + e[:, :channels]) + e[:, channels:])
    h = w.conv(f"{name}.conv1", h, channels)
    x = h + (x if x.shape[1] == channels else w.conv(f"{name}.skip", x, channels, 1))
    heads = channels // hyper.get("head_channels", 64)
    if not (attention and heads):
        return x
    qkv = w.conv(f"{name}.qkv", edm_norm(w, f"{name}.norm2", x), 3 * channels, 1).flatten(2)
    width = channels // heads
    results = []
    for head in range(heads):  # channel by channel: q, k, v of the first, then of the second, ...
        rows = qkv[:, head * 3 * width : (head + 1) * 3 * width]
        results.append(attend(rows[:, 0::3], rows[:, 1::3], rows[:, 2::3]))
    return x + w.conv(f"{name}.proj", torch.cat(results, dim=1).reshape(x.shape), channels, 1)


def edm(w, x, t, hyper, label=None):
    hidden, mults, blocks, side = hyper["hidden_size"], hyper["channel_mult"], hyper["num_blocks"], x.shape[-1]
    size = hidden * hyper.get("embedding_mult", 4)
    emb = w.linear("map_layer1", F.silu(w.linear("map_layer0", sinusoid(t, hidden), size)), size)
    if hyper.get("num_classes"):
        onehot = torch.zeros(len(x), hyper["num_classes"])
        if label is not None:
            onehot[torch.arange(len(x)), label] = 1
        emb = emb + w.linear("map_label", onehot, size, bias=False)
    emb = F.silu(emb)
    h = w.conv(f"enc.{side}x{side}_conv", x, mults[0] * hidden)
    skips = [h]
    for level, mult in enumerate(mults):
        res = side >> level
        if level:
            h = edm_block(w, f"enc.{res}x{res}_down", h, emb, h.shape[1], hyper, change=halved)
            skips.append(h)
        for j in range(blocks):
            here = res in hyper["attention_sizes"]
            h = edm_block(w, f"enc.{res}x{res}_block{j}", h, emb, mult * hidden, hyper, here)
            skips.append(h)
    for level, mult in reversed(list(enumerate(mults))):
        res = side >> level
        if level == len(mults) - 1:
            h = edm_block(w, f"dec.{res}x{res}_in0", h, emb, h.shape[1], hyper, True)
            h = edm_block(w, f"dec.{res}x{res}_in1", h, emb, h.shape[1], hyper)
        else:
            h = edm_block(w, f"dec.{res}x{res}_up", h, emb, h.shape[1], hyper, change=doubled)
        for j in range(blocks + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            here = res in hyper["attention_sizes"]
            h = edm_block(w, f"dec.{res}x{res}_block{j}", h, emb, mult * hidden, hyper, here)
    return w.conv("out_conv", F.silu(edm_norm(w, "out_norm", h)), hyper["out_channels"])
