"""The command line: one module a verb, and the modules that the verbs share.

Read `main` first (it chooses the verb and turns errors into messages and exit codes), then a verb (`train`, `eval`,
`plan`, `bench`, `ledger`, `listings`), then `options` (arguments to a validated record), `help` (the text of `--help`),
`subcommands` (parsers of `bench` and `ledger`) and `output` (results on stdout).
"""
