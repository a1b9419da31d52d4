"""What lmms-eval finds: the name of a model, which is its module too, and its class."""

AVAILABLE_MODELS = {"lance": "Lance"}
