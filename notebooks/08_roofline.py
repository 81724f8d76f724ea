# %% [markdown]
# # Roofline
#
# How close each kernel comes to what an H100 allows, drawn from the measurements that the repository holds. Nothing is measured here.
#
# A kernel that moves B bytes and does F operations takes at least max(B / memory rate, F / matrix rate). The quotient F / B, its intensity, decides which of the two bounds it.

# %%
import csv
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from pictures import PALETTE, show

from rooflama.roofline import OURS, measurements, table

with Path("../benchmarks/results/kernels.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["implementation"] == OURS]
print(
    len(rows), "cases of rooflama,", len({row["kernel"] for row in rows}), "kernels, on", *{row["gpu"] for row in rows}
)

# %% [markdown]
# ## The classic picture
#
# Each point is a case of the kernels that are counted in operations. Its height is the rate it reached, its place from left to right its intensity. The roof is 3.0 TB/s of memory, and 789 TFLOP/s of matrix products: both measured on such a card.

# %%
TB_PER_S, TFLOP_PER_S = 3.0, 789.0

kernels = list(dict.fromkeys(row["kernel"] for row in rows))
figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
intensity = np.logspace(-0.5, 4, 200)
axes.plot(intensity, np.minimum(TB_PER_S * intensity, TFLOP_PER_S), color="black", linewidth=1)
for number, kernel in enumerate(kernels):
    points = [(float(row["tflop_per_s"]), float(row["gb_per_s"]) / 1000) for row in rows if row["kernel"] == kernel]
    points = [(flops / rate, flops) for flops, rate in points if flops > 0 and rate > 0]
    if points:
        x, y = zip(*points, strict=True)
        marker = "osD^vP*X"[number % 8]
        axes.scatter(x, y, s=22, marker=marker, color=PALETTE[number % len(PALETTE)], label=kernel, alpha=0.8)
axes.set_xscale("log")
axes.set_yscale("log")
axes.set_xlabel("intensity, operations per byte")
axes.set_ylabel("TFLOP/s")
axes.set_title("Measured rates under the roof of an H100")
axes.legend(frameon=False, fontsize=8, loc="lower right")
plt.close(figure)
show(
    figure,
    "Log-log scatter under a roof that rises and then is flat: decode attention lies on the slope, products of few tokens below it, prefill under the flat part",
)

# %% [markdown]
# ## How close, and the best peer
#
# The fraction of the roofline, ours against the fastest peer of the same run. Above the diagonal rooflama is faster.

# %%
cases = [case for case in measurements() if case.best_peer]
figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
for number, kernel in enumerate(dict.fromkeys(case.kernel for case in cases)):
    own = [case for case in cases if case.kernel == kernel]
    axes.scatter(
        [case.fractions[case.best_peer] for case in own],
        [case.fractions[OURS] for case in own],
        s=22,
        marker="osD^vP*X"[number % 8],
        color=PALETTE[number % len(PALETTE)],
        label=kernel,
    )
axes.plot([0, 1.3], [0, 1.3], color="black", linewidth=1)
axes.set_xlabel("best peer, fraction of the roofline")
axes.set_ylabel("rooflama, fraction of the roofline")
axes.set_title(
    f"{sum(c.fractions[OURS] > c.fractions[c.best_peer] for c in cases)} of {len(cases)} cases are faster than the best peer"
)
axes.legend(frameon=False, fontsize=8)
plt.close(figure)
show(
    figure,
    "Scatter of the fraction of the roofline, rooflama against the best peer; the diagonal separates faster from slower",
)

# %% [markdown]
# Fractions above 1 come from a run whose memory rate was measured too low: benchmarks/results/README.md. Small cases are far from the roofline, because a launch alone takes a microsecond or two.
#
# ## By size
#
# The same fraction against the time that a case takes. What is shorter than three microseconds is bound by its launch, whatever it computes.

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for number, kernel in enumerate(kernels):
    own = [row for row in rows if row["kernel"] == kernel]
    axes.scatter(
        [float(row["us_p50"]) for row in own],
        [float(row["of_roofline"]) for row in own],
        s=18,
        marker="osD^vP*X"[number % 8],
        color=PALETTE[number % len(PALETTE)],
        label=kernel,
    )
axes.set_xscale("log")
axes.axhline(1, color="black", linestyle="--", linewidth=1)
axes.set_xlabel("microseconds")
axes.set_ylabel("fraction of the roofline")
axes.set_title("Fraction of the roofline against time")
figure.legend(loc="outside right center", frameon=False, fontsize=8)
plt.close(figure)
show(
    figure,
    "Scatter of the fraction of the roofline against microseconds: near zero below three microseconds, from 0.2 to 1.2 above, decode attention and norms highest",
)

# %% [markdown]
# ## The figures
#
# `rooflama roofline --text` prints all of them. The first lines:

# %%
print(*table(measurements()).splitlines()[:16], sep="\n")
