"""The transformers backend: batched decoding, steering and capture in this process."""

from logging import ERROR, getLogger

# transformers imports torchao wherever it is installed, which logs every GPU kernel that does not
# load and a warning to its own developers. Here, since the modules below import transformers.
for _name in ("torchao", "torch.utils._pytree"):
    getLogger(_name).setLevel(ERROR)
