# %% [markdown]
# # Paging in pictures
#
# Keys and values live in pages of equal size. A sequence holds a list of pages, its row of the block table; a token's slot follows from it. The pictures show how pages are taken, shared, copied and given back.

# %%
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from pictures import PALETTE, show

import rooflama
from rooflama.loaders.device import open_device
from rooflama.models import PagedKVCache, PageTable

config = rooflama.inspect(rooflama.demo_checkpoint()).config
PAGE_SIZE, NUM_PAGES = 16, 24
device = open_device("cpu")
cache = PagedKVCache(
    config, num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_append=256, dtype=torch.float32, device=device
)
print(
    f"{NUM_PAGES} pages of {PAGE_SIZE} tokens, {NUM_PAGES * PAGE_SIZE * config.kv_bytes_per_token(4) / 2**20:.0f} MiB in {config.num_layers} layers"
)

# %% [markdown]
# ## Three sequences
#
#     slot of token t = pages[t // page_size] * page_size + t % page_size

# %%
names = {}
for name, tokens in (("A", 70), ("B", 20), ("C", 45)):
    names[name] = cache.add()
    cache.append(names[name], tokens)
PageTable.of(cache, names)

# %%
token = 37
pages = cache.pages(names["A"])
slot = pages[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
print(f"token {token} of A: page {pages[token // PAGE_SIZE]}, place {token % PAGE_SIZE} in it, slot {slot}")
print("block table, as the kernels get it:")
print(cache.block_table(list(names.values()), 6))


# %%
def owners(table):
    """For each slot, the number of the sequence that wrote it; 0 for free, -1 for taken and not yet written."""
    slots = np.zeros((len(table.references), table.page_size))
    for name, held in reversed(table.pages.items()):  # a shared page has the colour of its first owner
        number = 1 + "ABCD".index(name)
        for place, page in enumerate(held):
            written = min(table.page_size, table.lengths[name] - place * table.page_size)
            slots[page, :written] = number
            slots[page, written:] = -1
    return slots


def draw(tables, titles, alt):
    colours = ListedColormap(["#cccccc", "#ffffff", *PALETTE[:4]])
    figure, panels = plt.subplots(1, len(tables), figsize=(7.5, 3.6), sharey=True, layout="constrained", squeeze=False)
    for panel, table, title in zip(panels[0], tables, titles, strict=True):
        image = panel.imshow(owners(table), cmap=colours, vmin=-1.5, vmax=4.5, aspect="auto")
        panel.set_yticks(np.arange(-0.5, len(table.references)), [], minor=True)
        panel.grid(which="minor", axis="y", color="black", linewidth=0.4)
        panel.tick_params(which="minor", length=0)
        panel.set_xlabel("place in the page")
        panel.set_title(title)
        for page, references in enumerate(table.references):
            if references > 1:
                panel.text(table.page_size - 0.3, page, f"×{references}", va="center", fontsize=7)
    panels[0][0].set_ylabel("page")
    bar = figure.colorbar(image, ax=panels, ticks=range(-1, 5))
    bar.ax.set_title("slot", fontsize=9)
    bar.ax.set_yticklabels(["taken, unwritten", "free", "A", "B", "C", "D"])
    plt.close(figure)
    show(figure, alt)


tables = [PageTable.of(cache, names)]
cache.free(names["B"])
tables.append(PageTable.of(cache, {"A": names["A"], "C": names["C"]}))
names["B"] = cache.add()
cache.append(names["B"], 90)
tables.append(PageTable.of(cache, names))
draw(
    tables,
    ["Three sequences", "B has ended", "A new B of 90 tokens"],
    "Three grids of 24 pages by 16 slots: A, B and C in different colours; B's pages are freed, then a new B takes them and others",
)

# %% [markdown]
# The new B takes the pages that the old one left, and others elsewhere. Nothing moves and nothing must be contiguous.
#
# ## Sharing, and copy on write
#
# `fork` makes a sequence with the same tokens. It takes no page: counts go up. The first of the two that writes into a shared page copies that page, and no other.

# %%
steps = [PageTable.of(cache, names)]
names["D"] = cache.fork(names["A"])
steps.append(PageTable.of(cache, names))
cache.append(names["D"], 1)
steps.append(PageTable.of(cache, names))
draw(
    steps,
    ["Before", "D is a fork of A", "D writes one token"],
    "Three grids of pages: after the fork five pages of A are marked as held twice; after one token D has a copy of the last page",
)

# %%
steps[-1]

# %% [markdown]
# ## What paging saves
#
# Without pages, each sequence reserves its longest possible text. With pages, it holds at most one page that is partly empty. Simulated: 64 sequences whose lengths are drawn between 1 and 4,096 tokens.

# %%
lengths = np.random.default_rng(0).integers(1, 4097, 64)
sizes = [2**exponent for exponent in range(4, 11)]
waste = [float((-lengths % size).sum() / lengths.sum()) for size in sizes]
reserved = float((4096 - lengths).sum() / lengths.sum())

figure, axes = plt.subplots(figsize=(7.5, 3), layout="constrained")
axes.bar([str(size) for size in sizes], waste, color=PALETTE[0], label="pages")
axes.axhline(reserved, color=PALETTE[4], label="reserving the longest text")
axes.set_yscale("log")
axes.set_xlabel("tokens per page")
axes.set_ylabel("unused / used")
axes.set_title("Memory that is held and not used")
axes.legend(frameon=False)
plt.close(figure)
show(
    figure,
    "Bars of unused memory by page size, from 0.4 percent at 16 tokens to 28 percent at 1,024; a line near 100 percent for reserving",
)

# %% [markdown]
# Small pages waste less but make longer tables, and a kernel that reads a page wants at least a tile of keys in it. rooflama takes 64 tokens.

# %%
device.close()

# %% [markdown]
# ## In an engine
#
# `rooflama.Engine` serves many requests over one pool. A request whose text begins like another's shares the pages of that beginning, and does not compute it again. `engine.table()` shows the pool between two steps.

# %%
model = rooflama.load(rooflama.demo_checkpoint(), max_context=512, progress=False)
engine = rooflama.Engine(model)
KNOWN = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Norway": "Oslo"}
beginning = "".join(f"Question: What is the capital of {land}?\nAnswer: {city}.\n" for land, city in KNOWN.items())
ask = "Question: What is the capital of {}?\nAnswer:"
first = engine.add(beginning + ask.format("Spain"), max_new_tokens=5, stop="\n")
engine.step()  # computes the beginning, which is more than a page
others = [engine.add(beginning + ask.format(land), max_new_tokens=5, stop="\n") for land in ("Greece", "Germany")]
engine.step()
engine.table()

# %%
for _ in engine:
    pass
print(*(model.tokenizer.decode(sequence.token_ids).strip() for sequence in (first, *others)), sep="\n")
model.close()
