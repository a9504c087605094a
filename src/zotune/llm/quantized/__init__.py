"""Base models with quantised weights.

`backends` quantises with bitsandbytes and torchao. For GGUF files read `gguf_reader`, `gguf_model`, `layers` and
`gguf_blocks` in this order. `scales` tunes the scales of blocks, `gguf_output` saves them, and `dequantize_model` turns
packed weights into numbers.
"""
