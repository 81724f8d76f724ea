# %% [markdown]
# # RoPE and its variants
#
# What a rotation does to scores, how the scaling kinds change its frequencies, and what each costs a real checkpoint.

# %%
from itertools import pairwise

import numpy as np
import torch
from matplotlib import pyplot as plt
from pictures import heatmap, show

import rooflama
from rooflama.models import rope_tables
from rooflama.models.rope.override import override_rope
from rooflama.models.rope.spec import attention_factor, inverse_frequencies

path = rooflama.demo_checkpoint()
config = rooflama.inspect(path).config
config.rope

# %% [markdown]
# ## A rotation per pair
#
# Pair j of a head turns by p · w_j at position p. The first pairs turn fast and tell neighbours apart, the last ones turn slowly and tell regions apart. A score depends on the difference of two positions only.

# %%
cos, _ = rope_tables(config.rope, 256)
figure, axes = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
heatmap(figure, axes, cos.T, label="cos(p · w)", cmap="RdBu", vmin=-1, vmax=1)
axes.set_xlabel("position p")
axes.set_ylabel("pair j")
axes.set_title("The table that the kernels read: fast pairs at the top, slow ones at the bottom")
plt.close(figure)
show(figure, "Heat map of the cosine table, 32 pairs by 256 positions: stripes that widen from the top to the bottom")

# %% [markdown]
# ## Spectra
#
# A scaling kind replaces the frequencies, so that a model that was trained for some context reads a longer one. `linear` slows every pair down. `yarn` and `llama3` keep the fast pairs, which have made full turns in training, and slow down only the others. `dynamic` raises the base with the length.

# %%
KINDS = {
    "default": None,
    "linear": {"kind": "linear", "factor": 4},
    "dynamic at 4 x": {"kind": "dynamic", "factor": 4},
    "yarn": {"kind": "yarn", "factor": 4},
    "llama3": {"kind": "llama3", "factor": 4, "original_context": 2048, "low_freq_factor": 1, "high_freq_factor": 4},
}
specs = {name: (config if given is None else override_rope(config, given)).rope for name, given in KINDS.items()}
lengths = {name: 4 * config.context_length if name.startswith("dynamic") else None for name in KINDS}
plain = inverse_frequencies(specs["default"])

figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
for name, spec in specs.items():
    frequencies = inverse_frequencies(spec, seq_len=lengths[name])
    panels[0].plot(2 * np.pi / frequencies, label=name)
    panels[1].plot(frequencies / plain, label=f"{name}, scores x {attention_factor(spec) ** 2:.2f}")
panels[0].set_yscale("log")
panels[0].axhline(config.context_length, color="black", linestyle=":", linewidth=1)
panels[0].set_title("Tokens per full turn (dotted: trained context)")
panels[0].set_ylabel("tokens")
panels[1].set_title("Frequency, of the plain one")
panels[1].set_ylabel("ratio")
figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
for panel in panels:
    panel.set_xlabel("pair")
plt.close(figure)
show(
    figure,
    "Two line plots over 32 pairs: tokens per turn on a log scale, and the ratio of each kind's frequency to the plain one",
)

# %% [markdown]
# ## What distance does to a score
#
# The score of a query and a key of all ones, q·k after rotation, against their distance. Slower pairs stretch the curve.

# %%
distance = np.arange(0, 4096)
figure, axes = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for name in ("default", "linear", "yarn"):
    angles = distance[:, None] * inverse_frequencies(specs[name])
    axes.plot(distance, np.cos(angles).mean(1), label=name, linewidth=1)
axes.set_xscale("symlog", linthresh=8)
axes.set_xlabel("distance in tokens")
axes.set_ylabel("mean of cos over the pairs")
axes.set_title("A score falls with distance")
axes.legend(frameon=False)
plt.close(figure)
show(
    figure,
    "Three curves fall from 1 with distance; linear's falls later, yarn's follows the default's at first and stays above it after some hundred tokens",
)

# %% [markdown]
# ## What an override costs a real checkpoint
#
# `rope=` of `rooflama.load` overrides the file's rotation. The text is one of this repository's guides. The model was trained for its own rotation, so inside the trained context every override can only lose. How much it loses tells which pairs the model depends on.

# %%
from pathlib import Path

OVERRIDES = {
    "as trained": None,
    "linear, factor 4": {"kind": "linear", "factor": 4},
    "yarn, factor 4": {"kind": "yarn", "factor": 4},
    "base 10,000": {"base": 10000},
}
TOKENS = 320
text = Path("../docs/LLAMA_INTEGRATION_CHECKLIST.md").read_text()


def losses(rope):
    """The negative log probability of each token of the text, given those before it."""
    with rooflama.load(path, max_context=TOKENS, rope=rope, progress=False) as model:
        ids = torch.tensor(model.tokenizer.encode(text)[:TOKENS])
        scores = model.logits(ids).log_softmax(-1)
    return -scores[:-1].gather(1, ids[1:, None]).squeeze(1)


measured = {name: losses(rope) for name, rope in OVERRIDES.items()}
for name, loss in measured.items():
    print(f"{name:>18}: perplexity {loss.mean().exp():8.1f}")

# %%
edges = [0, 16, 32, 64, 128, 192, 256, TOKENS - 1]
figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
for name, loss in measured.items():
    means = [loss[a:b].mean().exp() for a, b in pairwise(edges)]
    axes.plot(edges[1:], means, marker="o", label=name)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xlabel("tokens of context, up to")
axes.set_ylabel("perplexity")
axes.set_title("Perplexity against context")
axes.legend(frameon=False)
plt.close(figure)
show(
    figure,
    "Perplexity against tokens of context for four rotations; linear scaling is several times worse, the other three are close and the rotation of training is best",
)

# %% [markdown]
# `linear` slows down the fast pairs too, so neighbouring tokens look nearer than they ever did in training. `yarn` leaves those pairs alone and loses a little, about as much as a smaller base does. That is why it extends a context without training, or with little.
