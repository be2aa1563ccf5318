"""The operations that a step needs beside the model's own layers.

`reference` defines each of them in plain torch, as slowly as it likes; `dense` computes the same in
torch calls on any device, `cpu` in compiled loops, `gpu_lora`, `gpu_attention` and `gpu_kv_cache`
in Triton's kernels; `choice` picks. Knows tensors. Knows nothing of sequences or of the model's
modules.
"""
