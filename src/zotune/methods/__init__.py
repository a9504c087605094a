"""The methods by name: each is one expression over `zotune.optim.ZerothOrder`.

`paper` holds those of the benchmark paper, and the table `METHODS` that feeds command line, documentation and tests.
"""

from zotune.methods.paper import METHODS as METHODS
