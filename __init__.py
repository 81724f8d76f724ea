"""Lets ``import rooflama`` work in the folder above a clone named rooflama.

There Python finds the clone before any installed package. This file stands in for the package's own ``__init__.py``,
which it runs, and names the folders that the parts of the package are in.
"""

from pathlib import Path

_clone = Path(__file__).parent
_package = _clone / "rooflama" / "__init__.py"
__path__ = [str(_package.parent), str(_clone)]
exec(compile(_package.read_text(encoding="utf-8"), _package, "exec"))
