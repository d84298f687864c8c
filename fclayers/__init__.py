"""The fully connected layer, complete: pure JAX functions over parameter pytrees."""

from fclayers.compression import CompressionRow, CompressionTable, compression_table
from fclayers.conv import ConvParams, apply_conv, avg_pool, init_conv, max_pool
from fclayers.convert import conv_to_linear, linear_to_conv, mlp_to_conv
from fclayers.export import export_apply, load_exported
from fclayers.fitting import History, fit
from fclayers.forms import LinearParams, LoraParams, LowRankParams, QuantizedParams
from fclayers.inspect import summarize
from fclayers.interop.equinox import from_equinox, to_equinox
from fclayers.interop.flax import from_flax, to_flax
from fclayers.interop.haiku import from_haiku, to_haiku
from fclayers.interop.keras import from_keras, to_keras
from fclayers.interop.safetensors import load_safetensors, save_safetensors
from fclayers.interop.torch import from_torch, to_torch
from fclayers.interop.torchvision import vgg16_from_torch
from fclayers.linear import apply_bilinear, apply_linear, init_bilinear, init_linear
from fclayers.losses import linear_argmax, linear_cross_entropy, linear_top_k
from fclayers.mlp import apply_mlp, init_mlp
from fclayers.models.vgg import Vgg16Params, apply_vgg16, init_vgg16, vgg16_score_map
from fclayers.sharding import linear_specs, mlp_specs, shard
from fclayers.slide.report import SlideReport, explain_slide
from fclayers.slide.tiles import slide_tiles
from fclayers.slide.transform import slide
from fclayers.training import TrainState, epoch_order, init_state, make_epoch, make_step
from fclayers.variants import (
    add_lora,
    dequantize,
    lora_mask,
    low_rank,
    merge_lora,
    quantize,
    reconstruction_error,
)

__all__ = [
    "CompressionRow",
    "CompressionTable",
    "ConvParams",
    "History",
    "LinearParams",
    "LoraParams",
    "LowRankParams",
    "QuantizedParams",
    "SlideReport",
    "TrainState",
    "Vgg16Params",
    "add_lora",
    "apply_bilinear",
    "apply_conv",
    "apply_linear",
    "apply_mlp",
    "apply_vgg16",
    "avg_pool",
    "compression_table",
    "conv_to_linear",
    "dequantize",
    "epoch_order",
    "explain_slide",
    "export_apply",
    "fit",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_torch",
    "init_bilinear",
    "init_conv",
    "init_linear",
    "init_mlp",
    "init_state",
    "init_vgg16",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_specs",
    "linear_to_conv",
    "linear_top_k",
    "load_exported",
    "load_safetensors",
    "lora_mask",
    "low_rank",
    "make_epoch",
    "make_step",
    "max_pool",
    "merge_lora",
    "mlp_specs",
    "mlp_to_conv",
    "quantize",
    "reconstruction_error",
    "save_safetensors",
    "shard",
    "slide",
    "slide_tiles",
    "summarize",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_torch",
    "vgg16_from_torch",
    "vgg16_score_map",
]
