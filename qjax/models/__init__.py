"""Decoder-only transformers as pure functions on pytrees, their files, their tokenizers."""

from qjax.models.checkpoints.weights import WeightSource, read_block, read_edges
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.generate import Generated, generate, generate_batch
from qjax.models.loading import Model, ModelFiles, load, open_model
from qjax.models.streaming import StreamedBlocks, stream
from qjax.models.tokenizers.tokenizer import Tokenizer
from qjax.models.transformer import LINEARS, SITES, block, block_inputs, embed, forward, head, logits

__all__ = [
    "LINEARS",
    "SITES",
    "Generated",
    "Model",
    "ModelConfig",
    "ModelFiles",
    "RopeScaling",
    "StreamedBlocks",
    "Tokenizer",
    "WeightSource",
    "block",
    "block_inputs",
    "embed",
    "forward",
    "generate",
    "generate_batch",
    "head",
    "load",
    "logits",
    "open_model",
    "read_block",
    "read_edges",
    "stream",
]
