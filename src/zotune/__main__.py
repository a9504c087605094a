"""`python -m zotune` is `zotune`; the current folder, where `-m` looks for modules first, is left out before any other."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from zotune.cli.main import main  # noqa: E402 - what it imports would be looked for in the current folder

main()
