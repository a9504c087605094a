"""Adapters of peft beside a frozen model, which alone are tuned.

`lora` adds low-rank matrices, `virtual_tokens` a prefix or a prompt, `by_name` any other adapter that peft has;
`peft_wrapper` puts each of them around the model.
"""
