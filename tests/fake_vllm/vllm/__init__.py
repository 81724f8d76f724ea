"""What rooflama's backend touches of vLLM 0.33.0: its names, arguments and defaults, and the least inside that works.

For machines without vLLM. ``tests/integrations/test_vllm.py`` puts this folder on the path if there is none.
"""

__version__ = "0.33.0"
