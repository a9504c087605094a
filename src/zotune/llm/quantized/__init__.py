"""Base models with quantised weights.

`backends` quantises with bitsandbytes and torchao. For GGUF files read `gguf_reader`, `gguf_model`, `layers` and
`block_formats` in this order. `scales` tunes the scales of blocks, `gguf_output` saves them, and `dequantize` turns
packed weights into numbers.
"""
