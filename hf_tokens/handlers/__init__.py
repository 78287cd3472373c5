"""What the engine does for one role, a file each. They are called around a call of the model in the order in which they stand here."""

from . import token_bank, token_reducer, routers, cache_compressor, attention_edit, feature_cache, pooler, weight_edit, objective  # noqa: F401, I001
from . import token_scorer  # noqa: F401
