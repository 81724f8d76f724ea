# %% [markdown]
# # First five minutes
#
# Load a real checkpoint, let it answer, look at its metadata, and plot what one attention head looks at.
#
# On a machine without a GPU the kernels' NumPy definitions run, so a cell takes seconds. On a GPU the same calls run compiled Triton kernels.

# %%
import rooflama

path = rooflama.demo_checkpoint()  # SmolLM2-135M-Instruct; any .gguf path works here
model = rooflama.load(path, max_context=1024, progress=False)
model

# %% [markdown]
# ## It answers

# %%
model.chat([{"role": "user", "content": "Explain in two sentences why the sky is blue."}], max_new_tokens=60)

# %%
for piece in model.stream("Once upon a time", max_new_tokens=30, temperature=0.8, top_p=0.9, seed=1):
    print(piece, end="")

# %% [markdown]
# ## How sure it was
#
# `logprobs=5` reports the five likeliest tokens at each place. The darker a token, the likelier it was. Hold the pointer over one to see what else was likely.

# %%
model.generate("The capital of France is", max_new_tokens=24, logprobs=5)

# %% [markdown]
# ## What the file says it is
#
# All of it comes from the header. Nothing is guessed from the file's name.

# %%
rooflama.inspect(path)

# %%
config = model.config
print(f"{config.attention_kind}: {config.num_heads} query heads share {config.num_kv_heads} key/value heads")
print(f"{config.kv_bytes_per_token(2):,.0f} bytes of keys and values per token in 16 bits")

# %% [markdown]
# ## The probabilities of the next token

# %%
ids = model.tokenizer.encode("The capital of France is")
probabilities = model.logits(ids)[-1].softmax(-1)
for p, token in zip(*(t.tolist() for t in probabilities.topk(5)), strict=True):
    print(f"{p:6.1%}  {model.tokenizer.decode([token])!r}")

# %% [markdown]
# ## What one head looks at
#
# The attention kernels never write their weights to memory. `rooflama.trace` runs one pass over the prompt and computes the map of one head from its queries and keys, as attention is defined:
#
#     A = softmax(q kᵀ / √d)

# %%
LAYER, HEAD = 3, 2

text = "Mary gave the book to John because Mary had read the book"
trace = rooflama.trace(model, text, what=[f"attention.{LAYER}.{HEAD}"])
trace

# %%
from matplotlib import pyplot as plt
from pictures import heatmap, show

labels = [model.tokenizer.decode([token]) for token in trace.token_ids]
figure, axes = plt.subplots(figsize=(5.6, 4.6))
heatmap(figure, axes, trace[f"attention.{LAYER}.{HEAD}"], label="attention weight", cmap="magma", vmin=0)
axes.set_xticks(range(len(labels)), labels, rotation=90)
axes.set_yticks(range(len(labels)), labels)
axes.set_xlabel("key")
axes.set_ylabel("query")
axes.set_title(f"Layer {LAYER}, head {HEAD}: what each word looks at")
plt.close(figure)
show(
    figure,
    "Lower-triangular heat map of attention weights; each query looks mostly at its own word and at earlier ones",
)

# %% [markdown]
# ## Tidy up
#
# Closing the model frees all its device memory.

# %%
model.close()
