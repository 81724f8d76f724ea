# %% [markdown]
# # Grouped-query attention by hand
#
# From the definition, over a Triton kernel of thirty lines, to the attention maps of a real checkpoint and the sink that they show.

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before rooflama is imported: Triton reads it when a kernel is decorated

import triton
import triton.language as tl
from matplotlib import pyplot as plt
from pictures import heatmap, show

import rooflama
from rooflama import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if DEVICE == "cuda" else "numpy"  # of the model: the interpreter is for single kernels

with kernels.use_backend(BACKEND):
    model = rooflama.load(rooflama.demo_checkpoint(), max_context=256, progress=False)
config = model.config
print(f"{config.num_heads} query heads, {config.num_kv_heads} key/value heads, head_dim {config.head_dim}")

# %% [markdown]
# ## The definition
#
# Query head h reads key/value head h // group. A query at position i sees the keys at positions 0 to i.
#
#     scores[i, j] = q[i] · k[j] / √d        for j ≤ i
#     out[i]       = Σⱼ softmax(scores[i])[j] v[j]
#
# q, k and v of one layer come from a trace: after rotation, as the attention kernel receives them.

# %%
LAYER = 6
TEXT = "The keys of grouped-query attention are shared. A group of query heads reads the same keys, so the cache is smaller."

with kernels.use_backend(BACKEND):
    trace = rooflama.trace(model, TEXT, what=["q", "k", "v", "hidden"])
q, k, v = (trace[name][LAYER].float() for name in "qkv")
group = config.num_heads // config.num_kv_heads
{name: list(tensor.shape) for name, tensor in (("q", q), ("k", k), ("v", v))}


# %%
def by_hand(q, k, v):
    """q [tokens, heads, d], k and v [tokens, kv_heads, d] -> [tokens, heads, d], one head and one query at a time."""
    out = torch.empty_like(q)
    num_tokens, num_heads, head_dim = q.shape
    for head in range(num_heads):
        keys, values = k[:, head // group], v[:, head // group]
        for i in range(num_tokens):
            scores = keys[: i + 1] @ q[i, head] / head_dim**0.5
            out[i, head] = scores.softmax(0) @ values[: i + 1]
    return out


expected = by_hand(q, k, v)
list(expected.shape)

# %% [markdown]
# ## A Triton kernel
#
# One program owns one query token and one key/value head, so it loads each key once for the whole group. It walks over the keys in blocks and never holds all scores: it keeps the largest score so far, the sum of exponentials, and the weighted sum of values, and rescales both sums when a larger score appears.


# %%
@triton.jit
def gqa_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    v_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    num_heads,
    num_kv_heads,
    softmax_scale,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,  # a power of two
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # keys per step
):
    query, kv_head = tl.program_id(0), tl.program_id(1)
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM)
    rows = (query * num_heads + kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    present = (heads < GROUP)[:, None]
    q = tl.load(q_ptr + rows, mask=present, other=0.0)
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    sums = tl.zeros([GROUP_PADDED, HEAD_DIM], tl.float32)
    for start in range(0, query + 1, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = keys <= query
        at = (keys * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + at, mask=seen[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=seen[:, None], other=0.0)
        scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2) * softmax_scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
        largest = new_largest
    tl.store(out_ptr + rows, sums / total[:, None], mask=present)


def gqa(q, k, v):
    out = torch.empty_like(q)
    num_tokens, num_heads, head_dim = q.shape
    size = num_heads // k.shape[1]
    gqa_kernel[(num_tokens, k.shape[1])](
        q, k, v, out, num_heads, k.shape[1], head_dim**-0.5,
        GROUP=size, GROUP_PADDED=triton.next_power_of_2(size), HEAD_DIM=head_dim, BLOCK=16,
    )  # fmt: skip
    return out


ours = gqa(*(tensor.to(DEVICE).contiguous() for tensor in (q, k, v))).cpu()
print(
    f"largest difference to the definition: {(ours - expected).abs().max():.1e}, of values up to {expected.abs().max():.1f}"
)
assert (ours - expected).abs().max() < 1e-4

# %% [markdown]
# rooflama's own kernel, `kernels.attention_prefill`, does the same over pages, for many queries per program, with tensor cores. Its card is `rooflama kernel attention_prefill`.
#
# ## The maps of one layer
#
# Heads in one row of the picture share keys and values. They still look at different things, because their queries differ.

# %%
with kernels.use_backend(BACKEND):
    maps = rooflama.trace(model, TEXT, what=[f"attention.{LAYER}"])[f"attention.{LAYER}"]

figure, axes = plt.subplots(
    config.num_kv_heads, group, figsize=(7.5, 7), sharex=True, sharey=True, layout="constrained"
)
for head, panel in enumerate(axes.flat):
    image = panel.imshow(maps[head].sqrt(), cmap="magma", vmin=0, vmax=1)
    panel.set_title(f"query head {head}, K/V head {head // group}")
figure.supxlabel("key position")
figure.supylabel("query position")
figure.suptitle(f"Attention of layer {LAYER}")
figure.colorbar(image, ax=axes, label="square root of the attention weight", shrink=0.7)
plt.close(figure)
show(
    figure,
    "Nine lower-triangular attention maps in three rows; most have a bright first column, some a bright diagonal",
)

# %% [markdown]
# ## The sink
#
# The first column is bright: many heads give most of their weight to the first token, whatever it is. (A second, weaker sink is the first “ the”, at position 16.) The softmax must give its weight to something. A head that has nothing to add at a position gives it to a token whose value is nearly zero, and so adds nearly nothing.

# %%
with kernels.use_backend(BACKEND):
    every = rooflama.trace(model, TEXT, what=[f"attention.{layer}" for layer in range(config.num_layers)])
later = slice(4, None)  # queries that have a choice
sink = torch.stack([every[f"attention.{layer}"][:, later, 0].mean(1) for layer in range(config.num_layers)])

figure, axes = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
heatmap(figure, axes, sink.T, label="weight on the first token", cmap="magma", vmin=0, vmax=1)
axes.set_xlabel("layer")
axes.set_ylabel("query head")
axes.set_title("How much of its attention each head gives to the first token, mean over queries")
plt.close(figure)
show(figure, "Heat map of 9 heads by 30 layers: dark in the first layers, bright for most heads of the middle layers")

# %%
value_norms = trace["v"].float().norm(dim=-1).mean(-1)  # [layers, tokens]
hidden_norms = trace["hidden"].float().norm(dim=-1)

figure, panels = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
for panel, norms, name in zip(panels, (hidden_norms, value_norms), ("Residual stream", "Values"), strict=True):
    panel.plot(norms[:, 0], color="#d55e00", label="first token")
    panel.plot(norms[:, 1:].median(1).values, color="#0072b2", label="median of the others")
    panel.set_yscale("log")
    panel.set_xlabel("layer")
    panel.set_ylabel("norm")
    panel.set_title(name)
    panel.legend(frameon=False)
plt.close(figure)
show(
    figure,
    "Two line plots over layers: the first token's residual is far larger than the others', its values are smaller",
)

# %% [markdown]
# The first token's residual becomes many times larger than any other's, and its values smaller. The size marks it: one large component in a fixed direction makes a key that every query can find.
#
# The two pictures agree layer by layer. Layers 10 and 11 read a residual whose first token has an ordinary norm again. There the sink is gone, and the first token's values are as large as the others'. Layer 11 then writes the large component anew, and the sink is back.
#
# A cache that drops its oldest tokens therefore must keep the first ones.

# %%
model.close()
