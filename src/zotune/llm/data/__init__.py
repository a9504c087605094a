"""From rows to batches of tokens.

Read `readers` (rows of files and of the Hub), `examples` (prompt, candidates, answer), `tokenization` (to
`encoded`, a tokenised example) and `collator` in this order. `chat_template` and `demonstrations` build prompts.
"""
