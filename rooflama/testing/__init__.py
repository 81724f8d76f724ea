"""What rooflama's own kernels are tested with, for kernels of others: ``pip install 'rooflama[testing]'``.

laws            the laws of each kernel, as functions that take any implementation
strategies      dtypes, seeds, data; poison around tensors
assertions      tolerances derived from rounding, bits, guards
attention, paged, rope, sampling, weights, model_shapes
                ragged batches over poisoned pages, angles, parameters, quantised weights, shapes of real models
plugin          a pytest plugin: the interpreter where there is no GPU, and poisoned memory
mutants         plants small bugs in a Triton file and runs its tests: python -m rooflama.testing.mutants
"""
