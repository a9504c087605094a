"""`python -m zotune` is `zotune`. The current folder, where `-m` looks for modules first, is left out at once."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from zotune.cli.main import main

main()
