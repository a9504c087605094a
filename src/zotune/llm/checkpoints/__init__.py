"""What a model's files hold, and whether all of it arrives in the model.

`model_kind` says from the configuration how a model is read, `pretrained` loads a checkpoint and names each tensor
that found no place, and `adapter_folder` does the same for the folder of an adapter. `no_code` and `adapter_config`
refuse what in either names code, or files elsewhere.
"""
