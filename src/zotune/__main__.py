"""`python -m zotune` is `zotune`."""

from zotune.cli.main import main

main()
