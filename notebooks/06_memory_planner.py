# %% [markdown]
# # Memory planner
#
# How much device memory a model takes, before anything is allocated. The plan needs a checkpoint's header or the numbers of a config, and no GPU.

# %%
from IPython.display import display
from matplotlib import pyplot as plt
from pictures import PALETTE, heatmap, show

import rooflama
from rooflama.models import ModelConfig, RopeSpec

LLAMA_3_8B = ModelConfig(
    architecture="llama",
    name="Llama-3-8B",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    context_length=131072,
    rms_norm_eps=1e-5,
    softmax_scale=128**-0.5,
    rope=RopeSpec(head_dim=128, rotary_dim=128, base=5e5),
    sliding_windows=(0,) * 32,
    tied_embeddings=False,
)


def plan(context=8192, sequences=1, kv_dtype="auto", weights="Q4_K", limit="24GiB"):
    """The plan of Llama-3-8B on a GPU, which need not be here."""
    return rooflama.plan_memory(
        LLAMA_3_8B,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        weight_types=weights,
        limit=limit,
        device="cuda",
        dtype="bfloat16",
    )


plan()

# %% [markdown]
# A plan that does not fit says what would:

# %%
plan(context=131072, sequences=2)

# %% [markdown]
# ## Weights against keys and values
#
# Weights are a constant. Keys and values grow with every token of every sequence. The line is a card of 24 GiB.

# %%
GIB = 2**30
groups = list(plan().to_dict()["lines"])
names = list(dict.fromkeys(line["group"] for line in groups))
contexts = [2**exponent for exponent in range(12, 18)]


def by_group(one):
    lines = one.to_dict()["lines"]
    return [sum(line["bytes"] for line in lines if line["group"] == name) / GIB for name in names]


figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.4), sharey=True, layout="constrained")
for panel, kv_dtype in zip(panels, ("bfloat16", "int8"), strict=True):
    parts = [by_group(plan(context, kv_dtype=kv_dtype)) for context in contexts]
    panel.stackplot(range(len(contexts)), list(zip(*parts, strict=True)), labels=names, colors=PALETTE)
    panel.axhline(24, color="black", linestyle="--", linewidth=1)
    panel.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
    panel.set_xlabel("context in tokens")
    panel.set_title(f"Keys and values in {kv_dtype}")
panels[0].set_ylabel("GiB")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
plt.close(figure)
show(
    figure,
    "Stacked areas of memory by group against context: weights are flat, keys and values grow to 16 GiB, half of it in int8",
)

# %% [markdown]
# ## The longest context for each card and type

# %%
CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB")
TYPES = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
longest = [[plan(limit=card, weights=kind).largest_context() for card in CARDS] for kind in TYPES]

figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
heatmap(figure, axes, [[tokens / 1024 for tokens in row] for row in longest], label="longest context, 1,024 tokens")
for y, row in enumerate(longest):
    for x, tokens in enumerate(row):
        colour = "black" if tokens > 70000 else "white"
        axes.text(x, y, f"{tokens // 1024}K" if tokens >= 1024 else "no", ha="center", va="center", color=colour)
axes.set_xticks(range(len(CARDS)), CARDS)
axes.set_yticks(range(len(TYPES)), TYPES)
axes.set_xlabel("memory limit")
axes.set_title("Longest context of one sequence of Llama-3-8B")
plt.close(figure)
show(
    figure,
    "Heat map of the longest context by weight type and memory limit: from none for BF16 in 12 GiB to the full 128K",
)

# %% [markdown]
# ## Try it
#
# With ipywidgets installed (`make notebooks` installs it) and a running kernel, the sliders below redraw the plan. Elsewhere the cell shows one plan.

# %%
try:
    import ipywidgets
except ImportError:
    ipywidgets = None

options = {
    "context": [2**exponent for exponent in range(10, 18)],
    "sequences": [1, 2, 4, 8, 16, 32, 64],
    "kv_dtype": ["bfloat16", "fp8", "int8"],
    "weights": list(TYPES),
    "limit": list(CARDS),
}
chosen = {"context": 8192, "sequences": 4, "kv_dtype": "int8", "weights": "Q4_K", "limit": "24GiB"}
if ipywidgets:
    controls = {
        name: ipywidgets.SelectionSlider(options=values, value=chosen[name]) for name, values in options.items()
    }
    display(ipywidgets.interactive(plan, **controls))
plan(**chosen)
