"""The fully connected layer, and tools around it, as pure JAX functions."""

from importlib.metadata import version

from fclayers import interop, models, train
from fclayers.bilinear import BilinearParams, apply_bilinear, init_bilinear
from fclayers.conv import ConvParams, apply_conv, init_conv
from fclayers.convert import conv_to_linear, linear_to_conv, mlp_to_conv
from fclayers.export import export_apply, load_exported
from fclayers.heads.cross_entropy import linear_cross_entropy
from fclayers.heads.distillation import linear_distillation
from fclayers.heads.log_prob import LogProb, linear_log_prob, linear_logsumexp
from fclayers.heads.predictions import linear_argmax, linear_top_k
from fclayers.heads.sample import Sample, linear_sample
from fclayers.linear import LinearParams, apply_linear, init_linear
from fclayers.mlp import apply_mlp, init_mlp
from fclayers.per_example.clipping import clipped_grad
from fclayers.per_example.gram import empirical_ntk, gradient_gram
from fclayers.per_example.kronecker import KroneckerFactors, kronecker_factors
from fclayers.per_example.norms import per_example_norms
from fclayers.per_example.report import PerExampleReport, PerExampleRow, explain_per_example
from fclayers.pool import avg_pool, max_pool
from fclayers.sharding import mlp_specs, partition_specs, shard
from fclayers.sliding.report import SlideReport, explain_slide
from fclayers.sliding.tiles import slide_tiles
from fclayers.sliding.transform import slide
from fclayers.summary import (
    CompressionRow,
    CompressionTable,
    Summary,
    SummaryRow,
    compression_table,
    reconstruction_error,
    summarize,
)
from fclayers.weights.blockdiagonal import BlockDiagonal, block_diagonal
from fclayers.weights.form import WeightForm, register_weight
from fclayers.weights.int8 import Int8, quantize
from fclayers.weights.lora import Lora, add_lora, lora_mask
from fclayers.weights.lowrank import LowRank, low_rank
from fclayers.weights.muon import muon_dimension_numbers
from fclayers.weights.plain import materialize
from fclayers.weights.transposed import Transposed
from fclayers.weights.weightnorm import WeightNorm, weight_norm

__version__ = version("fclayers")

__all__ = [
    "BilinearParams",
    "BlockDiagonal",
    "CompressionRow",
    "CompressionTable",
    "ConvParams",
    "Int8",
    "KroneckerFactors",
    "LinearParams",
    "LogProb",
    "Lora",
    "LowRank",
    "PerExampleReport",
    "PerExampleRow",
    "Sample",
    "SlideReport",
    "Summary",
    "SummaryRow",
    "Transposed",
    "WeightForm",
    "WeightNorm",
    "add_lora",
    "apply_bilinear",
    "apply_conv",
    "apply_linear",
    "apply_mlp",
    "avg_pool",
    "block_diagonal",
    "clipped_grad",
    "compression_table",
    "conv_to_linear",
    "empirical_ntk",
    "explain_per_example",
    "explain_slide",
    "export_apply",
    "gradient_gram",
    "init_bilinear",
    "init_conv",
    "init_linear",
    "init_mlp",
    "interop",
    "kronecker_factors",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_sample",
    "linear_to_conv",
    "linear_top_k",
    "load_exported",
    "lora_mask",
    "low_rank",
    "materialize",
    "max_pool",
    "mlp_specs",
    "mlp_to_conv",
    "models",
    "muon_dimension_numbers",
    "partition_specs",
    "per_example_norms",
    "quantize",
    "reconstruction_error",
    "register_weight",
    "shard",
    "slide",
    "slide_tiles",
    "summarize",
    "train",
    "weight_norm",
]
