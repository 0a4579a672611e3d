"""Two models whose tokenizers number the same tokens in another order."""

from regauge.vocabulary.axes import Axes, vocabulary_axes
from regauge.vocabulary.pairing import Vocabulary, shared_vocabulary, token_axes
from regauge.vocabulary.tokenizer import read_tokens

__all__ = ["Axes", "Vocabulary", "read_tokens", "shared_vocabulary", "token_axes", "vocabulary_axes"]
