# %% [markdown]
# # GGUF under the microscope
#
# A file down to the bits of one block, the planes that the kernels read, and what each type costs in accuracy.

# %%
import numpy as np
import torch
from matplotlib import pyplot as plt
from pictures import heatmap, show

import rooflama
from rooflama.kernels import LAYOUTS, dequantize
from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.gguf.repack import repack
from rooflama.loaders.gguf.types import TYPE_SIZES

path = rooflama.demo_checkpoint()
rooflama.inspect(path)

# %% [markdown]
# ## Where the bytes are

# %%
file = read_gguf(path)
sizes: dict[tuple[str, str], int] = {}
for info in file.tensors.values():
    part = info.name.split(".")[-2] if "blk." in info.name else info.name.split(".")[0]
    sizes[part, info.ggml_type] = sizes.get((part, info.ggml_type), 0) + info.nbytes
order = sorted(sizes, key=sizes.__getitem__)[-8:]
colours = {"Q4_1": "#0072b2", "Q8_0": "#e69f00"}

figure, axes = plt.subplots(figsize=(7.5, 3), layout="constrained")
axes.barh(
    [part for part, _ in order], [sizes[one] / 2**20 for one in order], color=[colours[kind] for _, kind in order]
)
axes.set_xlabel("MiB, all layers together")
axes.set_title("Tensors of the file, by part and type")
axes.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, frameon=False)
plt.close(figure)
show(figure, "Horizontal bars: the token embedding in Q8_0 and the feed-forward matrices in Q4_1 take most of the file")

# %% [markdown]
# ## One block
#
# Q4_1 stores 32 weights in 20 bytes: a scale d and a minimum m in 16 bits each, then 32 codes of 4 bits. Byte i has code i in its low half and code i + 16 in its high half.
#
#     weight = d * code + m

# %%
NAME = "blk.0.ffn_down.weight"
raw = file.data(NAME)
rows, columns = file.tensors[NAME].shape
block = raw[0, :20]
d, m = block[:4].view(np.float16).astype(np.float32)
codes = np.concatenate([block[4:] & 15, block[4:] >> 4])
by_hand = d * codes + m
print(block.tobytes().hex(" "))
print(f"d = {d:.5f}, m = {m:.5f}")
print("codes  ", *codes[:10], "...")
print("weights", *(f"{w:.3f}" for w in by_hand[:8]), "...")

# %%
figure, panels = plt.subplots(2, 1, figsize=(7.5, 3.6), layout="constrained", height_ratios=[2, 3])
bits = np.unpackbits(block[:, None], axis=1).T
heatmap(figure, panels[0], bits, label="bit", cmap="Greys", vmin=0, vmax=1)
panels[0].axvline(1.5, color="#d55e00")
panels[0].axvline(3.5, color="#d55e00")
panels[0].set_xticks([0.5, 2.5, 11.5], ["d", "m", "32 codes"])
panels[0].set_yticks([0, 7], ["high", "low"])
panels[0].set_title("The 160 bits of a block, one byte per column")
panels[1].bar(range(32), by_hand, color="#0072b2")
panels[1].axhline(m, color="#d55e00", linewidth=1)
panels[1].set_xlabel("weight in the block")
panels[1].set_title("Its 32 weights: sixteen levels above the minimum (line)")
panels[1].set_ylabel("weight")
plt.close(figure)
show(figure, "Above, a grid of 20 bytes by 8 bits; below, 32 bars for the weights that the block decodes to")

# %% [markdown]
# ## Planes
#
# Blocks of 20 bytes are bad for loads of 16. At load, codes and scales are separated into planes, at no extra bytes and without rounding. Words of 32 bits hold eight codes, so that one mask yields four of them.

# %%
weight = repack(raw, "Q4_1", columns)
weight

# %%
values = dequantize(weight, torch.float32)
assert np.array_equal(values[0, :32].numpy(), by_hand.astype(np.float32))
print("the planes decode to the same bits as the block decoded by hand")

# %%
figure, panels = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
limit = float(values[:96, :96].abs().max())
heatmap(figure, panels[0], values[:96, :96], label="weight", cmap="RdBu", vmin=-limit, vmax=limit)
panels[0].set_title("Weights")
scale_plane = weight.planes[[plane.name for plane in weight.layout.planes].index("d")]
heatmap(figure, panels[1], scale_plane[:96].float(), label="d")
panels[1].set_title("Scales, one per 32 columns")
for panel in panels:
    panel.set_ylabel("row")
    panel.set_xlabel("column" if panel is panels[0] else "block")
plt.close(figure)
show(
    figure,
    "Left, weights of 96 rows and columns in red and blue; right, the scales of the same rows, a few rows larger",
)

# %% [markdown]
# ## Error by type
#
# The same matrix, quantised by the gguf package to each type that it can write, and read back. The error is relative: root mean square of the error over that of the weights. Each bit more halves it. A minimum per block (Q4_1, Q5_1) helps where weights are not centred.

# %%
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as read_back
from gguf.quants import quantize

embedding = read_back(file.data("token_embd.weight")[:2048], GGMLQuantizationType.Q8_0)
normal = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
outliers = normal.copy()
outliers[:, ::64] *= 10
matrices = {"normal": normal, "1 of 64 columns x 10": outliers, "the file's embedding": embedding}
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")


def relative_error(matrix, name):
    kind = GGMLQuantizationType[name]
    again = read_back(quantize(matrix, kind), kind)
    return float(np.sqrt(((again - matrix) ** 2).mean() / (matrix**2).mean()))


figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for (label, matrix), marker in zip(matrices.items(), "os^", strict=True):
    bits_per_weight = [8 * TYPE_SIZES[name][1] / TYPE_SIZES[name][0] for name in TYPES]
    errors = [relative_error(matrix, name) for name in TYPES]
    axes.scatter(bits_per_weight, np.maximum(errors, 1e-7), marker=marker, label=label)
    if label == "normal":
        for name, x, y in zip(TYPES, bits_per_weight, errors, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
axes.set_yscale("log")
axes.set_xlabel("bits per weight")
axes.set_ylabel("relative error")
axes.set_title("Quantisation error by type")
axes.legend(frameon=False)
plt.close(figure)
show(
    figure,
    "Scatter plot of relative error against bits per weight: from about 0.1 at 4.5 bits to 0.001 and less at 16 bits",
)

# %% [markdown]
# The embedding was Q8_0 in the file, so Q8_0 stores it again without an error worth naming.
#
# ## Every type in one table

# %%
print(f"{'type':8} {'block':>6} {'bits per weight':>16}  planes")
for name, layout in LAYOUTS.items():
    elements, num_bytes = TYPE_SIZES[name]
    planes = ", ".join(plane.name for plane in layout.planes)
    print(f"{name:8} {elements:>6} {8 * num_bytes / elements:>16.2f}  {planes}")
file.close()
