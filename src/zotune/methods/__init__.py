"""The methods by name: each is one expression over `zotune.optim.ZerothOrder`.

`paper` holds those of the benchmark paper; every later one has a file of its own. The table `METHODS` of all of them
feeds command line, documentation and tests.
"""

from zotune.methods.table import METHODS as METHODS
