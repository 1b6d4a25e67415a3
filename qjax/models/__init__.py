"""Decoder-only transformers as pure functions on pytrees, their files, their tokenizers."""

from qjax.models.checkpoints.weights import WeightSource, read_block, read_edges
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.generate import Generated, generate, generate_batch
from qjax.models.loading import Model, ModelFiles, load, open_model
from qjax.models.streaming import StreamedBlocks, stream
from qjax.models.structure import structure
from qjax.models.tokenizers.tokenizer import Tokenizer
from qjax.models.transformer import block, block_inputs, embed, forward, head, layer_names, logits

__all__ = [
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
    "layer_names",
    "load",
    "logits",
    "open_model",
    "read_block",
    "read_edges",
    "stream",
    "structure",
]
