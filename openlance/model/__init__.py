"""The network and its weights."""

import logging
from functools import partial


def _without(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


# Where torchao is installed, transformers and diffusers import it, and each import would warn every user of
# kernels for other devices and of old names. None of it bears on what is called here.
for _name, _words in {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}.items():
    logging.getLogger(_name).addFilter(partial(_without, _words))
